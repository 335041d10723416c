"""`finemask mask import` and `export` with the masks of others, on a real toy BERT."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune
from transformers import AutoModel, AutoModelForMaskedLM, BertForMaskedLM

from finemask_ds.cli import main
from finemask_ds.masks.files import load_mask, save_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.models.export import apply_mask
from finemask_ds.models.load import add_pooler, load_pretrained, save_pretrained
from tests.test_cli import cells
from tests.toys import write_bert

POOLER = "bert.pooler.dense.weight"
EMBEDDING = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def masks(toy_bert: Path) -> dict[str, Mask]:
    """A random mask of each choice of matrices: the paper's, TAMT's code's, BERT-Tickets'."""
    names = ("paper", "authors", "bert-tickets")
    return {name: Mask.random(load_pretrained(str(toy_bert), targets=name).shapes, 0.7, seed=5) for name in names}


def shuffled(mask: Mask, ending: str = "", dtype: torch.dtype = torch.bool) -> dict[str, Tensor]:
    names = list(mask)
    random.Random(1).shuffle(names)
    return {name + ending: mask[name].to(dtype) for name in names}


def finemask(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def table(output: str) -> str:
    """The lines from the table's header to the fingerprint."""
    start, end = output.index("matrix  "), output.index("fingerprint: ")
    return output[start : output.index("\n", end)]


def test_a_mask_of_bert_tickets_is_imported_as_it_is_and_its_absent_embedding_is_dense(
    toy_bert, masks, tmp_path, capsys
):
    mask, source, out = masks["bert-tickets"], tmp_path / "mask.pt", tmp_path / "mask.safetensors"
    torch.save(shuffled(mask, "_mask", torch.float32), source)
    assert finemask("mask", "import", source, out, "--model", toy_bert) == 0
    output = capsys.readouterr().out
    assert load_mask(out) == mask
    assert list(load_mask(out)) == list(mask)  # the model's order
    theta0 = load_pretrained(str(toy_bert), targets="bert-tickets")
    provenance = load_mask(out).provenance
    assert provenance.pop("finemask_ds")
    assert provenance == {
        "model": str(toy_bert),
        "model_sha256": theta0.digest(),
        "method": "imported",
        "format": "BERT-Tickets or TAMT's OMP (float32 X.weight_mask)",
        "source": "mask.pt",
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }
    assert output.splitlines()[0] == "read as BERT-Tickets or TAMT's OMP (float32 X.weight_mask): 13 matrices"
    assert f"dense (not in the file): {EMBEDDING}\n" in output
    everything = mask.num_weights() + masks["paper"].num_weights(EMBEDDING)
    pruned = mask.num_weights() - mask.num_kept()
    assert f"sparsity over the 13 matrices of the file: {mask.sparsity():.6f}\n" in output
    assert f"sparsity over all 14 prunable matrices of the model: {pruned / everything:.6f}\n" in output
    assert cells(output, "total")[0] == "13"
    assert finemask("mask", "show", out) == 0
    assert table(output) == table(capsys.readouterr().out)


def test_a_mask_of_tamts_code_is_over_all_matrices(toy_bert, masks, tmp_path, capsys):
    torch.save(shuffled(masks["authors"]), tmp_path / "mask.pt", _use_new_zipfile_serialization=False)
    assert finemask("mask", "import", tmp_path / "mask.pt", tmp_path / "out", "--model", toy_bert) == 0
    output = capsys.readouterr().out
    assert load_mask(tmp_path / "out") == masks["authors"]
    assert output.startswith("read as TAMT (bool X.weight): 14 matrices\n")
    assert "dense (" not in output
    for label in ("the 14 matrices of the file", "all 14 prunable matrices of the model"):
        assert f"sparsity over {label}: {masks['authors'].sparsity():.6f}\n" in output


def test_the_papers_matrices_and_few_of_them_leave_the_rest_dense(toy_bert, masks, tmp_path, capsys):
    torch.save(shuffled(masks["paper"], "_mask"), tmp_path / "mask.pt")
    assert finemask("mask", "import", tmp_path / "mask.pt", tmp_path / "out", "--model", toy_bert) == 0
    assert f"dense (not in the file): {POOLER}\n" in capsys.readouterr().out
    assert load_mask(tmp_path / "out").provenance["model_sha256"] == load_pretrained(str(toy_bert)).digest()
    torch.save({POOLER: masks["authors"][POOLER].int()}, tmp_path / "one.pth")
    assert finemask("mask", "import", tmp_path / "one.pth", tmp_path / "one", "--model", toy_bert) == 0
    output = capsys.readouterr().out
    assert "read as open_lth (int32 X.weight): 1 matrices\n" in output
    assert f"dense (not in the file): {EMBEDDING}, " in output
    assert " and 10 more\n" in output


def test_a_model_without_a_pooler_takes_packed_bits(toy_roberta, tmp_path, capsys):
    mask = Mask.random(load_pretrained(str(toy_roberta)).shapes, 0.4, seed=0)
    bits = {f"{name}.mask": numpy.packbits(keep.numpy()) for name, keep in shuffled(mask).items()}
    numpy.savez_compressed(tmp_path / "m.npz", **bits)
    assert finemask("mask", "import", tmp_path / "m.npz", tmp_path / "out", "--model", toy_roberta) == 0
    assert load_mask(tmp_path / "out") == mask
    assert "sparsity over all 13 prunable matrices of the model" in capsys.readouterr().out


def test_a_model_under_torch_prune_is_imported(toy_bert, tmp_path, capsys):
    model = BertForMaskedLM.from_pretrained(toy_bert)
    modules = {
        name: module for name, module in model.bert.named_modules() if name.endswith(("query", "word_embeddings"))
    }
    for module in modules.values():
        prune.l1_unstructured(module, "weight", amount=0.7)
    torch.save(model.state_dict(), tmp_path / "model.bin")
    assert finemask("mask", "import", tmp_path / "model.bin", tmp_path / "out", "--model", toy_bert) == 0
    output = capsys.readouterr().out
    expected = {f"bert.{name}.weight": module.weight_mask.bool() for name, module in modules.items()}
    assert load_mask(tmp_path / "out") == Mask(expected)
    others = len(model.state_dict()) - 2 * len(expected)
    assert "\nweights folded: X.weight_orig * X.weight_mask; only the masks are read" in output
    assert f"\n{others} other entries ignored: " in output


def test_a_bare_encoder_under_torch_prune_is_imported(toy_bert, tmp_path):
    model = AutoModel.from_pretrained(toy_bert)
    prune.l1_unstructured(model.encoder.layer[1].output.dense, "weight", amount=0.7)
    torch.save(model.state_dict(), tmp_path / "model.bin")
    assert finemask("mask", "import", tmp_path / "model.bin", tmp_path / "out", "--model", toy_bert) == 0
    expected = {"bert.encoder.layer.1.output.dense.weight": model.encoder.layer[1].output.dense.weight_mask.bool()}
    assert load_mask(tmp_path / "out") == Mask(expected)


@pytest.mark.parametrize("form", ["checkpoint", "tamt", "prune"])
def test_another_model_of_the_same_shapes_is_refused_by_its_weights(toy_bert, masks, tmp_path, capsys, form):
    told = {"model": "theirs", "model_sha256": load_pretrained(str(toy_bert)).digest()}
    save_mask(tmp_path / "ours", masks["paper"].with_provenance(told))
    command = ("mask", "export", tmp_path / "ours", "--out", tmp_path / "out", "--format", form)
    assert finemask(*command, "--model", write_bert(tmp_path / "other", seed=1)) == 2
    assert re.search(
        rf"ours is a mask for theirs \(weights {told['model_sha256'][:12]}\), not for .*other \(weights",
        capsys.readouterr().err,
    )
    assert not (tmp_path / "out").exists()
    assert finemask(*command, "--model", toy_bert) == 0


def test_an_exported_checkpoint_drops_out_as_its_model_does(toy_bert, masks, tmp_path):
    """Not as searches do: who trains it further trains theta_0's configuration."""
    model, out = shutil.copytree(toy_bert, tmp_path / "model"), tmp_path / "out"
    config = json.loads((model / "config.json").read_text())
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.3}
    (model / "config.json").write_text(json.dumps({**config, **dropout}))
    save_mask(tmp_path / "ours", masks["paper"])
    assert finemask("mask", "export", tmp_path / "ours", "--model", model, "--out", out) == 0
    exported = json.loads((out / "config.json").read_text())
    assert {name: exported[name] for name in dropout} == dropout


@pytest.mark.parametrize("form", ["tamt", "prune"])
@pytest.mark.parametrize("targets", ["paper", "authors", "bert-tickets"])
def test_what_is_exported_comes_back_equal(toy_bert, masks, tmp_path, capsys, form, targets):
    mask, file, back = masks[targets], tmp_path / "mask.pt", tmp_path / "back.safetensors"
    save_mask(tmp_path / "ours", mask)
    command = ("mask", "export", tmp_path / "ours", "--model", toy_bert, "--out", file, "--format", form)
    assert finemask(*command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(file)
    assert finemask("mask", "import", file, back, "--model", toy_bert) == 0
    # TAMT's code asks for every matrix that it can prune.
    expected = Mask({**Mask.full_like(masks["authors"].shapes), **mask}) if form == "tamt" else mask
    assert load_mask(back) == expected
    assert list(load_mask(back)) == list(expected)
    whole = file.read_bytes()
    assert finemask(*command) == 2
    assert f"{file} exists and is not written over; type another --out" in capsys.readouterr().err
    assert file.read_bytes() == whole


@pytest.mark.parametrize("targets", ["paper", "bert-tickets"])
def test_a_model_under_torch_prune_loads_the_export_strictly_and_is_the_subnetwork(toy_bert, masks, tmp_path, targets):
    mask, file = masks[targets], tmp_path / "model.pt"
    save_mask(tmp_path / "ours", mask)
    assert finemask("mask", "export", tmp_path / "ours", "--model", toy_bert, "--out", file, "--format", "prune") == 0
    model = AutoModelForMaskedLM.from_pretrained(toy_bert)
    if targets == "bert-tickets":
        add_pooler(model, str(toy_bert))
    for number, name in enumerate(mask):
        module = model.get_submodule(name.removesuffix(".weight"))
        if number % 2:
            prune.identity(module, "weight")
        else:
            prune.custom_from_mask(module, "weight", torch.zeros(module.weight.shape))
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)
    subnetwork = load_pretrained(str(toy_bert), targets=targets)
    apply_mask(subnetwork.model, mask)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, subnetwork.model(tokens).logits)
        hidden = model.bert(tokens)
        assert torch.equal(hidden.last_hidden_state, subnetwork.model.bert(tokens).last_hidden_state)
        if targets == "bert-tickets":
            assert torch.equal(hidden.pooler_output, subnetwork.model.bert(tokens).pooler_output)


def test_a_pruned_models_zeros_are_its_mask(toy_bert, masks, tmp_path, capsys):
    """The embedding is left dense; a row that theta_0 has zero anyway says nothing of a mask."""
    theta0 = load_pretrained(str(toy_bert))
    mask = Mask({name: keep for name, keep in masks["paper"].items() if name != EMBEDDING})
    weights = dict(theta0.model.named_parameters())
    apply_mask(theta0.model, mask)
    with torch.no_grad():
        for name, keep in mask.items():
            weights[name][keep] += 0.25  # It was trained on.
    save_pretrained(theta0, tmp_path / "pruned")
    out = tmp_path / "mask.safetensors"
    assert finemask("mask", "import", tmp_path / "pruned", out, "--model", toy_bert, "--from_zeros") == 0
    assert load_mask(out) == mask
    assert f"dense (not in the file): {EMBEDDING}, {POOLER}\n" in capsys.readouterr().out
    again = finemask("mask", "import", toy_bert, tmp_path / "none", "--model", toy_bert, "--from_zeros")
    assert again == 2
    assert "has no zeros that the model has not" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_mask_of_another_model_is_refused_both_ways(toy_bert, masks, tmp_path, capsys):
    wrong = {
        **dict(masks["paper"]),
        POOLER: torch.ones(3, 3, dtype=torch.bool),
        "classifier.weight": torch.eye(2).bool(),
    }
    torch.save(wrong, tmp_path / "mask.pt")
    assert finemask("mask", "import", tmp_path / "mask.pt", tmp_path / "out", "--model", toy_bert) == 2
    sentence = capsys.readouterr().err
    assert "has what the prunable part of the model has not, classifier.weight" in sentence
    assert f"{POOLER} (3 x 3, there 32 x 32)" in sentence
    assert sentence.count("\n") == 1
    save_mask(tmp_path / "ours", Mask(wrong))
    for form in ("tamt", "prune", "checkpoint"):
        command = ("mask", "export", tmp_path / "ours", "--model", toy_bert, "--out", tmp_path / "out")
        assert finemask(*command, "--format", form) == 2
        assert "has what the model has not, classifier.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_and_refusals_are_one_sentence(toy_bert, masks, tmp_path, capsys):
    torch.save(shuffled(masks["paper"]), tmp_path / "mask.pt")
    (tmp_path / "out").write_text("mine")
    assert finemask("mask", "import", tmp_path / "mask.pt", tmp_path / "out", "--model", toy_bert) == 2
    assert "out exists and is not written over; type another OUT" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    assert finemask("mask", "import", tmp_path / "model.pt", tmp_path / "new", "--model", toy_bert) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(
        f"finemask: {tmp_path / 'model.pt'} is a pickle that would run torch.nn.modules.linear"
    )
    assert output.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert finemask("mask", "export", "F", "--model", "m", "--out", "o", "--format", "onnx") == 2
    assert "choose from 'checkpoint', 'tamt', 'prune'" in capsys.readouterr().err
