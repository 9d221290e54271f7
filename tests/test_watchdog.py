"""A process that no longer gets on ends itself and says where it is, alone and as one of two."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from test_layers import ROOT
from test_processes import ENDS, ended, printed, start, when
from test_resume import children, complete, gone

STUCK = ROOT / "tests" / "stuck.py"

# Patience is 1.5 s. What moves, the first steps, and what waits for others may last longer; the last has a child.
SLOW_THEN_STUCK = """
import multiprocessing, time
from dit_video import watchdog

def decode_without_end():
    while True:
        time.sleep(0.1)

if __name__ == "__main__":
    with watchdog.watch(1.5):
        for step, seconds in ((5, 5), (6, 0), (7, 0)):
            watchdog.at_step(step)
            time.sleep(seconds)
        with watchdog.phase("scan", times=1):
            for _ in range(3):
                time.sleep(0.7)
                watchdog.moved()
        with watchdog.phase("evaluate"):
            time.sleep(3)
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True)
        child.start()
        print(time.monotonic(), child.pid, flush=True)
        with watchdog.phase("batch", times=1):
            decode_without_end()
"""


def goes(pid, seconds=10):
    """Whether a process that was killed has ended soon: the kernel takes a moment."""
    deadline = time.monotonic() + seconds
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return gone(pid)


def test_what_moves_goes_on_and_what_does_not_is_ended():
    command = [sys.executable, "-c", SLOW_THEN_STUCK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    reason = r"^process 0, .* ends the run\. For 1.5 s it has not got on with 'batch' of step 7;.* --patience=1.5\.$"
    assert done.returncode == 1 and re.search(reason, done.stderr.splitlines()[-1]), done.stderr
    assert "in decode_without_end" in done.stderr
    began, pid = done.stdout.split()
    assert 1.5 <= time.monotonic() - float(began) < 30
    assert goes(int(pid))


def hang(workdir, process, patience=10):
    """A run of two, the data of one of which hang; how many seconds after that one the other had ended."""
    rest = {"log_every": 1, "eval_every": 0, "checkpoint_every": 100}
    own = {i: [f"--patience={patience}"] for i in (0, 1)}
    both = start(workdir, program=(STUCK, str(process), "16"), own=own, **rest)
    try:
        code = ended([both[process]])[0]
        began = time.monotonic()
        assert ended([both[1 - process]], ENDS)[0] != 0
        seconds = time.monotonic() - began
    finally:
        both[1 - process].kill()
        both[1 - process].wait()
    reason = rf"process {process}, .* ends the run\. For {patience} s .* with 'batch, shards {process}' of step \d+;"
    assert code == 1 and re.search(reason, printed(workdir, process)), printed(workdir, process)
    assert not re.search(rf"process {1 - process}, .* not got on", printed(workdir, 1 - process))
    return seconds


def hang_in_save(workdir, patience=5):
    """A run of two that cannot complete a save; how many seconds after the one at fault the other had ended."""
    rest = {"eval_every": 0, "checkpoint_every": 2, "steps": 100_000}
    own = {i: [f"--patience={patience}"] for i in (0, 1)}
    both = start(workdir, program=(STUCK, "0", "save"), own=own, **rest)
    try:
        assert ended(both[:1]) == [1], printed(workdir, 0)
        began = time.monotonic()
        assert ended(both[1:], ENDS)[0] != 0
        seconds = time.monotonic() - began
    finally:
        for process in both:
            process.kill()
            process.wait()
    reason = (
        rf"process 0, .* ends the run\. For {2 * patience} s it has not got on with 'save, each process its part' of "
    )
    assert re.search(reason, printed(workdir, 0)), printed(workdir, 0)
    assert re.search(reason, (workdir / "failed.txt").read_text())
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_data_that_hang_in_one_of_two_end_both(tmp_path, process):
    """A read that never returns: its process names itself, its shards and the step; the other ends within 30 s."""
    hang(tmp_path / "run", process)


@pytest.mark.slow
def test_a_save_that_hangs_ends_both(tmp_path):
    """The process that cannot complete it names itself, first; the other, which waits for it, ends within 30 s."""
    hang_in_save(tmp_path / "run")


def stop_worker(workdir):
    """Stops a run's decoding worker without killing it; how many seconds later the run had ended."""
    how = {"data.workers": 1, "steps": 100_000, "keep": 1, "eval_every": 0}
    (process,) = start(workdir, 1, own={0: ["--patience=10"]}, **how)
    when([process], lambda: complete(workdir) >= 3)
    (worker,) = children(process)
    os.kill(worker, signal.SIGSTOP)
    began = time.monotonic()
    assert ended([process], 10 + ENDS) == [1], printed(workdir, 0)
    seconds = time.monotonic() - began
    assert re.search(r"For 10 s .* with 'batch, shards 0, 1' of step \d+;", printed(workdir, 0))
    assert goes(worker)
    return seconds


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_run(tmp_path):
    """Of a process with decoding workers: the shards are named, and the worker goes too."""
    stop_worker(tmp_path / "run")
