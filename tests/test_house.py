"""The house rules that a machine can check: arrows of imports, sizes, links and commands in Markdown."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from finemask_ds import session
from finemask_ds.cli import _parser
from finemask_ds.config import (
    DoctorConfig,
    FinetuneConfig,
    ImpConfig,
    MagnitudeConfig,
    PretrainConfig,
    SweepConfig,
    TamtConfig,
    TamtRecipeConfig,
)
from finemask_ds.masks.files import load_mask
from finemask_ds.options import parse, parser_for
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "finemask_ds"
FLOORS = ("masks", "models", "data", "engine", "search", "finetune", "dispatch", "report", "recipes")
"""Top to bottom: a folder may import only from folders above it, and from the modules that belong to no floor."""
GROUND = {
    "config",
    "run",
    "errors",
    "provenance",
    "lock",
    "signals",
    "units",
    "pdsh",
    "hostprocess",
    "silence",
    "options",
}
TOP = {"__init__", "session", "downstream", "cli", "commands", "doctor", "supervise", "__main__"}
"""Modules at the very bottom of the house, which may import anything."""


LAUNCHERS = {
    "dispatch": SweepConfig,
    "doctor": DoctorConfig,
    "finetune": FinetuneConfig,
    "imp": ImpConfig,
    "magnitude": MagnitudeConfig,
    "pretrain": PretrainConfig,
    "tamt": TamtConfig,
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Absolute names of all modules that a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found += [node.module or ""]
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_points_up(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports(path):
        if not module.startswith("finemask_ds."):
            continue
        there = module.split(".")[1]
        if here in TOP or there == here or there in GROUND:
            continue
        assert here in FLOORS, f"{here} is on no floor and imports {module}"
        assert there in FLOORS, f"{path} imports {module}, which belongs to no floor above it"
        assert FLOORS.index(there) < FLOORS.index(here), f"{path} imports {module}: an arrow that points up"


def test_heavy_imports_stand_in_one_place() -> None:
    where: dict[str, set[str]] = {"deepspeed": set(), "transformers": set()}
    for path in sources():
        for module in imports(path):
            if (root := module.split(".")[0]) in where:
                where[root].add(str(path.relative_to(PACKAGE)))
    assert where["deepspeed"] == {"engine/zero.py"}
    assert {Path(file).parts[0] for file in where["transformers"]} == {"models"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 < 60, f"{node.name} in {path}"


def test_nothing_is_unpickled() -> None:
    """Files of others are read in one module, by torch's reader of plain tensors; pickletools only disassembles."""
    loads = []
    for path in sources():
        text = path.read_text()
        assert not re.search(r"import pickle\b|from pickle|allow_pickle=True|trust_remote_code=True", text), path
        loads += [(path.name, call) for call in re.findall(r"torch\.load\(.*", text)]
    assert loads == [("untrusted.py", 'torch.load(path, map_location="cpu", weights_only=True)')]


def test_every_launcher_ends_without_pythons_finalisation() -> None:
    """In which gloo's last threads sometimes abort a run that is done (``session.leave``)."""
    paths = list((REPOSITORY / "launcher").glob("*.py"))
    assert {path.stem for path in paths} == set(LAUNCHERS)
    for path in paths:
        assert re.search(r"\n    leave\(launch\(\w+, \w+\)\)\n$", path.read_text()), path


def test_every_option_tells_its_meaning() -> None:
    for config in (*LAUNCHERS.values(), TamtRecipeConfig):
        assert all(field.metadata["help"] for field in fields(config))
        text = parser_for(config).format_help()
        assert "--mask_lr" in text or config is not TamtConfig
        assert "TAMT" in text or config in (PretrainConfig, DoctorConfig)


def markdown_files() -> list[Path]:
    own = {".venv", "runs", ".git", ".pytest_cache"}  # of this checkout, not of the project
    return [path for path in REPOSITORY.rglob("*.md") if not own & set(path.parts)]


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_and_commands_in_markdown_are_real(path: Path) -> None:
    """Links lead somewhere; every launcher command parses with the options it shows."""
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), f"{path} links to {target}"
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M):
        if language not in ("", "bash", "sh"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.search(r"launcher/(\w+)\.py(.*)", line):
                words = [word for word in shlex.split(match[2], comments=True) if "$" not in word]
                parse(LAUNCHERS[match[1]], words)
            if line.startswith("finemask "):
                _parser().parse_args(shlex.split(line, comments=True)[1:])


def test_the_python_of_the_readme_is_short_and_runs(toy_bert: Path, toy_mask: Path) -> None:
    """All but the search itself, which tests/test_launchers.py runs by its recipe; the mask on a model at hand."""
    code, of_your_own = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
    model: dict[str, Any] = {}
    exec(of_your_own.replace("bert-base-uncased", str(toy_bert)).replace("runs/a", str(toy_mask)), model)
    weights, mask = dict(model["model"].named_parameters()), load_mask(toy_mask)
    assert all(not weights[name][~keep].any() for name, keep in mask.items())
    before, found, _ = code.partition("result = search(config)")
    assert found
    assert len(code.splitlines()) <= 10
    names: dict[str, object] = {}
    exec(before, names)
    assert isinstance(names["config"], TamtConfig)
    assert names["search"] is session.search
