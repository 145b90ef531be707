"""Compiled modules of the package: loaded when first asked for, or the reason why they cannot be."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType

logger = logging.getLogger("entrgi_kernels")

RECORD = Path(__file__).parents[1] / "_build_info.json"  # setup.py writes there what became of the build

_UNKNOWN = "run 'python setup.py build_ext --inplace' in a checkout, or install the package again"


@cache
def load(name: str) -> ModuleType | str:
    """The extension module of this full name, or the reason why it cannot be loaded."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return f"the extension {name} is not built: {_recorded_reason(name)}"
    except ImportError as error:
        return f"the extension {name} cannot be loaded, probably because it was built for another torch: {error}"


# What setup.py records where nothing was to be built, or nothing could be.
_EXPECTED = ("ENTRGI_DISABLE_EXTENSION", "no C++ compiler", "this source tree has no", "the extension is built on")


@cache
def warn_of_loss(name: str) -> None:
    """Warn, once, of a module that is missing although there was a compiler to build it."""
    reason = _recorded_reason(name)
    if reason.startswith(_EXPECTED) or (reason == _UNKNOWN and not any(map(shutil.which, ("c++", "g++", "clang++")))):
        return
    logger.warning("%s; eager serves CPU tensors, several times slower", load(name))


def _recorded_reason(name: str) -> str:
    try:
        reason = json.loads(RECORD.read_text(encoding="utf-8"))["extensions"][name]
    except (OSError, ValueError, KeyError, TypeError):
        reason = None
    return str(reason or _UNKNOWN)
