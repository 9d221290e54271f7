"""Processes that do not all come, or were not given the same, end with a line that says so, before anything is begun.

Real processes of one CPU device each, on the loopback.
"""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
from test_layers import ROOT
from test_processes import ended, finish, printed, start

from dit_video import launch


def last_lines(workdir, count=2):
    return [printed(workdir, i).splitlines()[-1] for i in range(count)]


def test_other_configs_end_all(tmp_path):
    """Each says which keys differ, both values, and whose they are; nothing is begun."""
    own = {0: ["--config.optimizer.lr=0.002"], 1: ["--config.optimizer.lr=0.001", "--allow_changed=data,text"]}
    assert ended(start(tmp_path / "run", own=own), 300) == [1, 1], printed(tmp_path / "run", 0)
    differ = "--allow_changed is nothing in process 0, data,text in process 1; "
    differ += "optimizer.lr is 0.002 in process 0, 0.001 in process 1."
    wanted = f"Disagreement: the processes of a run must be given the same: {differ}"
    assert last_lines(tmp_path / "run") == [wanted] * 2
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_not_shared_ends_all(tmp_path):
    """Each says what each has for the workdir; neither folder is left behind."""
    own = {i: [f"--workdir={tmp_path / 'run'}.of{i}"] for i in (0, 1)}
    assert ended(start(tmp_path / "run", own=own), 300) == [1, 1], printed(tmp_path / "run", 0)
    wanted = r"Disagreement: .* not one folder for all: .* 1 of 2 do not see\. "
    wanted += r"process 0 has '\S+/run\.of0' on \S+; process 1 has '\S+/run\.of1' on \S+\. Give .*"
    first, second = last_lines(tmp_path / "run")
    assert first == second and re.fullmatch(wanted, first)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_a_workdir_that_is_shared_keeps_no_trace(tmp_path):
    """Processes that were given the same train, and what they looked at it by is gone."""
    finish(tmp_path / "run", steps=1)
    assert (tmp_path / "run" / "checkpoints").exists() and not [*(tmp_path / "run").glob(".*")]


def join_each(*given):
    """What became of processes that join: see `tests/joining.py`."""
    command = [sys.executable, ROOT / "tests" / "joining.py", json.dumps(given)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_who_is_waited_for_in_vain():
    """Of four processes the last never comes: the others end one after the other, and tell what they know.

    And one that cannot even begin, as its port is in use. The reason is the last line, not jax's stack.
    """
    at = f"127.0.0.1:{free_port()}"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        came = join_each([at, 4, 0, 6], [at, 4, 1, 3], [at, 4, 2, 9], [f"127.0.0.1:{port}", 2, 0, 60])
    assert [one["code"] for one in came] == [1] * 4, came
    for one, seconds, wanted in (
        (came[0], 6, f"of 4 processes 2 have come to {at}, from 127.0.0.1, 127.0.0.1; still missing: 2."),
        (came[1], 3, f"process 0 answers at {at}, but not all of the 4 have come: its log says how many."),
        (came[2], 9, f"process 2 of 4 found no process 0 at {at}."),
    ):
        last = one["said"].splitlines()[-1]
        assert last.endswith(f"Not all had joined within --join_timeout={seconds} s: {wanted}"), came
    wanted = f"process 0 cannot listen at 127.0.0.1:{port}, which another may do (Address already in use)."
    assert came[3]["said"].startswith(wanted), came


def test_the_command_waits_as_long_as_it_is_told(tmp_path):
    given = ["--coordinator=127.0.0.1:9", "--num_processes=2", "--process_id=1", "--join_timeout=1"]
    (process,) = start(tmp_path / "run", 1, own={0: given})
    assert ended([process], 300) == [1]
    wanted = "--join_timeout=1 s: process 1 of 2 found no process 0 at 127.0.0.1:9."
    assert last_lines(tmp_path / "run", 1)[0].endswith(wanted)


def test_what_ends_a_run_is_told_whatever_the_disk_does(tmp_path, capsys, monkeypatch):
    """Where the workdir's file system hangs (a pipe that nobody writes to), and where another was first."""
    monkeypatch.setattr(launch, "LEAVING", 0.5)
    os.mkfifo(tmp_path / "failed.txt")
    launch.tell("process 1 ends the run.", tmp_path)
    assert capsys.readouterr().err == "process 1 ends the run.\n"
    os.remove(tmp_path / "failed.txt")
    launch.tell("process 0 ends the run.", tmp_path)
    launch.tell("process 1 ends the run.", tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        "process 0 ends the run.",
        "process 1 ends the run.",
        "Another was first: process 0 ends the run.",
    ]


ATTENDS = """
import sys, time
from dit_video import launch

launch.LOOKS = launch.LEAVING = 0.2
launch._attend(sys.argv[1])
print("attends", flush=True)
time.sleep(60)
"""


def test_a_process_that_waits_elsewhere_says_why_it_ends(tmp_path):
    """One that compiles or decodes is in no collective that a dead peer would break: it looks for what that left."""
    command = [sys.executable, "-c", ATTENDS, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "attends\n"
        (tmp_path / "failed.txt").write_text("process 1 ends the run. OSError: no space")
        assert process.wait(30) == 1
        assert process.stderr.read() == "This process ends too. process 1 ends the run. OSError: no space\n"


def test_what_ended_an_earlier_run_is_forgotten(tmp_path):
    (tmp_path / "failed.txt").write_text("process 0 ends the run.")
    launch.agree({}, [], tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:http", "::1:80", "host:0", "host:65536", ""])
def test_a_coordinator_without_a_port_is_refused(address):
    with pytest.raises(ValueError, match=f"--coordinator={re.escape(address)} is not of the form HOST:PORT"):
        launch.join(address, 2, 0)
