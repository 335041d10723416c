"""The head's checks on real files and, for ssh, on a program of that name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finemask_ds.doctor.finding import Finding
from finemask_ds.doctor.hostfile import check_forwarded, check_hosts, check_launcher, read_hostfile
from finemask_ds.doctor.versions import installed
from finemask_ds.errors import UserError


def written(folder: Path, text: str) -> Path:
    (folder / "hosts").write_text(text)
    return folder / "hosts"


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    path = written(tmp_path, "# the cluster\nnode2 slots=8\n\n  node1   slots=4  max-slots=9\n10.0.0.3 slots=1")
    assert read_hostfile(path) == {"node2": 8, "node1": 4, "10.0.0.3": 1} == fetch_hostfile(str(path))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("node1 slots=2\nnode2\n", "line 2 of PATH is 'node2'; write for instance: node1 slots=8"),
        ("node1 slots=two", "line 1 of PATH is 'node1 slots=two'"),
        ("node1 slots=1\n#\nnode1 slots=1", "line 3 of PATH names node1 again"),
        ("-oProxyCommand=x slots=1", "line 1 of PATH is '-oProxyCommand=x slots=1'"),
        ("a;b slots=1", "line 1 of PATH is 'a;b slots=1'"),
        ("# nothing\n", "PATH has no host"),
        ("node1 slots=0", "a host of 0 slots"),
    ],
)
def test_an_impossible_hostfile_is_a_sentence_that_names_the_line(tmp_path, text, sentence):
    path = written(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_hostfile(path)
    assert sentence.replace("PATH", str(path)) in str(error.value)


def test_a_missing_hostfile_is_refused_where_deepspeed_would_go_on_alone(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


def bad(findings: list[Finding]) -> list[str]:
    return [str(finding) for finding in findings if finding.level == "bad"]


def test_slots_pdsh_and_folder_are_looked_at(tmp_path, monkeypatch):
    hosts = {"node1": 2, "node2": 2}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pdsh").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert bad([*check_launcher(hosts, Path("h"), 4)]) == []
    (line,) = bad([*check_launcher(hosts, Path("h"), 5)])
    assert line == "bad   hostfile: h has 2 host(s) with 4 slot(s); --ranks asks for 5: change slots= or --ranks"
    monkeypatch.setenv("PATH", str(tmp_path))
    (line,) = bad([*check_launcher(hosts, Path("h"), 0)])
    assert "apt-get install pdsh" in line
    assert bad([*check_launcher({"localhost": 4}, Path("h"), 4)]) == [], "on one host the launcher needs no pdsh"
    (line,) = bad([*check_launcher({"elsewhere.invalid": 4}, Path("h"), 4)])
    assert "starts elsewhere.invalid's ranks here; type it on that host" in line
    (tmp_path / "a;b").mkdir()
    monkeypatch.chdir(tmp_path / "a;b")
    assert any("unquoted" in line for line in bad([*check_launcher(hosts, Path("h"), 4)]))


def test_the_file_of_forwarded_variables_is_read_before_the_launcher_breaks_off_on_it(tmp_path):
    path = tmp_path / "env"
    path.write_text("DS_ACCELERATOR=cpu\n\nGLOO_SOCKET_IFNAME=eth0\n")
    (line,) = bad([*check_forwarded([path])])
    assert f"line 2 of {path} is ''" in line
    path.write_text("A=1\nB=2\n")
    assert [*check_forwarded([path])] == []
    path.write_text("HF_TOKEN=hf_s3cret\n")
    (finding,) = check_forwarded([path])
    assert finding.level == "note"
    assert finding.found.startswith(f"HF_TOKEN in line 1 of {path} is shown to all users")
    assert "s3cret" not in str(finding)
    path.write_text("A=$(touch x)\n")
    (finding,) = check_forwarded([path])
    assert (finding.level, finding.found) == (
        "note",
        f"the value of A in line 1 of {path} is obeyed by the hosts' shells",
    )


@pytest.mark.slow
def test_hosts_are_asked_over_ssh_at_once_and_what_they_lack_is_named(tmp_path, monkeypatch):
    """The ssh of this test runs the command here, but for hosts that are down, locked, bare or another's."""
    here = json.dumps(installed())
    other = json.dumps({**installed(), "torch": "1.0"})
    (tmp_path / "ssh").write_text(f"""#!/bin/bash
while [ "$1" = -o ]; do shift 2; done
case $1 in
  up) shift; exec sh -c "$*";;
  down) sleep 60;;
  locked) echo "Permission denied (publickey)." >&2; exit 255;;
  bare) echo "sh: python: not found" >&2; exit 127;;
  chatty) echo "Welcome!"; echo '{here}';;
  old) echo '{other}';;
esac
""")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("finemask_ds.doctor.hostfile.SSH_SEC", 5.0)
    lines = [
        str(finding) for finding in check_hosts(dict.fromkeys(("up", "down", "locked", "bare", "chatty", "old"), 1))
    ]
    expected = [
        "bad   ssh: down did not answer within 5 s; try: ssh -o BatchMode=yes",
        "bad   ssh: locked does not let us in (Permission denied (publickey).); try: ",
        "bad   ssh: bare has no finemask_ds for ",
        "bad   ssh: chatty says something else than it was asked ('Welcome!",
        "ok    ssh: up, old answer(s) without a password",
        "bad   versions: torch is 1.0 on old, ",
    ]
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines
