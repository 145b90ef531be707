"""The vocabulary map: a diffusion LM's tokens seen through a reward model's embedding table."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .plain import plain_ids
from .tokens import added_tokens, special_roles, spellings, token_kind

UNMATCHED_MODES = ("unk", "zero", "pieces")

# Tokens looked up per call of the reward tokenizer and per gather of embeddings, to bound the memory of "pieces".
_CHUNK = 16384


class VocabularyMap:
    """Which reward-model token, if any, stands for each of a diffusion LM's V token ids.

    Tokens match by the text they stand for (``Ġx`` of a byte-level BPE and ``▁x`` of SentencePiece are both " x");
    special and added tokens match by their exact string. End-of-sequence and padding of the diffusion tokenizer fall
    back to the reward tokenizer's end of sequence, other special tokens to the one of the same role. Several ids may
    map to one.

    Args:
        tokenizer: the diffusion LM's tokenizer.
        vocab_size: V, the number of rows of the diffusion LM's head (padded heads have more rows than tokens).
        reward_tokenizer: the reward model's tokenizer.
        unmatched: what stands for ids without a counterpart: ``"unk"``, the reward tokenizer's unknown token, else its
            end of sequence; ``"zero"``, a vector of zeros; ``"pieces"``, the mean of the embeddings of the token's
            text as the reward tokenizer splits it (special tokens and ids without a token: as with "unk").
        mask_token_id: the diffusion LM's mask token, when its tokenizer does not know it.
        reward_vocab_size: rows of the reward model's embedding table, when it has fewer than its tokenizer has ids.

    Attributes:
        ids: [V] int64, the reward token of each id, -1 where there is none.
        pieces: for ``"pieces"``, the reward tokens of each unmatched id's text.
        undrawable_ids: [U] int64, ids that must never be drawn: those without a token, and the mask token.
        identical: True when both tokenizers have the same vocabulary.
        known: [V] bool, the ids that something stands for.
        complete: True when something stands for every id.

    Raises:
        TypeError, ValueError: an argument is not what it should be, named in the message.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        reward_tokenizer: Any,
        *,
        unmatched: str = "unk",
        mask_token_id: int | None = None,
        reward_vocab_size: int | None = None,
    ) -> None:
        check_unmatched(unmatched)
        check_tokenizer(tokenizer, "tokenizer")
        check_tokenizer(reward_tokenizer, "reward_tokenizer")
        self.vocab_size = vocab_size
        self.unmatched = unmatched
        self.undrawable_ids = undrawable_ids(tokenizer, vocab_size, mask_token_id)
        vocabulary, reward_vocabulary = tokenizer.get_vocab(), reward_tokenizer.get_vocab()
        rows = reward_vocab_size if reward_vocab_size is not None else max(reward_vocabulary.values(), default=-1) + 1
        self.identical = vocabulary == reward_vocabulary

        ids = [-1] * vocab_size
        if self.identical:
            for index in vocabulary.values():
                if index < min(vocab_size, rows):
                    ids[index] = index
        else:
            reward_vocabulary = {token: index for token, index in reward_vocabulary.items() if index < rows}
            for token, index in _matches(tokenizer, reward_tokenizer, vocabulary, reward_vocabulary).items():
                if token < vocab_size:
                    ids[token] = index
        self.ids = torch.tensor(ids, dtype=torch.long)

        roles = special_roles(reward_tokenizer)
        substitute = roles.get("unk", roles.get("eos"))
        self._substitute = substitute if substitute is not None and substitute < rows else None
        if unmatched == "unk" and self._substitute is None and bool((self.ids < 0).any()):
            raise ValueError(
                f"{int((self.ids < 0).sum())} of {vocab_size} tokens have no counterpart in the reward model's "
                "vocabulary, and its tokenizer has neither an unk_token nor an eos_token to stand for them; "
                "pass unmatched='zero' or unmatched='pieces', or set one of the two tokens"
            )
        self.pieces: dict[int, list[int]] = {}
        if unmatched == "pieces":
            self.pieces = _pieces(tokenizer, reward_tokenizer, self.ids, vocabulary, rows)

        drawable = torch.ones(vocab_size, dtype=torch.bool)
        drawable[self.undrawable_ids] = False
        self._drawable = int(drawable.sum())
        self._matched = int((drawable & (self.ids >= 0)).sum())
        self.known = self.ids >= 0
        self.known[list(self.pieces)] = True
        if unmatched != "zero" and self._substitute is not None:
            self.known[:] = True
        self.complete = bool(self.known.all())

    @property
    def matched(self) -> int:
        """Number of ids that can be drawn and have a counterpart."""
        return self._matched

    @property
    def coverage(self) -> float:
        """Share of the ids that can be drawn that have a counterpart, from 0 to 1."""
        return self._matched / self._drawable if self._drawable else 0.0

    def matrix(self, rows: int) -> torch.Tensor:
        """The map as a sparse float64 matrix [rows, V]: column v holds what stands for id v, and sums to one or zero.

        Args:
            rows: of the reward model's vocabulary.
        """
        ids = self.ids.clone()
        if self.unmatched != "zero" and self._substitute is not None:
            ids[ids < 0] = self._substitute
        ids[list(self.pieces)] = -1
        single = (ids >= 0).nonzero()[:, 0]
        pieces = [(piece, token, 1 / len(found)) for token, found in self.pieces.items() for piece in found]
        places = torch.tensor([[p, t] for p, t, _ in pieces], dtype=torch.long).reshape(-1, 2).T
        values = torch.tensor([share for _, _, share in pieces], dtype=torch.float64)
        places = torch.cat([torch.stack([ids[single], single]), places], dim=1)
        values = torch.cat([torch.ones(len(single), dtype=torch.float64), values])
        size = rows, self.vocab_size
        return torch.sparse_coo_tensor(places, values, size, check_invariants=False).coalesce()

    def __repr__(self) -> str:
        return (
            f"VocabularyMap({self._matched} of {self._drawable} tokens matched ({self.coverage:.1%}), "
            f"{self.undrawable_ids.numel()} of {self.vocab_size} ids undrawable, unmatched={self.unmatched!r}"
            f"{', same vocabulary' if self.identical else ''})"
        )

    @torch.no_grad()
    def table(self, embedding: nn.Embedding) -> torch.Tensor:
        """The embedding table E [V, D] in the reward model's dtype and on its device.

        Args:
            embedding: the reward model's input embedding. It is called, not read: some architectures scale inside it.
        """
        device = embedding.weight.device
        ids = self.ids.to(device)
        unmatched = ids < 0
        substitute = self._substitute if self._substitute is not None else 0
        table = embedding(ids.masked_fill(unmatched, substitute))
        if self.unmatched == "zero" or self._substitute is None:
            table[unmatched] = 0
        if self.pieces:
            items = list(self.pieces.items())
            for start in range(0, len(items), _CHUNK):
                chunk = items[start : start + _CHUNK]
                owner = [i for i, (_, pieces) in enumerate(chunk) for _ in pieces]
                flat = [piece for _, pieces in chunk for piece in pieces]
                vectors = embedding(torch.tensor(flat, device=device))
                wide = torch.float64 if table.dtype == torch.float64 else torch.float32
                mean = vectors.new_zeros(len(chunk), table.shape[1], dtype=wide)
                mean.index_add_(0, torch.tensor(owner, device=device), vectors.to(wide))
                counts = torch.tensor([len(pieces) for _, pieces in chunk], device=device, dtype=wide)
                table[torch.tensor([token for token, _ in chunk], device=device)] = (mean / counts[:, None]).to(table)
        return table


def undrawable_ids(tokenizer: Any, vocab_size: int, mask_token_id: int | None = None) -> torch.Tensor:
    """Ids [U] of a diffusion LM that must never be drawn: rows of its head without a token, and the mask token.

    Args:
        tokenizer: the diffusion LM's tokenizer.
        vocab_size: V, the number of rows of its head.
        mask_token_id: the mask token, when the tokenizer does not know it.

    Raises:
        ValueError: ``vocab_size`` is not a positive number.
    """
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size!r}: expected a positive int")
    known = set(tokenizer.get_vocab().values())
    banned = {index for index in range(vocab_size) if index not in known}
    for mask in (mask_token_id, getattr(tokenizer, "mask_token_id", None)):
        if mask is not None and mask < vocab_size:
            banned.add(int(mask))
    return torch.tensor(sorted(banned), dtype=torch.long)


def check_unmatched(unmatched: Any) -> None:
    """Raise ValueError unless ``unmatched`` is one of the modes."""
    if unmatched not in UNMATCHED_MODES:
        raise ValueError(f"unmatched={unmatched!r}: expected one of {', '.join(map(repr, UNMATCHED_MODES))}")


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise TypeError unless ``tokenizer`` looks like a Hugging Face tokenizer."""
    if tokenizer is None:
        raise TypeError(f"{name} is None; pass the tokenizer that belongs to the model")
    if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"{name} is {type(tokenizer).__name__}: expected a Hugging Face tokenizer")


def check_rows(tokenizer: Any, rows: int, owner: str) -> None:
    """Raise ValueError unless every token of a tokenizer has a row in the embedding table of its model.

    A token that was added without ``resize_token_embeddings`` has none.
    """
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    if beyond:
        index, token = beyond[0]
        others = f" (and {len(beyond) - 1} tokens more)" if len(beyond) > 1 else ""
        raise ValueError(
            f"the tokenizer's token {token!r} has id {index}{others}, but the embedding table of {owner} has {rows} "
            f"rows: expected a row a token (resize_token_embeddings({beyond[-1][0] + 1}) adds untrained ones)"
        )


def _matches(
    tokenizer: Any, reward_tokenizer: Any, vocabulary: dict[str, int], reward_vocabulary: dict[str, int]
) -> dict[int, int]:
    """Diffusion id -> reward id for every token that has a counterpart."""
    kind, reward_kind = token_kind(tokenizer), token_kind(reward_tokenizer)
    added, reward_added = added_tokens(tokenizer), added_tokens(reward_tokenizer)
    by_text = _by_text(reward_vocabulary, reward_kind, reward_added)
    found: dict[int, int] = {}
    # Lowest id first, so that an id that two strings share keeps its first one.
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        if token in added:
            index = added[token][0]
            match = reward_vocabulary.get(token)
            if match is None and not added[token][1]:  # an added word or run of spaces is ordinary text elsewhere
                match = by_text.get(token.encode("utf-8"))
        else:
            match = next((by_text[text] for text in spellings(token, kind) if text in by_text), None)
        if match is not None:
            found.setdefault(index, match)
    roles, reward_roles = special_roles(tokenizer), special_roles(reward_tokenizer)
    rows = set(reward_vocabulary.values())
    for role, index in roles.items():
        if role == "mask":  # never drawn, and the reward model's own mask token means something else to it
            continue
        counterpart = reward_roles.get("eos") if role in ("eos", "pad") else reward_roles.get(role)
        if index not in found and counterpart in rows:
            found[index] = counterpart
    return found


def _by_text(vocabulary: dict[str, int], kind: str, added: dict[str, tuple[int, bool]]) -> dict[bytes, int]:
    """Text -> id of a vocabulary's ordinary tokens; a likelier reading of a text goes before a less likely one."""
    first: dict[bytes, int] = {}
    second: dict[bytes, int] = {}
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        if token in added:
            if not added[token][1]:
                second.setdefault(token.encode("utf-8"), index)
            continue
        likeliest, *others = spellings(token, kind)
        first.setdefault(likeliest, index)
        for other in others:
            second.setdefault(other, index)
    return {**second, **first}


def _pieces(
    tokenizer: Any, reward_tokenizer: Any, ids: torch.Tensor, vocabulary: dict[str, int], rows: int
) -> dict[int, list[int]]:
    """Reward tokens of each unmatched id's text; nothing for special tokens, ids without one, and fragments of a
    character that are no text of their own."""
    kind, added = token_kind(tokenizer), added_tokens(tokenizer)
    size = ids.numel()
    missing = [(token, index) for token, index in vocabulary.items() if index < size and ids[index] < 0]
    found: dict[int, list[int]] = {}
    for token, index in missing:
        if token in added:
            if added[token][1]:
                continue
            text = token
        else:
            try:
                text = spellings(token, kind)[0].decode("utf-8")
            except UnicodeDecodeError:
                continue
        pieces = [piece for piece in plain_ids(reward_tokenizer, text, continuation=True) if piece < rows]
        if pieces:
            found[index] = pieces
    return found
