"""Which file of a checkpoint cannot be read: asked once loading has failed, since transformers seldom says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# Files of a checkpoint that hold a JSON object.
_OBJECTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json")


def damaged_file(path: str) -> str | None:
    """What is wrong with the first damaged file of a checkpoint; None where all can be read.

    Args:
        path: a folder, or the name of a repository, of which the files in the cache are looked at.
    """
    folder = _folder(path)
    if folder is None:
        return None
    for file in sorted(folder.iterdir()):
        try:
            reason = _check(file)
        except Exception as error:  # each reader has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
        if reason is not None:
            return f"{file} is damaged: {reason:.300}"
    return None


def file_of(path: str, tensor: str) -> str:
    """The file of a checkpoint that holds a tensor; the checkpoint itself where that cannot be told."""
    from safetensors import safe_open

    folder = _folder(path)
    for file in () if folder is None else sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            if tensor in content.keys():  # noqa: SIM118 - it is no dict
                return str(file)
    return path


def _folder(path: str) -> Path | None:
    from transformers.utils import cached_file

    if Path(path).is_dir():
        return Path(path)
    try:
        found = cached_file(path, "config.json", local_files_only=True)
    except OSError:
        return None
    return None if found is None else Path(found).parent


def _check(file: Path) -> str | None:
    if file.suffix == ".json":
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name in _OBJECTS and not isinstance(content, dict):
            return f"it holds a {type(content).__name__}, expected an object"
        if file.name.endswith(".index.json"):
            return _missing_shard(file, content)
        if file.name == "tokenizer.json":
            from tokenizers import Tokenizer

            Tokenizer.from_file(str(file))
    elif file.suffix == ".jinja":
        file.read_text(encoding="utf-8")
    elif file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt"):
            pass
    elif file.suffix == ".bin" and file.name.startswith("pytorch_model"):
        torch.load(file, map_location="meta", weights_only=True)
    return None


def _missing_shard(index: Path, content: Any) -> str | None:
    shards = sorted(set(content["weight_map"].values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    return f"it names {missing[0]}, which is not there" if missing else None
