"""Names as tables show them, and tables for a terminal, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from entrgi_kernels.names import METHODS, SEARCHES

LABELS = {name: method.label for name, method in METHODS.items()}
SYMBOLS = {
    "guidance_steps": "M",
    "learning_rate": "η",
    "guidance_scale": "γ",
    "temperature": "τ",
    "num_samples": "K",
    "max_new_tokens": "L",
    "steps": "T",
    "top_p": "top-p",
    "top_k": "top-k",
    "search_every": "r",
    "search_temperature": "λ",
    "candidates": "B",
}
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "η": r"$\eta$", "τ": r"$\tau$",
    "λ": r"$\lambda$",
    "≥": r"$\geq$", "≤": r"$\leq$", "<": r"$<$", ">": r"$>$", "×": r"$\times$", "·": r"$\cdot$", "∞": r"$\infty$",
    "γ": r"$\gamma$", "–": "--", "…": r"\dots{}",
}  # fmt: skip


def label_of(method: str, search: str = "best", own: str | None = None, own_search: str | None = None) -> str:
    """A method beside a search, as in "EntRGi + SMC"; without guidance the search is all there is.

    Args:
        method, search: their names.
        own, own_search: labels that take the place of theirs.
    """
    beside = own_search or SEARCHES[search].label
    name = own or LABELS.get(method, method)
    if not beside:
        return name
    return beside if own is None and method == "none" else f"{name} + {beside}"


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return [line(head), "-" * len(line(head)), *(line(row) for row in rows)]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, numbers to the right."""

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

    return [line(head), "|---" + "|---:" * (len(head) - 1) + "|", *(line(row) for row in rows)]


def missing_note(label: str, counts: Mapping[str, tuple[int, int]]) -> list[str]:
    """What a method's figures leave out, as a line below a table; none where they leave out nothing.

    Args:
        label: of the method.
        counts: by what is left out, as in "samples without a reward": (how many, of how many).
    """
    found = [f"{count} of {total} {what}" for what, (count, total) in counts.items() if count]
    return [f"{label} leaves out {', '.join(found)}."] if found else []


def latex_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str,
    label: str,
    bold: Sequence[tuple[int, int]] = (),
) -> list[str]:
    """Lines of a floating table (package booktabs); ``bold`` holds (row, column) of cells to be set in bold."""

    def line(index: int, row: Sequence[str]) -> str:
        cells = [latex(cell) for cell in row]
        cells = [rf"\textbf{{{cell}}}" if (index, i) in bold else cell for i, cell in enumerate(cells)]
        return "  " + " & ".join(cells) + r" \\"

    return [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{latex(caption)}}}",
        rf"\label{{{label}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        line(-1, head),
        r"\midrule",
        *(line(i, row) for i, row in enumerate(rows)),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def latex(text: str) -> str:
    """Plain text as LaTeX source."""
    return "".join(_LATEX.get(character, character) for character in text)
