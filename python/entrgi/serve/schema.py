"""OpenAI's chat completions as this server speaks them: requests turned into orders, outcomes into answers."""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from entrgi_kernels import __version__
from entrgi_kernels.guidance.config import GuidanceConfig
from entrgi_kernels.guidance.results import Sample

from .engine import Frame, Order, Outcome
from .settings import OPENAI_NAMES, OPERATORS, Refusal, Served

# Fields of OpenAI's that change nothing here.
_IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
# Fields that would change the answer, with the values that ask for nothing. Others are refused: a text made without
# them would be a wrong one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stop": (None, [], ""), "logprobs": (None, False), "top_logprobs": (None, 0), "logit_bias": (None, {}),
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "tools": (None, []), "functions": (None, []),
    "tool_choice": (None, "none", "auto"), "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]), "audio": (None,),
    "prediction": (None,), "reasoning_effort": (None,), "verbosity": (None,), "web_search_options": (None,),
}  # fmt: skip
_HEAVIEST = 1e12  # weight of a reward; the gradient of a heavier one is soon infinite


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class TextPart(_Strict):
    """A part of a message's content; text is the only kind."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn."""

    role: str
    content: str | list[TextPart]
    name: str | None = None


class StreamOptions(_Strict):
    """What a stream tells beside the texts."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(BaseModel):
    """A request to ``/v1/chat/completions``.

    Attributes:
        guidance: settings of :class:`entrgi_kernels.guidance.GuidanceConfig` by their names; and "reward", a name or
            {name: weight}, and "trace", which keeps every step of every sample.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    guidance: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Chat:
    """A request that was understood.

    Attributes:
        order: for the engine.
        n: choices wanted, the best of the order's samples.
        stream, usage: whether the answer is a stream, and whether it ends with the usage.
    """

    order: Order
    n: int
    stream: bool
    usage: bool


def understand(request: ChatRequest, served: Served) -> Chat:
    """A request as an order.

    Raises:
        Refusal: 400 for what cannot be served, 404 for another model.
    """
    for name, value in (request.model_extra or {}).items():
        if name in _IGNORED or value in _NEUTRAL.get(name, ()):
            continue
        said = "is not supported here" if name in _NEUTRAL else f"is unknown: expected {_fields()}"
        raise Refusal(400, f"{name}={value!r:.80} {said}", param=name, code="unsupported_parameter")
    if request.model not in (None, "", served.model):
        raise Refusal(
            404,
            f"the model {request.model!r} does not exist: expected {served.model!r}",
            param="model",
            code="model_not_found",
        )
    slots = request.max_tokens
    if request.max_completion_tokens is not None:
        if slots not in (None, request.max_completion_tokens):
            raise Refusal(400, "max_tokens and max_completion_tokens differ: expected one", param="max_tokens")
        slots = request.max_completion_tokens
    given = dict(request.guidance or {})
    trace, rewards = given.pop("trace", False), rewards_of(given.pop("reward", None), served)
    if not isinstance(trace, bool):
        raise Refusal(400, f"guidance.trace={trace!r}: expected true or false", param="guidance")
    for name in given:
        if name in OPENAI_NAMES:
            raise Refusal(400, f"guidance.{name}: expected it as {OPENAI_NAMES[name]}, beside guidance", param=name)
    n = 1 if request.n is None else request.n
    own = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed, "max_new_tokens": slots}
    given.update({name: value for name, value in own.items() if value is not None})
    given.setdefault("num_samples", max(n, served.defaults.num_samples))
    config = config_of(given, served, trace)
    if not 1 <= n <= config.num_samples:
        raise Refusal(400, f"n={n}: expected from 1 to num_samples={config.num_samples}", param="n")
    order = Order(_conversation(request.messages), rewards, config, watched=bool(request.stream), trace=trace)
    return Chat(order, n, bool(request.stream), bool(request.stream_options and request.stream_options.include_usage))


def config_of(given: dict[str, Any], served: Served, trace: bool = False) -> GuidanceConfig:
    """Settings of a request: the server's where it has none, a seed of its own where it names none.

    Args:
        given: by their names.
        served: the server.
        trace: whether every step is to be kept.

    Raises:
        Refusal: a setting that is unknown, out of range, the operator's, or beyond a limit.
    """
    known = [field.name for field in dataclasses.fields(GuidanceConfig) if field.name not in OPERATORS]
    for name in given:
        if name not in known:
            why = "is set by the operator of this server" if name in OPERATORS else "is no setting"
            raise Refusal(400, f"guidance.{name} {why}: expected reward, trace, {', '.join(known)}", param="guidance")
    given = {"seed": secrets.randbits(31), **given}
    if isinstance(given.get("betas"), list):
        given["betas"] = tuple(given["betas"])
    slots = given.get("max_new_tokens", served.defaults.max_new_tokens)
    if "steps" not in given and isinstance(slots, int):
        given["steps"] = min(slots, served.defaults.steps if served.steps_given else served.limits.steps)
    try:
        config = served.defaults.replace(**given)
    except (ValueError, TypeError) as error:
        raise Refusal(400, str(error), param=str(error).partition("=")[0]) from None
    served.limits.check(config, trace)
    return config


def rewards_of(given: Any, served: Served) -> tuple[tuple[str, float], ...]:
    """The rewards that a request names, with weights.

    Raises:
        Refusal: unknown ones, or weights that are no numbers.
    """
    wanted = {served.rewards[0]: 1.0} if given is None else {given: 1.0} if isinstance(given, str) else given
    if not isinstance(wanted, dict) or not wanted:
        raise Refusal(400, f"reward={given!r:.80}: expected a name or {{name: weight}}", param="reward")
    for name, weight in wanted.items():
        if name not in served.rewards:
            raise Refusal(400, f"reward={name!r:.80}: expected one of {', '.join(served.rewards)}", param="reward")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) <= _HEAVIEST:
            said = f"expected a finite number, of at most {_HEAVIEST:g} in size"
            raise Refusal(400, f"reward {name!r} has weight {weight!r:.80}: {said}", param="reward")
    if list(wanted.values()) == [1]:
        return ((next(iter(wanted)), 1.0),)
    return tuple(sorted((name, float(weight)) for name, weight in wanted.items()))


def _conversation(messages: list[Message]) -> list[dict[str, str]]:
    """The turns; parts of one turn follow each other."""
    return [
        {
            "role": message.role,
            "content": message.content
            if isinstance(message.content, str)
            else "".join(part.text for part in message.content),
        }
        for message in messages
    ]


def _fields() -> str:
    return ", ".join(ChatRequest.model_fields)


# ---- answers


class Answer:
    """Makes the parts of one answer.

    Args:
        chat: the request.
        served: the server.
        prompt_tokens: of the request.
    """

    def __init__(self, chat: Chat, served: Served, prompt_tokens: int) -> None:
        self._chat, self._prompt_tokens = chat, prompt_tokens
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.model,
            "system_fingerprint": f"entrgi-kernels-{__version__}",
        }

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": sample.text, "refusal": None},
                "logprobs": None,
                "finish_reason": _reason(sample, outcome),
                "guidance": {"sample": number, "reward": _number(sample.reward), **self._trace(sample)},
            }
            for index, (number, sample) in enumerate(self._best(outcome))
        ]
        about = {"object": "chat.completion", "choices": choices, "usage": self._usage(outcome)}
        return {**self._head, **about, "guidance": self._settings(outcome)}

    def opening(self) -> dict[str, Any]:
        """A stream's first chunk."""
        return self._chunk([_delta(index, {"role": "assistant", "content": ""}) for index in range(self._chat.n)])

    def frame(self, frame: Frame) -> dict[str, Any]:
        """A stream's chunk after a denoising step: no text yet, the canvas beside it."""
        about: dict[str, Any] = {
            "step": frame.step,
            "steps": self._chat.order.config.steps,
            "canvas": frame.canvases,
        }
        if frame.traces is not None:
            about["trace"] = [None if step is None else step.to_dict() for step in frame.traces]
        return {**self._chunk([_delta(0, {"content": ""})]), "guidance": about}

    def closing(self, outcome: Outcome) -> list[dict[str, Any]]:
        """A stream's last chunks: each choice's text and its end, and the usage where it was asked for."""
        chunks = []
        for index, (number, sample) in enumerate(self._best(outcome)):
            text = _delta(index, {"content": sample.text})
            # The candidates of "svdd" are told apart at the end: its steps were in no frame.
            late = self._trace(sample) if self._chat.order.config.copies > 1 else {}
            text["guidance"] = {"sample": number, "reward": _number(sample.reward), **late}
            chunks += [self._chunk([text]), self._chunk([_delta(index, {}, _reason(sample, outcome))])]
        chunks[-1]["guidance"] = self._settings(outcome)
        if self._chat.usage:
            chunks.append({**self._chunk([]), "usage": self._usage(outcome)})
        return chunks

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _best(self, outcome: Outcome) -> list[tuple[int, Sample]]:
        """(number, sample) of the n samples of the highest rewards, the best first; those without a reward are last."""
        samples = outcome.result.samples
        order = sorted(
            range(len(samples)), key=lambda k: -samples[k].reward if math.isfinite(samples[k].reward) else math.inf
        )
        return [(k, samples[k]) for k in order[: self._chat.n]]

    def _settings(self, outcome: Outcome) -> dict[str, Any]:
        config = {name: value for name, value in outcome.result.config.to_dict().items() if name not in OPERATORS}
        about = {"reward": dict(self._chat.order.rewards), "rewards": [_number(r) for r in outcome.result.rewards]}
        return {**about, **config, "denoising_steps": outcome.steps}

    def _usage(self, outcome: Outcome) -> dict[str, int]:
        """Tokens of the prompt, and of all samples up to their ends."""
        made = sum(_length(sample, outcome) for sample in outcome.result.samples)
        prompt = self._prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def _trace(self, sample: Sample) -> dict[str, list[dict[str, Any]]]:
        return {} if sample.trace is None else {"trace": [step.to_dict() for step in sample.trace]}


def _delta(index: int, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _length(sample: Sample, outcome: Outcome) -> int:
    """Tokens up to the end, which is not counted."""
    return sample.tokens.index(outcome.eos) if outcome.eos in sample.tokens else len(sample.tokens)


def _reason(sample: Sample, outcome: Outcome) -> str:
    return "stop" if outcome.eos in sample.tokens else "length"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
