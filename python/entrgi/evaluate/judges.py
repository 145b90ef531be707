"""Judges of finished samples: another reward model, unit tests by a language model, the built-in models' own measures.

LMUnit-style scoring: a judge model is shown query, response and one unit test (a question in natural language about the
response) and answers with a grade from 1 to 5. The score is the mean grade under the model's probabilities of the five
grades, so that it is continuous; a response's score is the mean over its unit tests.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ..errors import UsageError
from ..prompts import Prompt, prompt_text
from ..statistics import finite, number
from .endpoint import Endpoint
from .specs import TINY, JudgeSpec

GRADES = ("1", "2", "3", "4", "5")
_INSTRUCTION = (
    "Grade how well the response passes the unit test, from 1 (strongly fails) to 5 (strongly passes). "
    "Answer with the number alone."
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A sample to be judged."""

    key: str
    prompt: Prompt
    text: str
    tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A score, None where the judge gave none, and those of the unit tests it is the mean of."""

    score: float | None
    tests: list[float | None] | None = None


class Judge(Protocol):
    """Scores samples."""

    def judge(self, candidates: Sequence[Candidate]) -> list[Judgement]:
        """A judgement a candidate, in order."""
        ...


def make_judge(spec: JudgeSpec, device: str, diffusion: Callable[[], tuple[Any, Any]]) -> Judge:
    """A judge ready to score.

    Args:
        spec: which.
        device: of its model.
        diffusion: gives (diffusion model's adapter, tokenizer) where they are needed.

    Raises:
        UsageError: a model that cannot be loaded.
    """
    from .. import loading

    loading.quiet()
    if spec.kind == "reward":
        return RewardJudge(spec, device)
    if spec.kind == "lm":
        return LanguageModelJudge(spec, device)
    if spec.kind == "openai":
        return EndpointJudge(spec)
    return RuleJudge() if spec.kind == "rule" else NaturalnessJudge(*diffusion())


class RewardJudge:
    """A reward model that guided nothing."""

    def __init__(self, spec: JudgeSpec, device: str) -> None:
        from entrgi_kernels import rewards

        from .. import loading, tiny

        where = loading.device_of(device, spec.model == TINY)
        if spec.model == TINY:
            model, tokenizer = tiny.load_judge()
            model = model.to(where)
        else:
            model, tokenizer = loading.load_reward(spec.model, spec.dtype, where)
        try:
            self._reward, self._batch_size = rewards.wrap(model, tokenizer), spec.batch_size
        except (ValueError, TypeError) as error:
            raise UsageError(f"judge {spec.name}: {error}") from error

    def judge(self, candidates: Sequence[Candidate]) -> list[Judgement]:
        import torch

        from entrgi_kernels.text.template import conversation_from

        conversations = [conversation_from(candidate.prompt) for candidate in candidates]
        with torch.no_grad():
            scores = self._reward.score_texts(
                conversations, [candidate.text for candidate in candidates], batch_size=self._batch_size
            )
        return [Judgement(number(score)) for score in scores]


class RuleJudge:
    """The rule that labelled the texts which the tiny models learned from."""

    def judge(self, candidates: Sequence[Candidate]) -> list[Judgement]:
        from .. import tiny

        return [Judgement(float(tiny.gold_score(prompt_text(c.prompt), c.text))) for c in candidates]


class NaturalnessJudge:
    """Nats per token under the diffusion model itself."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def judge(self, candidates: Sequence[Candidate]) -> list[Judgement]:
        from ..naturalness import nats_per_token

        nats = nats_per_token(
            self._model, self._tokenizer, [c.prompt for c in candidates], [c.tokens for c in candidates]
        )
        return [Judgement(number(value)) for value in nats]


class LanguageModelJudge:
    """Unit tests graded by any causal language model, from its probabilities of the five grades."""

    def __init__(self, spec: JudgeSpec, device: str) -> None:
        from transformers import AutoModelForCausalLM

        from entrgi_kernels.models.loading import load_network, load_tokenizer
        from entrgi_kernels.text.vocabulary import check_rows

        from .. import loading

        try:
            self._tokenizer = load_tokenizer(spec.model, padding_side="left")
            model = load_network(AutoModelForCausalLM, spec.model, dtype=loading.dtype_of(spec.dtype, "auto"))
            check_rows(self._tokenizer, model.get_input_embeddings().weight.shape[0], f"the judge ({spec.model})")
        except (OSError, ValueError, ImportError) as error:
            raise UsageError(f"judge {spec.name}: cannot load {spec.model}: {' '.join(str(error).split())}") from error
        self._model = model.to(loading.device_of(device, False))
        self._spec = spec
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        grades = [self._tokenizer.encode(grade, add_special_tokens=False) for grade in GRADES]
        if any(len(ids) == 0 for ids in grades) or len({ids[-1] for ids in grades}) < len(GRADES):
            raise UsageError(f"judge {spec.name}: the tokenizer of {spec.model} does not tell the grades 1 to 5 apart")
        self._grades = [ids[-1] for ids in grades]

    def judge(self, candidates: Sequence[Candidate]) -> list[Judgement]:
        texts = [self._prompt(candidate, test) for candidate in candidates for test in self._spec.tests]
        scores: list[float] = []
        for start in range(0, len(texts), self._spec.batch_size):
            scores += self._grade(texts[start : start + self._spec.batch_size])
        return by_candidate(scores, len(self._spec.tests))

    def _prompt(self, candidate: Candidate, test: str) -> str:
        question = unit_test_question(candidate, test, self._spec.resolved_format)
        if not self._tokenizer.chat_template:
            return f"{question}\n\nScore: "
        turns = [{"role": "user", "content": question}]
        return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _grade(self, texts: Sequence[str]) -> list[float]:
        import torch

        special = not self._tokenizer.chat_template  # the template has put its own there
        batch = self._tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=special)
        batch = {name: batch[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        # Left padding counts for the positions of models that do not derive them from the mask.
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        with torch.inference_mode():
            logits = self._model(**batch, position_ids=positions, use_cache=False).logits[:, -1, self._grades]
        shares = logits.float().softmax(-1)
        return (shares @ torch.arange(1.0, 6.0, device=shares.device)).tolist()


class EndpointJudge:
    """Unit tests graded by a model behind an OpenAI-compatible chat endpoint (vLLM, SGLang, llama.cpp, a provider)."""

    def __init__(self, spec: JudgeSpec) -> None:
        key = None
        if spec.api_key_env:
            key = os.environ.get(spec.api_key_env)
            if not key:
                raise UsageError(f"judge {spec.name}: the environment variable {spec.api_key_env} is not set")
        assert spec.url is not None
        self._spec = spec
        self._endpoint = Endpoint(spec.url, key=key, timeout=spec.timeout, retries=spec.retries)

    def judge(self, candidates: Sequence[Candidate]) -> list[Judgement]:
        from concurrent.futures import ThreadPoolExecutor

        questions = [
            unit_test_question(candidate, test, self._spec.resolved_format)
            for candidate in candidates
            for test in self._spec.tests
        ]
        with ThreadPoolExecutor(self._spec.concurrency) as pool:
            scores = list(pool.map(self._grade, questions))
        return by_candidate(scores, len(self._spec.tests))

    def _grade(self, question: str) -> float | None:
        request: dict[str, Any] = {
            "model": self._spec.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 16,
        }
        if self._spec.logprobs:
            request |= {"logprobs": True, "top_logprobs": 20}
        return grade_of(self._endpoint.post("/chat/completions", request))


def unit_test_question(candidate: Candidate, test: str, form: str) -> str:
    """What the judge is asked."""
    question = f"Query: {prompt_text(candidate.prompt)}\n\nResponse: {candidate.text}\n\nUnit Test: {test}"
    return question if form == "lmunit" else f"{_INSTRUCTION}\n\n{question}"


def grade_of(answer: Mapping[str, Any]) -> float | None:
    """The grade in a chat completion, None where there is none.

    It is the mean under the probabilities of the first token that is a grade, else the number that the text names.
    """
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] or ""
    except (KeyError, IndexError, TypeError):
        return None
    for position in (choice.get("logprobs") or {}).get("content") or []:
        if str(position.get("token", "")).strip() not in GRADES:
            continue
        shares: dict[str, float] = {}
        for entry in position.get("top_logprobs") or [position]:
            grade = str(entry["token"]).strip()
            if grade in GRADES:
                shares[grade] = shares.get(grade, 0.0) + math.exp(entry["logprob"])
        whole = sum(shares.values())
        if whole > 0:
            return sum(int(grade) * share for grade, share in shares.items()) / whole
    named = re.search(r"(?<![\d.])([1-5])(?:\.(\d+))?(?!\d)", text)
    return None if named is None else min(5.0, float(named.group(0)))


def by_candidate(scores: Sequence[float | None], tests: int) -> list[Judgement]:
    out = []
    for start in range(0, len(scores), tests):
        part = [number(score) for score in scores[start : start + tests]]
        given = finite(part)
        out.append(Judgement(math.fsum(given) / len(given) if given else None, part))
    return out
