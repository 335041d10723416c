"""Task-agnostic mask training (TAMT, Liu et al. 2022, Section 3.4).

All weights of the pre-trained model are frozen. Each matrix W has fp32 scores; the forward pass computes with W * M,
M the exact selection of the largest scores, and the backward pass hands M's gradient straight to the scores (Eq.
3-4). The scores start from the OMP mask (Eq. 5). The objective is MLM (the head trains along), hidden-state
distillation (Eq. 6) or their sum.

The straight-through gradient does not depend on the scores' scale and AdamW without weight decay only on the ratio of
rate to score, so (c * scores, c * phi, c * mask_lr) finds the same masks, bit for bit where c is a power of two.

Scores are ranked with their signs, as Eq. 3 and the authors' code have it, where the text of Section 3.4.2 says by
absolute value: a threshold on scores could not keep what only its absolute value lifts above it.

Other than in the authors' code the selection is exact at every step (``--threshold_every 1000``, for KD 100, for
theirs), keeps ties with the threshold where theirs drops them, and leaves the pooler alone (``--targets authors``).
Optimizer and clipping are those of their MLM script; their KD script has BertAdam with epsilon 1e-6 and without bias
correction, decays the scores by 0.01 and clips each parameter by itself, where Table 1 has AdamW for both.
``--preset fast`` starts elsewhere, ranks over all matrices and moves faster, for few steps (results/README.md, "Time to
quality").
"""

from __future__ import annotations

from torch import Tensor

from finemask_ds.config import TamtConfig
from finemask_ds.engine.base import Group
from finemask_ds.engine.loop import Span, every, is_due
from finemask_ds.engine.stopwatch import Stopwatch
from finemask_ds.masks.initialise import binary, ranked
from finemask_ds.masks.mask import Mask
from finemask_ds.masks.select import magnitudes
from finemask_ds.models.load import Pretrained
from finemask_ds.models.masked import scores_name
from finemask_ds.models.patch import attach, masked_modules, read_mask
from finemask_ds.search.activations import activation_sizes
from finemask_ds.search.magnitude import omp_mask, random_mask
from finemask_ds.search.objectives import Objective
from finemask_ds.search.outcome import Outcome, begun_from, head_values, keep_mask
from finemask_ds.search.reconstruction import reconstruction_sizes
from finemask_ds.search.selection import ScoreMasks, largest
from finemask_ds.search.setting import Setting, Trainer, freeze_all_but, head_group
from finemask_ds.search.watch import MaskWatch


def find_mask(setting: Setting) -> Outcome:
    """TAMT: freeze the weights, learn the scores, keep the exact selection."""
    config = setting.config
    assert isinstance(config, TamtConfig)
    stopwatch = Stopwatch(ranks=setting.world.size)
    theta0, start, groups = freeze(setting, config)
    start_sec = stopwatch.seconds
    objective = Objective(theta0.model, config.objective)
    engine = setting.engine(objective, groups)

    masks = ScoreMasks(
        engine, theta0.model, config.sparsity, config.scope, config.threshold_every, dict.fromkeys(start, config.phi)
    )
    with setting.recorder(config.num_steps) as recorder:
        recorder.record_last("speed/start_sec", start_sec)
        trainer = Trainer(setting, engine, objective, recorder, theta0, stopwatch=stopwatch)
        state = trainer.resume()
        if state["step"]:
            masks.go_on(state)
        else:
            keep_mask(setting, setting.run.start_mask, start, 0, config.sparsity, stopwatch.seconds)

        def keep(step: int) -> None:
            mask = Mask(masks.exact())
            keep_mask(setting, setting.run.snapshot(step), mask, step, config.sparsity, stopwatch.seconds)

        watched = not state["step"] or is_due(config.watch_every, state["step"], last=config.num_steps)
        watch = MaskWatch(theta0.places, start, read_mask(theta0.model) if watched else None, setting.draw)
        trainer.run(
            Span(first=state["step"] + 1, last=config.num_steps, decay=config.num_schedule_steps),
            after_step=[masks.after_step],
            hooks=[every(config.keep_every, keep)],
            watch=[lambda step: masks.show(watch, recorder)],
            state=masks.state,
        )
        trainer.save(config.num_steps, masks.state())  # A kill while the mask is scored costs no training.
    masks.select_exactly()
    return Outcome(
        Mask(read_mask(theta0.model)),
        config.num_steps,
        stopwatch.seconds,
        stopwatch.rank_seconds,
        head_values(engine),
        engine.describe(),
    )


def freeze(setting: Setting, config: TamtConfig) -> tuple[Pretrained, Mask, list[Group]]:
    """theta_0, frozen, with scores to learn; the mask they start from; what is trained: scores, for MLM the head."""
    theta0 = setting.theta0()
    start, scores = initial_scores(theta0, setting, config)
    attach(theta0.model, start, scores)
    groups = [mask_group(theta0, config)]
    if config.needs_head:
        groups.append(head_group(config, theta0.model))
    freeze_all_but(theta0.model, groups)
    return theta0, start, groups


def initial_scores(theta0: Pretrained, setting: Setting, config: TamtConfig) -> tuple[Mask, dict[str, Tensor]]:
    """The mask and the scores before the first step.

    ``binary`` and ``random`` start at alpha * phi where OMP, or chance, keeps a weight (Eq. 5; Section 4.2.4);
    the others around phi in the order of the magnitudes, as they are (``ranked``) or weighed by their inputs
    (``activations``), or of what a matrix would miss each weight by (``reconstruction``). Where a checkpoint is about
    to bring the scores, the start is not searched again: its mask is read, and its scores are no more than a place.
    """
    if (begun := begun_from(setting)) is not None:
        return begun, {name: binary(keep, config.alpha, config.phi) for name, keep in begun.items()}
    if config.init in ("binary", "random"):
        start = omp_mask(theta0, config) if config.init == "binary" else random_mask(theta0, config)
        return start, {name: binary(keep, config.alpha, config.phi) for name, keep in start.items()}
    if config.init == "ranked":
        sizes = magnitudes(theta0.targets)
    elif config.init == "activations":
        sizes = activation_sizes(theta0, setting)
    else:
        sizes = reconstruction_sizes(theta0, setting)
    start = largest(sizes, config)
    return start, {name: ranked(sizes[name], start[name], config.phi) for name in start}


def mask_group(theta0: Pretrained, config: TamtConfig) -> Group:
    """The scores of all masked matrices, with their own rate and no weight decay."""
    scores = {scores_name(name): module.scores for name, module in masked_modules(theta0.model).items()}
    return Group("mask", scores, config.peak_mask_lr)  # type: ignore[arg-type]
