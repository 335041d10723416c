"""Plans: ids by content, folders that extend, files that are broken."""

from __future__ import annotations

import json
import shutil
import threading

import pytest

from finemask_ds.dispatch.estimate import kind_of, seconds_left
from finemask_ds.dispatch.plan import Cell, Plan, sweep
from finemask_ds.dispatch.survey import survey
from finemask_ds.errors import UserError
from finemask_ds.run import write_json
from tests.dispatch.toys import cell, write_mask


def test_an_id_follows_from_contents_alone(tmp_path):
    mask = write_mask(tmp_path / "one" / "mask.safetensors")
    one = Cell.of({"task": "mrpc", "mask": str(mask), "seed": 2})
    assert one.id.startswith("mrpc-tamt-kd-seed2-")
    assert (one.method, one.task) == ("tamt-kd", "mrpc")

    moved = shutil.copy(mask, tmp_path / "elsewhere.safetensors")
    assert Cell.of({"task": "mrpc", "mask": moved, "seed": 2}).id == one.id
    assert Cell.of({"seed": 2, "mask": str(tmp_path / "one"), "task": "MRPC"}) == one, "folder of a search, other words"

    write_mask(mask, finemask_ds="0.2")
    made_again = Cell.of({"task": "mrpc", "mask": str(mask), "seed": 2})
    assert made_again.id == one.id, "the same bits, found by another version"
    assert made_again.mask_sha256 != one.mask_sha256

    write_mask(mask, seed=9)
    other = Cell.of({"task": "mrpc", "mask": str(mask), "seed": 2})
    assert other.id != one.id, "another mask under the same name"
    assert other.mask_sha256 != one.mask_sha256


def test_the_id_of_this_cell_stays_as_it_is():
    """Results of years ago must be found again."""
    assert Cell.of({"task": "mrpc", "seed": 3, "num_samples": 1000}).id == "mrpc-full-seed3-f2c841f6"


def test_what_changes_no_result_changes_no_id():
    plain = Cell.of({"task": "rte", "seed": 1})
    assert Cell.of({"task": "rte"}).id == plain.id, "the default seed"
    assert Cell.of({"task": "rte", "num_samples": 0, "epochs": None, "mask": ""}).id == plain.id, "defaults"
    assert Cell.of({"task": "rte", "log_every": 7, "eval_batch_size": 8}).id == plain.id
    differing = [
        {"seed": 2},
        {"num_samples": 100},
        {"epochs": 1},
        {"eval_every": 5},
        {"lr": 1e-5},
        {"model": "builtin"},
    ]
    ids = {Cell.of({"task": "rte", **options}).id for options in differing}
    assert len(ids | {plain.id}) == len(differing) + 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"task": "mprc"}, "--task 'mprc' is unknown; type one of cola, "),
        ({"task": "rte", "epoch": 3}, "--epoch is no option of a fine-tuning; valid are batch_size "),
        ({"task": "rte", "epochs": 0}, "--epochs 0 must be at least 1"),
        ({"task": "rte", "mask": "gone.safetensors"}, "there is no mask file gone.safetensors: type the path"),
        ({"task": "rte", "mask": "setup.safetensors"}, "setup.safetensors is no mask file: type the path"),
    ],
)
def test_bad_options_are_sentences(options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.safetensors").write_text("no mask")
    with pytest.raises(UserError) as error:
        Cell.of(options)
    assert str(error.value).startswith(sentence)


def test_a_sweep_is_the_product_and_the_full_model_seed_by_seed(tmp_path):
    masks = [write_mask(tmp_path / "a.safetensors", "omp"), write_mask(tmp_path / "b.safetensors", None)]
    cells = sweep([*masks, masks[0]], ["cola", "rte"], [1, 2], [0, 100], model="builtin")
    assert len(cells) == 3 * 2 * 2 * 2
    assert all(one.options["model"] == "builtin" for one in cells)
    assert [one.options["seed"] for one in cells] == [1] * 12 + [2] * 12
    assert [(one.task, one.method, one.options.get("num_samples", 0)) for one in cells[:8]] == [
        ("cola", "full", 0), ("cola", "omp", 0), ("cola", "imported", 0),
        ("rte", "full", 0), ("rte", "omp", 0), ("rte", "imported", 0),
        ("cola", "full", 100), ("cola", "omp", 100),
    ]  # fmt: skip
    assert {one.method for one in sweep(masks, ["rte"], [1], with_full=False)} == {"omp", "imported"}


def test_a_plan_comes_back_and_extends(tmp_path):
    one, two = Cell.of({"task": "rte"}), Cell.of({"task": "cola", "lr": 1e-5})
    written = Plan.write(tmp_path / "new" / "plan", [one], retries=5)
    assert Plan.read(written.root) == written
    result = written.folder(one) / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("untouched")
    assert Plan.write(written.root, [two, one]).cells == (one, two)
    assert Plan.read(written.root).cells == (one, two)
    assert result.read_text() == "untouched"


def test_two_that_extend_at_once_lose_nothing(tmp_path):
    cells = [cell(f"cell-{number}") for number in range(16)]
    threads = [threading.Thread(target=Plan.write, args=(tmp_path, [one])) for one in cells]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {one.id for one in Plan.read(tmp_path).cells} == {one.id for one in cells}


def test_a_folder_without_a_plan_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"holds no plan\.json: type the folder of a plan, such as runs/sweep$"):
        Plan.read(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"holds no plan\.json"):
        Plan.read(tmp_path / "file")


def test_a_broken_plan_is_a_sentence(tmp_path):
    Plan.write(tmp_path, [cell("a"), cell("b")])
    path = tmp_path / "plan.json"
    whole = path.read_text()
    for length in range(0, len(whole) - 2, 7):
        path.write_text(whole[:length])
        with pytest.raises(UserError, match=f"^{path} is not valid JSON"):
            Plan.read(tmp_path)
    value = json.loads(whole)
    for broken in (
        [], {}, {**value, "cells": None}, {**value, "cells": [{}]}, {**value, "retries": "x"},
        {**value, "cells": [{**value["cells"][0], "id": "../../home"}]},
        {**value, "cells": [{**value["cells"][0], "options": {}}]},
        {**value, "cells": [{**value["cells"][0], "options": {"task": 3}}]},
    ):  # fmt: skip
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=f"^{path} is no plan .*: restore it, or delete it and dispatch again$"):
            Plan.read(tmp_path)
    path.write_text(json.dumps({**value, "plan_version": 99}))
    with pytest.raises(UserError, match="is of version 99, this program reads 1"):
        Plan.read(tmp_path)


def test_time_left_is_shared_by_workers_but_no_shorter_than_the_longest_cell(tmp_path):
    plan = Plan.write(tmp_path, [cell(f"cell-{number}") for number in range(3)])
    seen = survey(plan)
    assert seconds_left(seen) is None
    write_json(tmp_path / "estimate.json", {kind_of(plan.cells[0].options): 100})
    assert [seconds_left(seen, workers) for workers in (1, 2, 8)] == [300, 150, 100]
    (tmp_path / "estimate.json").write_text("{")
    assert seconds_left(seen) is None
