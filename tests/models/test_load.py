"""Models: which matrices are prunable, what theta_0 is, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

import finemask_ds
from finemask_ds.errors import UserError
from finemask_ds.masks.files import save_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.models.downstream import load_downstream
from finemask_ds.models.export import export_checkpoint
from finemask_ds.models.families import LAYER_ROLES, head_parameters, prunable
from finemask_ds.models.load import load_pretrained, save_folder, save_pretrained
from finemask_ds.models.patch import attach


@pytest.mark.parametrize(("targets", "matrices"), [("paper", 73), ("authors", 74), ("bert-tickets", 73)])
def test_bert_base_has_the_papers_matrices(targets: str, matrices: int) -> None:
    """72 + 1 matrices in BERT-base; 74 in the authors' code; 73 in BERT-Tickets."""
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(BertConfig())
        from transformers.models.bert.modeling_bert import BertPooler

        model.bert.pooler = BertPooler(BertConfig())
    places = prunable(model, targets)
    assert len(places) == matrices
    assert [place.role for place in places.values() if place.layer == 7] == list(LAYER_ROLES)
    weights = dict(model.named_parameters())
    if targets == "authors":
        assert sum(weights[name].numel() for name in places) == 108_965_376


def test_the_order_is_that_of_named_parameters(toy_bert: Path) -> None:
    pretrained = load_pretrained(str(toy_bert), targets="authors")
    names = [name for name, _ in pretrained.model.named_parameters()]
    assert list(pretrained.places) == sorted(pretrained.places, key=names.index)


def test_a_pooler_comes_from_the_checkpoint(toy_bert: Path) -> None:
    pretrained = load_pretrained(str(toy_bert), targets="authors")
    expected = AutoModel.from_pretrained(toy_bert).pooler.dense.weight
    assert torch.equal(pretrained.targets["bert.pooler.dense.weight"], expected)


def test_targets_that_a_model_lacks_are_refused(toy_roberta: Path) -> None:
    with pytest.raises(UserError, match="wants pooler"):
        load_pretrained(str(toy_roberta), targets="authors")


def test_roberta_has_512_positions_of_514(toy_roberta: Path) -> None:
    assert load_pretrained(str(toy_roberta)).max_positions == 512


def test_a_checkpoint_without_a_head_is_known_and_its_draw_is_always_the_same(tmp_path: Path, toy_bert: Path) -> None:
    shutil.copytree(toy_bert, tmp_path / "headless")
    BertModel(BertConfig.from_pretrained(toy_bert)).save_pretrained(tmp_path / "headless")
    first = load_pretrained(str(tmp_path / "headless"))
    torch.manual_seed(123)
    second = load_pretrained(str(tmp_path / "headless"))
    assert not first.has_head
    assert load_pretrained(str(toy_bert)).has_head
    of_first, of_second = head_parameters(first.model), head_parameters(second.model)
    assert all(torch.equal(value, of_second[name]) for name, value in of_first.items())
    assert first.digest() == second.digest() != load_pretrained(str(toy_bert)).digest()


def test_weights_that_would_be_random_are_refused(tmp_path: Path, toy_bert: Path) -> None:
    """As when a layer is missing or a wrapper has put its name before every key; a head and a pooler may be drawn."""
    whole = load_file(toy_bert / "model.safetensors")
    layer = {name: value for name, value in whole.items() if ".layer.1." not in name}
    for number, weights in enumerate([layer, {f"student.{name}": value for name, value in whole.items()}]):
        folder = tmp_path / str(number)
        shutil.copytree(toy_bert, folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"lacks weights of its encoder, bert\..* which would be random"):
            load_pretrained(str(folder))
        with pytest.raises(UserError, match="lacks weights of its encoder"):
            load_downstream(str(folder), kind="regression", labels=(), dropout=None, seed=1)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path, toy_bert: Path) -> None:
    """transformers makes an empty tokenizer where there is none, of which every word is [UNK]."""
    AutoModelForMaskedLM.from_pretrained(toy_bert).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="has no vocabulary"):
        load_pretrained(str(tmp_path / "model"))


def test_tokens_without_an_embedding_are_refused(tmp_path: Path, toy_bert: Path) -> None:
    shutil.copytree(toy_bert, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(toy_bert)
    rows = AutoConfig.from_pretrained(toy_bert).vocab_size
    tokenizer.add_tokens([f"added{number}" for number in range(rows - len(tokenizer) + 1)])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=rf"{rows} rows of word embeddings for the {rows + 1} tokens"):
        load_pretrained(str(tmp_path / "model"))


def test_a_broken_checkpoint_is_a_sentence(tmp_path: Path, toy_bert: Path) -> None:
    """A pointer of git-lfs instead of the file, and shapes other than the configuration's."""
    shutil.copytree(toy_bert, tmp_path / "pointer")
    (tmp_path / "pointer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    shutil.copytree(toy_bert, tmp_path / "shapes")
    config = json.loads((toy_bert / "config.json").read_text())
    (tmp_path / "shapes/config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    for name in ("pointer", "shapes"):
        with pytest.raises(UserError, match="could not be loaded from the folder"):
            load_pretrained(str(tmp_path / name))


def test_a_model_that_was_exported_untied_and_lost_its_head_has_the_embedding_as_decoder(
    tmp_path: Path, toy_bert: Path
) -> None:
    """Its head, trained anew, would else stand before noise."""
    exported = load_pretrained(str(toy_bert))
    finemask_ds.apply_mask(exported.model, Mask.random(exported.shapes, 0.5, seed=1))
    save_pretrained(exported, tmp_path / "exported")
    tuned = load_downstream(str(tmp_path / "exported"), kind="regression", labels=(), dropout=None, seed=1)
    save_folder(tuned.model, tuned.tokenizer, tmp_path / "tuned")
    again = load_pretrained(str(tmp_path / "tuned"))
    assert not again.has_head
    family = again.family
    weights = [again.model.get_submodule(path).weight for path in (family.decoder, family.embedding)]
    assert weights[0] is weights[1]
    save_pretrained(again, tmp_path / "again")
    assert load_pretrained(str(tmp_path / "again")).digest() == again.digest()


def test_xlm_roberta_names_its_shared_matrix_by_the_embedding(tmp_path: Path, toy_roberta: Path) -> None:
    """In transformers its head is made before its encoder."""
    folder, shape = tmp_path / "xlm", AutoConfig.from_pretrained(toy_roberta).to_dict()
    shutil.copytree(toy_roberta, folder)
    del shape["model_type"], shape["architectures"]
    XLMRobertaForMaskedLM(XLMRobertaConfig(**shape)).save_pretrained(folder)
    pretrained = load_pretrained(str(folder))
    embedding = "roberta.embeddings.word_embeddings.weight"
    assert pretrained.places[embedding].role == "Emb"
    tuned = load_downstream(str(folder), kind="regression", labels=(), dropout=None, seed=1)
    assert tuned.sha256 == pretrained.digest()
    mask = Mask.random(pretrained.shapes, 0.5, seed=1)
    plain = XLMRobertaForMaskedLM.from_pretrained(folder)
    finemask_ds.apply_mask(plain, mask)
    attach(pretrained.model, mask)
    tokens = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, pretrained.model(tokens).logits)


def test_unknown_models_and_families_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="type --model with a hub name"):
        load_pretrained("nobody/nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match=r"'gpt2' is unknown; known are bert, roberta"):
        load_pretrained(str(tmp_path))


def test_a_pickle_is_refused(tmp_path: Path, toy_bert: Path) -> None:
    shutil.copytree(toy_bert, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be loaded"):
        load_pretrained(str(tmp_path / "pickled"))


@pytest.mark.slow
def test_a_model_in_the_hubs_cache_is_found_without_a_network(tmp_path: Path, toy_bert: Path) -> None:
    """In the hub's layout; by a fresh process, since the cache's place is read at import."""
    repository = tmp_path / "hub" / "models--toy--bert"
    shutil.copytree(toy_bert, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    code = "from finemask_ds.models.load import load_pretrained as l; print(l('toy/bert').digest())"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == load_pretrained(str(toy_bert)).digest()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_export_predicts_as_it_was_measured(tmp_path: Path, toy_bert: Path, toy_roberta: Path, family: str) -> None:
    """theta_0 * M with theta_0's head, its decoder's bias too, and nothing left to be drawn anew."""
    pretrained = load_pretrained(str(toy_bert if family == "bert" else toy_roberta))
    head = head_parameters(pretrained.model)
    for name in head:
        if name.endswith("bias"):
            torch.nn.init.normal_(head[name])
    save_pretrained(pretrained, tmp_path / "theta0")
    mask = Mask.random(pretrained.shapes, 0.7, seed=1)
    save_mask(tmp_path / "mask.safetensors", mask)
    out = export_checkpoint(tmp_path / "mask.safetensors", str(tmp_path / "theta0"), tmp_path / "out")
    model, report = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    attach(pretrained.model, mask)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, pretrained.model(tokens).logits)
    assert load_pretrained(str(out)).has_head


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_mask_holds_in_any_model_of_transformers(toy_bert: Path, toy_roberta: Path, family: str, kind: Any) -> None:
    """Whatever stands on the backbone, and however it is trained: decay, momentum, clipping and a move to elsewhere."""
    folder = toy_bert if family == "bert" else toy_roberta
    mask = Mask.random(load_pretrained(str(folder)).shapes, 0.7, seed=1)
    model = kind.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.named_parameters()}
    finemask_ds.apply_mask(model, mask, hold=True)
    model.double()  # As a move to another device does, it gives every parameter other memory.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        tokens = torch.arange(3 + step, 11 + step)[None]
        model(tokens)[0].square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    for name, keep in mask.items():
        own = name if name in after else name.partition(".")[2]
        assert not after[own][~keep].any()
        assert (after[own] != before[own])[keep].any()


def test_a_mask_of_another_model_is_not_applied(toy_bert: Path) -> None:
    model = AutoModel.from_pretrained(toy_bert)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(UserError, match="the mask is for another model"):
        finemask_ds.apply_mask(model, Mask.random({"bert.encoder.layer.0.output.dense.weight": (3, 5)}, 0.5, seed=0))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_an_export_loads_anywhere_with_exact_zeros(tmp_path: Path, toy_bert: Path) -> None:
    """AutoModel finds the zeros and the pooler, AutoModelForMaskedLM the decoder that losses are measured with."""
    pretrained = load_pretrained(str(toy_bert))
    mask = Mask.random(pretrained.shapes, 0.7, seed=1)
    save_mask(tmp_path / "mask.safetensors", mask)
    out = export_checkpoint(tmp_path / "mask.safetensors", str(toy_bert), tmp_path / "out")
    model, backbone = AutoModelForMaskedLM.from_pretrained(out), AutoModel.from_pretrained(out)
    theta0 = pretrained.targets
    for name, keep in mask.items():
        expected = torch.where(keep, theta0[name], 0.0)
        assert torch.equal(dict(model.named_parameters())[name], expected)
        assert torch.equal(dict(backbone.named_parameters())[name.removeprefix("bert.")], expected)
    assert torch.equal(model.cls.predictions.decoder.weight, theta0["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(backbone.pooler.dense.weight, AutoModel.from_pretrained(toy_bert).pooler.dense.weight)
    with pytest.raises(UserError, match="is not written over"):
        export_checkpoint(tmp_path / "mask.safetensors", str(toy_bert), out)
