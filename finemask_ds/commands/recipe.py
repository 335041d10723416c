"""`finemask recipe`: experiments as plans of runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finemask_ds.cli import Commands


def add_recipe(commands: Commands) -> None:
    """`finemask recipe quickstart`."""
    recipe = commands.add_parser("recipe", help="run an experiment as a plan of runs").add_subparsers(
        metavar="RECIPE", required=True
    )
    quickstart = recipe.add_parser("quickstart", help="every method on the built-in language, in one table")
    quickstart.add_argument("--root", type=Path, default=Path("runs/quickstart"), help="folder of its runs")
    quickstart.set_defaults(handler=_quickstart)


def _quickstart(arguments: argparse.Namespace) -> None:
    from finemask_ds.recipes.quickstart import main_job

    print(main_job(arguments.root))
