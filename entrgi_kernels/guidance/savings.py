"""Work that is left out without changing one token; each saving can be switched off, to test just that.

The loop's own are here; those of a reward model (prefix cache and the like) are in
:mod:`entrgi_kernels.rewards.decoding.savings` and are served where the architecture allows: ``reward.savings`` tells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence, Set
from typing import Any

from ..rewards.decoding.savings import NAMES as REWARD_SAVINGS

# Name -> what is left out.
LOOP_SAVINGS = {
    "idle_steps": "steps that commit nothing: draws are keyed and Adam is fresh at every step, so they change nothing",
    "shared_forward": "all but one of a prompt's K forwards while its trajectories are still the same",
    "committed_rows": "the last inner step's backward, Adam and final draw for rows that will not be committed: with "
    "alg 'entropy' and confidence 'base' the ranking is known before guidance",
    "adam_state": "Adam's moments where none follows to read them: the last inner step's, all with a single one",
}

SAVINGS = (*LOOP_SAVINGS, *REWARD_SAVINGS)


def check_savings(given: str | Collection[str], known: Collection[str] = SAVINGS) -> frozenset[str]:
    """The set of savings that a setting means.

    Args:
        given: "all", "none", or names.
        known: names there are.

    Raises:
        ValueError, TypeError: a name that is not known, or no names.
    """
    if isinstance(given, str):
        if given in ("all", "none"):
            return frozenset(known if given == "all" else ())
        given = [given]
    if not isinstance(given, (Sequence, Set)) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"exact_savings={given!r}: expected 'all', 'none', or names out of {', '.join(known)}")
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"exact_savings={sorted(given)!r}: no saving {', '.join(map(repr, unknown))}; expected 'all', 'none', or "
            f"names out of {', '.join(map(repr, known))}"
        )
    return frozenset(given)


@contextlib.contextmanager
def reward_savings(reward: Any, given: str | Collection[str]) -> Iterator[None]:
    """A reward with the savings of a setting alone, its own choice restored afterwards.

    "all" leaves the reward's own choice: it may know better what its model can be served with.
    """
    before = getattr(reward, "exact_savings", None)
    if given == "all" or before is None:
        yield
        return
    reward.exact_savings = check_savings(given) & set(REWARD_SAVINGS)
    try:
        yield
    finally:
        reward.exact_savings = before
