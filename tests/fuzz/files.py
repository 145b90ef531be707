"""Configuration files, JSON lines and settings: valid ones, mutated. Each works or is refused in one clear line."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from entrgi import jsonl
from entrgi.errors import UsageError
from entrgi.evaluate.config import cells_of, from_dict, presets, read_config
from entrgi.prompts import read_prompts
from entrgi_kernels.guidance import GuidanceConfig
from entrgi_kernels.names import ALGS, CONFIDENCES, METHODS, MODEL_CACHES, POTENTIALS, SEARCHES

from .arguments import THINGS, eps, integral, lr, real, temperature
from .draws import Draws, Failure

_folder: list[tempfile.TemporaryDirectory[str]] = []

SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**30, 0.5, -0.5, 1.0, 1e400, math.nan, "", " ", "tiny", "none", "entrgi", "auto",
    "x" * 300, "ä\u2028", "\ud800", "a\nb", [], [[]], {}, {"a": 1}, [None], [1, "a"], {"method": "entrgi"},
    {"path": "tiny"}, {"name": None}, [{"method": ["none", "entrgi"]}], {"method": {}}, {1: 2}, [0.7, "warm"],
)  # fmt: skip
WORDS = (
    "null", "true", "~", "-1", "1e400", ".nan", ".inf", "[]", "{}", '""', "!!python/object:os.system x", "&a [*a]",
    "*b", "!!binary =", "2020-01-01", "0o7", "1_000", "|", ">", "- -", "? x", "<<: x", "%YAML 9", "---", "\t", "'",
    "\x00", "\ufeff", "9" * 400,
)  # fmt: skip
PROMPTS = [
    '{"prompt": "Why?"}', '{"prompt": "a", "id": 3}', '"b"', "", '{"messages": [{"role": "user", "content": "Hi"}]}',
    '{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}', '{"prompt": "\\u00e4"}',
]  # fmt: skip


def prepare() -> None:
    torch.set_num_threads(1)
    _folder[:] = [tempfile.TemporaryDirectory(prefix="fuzz")]


def run(d: Draws) -> dict[str, int]:
    name = d.pick(tuple(KINDS))
    d.note(file=name)
    return {f"{name} {KINDS[name](d)}": 1}


def _outcome(d: Draws, what: str, call: Callable[[], Any], refusals: tuple = (UsageError,)) -> Any:
    """The call's result, or None where it was refused in one line; Failure otherwise."""
    try:
        return call()
    except refusals as error:
        message = str(error)
        if not message.strip() or "\n" in message or len(message) > 3000:
            raise Failure(f"{what}: a refusal that is not one line: {message!r:.300}") from error
        return None
    except Exception as error:
        raise Failure(f"{what}: {type(error).__name__}: {error}") from error


# --- mutations ---


def bent(d: Draws, data: bytes) -> bytes:
    """A few bytes, lines or words of it changed."""
    for _ in range(d.pick([1, 1, 1, 2, 3])):
        lines = data.split(b"\n")
        at, row = d.integer(0, max(0, len(data) - 1)), d.integer(0, len(lines) - 1)
        how = d.pick(["flip", "cut", "end", "insert", "drop", "twice", "swap", "word", "word", "join", "nul"])
        if how == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << d.integer(0, 7))]) + data[at + 1 :]
        elif how == "cut":
            data = data[:at] + data[at + d.integer(1, 9) :]
        elif how == "end":
            data = data[:at]
        elif how == "insert":
            data = (
                data[:at]
                + d.pick([b"\xff", b"\xc3", b"{", b"}", b'"', b"\r", b"\xe2\x80\xa8", b"\\", b":", b"\x1b"])
                + data[at:]
            )
        elif how == "drop":
            data = b"\n".join(lines[:row] + lines[row + 1 :])
        elif how == "twice":
            data = b"\n".join(lines[: row + 1] + lines[row:])
        elif how == "swap":
            other = d.integer(0, len(lines) - 1)
            lines[row], lines[other] = lines[other], lines[row]
            data = b"\n".join(lines)
        elif how == "word":
            words = lines[row].split(b" ")
            words[d.integer(0, len(words) - 1)] = d.pick(WORDS).encode()
            lines[row] = b" ".join(words)
            data = b"\n".join(lines)
        elif how == "join":
            data = data.replace(b"\n", d.pick([b"", b"\r\n", b"\r", b"\n\n"]))
        else:
            data = data[:at] + bytes(d.integer(1, 5))
    return data


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """All paths into nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in _places(part, (*path, key)))]


def changed(d: Draws, content: Any) -> tuple[Any, str]:
    """(nested content with one entry replaced, dropped or added, what was done)."""
    content = json.loads(json.dumps(content))
    path = d.pick([place for place in _places(content) if place] or [()])
    if not path:
        return d.pick(SCALARS), "all"
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    how = d.pick(["replace", "replace", "replace", "drop", "add"])
    if how == "drop":
        del parent[path[-1]]
    elif how == "add" and isinstance(parent, dict):
        parent[d.pick(["x", "", "seeds", "label", "temperature", 3, None, "method"])] = d.pick(SCALARS)
    else:
        parent[path[-1]] = d.pick(SCALARS)
    return content, f"{how} {'.'.join(map(str, path))}"


# --- kinds of files ---


def _config(d: Draws) -> str:
    """An evaluation's YAML, its bytes bent or an entry of it changed."""
    source = _presets()[d.pick(presets())]
    path = Path(_folder[0].name) / "x.yaml"
    if d.chance(0.5):
        data = bent(d, source)
    else:
        content, how = changed(d, yaml.safe_load(source))
        d.note(change=how)
        data = yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    config = _outcome(d, "read_config", lambda: read_config(str(path)))
    if config is None:
        return "refused"
    cells = _outcome(d, "cells_of", lambda: cells_of(config))
    plain = _outcome(d, "to_dict", config.to_dict)
    if cells is not None and plain is not None:
        again = _outcome(d, "from_dict(to_dict())", lambda: from_dict(plain))
        if again is None or [cell.key for cell in cells_of(again)] != [cell.key for cell in cells]:
            raise Failure("from_dict(config.to_dict()) is another configuration")
    return "read"


def _presets() -> dict[str, bytes]:
    from importlib import resources

    if not _SOURCES:
        folder = resources.files("entrgi.evaluate").joinpath("configs")
        _SOURCES.update({name: folder.joinpath(f"{name}.yaml").read_bytes() for name in presets()})
    return _SOURCES


_SOURCES: dict[str, bytes] = {}


def _prompts(d: Draws) -> str:
    lines = [d.pick(PROMPTS) for _ in range(d.integer(1, 5))]
    data = "\n".join(lines).encode()
    if d.chance(0.3):
        value, _ = changed(d, {"prompt": [{"role": "user", "content": "Hi"}]})
        data += b"\n" + json.dumps(value).encode()
    path = Path(_folder[0].name) / d.pick(["x.jsonl", "x.txt", "x.json"])
    path.write_bytes(bent(d, data) if d.chance(0.8) else data)
    found = _outcome(d, "read_prompts", lambda: read_prompts(files=[str(path)], field=d.about.get("field", "prompt")))
    if found is None:
        return "refused"
    for prompt in found:
        turns = [{"content": prompt}] if isinstance(prompt, str) else prompt
        if not "".join(turn["content"] for turn in turns).strip():
            raise Failure("an empty prompt was read")
    return "read"


def _lines(d: Draws) -> str:
    """JSON lines of results: what is read is a prefix of what was written, or it is refused; repair and read agree."""
    records = [{"key": f"{i}", "text": d.pick(["a", "ä\u2028", "x" * 50]), "n": i} for i in range(d.integer(0, 5))]
    data = "".join(map(jsonl.dumps, records)).encode()
    torn = d.chance(0.5)
    path = Path(_folder[0].name) / "y.jsonl"
    path.write_bytes(data[: d.integer(0, len(data))] if torn else bent(d, data))
    found = _outcome(d, "jsonl.read", lambda: jsonl.read(path))
    fixed = _outcome(d, "jsonl.repair", lambda: jsonl.repair(path))
    if (found is None) != (fixed is None):
        raise Failure("read and repair differ in what they refuse")
    if found is None:
        if torn:
            raise Failure("a file torn at its end was refused")
        return "refused"
    if torn and found != records[: len(found)]:
        raise Failure("what is read of a torn file is not what was written")
    if json.dumps(found) != json.dumps(fixed) or json.dumps(jsonl.read(path)) != json.dumps(fixed):
        raise Failure("read, repair and read again differ")
    return "read"


def _whole(low: int, high: int, none: bool = False) -> Callable[[Any], bool | None]:
    return lambda x: (none and x is None) or (integral(x) and low <= x <= high)


def _number(
    low: float, high: float = math.inf, none: bool = False, above: bool = False
) -> Callable[[Any], bool | None]:
    def right(x: Any) -> bool | None:
        if x is None:
            return none
        if not real(x) or not low <= x <= high or (above and x == low) or x == math.inf:
            return False
        # How far out is still taken is the machine's business.
        return None if x and not 1e-30 < x < 1e30 else True

    return right


def _one(*names: Any) -> Callable[[Any], bool | None]:
    return lambda x: any(x is name or (isinstance(x, str) and x == name) for name in names)


# Settings of GuidanceConfig and what is right of a value, as its documentation says; None: either.
SETTINGS: dict[str, Callable[[Any], bool | None]] = {
    "method": _one(*METHODS), "guidance_steps": _whole(0, 253), "learning_rate": lr, "guidance_scale": lr,
    "betas": lambda x: None if isinstance(x, (list, tuple)) else False, "eps": eps,
    "state_dtype": _one(None, "float32", "float64", "bfloat16"), "num_samples": _whole(1, 1 << 10),
    "max_new_tokens": _whole(1, 1 << 14), "steps": _whole(1, 1 << 24), "temperature": temperature,
    "top_p": _number(0, 1, none=True, above=True),
    "top_k": _whole(1, (1 << 63) - 1, True),
    "alg": _one(*ALGS), "alg_temp": lambda x: x is None or temperature(x), "confidence": _one(*CONFIDENCES),
    "block_length": lambda x: x is None or (_whole(1, 1 << 14)(x) and 128 % x == 0),
    "threshold": lambda x: x is None, "cfg_scale": _number(0), "model_cache": _one(None, *MODEL_CACHES),
    "search": _one(*SEARCHES), "search_every": _whole(1, 1 << 24), "search_temperature": _number(0, above=True),
    "potential": _one(*POTENTIALS), "resample_below": _number(0, 1), "self_rewarding": lambda x: isinstance(x, bool),
    "candidates": _whole(1, 1 << 10),
    "schedule": _one("linspace", "even"), "schedule_eps": _number(0, 1, above=True),
    "deprioritize_eos": lambda x: isinstance(x, bool), "suppress_undrawable": lambda x: isinstance(x, bool),
    "batch_size": lambda x: x == "auto" if isinstance(x, str) else integral(x) and x >= 1,
    "memory_budget": lambda x: x is None or (real(x) and (x >= 1 if integral(x) else 0 < x <= 1)),
    "torch_compile": lambda x: None if isinstance(x, str) else isinstance(x, bool),
    "cuda_graphs": lambda x: isinstance(x, bool),
    "exact_savings": lambda x: None if isinstance(x, (str, tuple, list, set, dict)) else False,
    "seed": _whole(-(1 << 63), (1 << 63) - 1), "backend": _one("auto", "eager", "native", "triton", "cuda"),
    "weight": lambda x: True if x is None or callable(x) else None if isinstance(x, str) else False,
}  # fmt: skip


def _settings(d: Draws) -> str:
    name = d.pick(tuple(SETTINGS))
    good = (
        "one", "none", "auto", "all", "even", "origin", "guided", "float32", "eager", "step(1.0)", (0.5, 0.9),
        [0.9, 0.9], (None, 0.9), ("idle_steps",), ["idle_steps"], 3, 100,
    )  # fmt: skip
    value = d.pick((*THINGS, *SCALARS, *good))
    right = False if isinstance(value, torch.Tensor) else SETTINGS[name](value)
    d.note(setting=name, value=repr(value)[:60])
    refusals = (TypeError, ValueError)
    config = _outcome(d, f"GuidanceConfig({name}=)", lambda: GuidanceConfig().replace(**{name: value}), refusals)
    if config is None:
        if right is True:
            raise Failure(f"GuidanceConfig({name}={value!r}) is valid and refused")
        try:
            GuidanceConfig().replace(**{name: value})
        except refusals as error:
            if name not in str(error):
                raise Failure(f"GuidanceConfig({name}={value!r:.60}): the message does not name it: {error}") from error
        return "refused"
    if right is False:
        raise Failure(f"GuidanceConfig({name}={value!r}) was accepted")
    plain = _outcome(d, "to_dict", config.to_dict)
    text = _outcome(d, f"json of {name}", lambda: json.dumps(plain, allow_nan=False))
    if not callable(value):
        again = _outcome(d, "replace(**json)", lambda: GuidanceConfig().replace(**json.loads(text)), refusals)
        if again is None or again.to_dict() != plain:
            raise Failure(f"settings with {name}={value!r:.60} do not survive JSON")
    return "read"


KINDS: dict[str, Callable[[Draws], str]] = {
    "evaluation.yaml": _config, "prompts": _prompts, "results.jsonl": _lines, "settings": _settings,
}  # fmt: skip
