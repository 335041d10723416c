"""Masks that keep what every matrix computes: sums against plain products, losses against another start's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from finemask_ds.config import MagnitudeConfig, TamtConfig
from finemask_ds.engine.world import this_process
from finemask_ds.masks.files import load_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.masks.swap import Reconstruction
from finemask_ds.models.families import LAYER_ROLES
from finemask_ds.models.load import Pretrained, load_pretrained
from finemask_ds.search.activations import activation_magnitudes
from finemask_ds.search.objectives import kd_sum
from finemask_ds.search.reconstruction import (
    DAMPING,
    Pair,
    output,
    prune_layer,
    reconstruct,
    reconstruction_sizes,
)
from finemask_ds.search.selection import evenly, largest
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


def test_distances_are_from_one_omp_whatever_a_mask_is_ranked_over(
    toy_bert: Path, toy_text: Path, tmp_path: Path
) -> None:
    """TAMT's prunes each matrix alike (Section 3.4.2)."""
    results = {}
    for scope in ("local", "global"):
        config = MagnitudeConfig(
            model=str(toy_bert), data=str(toy_text), run=str(tmp_path / scope), seq_len=16, scope=scope
        )
        results[scope] = search(config)
    masks = [load_mask(tmp_path / scope / "mask.safetensors") for scope in results]
    assert results["local"]["distance_from_omp"] == 0
    assert results["global"]["distance_from_omp"] == masks[0].distance(masks[1]) > 0


def test_globally_as_many_are_kept_in_all(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, scope="global", targets="authors")
    setting = opened(config)
    theta0 = setting.theta0()
    sizes = reconstruction_sizes(theta0, setting)
    found = Mask({name: size >= 1 for name, size in sizes.items()})
    exact = largest(sizes, config)
    total = sum(size.numel() for size in sizes.values())
    assert sum(exact.num_kept(name) for name in exact) == total - round(config.sparsity * total)
    assert sum(int((found[name] != exact[name]).sum()) for name in found) <= len(found), "each matrix's rounding"
    by_norms = evenly(activation_magnitudes(theta0, setting), theta0.places, config)
    assert all(found.num_kept(name) == by_norms.num_kept(name) for name in found)
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
def test_a_layer_is_pruned_in_turn_on_what_the_matrices_before_leave(toy_bert: Path) -> None:
    """Against whole passes, one for each matrix, of which what it reads and gives is looked up."""
    theta0 = load_pretrained(str(toy_bert), dropout=0.0)
    dense = theta0.model.bert.encoder.layer[0].eval()
    layers = Pair(dense, copy.deepcopy(dense))
    paths = {role: theta0.family.within_layer(role) for role in LAYER_ROLES}
    draw = torch.Generator().manual_seed(1)
    hidden = Pair(torch.randn(6, 7, 32, generator=draw), torch.randn(6, 7, 32, generator=draw))
    start = {
        role: torch.rand(dense.get_submodule(path).weight.shape, generator=draw) < 0.3 for role, path in paths.items()
    }

    by_hand = copy.deepcopy(dense)
    expected: dict[str, Tensor] = {}
    for role, path in paths.items():  # which is the order of the computation
        module = by_hand.get_submodule(path)
        (x, _), (_, y) = (
            seen_at(by_hand, module, hidden.pruned),
            seen_at(dense, dense.get_submodule(path), hidden.dense),
        )
        if role == "AO":
            y = y + flat(hidden.dense) - flat(hidden.pruned)
        if role == "FO":
            y = y + seen_at(dense, dense.intermediate, hidden.dense)[0]
            y = y - seen_at(by_hand, by_hand.intermediate, hidden.pruned)[0]
        gram, cross = x.T @ x, (y - module.bias).T @ x
        damping = DAMPING * gram.diag().mean()
        gram, cross = gram + damping * torch.eye(len(gram)), cross + damping * module.weight
        search = Reconstruction(module.weight, gram, cross, start[role])
        search.swap()
        assert not torch.equal(search.mask, start[role])
        expected[role] = search.sizes()
        module.weight.mul_(search.mask)

    before = copy.deepcopy(dense.state_dict())
    outputs, sizes = prune_layer(layers, paths, hidden, start)
    assert {role: int((size >= 1).sum()) for role, size in sizes.items()} == {
        role: int(keep.sum()) for role, keep in start.items()
    }
    for role, path in paths.items():
        matrices = Pair(*(layer.get_submodule(path) for layer in layers))
        assert torch.equal(matrices.pruned.weight, matrices.dense.weight * (sizes[role] >= 1))
        assert torch.equal(sizes[role] >= 1, expected[role] >= 1)
        torch.testing.assert_close(sizes[role], expected[role], rtol=1e-3, atol=1e-3)
        assert not matrices.dense._forward_hooks
        assert not matrices.pruned._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    torch.testing.assert_close(outputs.dense, output(dense, hidden.dense))
    torch.testing.assert_close(outputs.pruned, output(by_hand, hidden.pruned))


def flat(hidden: Tensor) -> Tensor:
    return hidden.flatten(0, 1)


def seen_at(layer: nn.Module, module: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What a module inside the layer reads and gives, [tokens, columns], where the layer reads ``hidden``."""
    seen: list[Tensor] = []
    with module.register_forward_hook(lambda _, arguments, given: seen.extend((arguments[0], given))):
        layer(hidden)
    return flat(seen[0]), flat(seen[1])
