"""Metrics survive kills and resumes, TensorBoard gets what it was sent, and progress is readable. T, Y, X: a video."""

import io
import json
import math
import re
import subprocess
import sys

import fsspec
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dit_video.metrics import MetricsWriter, Progress, read_metrics


class Store(MemoryFileSystem):
    """An object store in memory, under the name of s3://."""

    protocol = "s3"

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("s3://"))


def events(workdir):
    """What TensorBoard reads, in its order: records of length, checksum, content, checksum."""
    found = []
    for path in sorted((epath.Path(workdir) / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(workdir):
    """(step, name, value) of what TensorBoard shows: a session that starts at a step supersedes what follows it."""
    shown = []
    for event in events(workdir):
        if event.session_log.status == SessionLog.START:
            shown = [point for point in shown if point[0] < event.step]
        shown += [(event.step, v.tag, v.simple_value) for v in event.summary.value if v.HasField("simple_value")]
    return shown


def test_what_is_written_is_read(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(1, {"loss": np.float32(0.5), "tokens": np.int64(1 << 40), "lr": 1e-4})
        writer.write(np.int64(2), {"eval/loss": np.array([0.25]), "half": ml_dtypes.bfloat16(0.5)})
    assert read_metrics(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "tokens": 1 << 40, "lr": 1e-4},
        {"step": 2, "eval/loss": 0.25, "half": 0.5},
    ]
    points = [(1, "loss", 0.5), (1, "tokens", 1 << 40), (1, "lr", 1e-4), (2, "eval/loss", 0.25), (2, "half", 0.5)]
    assert scalars(tmp_path / "new" / "run") == [(step, name, np.float32(value)) for step, name, value in points]


def test_numbers_that_are_not_finite_are_legal_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": np.float32(np.inf), "c": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("value", [np.zeros(2), "high", None, 1j])
def test_what_is_not_a_number_is_refused_by_name(tmp_path, value):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="'loss' at step 3"):
        writer.write(3, {"loss": value})


@pytest.mark.parametrize(("start_step", "kept"), [(0, []), (4, [0, 1, 2, 3, 4]), (99, [*range(8)])])
def test_a_resumed_run_logs_no_step_twice(tmp_path, start_step, kept):
    with MetricsWriter(tmp_path) as writer:
        for step in range(8):
            writer.write(step, {"loss": step + 0.5, "grad_norm": math.nan})
    with MetricsWriter(tmp_path, start_step) as writer:
        writer.write(start_step + 1, {"loss": 0.0})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [*kept, start_step + 1]
    assert [record["loss"] for record in records] == [*(step + 0.5 for step in kept), 0.0]
    assert all(math.isnan(record["grad_norm"]) for record in records[:-1])
    shown = [(step, loss) for step, name, loss in scalars(tmp_path) if name == "loss"]
    assert shown == [*((step, step + 0.5) for step in kept), (start_step + 1, 0.0)]


def test_a_killed_run_loses_no_line(tmp_path):
    program = (
        "import os, signal, sys; from dit_video.metrics import MetricsWriter; writer = MetricsWriter(sys.argv[1])\n"
        "for step in (1, 2, 3): writer.write(step, {'loss': 0.5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_torn_last_line_is_left_out_and_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 0.5})
    whole = path.read_bytes()
    second_end = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for end in range(second_end + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert [record["step"] for record in read_metrics(path)] in ([1, 2], [1, 2, 3])
    path.write_bytes(whole[:-5])
    with MetricsWriter(tmp_path, start_step=3) as writer:
        writer.write(4, {"loss": 0.25})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4]


def test_tensorboard_gets_the_gif_itself(tmp_path):
    video_TxYxXx3 = np.zeros((5, 6, 10, 3), np.uint8)
    for t in range(5):
        video_TxYxXx3[t, :, t] = 255
    with MetricsWriter(tmp_path) as writer:
        writer.video(7, "samples/0", video_TxYxXx3, fps=4)
        writer.text(7, "samples/0", "a line moves")
    values = [(event.step, value) for event in events(tmp_path) for value in event.summary.value]
    (step, image), (_, text) = values
    assert (step, image.tag, image.image.height, image.image.width) == (7, "samples/0", 6, 10)
    gif = Image.open(io.BytesIO(image.image.encoded_image_string))
    assert (gif.format, gif.n_frames, gif.info["duration"]) == ("GIF", 5, 250)
    assert text.tensor.string_val == [b"a line moves"]
    assert text.metadata.plugin_data.plugin_name == "text"


def test_flush_brings_all_files_up_to_date(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(50):
        writer.write(step, {"loss": step})
    writer.flush()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == len(scalars(tmp_path)) == 50
    writer.close()


def test_an_object_store_holds_the_metrics_after_a_flush():
    fsspec.register_implementation("s3", Store, clobber=True)
    workdir = epath.Path("s3://bucket/run")
    writer = MetricsWriter(workdir)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 0.5})
    writer.flush()
    del writer  # killed
    with MetricsWriter(workdir, start_step=2) as writer:
        writer.write(3, {"loss": 0.25})
    assert [(record["step"], record["loss"]) for record in read_metrics(workdir / "metrics.jsonl")] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.25),
    ]
    assert scalars(workdir) == [(1, "loss", 0.5), (2, "loss", 0.5), (3, "loss", 0.25)]


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def progress_of(seconds_per_step, total, terminal, start=0):
    """What is written by a run of steps of that length, 1000 tokens each."""
    stream, now = Stream(terminal), 0.0
    with Progress(total, start, stream, clock=lambda: now) as progress:
        for step in range(start + 1, total + 1):
            now += seconds_per_step
            progress.update(step, loss=1 / step, tokens=1000)
    return stream.getvalue()


def test_a_log_file_gets_a_plain_line_every_ten_seconds():
    text = progress_of(0.5, total=100, terminal=False)
    assert "\r" not in text
    lines = text.splitlines()
    assert [int(re.match(r"step (\d+)/100", line)[1]) for line in lines] == [1, 21, 41, 61, 81, 100]
    assert "2k tokens/s" in lines[2]
    assert "elapsed 0:20" in lines[2]
    assert "left 0:29" in lines[2]  # 59 steps of half a second
    assert "loss 0.0244" in lines[2]
    assert "left 0:00" in lines[-1]


def test_a_terminal_gets_one_line_redrawn_at_most_five_times_a_second():
    text = progress_of(0.01, total=1000, terminal=True)
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert 40 <= text.count("\r") <= 52  # of 10 seconds


def test_progress_of_a_resumed_run_counts_from_its_start():
    """99% of the steps lie behind, none of the time does."""
    lines = progress_of(20.0, total=1000, terminal=False, start=990).splitlines()
    for line, step, left in [(lines[0], 991, "3:00"), (lines[4], 995, "1:40")]:
        assert line.startswith(f"step {step}/1000")
        assert f"left {left}" in line
        assert "50 tokens/s" in line
