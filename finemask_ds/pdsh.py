"""Arguments for the DeepSpeed launcher over several hosts, which hands them to the hosts' shells nearly as they are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

SHELL_WORD = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
"""What every shell takes as it stands."""


def for_pdsh(arguments: Iterable[str]) -> list[str]:
    """Quote a script's arguments so that they arrive as they are.

    DeepSpeed 0.19.8 joins them with spaces to one line for pdsh, which puts the host for ``%h`` in it, and the shell of
    each host then runs that: ``--run 'a;b'`` runs b. Only an argument with a space is put in double quotes, in which
    ``$(b)`` still runs. Only for launches over more than one host: on one the launcher starts no shell.
    """
    return [_quoted(argument.replace("%", "%%")) for argument in arguments]


def _quoted(argument: str) -> str:
    if " " in argument:  # DeepSpeed adds the double quotes, and escapes those inside.
        return re.sub(r"([\\$`])", r"\\\1", argument)
    return shlex.quote(argument)
