"""Masks that keep what every matrix computes: sums against plain products, losses against another start's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finemask_ds.config import MagnitudeConfig, TamtConfig
from finemask_ds.engine.world import this_process
from finemask_ds.masks.files import load_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.models.load import Pretrained, load_pretrained
from finemask_ds.search.activations import activation_magnitudes
from finemask_ds.search.objectives import kd_sum
from finemask_ds.search.reconstruction import Pair, read, reconstruct, reconstruction_sizes, sums
from finemask_ds.search.selection import largest
from finemask_ds.search.setting import Setting, open_setting
from finemask_ds.session import search
from tests.search import jobs

CPU = torch.device("cpu")


@pytest.fixture(params=["toy_bert", "toy_roberta"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def opened(config: TamtConfig) -> Setting:
    return open_setting(config, this_process(), model=config.model, data=config.data)


def dev_blocks(setting: Setting) -> Tensor:
    return torch.from_numpy(setting.corpus.dev.astype("int64"))


@torch.no_grad()
def layer_outputs(theta0: Pretrained, mask: Mask, blocks: Tensor) -> list[tuple[Tensor, ...]]:
    """Of the dense model and of the one whose weights are multiplied by hand."""
    dense = theta0.model.eval()
    pruned = copy.deepcopy(dense)
    for name, keep in mask.items():
        pruned.get_parameter(name).mul_(keep)
    return [one(blocks, output_hidden_states=True).hidden_states[1:] for one in (dense, pruned)]


def kd_loss(theta0: Pretrained, mask: Mask, blocks: Tensor) -> float:
    """Eq. 6."""
    return float(kd_sum(*layer_outputs(theta0, mask, blocks))) / blocks.numel()


def test_it_starts_nearer_to_theta0_than_magnitudes_do(model: Path, toy_text: Path, tmp_path: Path) -> None:
    config = jobs.tamt(tmp_path / "run", model, toy_text)
    setting = opened(config)
    theta0 = setting.theta0()
    weights = {name: weight.clone() for name, weight in theta0.targets.items()}
    sizes = reconstruction_sizes(theta0, setting)
    found = Mask({name: size >= 1 for name, size in sizes.items()})
    by_norms = largest(activation_magnitudes(theta0, setting), config)
    assert found == largest(sizes, config)
    assert {name: int(keep.sum()) for name, keep in found.items()} == {
        name: int(keep.sum()) for name, keep in by_norms.items()
    }
    assert all(torch.equal(weight, weights[name]) for name, weight in theta0.targets.items())
    losses = [kd_loss(theta0, mask, dev_blocks(setting)) for mask in (found, by_norms)]
    assert losses[0] < 0.9 * losses[1]


def test_as_a_mask_of_its_own_it_is_found_without_a_step(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    kinds = {}
    for kind in ("omp", "reconstruction"):
        config = MagnitudeConfig(
            model=str(toy_bert), data=str(toy_text), run=str(tmp_path / kind), seq_len=16, kind=kind
        )
        kinds[kind] = search(config)
    setting = opened(jobs.tamt(tmp_path / "run", toy_bert, toy_text))
    theta0 = setting.theta0()
    assert load_mask(tmp_path / "reconstruction/mask.safetensors") == largest(
        reconstruction_sizes(theta0, setting), setting.search
    )
    assert kinds["reconstruction"]["steps"] == 0
    assert kinds["reconstruction"]["dev"]["kd_loss"] < kinds["omp"]["dev"]["kd_loss"]


def test_globally_as_many_are_kept_in_all(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, scope="global", targets="authors")
    setting = opened(config)
    theta0 = setting.theta0()
    sizes = reconstruction_sizes(theta0, setting)
    found = Mask({name: size >= 1 for name, size in sizes.items()})
    assert found == largest(sizes, config)
    by_norms = largest(activation_magnitudes(theta0, setting), config)
    for outside in ("bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"):
        assert torch.equal(found[outside], by_norms[outside])


def test_the_last_layer_is_told_with_its_distance(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    """The line after the last layer tells the distance that the masks found have there."""
    setting = opened(jobs.tamt(tmp_path / "run", toy_bert, toy_text))
    theta0, blocks, lines = setting.theta0(), dev_blocks(setting), []
    start = Mask.random(theta0.shapes, 0.7, seed=1)
    sizes = reconstruct(theta0, blocks, start, CPU, lines.append)
    masks = Mask({**start, **{name: size >= 1 for name, size in sizes.items()}})
    last = [outputs[-1] for outputs in layer_outputs(theta0, masks, blocks)]
    distance = float(1 - torch.cosine_similarity(*last, dim=-1).mean())
    assert lines[-1].startswith(f"layer 2/2: 1 - cos {distance:.4f}")
    assert len(lines) == 2


@torch.no_grad()
def test_sums_are_products_of_what_the_matrices_read(toy_bert: Path) -> None:
    """Of the FFN's second matrix, whose output is added to what the first one reads."""
    dense = load_pretrained(str(toy_bert), dropout=0.0).model.bert.eval()
    pruned = copy.deepcopy(dense)
    for parameter in pruned.parameters():
        parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    draw = torch.Generator().manual_seed(1)
    pairs = [Pair(torch.randn(3, 7, 32, generator=draw), torch.randn(3, 7, 32, generator=draw)) for _ in range(2)]
    layers = Pair(dense.encoder.layer[0], pruned.encoder.layer[0])
    gram, between, lost = sums(layers, pairs, ["intermediate.dense", "output.dense"])
    streams, inputs = [], []
    for layer, hidden in zip(layers, zip(*pairs, strict=True), strict=True):
        found: dict[str, list[Tensor]] = {"intermediate": [], "output": []}
        hooks = [
            layer.intermediate.register_forward_hook(lambda _, i, o, f=found: f["intermediate"].append(i[0])),
            layer.output.register_forward_hook(lambda _, i, o, f=found: f["output"].append(i[0])),
        ]
        for part in hidden:
            layer(part)
        for hook in hooks:
            hook.remove()
        streams.append(torch.cat(found["intermediate"]).flatten(0, 1).double())
        inputs.append(torch.cat(found["output"]).flatten(0, 1).double())
    torch.testing.assert_close(gram.double(), inputs[1].T @ inputs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(between.double(), inputs[0].T @ inputs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lost.double(), (streams[0] - streams[1]).T @ inputs[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_reading_goes_no_further_than_what_is_read(toy_bert: Path) -> None:
    backbone = load_pretrained(str(toy_bert), dropout=0.0).model.bert.eval()
    called = []
    backbone.encoder.layer[0].register_forward_hook(lambda *_: called.append("layer 0"))
    backbone.encoder.layer[1].register_forward_hook(lambda *_: called.append("layer 1"))
    tokens = torch.arange(10)[None]
    (hidden,) = read(backbone, tokens, ["encoder.layer.1"])
    assert torch.equal(hidden, backbone(tokens, output_hidden_states=True).hidden_states[1])
    assert called[0] == "layer 0"
    assert called.count("layer 1") == 1  # by the whole pass of the line before alone
    assert not backbone.encoder.layer[1]._forward_pre_hooks
