"""Locks with real processes: who holds one, who lives, who is given up."""

from __future__ import annotations

import os
import subprocess
import sys
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
