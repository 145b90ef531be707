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
from .config import TINY, EvaluationConfig, digest
from .endpoint import Endpoint

GRADES = ("1", "2", "3", "4", "5")
UNIT_TESTS = (
    "Does the response answer what the query asks for?",
    "Are the statements of the response accurate?",
    "Does the response leave out nothing that the query calls for?",
    "Is the response clearly written and well organised?",
    "Is the response free of harmful or offensive content?",
)
_INSTRUCTION = (
    "Grade how well the response passes the unit test, from 1 (strongly fails) to 5 (strongly passes). "
    "Answer with the number alone."
)
# What a judge's scores depend on; the rest of its settings say how to reach it.
_IDENTITY = ("kind", "model", "tests", "format", "logprobs", "dtype")


@dataclasses.dataclass(frozen=True)
class JudgeSpec:
    """A judge as the configuration has it.

    Attributes:
        name: column of the tables.
        kind: "reward" (a sequence classifier with one label), "lm" (unit tests by a causal language model), "openai"
            (unit tests by an OpenAI-compatible endpoint), "rule" (the rule that labelled the tiny models' texts),
            "naturalness" (nats per token under the diffusion model; lower is more natural).
        model: of "reward" and "lm": tiny (reward only), a folder or a hub name; of "openai": the server's name for it.
        samples: "best" judges each prompt's best sample, "all" every one.
        tests: unit tests.
        format: "lmunit" sends query, response and unit test alone, as LMUnit was trained; "instruct" says first what to
            do; None decides by the model's name.
        url: of "openai": up to and including /v1.
        api_key_env: name of the environment variable that holds the endpoint's key.
        logprobs: ask the endpoint for token probabilities; without them the grade is read from its text.
        concurrency, timeout, retries: of requests; seconds, and tries after the first.
        batch_size, dtype: of "reward" and "lm".
    """

    name: str
    kind: str
    model: str = TINY
    samples: str = "best"
    tests: tuple[str, ...] = UNIT_TESTS
    format: str | None = None
    url: str | None = None
    api_key_env: str | None = None
    logprobs: bool = True
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 5
    batch_size: int = 16
    dtype: str = "auto"

    @property
    def key(self) -> str:
        """Identifies what its scores depend on."""
        return digest([getattr(self, name) for name in _IDENTITY])[:8]

    @property
    def resolved_format(self) -> str:
        """The prompt format given, else the one that goes by the model's name."""
        return self.format or ("lmunit" if "lmunit" in self.model.lower() else "instruct")


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


def check_judges(config: EvaluationConfig) -> list[JudgeSpec]:
    """The configuration's judges.

    Raises:
        UsageError: an unknown key or kind, two of one name, or a judge of the tiny models for others.
    """
    known = [field.name for field in dataclasses.fields(JudgeSpec)]
    specs = []
    for entry in config.judges:
        if not isinstance(entry, Mapping) or "kind" not in entry:
            raise UsageError(f"judges: {entry!r}: expected a mapping with `kind`, one of {', '.join(KINDS)}")
        unknown = sorted(set(map(str, entry)) - set(known))
        if unknown:
            raise UsageError(f"judges: no key {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
        spec = JudgeSpec(**{"name": entry["kind"], **entry, "tests": tuple(entry.get("tests", UNIT_TESTS))})
        _check(spec, config)
        specs.append(spec)
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names) or {"top1", "avg"} & set(names):
        raise UsageError(f"judges: names must be distinct and not top1 or avg, got {', '.join(names)}")
    if len({spec.key for spec in specs}) < len(specs):
        raise UsageError(f"judges: two of {', '.join(names)} are one under two names")
    return specs


def _check(spec: JudgeSpec, config: EvaluationConfig) -> None:
    if not isinstance(spec.name, str):
        raise UsageError(f"judges: name={spec.name!r}: expected text")
    where = f"judge {spec.name}"
    if spec.kind not in KINDS:
        raise UsageError(f"{where}: kind={spec.kind!r}: expected one of {', '.join(KINDS)}")
    if spec.samples not in ("best", "all"):
        raise UsageError(f"{where}: samples={spec.samples!r}: expected best or all")
    if spec.format not in (None, "lmunit", "instruct"):
        raise UsageError(f"{where}: format={spec.format!r}: expected lmunit or instruct")
    if spec.kind == "rule" and config.model != TINY:
        raise UsageError(f"{where}: the rule is that of the tiny models' language")
    if spec.kind in ("lm", "openai") and spec.model == TINY:
        raise UsageError(f"{where}: give the `model` that grades")
    if spec.kind in ("lm", "openai") and (not spec.tests or not all(isinstance(t, str) and t for t in spec.tests)):
        raise UsageError(f"{where}: tests={list(spec.tests)!r}: expected questions")
    if spec.kind == "openai" and not spec.url:
        raise UsageError(f"{where}: give the endpoint's `url`, as in http://localhost:8000/v1")


def make_judge(spec: JudgeSpec, device: str, diffusion: Callable[[], tuple[Any, Any]]) -> Judge:
    """A judge ready to score.

    Args:
        spec: which.
        device: of its model.
        diffusion: gives (diffusion model's adapter, tokenizer) where they are needed.

    Raises:
        UsageError: a model that cannot be loaded.
    """
    from entrgi import loading

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
        from entrgi import loading, tiny
        from entrgi_kernels import rewards

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
        from entrgi import tiny

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

        from entrgi import loading
        from entrgi_kernels.models.loading import load_network, load_tokenizer
        from entrgi_kernels.text.vocabulary import check_rows

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
        return _by_candidate(scores, len(self._spec.tests))

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
        return _by_candidate(scores, len(self._spec.tests))

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


KINDS = ("reward", "lm", "openai", "rule", "naturalness")


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


def _by_candidate(scores: Sequence[float | None], tests: int) -> list[Judgement]:
    out = []
    for start in range(0, len(scores), tests):
        part = [number(score) for score in scores[start : start + tests]]
        given = finite(part)
        out.append(Judgement(math.fsum(given) / len(given) if given else None, part))
    return out
