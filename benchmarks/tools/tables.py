"""Tables of the committed rows: a Markdown page beside each JSON file of benchmarks/results.

    python -m benchmarks.tools.tables            # all of them
    python -m benchmarks.tools.tables rows.json  # one, beside it

Cells are medians in milliseconds, with the share of the floor in brackets; the floor is the column without brackets. Of
the candidates of `benchmarks.tools.tune` a page shows the fastest of each shape; of all else it shows every row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import RESULTS

Row = dict[str, Any]
_COMMON = ("device", "torch", "triton", "revision")


def page(name: str, found: Any) -> str | None:
    """The page of one file's content; None where it holds no rows that a table could be made of.

    Args:
        name: of the file, without its suffix.
        found: of :func:`benchmarks.harness.measure.save`, of `entrgi check`, of `benchmarks.tools.tune`, or flat rows.
    """
    if isinstance(found, dict):
        tables = _checked(found) if "times" in found else []
        about = str(found.get("machine", ""))
    else:
        tables = _measured(found) if any("op" in row for row in found) else _flat(found)
        about = "; ".join(dict.fromkeys(_setting(row) for row in found))
    if not tables:
        return None
    head = [f"# {name}", "", f"Written by `python -m benchmarks.tools.tables` from `{name}.json`. {about}."]
    return "\n".join([*head, *tables]) + "\n"


def _measured(rows: Sequence[Row]) -> list[str]:
    """A table for each operation: a line for each shape and dtype, a column for each candidate."""
    lines: list[str] = []
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op]
        names = list(dict.fromkeys(row["backend"] for row in own))
        places: dict[tuple[str, str, str], dict[str, Row]] = {}
        for row in own:
            shape = " ".join(f"{key} {value}" for key, value in row["shape"].items() if key != "V") or "–"
            places.setdefault((shape, row["dtype"], row["revision"]), {})[row["backend"]] = row
        body = [
            [*place[:2], *(_cell(found.get(name)) for name in names), place[2]]
            for place, found in sorted(places.items(), key=lambda item: _order(item[1]))
        ]
        lines += ["", f"## {op}", "", *_table(["shape", "dtype", *names, "revision"], body)]
    return lines


def _order(found: dict[str, Row]) -> tuple[Any, ...]:
    row = next(iter(found.values()))
    return row["dtype"], str(row["shape"].get("preset", "")), row["shape"].get("N", 0), row["shape"].get("D", 0)


def _cell(row: Row | None) -> str:
    if row is None or row["p50"] is None:
        return "–"
    time, share = row["p50"], row["share of floor"]
    text = f"{time:.3g}" if time < 1000 else f"{time:.0f}"
    return text if share in (None, 1.0) else f"{text} ({share:.0%})"


def _checked(found: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(name for row in found["times"] for name in row["ms"]))
    body = [
        [row["op"], f"N {row['n']} D {row['d']}", row["dtype"], *(_number(row["ms"].get(name)) for name in names)]
        for row in found["times"]
    ]
    passed = sum(verdict["passed"] for verdict in found["verdicts"].values())
    proofs = f"{passed} of {len(found['verdicts'])} proofs passed. "
    measured = (
        f"A copy moves {found['bandwidth'] / 1e12:.2f} TB/s, a product runs at {found['flops'] / 1e12:.0f} TFLOP/s."
    )
    return ["", proofs + measured, "", *_table(["operator", "shape", "dtype", *names], body)]


def _flat(rows: Sequence[Row]) -> list[str]:
    """Rows as they are, those of the same columns together; of `tune`'s candidates the fastest of each shape."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault(tuple(key for key in row if key not in _COMMON), []).append(row)
    lines: list[str] = []
    for columns, own in kinds.items():
        if "tile" in columns:
            best: dict[Any, Row] = {}
            for row in own:
                key = row["family"], row["shape"]
                best[key] = min(row, best.get(key, row), key=lambda found: found["ms"] or float("inf"))
            lines += ["", f"The fastest of {len(own)} candidates, by family and shape:"]
            own = list(best.values())
        lines += ["", *_table(columns, [[_number(row[column]) for column in columns] for row in own])]
    return lines


def _setting(row: Row) -> str:
    return ", ".join(f"{key} {row[key]}" if key != "device" else str(row[key]) for key in _COMMON[:3] if row.get(key))


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "–" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(head: Iterable[str], body: Iterable[Sequence[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.tables", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all of benchmarks/results")
    for path in parser.parse_args(argv).files or sorted(RESULTS.glob("*.json")):
        text = page(path.stem, json.loads(path.read_text(encoding="utf-8")))
        if text is not None:
            path.with_suffix(".md").write_text(text, encoding="utf-8")
            print(path.with_suffix(".md"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
