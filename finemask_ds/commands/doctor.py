"""`finemask doctor`: is this machine, or a cluster, fit for a long run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from finemask_ds.config.doctor import DoctorConfig
from finemask_ds.options import add_options, from_options

if TYPE_CHECKING:
    from finemask_ds.cli import Commands


def add_doctor(commands: Commands) -> None:
    """`finemask doctor [--hostfile H] [--ranks N] [--run DIR]`."""
    doctor = commands.add_parser(
        "doctor", help="check this machine, or the hosts of a hostfile, before a long run",
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    doctor.add_argument("--hostfile", type=Path, metavar="FILE", help="check the hosts of this file, from its head")
    add_options(doctor, DoctorConfig)
    doctor.set_defaults(handler=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    config = from_options(DoctorConfig, vars(arguments))
    if arguments.hostfile is None:
        from finemask_ds.doctor.examine import examine

        report = examine(config)
    else:
        from finemask_ds.doctor.cluster import examine_cluster

        report = examine_cluster(config, arguments.hostfile)
    print(report)
    return report.exit_code
