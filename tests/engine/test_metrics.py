import io
import json
import os
import pty
import re
import shutil
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finemask_ds.engine.metrics import Destination, Jsonl, Recorder, TensorBoardWriter
from finemask_ds.engine.progress import Console
from finemask_ds.errors import UserError
from finemask_ds.units import duration, readable


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Kept(Destination):
    def __init__(self):
        self.taken = []

    def write(self, step, values):
        self.taken.append((step, dict(values)))


# ---------------------------------------------------------------- recorder


def test_a_flush_gives_the_weighted_mean_of_its_interval_and_starts_a_new_one():
    kept = Kept()
    recorder = Recorder([kept])
    losses = torch.tensor([3.0, 5.0, 1.0], dtype=torch.float32, requires_grad=True)
    for loss, tokens in zip(losses, (1, 2, 5), strict=True):
        recorder.record("train/loss", loss, torch.tensor(tokens))
    recorder.record("speed/x", 2.0)
    recorder.record("speed/x", 4.0)
    recorder.record_last("lr/mask", 1.0)
    recorder.record_last("lr/mask", 0.5)
    values = recorder.flush(3)
    assert values == {"lr/mask": 0.5, "speed/x": 3.0, "train/loss": 18 / 8}
    assert list(values) == sorted(values)
    recorder.record("speed/x", 7.0)
    assert recorder.flush(4) == {"speed/x": 7.0}
    assert kept.taken == [(3, values), (4, {"speed/x": 7.0})]
    assert recorder.flush(5) == {}


def test_a_value_changed_in_place_after_it_was_recorded_keeps_what_it_was():
    recorder = Recorder()
    value = torch.ones((), dtype=torch.float64)  # already of the dtype that sums are kept in
    recorder.record("a", value)
    recorder.record_last("b", value)
    value.add_(1)
    assert recorder.flush(1) == {"a": 1.0, "b": 1.0}


def test_nothing_measured_is_left_out_and_a_vector_is_refused():
    recorder = Recorder()
    recorder.record("a", torch.tensor(float(0)), weight=0)
    assert recorder.flush(1) == {}
    with pytest.raises(ValueError, match="one number"):
        recorder.record("a", torch.zeros(2))


def all_reduce(vector):
    distributed.all_reduce(vector)
    return vector


def flush_in_two_processes(rank, folder, port_file):
    distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    recorder = Recorder([Jsonl(folder / "metrics.jsonl")] if rank == 0 else [], all_reduce)
    for step in range(8):
        if step % 2 == rank:
            record_step(recorder, step)
    values = recorder.flush(8)
    recorder.record("only/this", 1.0) if rank else recorder.record("only/that", 1.0)
    try:
        recorder.flush(9)
        values["refused"] = ""
    except RuntimeError as error:
        values["refused"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(values))
    distributed.destroy_process_group()


def record_step(recorder, step):
    """Values whose sums are exact in binary, in any order."""
    recorder.record("train/loss", torch.tensor(step / 8), weight=step)
    recorder.record("train/accuracy", step / 4, weight=torch.tensor(2.0))
    recorder.record_last("lr/mask", 0.25)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    multiprocessing.spawn(flush_in_two_processes, (tmp_path, tmp_path / "meet"), nprocs=2)
    single = Recorder()
    for step in range(8):
        record_step(single, step)
    expected = single.flush(8)
    assert set(expected) == {"train/loss", "train/accuracy", "lr/mask"}
    for rank, name in enumerate(("only/that", "only/this")):
        values = json.loads((tmp_path / f"{rank}.json").read_text())
        refused = values.pop("refused")
        assert values == expected
        assert "different metrics" in refused
        assert name in refused
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line.items() >= expected.items()


# ---------------------------------------------------------------- JSONL


def test_jsonl_has_step_and_time_and_strict_json(tmp_path):
    path = tmp_path / "d" / "metrics.jsonl"
    with Recorder([Jsonl(path)]) as recorder:
        for step in (1, 2):
            recorder.record("train/loss", 0.1 * step)
            recorder.record_last("lr", float("inf"))
            recorder.flush(step)
    first, second = lines(path)
    assert first.keys() == {"step", "time", "train/loss", "lr"}
    assert (first["step"], second["step"]) == (1, 2)
    assert first["time"] <= second["time"]
    assert first["train/loss"] == 0.1
    assert first["lr"] is None


def test_a_rewind_drops_later_steps_and_the_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Jsonl(path)
    for step in range(10, 60, 10):
        log.write(step, {"loss": step / 2})
    whole = path.read_bytes().splitlines(keepends=True)
    with open(path, "ab") as stream:
        stream.write(b'{"step": 60, "ti')
    log.rewind(30)
    assert path.read_bytes() == b"".join(whole[:3])
    log.write(40, {"loss": 0})
    assert [line["step"] for line in lines(path)] == [10, 20, 30, 40]
    log.close()
    Jsonl(tmp_path / "none.jsonl").rewind(3)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_appending_after_a_kill_does_not_join_the_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 0}\n{"step": 2, "ti')
    Jsonl(path).write(2, {})
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_a_sentence_and_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
        Jsonl(path).rewind(3)
    assert path.read_text() == '{"step": 1}\nhello\n{"step": 3}\n'


# TensorBoard's own thread tells too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard_is_a_sentence(small_disk):
    """Its writer is another thread, whose error comes with a later call and names no file."""

    def write_on():
        for step in range(1000):
            writer.write(step, {f"loss/{number}": 1.0 for number in range(100)})

    writer = TensorBoardWriter(small_disk / "tb")
    writer.write(1, {"loss": 1.0})
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    for attempt in (write_on, writer.close):
        with pytest.raises(UserError, match=rf"disk is full at {small_disk}/tb"):
            attempt()
    writer.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_a_sentence():
    log = Jsonl(Path("/dev/full"))
    for attempt in (lambda: log.write(1, {}), log.close):
        with pytest.raises(UserError, match=r"disk is full at /dev/full"):
            attempt()
    log.close()


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_reads_back_scalars_images_and_histograms(tmp_path):
    pixels = numpy.zeros((5, 7, 3), dtype=numpy.uint8)
    with Recorder([TensorBoardWriter(tmp_path)]) as recorder:
        for step in (10, 20):
            recorder.record("train/loss", step / 4)
            recorder.image("map", pixels)
            recorder.histogram("margin", torch.tensor([[-1.0, 2.0, 3.0, float("inf")]], requires_grad=True))
            recorder.flush(step)
        recorder.record("train/loss", 1.0)
        recorder.flush(30)
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert scalars == [(10, 2.5), (20, 5.0), (30, 1.0)]
    images = events.Images("map")
    assert [(image.step, image.height, image.width) for image in images] == [(10, 5, 7), (20, 5, 7)]
    histogram = events.Histograms("margin")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (3, -1.0, 3.0, 4.0)


def test_a_resumed_run_hides_what_the_killed_one_logged_later(tmp_path):
    killed = TensorBoardWriter(tmp_path)
    for step in (1, 2, 3, 4):
        killed.write(step, {"loss": step})
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which begin with the second
    resumed = TensorBoardWriter(tmp_path, purge_step=3)  # `killed` was never closed
    resumed.write(3, {"loss": 30})
    resumed.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 30)]
    killed.close()


def test_a_writer_that_was_given_nothing_leaves_no_file(tmp_path):
    TensorBoardWriter(tmp_path / "tb").close()
    Jsonl(tmp_path / "metrics.jsonl").close()
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- console


def test_off_a_terminal_there_are_plain_lines():
    stream, now = io.StringIO(), iter([0.0, 200.0, 300.0, 1000.0])
    console = Console(2000, start_step=0, stream=stream, clock=lambda: next(now))
    values = {"train/mlm_loss": 3.21, "speed/tokens_per_sec": 12345.6, "mask/flips/Q": 0.1}
    for step in (100, 1000, 2000):
        console.write(step, values)
    console.close()
    shown = "train/mlm_loss 3.21  speed/tokens_per_sec 12,346"
    assert stream.getvalue().splitlines() == [
        f"step 100/2000  {shown}  eta 1 h 3 min",
        f"step 1000/2000  {shown}  eta 5 min 0 s",
        f"step 2000/2000  {shown}",
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())


def test_a_resumed_run_does_not_count_the_steps_before_it():
    stream, now = io.StringIO(), iter([0.0, 10.0])
    Console(120, start_step=100, stream=stream, clock=lambda: next(now)).write(110, {})
    assert stream.getvalue() == "step 110/120  eta 10 s\n"


def test_on_a_terminal_there_is_a_bar_with_loss_speed_and_time_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    ours, theirs = pty.openpty()
    seen = bytearray()

    def read():
        try:
            while piece := os.read(ours, 4096):
                seen.extend(piece)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    now = iter([0.0, 60.0])
    with open(theirs, "w", encoding="utf-8") as terminal:
        console = Console(40, stream=terminal, clock=lambda: next(now))
        console.write(10, {"train/kd_loss": 0.125, "lr/mask": 1.0, "speed/tokens_per_sec": 4321.0})
        console.close()
    reader.join(10)
    os.close(ours)
    text = seen.decode()
    assert "\x1b[" in text
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    for words in ("10/40", "kd_loss 0.125", "4,321 tokens/s", "3 min 0 s"):
        assert words in shown
    assert "mask" not in shown


def test_numbers_and_durations_are_readable():
    assert [readable(x) for x in (0.0, 0.0123456, 3.21, 999.4, -1234.5)] == [
        "0",
        "0.01235",
        "3.21",
        "999.4",
        "-1,234",
    ]
    assert [readable(x) for x in (float("nan"), float("inf"))] == ["nan", "inf"]
    seconds = (0, 59.4, 60, 190, 3600, 7500, 86400 * 3 + 4 * 3600)
    expected = ["0 s", "59 s", "1 min 0 s", "3 min 10 s", "1 h 0 min", "2 h 5 min", "3 d 4 h"]
    assert [duration(x) for x in seconds] == expected
