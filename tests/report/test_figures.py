"""Each figure has labelled axes and draws every point, read back from its artists."""

import numpy
import pytest

from finemask_ds.masks.files import load_mask
from finemask_ds.report import figures, maskfigures
from finemask_ds.report import scores as statistic
from finemask_ds.report.collect import collect
from finemask_ds.report.style import looks, to_svg
from tests.report.fakes import Fakes, small


@pytest.fixture(scope="module")
def cells(holes):
    return collect([holes]).cells


def panels(drawing):
    """Axes by title; all have labels."""
    found = drawing.figure.axes
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in found)
    assert drawing.caption
    return found


def points(axes):
    """Marked points of a panel by colour, NaN left out."""
    found = {}
    for line in axes.lines:
        if line.get_marker() not in ("", "None", None, "_", "|"):
            pairs = [(float(x), float(y)) for x, y in line.get_xydata() if numpy.isfinite(y)]
            found.setdefault(line.get_color(), []).extend(pairs)
    return {colour: sorted(pairs) for colour, pairs in found.items() if pairs}


def close(found, expected):
    assert found.keys() == expected.keys()
    for colour, pairs in expected.items():
        numpy.testing.assert_allclose(found[colour], sorted(pairs), rtol=1e-12)


def test_score_against_sparsity(cells):
    drawing = figures.against_sparsity(cells)
    chosen, boards = looks(cells), [statistic.board(cells, s) for s in (0.5, 0.7)]
    drawn = panels(drawing)
    assert [axes.get_title() for axes in drawn] == ["CoLA", "STS-B", "MRPC", "SQuAD", "average"]
    for axes, column in zip(drawn, boards[0].columns, strict=False):
        expected = {}
        for board in boards:
            for method in board.methods[1:]:
                mean = board.scores[method, column].mean
                if mean is not None:
                    expected.setdefault(chosen[method].colour, []).append((100 * board.sparsity, 100 * mean))
        close(points(axes), expected)
        (level,) = [line for line in axes.lines if line.get_marker() == "None"]
        assert set(level.get_ydata()) == {100 * boards[0].scores["full", column].mean}
    assert "CoLA, STS-B, MRPC, which" in drawing.caption


def test_the_gap_of_missing_cells_is_not_bridged(cells):
    squad = panels(figures.against_sparsity(cells))[3]
    colour = looks(cells)["omp"].colour
    (omp,) = [line for line in squad.lines if line.get_color() == colour and line.get_linestyle() != "None"]
    assert numpy.isnan(omp.get_ydata()).tolist() == [False, True]


def test_a_point_without_neighbours_has_an_error_bar(cells):
    """OMP's on SQuAD, whose cells at 70 % are missing; no other."""
    drawn = panels(figures.against_sparsity(cells))
    assert [len(axes.containers) for axes in drawn] == [0, 0, 0, 1, 0]
    _, _, (bars,) = drawn[3].containers[0]
    score = statistic.board(cells, 0.5).scores["omp", ("squad", 0)]
    ((_, low), (_, high)) = bars.get_segments()[0]
    assert (low, high) == pytest.approx((100 * (score.mean - score.sd), 100 * (score.mean + score.sd)))


def test_the_full_model_is_drawn_where_the_smallest_sparsity_lacks_the_task(tmp_path):
    fakes = Fakes(tmp_path)
    for task, sparsities in {"mrpc": (0.5, 0.7), "cola": (0.7,)}.items():
        fakes.cell(task, score=0.9)
        for sparsity in sparsities:
            path = fakes.search("omp", sparsity, 1)[0]
            fakes.cell(task, path, method="omp", sparsity=sparsity, mask_seed=1, steps=0)
    for axes in panels(figures.against_sparsity(collect([tmp_path]).cells)):
        (level,) = [line for line in axes.lines if line.get_linestyle() == "--" and line.get_marker() == "None"]
        assert set(level.get_ydata()) == {90.0}


def test_bands_are_one_standard_deviation(cells):
    cola = panels(figures.against_sparsity(cells))[0]
    drawn = [band.get_datalim(cola.transData).extents for band in cola.collections]
    for method, (_, low, _, high) in zip(("tamt-kd", "imp", "omp", "random"), drawn, strict=True):
        found = [statistic.board(cells, s).scores[method, ("cola", 0)] for s in (0.5, 0.7)]
        assert low == pytest.approx(100 * min(s.mean - s.sd for s in found), abs=1e-9)
        assert high == pytest.approx(100 * max(s.mean + s.sd for s in found), abs=1e-9)


def test_one_sparsity_is_drawn_as_points(tmp_path):
    small(tmp_path)
    cells = collect([tmp_path]).cells
    drawing = figures.against_sparsity(cells)
    (axes,) = panels(drawing)
    board = statistic.board(cells, 0.7)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["CoLA", "MRPC", "average"]
    found = points(axes)
    for method in board.methods:
        heights = [y for _, y in found[looks(cells)[method].colour]]
        means = [board.scores[method, column].mean for column in board.columns] + [board.averages[method].mean]
        assert heights == pytest.approx([100 * mean for mean in means], abs=1e-12)


def expected_of_masks(cells, sparsity, number):
    here = [cell for cell in cells if cell.sparsity == sparsity]
    _, found, _ = statistic.mask_points(here, statistic.main_columns(cells, sparsity))
    expected = {}
    for point in found:
        x = number(point.cell)
        expected.setdefault(looks(cells)[point.cell.method].colour, []).append((x, 100 * point.mean))
    return found, expected


def test_score_against_loss_has_a_point_per_mask(cells):
    drawn = iter(panels(maskfigures.against_loss(cells)))
    for sparsity in (0.5, 0.7):
        for name in ("mlm_loss", "kd_loss"):
            found, expected = expected_of_masks(cells, sparsity, lambda cell, name=name: getattr(cell.origin, name))
            axes = next(drawn)
            close(points(axes), expected)
            assert f"n = {len(found)}" in axes.get_title()
            assert f"{100 * sparsity:g} %" in axes.get_title()
            assert "rho = -" in axes.get_title()
    steps = {cell.search_steps for cell in cells if cell.method == "tamt-kd" and cell.sparsity == 0.7}
    assert steps == {50, 100, 150, 200}


def test_score_against_cost(cells):
    drawn = panels(maskfigures.against_cost(cells))
    assert [axes.get_xlabel() for axes in drawn] == ["steps of the search", "seconds of the search"] * 2
    for axes, seconds_of_a_step in zip(drawn[2:], (1, 0.13), strict=True):
        found, _ = expected_of_masks(cells, 0.7, lambda cell: cell.search_steps)
        expected = {}
        for method, budgets in (("tamt-kd", (50, 100, 150, 200)), ("imp", (100, 150, 200))):
            for steps in budgets:
                means = [p.mean for p in found if (p.cell.method, p.cell.search_steps) == (method, steps)]
                pair = (steps * seconds_of_a_step, 100 * numpy.mean(means))
                expected.setdefault(looks(cells)[method].colour, []).append(pair)
        close(points(axes), expected)
        levels = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "None"]
        random = 100 * numpy.mean([p.mean for p in found if p.cell.method == "random"])
        assert levels == [pytest.approx(random)]


def test_score_against_distance(cells):
    for axes, sparsity in zip(panels(maskfigures.against_distance(cells)), (0.5, 0.7), strict=True):
        close(points(axes), expected_of_masks(cells, sparsity, lambda cell: cell.origin.distance_from_omp)[1])


def test_similarity_is_the_mean_over_matrices(cells):
    axes, _ = maskfigures.similarity(cells, 0.7).figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{m} {n}" for m in ("tamt-kd", "imp") for n in (1, 2, 3)] + ["omp"] + [
        f"random {n}" for n in (1, 2, 3)]  # fmt: skip
    final = {(c.method, c.mask_seed): c.mask for c in statistic.final(cells) if c.sparsity == 0.7}
    one, two = load_mask(final["tamt-kd", 2]), load_mask(final["random", 3])
    grid = axes.images[0].get_array()
    assert grid[1, 9] == grid[9, 1] == pytest.approx(one.mean_jaccard(two))
    assert numpy.diag(grid).tolist() == [1.0] * 10


def test_scarcity_draws_every_size_at_its_number_of_rows(cells):
    (axes,) = panels(figures.scarcity(cells, 0.7))
    assert (axes.get_title(), axes.get_xscale()) == ("CoLA", "log")
    expected = {}
    for score in statistic.scores(statistic.final(cells)):
        if score.task == "cola" and score.sparsity in (0.0, 0.7):
            pair = (score.num_samples or 8551, 100 * score.mean)
            expected.setdefault(looks(cells)[score.method].colour, []).append(pair)
    close(points(axes), expected)


def test_learning_curves_are_means_at_each_step(cells):
    axes = panels(figures.learning_curves(cells, 0.7))[0]
    group = [c for c in statistic.final(cells) if c.method == "imp" and c.task == "cola" and c.sparsity == 0.7]
    group = [c for c in group if not c.num_samples]
    expected = [(p["step"], 100 * numpy.mean([c.curve[i]["metrics"]["matthews"] for c in group]))
                for i, p in enumerate(group[0].curve)]  # fmt: skip
    numpy.testing.assert_allclose(points(axes)[looks(cells)["imp"].colour], expected, rtol=1e-12)


def test_what_there_are_no_data_for_is_told(tmp_path):
    fakes = Fakes(tmp_path)
    fakes.cell("mrpc", curve=[])
    drawings = list(figures.draw_all(collect([tmp_path]).cells))
    assert [drawing.name for drawing in drawings if drawing.figure] == ["score-by-task"]
    left_out = {drawing.name: drawing.caption for drawing in drawings if not drawing.figure}
    assert {"score-against-loss", "score-against-cost", "score-against-distance", "scarcity-0", "curves-0"} == set(
        left_out
    )
    assert all(sentence.startswith("Needs") for sentence in left_out.values())


def test_known_methods_look_the_same_in_every_report_and_no_two_alike(cells, tmp_path):
    small(tmp_path)
    few, many = looks(collect([tmp_path]).cells), looks(cells)
    assert all(few[method] == many[method] for method in few.keys() & many.keys())
    for part in ("colour", "marker"):
        assert len({getattr(look, part) for look in many.values()}) == len(many)


def test_many_methods_of_others_look_different(tmp_path):
    fakes = Fakes(tmp_path)
    path = next(iter(fakes.search("x", 0.7, 1).values()))
    for number in range(20):
        fakes.cell("mrpc", path, method=f"tamt-kd (phi {number})", sparsity=0.7, mask_fingerprint=str(number))
    found = looks(collect([tmp_path]).cells).values()
    assert len({(look.colour, look.marker) for look in found}) == len(found) == 20


def test_names_that_matplotlib_would_obey_are_drawn_as_they_are(tmp_path):
    fakes = Fakes(tmp_path)
    for method in ("_hidden", "$\\frac{"):
        path = next(iter(fakes.search("x" + method[:1], 0.7, 1).values()))
        fakes.cell("mrpc", path, method=method, sparsity=0.7)
    svg = to_svg(figures.against_sparsity(collect([tmp_path]).cells).figure, "name")
    assert "$\\frac{</text>" in svg
    assert "_hidden</text>" in svg
