"""Compiled modules of the package: loaded when first asked for, or the reason why they cannot be."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType

_RECORD = Path(__file__).parents[1] / "_build_info.json"  # setup.py writes there what became of the build


@cache
def load(name: str) -> ModuleType | str:
    """The extension module of this full name, or the reason why it cannot be loaded."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return f"the extension {name} is not built: {_recorded_reason(name)}"
    except ImportError as error:
        return f"the extension {name} cannot be loaded, probably because it was built for another torch: {error}"


def _recorded_reason(name: str) -> str:
    try:
        reason = json.loads(_RECORD.read_text(encoding="utf-8"))["extensions"][name]
    except (OSError, ValueError, KeyError, TypeError):
        reason = None
    return str(reason or "run 'python setup.py build_ext --inplace' in a checkout, or install the package again")
