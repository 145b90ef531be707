"""Judges as the configuration has them, checked; :mod:`.judges` makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..digests import digest
from ..errors import UsageError
from .diversity import METRICS as DIVERSITY

TINY = "tiny"  # stands for the built-in models, their prompts and their judge
KINDS = ("reward", "lm", "openai", "rule", "naturalness")
UNIT_TESTS = (
    "Does the response answer what the query asks for?",
    "Are the statements of the response accurate?",
    "Does the response leave out nothing that the query calls for?",
    "Is the response clearly written and well organised?",
    "Is the response free of harmful or offensive content?",
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
        model: of "reward" and "lm": tiny or a verifier (reward only), a folder or a hub name; of "openai": the
            server's name for it.
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


def check_judges(judges: Sequence[Mapping[str, Any]], model: str) -> list[JudgeSpec]:
    """The judges of a configuration that samples from a model.

    Raises:
        UsageError: an unknown key or kind, two of one name, or a judge of the tiny models for others.
    """
    known = [field.name for field in dataclasses.fields(JudgeSpec)]
    specs = []
    for entry in judges:
        if not isinstance(entry, Mapping) or "kind" not in entry:
            raise UsageError(f"judges: {entry!r}: expected a mapping with `kind`, one of {', '.join(KINDS)}")
        unknown = sorted(set(map(str, entry)) - set(known))
        if unknown:
            raise UsageError(f"judges: no key {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
        spec = JudgeSpec(**{"name": entry["kind"], **entry, "tests": tuple(entry.get("tests", UNIT_TESTS))})
        _check(spec, model)
        specs.append(spec)
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names) or {"top1", "avg", *DIVERSITY} & set(names):
        taken = ", ".join(("top1", "avg", *DIVERSITY))
        raise UsageError(f"judges: names must be distinct and none of {taken}; got {', '.join(names)}")
    if len({spec.key for spec in specs}) < len(specs):
        raise UsageError(f"judges: two of {', '.join(names)} are one under two names")
    return specs


def _check(spec: JudgeSpec, model: str) -> None:
    if not isinstance(spec.name, str):
        raise UsageError(f"judges: name={spec.name!r}: expected text")
    where = f"judge {spec.name}"
    if spec.kind not in KINDS:
        raise UsageError(f"{where}: kind={spec.kind!r}: expected one of {', '.join(KINDS)}")
    if spec.samples not in ("best", "all"):
        raise UsageError(f"{where}: samples={spec.samples!r}: expected best or all")
    if spec.format not in (None, "lmunit", "instruct"):
        raise UsageError(f"{where}: format={spec.format!r}: expected lmunit or instruct")
    if spec.kind == "rule" and model != TINY:
        raise UsageError(f"{where}: the rule is that of the tiny models' language")
    if spec.kind in ("lm", "openai") and spec.model == TINY:
        raise UsageError(f"{where}: give the `model` that grades")
    if spec.kind in ("lm", "openai") and (not spec.tests or not all(isinstance(t, str) and t for t in spec.tests)):
        raise UsageError(f"{where}: tests={list(spec.tests)!r}: expected questions")
    if spec.kind == "openai" and not spec.url:
        raise UsageError(f"{where}: give the endpoint's `url`, as in http://localhost:8000/v1")
