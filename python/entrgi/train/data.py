"""Prompts to train on: named presets, any Hugging Face dataset, JSON lines, text, or the tiny models' own grammar."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UsageError
from ..prompts import Prompt, read_placed, read_prompts

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SEED, COUNT = 42, 20_000
_TEXT_FILES = (".jsonl", ".json", ".ndjson", ".txt")


class Preset(NamedTuple):
    """A published training set: where it is, which rows count, and the prompt of a row (None: the row has none)."""

    path: str
    keep: Callable[[dict[str, Any]], bool]
    prompt: Callable[[dict[str, Any]], str | None]


def last_user_turn(row: dict[str, Any]) -> str | None:
    """The last user turn of tulu-3-wildchat's `prompt` (text, or turns), else of its conversations."""
    for name in ("prompt", "messages", "chosen", "rejected"):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
        turns = [turn for turn in value or [] if isinstance(turn, dict) and turn.get("role") == "user"]
        contents = [turn["content"] for turn in turns if isinstance(turn.get("content"), str)]
        if contents and contents[-1].strip():
            return contents[-1].strip()
    return None


def is_good(row: dict[str, Any]) -> bool:
    """Whether magpie-ultra rates the row's instruction good or better."""
    return row.get("quality") in ("good", "excellent")


def instruction(row: dict[str, Any]) -> str | None:
    """magpie-ultra's instruction."""
    return (row.get("instruction") or "").strip() or None


def is_english(row: dict[str, Any]) -> bool:
    """Whether lmsys-chat-1m calls the conversation English."""
    return row.get("language") == "English"


def first_turn(row: dict[str, Any]) -> str | None:
    """The first turn of lmsys-chat-1m's conversation, where the user speaks."""
    turns = row.get("conversation") or []
    if not turns or turns[0].get("role") != "user":
        return None
    return (turns[0].get("content") or "").strip() or None


PRESETS = {
    "wildchat": Preset("allenai/tulu-3-wildchat-if-on-policy-8b", lambda row: True, last_user_turn),
    "magpie": Preset("argilla/magpie-ultra-v0.1", is_good, instruction),
    "lmsys": Preset("lmsys/lmsys-chat-1m", is_english, first_turn),
}


def load_prompts(
    source: str, *, field: str = "prompt", split: str = "train", count: int = COUNT, seed: int = SEED
) -> list[Prompt]:
    """Prompts of a source: rows that count, shuffled, the first `count`, each prompt once.

    Args:
        source: a preset's name (``wildchat``, ``magpie``, ``lmsys``), ``PRESET=PATH`` for a preset's rows in a copy
            elsewhere, a file of prompts (.txt: one a line; .jsonl: one JSON value a line), a folder with a dataset, or
            a dataset's name on the Hub.
        field: column or field that holds the prompt, a string or a list of turns; not used by presets.
        split: of a dataset.
        count: at most so many, before repeated prompts are left out.
        seed: of the shuffling; files of prompts keep their order.

    Raises:
        UsageError: nothing there, no such column, or no prompt in it.
        ImportError: a dataset without the package `datasets`.
    """
    name, _, path = source.partition("=")
    if name in PRESETS:
        preset = PRESETS[name]
        rows = _load_dataset(path or preset.path, split).filter(preset.keep, desc=f"{name}: rows that count")
        found = [preset.prompt(row) for row in _first(rows, count, seed)]
    elif Path(source).suffix.lower() in _TEXT_FILES:
        found = read_prompts(files=[source], field=field)[:count]
    else:
        rows = _load_dataset(source, split)
        if field not in rows.column_names:
            raise UsageError(f"{source} has no column {field!r}: its columns are {sorted(rows.column_names)}")
        found = [_of_column(row[field]) for row in _first(rows, count, seed)]
    prompts = list({str(prompt): prompt for prompt in found if prompt}.values())
    if not prompts:
        raise UsageError(f"no prompts in {source}: expected at least one row with a user's turn")
    logger.info("%s: %d prompts", source, len(prompts))
    return prompts


def place(source: str, field: str, prompts: Sequence[Prompt], index: int) -> str:
    """Where one of the prompts of a source stands, for messages."""
    if Path(source).suffix.lower() in _TEXT_FILES:
        return next(place for place, found in read_placed(files=[source], field=field) if found == prompts[index])
    return f"{source}, prompt {prompts[index]!r:.80}"


def within(prompts: Sequence[Prompt], tokenizer: Any, most: int) -> list[Prompt]:
    """The prompts of at most `most` tokens under the tokenizer's chat template; says how many were left out.

    Raises:
        UsageError: none is left.
    """
    from entrgi_kernels.text.template import conversation_from, encode_prompt

    kept = [p for p in prompts if len(encode_prompt(tokenizer, conversation_from(p))) <= most]
    if not kept:
        raise UsageError(f"all {len(prompts)} prompts are longer than --max-prompt-tokens {most}")
    if len(kept) < len(prompts):
        logger.info("%d prompts of more than %d tokens left out", len(prompts) - len(kept), most)
    return kept


def hold_out(prompts: Sequence[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to train on, the last `count` of them held out).

    Raises:
        UsageError: too few to train on.
    """
    if count >= len(prompts):
        raise UsageError(f"{len(prompts)} prompts are too few to hold out {count}: give more, or --eval-prompts 0")
    cut = len(prompts) - count
    return list(prompts[:cut]), list(prompts[cut:])


def tiny_prompts(count: int, held_out: int) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts of the tiny models' grammar to train on, held-out ones); no prompt is in both.

    Raises:
        UsageError: more than the grammar has, or too few to train on.
    """
    from .. import tiny

    try:
        return hold_out(tiny.prompts(count, seed=SEED), held_out)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"the built-in models' prompts: {error}") from error


def _load_dataset(path: str, split: str) -> Dataset:
    try:
        import datasets
    except ImportError:
        raise ImportError("datasets are read by the package datasets: pip install 'entrgi_kernels[train]'") from None
    try:
        if Path(path, "state.json").exists() or Path(path, "dataset_dict.json").exists():
            found = datasets.load_from_disk(path)
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(path, split=split)
    except (OSError, ValueError, KeyError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"cannot load the dataset {path} (split {split!r}): {reason}") from error


def _first(rows: Dataset, count: int, seed: int) -> Dataset:
    rows = rows.shuffle(seed=seed)
    return rows.select(range(min(count, len(rows))))


def _of_column(value: Any) -> Prompt | None:
    """Text, or the turns up to the last one of the user."""
    if isinstance(value, str):
        return value.strip() or None
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in value or []]
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    return turns or None
