"""What rewards built on input embeddings share: the table through the vocabulary map, and the prompts' layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..models.modules import input_embedding, module_device, module_dtype, plain_precision
from ..text.template import Conversation, encode_answered, split_template
from ..text.vocabulary import VocabularyMap, check_rows, check_tokenizer, check_unmatched
from .base import check_texts
from .decoding.sequences import PreparedPrompts
from .weighted_sum import Combinable


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
            raise TypeError(f"a reward model is {type(module).__name__}: expected a torch.nn.Module")
        if tokenizer is not None:
            check_tokenizer(tokenizer, "the reward model's tokenizer")
        check_unmatched(unmatched)
        embedding = input_embedding(module)
        if embedding is None or not isinstance(getattr(embedding, "weight", None), torch.Tensor):
            raise TypeError(f"{type(module).__name__} exposes no input embedding (get_input_embeddings)")
        self.module = module
        self.tokenizer = tokenizer
        self.unmatched = unmatched
        self.chat_template = chat_template
        self._maps: dict[tuple[int, int, int], tuple[Any, VocabularyMap]] = {}
        self._tables: dict[tuple[Any, ...], tuple[tuple[Any, ...], torch.Tensor]] = {}
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
    def embedding(self) -> nn.Embedding:
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

    def embedding_table(self, tokenizer: Any, vocab_size: int) -> torch.Tensor:
        """E [V, D] in the reward model's dtype, on its device; cached until the model's embedding changes.

        Args:
            tokenizer: the diffusion LM's tokenizer.
            vocab_size: V, the rows of the diffusion LM's head.
        """
        return self._table("input", tokenizer, vocab_size, self.embedding)

    def _table(self, role: str, tokenizer: Any, vocab_size: int, embedding: nn.Embedding) -> torch.Tensor:
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

    def _embedded(
        self, conversations: list[Conversation], responses: list[str], batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Finished responses in batches, each as :meth:`embed_right_aligned` gives it."""
        check_texts(conversations, responses, batch_size)
        rows = [self.encode(turns, response) for turns, response in zip(conversations, responses, strict=True)]
        for start in range(0, len(rows), batch_size):
            yield self.embed_right_aligned(rows[start : start + batch_size])

    def prepare(self, conversations: list[Conversation]) -> PreparedPrompts:
        """Prefix and suffix of every prompt, as ids and as padded embeddings."""
        if not conversations:
            raise ValueError("there are no prompts to prepare: expected at least one conversation")
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
                f"tokens of the reward model, its chat template included: expected at most {self.position_limit}"
            )

    def embed_right_aligned(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
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
