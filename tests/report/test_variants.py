"""What is no seed of one method is named apart, with and without the searches at hand."""

import itertools
import shutil

import pytest

from finemask_ds.masks.files import save_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.report import scores as statistic
from finemask_ds.report.collect import collect
from finemask_ds.report.variants import with_variants
from tests.report.fakes import SHAPES, Fakes


def rows(root, sparsity=0.7):
    """Method -> number of masks or seeds in the table of the sparsity."""
    cells = with_variants(collect([root]).cells)
    return {score.method: score.n for score in statistic.board(cells, sparsity).scores.values()}


def imported(fakes, path, bits, sparsity=0.7, **changes):
    save_mask(path, Mask.random(SHAPES, sparsity, seed=bits).with_provenance({"method": "imported"}))
    fakes.cell("mrpc", path, method="imported", target_sparsity=None, sparsity=sparsity, **changes)


@pytest.fixture
def two_starts(tmp_path):
    """A sweep over the masks of two initialisations, two seeds of each with masks on the way."""
    fakes, bits = Fakes(tmp_path / "sweep"), itertools.count()
    for init in ("binary", "reconstruction"):
        searches = Fakes(tmp_path / init)
        for number in (1, 2):
            for steps, path in searches.search("tamt-kd", 0.7, number, snapshots=(100,), init=init).items():
                save_mask(path, Mask.random(SHAPES, 0.7, seed=next(bits)))
                fakes.cell("mrpc", path, method="tamt-kd", sparsity=0.7, mask_seed=number, steps=steps)
    fakes.plan()
    return tmp_path


def test_searches_with_other_settings_are_not_seeds_of_one_method(two_starts):
    assert rows(two_starts) == {"tamt-kd (init binary)": 2, "tamt-kd (init reconstruction)": 2}


def test_searches_of_one_model_under_two_names_are_seeds_of_one_method(tmp_path):
    for number, model in enumerate(("theta", "elsewhere/theta")):
        fakes = Fakes(tmp_path / str(number))
        for steps, path in fakes.search("tamt-kd", 0.7, number, model=model).items():
            fakes.cell("mrpc", path, method="tamt-kd", sparsity=0.7, mask_seed=number, steps=steps, model=model)
    assert rows(tmp_path) == {"tamt-kd": 2}


def test_without_their_searches_masks_of_one_seed_are_not_seeds_of_one_method(two_starts):
    """Of a sweep copied alone nobody knows which of the masks belong together; those on the way are no rows."""
    for name in ("binary", "reconstruction"):
        shutil.rmtree(two_starts / name)
    assert rows(two_starts) == {
        f"tamt-kd ({name}/searches/tamt-kd-70-{seed})": 1 for name in ("binary", "reconstruction") for seed in (1, 2)
    }


def test_masks_of_different_seeds_stay_one_method_without_their_searches(tmp_path):
    fakes = Fakes(tmp_path)
    for number in (1, 2, 3):
        for steps, path in fakes.search("tamt-kd", 0.7, number).items():
            fakes.cell("mrpc", path, method="tamt-kd", sparsity=0.7, mask_seed=number, steps=steps)
    shutil.rmtree(tmp_path / "searches")
    assert rows(tmp_path) == {"tamt-kd": 3}


def test_a_mask_that_a_longer_search_passed_is_on_the_axis_of_steps(tmp_path):
    """It has the seed and the steps of a shorter search and other bits, and no row is split by it."""
    fakes = Fakes(tmp_path)
    for number in (1, 2):
        for steps, path in fakes.search("tamt-kd", 0.7, number, snapshots=(100,)).items():
            fakes.cell("mrpc", path, method="tamt-kd", sparsity=0.7, mask_seed=number, steps=steps)
    shorter = Fakes(tmp_path / "shorter").search("tamt-kd", 0.7, 1, steps=100)[100]
    save_mask(shorter, Mask.random(SHAPES, 0.7, seed=5))
    fakes.cell("mrpc", shorter, method="tamt-kd", sparsity=0.7, mask_seed=1, steps=100)
    assert rows(tmp_path) == {"tamt-kd": 2}


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (("wanda.safetensors", "sparsegpt.safetensors"), ("wanda", "sparsegpt")),
        (("masks/wanda.safetensors", "masks/sparsegpt.safetensors"), ("wanda", "sparsegpt")),
        (("wanda/mask.safetensors", "sparsegpt/mask.safetensors"), ("wanda", "sparsegpt")),
        (("a/70/m.safetensors", "b/70/m.safetensors"), ("a/70/m", "b/70/m")),
    ],
)
def test_imported_masks_are_named_by_their_files(tmp_path, files, names):
    fakes = Fakes(tmp_path / "sweep")
    for bits, file in enumerate(files):
        for seed in (1, 2, 3):
            imported(fakes, tmp_path / file, bits, seed=seed)
    assert rows(tmp_path) == {f"imported ({name})": 3 for name in names}


@pytest.mark.parametrize(
    ("at_50", "at_70", "names"),
    [
        ("wanda-50", ("wanda-70", "gpt-70"), ("wanda-*", "gpt-*")),
        ("wanda_s0.5", ("wanda_s0.70", "gpt_s0.70"), ("wanda_s*", "gpt_s*")),
        ("wanda/0.5/mask", ("wanda/0.7/mask", "gpt/0.7/mask"), ("wanda/*", "gpt/*")),
        ("50/wanda", ("70/wanda", "70/gpt"), ("wanda", "gpt")),
        ("on-50/wanda-50", ("on-50/wanda-70", "on-50/gpt-70"), ("wanda-*", "gpt-*")),
        ("wanda/m-50", ("gpt/m-70", "gpt/n-70"), ("wanda/m-*", "gpt/m-*", "gpt/n-*")),
        ("a/wanda", ("a/wanda2", "a/70"), ("wanda", "wanda2", "*")),
    ],
)
def test_a_family_of_imported_masks_has_one_name_at_all_sparsities(tmp_path, at_50, at_70, names):
    """Also where it is alone, so that it is one line of a figure and no other method than where it is not."""
    fakes = Fakes(tmp_path / "sweep")
    for bits, (file, sparsity) in enumerate([(at_50, 0.5), *((file, 0.7) for file in at_70)]):
        imported(fakes, tmp_path / f"{file}.safetensors", bits, sparsity)
    assert rows(tmp_path, 0.5) == {f"imported ({names[0]})": 1}
    assert rows(tmp_path, 0.7) == {f"imported ({name})": 1 for name in names[-2:]}


def test_one_imported_mask_under_two_names_is_one(tmp_path):
    fakes = Fakes(tmp_path / "sweep")
    for seed, name in enumerate(("one", "two")):
        imported(fakes, tmp_path / f"{name}.safetensors", 1, seed=seed, mask_fingerprint="f")
    assert rows(tmp_path) == {"imported": 2}


def test_masks_of_one_path_are_told_apart_by_their_bits(tmp_path):
    """Imported once more under the same name between two sweeps."""
    for bits in (1, 2):
        imported(Fakes(tmp_path / f"sweep{bits}"), tmp_path / "m.safetensors", bits, mask_fingerprint=f"{bits}" * 64)
    assert rows(tmp_path) == {"imported (m 11111111)": 1, "imported (m 22222222)": 1}
