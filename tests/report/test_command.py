"""`finemask report` as it is typed."""

import argparse
from pathlib import Path

import pytest

from finemask_ds.commands.report import add_report
from finemask_ds.errors import UserError
from tests.report.fakes import small, write


def run(*words):
    parser = argparse.ArgumentParser()
    add_report(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["report", *map(str, words)])
    arguments.handler(arguments)


def test_the_page_is_named_and_what_was_left_out_told(tmp_path, capsys):
    small(tmp_path)
    write(tmp_path / "more" / "result.json", {"kind": "finetune", "task": "mrpc"})
    run(tmp_path)
    shown = capsys.readouterr()
    assert Path(shown.out.strip()) == tmp_path / "report" / "index.html"
    assert Path(shown.out.strip()).is_file()
    assert str(tmp_path / "more" / "result.json") in shown.err


def test_out_is_where_it_was_asked_for(tmp_path, capsys):
    small(tmp_path / "runs")
    run(tmp_path / "runs", "--out", tmp_path / "there")
    assert (tmp_path / "there" / "index.html").is_file()
    assert not (tmp_path / "runs" / "report").exists()


def test_a_folder_without_results_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="type the folder"):
        run(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_users_error(tmp_path):
    small(tmp_path / "runs")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name a folder you may write"):
        run(tmp_path / "runs", "--out", tmp_path / "file" / "below")
