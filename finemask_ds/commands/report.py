"""`finemask report`: tables, figures and one page of what fine-tunings left."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_report(commands: argparse._SubParsersAction) -> None:
    """`finemask report RUN... --out FOLDER`."""
    report = commands.add_parser("report", help="write scores and figures of fine-tunings as Markdown, CSV and HTML")
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN",
        help="folder of a plan, a fine-tuning or a search, or a folder that holds such",
    )  # fmt: skip
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where to write [report in the first RUN]")
    report.set_defaults(handler=_report)


def _report(arguments: argparse.Namespace) -> None:
    from finemask_ds.report.write import write_report

    page, left_out = write_report(arguments.runs, arguments.out)
    for sentence in left_out:
        print(f"left out: {sentence}", file=sys.stderr)
    print(page)
