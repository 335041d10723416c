"""A GLUE root and SQuAD files in miniature: the official layouts with sentences of the toy vocabulary."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.toys import sentences


def write_tasks(root: Path, rows: int = 48) -> Path:
    """CoLA, MRPC, STS-B, MNLI and SQuAD under one root; labels follow from the words, so that they can be learnt."""
    first, second = sentences(4 * rows, seed=2), sentences(4 * rows, seed=3)
    _write_cola(root / "glue/CoLA", first, rows)
    _write_mrpc(root / "glue/MRPC", first, second, rows)
    _write_stsb(root / "glue/STS-B", first, second, rows)
    _write_mnli(root / "glue/MNLI", first, second, rows)
    _write_squad(root / "squad", first, rows)
    return root


def _parts(rows: int) -> dict[str, range]:
    return {"train": range(rows), "dev": range(rows, 2 * rows), "test": range(2 * rows, 3 * rows)}


def _write(path: Path, header: str, lines: list[str], bom: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(bom + "\n".join([*([header] if header else []), *lines]) + "\n", encoding="utf-8")


def _write_cola(folder: Path, first: list[str], rows: int) -> None:
    for split, numbers in _parts(rows).items():
        test = split == "test"
        lines = [f"{i}\t{first[i]}" if test else f"src\t{_label(first[i])}\t*\t{first[i]}" for i in numbers]
        _write(folder / f"{split}.tsv", "index\tsentence" if test else "", lines)


def _write_mrpc(folder: Path, first: list[str], second: list[str], rows: int) -> None:
    for split, numbers in _parts(rows).items():
        head = "index" if split == "test" else "Quality"
        lines = [f'{_label(first[i])}\t{i}\t{i}\t{first[i]}\t"{second[i]}' for i in numbers]
        _write(folder / f"{split}.tsv", f"{head}\t#1 ID\t#2 ID\t#1 String\t#2 String", lines, bom="\ufeff")


def _write_stsb(folder: Path, first: list[str], second: list[str], rows: int) -> None:
    draw = random.Random(0)
    for split, numbers in _parts(rows).items():
        header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
        lines = [f"{i}\tg\tf\ty\to\ts\ts\t{first[i]}\t{second[i]}" for i in numbers]
        if split != "test":
            header += "\tscore"
            lines = [f"{line}\t{draw.uniform(0, 5):.3f}" for line in lines]
        _write(folder / f"{split}.tsv", header, lines)


def _write_mnli(folder: Path, first: list[str], second: list[str], rows: int) -> None:
    parts = _parts(rows)
    names = {
        "train": "train", "dev_matched": "dev", "dev_mismatched": "test", "test_matched": "test",
        "test_mismatched": "dev",
    }  # fmt: skip
    start = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    start += "sentence2_parse\tsentence1\tsentence2"
    labels = ("entailment", "neutral", "contradiction")
    for name, part in names.items():
        lines = [f"{i}\t1\t1\tg\tp\tp\tp\tp\t{first[i]}\t{second[i]}" for i in parts[part]]
        header = start
        if not name.startswith("test"):
            header += "\tlabel1\tgold_label"
            lines = [f"{line}\t{labels[i % 3]}\t{labels[i % 3]}" for line, i in zip(lines, parts[part], strict=True)]
        _write(folder / f"{name}.tsv", header, lines)


def _write_squad(folder: Path, first: list[str], rows: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train-v1.1.json"), ("dev", "dev-v1.1.json")):
        paragraphs = []
        for i in list(_parts(rows)[split])[: rows // 2]:
            word = first[i].split()[1]
            answer = {"text": word, "answer_start": first[i].index(" ") + 1}
            question = {"id": f"{split}-{i}", "question": "the cat sees", "answers": [answer]}
            paragraphs.append({"context": first[i], "qas": [question]})
        data = {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / name).write_text(json.dumps(data), encoding="utf-8")


def _label(sentence: str) -> int:
    return int("cat" in sentence or "dog" in sentence)
