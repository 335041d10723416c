"""Tables as text: aligned for a terminal, and Markdown, which is aligned too."""

from __future__ import annotations

from collections.abc import Sequence

from finemask_ds.errors import printable


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first to the left, the others to the right."""
    lines = _padded(header, rows)
    rule = "  ".join("-" * len(cell) for cell in lines[0])
    return "\n".join(["  ".join(lines[0]), rule, *("  ".join(line) for line in lines[1:])])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also readable as it stands."""
    lines = _padded(header, rows)
    rule = ["-" * len(lines[0][0]), *("-" * (len(cell) - 1) + ":" for cell in lines[0][1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _padded(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    table = [[printable(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return [
        [
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in table
    ]
