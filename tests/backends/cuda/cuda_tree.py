"""Where the CUDA sources are, and how torch's headers are found."""

from __future__ import annotations

from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent


def torch_headers() -> list[str]:
    """Compiler flags, two words each, for sources that include torch; its headers are not ours to warn about."""
    include = TORCH / "include"
    return ["-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]
