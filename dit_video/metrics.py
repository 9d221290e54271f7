"""What a run says of itself: metrics as JSON lines and TensorBoard events, and a progress line on stderr.

T frames, Y x X pixels, 3 colours. Numbers are Python's or numpy's: nothing here knows of devices.
"""

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import deque

import numpy as np
from absl import logging
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from dit_video.gallery import gif_bytes, plain

FLUSH_SECONDS = 30  # how often TensorBoard's file, and a remote metrics.jsonl, are brought up to date


def read_metrics(path):
    """The objects of a metrics.jsonl, as dicts; "NaN", "Infinity" and "-Infinity" are numbers again.

    A line that is not JSON (the last one of a run killed while writing it) is left out with a warning.
    """
    records = []
    for n, line in enumerate(epath.Path(path).read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            logging.warning("%s: line %d was cut off and is left out.", path, n)
            continue
        records.append({k: float(v) if v in ("NaN", "Infinity", "-Infinity") else v for k, v in record.items()})
    return records


class MetricsWriter:
    """Writes WORKDIR/metrics.jsonl and WORKDIR/tensorboard/, as a context manager; one process only.

    A run that resumes at `start_step` logs the later steps again: their metrics are cut from metrics.jsonl, and
    TensorBoard is told to forget them. Step 0 is a run's beginning: nothing that lies there is kept.

    On a local path every line is on its way to the disk when `write` returns. On a remote one (gs://, s3://), where
    files cannot grow, both files are kept here and written whole every FLUSH_SECONDS and by `flush`: call it when a
    checkpoint is saved.
    """

    def __init__(self, workdir, start_step=0):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._events_dir = epath.Path(workdir) / "tensorboard"
        self._events_dir.mkdir(parents=True, exist_ok=True)
        self._remote = "://" in os.fspath(self._path)
        first_step = start_step + 1 if start_step else 0
        kept = read_metrics(self._path) if self._path.exists() else []
        self._lines = [_line(record) for record in kept if record["step"] < first_step]
        if self._remote:
            self._local_dir = tempfile.TemporaryDirectory()
        else:
            # Replaced in one go: a kill right here must not lose the history.
            cut = self._path.with_suffix(".cut")
            cut.write_text("".join(self._lines))
            cut.replace(self._path)
        # tensorboardX's own SummaryWriter writes from a thread, and its flush() does not wait for that thread.
        # It names files by the second; the suffix keeps a quick restart from overwriting its predecessor.
        prefix = os.path.join(self._local_dir.name if self._remote else self._events_dir, "events")
        self._events = EventsWriter(prefix, f".{len(list(self._events_dir.glob('events*')))}")
        self._event(first_step, session_log=SessionLog(status=SessionLog.START))
        self._next_flush = 0.0
        self.flush()

    def write(self, step, metrics):
        """Logs {name: number} at `step`. Raises ValueError for what is not one number."""
        values = {}
        for name, value in metrics.items():
            value = np.asarray(value)
            if value.size != 1 or value.dtype.kind not in "biufV":  # V: bfloat16
                raise ValueError(
                    f"metric {name!r} at step {step} is {value.dtype} {value.shape}: a metric is one number. "
                    "Log its mean, or each part under a name of its own."
                )
            values[name] = value.astype(np.float64).item() if value.dtype.kind in "fV" else value.item()
        line = _line({"step": int(step)} | values)
        if self._remote:
            self._lines.append(line)
        else:
            with self._path.open("a") as file:
                file.write(line)
        for name, value in values.items():
            self._event(step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))
        self._flush_when_due()

    def video(self, step, name, video_TxYxXx3, fps):
        """Shows a uint8 video in TensorBoard's image tab, as a GIF (its own video summary needs moviepy)."""
        _, height, width, _ = video_TxYxXx3.shape
        gif = gif_bytes(video_TxYxXx3, fps)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        self._event(step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))
        self._flush_when_due()

    def text(self, step, name, text):
        """Shows a text (Markdown) in TensorBoard's text tab."""
        self._event(step, summary=summary.text(name, text))
        self._flush_when_due()

    def flush(self):
        """Brings all files up to date."""
        self._events.flush()
        if self._remote:
            self._path.write_text("".join(self._lines))
            for path in epath.Path(self._local_dir.name).iterdir():
                (self._events_dir / path.name).write_bytes(path.read_bytes())
        self._next_flush = time.monotonic() + FLUSH_SECONDS

    def close(self):
        self.flush()
        self._events.close()
        if self._remote:
            self._local_dir.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _event(self, step, **content):
        self._events.write_event(Event(wall_time=time.time(), step=int(step), **content))

    def _flush_when_due(self):
        if time.monotonic() >= self._next_flush:
            self.flush()


def _line(record):
    return json.dumps(plain(record), allow_nan=False) + "\n"


class Progress:
    """How far a run is: `step 120/1000 [===       ] 12% loss 0.1234  34.5k tokens/s  elapsed 1:02  left 8:20`.

    On a terminal one line, redrawn up to 5 times a second; elsewhere (log files, notebooks) a line every 10 seconds.
    Rates are those of the last 30 seconds or so, so that the compilation of the first step does not count for long.
    `clock` gives seconds.
    """

    def __init__(self, total, start=0, stream=None, clock=time.monotonic):
        self._total, self._start, self._stream, self._clock = total, start, stream or sys.stderr, clock
        self._terminal = self._stream.isatty()
        self._began = clock()
        self._window = deque([(self._began, start, 0)])  # (time, step, tokens so far)
        self._drawn = -math.inf
        self._loss = None

    def update(self, step, loss=None, tokens=0):
        """`step` is done, after `tokens` more tokens; `loss` may be a step late, or None for the last one known."""
        now = self._clock()
        self._loss = self._loss if loss is None else float(loss)
        self._window.append((now, step, self._window[-1][2] + tokens))
        while len(self._window) > 2 and now - self._window[0][0] > 30:
            self._window.popleft()
        if now - self._drawn >= (0.2 if self._terminal else 10) or step >= self._total:
            self._drawn = now
            self._draw(now, step)

    def _draw(self, now, step):
        (then, step_then, tokens_then), (_, _, tokens) = self._window[0], self._window[-1]
        per_second = 1 / max(now - then, 1e-9)
        left = (self._total - step) / max((step - step_then) * per_second, 1e-9)
        done = step / max(self._total, 1)
        parts = [f"step {step}/{self._total} [{'=' * int(20 * done):20}] {done:.0%}"]
        parts += [f"loss {self._loss:.4f}"] * (self._loss is not None)
        parts += [f"{_short((tokens - tokens_then) * per_second)} tokens/s"] * (tokens > 0)
        parts += [f"elapsed {_duration(now - self._began)}", f"left {_duration(left)}"]
        line = "  ".join(parts)
        if self._terminal:
            self._stream.write("\r\033[K" + line[: shutil.get_terminal_size().columns - 1])
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self):
        """Ends the terminal's line."""
        if self._terminal and self._drawn > -math.inf:
            self._stream.write("\n")
            self._stream.flush()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def _short(number):
    """12345.6 as 12.3k."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


def _duration(seconds):
    """3725 seconds as 1:02:05."""
    minutes, seconds = divmod(int(min(seconds, 359_999_999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
