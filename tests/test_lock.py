"""Locks with real processes: who holds one, who lives, who is given up."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from finemask_ds.errors import UserError
from finemask_ds.lock import Holder, Lock, host_of, new_name, process_name

HOLD = """
import sys, time
from pathlib import Path
from finemask_ds.lock import Lock
Lock(Path(sys.argv[1])).acquire()
print(flush=True)
time.sleep(600)
"""


def test_one_holds_it_until_the_release(tmp_path):
    one, two = Lock(tmp_path / "new" / "lock"), Lock(tmp_path / "new" / "lock")
    assert one.holder() is None
    assert one.acquire()
    assert not two.acquire()
    two.release()
    holder = two.holder()
    assert holder is not None
    assert holder.name == one.me
    assert not holder.is_dead(60)
    one.release()
    assert two.holder() is None
    assert two.acquire()
    assert os.listdir(tmp_path / "new") == ["lock"]


def test_a_process_of_this_machine_that_is_gone_is_dead_at_once(tmp_path):
    lock = Lock(tmp_path / "lock")
    process = subprocess.Popen([sys.executable, "-c", HOLD, lock.path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    holder = lock.holder()
    assert holder is not None
    assert holder.name.startswith(process_name(process.pid))
    assert not holder.is_dead(60)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert holder.is_dead(60), "a zombie"
    process.communicate(timeout=60)
    assert holder.is_dead(60)
    assert not lock.acquire(), "dead, yet not broken"
    assert lock.break_if_held_by(holder.name)
    assert lock.acquire()
    assert not lock.break_if_held_by(holder.name), "another has taken it over"


def test_of_another_machine_only_silence_tells(tmp_path):
    gone = process_name(2**22 - 1)
    assert Holder(f"{gone}00000000", 0.0).is_dead(60)
    elsewhere = gone.replace("@", "@other-").partition("@")
    name = f"{''.join(elsewhere)}00000000"
    assert host_of(name).startswith("other-")
    assert not Holder(name, 59.0).is_dead(60)
    assert Holder(name, 61.0).is_dead(60)
    assert Holder("", 61.0).is_dead(60)
    assert not Holder("", 0.0).is_dead(60)
    assert host_of("") == "an unknown host"


def test_the_heartbeat_keeps_it_from_falling_silent(tmp_path):
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    os.utime(lock.path, (0, 0))
    silent = lock.holder()
    assert silent is not None
    assert silent.is_dead(1e6)
    deadline = time.monotonic() + 60
    with lock.heartbeat(0.01):
        while (holder := lock.holder()) is None or holder.is_dead(1e6):
            assert time.monotonic() < deadline


def test_a_dead_holder_does_not_keep_others_waiting(tmp_path):
    Lock(tmp_path / "lock", me=f"{process_name(2**22 - 1)}00000000").acquire()
    with Lock(tmp_path / "lock").held() as nothing:
        assert nothing is None
        assert not Lock(tmp_path / "lock").acquire()
    assert os.listdir(tmp_path) == []


def test_names_are_never_given_twice():
    assert len({new_name() for _ in range(100)}) == 100


def test_a_folder_that_cannot_be_written_is_a_sentence_with_advice(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file \(.*\): type --root FOLDER$"):
        Lock(tmp_path / "file" / "lock", advice="type --root FOLDER").acquire()


def test_a_lock_that_another_has_taken_over_meanwhile_stays(tmp_path, monkeypatch):
    """Between the look at a dead holder and the removal, others may have removed the lock and taken it."""
    mine, theirs = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    theirs.acquire()
    monkeypatch.setattr(mine, "holder", lambda: Holder("dead", 100.0))
    assert not mine.break_if_held_by("dead")
    assert (tmp_path / "lock").read_text() == theirs.me
    assert os.listdir(tmp_path) == ["lock"]


@pytest.mark.parametrize("taken_anew", [False, True])
def test_a_lock_that_a_network_file_system_loses_while_it_is_read_is_released(tmp_path, monkeypatch, taken_anew):
    mine, theirs = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    mine.acquire()
    opened = []

    def open_on_nfs(path, **how):
        opened.append(path)
        if taken_anew and len(opened) == 2:
            return open(path, **how)
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("finemask_ds.lock.open", open_on_nfs, raising=False)
    holder = theirs.holder()
    assert (holder and holder.name) == (mine.me if taken_anew else None)
    assert len(opened) == 2


def test_what_is_owned_is_refused_while_its_owner_lives_and_taken_over_when_not(tmp_path):
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    refused = Lock(path).owned("runs/a", wait=False)
    with pytest.raises(UserError, match=f"runs/a is in use by process {process.pid} on "), refused:
        pass
    process.kill()
    process.communicate(timeout=60)
    with Lock(path).owned("runs/a", wait=False):
        assert path.exists()
    assert not path.exists()


def test_of_an_owner_on_another_host_the_next_beat_tells(tmp_path):
    path, elsewhere = tmp_path / "lock", process_name(2**22 - 1).replace("@", "@other-") + "00000000"
    path.write_text(elsewhere)
    os.utime(path, (time.time() - 50, time.time() - 50))
    with Lock(path).owned("runs/a", wait=False, stale_sec=51, poll_sec=0.05):
        assert path.read_text() != elsewhere, "fell silent for too long while it was watched"
    path.write_text(elsewhere)
    beating = threading.Timer(0.3, os.utime, [path])
    os.utime(path, (time.time() - 5, time.time() - 5))
    beating.start()
    refused = Lock(path).owned("runs/a", wait=False, poll_sec=0.05)
    with pytest.raises(UserError, match="runs/a is in use by process 4194303 on other-"), refused:
        pass
    beating.join()


def test_who_wants_what_is_left_waits_for_it(tmp_path):
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    release = threading.Timer(0.3, lock.release)
    release.start()
    with Lock(lock.path).owned("cache/head", wait=True, poll_sec=0.05):
        assert not release.is_alive() or release.finished.is_set()
    release.join()
