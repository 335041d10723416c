"""The Kubernetes templates: as a person edits them they fit the schemas, and what their containers run does run."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from finemask_ds.cli import _parser
from finemask_ds.config import TamtConfig
from finemask_ds.options import parse
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "jobs" / "k8s"
CUSTOM = {"TrainJob": models.TrainerV1alpha1TrainJob, "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime}
"""Kinds that Kubernetes itself does not know, with the models that their project publishes."""


def kustomized() -> dict[tuple[str, str], dict[str, Any]]:
    """(Kind, name) -> what `kubectl apply -k` would send: the resources with the patches and images of the one file."""
    customs = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    found = {}
    for name in customs["resources"]:
        for resource in yaml.safe_load_all((FOLDER / name).read_text()):
            found[resource["kind"], resource["metadata"]["name"]] = resource
    for patch in customs["patches"]:
        resource = found[patch["target"]["kind"], patch["target"]["name"]]
        for step in yaml.safe_load(patch["patch"]):
            assert step["op"] == "add"
            *path, last = step["path"].strip("/").split("/")
            place: Any = resource
            for key in path:
                place = place[int(key) if isinstance(place, list) else key]
            assert last not in place, f"{step['path']} stands in two places"
            place[last] = step["value"]
    (image,) = customs["images"]
    for container in (one for resource in found.values() for one in containers(resource)):
        assert container["image"] == image["name"]
        container["image"] = f"{image['newName']}:{image['newTag']}"
    return found


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """Every container below a value."""
    if isinstance(value, dict):
        yield from (one for key in ("containers", "initContainers") for one in value.get(key, []))
    for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from containers(below)


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod's specification below a value."""
    if isinstance(value, dict) and "containers" in value:
        yield value
    for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from pods(below)


def check(resource: dict[str, Any]) -> None:
    """Raise where a resource does not fit its schema, unknown fields counted."""
    if resource["kind"] not in CUSTOM:
        kubernetes_validate.validate(resource, "1.31", strict=True)
        return
    model = CUSTOM[resource["kind"]].from_dict(copy.deepcopy(resource))
    assert model is not None
    assert json.loads(model.to_json()) == resource, "what the schema does not know is left out"


def command(kind: str, name: str) -> list[str]:
    """What the container of a resource runs, as a person gets it."""
    resource = kustomized()[kind, name]
    if kind == "TrainJob":
        return [*resource["spec"]["trainer"]["command"], *resource["spec"]["trainer"]["args"]]
    (container,) = containers(resource)
    return container["command"]


def test_what_is_sent_fits_the_schemas() -> None:
    sent = kustomized()
    assert sorted(kind for kind, _ in sent) == [
        "ConfigMap", "Job", "Job", "PersistentVolumeClaim", "TrainJob", "TrainingRuntime",
    ]  # fmt: skip
    for resource in sent.values():
        check(resource)
    assert {path.name for path in FOLDER.glob("*.yaml")} == {
        "kustomization.yaml", "storage.yaml", "search.yaml", "cells.yaml", "report.yaml",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("Job", "cells", ("spec", "paralelism"), 2),
        ("Job", "cells", ("spec", "completions"), "two"),
        ("TrainJob", "search", ("spec", "trainer", "numNode"), 2),
        ("TrainJob", "search", ("spec", "trainer", "numNodes"), "2"),
        ("TrainingRuntime", "finemask", ("spec", "template", "spec", "failurePolicy", "restarts"), 2),
    ],
)
def test_the_schemas_refuse_what_is_misspelt_or_of_another_type(
    kind: str, name: str, path: tuple[str, ...], value: object
) -> None:
    place = resource = kustomized()[kind, name]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((kubernetes_validate.ValidationError, ValueError, AssertionError)):
        check(resource)


def test_pods_have_no_rights_no_open_ports_and_no_secrets_in_the_clear() -> None:
    sent = kustomized()
    assert "Service" not in {kind for kind, _ in sent}
    every = [pod for resource in sent.values() for pod in pods(resource)]
    assert len(every) == 3
    for pod in every:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip
            assert "ports" not in container
            assert "env" not in container
    assert not re.search(r"TOKEN|SECRET|PASSWORD", json.dumps([sent["ConfigMap", "finemask"], *every]))
    assert "USER 1000" in (FOLDER / "Dockerfile").read_text()


def test_commands_parse_and_ranks_are_nodes_times_processes() -> None:
    torchrun, _, script, *words = command("TrainJob", "search")
    assert (torchrun, script) == ("torchrun", "launcher/tamt.py")
    trainer = kustomized()["TrainJob", "search"]["spec"]["trainer"]
    config = parse(TamtConfig, words)
    assert config.ranks == trainer["numNodes"] * trainer["numProcPerNode"]
    for kind in ("requests", "limits"):
        assert trainer["resourcesPerNode"][kind]["nvidia.com/gpu"] == str(trainer["numProcPerNode"])
    plan = f"{config.run}/downstream"
    for name in ("cells", "report"):
        finemask, *words = command("Job", name)
        assert finemask == "finemask"
        assert str(_parser().parse_args(words).__dict__).count(plan) == 1


@pytest.mark.slow
def test_the_search_the_cells_and_the_report_run_as_their_containers_would(
    toy_bert: Path, toy_text: Path, toy_tasks: Path, tmp_path: Path
) -> None:
    """Two pods of one rank each under torchrun, told who they are as Kubeflow Trainer tells them; then the two Jobs."""

    def start(words: list[str], **told: str) -> subprocess.Popen[str]:
        words = [word.replace("/runs/", f"{tmp_path}/").replace("$(JOB_COMPLETION_INDEX)", "0") for word in words]
        return subprocess.Popen(
            [str(Path(sys.executable).with_name(words[0])), *words[1:]], text=True, cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", **told}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    toy = ["--ranks", "2", "--model", str(toy_bert), "--data", str(toy_text), "--steps", "4", "--seq_len", "16"]
    toy += ["--batch_size", "8", "--eval_every", "0", "--objective", "kd", "--tasks", "cola", "--finetune_seeds", "1"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    address = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    nodes = [
        start(
            [*command("TrainJob", "search"), *toy, "--task_data", str(toy_tasks)],
            **address, PET_NODE_RANK=str(number), GLOO_SOCKET_IFNAME="lo",
        )
        for number in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert "2 of 2 cells are left; look with: finemask status" in said[0]
    for name in ("cells", "report"):
        job = start(command("Job", name))
        told = job.communicate(timeout=180)[0]
        assert job.returncode == 0, told
    assert len(list((tmp_path / "search/downstream/cells").glob("*/result.json"))) == 2
    assert "<table" in (tmp_path / "report/index.html").read_text()


def test_the_image_is_built_from_files_that_exist() -> None:
    """And with the torch that `make` installs; it cannot be built here."""
    text = (FOLDER / "Dockerfile").read_text()
    (torch,) = re.findall(r"torch==\S+", text)
    assert f"-c constraints.txt {torch} " in (REPOSITORY / "Makefile").read_text()
