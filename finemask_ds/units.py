"""Numbers as a person says them."""

from __future__ import annotations


def readable(value: float) -> str:
    """Return a number with about four digits: 0.0123, 3.217, 12,345."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return seconds as two units: 45 s, 3 min 10 s, 2 h 5 min, 3 d 4 h."""
    left = max(0, round(seconds))
    for size, name, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if left >= size:
            return f"{left // size} {name} {left % size // smaller} {small}"
    return f"{left} s"
