"""``entrgi report``: tables and pictures of finished or running evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UsageError
from .evaluation import FORMS, write_reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``entrgi report``."""
    parser.description = "Tables of evaluations on standard output, and reports as files."
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS", help="folders that `entrgi evaluate` wrote; several are put together"
    )
    parser.add_argument(
        "--out", action="append", default=[], metavar="FILE", help=f"a report ({', '.join(FORMS)}); may be repeated"
    )
    parser.add_argument("--reference", metavar="LABEL", help="method that others are compared with (default: CONFIG's)")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def run(args: argparse.Namespace) -> int:
    """Report as asked.

    Returns:
        0.

    Raises:
        UsageError: no results, or files that cannot be written.
    """
    from ..evaluate.analysis import read_results
    from ..evaluate.render import as_text

    results = read_results([Path(name) for name in args.results])
    if args.reference is not None:
        labels = list(dict.fromkeys(row.label for part in results.slices for row in part.rows))
        if args.reference not in labels:
            raise UsageError(f"--reference {args.reference!r}: expected one of {', '.join(map(repr, labels))}")
        results = results.with_reference(args.reference)
    if results.missing:
        print(f"not finished: {results.missing} samples are missing")
    print(as_text(results))
    print()
    for path in write_reports(results, [Path(name) for name in args.out]):
        print(f"wrote {path}")
    return 0
