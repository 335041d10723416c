import itertools

import numpy
import pytest
import torch

from finemask_ds.engine.metrics import Destination, Recorder
from finemask_ds.report.heatmap import distance_map
from finemask_ds.search.watch import SAMPLE, MaskWatch, sample

PLACES = {
    "emb": ("Emb", None),
    "q0": ("Q", 0),
    "k0": ("K", 0),
    "q11": ("Q", 11),
}
SHAPES = {"emb": (40, 6), "q0": (8, 8), "k0": (8, 8), "q11": (8, 8)}


class Kept(Destination):
    def __init__(self):
        self.images, self.histograms = {}, {}

    def image(self, step, name, pixels):
        self.images[name] = pixels

    def histogram(self, step, name, values):
        self.histograms[name] = values


def random_mask(seed, density=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}


def observed(watch, mask, **options):
    kept = Kept()
    recorder = Recorder([kept])
    watch.observe(recorder, mask, **options)
    return recorder.flush(1), kept


def joined(mask, names):
    return numpy.concatenate([mask[name].numpy().ravel() for name in names])


def plain_distance(a, b):
    a, b = set(numpy.flatnonzero(a)), set(numpy.flatnonzero(b))
    return 1 - len(a & b) / len(a | b)


GROUPS = {
    "Emb": ["emb"],
    "Q": ["q0", "q11"],
    "K": ["k0"],
    "layer_00": ["q0", "k0"],
    "layer_11": ["q11"],
    "total": ["emb", "q0", "k0", "q11"],
}


def test_numbers_equal_those_of_plain_sets():
    masks = [random_mask(seed, 0.3 + seed / 10) for seed in range(3)]
    watch = MaskWatch(PLACES, masks[0], masks[0])
    for before, now in itertools.pairwise(masks):
        values, _ = observed(watch, now)
        assert values.keys() == {f"mask/{what}/{g}" for what in ("sparsity", "flips", "distance") for g in GROUPS}
        for group, names in GROUPS.items():
            new, old, start = (joined(mask, names) for mask in (now, before, masks[0]))
            assert values[f"mask/sparsity/{group}"] == pytest.approx(1 - new.mean(), abs=1e-15)
            assert values[f"mask/flips/{group}"] == (new != old).mean()
            assert values[f"mask/distance/{group}"] == plain_distance(new, start)


def test_a_mask_that_is_edited_in_place_is_still_seen_to_flip():
    live = random_mask(0)
    watch = MaskWatch(PLACES, live, live)
    live["k0"].logical_not_()
    values, _ = observed(watch, live)
    assert values["mask/flips/K"] == 1
    assert values["mask/distance/K"] == 1
    assert values["mask/flips/Q"] == values["mask/distance/Q"] == 0
    assert observed(watch, live)[0]["mask/flips/total"] == 0
    assert torch.equal(live["k0"], ~random_mask(0)["k0"])


def test_a_resumed_watch_goes_on_where_the_other_stopped():
    start, middle, end = (random_mask(seed) for seed in range(3))
    watch = MaskWatch(PLACES, start, start)
    observed(watch, middle)
    assert observed(MaskWatch(PLACES, start, middle), end)[0] == observed(watch, end)[0]


def test_a_watch_that_does_not_know_the_mask_before_tells_no_flips_at_first():
    start, middle, end = (random_mask(seed) for seed in range(3))
    watch, other = MaskWatch(PLACES, start, None), MaskWatch(PLACES, start, start)
    known, unknown = observed(other, middle)[0], observed(watch, middle)[0]
    assert unknown == {name: value for name, value in known.items() if "/flips/" not in name} != known
    assert observed(watch, end)[0] == observed(other, end)[0]


def test_two_empty_masks_are_at_distance_0():
    empty = random_mask(0, density=0.0)
    values, _ = observed(MaskWatch(PLACES, empty, empty), empty)
    assert values["mask/distance/total"] == 0
    assert values["mask/sparsity/total"] == 1


def test_the_heat_map_gets_the_distance_of_each_matrix_and_nan_elsewhere():
    start, now = random_mask(0), random_mask(1)
    seen = []

    def draw(*arguments):
        seen.append(arguments)
        return distance_map(*arguments)

    _, kept = observed(MaskWatch(PLACES, start, start, draw), now)
    (grid, rows, columns) = seen[0]
    assert (rows, columns) == (["-", "0", "11"], ["Emb", "Q", "K"])
    flat = {name: plain_distance(joined(start, [name]), joined(now, [name])) for name in start}
    nan = numpy.nan
    table = [[flat["emb"], nan, nan], [nan, flat["q0"], flat["k0"]], [nan, flat["q11"], nan]]
    numpy.testing.assert_array_equal(grid, table)
    pixels = kept.images["mask/distance_map"]
    assert pixels.dtype == numpy.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


def test_margins_are_scores_minus_the_threshold_of_their_matrix():
    scores = {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}
    thresholds = {"emb": 0.25, "q0": 0.5, "q11": 1.0}
    _, kept = observed(
        MaskWatch(PLACES, random_mask(0), random_mask(0)), random_mask(0), scores=scores, thresholds=thresholds
    )
    assert {name: sorted(set(values.tolist())) for name, values in kept.histograms.items()} == {
        "mask/margin/Emb": [0.25],
        "mask/margin/Q": [-0.5, 0.0],
        "mask/margin/K": [0.5],
    }


def test_a_sample_is_small_repeatable_and_looks_at_every_column():
    rows, columns = 3072, 768
    picked = sample(torch.arange(rows * columns).view(rows, columns))
    assert SAMPLE / 2 < len(picked) <= SAMPLE
    assert len(set((picked % columns).tolist())) == columns
    small = torch.arange(12.0).view(3, 4)
    assert torch.equal(sample(small), small.flatten())


def test_ranks_that_write_nothing_do_nothing():
    recorder = Recorder()
    MaskWatch(PLACES, random_mask(0), random_mask(0)).observe(recorder, random_mask(1))
    assert recorder.flush(1) == {}


def test_what_is_no_mask_of_this_model_is_refused():
    watch = MaskWatch(PLACES, random_mask(0), random_mask(0))
    with pytest.raises(TypeError, match="bool"):
        observed(watch, random_mask(0) | {"q0": torch.ones(8, 8)})
    with pytest.raises(ValueError, match="shape"):
        observed(watch, random_mask(0) | {"q0": torch.ones(8, 4, dtype=torch.bool)})
