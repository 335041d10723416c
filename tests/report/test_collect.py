"""Reading what runs left: any mix of folders, whole or broken."""

import json
import shutil

import pytest

from finemask_ds.errors import UserError
from finemask_ds.masks.files import load_mask, save_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.report.cells import differing
from finemask_ds.report.collect import collect
from tests.report.fakes import HOLES, Fakes, small, write


def test_states_of_a_plans_cells(holes):
    cells = collect([holes]).cells
    asked = {cell["id"] for cell in json.loads((holes / "plan.json").read_text())["cells"]}
    assert {cell.id for cell in cells} == asked
    final = [c for c in cells if c.sparsity == 0.7 and not c.num_samples and c.search_steps in (0, 200)]
    for (method, task, mask_seed, seed), state in HOLES.items():
        (cell,) = [c for c in final if (c.method, c.task, c.mask_seed, c.seed) == (method, task, mask_seed, seed)]
        assert cell.state == ("done" if state == "undefined" else state)
        assert cell.score is None
        assert cell.undefined == ("constant predictions" if cell.done else None)
        assert ("<script>" in cell.error) == (state == "failed")
    assert sum(not cell.done for cell in cells) == sum(state != "undefined" for state in HOLES.values())


def test_masks_know_their_searches_and_those_on_the_way(holes):
    for cell in collect([holes]).cells:
        assert (cell.origin is None) == (cell.mask is None)
        if cell.origin:
            assert (cell.origin.steps, cell.origin.seed) == (cell.search_steps, cell.mask_seed)


def test_any_mix_of_folders_counts_each_cell_once(tmp_path):
    fakes = small(tmp_path)
    cells = sorted((tmp_path / "cells").iterdir())
    found = collect([tmp_path, tmp_path / "cells", cells[0], tmp_path / "plan.json"])
    assert {cell.id for cell in found.cells} == {cell["id"] for cell in fakes.planned}
    assert len(found.searches) == 2
    shutil.copytree(cells[0], tmp_path / "elsewhere" / "copy")
    again = collect([tmp_path])
    assert (len(again.cells), again.duplicates) == (len(found.cells), 1)


def test_cells_of_other_settings_are_no_duplicates(tmp_path):
    """A folder keeps the cells of the sweep before, which had another rate or other rows of the same names."""
    fakes = Fakes(tmp_path)
    same = {"warmup_steps": 0, "eval_every": 50, "mixed_precision": "no", "dropout": None, "weight_decay": 0.0,
            "max_grad_norm": 1.0}  # fmt: skip
    others = {"warmup_steps": 300, "eval_every": 0, "mixed_precision": "bf16", "dropout": 0.0, "weight_decay": 0.1,
              "max_grad_norm": 0.0, "model_sha256": "dd", "data_sha256": {"train": "ee", "dev": "cc"}}  # fmt: skip
    fakes.cell("mrpc", **same)
    for name, value in others.items():
        fakes.cell("mrpc", **{**same, name: value})
    found = collect([tmp_path])
    assert (len(found.cells), found.duplicates) == (1 + len(others), 0)


def test_methods_that_found_one_mask_are_two(tmp_path):
    """As OMP and TAMT while no score has crossed the threshold."""
    fakes = Fakes(tmp_path)
    (mask,) = fakes.search("omp", 0.7, 1).values()
    for method in ("omp", "tamt-mlm"):
        fakes.cell("mrpc", mask, method=method, sparsity=0.7)
    found = collect([tmp_path])
    assert ({cell.method for cell in found.cells}, found.duplicates) == ({"omp", "tamt-mlm"}, 0)


@pytest.mark.parametrize("place", [".", "attempt-2"])
def test_an_older_result_has_the_knobs_of_its_config(tmp_path, place):
    """It does not tell them, and is still the same cell as a result that does."""
    fakes = Fakes(tmp_path)
    knobs = {"dropout": 0.3, "weight_decay": 0.01, "max_grad_norm": 0.0}
    write(fakes.cell("mrpc") / place / "config.json", {"task": "mrpc", **knobs})
    (old,) = collect([tmp_path]).cells
    assert {name: getattr(old, name) for name in knobs} == knobs
    fakes.cell("mrpc", **knobs)
    assert (len(collect([tmp_path]).cells), collect([tmp_path]).duplicates) == (1, 1)


def test_what_an_older_result_does_not_tell_is_no_other_setting(tmp_path):
    """Without its config it is the same cell as one that tells all or a part, and None that is told is a value."""
    told = {"dropout": None, "weight_decay": 0.01, "max_grad_norm": 0.0}
    for name, knobs in (("a", {}), ("b", {"weight_decay": 0.01}), ("c", told)):
        for seed in (1, 2):
            Fakes(tmp_path / name).cell("mrpc", seed=seed, **knobs)
    found = collect([tmp_path])
    assert (len(found.cells), found.duplicates) == (2, 4)
    assert {(cell.weight_decay, cell.max_grad_norm, cell.untold) for cell in found.cells} == {(0.01, 0.0, frozenset())}
    Fakes(tmp_path / "b").cell("mrpc", seed=3)
    assert differing(collect([tmp_path]).cells) == ()
    Fakes(tmp_path / "b").cell("mrpc", seed=3, **{**told, "dropout": 0.1})
    found = collect([tmp_path])
    assert (len(found.cells), differing(found.cells)) == (3, ("dropout",))


def test_results_copied_from_elsewhere_find_their_searches_by_hash(tmp_path):
    small(tmp_path / "there")
    (tmp_path / "there").rename(tmp_path / "here")
    cells = collect([tmp_path / "here"]).cells
    assert all(cell.origin is not None for cell in cells if cell.mask)
    assert sum(cell.mask is not None for cell in cells) == 4


def test_a_mask_made_anew_since_is_told_and_not_used(tmp_path):
    small(tmp_path)
    path = next((tmp_path / "searches").glob("tamt-kd*/mask.safetensors"))
    path.write_bytes(path.read_bytes() + b" ")
    found = collect([tmp_path])
    assert all(cell.origin is None for cell in found.cells if cell.method == "tamt-kd")
    assert any(f"{path} is not the mask" in sentence for sentence in found.left_out)


def test_checkpoints_and_foreign_folders_are_passed_by(tmp_path):
    small(tmp_path)
    before = len(collect([tmp_path]).cells)
    result = next((tmp_path / "cells").iterdir()) / "result.json"
    for folder in ("checkpoints/x", ".hidden", "a/b/c/d/e"):
        write(tmp_path / folder / "result.json", {**json.loads(result.read_text()), "seed": 77})
    write(tmp_path / "other" / "result.json", {"kind": "benchmark"})
    write(tmp_path / "others" / "result.json", [1, 2])
    assert (len(collect([tmp_path]).cells), collect([tmp_path]).left_out) == (before, ())


@pytest.mark.parametrize("name", ["checkpoints", "masks", "tb", "done", "report", "figures"])
def test_a_folder_of_the_users_may_have_any_name(tmp_path, name):
    """It is looked into where it is none of a run's, a plan's or a report's own."""
    small(tmp_path / "elsewhere")
    cell = next((tmp_path / "elsewhere" / "cells").iterdir())
    shutil.copytree(cell, tmp_path / "runs" / name / "one")
    assert [found.id for found in collect([tmp_path / "runs"]).cells] == ["one"]
    for sign in ("config.json", "result.json", "plan.json", "report.md"):
        (tmp_path / "runs" / sign).write_text("{}")
        with pytest.raises(UserError, match="holds no plan, fine-tuning or search"):
            collect([tmp_path / "runs"])
        (tmp_path / "runs" / sign).unlink()


BROKEN = ("{", "[]", '{"kind": "finetune"}', '{"kind": "finetune", "task": "x", "sparsity": []}', "\x00\xff")


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_result_is_named_and_its_cell_missing(tmp_path, text):
    fakes = small(tmp_path)
    path = tmp_path / "cells" / fakes.planned[0]["id"] / "result.json"
    path.write_text(text, encoding="latin-1")
    found = collect([tmp_path])
    assert [cell.id for cell in found.cells if not cell.done] == [fakes.planned[0]["id"]]
    assert str(path) in found.left_out[0]
    assert len(found.left_out) == 1


def test_a_broken_plan_is_named_and_results_are_used(tmp_path):
    fakes = small(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    found = collect([tmp_path])
    assert len(found.cells) == len(fakes.planned)
    assert str(tmp_path / "plan.json") in found.left_out[0]


def test_a_plan_without_any_result(tmp_path):
    fakes = Fakes(tmp_path)
    fakes.cell("mrpc", state="missing")
    (steps, path), *_ = fakes.search("tamt-kd", 0.6, 2).items()
    fakes.cell("mrpc", path, method="tamt-kd", state="missing")
    fakes.plan()
    cells = {cell.method: cell for cell in collect([tmp_path]).cells}
    assert (cells["tamt-kd"].sparsity, cells["tamt-kd"].mask_seed, cells["tamt-kd"].search_steps) == (0.6, 2, steps)
    assert cells["full"].sparsity == 0


def test_a_mask_is_known_by_its_bits_when_its_search_is_made_again(tmp_path):
    """Its file's bytes differ then, as it tells when and by which commit it was made."""
    fakes = Fakes(tmp_path)
    (path,) = fakes.search("omp", 0.6, 1).values()
    fakes.cell("mrpc", path, method="omp", sparsity=0.6, mask_fingerprint=load_mask(path).fingerprint())
    fakes.plan()

    def origin():
        found = collect([tmp_path])
        (cell,) = (cell for cell in found.cells if cell.mask)
        return cell.origin and cell.origin.method, found.left_out

    save_mask(path, load_mask(path).with_provenance({"method": "omp", "commit": "another"}))
    assert origin() == ("omp", ())
    save_mask(path, Mask.random(load_mask(path).shapes, 0.6, seed=99))
    assert origin()[0] is None
    assert "is not the mask that" in origin()[1][0]


def test_nothing_to_report_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no plan, fine-tuning or search"):
        collect([tmp_path])
    with pytest.raises(UserError, match=r"there is no .*absent"):
        collect([tmp_path / "absent"])
