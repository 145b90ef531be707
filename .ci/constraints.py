"""Prints a lock file as constraints for pip beside the torch of the environment that runs this.

An interpreter's own torch (another version, a CUDA build) may need other versions of a few packages, its Triton above
all. The lock's pins of those are left out: torch's own choice stays.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

wanted: dict[str, list[Requirement]] = {}
for text in importlib.metadata.requires("torch") or []:
    requirement = Requirement(text)
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        wanted.setdefault(canonicalize_name(requirement.name), []).append(requirement)
# Some builds of torch come with a Triton that their metadata do not name.
triton_is_there = importlib.util.find_spec("triton") is not None

for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
    if not line or line.startswith("#"):
        continue
    pin = Requirement(line)
    version = str(pin.specifier).removeprefix("==")
    agreed = all(requirement.specifier.contains(version) for requirement in wanted.get(canonicalize_name(pin.name), []))
    if agreed and not (pin.name == "triton" and triton_is_there):
        print(line)
