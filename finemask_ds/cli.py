"""The `finemask` command: what can be done with the files that runs leave.

A command is one function that adds its parser and names its handler, listed in `COMMANDS`; handlers import
what they need, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from finemask_ds.commands.doctor import add_doctor
from finemask_ds.commands.mask import add_mask
from finemask_ds.commands.recipe import add_recipe
from finemask_ds.commands.report import add_report
from finemask_ds.commands.sweep import add_status, add_worker
from finemask_ds.errors import UserError, printable
from finemask_ds.options import Parser
from finemask_ds.signals import Interrupted, tell

Commands = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code, 0 for most, 2 after a user's error, 128 and a signal's number after that.

    Errors are one sentence on standard error.
    """
    code = 0
    try:
        arguments = _parser().parse_args(argv)
        code = arguments.handler(arguments) or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"finemask: {printable(str(error))}", file=sys.stderr)
        return 2
    except Interrupted as ended:
        tell("asked to end; the same command goes on")
        return ended.exit_code
    except BrokenPipeError:  # as in `finemask mask show FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _parser() -> Parser:
    parser = Parser(
        prog="finemask",
        description="Masks of subnetworks, what they score downstream, and the experiments of the papers.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


COMMANDS: tuple[Callable[[Commands], None], ...] = (
    add_mask, add_status, add_report, add_recipe, add_doctor, add_worker,
)  # fmt: skip
