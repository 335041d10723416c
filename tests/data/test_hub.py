"""Data sets of the hub, through the real client: a small hub on this host, its cache, prepared, absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.hub_for_tests import PREPARE, REVISION, cache_folder, run, serving

SPLITS = ("train", "validation", "test")
CONFIGS = ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
CARD = "\n".join(
    ["---", "configs:"]
    + [
        line
        for config in CONFIGS
        for line in (
            f"- config_name: {config}",
            "  data_files:",
            *(f"  - {{split: {split}, path: {config}/{split}-*}}" for split in SPLITS),
        )
    ]
    + ["---", ""]
)

# What is asked of the library, in a process of its own because it reads HF_HOME and so on at import.
ASK = """
import json, sys
from finemask_ds.data.sources import find_text, read_documents
from finemask_ds.errors import UserError

opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
answers = []
for data in sys.argv[1:]:
    try:
        source = find_text(data)
        texts = {s: [t for n in getattr(source, s) for b in read_documents(source.fetch(n)) for t in b]
                 for s in ("train", "dev")}
        answers.append({"name": source.name, "revision": source.revision, **texts})
    except UserError as error:
        answers.append({"error": str(error)})
print(json.dumps({"answers": answers, "opened": [o for o in opened if "parquet" in o or "arrow" in o]}))
"""


def ask(*data: str, home: Path, endpoint: str = "") -> tuple[list[dict], list[str]]:
    where = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"} if endpoint else {"HF_HUB_OFFLINE": "1"}
    answer = json.loads(run(ASK, *data, home=home, **where).splitlines()[-1])
    return answer["answers"], answer["opened"]


def write_repository(folder: Path, card: str = CARD) -> Path:
    for config in CONFIGS:
        (folder / config).mkdir(parents=True)
        for split in SPLITS:
            table = pa.table({"text": [f" = {config} {split} = \n", "", f" {split} \n"]})
            pq.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
    if card:
        (folder / "README.md").write_text(card)
    return folder


def cached_repository(home: Path, card: str = CARD) -> Path:
    """The layout in which the hub's client caches a data set."""
    return write_repository(cache_folder(home, "Salesforce/wikitext"), card)


def expected(config: str) -> dict:
    texts = {name: [f" = {config} {split} = \n", f" {split} \n"] for name, split in
             (("train", "train"), ("dev", "validation"))}  # fmt: skip
    return {"name": f"Salesforce/wikitext:{config}", "revision": REVISION, **texts}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    with serving({"Salesforce/wikitext": write_repository(tmp_path / "repository")}) as server:
        yield server


@pytest.mark.slow
def test_from_the_hub_and_then_without_it(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    home = tmp_path / "home"
    asked_for = ("wikitext-103", "Salesforce/wikitext", "Salesforce/wikitext:none", "nobody/nothing")
    (first, ambiguous, unknown, missing), _ = ask(*asked_for, home=home, endpoint=endpoint)
    assert first == expected("wikitext-103-raw-v1")
    for answer in (ambiguous, unknown):
        assert "type one of Salesforce/wikitext:wikitext-103-raw-v1, Salesforce/wiki" in answer["error"]
    assert "no such data set" in missing["error"]
    downloads = [path for path in hub.asked if path.startswith("/resolve/")]
    assert downloads
    assert not [path for path in downloads if "/test-" in path or "wikitext-2-" in path]
    (again, other), _ = ask("wikitext-103", "wikitext-2", home=home)
    assert again == first
    assert "cannot be reached" in other["error"]


@pytest.mark.slow
@pytest.mark.parametrize("card", [CARD, ""])
def test_from_the_hubs_cache(card, tmp_path):
    folder = cached_repository(tmp_path, card)
    answers, opened = ask("wikitext-103", "wikitext-2", "Salesforce/wikitext:wikitext-2-raw-v1", home=tmp_path)
    assert answers == [expected(CONFIGS[0]), expected(CONFIGS[1]), expected(CONFIGS[1])]
    assert [path for path in opened if "/train-" in path]
    assert not [path for path in opened if "/test-" in path]
    (folder / CONFIGS[1] / "validation-00000-of-00001.parquet").unlink()
    one_of_two = folder / CONFIGS[0] / "train-00000-of-00001.parquet"
    one_of_two.rename(one_of_two.with_name("train-00000-of-00002.parquet"))
    answers, _ = ask("wikitext-103", *(["wikitext-2"] if card else []), home=tmp_path)
    for answer in answers:
        assert "holds all of it" in answer["error"]


@pytest.mark.slow
def test_from_what_load_dataset_left(hub, tmp_path):
    home, endpoint = tmp_path / "home", f"http://127.0.0.1:{hub.server_port}"
    run(PREPARE, "Salesforce/wikitext", CONFIGS[0], home=home, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    for _ in range(2):
        (answer, other), opened = ask("wikitext-103", "wikitext-2", home=home)
        assert answer == expected(CONFIGS[0])
        assert "cannot be reached" in other["error"]
        assert [path for path in opened if "wikitext-train" in path or "/train-" in path]
        assert not [path for path in opened if "wikitext-test" in path or "/test-" in path]
        shutil.rmtree(home / "hub", ignore_errors=True)  # then from the prepared files


def test_nowhere_is_a_sentence_with_the_places_and_the_three_ways(tmp_path):
    (answer,), _ = ask("wikitext-103", home=tmp_path)
    error = answer["error"]
    places = ("wikitext-103", str(tmp_path / "hub"), str(tmp_path / "datasets"))
    for part in (*places, "HF_HOME", "--data FOLDER", "train.txt", "valid.txt", "--data builtin"):
        assert part in error
    assert "\n" not in error
