"""`finemask mask`: show, compare, import and export mask files."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finemask_ds.errors import UserError, abbreviated, printable
from finemask_ds.report.table import aligned

if TYPE_CHECKING:
    from finemask_ds.cli import Commands
    from finemask_ds.masks.mask import Mask


def add_mask(commands: Commands) -> None:
    """`finemask mask show | compare | import | export`."""
    mask = commands.add_parser("mask", help="show, compare, import or export mask files").add_subparsers(
        metavar="COMMAND", required=True
    )

    show = mask.add_parser("show", help="sparsity of each matrix, and where the mask comes from")
    show.add_argument("file", type=Path, metavar="FILE", help="mask file, or run directory")
    show.set_defaults(handler=_show)

    compare = mask.add_parser("compare", help="Jaccard similarity and distance of masks (TAMT Section 4.2.5)")
    compare.add_argument("first", type=Path, metavar="FILE", help="mask file, or run directory")
    compare.add_argument("others", type=Path, nargs="+", metavar="FILE", help="others of the same model")
    compare.set_defaults(handler=_compare)

    take = mask.add_parser("import", help="read a mask of TAMT, BERT-Tickets, torch.nn.utils.prune, open_lth, MaskLLM")
    take.add_argument("source", type=Path, metavar="IN", help="their file, such as mask.pt; code in it is never run")
    take.add_argument("out", type=Path, metavar="OUT", help="new mask file, such as mask.safetensors")
    take.add_argument("--model", required=True, help="hub name, folder or builtin: the model it was made from")
    take.add_argument(
        "--from_zeros",
        action="store_true",
        help="IN is the folder of a pruned model; its zeros are the mask",
    )
    take.set_defaults(handler=_import)

    export = mask.add_parser("export", help="write a plain Hugging Face checkpoint with exact zeros, or others' files")
    export.add_argument("file", type=Path, metavar="FILE", help="mask file, or run directory")
    export.add_argument("--model", required=True, help="hub name, folder or builtin: the model it was made from")
    export.add_argument("--out", required=True, type=Path, metavar="PATH", help="new folder (checkpoint) or new file")
    export.add_argument(
        "--format", choices=("checkpoint", "tamt", "prune"), default="checkpoint",
        help="Hugging Face folder, TAMT's mask.pt, or state dict of torch.nn.utils.prune [checkpoint]",
    )  # fmt: skip
    export.set_defaults(handler=_export)


def _show(arguments: argparse.Namespace) -> None:
    from finemask_ds.masks.files import load_mask

    _print_mask(load_mask(arguments.file))


def _print_mask(mask: Mask) -> None:
    from finemask_ds.masks.mask import dimensions

    rows = [_counts(name, dimensions(mask.shapes[name]), mask, [name]) for name in mask]
    groups: dict[str, list[str]] = {}
    for name in mask:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    rows += [
        _counts(pattern, f"{len(names)} matrices", mask, names) for pattern, names in groups.items() if len(names) > 1
    ]
    rows.append(_counts("total", f"{len(mask)} matrices", mask, list(mask)))
    print(aligned(["matrix", "shape", "weights", "kept", "sparsity"], rows))
    print()
    for key, value in mask.provenance.items():
        print(printable(f"{key}: {value if isinstance(value, str) else json.dumps(value)}"))
    print(f"fingerprint: {mask.fingerprint()}")


def _counts(label: str, shape: str, mask: Mask, names: Sequence[str]) -> list[str]:
    weights = sum(mask.num_weights(name) for name in names)
    kept = sum(mask.num_kept(name) for name in names)
    return [label, shape, f"{weights:,}", f"{kept:,}", f"{(weights - kept) / weights:.6f}"]


def _compare(arguments: argparse.Namespace) -> None:
    from finemask_ds.masks.files import load_mask
    from finemask_ds.masks.mask import in_common

    paths = [arguments.first, *arguments.others]
    masks = [load_mask(path) for path in paths]
    for path, mask in zip(paths[1:], masks[1:], strict=True):
        try:
            in_common([masks[0], mask])
        except UserError as error:
            raise UserError(f"{path} and {paths[0]} are masks of different models ({error})") from error
    masks, others = in_common(masks)
    if others:
        print(f"left out, as not all of them have it: {abbreviated(others)}")
    if len(masks) == 2:
        _compare_two(*masks)
    else:
        _compare_many([str(path) for path in paths], masks)


def _compare_two(one: Mask, two: Mask) -> None:
    similarities = {name: one.jaccard(two, name) for name in one}
    similarities["mean of the matrices"] = one.mean_jaccard(two)
    similarities["all weights together"] = one.jaccard(two)
    rows = [[name, f"{value:.6f}", f"{1 - value:.6f}"] for name, value in similarities.items()]
    print(aligned(["matrix", "similarity", "distance"], rows))


def _compare_many(labels: Sequence[str], masks: Sequence[Mask]) -> None:
    numbers = [str(number) for number in range(1, len(masks) + 1)]
    for title, measure in (("similarity", "jaccard"), ("distance", "distance")):
        print(f"Jaccard {title}, all weights together")
        rows = [
            [f"{number} {label}", *(f"{getattr(one, measure)(two):.6f}" for two in masks)]
            for number, label, one in zip(numbers, labels, masks, strict=True)
        ]
        print(aligned(["mask", *numbers], rows))
        print()


def _import(arguments: argparse.Namespace) -> None:
    from finemask_ds.masks.files import save_mask
    from finemask_ds.masks.foreign import refuse_existing
    from finemask_ds.models.imported import import_mask

    refuse_existing(arguments.out, "OUT")
    imported = import_mask(
        arguments.source, _model(arguments.model), called=arguments.model, from_zeros=arguments.from_zeros
    )
    mask, absent = imported.mask, imported.absent
    save_mask(arguments.out, mask)
    print(f"read as {imported.format}: {len(mask)} matrices")
    for note in imported.notes:
        print(note)
    _print_mask(mask)
    if absent:
        print(f"dense (not in the file): {abbreviated(list(absent))}")
    print(f"sparsity over the {len(mask)} matrices of the file: {mask.sparsity():.6f}")
    weights = mask.num_weights() + sum(rows * columns for rows, columns in absent.values())
    print(
        f"sparsity over all {len(mask) + len(absent)} prunable matrices of the model: "
        f"{(mask.num_weights() - mask.num_kept()) / weights:.6f}"
    )
    print(arguments.out)


def _export(arguments: argparse.Namespace) -> None:
    from finemask_ds.models.export import FORMATS

    print(FORMATS[arguments.format](arguments.file, _model(arguments.model), arguments.out))


def _model(name: str) -> str:
    """The hub name or folder; ``builtin`` is trained where it is missing."""
    if name != "builtin":
        return name
    from finemask_ds.config import PretrainConfig
    from finemask_ds.session import pretrain

    return pretrain(PretrainConfig())
