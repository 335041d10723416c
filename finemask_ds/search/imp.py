"""Iterative magnitude pruning with rewinding (Chen et al. 2020; TAMT Section 3.2 and Appendix B.2).

All weights train on MLM. The first 10 % go before step 1; every ``interval_steps`` another 10 % of the original count
goes, by magnitude of the trained weights; after each pruning the remaining weights of the backbone are reset to
theta_0. That the MLM head goes on, the optimizer is fresh and the schedule starts again is from the authors' code.

The decoder is tied to the masked embedding by default: one matrix, trained and pruned as one, so that a pruned weight
is zero wherever it is used and the exported checkpoint, which ties again, is what was trained. ``--decoder unmasked``
lets the decoder read theta_0's embedding, frozen, as TAMT does; in the authors' code the decoder trains the raw
embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from finemask_ds.config import ImpConfig
from finemask_ds.engine.base import Engine, Group
from finemask_ds.engine.loop import Span, is_due
from finemask_ds.engine.stopwatch import Stopwatch
from finemask_ds.masks.binarize import masked
from finemask_ds.masks.files import load_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.masks.schedule import ladder
from finemask_ds.models.load import Pretrained
from finemask_ds.models.patch import (
    attach,
    read_mask,
    tie_decoder_to_masked_embedding,
    untie_decoder,
    write_mask,
)
from finemask_ds.search.objectives import Objective
from finemask_ds.search.outcome import Outcome, head_values, keep_mask
from finemask_ds.search.selection import select_trained
from finemask_ds.search.setting import Setting, Trainer, freeze_all_but, head_group
from finemask_ds.search.watch import MaskWatch


def find_mask(setting: Setting) -> Outcome:
    """IMP: prune, rewind, train, rung by rung."""
    config = setting.config
    assert isinstance(config, ImpConfig)
    stopwatch = Stopwatch(ranks=setting.world.size)
    theta0, mask, groups = start(setting, config)
    weights = {name: value.detach().clone() for name, value in backbone_parameters(theta0).items()}
    objective = Objective(theta0.model, "mlm")
    engine = setting.engine(objective, groups)
    rungs = ladder(config.sparsity)
    num_steps = (len(rungs) - 1) * config.interval_steps
    with setting.recorder(num_steps) as recorder:
        trainer = Trainer(setting, engine, objective, recorder, theta0, stopwatch=stopwatch)
        state = {"rung": -1} | trainer.resume()
        # Distances from the unpruned model.
        watch = MaskWatch(theta0.places, mask, looked_at_last(setting, rungs, state) or mask, setting.draw)
        for rung, sparsity in enumerate(rungs):
            if rung < state["rung"]:
                continue
            origin = rung * config.interval_steps
            if rung == state["rung"]:
                mask = load_mask(setting.run.rung_mask(sparsity))
                write_mask(theta0.model, mask)
            else:
                mask = prune(engine, mask, sparsity, config.scope)
                write_mask(theta0.model, mask)
                rewind(engine, weights, mask, to_theta0=config.rewind == "theta0")
                rung_file = setting.run.rung_mask(sparsity)
                keep_mask(setting, rung_file, mask, origin, sparsity, stopwatch.seconds)
                if sparsity == rungs[-1]:  # Nothing trains after it, or is logged.
                    watch.observe(recorder, mask)
                    recorder.flush(origin)
                trainer.save(origin, {"rung": rung})
            if sparsity == rungs[-1]:
                break
            trainer.run(
                Span(
                    first=max(origin, state["step"]) + 1, last=origin + config.interval_steps,
                    decay=config.num_schedule_steps, origin=origin,
                ),
                watch=[lambda step: watch.observe(recorder, read_mask(theta0.model))],
                state=lambda rung=rung: {"rung": rung},  # type: ignore[misc]
            )  # fmt: skip
    spent = stopwatch.seconds, stopwatch.rank_seconds
    return Outcome(mask, num_steps, *spent, head_values(engine), engine.describe())


def looked_at_last(setting: Setting, rungs: Sequence[float], state: Mapping[str, int]) -> Mask | None:
    """The mask that a resumed run recorded last, of its rung or still of the one before; None before the first."""
    config, rung = setting.config, state["rung"]
    assert isinstance(config, ImpConfig)
    origin, last = rung * config.interval_steps, (rung + 1) * config.interval_steps
    if not any(is_due(config.watch_every, step, last=last) for step in range(origin + 1, state["step"] + 1)):
        rung -= 1  # Which was looked at when its last step was taken.
    return load_mask(setting.run.rung_mask(rungs[rung])) if rung >= 0 else None


def start(setting: Setting, config: ImpConfig) -> tuple[Pretrained, Mask, list[Group]]:
    """theta_0 under a mask that prunes nothing yet, that mask, and what is trained: all weights and the MLM head."""
    theta0 = setting.theta0()
    mask = Mask.full_like(theta0.shapes)
    attach(theta0.model, mask)
    # Before the decoder is untied, which makes its matrix a parameter outside the backbone: it stays theta_0's.
    groups = [weight_group(theta0, config), head_group(config, theta0.model)]
    if config.decoder == "masked":
        tie_decoder_to_masked_embedding(theta0.model)
    else:
        untie_decoder(theta0.model)
    freeze_all_but(theta0.model, groups)
    return theta0, mask, groups


def prune(engine: Engine, mask: Mask, sparsity: float, scope: str) -> Mask:
    """Keep, of the weights still kept, the n - round(S n) with the largest trained magnitudes."""
    names = {name: name for name in mask}
    chosen = select_trained(engine, names, sparsity, scope, score=lambda weight: weight.abs(), within=mask)
    return Mask({name: selection.mask for name, selection in chosen.items()})


def rewind(engine: Engine, theta0: Mapping[str, Tensor], mask: Mapping[str, Tensor], *, to_theta0: bool = True) -> None:
    """Reset the backbone to theta_0 * M (or the trained weights to W * M) and forget the optimizer's moments.

    The MLM head is not rewound. Moments must go in either case: an old momentum would move a pruned weight off zero.
    """
    if to_theta0:
        engine.edit((name, masked(value, mask[name]) if name in mask else value) for name, value in theta0.items())
    else:
        engine.edit([(name, masked(value.cpu(), mask[name])) for name, value in engine.read(mask)])
    engine.reset_optimizer()


def backbone_parameters(theta0: Pretrained) -> dict[str, nn.Parameter]:
    """Everything but the MLM head: what is trained at ``lr`` and rewound."""
    prefix = theta0.family.backbone + "."
    return {name: value for name, value in theta0.model.named_parameters() if name.startswith(prefix)}


def weight_group(theta0: Pretrained, config: ImpConfig) -> Group:
    """All weights of the backbone."""
    return Group("weights", backbone_parameters(theta0), config.lr, config.weight_decay)
