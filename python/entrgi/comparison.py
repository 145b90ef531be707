"""Methods on the same prompts: their figures, their differences, and whether guidance was worth it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .prompts import Prompt
from .statistics import Estimate, estimate, finite, number, paired_difference
from .tables import label_of, missing_note

if TYPE_CHECKING:
    from entrgi_kernels.guidance.results import GenerationResult

METRICS = {
    "top1": "Top@1",
    "avg": "Avg@N",
    "judge": "judge Top@1",
    "rule": "rule Top@1",
    "nats": "nats/token",
}
EXPLAINED = {
    "top1": "reward of the best of K samples",
    "avg": "mean reward of the K samples",
    "judge": "that best sample under a second reward model, which guided nothing",
    "rule": "that best sample under the rules that labelled the tiny models' training texts",
    "nats": "how unlikely the diffusion model finds that best sample; lower is more natural",
}
TINY_NOTE = "The models are tiny and their language is synthetic: this shows the method at work; it is no benchmark."


@dataclasses.dataclass(frozen=True)
class MethodRun:
    """One method, beside one search, on all prompts.

    ``metrics`` holds, by name, one number per prompt (see :data:`EXPLAINED`); NaN where a prompt has none.
    """

    method: str
    results: list[GenerationResult]
    seconds: float
    metrics: dict[str, list[float]]
    search: str = "best"

    @property
    def label(self) -> str:
        """The method as tables show it."""
        return label_of(self.method, self.search)

    @property
    def key(self) -> str:
        """What tells it from the others, as in "entrgi" and "entrgi+smc"."""
        return self.method if self.search == "best" else f"{self.method}+{self.search}"

    def estimates(self) -> dict[str, Estimate]:
        """Mean and standard error over prompts of every metric."""
        return {name: estimate(values) for name, values in self.metrics.items()}

    def missing_note(self) -> list[str]:
        """A line that says what the estimates leave out; none where they leave out nothing."""
        rewards = [reward for result in self.results for reward in result.rewards]
        counts = {"samples without a reward": (len(rewards) - len(finite(rewards)), len(rewards))}
        for name, values in self.metrics.items():
            if name != "avg":  # as Top@1
                counts[f"prompts without {METRICS[name]}"] = len(values) - len(finite(values)), len(values)
        return missing_note(self.label, counts)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Methods on the same prompts, and what they were run with."""

    prompts: list[Prompt]
    runs: list[MethodRun]
    settings: dict[str, Any]

    def run_of(self, method: str) -> MethodRun | None:
        """The run of a method without a search; None where it was not run."""
        return next((run for run in self.runs if run.key == method), None)

    def differences(self) -> list[tuple[MethodRun, MethodRun, dict[str, Estimate]]]:
        """(method, reference, paired differences): all others against best-of-N, EntRGi against the others."""
        pairs = []
        base, ours = self.run_of("none"), self.run_of("entrgi")
        if base:
            pairs += [(run, base) for run in self.runs if run is not base]
        if ours:
            pairs += [(ours, run) for run in self.runs if run is not base and run is not ours]
        return [
            (a, b, {name: paired_difference(a.metrics[name], b.metrics[name]) for name in a.metrics}) for a, b in pairs
        ]

    def notes(self) -> list[str]:
        """Lines that say what the figures leave out, a method each."""
        return [note for run in self.runs for note in run.missing_note()]

    def verdict(self) -> tuple[bool | None, str]:
        """(passed, sentence): whether every guided method has more reward than best-of-N; None where none was run."""
        leads = [(a, d["top1"], d["avg"]) for a, b, d in self.differences() if b.key == "none" != a.method]
        if not leads:
            return None, "nothing checked: it takes best-of-N and a guided method"
        # `not (> 0)` and not `<= 0`: a NaN fails too.
        failed = [
            f"{a.label} (Top@1 {top.signed()}, Avg@N {avg.signed()})"
            for a, top, avg in leads
            if not (top.mean > 0 and avg.mean > 0)
        ]
        if failed:
            return False, "check FAILED: not above best-of-N: " + "; ".join(failed)
        least = min(leads, key=lambda lead: lead[1].mean)
        return True, (
            f"check passed: every guided method is above best-of-N in Top@1 and in Avg@N "
            f"(smallest lead in Top@1: {least[0].label} {least[1].signed()})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-safe: settings, estimates, paired differences, and every sample."""
        return {
            "settings": self.settings,
            "methods": [
                {
                    "method": run.method,
                    "search": run.search,
                    "label": run.label,
                    "seconds": run.seconds,
                    "estimates": {name: value.to_dict() for name, value in run.estimates().items()},
                    "per_prompt": {name: [number(v) for v in values] for name, values in run.metrics.items()},
                    "samples": [
                        [{"text": s.text, "reward": number(s.reward), "tokens": list(s.tokens)} for s in result.samples]
                        for result in run.results
                    ],
                }
                for run in self.runs
            ],
            "differences": [
                {"method": a.key, "reference": b.key, **{name: value.to_dict() for name, value in d.items()}}
                for a, b, d in self.differences()
            ],
            "check": dict(zip(("passed", "statement"), self.verdict(), strict=True)),
            "notes": self.notes(),
            "prompts": self.prompts,
        }
