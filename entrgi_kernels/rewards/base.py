"""What the guided sampler asks of a reward, and what rewards built on input embeddings share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..models.modules import input_embedding, module_device, module_dtype, plain_precision
from ..text.template import Conversation, encode_answered, split_template
from ..text.vocabulary import VocabularyMap, check_rows, check_tokenizer, check_unmatched


@dataclass
class PreparedPrompts:
    """Prompts as a reward model reads them: what comes before and after the response, computed once per run.

    Attributes:
        conversations: the prompts.
        prefix_ids, suffix_ids: token ids before and after the response, per prompt.
        prefix: [P, A, D] embeddings of the prefixes, left-padded with zeros to the longest.
        prefix_valid: [P, A] bool, False at padding.
        suffix: [P, Z, D] embeddings of the suffixes, right-aligned, so that every suffix ends at the last position.
        suffix_valid: [P, Z] bool.
        extra: room for what a kind of reward keeps per prompt beyond these (a prefix cache, the parts of a sum).
    """

    conversations: list[Conversation]
    prefix_ids: list[list[int]] = field(default_factory=list)
    suffix_ids: list[list[int]] = field(default_factory=list)
    prefix: Tensor | None = None
    prefix_valid: Tensor | None = None
    suffix: Tensor | None = None
    suffix_valid: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.conversations)


@dataclass
class Sequences:
    """A batch of [prefix | response | suffix] rows as a network takes it.

    Attributes:
        embeddings: [B, T, D].
        mask: [B, T] bool, False at padding and at dead slots.
        positions: [B, T] int64.
        expected: [B, T] int64, what a reward that predicts tokens expects at each place, in a code of its own; -1
            where nothing is predicted. None for other rewards.
        book: what ``expected`` refers to.
    """

    embeddings: Tensor
    mask: Tensor
    positions: Tensor
    expected: Tensor | None = None
    book: Any = None

    def without_padding(self, rows: Tensor, columns: Tensor) -> Sequences:
        """Some rows, cut to the columns in which they hold no padding, with positions counted from 0."""
        positions = torch.arange(len(columns), device=columns.device).expand(len(rows), -1)
        expected = None if self.expected is None else self.expected[rows][:, columns]
        return Sequences(self.embeddings[rows][:, columns], self.mask[rows][:, columns], positions, expected, self.book)


@dataclass
class Targets:
    """What each slot of a batch of responses holds, or may come to hold, in the diffusion LM's own tokens.

    Attributes:
        tokenizer: of the diffusion LM.
        vocab_size: V, the rows of its head.
        tokens: [B, L] int64, the tokens; at open slots the likeliest ones.
        ended: [B, L] bool, slots whose token ends the response.
        rows, slots: [N] int64, the slots still open; None when none is. A row of B stands for none of the responses.
        logits: [N, V], their logits; p = softmax(logits / temperature). No gradient reaches them from here.
        temperature: 0 stands for 1, as in the soft embedding.
        backend: of the operators of :mod:`entrgi_kernels.ops`.
    """

    tokenizer: Any
    vocab_size: int
    tokens: Tensor
    ended: Tensor
    rows: Tensor | None = None
    slots: Tensor | None = None
    logits: Tensor | None = None
    temperature: float = 1.0
    backend: str = "auto"


@runtime_checkable
class Reward(Protocol):
    """A reward as the guided sampler sees it: differentiable in the response's embeddings, and able to score texts."""

    def embedding_table(self, tokenizer: Any, vocab_size: int) -> Tensor:
        """E [V, D]: the embedding that stands for each token of the diffusion LM; cached."""
        ...

    def prepare(self, conversations: list[Conversation]) -> PreparedPrompts:
        """Everything about the prompts that stays the same during a run."""
        ...

    def score_embeddings(self, prepared: PreparedPrompts, index: Tensor, response: Tensor, alive: Tensor) -> Tensor:
        """Rewards [B] of responses given as embeddings.

        Args:
            prepared: what :meth:`prepare` returned.
            index: [B] int64, the prompt of each row.
            response: [B, L, D] embeddings of the response slots; the result is differentiable in them. The sampler's
                own memory, which its next inner step writes to again: clone what is to be kept.
            alive: [B, L] bool, False at slots after the end of the response: nothing attends to them, and they keep
                their position ids.

        A reward with the attribute ``takes_committed`` also takes ``committed=``, how many leading slots of each row
        are the same in all later calls; see :class:`NetworkReward`. One with ``takes_targets`` also takes
        ``targets=``, the tokens themselves (:class:`Targets`): a likelihood is one of tokens.
        """
        ...

    def score_texts(self, conversations: list[Conversation], responses: list[str], batch_size: int = 8) -> list[float]:
        """Rewards of finished responses, through the chat template and the reward model's own tokenizer."""
        ...


class Combinable:
    """Rewards that are written into sums: ``0.7 * a + 0.3 * b - c`` is a :class:`WeightedSum`."""

    def __mul__(self, weight: float) -> Any:
        from .weighted_sum import WeightedSum

        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            return NotImplemented
        return WeightedSum([(weight, self)])  # type: ignore[list-item]

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        from .weighted_sum import WeightedSum

        if isinstance(other, type) or not isinstance(other, Reward):
            return NotImplemented
        return WeightedSum([(1.0, self), (1.0, other)])  # type: ignore[list-item]

    def __neg__(self) -> Any:
        return self * -1.0

    def __sub__(self, other: Any) -> Any:
        return self + -1.0 * other if isinstance(other, Combinable) else NotImplemented


class EmbeddingReward(Combinable):
    """Base of the rewards that run a network on input embeddings: vocabulary map, prompts, sequence layout.

    Args:
        module: the network; its input embedding gives the table.
        tokenizer: its tokenizer, with a chat template; None for a reward that is handed embeddings alone, prompts too.
        unmatched: see :class:`VocabularyMap`.
        chat_template: a template to use instead of the tokenizer's own.

    Attributes:
        position_limit: how many positions the network has learned; None where it computes them, or cuts texts.

    Raises:
        TypeError, ValueError: an argument is not what it should be, named in the message.
    """

    position_limit: int | None = None

    def __init__(
        self, module: nn.Module, tokenizer: Any, *, unmatched: str = "unk", chat_template: str | None = None
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"a reward model must be a torch.nn.Module, got {type(module).__name__}")
        if tokenizer is not None:
            check_tokenizer(tokenizer, "the reward model's tokenizer")
        check_unmatched(unmatched)
        embedding = input_embedding(module)
        if embedding is None or not isinstance(getattr(embedding, "weight", None), Tensor):
            raise TypeError(f"{type(module).__name__} exposes no input embedding (get_input_embeddings)")
        self.module = module
        self.tokenizer = tokenizer
        self.unmatched = unmatched
        self.chat_template = chat_template
        self._maps: dict[tuple[int, int, int], tuple[Any, VocabularyMap]] = {}
        self._tables: dict[tuple[Any, ...], tuple[tuple[Any, ...], Tensor]] = {}
        # Now rather than in the middle of a run: says what to pass when the tokenizer has no usable chat template.
        if tokenizer is not None:
            if embedding.weight.dim() == 2:
                check_rows(tokenizer, embedding.weight.shape[0], f"the reward model ({type(module).__name__})")
            self.split([{"role": "user", "content": "a"}])

    @property
    def device(self) -> torch.device:
        """The device that the network takes its inputs on."""
        return module_device(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the input embeddings."""
        return self.embedding.weight.dtype if self.embedding.weight.is_floating_point() else module_dtype(self.module)

    @property
    def embedding(self) -> nn.Module:
        """The network's input embedding."""
        embedding = input_embedding(self.module)
        assert embedding is not None  # checked at construction
        return embedding

    def vocabulary_map(self, tokenizer: Any, vocab_size: int) -> VocabularyMap:
        """The map from a diffusion LM's tokens to this reward model's; cached per tokenizer and size."""
        check_tokenizer(tokenizer, "tokenizer")
        key = id(tokenizer), len(tokenizer), vocab_size
        if key not in self._maps:
            rows = self.embedding.weight.shape[0]
            built = VocabularyMap(
                tokenizer, vocab_size, self.tokenizer, unmatched=self.unmatched, reward_vocab_size=rows
            )
            self._maps[key] = tokenizer, built  # the tokenizer is kept, so that its id stays its own
        return self._maps[key][1]

    def embedding_table(self, tokenizer: Any, vocab_size: int) -> Tensor:
        """E [V, D] in the reward model's dtype, on its device; cached until the model's embedding changes.

        Args:
            tokenizer: the diffusion LM's tokenizer.
            vocab_size: V, the rows of the diffusion LM's head.
        """
        return self._table("input", tokenizer, vocab_size, self.embedding)

    def _table(self, role: str, tokenizer: Any, vocab_size: int, embedding: nn.Module) -> Tensor:
        """A table [V, D] of the rows of an embedding that stand for a diffusion LM's tokens; cached by its role."""
        vocabulary = self.vocabulary_map(tokenizer, vocab_size)
        weight = embedding.weight
        key = role, id(tokenizer), len(tokenizer), vocab_size
        version = -1 if weight.is_inference() else weight._version
        state = weight.device, weight.dtype, weight.data_ptr(), version
        if key not in self._tables or self._tables[key][0] != state:
            with plain_precision(self.device), torch.no_grad():
                self._tables[key] = state, vocabulary.table(embedding)
        return self._tables[key][1]

    def split(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Token ids before and after the response; a reward that asks about responses has its own."""
        return split_template(self.tokenizer, conversation, chat_template=self.chat_template)

    def encode(self, conversation: Conversation, response: str) -> list[int]:
        """Token ids of a conversation with its response."""
        return encode_answered(self.tokenizer, conversation, response, chat_template=self.chat_template)

    def prepare(self, conversations: list[Conversation]) -> PreparedPrompts:
        """Prefix and suffix of every prompt, as ids and as padded embeddings."""
        if not conversations:
            raise ValueError("there are no prompts to prepare; accepted: at least one conversation")
        split = [self._as_read(*self.split(turns)) for turns in conversations]
        prefix_ids, suffix_ids = [list(ids) for ids, _ in split], [list(ids) for _, ids in split]
        prefix, prefix_valid = self.embed_right_aligned(prefix_ids)
        suffix, suffix_valid = self.embed_right_aligned(suffix_ids)
        return PreparedPrompts(
            [list(turns) for turns in conversations],
            prefix_ids,
            suffix_ids,
            prefix,
            prefix_valid,
            suffix,
            suffix_valid,
        )

    def _as_read(self, prefix: list[int], suffix: list[int]) -> tuple[list[int], list[int]]:
        """The beginning and the end of a text, as far as the network reads them."""
        return prefix, suffix

    def check_length(self, conversations: list[Conversation], slots: int) -> None:
        """Raise ValueError where a prompt leaves no room for so many response slots, before anything is run."""
        if self.position_limit is None:
            return
        for place, turns in enumerate(conversations):
            prefix, suffix = self._as_read(*self.split(turns))
            self._check_fits(len(prefix) + slots + len(suffix), f"prompt {place} with {slots} response slots")

    def _check_fits(self, length: int, what: str) -> None:
        if self.position_limit is not None and length > self.position_limit:
            raise ValueError(
                f"{type(self.module).__name__} has learned {self.position_limit} positions, and {what} takes {length} "
                f"tokens of the reward model, its chat template included; accepted: at most {self.position_limit}"
            )

    def embed_right_aligned(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Embeddings [R, T, D] of token ids, padded with zeros on the left, and which positions are real [R, T]."""
        device = self.device
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        valid = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, tokens in enumerate(rows):
            if tokens:
                ids[row, longest - len(tokens) :] = torch.tensor(tokens)
                valid[row, longest - len(tokens) :] = True
        ids, valid = ids.to(device), valid.to(device)
        with plain_precision(device), torch.no_grad():
            return self.embedding(ids).masked_fill(~valid[..., None], 0), valid


def reward_gradient(value: Tensor, embeddings: Tensor, name: str, *, retain_graph: bool = False) -> Tensor:
    """d value / d embeddings, of a value [] made of rewards.

    Args:
        value, embeddings: as for ``torch.autograd.grad``, as is ``retain_graph``.
        name: what the embeddings are called where the reward is made.

    Raises:
        ValueError: no gradient gets from one to the other.
    """
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, embeddings, retain_graph=retain_graph, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"the reward's value does not depend on {name} (no gradient: detach, argmax, no_grad or numpy on the way); "
            "use it for ranking (method='none'), not for guidance"
        )
    return gradient


def assemble(prepared: PreparedPrompts, index: Tensor, response: Tensor, alive: Tensor) -> Sequences:
    """Lay out [prefix | response | suffix] for a batch of responses.

    Positions are counted as if nothing were dead and nothing padded: a prefix starts at 0 behind its left padding, a
    dead response slot keeps its own number, and a short suffix follows the response directly although padding lies
    between them. So a row's positions depend on that row alone.

    Args:
        prepared: P prompts.
        index: [B] int64, prompt of each row.
        response: [B, L, D].
        alive: [B, L] bool.

    Returns:
        The rows; the last position is each row's last real token, whatever the lengths, unless the suffix is empty.

    Raises:
        ValueError: shapes do not fit together.
    """
    if prepared.prefix is None or prepared.suffix is None:
        raise ValueError("these prompts were prepared without embeddings")
    width = prepared.prefix.shape[-1]
    if response.dim() != 3 or response.shape[-1] != width:
        raise ValueError(f"response must be [B, L, {width}], got shape {tuple(response.shape)}")
    if alive.shape != response.shape[:2] or alive.dtype != torch.bool:
        raise ValueError(
            f"alive must be bool [B, L] = {tuple(response.shape[:2])}, got {alive.dtype} {tuple(alive.shape)}"
        )
    if index.shape != response.shape[:1]:
        raise ValueError(f"index must be [B] = {tuple(response.shape[:1])}, got {tuple(index.shape)}")
    device, length = prepared.prefix.device, response.shape[1]
    index = index.to(device)
    prefix_valid, suffix_valid = prepared.prefix_valid[index], prepared.suffix_valid[index]
    response = response.to(device=device, dtype=prepared.prefix.dtype)
    embeddings = torch.cat([prepared.prefix[index], response, prepared.suffix[index]], dim=1)
    mask = torch.cat([prefix_valid, alive.to(device), suffix_valid], dim=1)
    counted = torch.cat([prefix_valid, prefix_valid.new_ones(len(index), length), suffix_valid], dim=1)
    positions = (counted.long().cumsum(1) - 1).clamp_min(0)
    return Sequences(embeddings, mask, positions)
