import os

import matplotlib.image
import numpy
import pytest

from finemask_ds.report.heatmap import heatmap, save_png, to_pixels

GRID = numpy.array([[0.1, numpy.nan], [0.0, 0.00004]])


def draw(grid=GRID):
    return heatmap(grid, ["-", "0"], ["Emb", "Q"], "title", "distance")


def test_every_number_stands_in_its_cell_and_a_missing_one_is_empty():
    texts = {text.get_position(): text.get_text() for text in draw().axes[0].texts}
    assert texts == {(0, 0): "0.100", (0, 1): "0", (1, 1): "4e-05"}


def test_axes_are_labelled_and_the_scale_is_round():
    axes, bar = draw().axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Emb", "Q"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["-", "0"]
    assert bar.get_ylabel() == "distance"
    for largest, top in ((0.1, 0.1), (0.11, 0.2), (0.31, 0.4), (1.0, 1.0), (0.0, 1.0)):
        assert draw(numpy.full((2, 2), largest)).axes[0].images[0].get_clim() == (0, pytest.approx(top))


def test_a_grid_without_any_value_is_drawn():
    assert to_pixels(draw(numpy.full((2, 2), numpy.nan))).size


def test_the_png_holds_the_same_pixels_and_nothing_is_left_beside_it(tmp_path):
    save_png(draw(), tmp_path / "map.png")
    read = matplotlib.image.imread(tmp_path / "map.png")[:, :, :3]
    pixels = to_pixels(draw())
    assert pixels.dtype == numpy.uint8
    numpy.testing.assert_array_equal((read * 255).round().astype(numpy.uint8), pixels)
    assert os.listdir(tmp_path) == ["map.png"]


def test_a_grid_that_does_not_fit_its_labels_is_refused():
    with pytest.raises(ValueError, match="2 rows and 2 columns"):
        draw(numpy.zeros((2, 3)))
