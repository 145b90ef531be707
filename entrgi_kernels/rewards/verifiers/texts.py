"""Verifiers of a text's form: a pattern, JSON, a length."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNITS = ("words", "characters", "tokens")


@dataclass(frozen=True)
class Regex:
    """Whether a regular expression of Python's ``re`` is found in the text; ``^`` and ``$`` bind it to the whole.

    A pattern that backtracks for ever holds every thread of the process: run such a one with ``processes=True``.

    Raises:
        ValueError: no regular expression.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"pattern={self.pattern!r}: expected a regular expression: {error}") from None

    def __call__(self, prompt: str, text: str) -> bool:
        return re.search(self.pattern, text) is not None


@dataclass(frozen=True)
class Json:
    """Whether the whole text is one JSON value, and one that its schema allows.

    Args:
        schema: a JSON Schema (needs the package jsonschema); None takes any value. No reference is fetched.

    Raises:
        ImportError: jsonschema is not installed.
        ValueError: the schema is none.
    """

    schema: Mapping[str, Any] | bool | None = None

    def __post_init__(self) -> None:
        if self.schema is not None:
            self._validator()

    def __call__(self, prompt: str, text: str) -> bool:
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except ValueError:
            return False
        return self.schema is None or self._validator().is_valid(value)

    def _validator(self) -> Any:
        try:
            import jsonschema
            from jsonschema_specifications import REGISTRY
        except ImportError:
            raise ImportError(
                "Json(schema=...) needs the package jsonschema, which is not installed: "
                "pip install 'entrgi-kernels[verify]'"
            ) from None
        kind = jsonschema.validators.validator_for(self.schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(self.schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"schema: expected a JSON Schema: {error.message}") from None
        return kind(self.schema, registry=REGISTRY)  # a registry given: nothing is asked of the network


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@dataclass(frozen=True)
class Length:
    """Whether a text is between two lengths, bounds included.

    Args:
        low, high: bounds; None for `high` is no bound.
        unit: "words" (what white space parts), "characters" or "tokens".
        tokenizer: whose tokens; special ones are not counted.

    Raises:
        ValueError: bounds or a unit that are none.
    """

    low: int = 0
    high: int | None = None
    unit: str = "words"
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit={self.unit!r}: expected one of {', '.join(map(repr, UNITS))}")
        if (self.unit == "tokens") != (self.tokenizer is not None):
            raise ValueError("unit='tokens' and tokenizer= go together")
        for name, bound in (("low", self.low), ("high", 0 if self.high is None else self.high)):
            if not isinstance(bound, int) or isinstance(bound, bool) or bound < 0:
                raise ValueError(f"{name}={bound!r}: expected an integer >= 0")
        if self.high is not None and self.high < self.low:
            raise ValueError(f"high={self.high}: expected at least low={self.low}")

    def __call__(self, prompt: str, text: str) -> bool:
        if self.unit == "tokens":
            found = len(self.tokenizer.encode(text, add_special_tokens=False))
        else:
            found = len(text.split() if self.unit == "words" else text)
        return self.low <= found and (self.high is None or found <= self.high)
