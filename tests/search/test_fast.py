"""What makes steps fast changes no bit of what is found: a search with it, without it, and with the kernels."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from finemask_ds.config import TamtConfig
from finemask_ds.engine.world import this_process
from finemask_ds.masks.files import load_mask
from finemask_ds.run import Run
from tests.search import jobs


def config(folder: Path, model: Path, text: Path, **more: object) -> TamtConfig:
    """Steps so large that scores cross the threshold all along."""
    return jobs.tamt(folder, model, text, **{"steps": 8, "mask_lr": 1e-2, "eval_every": 4, **more})  # type: ignore[arg-type]


def assert_equal_bits(one: TamtConfig, other: TamtConfig) -> None:
    assert load_mask(Run(Path(one.run)).mask) == load_mask(Run(Path(other.run)).mask)
    assert jobs.losses(one) == jobs.losses(other)


@pytest.mark.parametrize("init", ["binary", pytest.param("ranked", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_search_is_that_of_the_plain_path(
    toy_bert: Path, toy_text: Path, tmp_path: Path, scope: str, init: str
) -> None:
    fast, plain = (config(tmp_path / way, toy_bert, toy_text, scope=scope, init=init) for way in ("fast", "plain"))
    jobs.found(this_process(), fast)
    jobs.found_plainly(this_process(), plain)
    assert_equal_bits(fast, plain)


@pytest.mark.slow
def test_a_search_by_the_kernels_is_that_of_the_plain_path(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    fast, plain = (config(tmp_path / way, toy_bert, toy_text, steps=4) for way in ("fast", "plain"))
    with (
        mock.patch("finemask_ds.search.selection.has_kernels", return_value=True),
        mock.patch("finemask_ds.masks.binarize.has_kernels", return_value=True),
    ):
        jobs.found(this_process(), fast)
    jobs.found_plainly(this_process(), plain)
    assert_equal_bits(fast, plain)
