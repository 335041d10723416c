"""Fixtures shared by the tests: rank pools, toy models, the shared folder."""

from __future__ import annotations

import os

# Before torch is imported: toy tensors are slower on two threads, and the ranks of a pool need the other core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # Before the hub's library is imported, which reads it once: no hub is asked.

from pathlib import Path

if not Path("/proc/driver/nvidia").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # Before torch may import Triton, whose kernels this lets run on CPUs.

from collections.abc import Iterator

import pytest

from finemask_ds.masks.files import save_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.models.load import load_pretrained
from tests.finetune.tasks import write_tasks
from tests.pool import RankPool
from tests.toys import write_bert, write_roberta, write_text

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is read from or written to the user's caches."""
    os.environ["FINEMASK_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pools(one_rank: RankPool, two_ranks: RankPool) -> Iterator[dict[int, RankPool]]:
    """Pools of one, two and three ranks."""
    three = RankPool(3)
    yield {1: one_rank, 2: two_ranks, 3: three}
    three.close()


@pytest.fixture(scope="session")
def toy_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("toy") / "bert")


@pytest.fixture(scope="session")
def toy_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_roberta(tmp_path_factory.mktemp("toy") / "roberta")


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("toy") / "text")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real text and a real encoder beside the checkout; never part of the project."""
    folder = Path(os.environ.get("FINEMASK_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"{folder} with real text and a real encoder is absent (set FINEMASK_SHARED)")
    return folder


@pytest.fixture(scope="session")
def toy_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("toy") / "tasks")


@pytest.fixture(scope="session")
def toy_mask(tmp_path_factory: pytest.TempPathFactory, toy_bert: Path) -> Path:
    """A run directory with a random mask of the toy BERT at 70 %."""
    folder = tmp_path_factory.mktemp("toy") / "random"
    pretrained = load_pretrained(str(toy_bert))
    told = {"method": "random", "model": "toy", "model_sha256": pretrained.digest(), "seed": 3, "target_sparsity": 0.7}
    save_mask(folder / "mask.safetensors", Mask.random(pretrained.shapes, 0.7, seed=3).with_provenance(told))
    return folder
