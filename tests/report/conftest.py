"""One report on results with holes, read by many tests."""

import pytest

from finemask_ds.report.write import write_report
from tests.report import fakes


@pytest.fixture(scope="session")
def holes(tmp_path_factory):
    """Folder of a plan with missing, failed and undefined cells, snapshots, budgets and fewer samples."""
    root = tmp_path_factory.mktemp("holes")
    fakes.rich(root, methods=("tamt-kd", "imp", "omp", "random"), tasks=("cola", "stsb", "mrpc", "squad"),
               sparsities=(0.5, 0.7), sizes=(1000,))  # fmt: skip
    return root


@pytest.fixture(scope="session")
def report(holes):
    """The folder of its report."""
    page, left_out = write_report([holes])
    assert left_out == []
    return page.parent
