"""Reward models: a network that gives one number to a text, by a head on top of a backbone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..models.modules import input_embedding
from .decoding.sequences import PreparedPrompts, Sequences, last_real
from .pooled import PooledReward

# Names under which networks return a reward, the surest first.
_NAMES = ("score", "scores", "reward", "rewards", "end_scores", "value", "values", "logits")


class SequenceClassifierReward(PooledReward):
    """The number that a reward model gives to a text: a sequence classifier with one label, or a network of its kind.

    Decoders read the score at the last token that is not padding. transformers finds it by token ids, which
    embeddings do not have, and refuses batches when no padding token is configured. Here the backbone and the head are
    called one after the other and the place is picked directly. A padding token that ends a text is passed over where
    the network's own forward passes over it. Other classifiers (encoders with a pooler) are run whole.

    ::

        module = AutoModelForSequenceClassification.from_pretrained("Skywork/Skywork-Reward-V2-Qwen3-1.7B")
        reward = SequenceClassifierReward(module, AutoTokenizer.from_pretrained(...))
        GuidedSampler(model, reward, tokenizer)

    Reward models of other classes serve as well: a head of any shape (an MLP) or name (``v_head``, ``score_head``)
    beside a backbone, the backbone of a causal LM among them, or a forward that takes ``inputs_embeds``. What the
    forward returns may be one number a text or one a token, of which the last token's is the reward; a tensor, a
    tuple, or an object or dict with score, reward, value or logits. Which of its parts give that number is found out
    by comparing with the network's own forward.

    Args:
        module: the reward model.
        tokenizer, unmatched, chat_template, exact_savings: see :class:`NetworkReward`, as are the attributes.

    Raises:
        TypeError: not a network, or no tokenizer.
        ValueError: more than one number a text, no chat template, weights that are not finite, a model that gives
            another score for embeddings than for the tokens they come from (what was tried is named), a reward token
            that the template does not write, or an unknown name of a saving.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        *,
        unmatched: str = "unk",
        chat_template: str | None = None,
        exact_savings: str | Iterable[str] | None = "all",
    ) -> None:
        labels = getattr(getattr(module, "config", None), "num_labels", 1)
        # Elsewhere, an untouched config says 2 whatever the head's width.
        if isinstance(module, nn.Module) and labels != 1 and is_classifier(module):
            raise ValueError(
                f"{type(module).__name__} has num_labels={labels}: expected a reward model with one label. "
                "Load it with AutoModelForSequenceClassification.from_pretrained(..., num_labels=1), or pass a reward "
                "of your own that makes one number of its outputs"
            )
        backbone, self._heads = _backbone_and_heads(module) if isinstance(module, nn.Module) else (None, [])
        self._score: nn.Module | None
        self._head_name, self._score = self._heads[0] if self._heads else ("", None)
        super().__init__(
            module,
            tokenizer,
            backbone,
            unmatched=unmatched,
            chat_template=chat_template,
            exact_savings=exact_savings,
        )
        self._find_way("classifiers and reward models")
        self._check_reward_token()

    def _ways(self) -> Iterator[str]:
        for name, head in self._heads:
            self._head_name, self._score = name, head
            yield "last"
        yield "whole"

    def _way(self) -> str:
        return super()._way() if self.pooling == "whole" else f"its backbone and {self._head_name!r} at the last token"

    def _own(self, ids: list[int]) -> torch.Tensor:
        given = {"input_ids": torch.tensor([ids], device=self.device)}
        if self._whole_accepts & {"attention_mask", "**"}:
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        try:
            output = self.module(**given)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{type(self.module).__name__} does not run on token ids ({type(error).__name__}: {error}): expected "
                f"networks called with {' and '.join(given)}"
            ) from error
        return _numbers(self.module, output, 1, len(ids))[0]

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        assert self._score is not None
        weight = next(self._score.parameters())
        if weight.is_floating_point():  # value heads may be of higher precision than their backbone
            states = states.to(weight.dtype)
        return self._score(states).reshape(len(states))

    def _whole(self, sequences: Sequences) -> torch.Tensor:
        with _padding_token(self.module):
            output = self._output(self.module, self._whole_accepts, sequences)
        return _numbers(self.module, output, *sequences.mask.shape)

    def _sequences(
        self, prepared: PreparedPrompts, index: torch.Tensor, response: torch.Tensor, alive: torch.Tensor, targets: Any
    ) -> Sequences:
        sequences = super()._sequences(prepared, index, response, alive, targets)
        if self._passed_over and not all(prepared.suffix_ids):
            # Behind an empty suffix, tokens that are passed over may end the response too.
            if "passed_over" not in prepared.extra:
                ids = torch.tensor(sorted(self._passed_over), device=self.device)
                bare = torch.tensor([[not ids] for ids in prepared.suffix_ids], device=self.device)
                with torch.no_grad():
                    prepared.extra["passed_over"] = self.embedding(ids).to(sequences.embeddings.dtype), bare
            rows, bare = prepared.extra["passed_over"]
            given = sequences.embeddings.detach()
            passed = torch.stack([(given == row).all(-1) for row in rows]).any(0)
            last = last_real(sequences.mask & ~passed)[:, None]
            behind = torch.arange(passed.shape[1], device=passed.device) > last
            sequences.mask = sequences.mask & ~(behind & bare[index.to(bare.device)])
        return sequences

    def _check_reward_token(self) -> None:
        """Some reward models are read at a token of their own, which their own scoring method adds."""
        wanted = getattr(self._config, "reward_token_id", None)
        if not isinstance(wanted, int):
            return
        _, suffix = self.split([{"role": "user", "content": "a"}])
        if suffix[-1:] != [wanted]:
            raise ValueError(
                f"{type(self.module).__name__} is read at its reward token {wanted} "
                f"({self.tokenizer.convert_ids_to_tokens(wanted)!r}, config.reward_token_id), and the chat template "
                "does not end with it: expected chat_template= with one that does"
            )


def is_classifier(module: nn.Module) -> bool:
    """Whether a network says by its class that it classifies whole texts."""
    return "SequenceClassification" in type(_core(module)).__name__


def has_head(module: nn.Module) -> bool:
    """Whether something beside a backbone may make a number of its states: in no AutoModel, a backbone itself."""
    core = _core(module)
    return getattr(core, "base_model", None) is not core and bool(_backbone_and_heads(module)[1])


def _core(module: Any) -> nn.Module:
    return module.get_base_model() if hasattr(module, "get_base_model") else module  # PEFT wraps the model it adapts


def _backbone_and_heads(module: nn.Module) -> tuple[nn.Module | None, list[tuple[str, nn.Module]]]:
    """The network below and what may be its head, by name; None and nothing where there are not two parts."""
    core = _core(module)
    children = dict(core.named_children())
    below = children.get(getattr(core, "base_model_prefix", "") or "model")
    if below is None or input_embedding(below) is None:
        below = next((child for child in children.values() if input_embedding(child) is not None), None)
    if below is None:
        return None, []
    others = [(name, child) for name, child in children.items() if child is not below]
    heads = [(name, child) for name, child in others if any(True for _ in child.parameters())]
    heads.sort(key=lambda head: head[0] != "score")
    inner = _core(below)
    return getattr(inner, "base_model", inner), heads  # of a causal LM, what lies below its own head


def _numbers(module: nn.Module, output: Any, rows: int, places: int) -> torch.Tensor:
    """The rewards [rows] in what a network returns for texts of ``places`` tokens."""
    found: dict[str, Any]
    if isinstance(output, torch.Tensor):
        found = {"a tensor": output}
    elif isinstance(output, (tuple, list)):
        found = {f"[{place}]": value for place, value in enumerate(output)}
    else:
        read = output.get if isinstance(output, dict) else lambda name: getattr(output, name, None)
        found = {name: read(name) for name in _NAMES}
    found = {
        name: value for name, value in found.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    for value in found.values():
        if value.shape in ((rows,), (rows, 1)) or (rows == 1 and not value.dim()):
            return value.reshape(rows)
    for value in found.values():
        if value.shape in ((rows, places), (rows, places, 1)):
            return value.reshape(rows, places)[:, -1]
    shapes = ", ".join(f"{name} of shape {tuple(value.shape)}" for name, value in found.items()) or "no tensor"
    raise ValueError(
        f"{type(module).__name__} returns {type(output).__name__} with {shapes} for {rows} text of {places} tokens: "
        f"expected one number a text, or one a token, alone or under one of the names {', '.join(_NAMES)}"
    )


@contextmanager
def _padding_token(module: nn.Module) -> Iterator[None]:
    """Lend the config a padding token: without one, transformers scores no batch, padded or not."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is None or getattr(text, "pad_token_id", 0) is not None:
        yield
        return
    text.pad_token_id = 0
    try:
        yield
    finally:
        text.pad_token_id = None
