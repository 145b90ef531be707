"""What the driver must survive, for its own test: the 4th case is wrong, the 8th aborts, the 13th never ends."""

from __future__ import annotations

import os
import time

from .draws import Draws, Failure


def prepare() -> None:
    pass


def run(d: Draws) -> dict[str, int]:
    if d.number == 3:
        raise Failure("off by 3")
    if d.number == 7:
        os.abort()
    if d.number == 12:
        time.sleep(1000)
    return {"x here": 1}
