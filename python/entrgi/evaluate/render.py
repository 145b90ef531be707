"""The tables of an evaluation, once for every form they are shown in."""

from __future__ import annotations

import dataclasses

from ..statistics import finite
from ..tables import latex_table, markdown_table, text_table
from .analysis import METRICS, Match, Results, Slice

INTERVALS = "95% bootstrap intervals over prompts"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        title: one line.
        head, rows: cells; the first column names the row.
        bold: (row, column) of the best values.
        notes: lines below it.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    notes: tuple[str, ...] = ()


def tables_of(results: Results) -> list[tuple[Slice, list[Table]]]:
    """Main table, paired differences and compute-matched comparison of every slice; those that say nothing left out."""
    return [
        (part, [t for t in (_main(part), _differences(part, results.reference), _matched(part)) if t.rows])
        for part in results.slices
    ]


def as_text(results: Results) -> str:
    """All tables for a terminal."""
    out: list[str] = []
    for part, tables in tables_of(results):
        out += ["", part.title, "=" * len(part.title)]
        for table in tables:
            out += ["", table.title, *text_table(table.head, table.rows), *table.notes]
    return "\n".join(out)


def as_markdown(results: Results) -> list[str]:
    """Lines of all tables in Markdown."""
    out: list[str] = []
    for part, tables in tables_of(results):
        out += ["", f"## {part.title}"]
        for table in tables:
            rows = [
                [f"**{c}**" if (i, j) in table.bold else c for j, c in enumerate(r)] for i, r in enumerate(table.rows)
            ]
            out += ["", f"{table.title}:", "", *markdown_table(table.head, rows)]
            out += ["", *table.notes] if table.notes else []
    return out


def as_latex(results: Results) -> list[str]:
    """Lines of all tables in LaTeX (booktabs)."""
    out: list[str] = []
    for number, (part, tables) in enumerate(tables_of(results), start=1):
        for table, kind in zip(tables, "abc", strict=False):
            caption = " ".join([f"{part.title}: {table.title}.", *table.notes])
            rows = latex_table(table.head, table.rows, caption=caption, label=f"tab:{number}{kind}", bold=table.bold)
            out += ["", *rows]
    return out


def metric_label(name: str) -> str:
    """A metric as a column's head."""
    return METRICS.get(name, name)


def quantity(value: float | None) -> str:
    """A cost with three digits and an SI prefix, as in "12.3 G"."""
    if value is None:
        return "–"
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def _main(part: Slice) -> Table:
    names = part.metrics()
    weights = any(row.weight is not None for row in part.rows)
    head = ["method", "K", *map(metric_label, names), *(["weight"] if weights else []), "s/prompt", "FLOP/prompt"]
    rows, means = [], []
    for row in part.rows:
        figures = [row.figure(name) for name in names]
        means.append([f.mean for f in figures])
        weight = "–" if row.weight is None else f"{row.weight:.2f}"
        seconds = "–" if row.seconds is None else f"{row.compared * row.seconds:.3g}"
        cells = [f.text() for f in figures] + ([weight] if weights else [])
        rows.append([row.label, str(row.compared), *cells, seconds, quantity(row.flops and row.compared * row.flops)])
    better = {name: min if name.startswith("nats") or name == "selfbleu" else max for name in names}
    best = [better[name](finite(m[j] for m in means), default=None) for j, name in enumerate(names)]
    bold = {(next(i for i, m in enumerate(means) if m[j] == v), 2 + j) for j, v in enumerate(best) if v is not None}
    chosen = frozenset(bold) if len(rows) > 1 else frozenset()
    notes = _missing(part)
    if "distinct1" in names and "selfbleu" not in names:
        notes = ("self-BLEU is left out: it needs pip install 'entrgi_kernels[diversity]'.", *notes)
    return Table(f"mean over {len(part.rows[0].rewards)} prompts, {INTERVALS}", head, rows, chosen, notes)


def _missing(part: Slice) -> tuple[str, ...]:
    """Notes that every table of a slice has: what its figures leave out."""
    return tuple(note for row in part.rows for note in row.missing_note())


def _differences(part: Slice, reference: str) -> Table:
    pairs = part.differences(reference)
    names = list(pairs[0][2]) if pairs else []
    rows = [[f"{a.label} − {b.label}", *(values[name].text(signed=True) for name in names)] for a, b, values in pairs]
    title = f"paired differences over the same prompts, {INTERVALS}"
    return Table(title, ["", *map(metric_label, names)], rows, notes=_missing(part))


def _matched(part: Slice) -> Table:
    by_row: dict[int, dict[str, Match]] = {}
    for match in part.matches():
        by_row.setdefault(id(match.row), {})[match.unit] = match
    units = [unit for unit in ("flops", "seconds") if any(unit in found for found in by_row.values())]
    head = ["method"]
    for unit in units:
        head += [f"N, {'FLOPs' if unit == 'flops' else unit}", "best-of-N", "difference"]
    rows, capped = [], False
    for row in part.rows:
        found = by_row.get(id(row))
        if found:
            rows.append([row.label])
            for unit in units:
                rows[-1] += _match(found.get(unit))
            capped |= any(match.capped for match in found.values())
    notes = ["N: what the method's K samples cost, in unguided samples, and the N compared with."]
    if capped:
        notes.append("≥: fewer unguided samples than that were drawn; the comparison is with all of them.")
    return Table(f"Top@1 at equal cost, {INTERVALS}", head, rows, notes=(*notes, *_missing(part)))


def _match(match: Match | None) -> list[str]:
    if match is None:
        return ["–", "–", "–"]
    count = f"{match.ratio:.1f}: {'≥ ' if match.capped else ''}{match.n}"
    return [count, match.baseline.text(), match.difference.text(signed=True)]
