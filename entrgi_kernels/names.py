"""Names that a user chooses among, each list once: settings, command line, reports and benchmarks read them here.

Needs no torch, so that a command line prints its help without loading it.
"""

from __future__ import annotations

from typing import NamedTuple


class Method(NamedTuple):
    """How a denoising step is guided.

    Attributes:
        weight: the hard token's share, by its name in :mod:`entrgi_kernels.guidance.weights`; None is no guidance.
        label: its name in tables and pictures.
        about: what a report says of it, a sentence after the label.
        light, dark: its colour on a light and on a dark page.
        adam: whether Adam moves the logits, step by step; else the reward's linear part does, once.
    """

    weight: str | None
    label: str
    about: str
    light: str
    dark: str
    adam: bool = True


class SearchKind(NamedTuple):
    """What is done with a prompt's trajectories beside guidance.

    Attributes:
        label: its name in tables and pictures; empty for the one that does nothing.
        settings: of :class:`GuidanceConfig`, those that mean something to it; to no search they mean nothing.
        independent: whether a prompt's samples know nothing of each other, so that n of K are what a run of n gives.
        line, marker: how pictures draw it, as matplotlib names them.
    """

    label: str
    settings: tuple[str, ...]
    independent: bool
    line: str
    marker: str


# In the order of the paper's tables, which lack "first_order".
METHODS = {
    "none": Method(
        None, "Best-of-N", "guides nothing and keeps the sample of the highest reward.", "#6a6873", "#a5a1b3"
    ),
    "expectation": Method(
        "zero", "Expectation", "reads the soft embedding everywhere (continuous relaxation).", "#0064a5", "#66b8f0"
    ),
    "aps": Method("one", "APS", "reads the hard token everywhere (straight-through).", "#b34a00", "#f29a5c"),
    "first_order": Method(
        "one",
        "First-order",
        "adds the reward's first-order gain over the drawn token to the logits, once a step (D-CBG, TAG).",
        "#8a3fa0",
        "#cf9be0",
        adam=False,
    ),
    "entrgi": Method(
        "linear",
        "EntRGi",
        "weighs the hard token by the entropy over its largest possible value, position by position.",
        "#00785a",
        "#4fd1a5",
    ),
}

# The operators' own weights: H / log V, 1 and 0. A callable or a tensor may take their place.
WEIGHT_MODES = ("entropy", "one", "zero")

# Rankings of positions: those that ops.unmask_confidence computes, and "origin", which commits at random.
SCORED_ALGS = ("entropy", "maskgit_plus", "topk_margin", "anchor")
ALGS = (*SCORED_ALGS, "origin")
CONFIDENCES = ("base", "guided")  # whose logits the entropy is of: before or after guidance
PROBABLE_ALGS = ("maskgit_plus", "topk_margin")  # whose confidence lies in [0, 1]: a threshold may be set for it
SCHEDULES = ("linspace", "even")  # of commits

SEARCHES = {
    "best": SearchKind("", (), True, "-", "o"),
    "smc": SearchKind(
        "SMC",
        ("search_every", "search_temperature", "potential", "resample_below", "self_rewarding"),
        False,
        ":",
        "D",
    ),
    "svdd": SearchKind("SVDD", ("candidates", "self_rewarding"), True, "--", "^"),
}
# How a particle's reward weighs in.
POTENTIALS = ("difference", "max", "sum")

# What a bidirectional model may read again within a block; not exact.
MODEL_CACHES = ("prefix", "dual")

BACKENDS = ("eager", "native", "triton", "cuda")
