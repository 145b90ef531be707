"""Reward models with one output: any ``AutoModelForSequenceClassification`` with one label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from entrgi_kernels.models.base import logits_of
from entrgi_kernels.rewards.base import Sequences
from entrgi_kernels.rewards.pooled import PooledReward


class SequenceClassifierReward(PooledReward):
    """The scalar output of a sequence classifier, as reward models (Skywork-Reward and the like) have it.

    Decoders read the score at the last position. transformers finds that position by looking for padding in the
    token ids, which embeddings do not have, and refuses batches when no padding token is configured; here the
    backbone and the score head are called one after the other and the last real token is picked directly, which
    needs neither. Other classifiers (encoders with a pooler) are run whole.

    ::

        module = AutoModelForSequenceClassification.from_pretrained("Skywork/Skywork-Reward-V2-Qwen3-1.7B")
        reward = SequenceClassifierReward(module, AutoTokenizer.from_pretrained(...))
        GuidedSampler(model, reward, tokenizer)

    Args:
        module: the classifier.
        tokenizer, unmatched, chat_template, exact_savings: see :class:`NetworkReward`, as are the attributes.

    Raises:
        TypeError: not a classifier, or no tokenizer.
        ValueError: more than one label, no chat template, weights that are not finite, a model that gives another
            score for embeddings than for the tokens they come from, or an unknown name of a saving.
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
        if isinstance(module, nn.Module) and labels != 1:
            raise ValueError(
                f"{type(module).__name__} has num_labels={labels}; accepted: a reward model with one label. "
                "Load it with AutoModelForSequenceClassification.from_pretrained(..., num_labels=1), or pass a reward "
                "of your own that makes one number of its outputs"
            )
        backbone, self._score = _backbone_and_head(module)
        super().__init__(
            module,
            tokenizer,
            backbone,
            unmatched=unmatched,
            chat_template=chat_template,
            exact_savings=exact_savings,
        )
        self._find_way("classifiers")

    def _own(self, ids: list[int]) -> Tensor:
        answer = logits_of(self.module(torch.tensor([ids], device=self.device)))
        if answer.shape != (1, 1):
            raise ValueError(
                f"{type(self.module).__name__} returns scores of shape {tuple(answer.shape)} for one text; "
                "accepted: one number per text"
            )
        return answer[0, 0]

    def _head(self, states: Tensor) -> Tensor:
        assert self._score is not None
        return self._score(states)[:, 0]

    def _whole(self, sequences: Sequences) -> Tensor:
        with _padding_token(self.module):
            return logits_of(self._output(self.module, self._whole_accepts, sequences))[:, 0]


def _backbone_and_head(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """A decoder classifier's two parts: the network below and the linear layer on top, None where there are not two."""
    core = module.get_base_model() if hasattr(module, "get_base_model") else module  # PEFT wraps the model it adapts
    backbone = getattr(core, getattr(core, "base_model_prefix", "") or "model", None)
    head = getattr(core, "score", None)
    if isinstance(backbone, nn.Module) and isinstance(head, nn.Module):
        return backbone, head
    return None, None


@contextmanager
def _padding_token(module: nn.Module) -> Iterator[None]:
    """Lend the config a padding token: without one, transformers scores no batch, padded or not."""
    config = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is None or getattr(text, "pad_token_id", 0) is not None:
        yield
        return
    text.pad_token_id = 0
    try:
        yield
    finally:
        text.pad_token_id = None
