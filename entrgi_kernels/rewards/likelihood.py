"""The likelihood of a response under any causal language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..ops import soft_embedding
from ..text.template import Conversation, open_tag, surroundings
from ..text.vocabulary import VocabularyMap
from .base import Targets
from .decoding.causal import CausalHead, by_chunks
from .decoding.sequences import PreparedPrompts, Sequences, assemble, last_real, wide
from .network import NetworkReward


class LikelihoodReward(NetworkReward):
    """Mean log-likelihood, in nats per token, of a response and of what the chat template puts behind it.

    ::

        module = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        reward = LikelihoodReward(module, AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B"))
        GuidedSampler(model, reward, tokenizer).generate(["Why is the sky blue?"])

    The model reads the response as embeddings and predicts each next token. What it should predict is a token where
    one is committed; at a slot still open it is the diffusion LM's own distribution p = softmax(phi / temperature):
    the expected log-likelihood, with p held fixed. So a slot's logits are moved by how well what *follows* is
    predicted from them, and not simply toward whatever the model finds likeliest there.

    The vocabulary map gives targets across tokenizers as it gives embeddings. Tokens without a counterpart are
    predicted as the unknown token, as the mean of their pieces' log-likelihoods, or with ``unmatched="zero"`` not at
    all: the expectation then runs over the other tokens.

    Logits are computed in chunks of rows and never held for the whole batch; where logits are linear in the head's
    rows (all but Gemma 2 and heads with a bias), expectations over p are taken by one fused soft embedding of these
    rows and p is not written out either.

    Args:
        module: the causal LM.
        tokenizer, unmatched, chat_template, exact_savings: see :class:`NetworkReward`, as are the attributes.

    Attributes:
        takes_targets: True: :meth:`score_embeddings` needs ``targets=``, a :class:`Targets` or, for responses in the
            reward model's own tokens, int64 [B, L].

    Raises:
        TypeError: not a network, or no tokenizer.
        ValueError: the network is not causal or gives other predictions for embeddings than for the tokens they come
            from, no chat template or one that leaves a thought open before an answer, weights that are not finite, or
            an unknown name of a saving.
    """

    takes_ended = True
    takes_targets = True

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        *,
        unmatched: str = "unk",
        chat_template: str | None = None,
        exact_savings: str | Iterable[str] | None = "all",
    ) -> None:
        self._causal = CausalHead(module)
        super().__init__(
            module,
            tokenizer,
            self._causal.backbone,
            unmatched=unmatched,
            chat_template=chat_template,
            exact_savings=exact_savings,
        )
        self._causal.check_causal()
        tag = open_tag(surroundings(tokenizer, chat_template=chat_template)[1] or "")
        if tag is not None:
            raise ValueError(
                f"the chat template opens {tag!r} before an answer and leaves it open, so the response's likelihood "
                "would be that of a thought: expected a template that does not (pass chat_template=)"
            )
        self._matrices: dict[VocabularyMap, torch.Tensor] = {}
        self._known: dict[tuple[VocabularyMap, torch.device], torch.Tensor] = {}
        self._find_way("causal language models")

    # ---- what is expected where

    def prepare(self, conversations: list[Conversation]) -> PreparedPrompts:
        """As for every reward; a response's first token is predicted from what stands before it."""
        prepared = super().prepare(conversations)
        if not all(prepared.prefix_ids):
            raise ValueError(
                "the chat template puts nothing before the response, so its first token cannot be predicted: "
                "expected templates that write the prompt or a beginning-of-sequence token"
            )
        return prepared

    def head_table(self, tokenizer: Any, vocab_size: int) -> torch.Tensor:
        """[V, D]: the row of the head that predicts each token of the diffusion LM; cached.

        The very tensor of :meth:`embedding_table` where input and output embeddings are one and the same.
        """
        weight = self._causal.weight
        if type(self.embedding) is nn.Embedding and self.embedding.weight is weight:
            return self.embedding_table(tokenizer, vocab_size)
        return self._table("head", tokenizer, vocab_size, nn.Embedding.from_pretrained(weight.detach()))

    def _sequences(
        self,
        prepared: PreparedPrompts,
        index: torch.Tensor,
        response: torch.Tensor,
        alive: torch.Tensor,
        targets: Targets | torch.Tensor | None,
    ) -> Sequences:
        if targets is None:
            raise ValueError(
                "the likelihood of a response is one of its tokens, which embeddings do not tell: pass targets= "
                "(entrgi_kernels.rewards.Targets, or the reward model's own token ids, int64 [B, L])"
            )
        sequences = assemble(prepared, index, response, alive)
        device, batch = sequences.mask.device, len(sequences.mask)
        sequences.book = book = _Book(self, targets)
        codes = book.codes(targets).to(device)
        if codes.shape != response.shape[:2]:
            raise ValueError(f"targets has shape {tuple(codes.shape)}: expected [B, L] = {tuple(response.shape[:2])}")
        if "suffix_codes" not in prepared.extra:
            ids = torch.full(prepared.suffix_valid.shape, -1)
            for row, suffix in enumerate(prepared.suffix_ids):
                ids[row, ids.shape[1] - len(suffix) :] = torch.tensor(suffix, dtype=torch.long)
            prepared.extra["suffix_codes"] = ids.to(device)
        before = codes.new_full((batch, prepared.prefix_valid.shape[1]), -1)
        sequences.expected = torch.cat([before, codes, prepared.extra["suffix_codes"][index.to(device)]], dim=1)
        sequences.expected.masked_fill_(~sequences.mask, -1)
        return sequences

    def _text_sequences(self, rows: list[list[int]], starts: list[int]) -> Sequences:
        sequences = super()._text_sequences(rows, starts)
        expected = torch.full(sequences.mask.shape, -1)
        for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
            expected[row, expected.shape[1] - len(ids) + start :] = torch.tensor(ids[start:], dtype=torch.long)
        sequences.expected, sequences.book = expected.to(self.device), _Book(self, None)
        return sequences

    def _start(self, conversation: Conversation, ids: list[int]) -> int:
        prefix, _ = self.split(conversation)
        same = next((i for i, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), len(prefix))
        return max(1, same)  # tokens may merge over the boundary; the first one of all is never predicted

    def _probe_targets(self, ids: list[list[int]]) -> torch.Tensor:
        return torch.tensor(ids)

    # ---- how it is read

    def _own(self, ids: list[int]) -> torch.Tensor:
        logits = self._causal.own_logits(ids)[:-1].log_softmax(-1)
        return logits.gather(1, torch.tensor(ids[1:], device=logits.device)[:, None]).mean()

    def _plain(self, sequences: Sequences, last: torch.Tensor | None = None) -> torch.Tensor:
        if self.pooling == "last":
            states = self._hidden(sequences)
        else:
            states = self._output(self.module, self._whole_accepts, sequences).logits
        assert sequences.expected is not None
        scores = self._scores(states, sequences.mask, sequences.expected, sequences.book, sparse=True)
        return _mean(scores, sequences.expected >= 0)

    def _partial(
        self,
        use: frozenset[str],
        prepared: PreparedPrompts,
        index: torch.Tensor,
        sequences: Sequences,
        committed: torch.Tensor | int | None,
    ) -> torch.Tensor:
        assert self._savings is not None and sequences.expected is not None
        run = self._savings.run(use, prepared, index, sequences, committed, everywhere=True)
        assert run.columns is not None and run.valid is not None
        expected = sequences.expected.gather(1, run.columns)
        before, kept = run.before, run.kept
        if kept and before is not None:
            alive = torch.cat([torch.ones_like(run.kept_alive[:, :1]), run.kept_alive], dim=1)
            states = torch.cat([before[:, None], kept["states"]], dim=1)
            before = states[torch.arange(len(states), device=states.device), last_real(alive)]
        sparse = expected.device.type == "cpu"  # elsewhere, finding the places would mean waiting for the device
        scores = self._scores(run.hidden, run.valid, expected, sequences.book, before=before, sparse=sparse)
        counted = expected >= 0
        total, count = [scores], [counted]
        if kept:
            total, count = [kept["scores"], scores], [kept["counted"], counted]
        run.keep(states=run.hidden, scores=scores, counted=counted)
        return _mean(torch.cat(total, dim=1), torch.cat(count, dim=1))

    def _ends(self, sequences: Sequences) -> torch.Tensor:
        assert self._savings is not None and sequences.expected is not None
        columns = sequences.mask.shape[1]
        first = int((sequences.expected >= 0).any(0).long().argmax())
        count = columns - max(first, 1) + 1
        states = self._savings.end_of_texts(sequences, count)
        expected = sequences.expected[:, -count:]
        scores = self._scores(states, sequences.mask[:, -count:], expected, sequences.book, sparse=True)
        return _mean(scores, expected >= 0)

    def _scores(
        self,
        states: torch.Tensor,
        live: torch.Tensor,
        expected: torch.Tensor,
        book: _Book,
        *,
        before: torch.Tensor | None = None,
        sparse: bool,
    ) -> torch.Tensor:
        """Log-likelihoods [B, T] of what is expected at each place, 0 where nothing is.

        Args:
            states: [B, T, D] final states (logits, where the network is run whole).
            live: [B, T] bool: each place is predicted at the last live one before it.
            expected: [B, T] codes.
            before: [B, D], the state at the last live place before these.
            sparse: skip places at which nothing is expected; waits for the device to know them.
        """
        if before is None:
            before = torch.zeros_like(states[:, 0])
        states = torch.cat([before[:, None], states[:, :-1]], dim=1)
        places = torch.arange(1, live.shape[1], device=live.device).expand(len(live), -1)
        previous = places.masked_fill(~live[:, :-1], 0).cummax(1).values
        previous = torch.cat([torch.zeros_like(previous[:, :1]), previous], 1) if live.shape[1] > 1 else live.long() * 0
        states, codes = states.take_along_dim(previous[..., None], 1).flatten(0, 1), expected.flatten()
        picked = (codes >= 0).nonzero()[:, 0] if sparse else None
        if picked is not None:
            states, codes = states[picked], codes[picked]
        found = by_chunks(states, book.width, lambda rows, some: book.log_likelihood(rows, codes[some]))
        if picked is not None:
            found = found.new_zeros(expected.numel()).index_put((picked,), found)
        return found.view(expected.shape).masked_fill(expected < 0, 0)

    @property
    def _rows(self) -> int:
        """R, the tokens that the model predicts."""
        return (self._causal.weight if self.pooling == "last" else self.embedding.weight).shape[0]

    def _matrix(self, vocabulary: VocabularyMap) -> torch.Tensor:
        """The map as a sparse matrix [R, V]; cached."""
        if vocabulary not in self._matrices:
            dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
            self._matrices[vocabulary] = vocabulary.matrix(self._rows).to(self.device, dtype)
        return self._matrices[vocabulary]


class _Book:
    """What is expected at the places of one batch.

    Codes below R are tokens of the reward model, the V above them those of the diffusion LM, and the rest are open
    slots, by their row in ``targets.logits``.
    """

    def __init__(self, reward: LikelihoodReward, targets: Targets | torch.Tensor | None) -> None:
        self.head = reward._causal if reward.pooling == "last" else None
        self.rows = reward._rows
        self.width = self.rows
        self.linear = self.head is not None and self.head.linear
        self.targets = targets if isinstance(targets, Targets) else None
        if self.targets is None:
            return
        device, tokens = reward.device, self.targets.vocab_size
        vocabulary = reward.vocabulary_map(self.targets.tokenizer, tokens)
        self.width = max(self.rows, tokens)
        self.open = self.rows + tokens
        if (vocabulary, device) not in reward._known:  # copied once: a copy makes an accelerator wait
            reward._known[vocabulary, device] = vocabulary.known.to(device)
        self.known = reward._known[vocabulary, device]
        self.linear = self.linear and vocabulary.complete
        if not self.linear:
            self.matrix = reward._matrix(vocabulary)
            return
        self.table = reward.head_table(self.targets.tokenizer, tokens)
        self.soft = self.table[:0]
        if self.targets.logits is not None:
            # Softmax times the head's rows: the expectation of a target's logit is that of its row.
            with torch.no_grad():
                self.soft = soft_embedding(
                    self.targets.logits,
                    self.table,
                    temperature=self.targets.temperature or 1.0,
                    backend=self.targets.backend,
                )

    def codes(self, targets: Targets | torch.Tensor) -> torch.Tensor:
        """[B, L] int64: the code of each response slot, -1 for tokens that take no part."""
        if not isinstance(targets, Targets):
            return targets
        tokens = targets.tokens.to(self.known.device)
        codes = (tokens + self.rows).masked_fill(~self.known[tokens], -1)
        if targets.logits is None or targets.rows is None or targets.slots is None:
            return codes
        opened = torch.arange(len(targets.logits), device=codes.device) + self.open
        # One row more than there are responses, for rows of logits that belong to none.
        codes = nn.functional.pad(codes, (0, 0, 0, 1))
        return codes.index_put((targets.rows.to(codes.device), targets.slots.to(codes.device)), opened)[:-1]

    def log_likelihood(self, states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """[n] nats, of what codes [n] expect under the predictions of states [n, D] (code -1: of anything)."""
        logits = wide(states) if self.head is None else self.head.logits(states)
        if self.linear:
            assert self.head is not None
            expected = (wide(states) * wide(self._vectors(codes))).sum(-1) * self.head.scale
        else:
            expected = (logits * self._distributions(codes, logits.dtype)).sum(-1)
        return expected - logits.logsumexp(-1)

    def _vectors(self, codes: torch.Tensor) -> torch.Tensor:
        """Rows [n, D] of the head, expected ones at open slots."""
        assert self.head is not None
        vectors = self.head.weight.detach()[codes.clamp(0, self.rows - 1)]
        if self.targets is None:
            return vectors
        vectors = torch.where(
            (codes >= self.rows)[:, None], self.table[(codes - self.rows).clamp(0, len(self.table) - 1)], vectors
        )
        if len(self.soft):
            soft = self.soft[(codes - self.open).clamp(0, len(self.soft) - 1)]
            vectors = torch.where((codes >= self.open)[:, None], soft, vectors)
        return vectors

    def _distributions(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Distributions [n, R] over the reward model's tokens."""
        own = torch.nn.functional.one_hot(codes.clamp(0, self.rows - 1), self.rows).to(dtype)
        if self.targets is None:
            return own
        size = self.targets.vocab_size
        theirs = torch.nn.functional.one_hot((codes - self.rows).clamp(0, size - 1), size).to(dtype)
        if self.targets.logits is not None and len(self.targets.logits):
            logits = self.targets.logits[(codes - self.open).clamp(0, len(self.targets.logits) - 1)].detach().to(dtype)
            open_slots = (logits / (self.targets.temperature or 1.0)).softmax(-1)
            theirs = torch.where((codes >= self.open)[:, None], open_slots, theirs)
        mapped = (self.matrix @ theirs.T).T
        # Tokens without a counterpart take no part: the expectation runs over the others.
        mapped = mapped / mapped.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        return torch.where((codes >= self.rows)[:, None], mapped, own)


def _mean(scores: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[B] from scores [B, T] that are 0 where nothing counts."""
    return wide(scores.sum(1) / counted.sum(1).clamp_min(1))
