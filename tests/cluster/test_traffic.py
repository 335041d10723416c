"""What docs/scale.md says of bytes on the wire, against what the hosts' network cards count."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.traffic import CELLS, count_on_hosts
from tests.cluster.hosts import Hosts

CHOSEN = ("tamt-zero0", "tamt-zero2-2x", "tamt-zero3", "imp-zero2", "tamt-zero2-bf16")
"""A sum, sums of micro-batches with values to gather, gathered weights with selection, IMP, sums in 16 bit."""


@pytest.mark.slow
def test_hosts_send_what_the_arithmetic_says(hosts: Hosts, tmp_path: Path) -> None:
    found = count_on_hosts(hosts, [cell for cell in CELLS if cell.name in CHOSEN], tmp_path, timeout_sec=240)
    assert set(found["cells"]) == set(CHOSEN)
    for name, cell in found["cells"].items():
        assert cell["counted"] == pytest.approx(cell["expected"], rel=0.05), name
