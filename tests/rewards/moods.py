"""A function for verifiers that goes wrong as it is told; a module of its own, which processes import quickly."""

from __future__ import annotations

import math
import os
import time


class Half:
    def __float__(self) -> float:
        return 0.5


def moody(prompt: str, text: str):
    if text == "hang":
        time.sleep(60)
    if text == "exit":
        raise SystemExit
    if text == "die":
        os._exit(3)
    return {"nan": math.nan, "none": None, "text": "1", "yes": True, "half": Half()}.get(text, len(text))
