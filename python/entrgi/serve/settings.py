"""What a server was started with, and how it says no."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entrgi_kernels.guidance.config import GuidanceConfig

# Settings of GuidanceConfig that are the operator's: how the machine is used. The rest are the request's.
OPERATORS = (
    "state_dtype", "batch_size", "memory_budget", "torch_compile", "cuda_graphs", "exact_savings", "backend",
)  # fmt: skip
# Settings that have a name in OpenAI's interface, and go by it.
OPENAI_NAMES = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "seed": "seed"}


class Refusal(Exception):
    """A request that is not served; becomes OpenAI's error object.

    Attributes:
        status: of HTTP.
        message: what was given, and what is expected.
        param: the field that is to blame.
        code: a word for programs.
        retry_after: seconds after which another try may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        message = message.encode("utf-8", "backslashreplace").decode()  # it may quote half of a character
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def __reduce__(self) -> Any:
        return _refusal, (self.status, self.message, self.param, self.code, self.retry_after)

    def to_dict(self) -> dict[str, Any]:
        """The error object."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _refusal(status: int, message: str, param: str | None, code: str | None, retry_after: int | None) -> Refusal:
    return Refusal(status, message, param=param, code=code, retry_after=retry_after)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of what one request, and all together, may ask for. Each has a flag, which refusals name.

    Attributes:
        body: bytes of a request's body.
        prompt_tokens: tokens of the messages, chat template included.
        max_tokens: response slots.
        num_samples: trajectories of a request; candidates of "svdd" count.
        steps: denoising steps.
        guidance_steps: Adam steps of a denoising step.
        trace: slots of all samples and steps of a request that keeps its trace: about 50 bytes each.
        queue: requests that wait.
        timeout: seconds from a request's arrival to its answer.
    """

    body: int = 1 << 18
    prompt_tokens: int = 4096
    max_tokens: int = 1024
    num_samples: int = 16
    steps: int = 1024
    guidance_steps: int = 16
    trace: int = 500_000
    queue: int = 256
    timeout: float = 600.0

    def check(self, config: GuidanceConfig, trace: bool = False) -> None:
        """Raise Refusal (400) for settings beyond a limit; `trace` says whether every step is kept."""
        rows = config.num_samples * config.copies
        kept = config.num_samples * config.max_new_tokens * min(config.steps, config.max_new_tokens) if trace else 0
        for value, limit, param, flag in (
            (config.max_new_tokens, self.max_tokens, "max_tokens", "--max-tokens"),
            (rows, self.num_samples, "n", "--max-samples"),
            (config.steps, self.steps, "steps", "--max-steps"),
            (config.guidance_steps, self.guidance_steps, "guidance_steps", "--max-guidance-steps"),
            (kept, self.trace, "trace of samples x slots x steps", "--max-trace"),
        ):
            if value > limit:
                said = f"{config.num_samples} samples of {config.copies} candidates" if config.copies > 1 else value
                given = said if param == "n" else value
                raise Refusal(400, f"{param}={given}: expected at most {limit} ({flag} of this server)", param=param)


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server offers; the same in every process of it.

    Attributes:
        model: its name in the API.
        rewards: names, the first of which is the default.
        mask_token_id: the diffusion model's.
        defaults: settings where a request has none.
        steps_given: whether the operator chose the number of steps; else it is one per slot.
        limits: of the server.
        tiny: whether the built-in models are served.
        keys: API keys, one of which a request must bring; none are asked for where there are none.
        hosts: names that a request may call this server by; empty for any.
    """

    model: str
    rewards: tuple[str, ...]
    mask_token_id: int
    defaults: GuidanceConfig
    steps_given: bool
    limits: Limits
    tiny: bool
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
