"""How close a response is to a target text, by a sentence-embedding model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..models.modules import (
    accepted_arguments,
    evaluating,
    first_nonfinite_parameter,
    frozen,
    learned_positions,
    plain_precision,
)
from ..text.plain import plain_ids
from ..text.template import Conversation, check_unicode
from .decoding.sequences import PreparedPrompts, assemble, last_real, wide
from .embedding import EmbeddingReward

POOLINGS = ("mean", "cls", "max", "last")
# What sentence-transformers calls these in a pooling module's config.json.
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_NAMES = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}


class SimilarityReward(EmbeddingReward):
    """Cosine, from -1 to 1, between the sentence embeddings of the response and of a target text.

    ::

        module = AutoModel.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
        tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
        reward = SimilarityReward(module, tokenizer, "The soup was cold.", unmatched="pieces")
        GuidedSampler(model, reward, tokenizer_of_the_model).generate(["How was the inn?"])

    The response is read alone, between the special tokens that the tokenizer puts around a text; the prompt plays no
    part. Positions are counted over live slots, as they will be once the response is text.

    Args:
        module: an encoder (BERT, MiniLM, MPNet, XLM-R, ...) or an embedding decoder, returning hidden states.
        tokenizer: its tokenizer; no chat template is needed.
        target: the text to come close to.
        pooling: ``"mean"``, ``"cls"``, ``"max"`` or ``"last"``; None takes what the model's own sentence-transformers
            files say (``modules.json``), and ``"mean"`` where there are none.
        max_length: tokens read at most, special ones included; None takes what these files and the model's positions
            allow. What is longer is cut, as sentence-transformers does.
        unmatched: see :class:`VocabularyMap`; ``"pieces"`` is best across tokenizers of different granularity.

    Attributes:
        pooling, max_length: those in use.
        takes_ended: True: a slot that ends the response is left out.

    Raises:
        TypeError: not a network, or no tokenizer.
        ValueError: an empty target, an unknown pooling, modules that change embeddings in another way (Dense), or
            files that are damaged or out of reach: the model was loaded by a relative path that leads elsewhere now,
            or from a cache that holds config and weights alone.
    """

    takes_ended = True

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        target: str,
        *,
        pooling: str | None = None,
        max_length: int | None = None,
        unmatched: str = "unk",
    ) -> None:
        if not isinstance(target, str) or not target.strip():
            raise ValueError(f"target={target!r}: expected a text to come close to")
        check_unicode(target, "the target")
        if pooling is not None and pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}: expected one of {', '.join(map(repr, POOLINGS))}")
        super().__init__(module, tokenizer, unmatched=unmatched)
        bad = first_nonfinite_parameter(module)
        if bad is not None:
            raise ValueError(
                f"parameter {bad!r} of {type(module).__name__} holds NaN or infinite values; the weights are damaged"
            )
        theirs, length = None, None
        if pooling is None or max_length is None:
            theirs, length = _settings(getattr(module, "config", None), pooling is None)
        self.target, self.pooling = target, pooling or theirs or "mean"
        self._accepts = accepted_arguments(module)
        said = getattr(getattr(module, "config", None), "max_position_embeddings", None)
        limits = [limit for limit in (max_length or length, said, self._positions()) if limit]
        self.max_length: int | None = min(limits) if limits else None
        self._aim: tuple[Any, torch.Tensor] | None = None

    def __repr__(self) -> str:
        return (
            f"SimilarityReward({type(self.module).__name__}, target={self.target!r}, pooling={self.pooling!r}, "
            f"max_length={self.max_length})"
        )

    def split(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        whole = list(self.tokenizer("a")["input_ids"])
        inner = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return [], []

    def encode(self, conversation: Conversation, response: str) -> list[int]:
        """Token ids of the response between the special tokens, cut to ``max_length``."""
        prefix, suffix = self.split(conversation)
        room = None if self.max_length is None else max(0, self.max_length - len(prefix) - len(suffix))
        return [*prefix, *plain_ids(self.tokenizer, response)[:room], *suffix]

    def score_embeddings(
        self,
        prepared: PreparedPrompts,
        index: torch.Tensor,
        response: torch.Tensor,
        alive: torch.Tensor,
        *,
        ended: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cosines [B] (float32, float64 for a float64 model), differentiable in ``response`` [B, L, D].

        See :meth:`Reward.score_embeddings`; ``ended`` [B, L] tells which slots end a response.
        """
        with plain_precision(self.device), evaluating(self.module), frozen(self.module):
            alive = alive if ended is None else alive & ~ended
            if self.max_length is not None:
                fixed = prepared.prefix_valid.shape[1] + prepared.suffix_valid.shape[1]
                room = max(0, self.max_length - fixed)
                alive = alive & (alive.cumsum(1) <= room)  # the first live slots that fit, as of the finished text
            rows = assemble(prepared, index, response, alive)
            return self._cosine(rows.embeddings, rows.mask)

    @torch.no_grad()
    def score_texts(self, conversations: list[Conversation], responses: list[str], batch_size: int = 8) -> list[float]:
        """Cosines of finished responses. A batch gives what single texts would.

        Raises:
            ValueError, TypeError: as for :meth:`NetworkReward.score_texts`.
        """
        scores: list[float] = []
        with plain_precision(self.device), evaluating(self.module):
            for embeddings, mask in self._embedded(conversations, responses, batch_size):
                scores += self._cosine(embeddings, mask).tolist()
        return scores

    # ---- how the model is run

    def _cosine(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return functional.cosine_similarity(self._sentences(embeddings, mask), self._target(), dim=-1)

    def _target(self) -> torch.Tensor:
        """The target's sentence embedding [1, D'], computed again when the model has moved or changed."""
        weight = self.embedding.weight
        state = weight.device, weight.dtype, weight.data_ptr(), -1 if weight.is_inference() else weight._version
        if self._aim is None or self._aim[0] != state:
            with torch.no_grad():
                self._aim = state, self._sentences(*self.embed_right_aligned([self.encode([], self.target)]))
        return self._aim[1]

    def _sentences(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pooled embeddings [B, D'] of rows [B, T, D], packed to the left: absolute positions count from there."""
        order = (~mask).long().argsort(dim=1, stable=True)
        embeddings, mask = embeddings.take_along_dim(order[..., None], 1), mask.gather(1, order)
        if mask.device.type == "cpu":  # elsewhere, knowing the longest row would mean waiting for the device
            longest = max(1, int(mask.sum(1).max()))
            embeddings, mask = embeddings[:, :longest], mask[:, :longest]
        elif self.max_length is not None:
            embeddings, mask = embeddings[:, : self.max_length], mask[:, : self.max_length]
        hidden = self._states(embeddings, mask)
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), last_real(mask)]
        if self.pooling == "max":
            return hidden.masked_fill(~mask[..., None], torch.finfo(hidden.dtype).min).amax(1)
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)

    def _states(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The network's final states [B, T, D'] of rows [B, T, D]."""
        arguments: dict[str, Any] = {"inputs_embeds": embeddings, "attention_mask": mask.long()}
        if "use_cache" in self._accepts:
            arguments["use_cache"] = False
        output = self.module(**arguments)
        hidden = getattr(output, "last_hidden_state", None)
        return wide(hidden if isinstance(hidden, torch.Tensor) else output[0])

    def _positions(self) -> int | None:
        """How many positions the network has learned, None where it computes them."""
        if any(parameter.is_meta for parameter in self.module.parameters()):
            return None
        with plain_precision(self.device), evaluating(self.module), torch.no_grad():
            text = self.embed_right_aligned([[0] * 4])
            return learned_positions(lambda: self._states(*text), 4)


def _settings(config: Any, pooling: bool) -> tuple[str | None, int | None]:
    """Pooling and longest text that a model's sentence-transformers files ask for, None where they say nothing.

    Args:
        config: the model's, which knows where it was loaded from.
        pooling: whether the pooling will be used.
    """
    source = str(getattr(config, "_name_or_path", None) or "")
    if not source:  # made here, not loaded
        return None, None
    revision = getattr(config, "_commit_hash", None)
    modules = _read(source, "modules.json", list, revision)
    described = _read(source, "sentence_bert_config.json", dict, revision)
    folder = Path(source).resolve()
    if modules is None and folder.is_dir():  # older ones keep the network in a folder of its own
        above = _read(str(folder.parent), "modules.json", list, revision) or []
        if folder.name in [module.get("path") for module in above]:
            source, modules = str(folder.parent), above
    if modules is not None and described is None:
        described = _read(
            str(folder) if folder.is_dir() else source, f"sentence_{config.model_type}_config.json", dict, revision
        )
    length = (described or {}).get("max_seq_length")
    if modules is None or not pooling:
        return None, length
    kinds = {module["type"].rpartition(".")[2]: module.get("path", "") for module in modules}
    strange = kinds.keys() - {"Transformer", "Pooling", "Normalize"}
    if strange:
        raise ValueError(
            f"the sentence-embedding model {source} has modules of type {', '.join(sorted(strange))}, which are not "
            "supported: expected Transformer, Pooling and Normalize (or pass pooling= to leave the others out)"
        )
    settings = _read(source, f"{kinds.get('Pooling') or '1_Pooling'}/config.json", dict, revision) or {}
    chosen = [name for flag, name in _FLAGS.items() if settings.get(flag)]
    if "pooling_mode" in settings:  # how newer versions write it
        chosen = [_NAMES.get(mode, mode) for mode in (settings["pooling_mode"],) if isinstance(mode, str)]
    others = [flag for flag, on in settings.items() if flag.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or chosen[0] not in POOLINGS or set(others) - _FLAGS.keys():
        raise ValueError(
            f"the sentence-embedding model {source} pools by {settings.get('pooling_mode') or others}: expected one "
            f"of {', '.join(map(repr, POOLINGS))} (pass pooling= to choose)"
        )
    return chosen[0], length


def _read(source: str, name: str, kind: type, revision: str | None) -> Any:
    """A JSON file beside a model's weights, None where there is none.

    Raises:
        ValueError: it is damaged, or whether there is one cannot be found out.
    """
    path = Path(source, name) if Path(source).is_dir() else _of_repository(source, name, revision)
    if path is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, expected a {kind.__name__}")
    return content


def _of_repository(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a repository of the Hub, from the cache where it is there; None where the repository has none."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    try:
        cached = try_to_load_from_cache(source, name, revision=revision)
        if cached is not None:  # a path, or a mark that the repository has no such file
            return Path(cached) if isinstance(cached, str) else None
        return Path(hf_hub_download(source, name, revision=revision))
    except (OSError, ValueError, EntryNotFoundError) as error:  # a folder's path, which names no repository, too
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise ValueError(
            f"the model was loaded from {source!r}, and its {name} cannot be looked for: there is no such folder in "
            f"{Path.cwd()} and no such file of a repository in reach. How the model pools and how long a text may be "
            "is then not known: load it by an absolute path, have the whole repository in the cache, or pass pooling= "
            "and max_length="
        ) from error
