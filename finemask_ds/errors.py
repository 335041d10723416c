"""The one error a user can cause: a single sentence that says what is wrong, where, and what to type."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """Bad input; the launchers print the sentence once and every rank exits with its code."""

    exit_code = 2


class TransientError(UserError):
    """What may go well when the same command is started again, which a supervisor does; the code is sysexits.h's."""

    exit_code = 75


class OtherConfigError(UserError):
    """A run directory that something else has made."""

    def __init__(self, what: str, advice: str = "type another --run DIR") -> None:
        super().__init__(what, advice)
        self.what = what
        """Without what to type, which differs where no launcher is typed."""

    def __str__(self) -> str:
        return ": ".join(self.args)


def printable(text: str) -> str:
    """One line of text, escaped where a terminal would obey it: file names, tensor names and outputs are others'."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def abbreviated(names: Sequence[str], limit: int = 3) -> str:
    """The first names, escaped where a terminal would obey them, and how many more there are."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:limit]]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown) + more
