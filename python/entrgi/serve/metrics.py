"""Figures for Prometheus. Prompts, texts and keys are in none of them."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .engine import Outcome

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "entrgi_requests", "Requests, by path and status", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "entrgi_request_seconds", "From a request's arrival to its answer", registry=registry, buckets=_SECONDS
        )
        self.waited = Histogram("entrgi_queue_seconds", "In the queue", registry=registry, buckets=_SECONDS)
        self.ran = Histogram("entrgi_batch_seconds", "Of a request's batch", registry=registry, buckets=_SECONDS)
        self.together = Histogram(
            "entrgi_batch_requests",
            "Requests denoised together, seen from each",
            registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        )
        self.prompt_tokens = Counter("entrgi_prompt_tokens", "Tokens of prompts", registry=registry)
        self.slots = Counter("entrgi_response_slots", "Response slots filled, of all samples", registry=registry)
        self.rewards = Histogram(
            "entrgi_rewards",
            "Final rewards of samples, those that are finite",
            ["reward"],
            registry=registry,
            buckets=(-10, -5, -2, -1, 0, 1, 2, 5, 10, 20),
        )
        self.missing = Counter("entrgi_missing_rewards", "Samples whose reward is not finite", registry=registry)
        self.open = Gauge("entrgi_requests_open", "Requests that wait or run", registry=registry)

    def add(self, outcome: Outcome, reward: str, seconds: float) -> None:
        """Count what was made for a request, in so many seconds."""
        self.seconds.observe(seconds)
        self.waited.observe(outcome.waited)
        self.ran.observe(outcome.ran)
        self.together.observe(outcome.together)
        self.prompt_tokens.inc(outcome.prompt_tokens)
        self.slots.inc(sum(len(sample.tokens) for sample in outcome.result.samples))
        for value in outcome.result.rewards:
            if math.isfinite(value):
                self.rewards.labels(reward).observe(value)
            else:
                self.missing.inc()

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
