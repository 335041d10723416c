"""The statistics against plain numpy."""

import itertools
from pathlib import Path

import numpy
import pytest

from finemask_ds.report import scores as statistic
from finemask_ds.report.cells import CellResult
from finemask_ds.report.figures import draw_all
from finemask_ds.report.tables import Groups, fewer_samples, main_sheet, over


def cell(task="mrpc", method="tamt-kd", mask=1, seed=1, score=0.5, sparsity=0.7, steps=200, samples=0, **changes):
    key = "" if method == "full" else f"{method}-{mask}-{steps}"
    values = {
        "id": f"{task}-{method}-{mask}-{seed}-{sparsity}-{steps}-{samples}", "state": "done", "path": Path("x"),
        "task": task, "method": method, "model": "builtin", "sparsity": sparsity if key else 0.0, "mask": key or None,
        "mask_key": key, "mask_seed": mask if key else None, "search_steps": steps if key else None, "seed": seed,
        "num_samples": samples, "metric": "accuracy", "score": score,
    }  # fmt: skip
    return CellResult(**{**values, **changes})


@pytest.mark.parametrize("case", range(20))
def test_mean_over_seeds_first_and_then_over_masks(case):
    """Masks with different numbers of seeds count alike, whatever the order of the cells."""
    random = numpy.random.default_rng(case)
    table = [random.random(random.integers(1, 4)) for _ in range(random.integers(2, 5))]
    cells = [cell(mask=m, seed=s, score=x) for m, row in enumerate(table) for s, x in enumerate(row)]
    random.shuffle(cells)
    (found,) = statistic.scores(cells)
    means = [row.mean() for row in table]
    assert (found.n, found.over, found.done) == (len(table), "masks", len(cells))
    assert found.mean == pytest.approx(numpy.mean(means), abs=1e-15)
    assert found.sd == pytest.approx(numpy.std(means, ddof=1), abs=1e-15)


def test_a_single_mask_has_its_deviation_over_seeds():
    values = [0.5, 0.6, 0.9]
    for method in ("omp", "full"):
        (found,) = statistic.scores([cell(method=method, seed=s, score=x) for s, x in enumerate(values)])
        assert (found.n, found.over) == (3, "seeds")
        assert found.sd == pytest.approx(numpy.std(values, ddof=1), abs=1e-15)


def test_one_value_has_no_deviation():
    (found,) = statistic.scores([cell()])
    assert (found.mean, found.sd, found.n) == (0.5, None, 1)


def test_an_undefined_score_counts_zero_and_is_told():
    undefined = cell(seed=2, score=None, undefined="constant predictions")
    (found,) = statistic.scores([cell(score=0.6), undefined])
    assert (found.mean, found.undefined) == (0.3, ("constant predictions",))


def test_cells_without_a_result_do_not_count_but_are_there():
    (found,) = statistic.scores([cell(score=0.6), cell(seed=2, score=None, state="missing")])
    assert (found.mean, found.done, len(found.cells), found.undefined) == (0.6, 1, 2, ())


def test_averages_are_over_the_tasks_that_all_methods_have():
    """Without the rule, the method that lacks its worst task would look best."""
    values = {
        ("omp", "mrpc"): 0.6,
        ("omp", "cola"): 0.1,
        ("imp", "mrpc"): 0.7,
        ("omp", "rte"): 0.5,
        ("imp", "rte"): 0.5,
    }
    board = statistic.board([cell(task, method, score=x) for (method, task), x in values.items()], 0.7)
    assert [task for task, _ in board.common] == ["mrpc", "rte"]
    assert {m: round(a.mean, 12) for m, a in board.averages.items()} == {"imp": 0.6, "omp": 0.55}


def test_the_deviation_of_an_average_is_that_of_the_masks_averages():
    random = numpy.random.default_rng(3)
    table = random.random((3, 2, 3))  # masks x tasks x seeds
    cells = [cell(task, mask=m, seed=s, score=table[m, t, s])
             for m, (t, task), s in itertools.product(range(3), enumerate(("mrpc", "cola")), range(3))]  # fmt: skip
    average = statistic.board(cells, 0.7).averages["tamt-kd"]
    of_masks = table.mean(axis=(1, 2))
    assert (average.n, average.over) == (3, "masks")
    assert average.mean == pytest.approx(of_masks.mean(), abs=1e-15)
    assert average.sd == pytest.approx(of_masks.std(ddof=1), abs=1e-15)


def test_an_average_counts_the_masks_that_have_all_of_its_tasks():
    """Its mean is that of the tasks' means beside it; a mask or seed without one of them has no average of its own."""
    cells = [cell("mrpc", mask=mask, score=mask / 10) for mask in (1, 2, 3)]
    cells += [cell("cola", mask=mask, score=mask / 10) for mask in (1, 2)]
    average = statistic.board(cells, 0.7).averages["tamt-kd"]
    assert (average.mean, average.sd) == (pytest.approx((0.2 + 0.15) / 2), pytest.approx(numpy.std([0.1, 0.2], ddof=1)))
    assert over(average) == "n = 2 of 3 masks"
    average = statistic.board([c for c in cells if c.mask_seed == 1], 0.7).averages["tamt-kd"]
    assert over(average) == "n = 1 seed"


def test_a_method_with_fewer_rows_only_has_its_row_there():
    cells = [cell(), cell(method="full"), cell(samples=100), cell(method="omp", samples=100), cell("cola")]
    board = statistic.board(cells, 0.7)
    assert board.methods == ("full", "tamt-kd")
    assert [name for name, _ in fewer_samples(cells, board, Groups("")).rows] == ["tamt-kd", "omp"]


def test_masks_that_keep_everything_are_masks():
    cells = [cell(sparsity=0.0), cell(method="full")]
    assert main_sheet(statistic.board(cells, 0.0), Groups("")).title == "Scores at 0 % sparsity"
    assert main_sheet(statistic.board(cells[1:], 0.0), Groups("")).title == "Scores of the full model"
    assert [one.name for one in draw_all(cells) if one.name.startswith("similarity")] == ["similarity-0"]


def test_masks_on_the_way_of_a_search_are_not_averaged_with_its_last():
    cells = [cell(steps=steps, score=score) for steps, score in ((50, 0.1), (200, 0.7))]
    assert statistic.board(cells, 0.7).scores["tamt-kd", ("mrpc", 0)].mean == 0.7
    _, points, left_out = statistic.mask_points(cells, [("mrpc", 0)])
    assert ([(point.cell.search_steps, point.mean) for point in points], left_out) == ([(50, 0.1), (200, 0.7)], 0)


def test_a_mask_without_all_tasks_is_left_out_of_the_points():
    cells = [cell(task, mask=mask) for task in ("mrpc", "cola") for mask in (1, 2, 3)][:-1]
    tasks, points, left_out = statistic.mask_points(cells, [("mrpc", 0), ("cola", 0)])
    assert (tasks, len(points), left_out) == ([("mrpc", 0), ("cola", 0)], 2, 1)


def test_every_task_stands_with_its_largest_training_set():
    cells = [cell("mrpc", samples=n) for n in (0, 1000)] + [cell("sst2", samples=n) for n in (1000, 2000)]
    cells.append(cell("sst2", "full"))
    assert statistic.board(cells, 0.7).columns == (("sst2", 2000), ("mrpc", 0))


def test_the_order_of_methods_and_tasks():
    cells = [cell(task, method) for task in ("squad", "zzz", "rte", "mnli", "qnli")
             for method in ("random", "mine", "imp", "omp", "tamt-kd", "full", "tamt-mlm+kd", "tamt-mlm")]  # fmt: skip
    board = statistic.board(cells, 0.7)
    assert board.methods == ("full", "tamt-mlm+kd", "tamt-mlm", "tamt-kd", "imp", "omp", "random", "mine")
    assert [task for task, _ in board.columns] == ["mnli", "rte", "squad", "qnli", "zzz"]
