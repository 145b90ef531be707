"""Digests of files and values, by which a run that goes on knows that its models and checkpoints are what they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import UsageError
from .verified import VERIFIER, is_verifier

_BLOCK = 1 << 20
# Files of a model's folder that texts and rewards depend on.
_OF_MODELS = {".json", ".safetensors", ".bin", ".pt", ".model", ".txt", ".jinja", ".py", ".tiktoken"}
_NOT_OF_MODELS = ("checkpoint-", ".")  # folders that a training run leaves beside its model


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def sha256(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each file's content, in hexadecimal; several are read at a time.

    Raises:
        UsageError: a file that cannot be read.
    """
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(_sha256, files))


def fingerprint(role: str, name: str | None, *, local: bool = False) -> str | None:
    """Identifies a model's files: a digest of a folder's, the commit of a hub name; None where neither is to be found.

    An adapter's counts the model that it was trained on.

    Args:
        role: "diffusion" or "reward": which one of the built-in models None stands for.
        name: a folder or a hub name; or a verifier, whose file it is then.
        local: ask no hub: a name's commit is that of what was fetched before.

    Raises:
        UsageError: a file that cannot be read.
    """
    if name is None:
        from . import tiny

        try:
            name = str(tiny.weights_path(role))
        except FileNotFoundError:  # loading it says so
            return None
    if is_verifier(name):
        from entrgi_kernels.rewards.verifiers.naming import file_of

        file = file_of(name.removeprefix(VERIFIER))
        return None if file is None or not Path(file).is_file() else sha256([Path(file)])[0]
    folder = Path(name)
    if not folder.is_dir():
        return _commit(name, local)
    places = [path.relative_to(folder) for path in [*folder.glob("*"), *folder.glob("*/*")]]
    places = sorted(
        place
        for place in places
        if place.suffix in _OF_MODELS
        and not any(part.startswith(_NOT_OF_MODELS) for part in place.parts)
        and (folder / place).is_file()
    )
    found = dict(zip(map(str, places), sha256([folder / place for place in places]), strict=True))
    base = _base(folder / "adapter_config.json")
    content = [found, None if base is None else fingerprint(role, base, local=local)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                found.update(block)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    return found.hexdigest()


def _base(path: Path) -> str | None:
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def _commit(name: str, local: bool) -> str | None:
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        return extract_commit_hash(cached_file(name, "config.json", local_files_only=local), None)
    except (OSError, ValueError):  # loading it says why
        return None
