"""`finemask recipe`: experiments as plans of runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from finemask_ds.config import TamtRecipeConfig
from finemask_ds.options import add_options, from_options

if TYPE_CHECKING:
    from finemask_ds.cli import Commands


def add_recipe(commands: Commands) -> None:
    """`finemask recipe quickstart | tamt`."""
    recipe = commands.add_parser("recipe", help="run an experiment as a plan of runs").add_subparsers(
        metavar="RECIPE", required=True
    )
    quickstart = recipe.add_parser("quickstart", help="every method on the built-in language: losses, scores, a page")
    quickstart.add_argument("--root", type=Path, default=Path("runs/quickstart"), help="folder of its runs")
    quickstart.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of fine-tuning; default 1 2")
    quickstart.add_argument("--tasks", nargs="+", default=[], help="built-in tasks to fine-tune on; default all")
    quickstart.set_defaults(handler=_quickstart)
    tamt = recipe.add_parser(
        "tamt", help="TAMT's main result: methods x sparsities x tasks, 3 masks x 3 fine-tunings",
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    add_options(tamt, TamtRecipeConfig)
    tamt.set_defaults(handler=_tamt)


def _quickstart(arguments: argparse.Namespace) -> None:
    from finemask_ds.recipes.quickstart import main_job

    print(main_job(arguments.root, arguments.seeds, arguments.tasks))


def _tamt(arguments: argparse.Namespace) -> None:
    from finemask_ds.recipes.tamt import run_recipe

    print(run_recipe(from_options(TamtRecipeConfig, vars(arguments))))
