"""A causal language model asked a question about a response."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..models.base import logits_of
from ..text.plain import plain_ids
from ..text.template import (
    Conversation,
    check_unicode,
    encode_prompt,
    new_mark,
    open_tag,
    split_at,
    surroundings,
)
from .decoding.causal import CausalHead
from .decoding.sequences import Sequences, wide
from .pooled import PooledReward

logger = logging.getLogger("entrgi_kernels")

#: How the question is put. ``{prompt}`` is the last user turn, ``{response}`` what is judged.
INSTRUCTION = (
    "Here is a request and a response to it.\n\nRequest: {prompt}\n\nResponse: {response}\n\n"
    "{question} Answer with yes or no only."
)


class JudgeReward(PooledReward):
    """Log-odds of "yes" over "no", in nats, in a causal LM's answer to a question about the response.

    ::

        module = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        reward = JudgeReward(module, AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B"), "Is the response polite?")
        GuidedSampler(model, reward, tokenizer).generate(["Why is the sky blue?"])

    The request, the response and the question are put into one user turn, and the first token of the answer is
    looked at: log P(any spelling of yes) - log P(any spelling of no). Only these tokens' logits are computed.
    Templates that know ``enable_thinking`` (Qwen3) are told not to think first.

    Args:
        module: any causal LM.
        tokenizer: its tokenizer, with a chat template.
        question: to be answered by yes or no, about "the response".
        yes, no: spellings, each tried with and without a space before it; those that are one token count, summed.
        instruction: how the question is put, with ``{prompt}`` (optional), ``{response}`` and ``{question}``.
        unmatched, chat_template, exact_savings: see :class:`NetworkReward`, as are the attributes.

    Attributes:
        yes_ids, no_ids: the tokens that count.
        takes_ended: True: a slot that ends the response is left out, the question follows it.

    Raises:
        TypeError: not a network, or no tokenizer.
        ValueError: an empty question, an instruction without its fields, a tokenizer without a token for yes or no,
            a template whose generation prompt opens a thought all the same, and as for :class:`LikelihoodReward`.
    """

    takes_ended = True

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        question: str,
        *,
        yes: Sequence[str] = ("yes", "Yes", "YES"),
        no: Sequence[str] = ("no", "No", "NO"),
        instruction: str = INSTRUCTION,
        unmatched: str = "unk",
        chat_template: str | None = None,
        exact_savings: str | Iterable[str] | None = "all",
    ) -> None:
        if not isinstance(question, str) or not question.strip():
            raise ValueError(
                f"question={question!r}: expected a question that yes or no answers, as 'Is the response polite?'"
            )
        check_unicode(question, "the question")
        check_unicode(instruction, "the instruction")
        for field in ("{response}", "{question}"):
            if instruction.count(field) != 1:
                raise ValueError(f"instruction={instruction!r}: expected a text that holds {field} once")
        self.question, self.instruction = question.strip(), instruction
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
        self.yes_ids, self.no_ids = _single_tokens(tokenizer, yes, "yes"), _single_tokens(tokenizer, no, "no")
        both = set(self.yes_ids) & set(self.no_ids)
        if both:
            raise ValueError(f"the tokens {sorted(both)} would count as yes and as no; pass other yes= and no=")
        self._check_place()
        self._find_way("causal language models")

    def _check_place(self) -> None:
        """Refuse templates behind whose generation prompt comes a thought rather than an answer."""
        chosen: dict[str, Any] = {"chat_template": self.chat_template, "enable_thinking": False}
        asked, before = surroundings(self.tokenizer, **chosen)
        tag = open_tag(asked)
        if tag is not None:
            raise ValueError(
                f"the chat template opens {tag!r} in its generation prompt ({asked[-80:]!r}), enable_thinking=False or "
                "not, so yes or no would be read inside a thought: expected a template that asks for the answer "
                "itself (pass chat_template=)"
            )
        if before is None or asked.strip() == before.strip():
            return
        same = next((i for i, (a, b) in enumerate(zip(asked, before, strict=False)) if a != b), None)
        same = min(len(asked), len(before)) if same is None else same
        tag = open_tag(asked[same:], thoughts=False)
        if tag is not None or before[same:].strip():
            what = f"opens {tag!r}" if tag is not None else f"leaves out {before[same:]!r}"
            logger.warning(
                "the judge's chat template %s in its generation prompt (%r), unlike before an answer (%r): where the "
                "model does not answer yes or no right there, its odds mean nothing; chat_template= takes another",
                what,
                asked[-80:],
                before[-80:],
            )

    def _described(self) -> str:
        return f"question={self.question!r}, "

    def ask(self, conversation: Conversation, response: str) -> Conversation:
        """The conversation in which the judge is asked about a response."""
        texts = {"prompt": conversation[-1]["content"], "response": response, "question": self.question}
        # At once, since the texts may hold braces themselves.
        content = re.sub(r"\{(prompt|response|question)\}", lambda found: texts[found[1]], self.instruction)
        return [{"role": "user", "content": content}]

    def split(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Token ids before and after the response, in the judge's own conversation."""
        mark = new_mark([*(turn["content"] for turn in conversation), self.instruction, self.question])
        turns = self.ask(conversation, mark)
        return split_at(
            self.tokenizer,
            turns,
            mark,
            add_generation_prompt=True,
            chat_template=self.chat_template,
            enable_thinking=False,
        )

    def encode(self, conversation: Conversation, response: str) -> list[int]:
        """Token ids of the judge's conversation up to its answer."""
        turns = self.ask(conversation, response)
        return encode_prompt(self.tokenizer, turns, chat_template=self.chat_template, enable_thinking=False)

    def _odds(self, logits: torch.Tensor) -> torch.Tensor:
        """[B] from the logits [B, Y + N] of the tokens that count."""
        return logits[:, : len(self.yes_ids)].logsumexp(-1) - logits[:, len(self.yes_ids) :].logsumexp(-1)

    @property
    def _ids(self) -> torch.Tensor:
        return torch.tensor([*self.yes_ids, *self.no_ids], device=self.device)

    def _own(self, ids: list[int]) -> torch.Tensor:
        return self._odds(self._causal.own_logits(ids)[-1:, self._ids])[0]

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        return self._odds(self._causal.logits(states, self._ids))

    def _whole(self, sequences: Sequences) -> torch.Tensor:
        logits = logits_of(self._output(self.module, self._whole_accepts, sequences))
        return self._odds(wide(logits[:, -1, self._ids]))


def _single_tokens(tokenizer: Any, spellings: Sequence[str], name: str) -> list[int]:
    """Ids of the spellings that are one token, alone or behind a space."""
    spellings = [spellings] if isinstance(spellings, str) else list(spellings)
    found = set()
    for spelling in spellings:
        for text in (spelling, f" {spelling}"):
            for continuation in (True, False):
                ids = plain_ids(tokenizer, text, continuation=continuation)
                if len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None):
                    found.add(ids[0])
    if not found:
        raise ValueError(
            f"the judge's tokenizer has no single token for {name}: none of {', '.join(map(repr, spellings))}, with or "
            f"without a space before it, is one token; pass {name}= with spellings that are"
        )
    return sorted(found)
