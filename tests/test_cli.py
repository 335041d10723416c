"""The `finemask` command as a user types it: a real process, its output and exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finemask_ds.cli import main
from finemask_ds.masks.files import load_mask, save_mask
from finemask_ds.masks.mask import Mask

SHAPES = {"emb.weight": (30, 8), "layer.0.q.weight": (8, 8), "layer.1.q.weight": (8, 8)}


def finemask(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finemask_ds", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    names = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(names):
        save_mask(path, Mask.random(SHAPES, 0.7, seed).with_provenance({"method": "random", "seed": seed}))
    return names


def cells(output: str, label: str) -> list[str]:
    """The words of the one line that starts with the label."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"{label}  ")]
    return line.removeprefix(label).split()


def test_show(paths):
    process = finemask("mask", "show", paths[0])
    assert (process.returncode, process.stderr) == (0, "")
    assert cells(process.stdout, "emb.weight") == ["30", "x", "8", "240", "72", "0.700000"]
    assert cells(process.stdout, "layer.1.q.weight") == ["8", "x", "8", "64", "19", "0.703125"]
    assert cells(process.stdout, "layer.*.q.weight") == ["2", "matrices", "128", "38", "0.703125"]
    assert cells(process.stdout, "total") == ["3", "matrices", "368", "110", "0.701087"]
    assert "method: random\nseed: 0\n" in process.stdout


def test_a_run_directory_stands_for_its_mask(paths, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mask.safetensors").write_bytes(paths[0].read_bytes())
    assert main(["mask", "show", str(paths[0])]) == 0
    expected = capsys.readouterr().out
    assert main(["mask", "show", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == expected


def test_compare_two(paths, capsys):
    assert main(["mask", "compare", str(paths[0]), str(paths[1])]) == 0
    output = capsys.readouterr().out
    one, two = (Mask.random(SHAPES, 0.7, seed) for seed in range(2))
    for name in SHAPES:
        assert cells(output, name) == [f"{one.jaccard(two, name):.6f}", f"{one.distance(two, name):.6f}"]
    assert cells(output, "all weights together") == [f"{one.jaccard(two):.6f}", f"{one.distance(two):.6f}"]
    assert cells(output, "mean of the matrices")[0] == f"{one.mean_jaccard(two):.6f}"


def test_compare_many(paths, capsys):
    assert main(["mask", "compare", *map(str, paths)]) == 0
    similarity, distance = capsys.readouterr().out.strip().split("\n\n")
    masks = [Mask.random(SHAPES, 0.7, seed) for seed in range(3)]
    for number, (path, one) in enumerate(zip(paths, masks, strict=True), 1):
        label = f"{number} {path}"
        assert cells(similarity, label) == [f"{one.jaccard(two):.6f}" for two in masks]
        assert cells(distance, label) == [f"{one.distance(two):.6f}" for two in masks]


def test_masks_of_different_models_are_not_compared(paths, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    save_mask(other, Mask.full_like({"emb.weight": (8, 30)}))
    assert main(["mask", "compare", str(paths[0]), str(other)]) == 2
    sentence = capsys.readouterr().err
    assert f"{other} and {paths[0]} are masks of different models" in sentence
    assert "(emb.weight is 30 x 8 and 8 x 30)" in sentence


def test_masks_of_other_matrices_of_one_model_are_compared_where_both_have_them(paths, tmp_path, capsys):
    one, more = load_mask(paths[0]), tmp_path / "more.safetensors"
    two = Mask.random(SHAPES, 0.5, seed=9)
    save_mask(more, Mask({**two, "pooler.weight": torch.ones(3, 3, dtype=torch.bool)}))
    assert main(["mask", "compare", str(paths[0]), str(more)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("left out, as not all of them have it: pooler.weight\n")
    assert cells(output, "all weights together") == [f"{one.jaccard(two):.6f}", f"{one.distance(two):.6f}"]
    assert main(["mask", "compare", str(paths[0]), str(paths[1]), str(more)]) == 0
    assert f"{one.distance(two):.6f}" in capsys.readouterr().out
    save_mask(tmp_path / "none", Mask.full_like({"pooler.weight": (3, 3)}))
    assert main(["mask", "compare", str(paths[0]), str(tmp_path / "none")]) == 2
    assert "masks of different models (they have no matrix in common)" in capsys.readouterr().err


def test_a_damaged_file_is_one_sentence_and_exit_code_2(paths):
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    process = finemask("mask", "show", paths[0])
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(f"finemask: the mask file {paths[0]} is damaged")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mask", "show", "FILE", "--sparsity"], "unknown option --sparsity; valid are --help"),
        (["mask", "export", "F", "--model", "m", "--out", "o", "--modle", "m"], "did you mean --model?"),
        (["mask", "shwo"], "choose from 'show', 'compare', 'import', 'export'"),
        (["mask"], "required: COMMAND"),
        (["msk"], "choose from 'mask'"),
        (["mask", "compare", "FILE"], "required: FILE"),
        (["worker", "runs/sweep", "--cores", "a,b"], "invalid cores value: 'a,b'"),
        (["worker", "runs/sweep", "--cores", "9999"], "--cores (9999,) cannot be had; this process has "),
        (
            ["recipe", "quickstart", "--tasks", "sentimnt"],
            "'sentimnt' is not built in; type some of acceptability, sent",
        ),
    ],
)
def test_mistyped_commands_name_what_could_be_typed(arguments, sentence, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("finemask: ")
    assert sentence in output.err


def test_a_reader_that_leaves_early_is_no_error(paths):
    command = (
        f"set -o pipefail; {sys.executable} -m finemask_ds mask show {paths[0]} | true"  # gone before the first line
    )
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.slow
def test_export_writes_exact_zeros(toy_bert, tmp_path):
    weights = load_file(toy_bert / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    mask = Mask.random({name: tuple(weights[name].shape)}, 0.7, seed=0)
    save_mask(tmp_path / "mask.safetensors", mask)
    out = tmp_path / "exported"
    process = finemask("mask", "export", tmp_path / "mask.safetensors", "--model", toy_bert, "--out", out)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == str(out)
    exported = load_file(out / "model.safetensors")
    assert torch.equal(exported[name], torch.where(mask[name], weights[name], 0.0))
    assert all(torch.equal(exported[other], weights[other]) for other in weights if other != name)
