"""python -m experiments.faults --kills=200 --flips=300 --steps=10000 [--only=kills,flips] [--workdir=runs/faults]

Puts a tiny run through every fault of training, checkpoints and processes that it can make itself. What counts as
"nothing lost" is what the tests hold a run to: their functions do it here, more often. The full count takes hours of
one core; --kills=10 --flips=300 --steps=1000 --workers=1 --peers=1 under one.

Each round is kept in WORKDIR/rounds.jsonl once it is done: the same command, however it ended, goes on from there, and
WORKDIR/README.md, the table of this folder's README.md, tells what all rounds so far gave. After a change to the code
take another WORKDIR. Exits with 1 where something was lost.
"""

import contextlib
import itertools
import json
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from absl import app, flags, logging

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the quick forms of the same faults

import conftest  # noqa: E402, F401  eight devices of the host, for what the tests' modules make of them
import test_arguments as arguments  # noqa: E402
import test_processes as processes  # noqa: E402
import test_resume as resume  # noqa: E402
import test_trainer as trainer  # noqa: E402
import test_watchdog as watchdog  # noqa: E402
from test_checkpoint import files_of, flip, spoil  # noqa: E402

from dit_video.checkpoint import find_damage  # noqa: E402

KILLS = flags.DEFINE_integer("kills", 200, "kill -9 of one process.")
FLIPS = flags.DEFINE_integer("flips", 300, "Single bits of a checkpoint.")
WORKERS = flags.DEFINE_integer("workers", 20, "kill -9 of a decoding worker.")
PEERS = flags.DEFINE_integer("peers", 5, "Deaths of one of two processes, for each role and moment.")
STEPS = flags.DEFINE_integer("steps", 10_000, "Steps of the long run.")
ONLY = flags.DEFINE_list("only", [], "Some of the faults, by their names in FAULTS; of the others what is known.")
WORKDIR = flags.DEFINE_string("workdir", "runs/faults", "Where the rounds are kept.")

KILLS_A_ROUND = 10  # and as many runs as that takes
HEAD = """# What is lost when something breaks?

    {command}

{where}.

The run is tiny: 32 steps, a checkpoint every third, validation every eighth, a line of metrics every fourth. "The same"
means: every logged loss, parameters, averages, optimizer, the loader's state, the pictures and the file of
weights, bit for bit those of a run that nothing happened to.

| fault | how often | outcome | minutes |
|---|---|---|---|
"""


class NotDone(Exception):
    """A round that has not been played, of a fault that was not asked for."""


# The faults. Each plays its rounds by `once(name, what to do in a new folder)`; after each it tells what it has so far.


def kills(unbroken, once):
    """kill -9 at any moment, every other one while a checkpoint is being written."""

    done = torn = 0
    while done < KILLS.value:
        count, seed = min(KILLS_A_ROUND, KILLS.value - done), done // KILLS_A_ROUND
        do = lambda folder, count=count, seed=seed: resume.kill_and_resume(folder, count, seed, unbroken[1])
        torn += once(f"{count} of seed {seed}", do)
        done += count
        yield done, f"{done} resumed, the same; {torn} of them had hit a half-written checkpoint"


def signals(unbroken, once):
    """SIGTERM and SIGINT in compilation, step, save and evaluation."""
    asked_in = [(asked, moment) for asked in (signal.SIGTERM, signal.SIGINT) for moment in resume.MOMENTS]
    for done, (asked, moment) in enumerate(asked_in, start=1):
        do = lambda folder, asked=asked, moment=moment: resume.stop_and_resume(folder, asked, moment, unbroken[1])
        once(f"{asked.name} in {moment}", do)
        yield done, "all saved the step they were in and ended with 75; resumed, the same"


def flips(unbroken, once):
    """Single bits flipped, over all files of a checkpoint."""

    def flip_all(folder):
        checkpoint = copy_of(unbroken, folder) / "checkpoints" / f"{32:08d}"
        files, rng = files_of(checkpoint), random.Random(0)
        places = [*files, *rng.choices(files, k=max(FLIPS.value - len(files), 0))][: FLIPS.value]
        for path in places:
            bit = rng.randrange(8 * path.stat().st_size)
            flip(path, bit)
            damage = find_damage(checkpoint)
            assert len(damage) == 1 and damage[0].startswith(f"{path} "), f"bit {bit} of {path}: {damage}"
            flip(path, bit)
        return len(places)

    count = once(f"{FLIPS.value}", flip_all)
    yield count, f"{count} found, each file named"


def missing(unbroken, once):
    """Each file deleted, emptied, cut by a byte, lengthened by one."""

    def spoil_each(folder):
        checkpoint, count = copy_of(unbroken, folder) / "checkpoints" / f"{32:08d}", 0
        for path in files_of(checkpoint):
            content = path.read_bytes()
            for bad in (None, b"", content[:-1], content + b"\0"):
                path.unlink() if bad is None else path.write_bytes(bad)
                damage = find_damage(checkpoint)
                assert len(damage) == 1 and damage[0].startswith(f"{path} "), f"{path}: {damage}"
                path.write_bytes(content)
                count += 1
        return count

    count = once("each", spoil_each)
    yield count, f"{count} found, each file named"


def fallback(unbroken, once):
    """The newest checkpoint bad, the newest two, all of them; or the newest without its sums; then the same command."""

    def lose_sums(checkpoint):
        path = checkpoint / "SHA256SUMS"
        path.unlink()
        return path

    def fall_back(folder, bad, spoil=spoil):
        run = copy_of(unbroken, folder)
        steps = sorted(run.glob("checkpoints/*"), reverse=True)
        spoilt = [spoil(path) for path in steps[:bad]]
        code, printed = resume.finish(run)
        assert code == 0 and all(str(path) in printed for path in spoilt), printed
        assert f"from step {int(steps[bad].name)} " in printed, printed
        resume.assert_same(run, unbroken[1])

    def refuse(folder, spoil=spoil):
        run = copy_of(unbroken, folder)
        for path in run.glob("checkpoints/*"):
            spoil(path)
        left = len(files_of(run / "checkpoints"))
        code, printed = resume.finish(run)
        assert code == 1 and "are all damaged" in printed and "Traceback" not in printed, printed
        assert len(files_of(run / "checkpoints")) == left, "something was deleted"

    for bad in (1, 2):
        once(f"{bad} bad", lambda folder, bad=bad: fall_back(folder, bad))
        yield bad, "the next older one, the bad files named, the same at the end"
    once("all bad", refuse)
    once("1 without sums", lambda folder: fall_back(folder, 1, lose_sums))
    once("all without sums", lambda folder: refuse(folder, lose_sums))
    yield 5, "the next older one, the bad files named, the same at the end; all bad: exit code 1, nothing begun"


def disk(unbroken, once):
    """A file system that fills up while the run goes on, and is freed; the same command."""

    def fill_up(folder):
        run, ballast = folder / "run", folder / "run" / "ballast"
        run.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", run]
        mounted = subprocess.run(mount, capture_output=True, text=True)
        if mounted.returncode:
            return f"not tried: {mounted.stderr.strip()}"
        process = resume.start(run)
        try:
            processes.when([process], lambda: resume.complete(run) >= 6)
            fill(ballast, 50_000)
            assert processes.ended([process]) == [1], "the run went on over a full disk"
            printed, sound = text_of(log_of(run)), resume.complete(run)
            named = re.search(r"checkpoint \S+/0*(\d+) could not be (written|begun)|No space left", printed)
            assert named, printed[-2000:]
            assert named[1] is None or int(named[1]) <= sound + 3, f"seen at {named[1]}, and {sound} was the last sound"
            assert sound >= 6 and not find_damage(run / "checkpoints" / f"{sound:08d}")
            ballast.unlink()
            code, printed = resume.finish(run)
            assert code == 0 and f"from step {sound} " in printed, printed[-2000:]
            resume.assert_same(run, unbroken[1])
        finally:
            process.kill()
            process.wait()
            subprocess.run(["umount", "--lazy", run], check=True)

    refused = once("one", fill_up)
    done = "exit code 1 and the reason; the checkpoints before it sound; resumed once there was space, the same"
    yield (0, refused) if refused else (1, done)


def gradients(unbroken, once):
    """A gradient that is not finite; ten in a row."""
    once("one", lambda folder: trainer.test_a_bad_gradient_moves_the_step_alone(trainer.tiny_run()))
    yield 1, "nothing moved but the step, and it was counted"
    once("ten", trainer.test_ten_bad_steps_stop_the_run)
    yield 2, "nothing moved but the step, and each was counted; after ten exit with the reason, and none was saved"


def changed(unbroken, once):
    """The same workdir with another model, optimizer and data."""
    once("one", lambda folder: resume.test_finished_runs_and_changed_configs(folder, unbroken))
    yield 1, "refused, with each key's old and new value; nothing touched"


def typos(unbroken, once):
    """Flags and values that are wrong."""
    slowest = once("all", lambda folder: arguments.refuse_all())
    count = len(arguments.WRONG)
    when = f"{1000 * slowest:.0f} ms at most after the command's own modules were there"
    yield count, f"{count} refused in a line or two, {when} and before jax was loaded"


def secrets(unbroken, once):
    """Tokens in the environment of a run, and of one that fails."""
    count = once("both", resume.keep_secrets)
    yield len(resume.SECRETS), f"in none of {count} files: configs, logs, checkpoints, galleries"


def workers(unbroken, once):
    """SIGKILL of a decoding worker."""

    def kill(folder):
        seconds = resume.kill_worker(folder / "run")
        assert seconds < 10, f"the run had ended only after {seconds:.1f} s"
        resume.finish_with_workers(folder / "run", unbroken[1])
        return seconds

    slowest = 0.0
    for done in range(1, WORKERS.value + 1):
        slowest = max(slowest, once(f"{done}", kill))
        said = f"the run had ended, and said so, after {slowest:.1f} s at most, no process and no shared memory left; "
        said += "resumed, the same"
        yield done, said


def stuck(unbroken, once):
    """SIGSTOP of a decoding worker; --patience=10."""
    seconds = once("one", lambda folder: watchdog.stop_worker(folder / "run"))
    yield 1, f"the run had ended after {seconds:.1f} s, and named the shards and the step"


def hung(unbroken, once):
    """Data that hang for ever in one of two processes, each role; a save that does; --patience=10 and 5."""
    slowest = 0.0
    rounds = {f"process {i}": lambda folder, i=i: watchdog.hang(folder / "run", i) for i in (0, 1)}
    rounds["save"] = lambda folder: watchdog.hang_in_save(folder / "run")
    for done, (name, do) in enumerate(rounds.items(), start=1):
        slowest = max(slowest, once(name, do))
        yield done, f"it named itself, and where and at which step; the other had ended {slowest:.1f} s later at most"


def peers(unbroken, once):
    """SIGKILL of one of two processes, each role, in step, save and restore."""

    def die(folder, role, moment):
        seconds = processes.die(folder / "run", role, moment)
        finish_both(folder / "run", unbroken)
        return seconds

    deaths = [(i, role, moment) for i in range(PEERS.value) for role in (0, 1) for moment in processes.DEATHS]
    slowest = 0.0
    for done, (i, role, moment) in enumerate(deaths, start=1):
        do = lambda folder, role=role, moment=moment: die(folder, role, moment)
        slowest = max(slowest, once(f"process {role}, {moment}, {i}", do))
        yield done, f"the other had ended after {slowest:.1f} s at most; both resumed, the same"


def preempted(unbroken, once):
    """SIGTERM and SIGINT to one of two processes, each role, in compilation, step, save and evaluation."""

    def preempt(folder, role, asked, moment):
        processes.preempt(folder / "run", role, asked, moment)
        if moment == "step":
            finish_both(folder / "run", unbroken)

    rounds = itertools.product((0, 1), (signal.SIGTERM, signal.SIGINT), processes.MOMENTS)
    for done, (role, asked, moment) in enumerate(rounds, start=1):
        do = lambda folder, given=(role, asked, moment): preempt(folder, *given)
        once(f"{asked.name} to process {role} in {moment}", do)
        yield done, "both saved the same step and ended with 75; those of a step resumed, the same"


def stalled(unbroken, once):
    """SIGSTOP of one of two processes."""

    def stall(folder):
        seconds = processes.stall(folder / "run")
        finish_both(folder / "run", unbroken)
        return seconds

    seconds = once("one", stall)
    yield 1, f"the other had ended after {seconds:.1f} s and named the one that sent no heartbeat; resumed, the same"


def devices(unbroken, once):
    """A run on 8, then 4, 1, 8 devices, and one in two processes that goes on in one."""
    largest = once("both", processes.on_other_devices)
    yield 2, f"resumed each time; losses at most {largest:.1e} (relative) from those of an unbroken run"


def long(unbroken, once):
    """A run of many steps: memory, open files and threads early and late."""

    def run_long(folder):
        early, late = resume.resources(folder / "run", STEPS.value)
        words = ", ".join(f"{name} {early[name]} -> {late[name]}" for name in early)
        assert resume.flat(early, late), words
        return words

    words = once(f"{STEPS.value} steps", run_long)
    yield 1, f"{STEPS.value} steps: {words}"


FAULTS = {
    f.__name__: f
    for f in (
        *(kills, signals, flips, missing, fallback, disk, gradients, changed, typos, secrets),
        *(workers, stuck, hung, peers, preempted, stalled, devices, long),
    )
}


def finish_both(run, unbroken):
    """Starts a run's two processes again; AssertionError unless they leave what an unbroken run of two leaves."""
    whole = unbroken[0].with_name("run_of_two")
    if resume.complete(whole) < resume.RUN["steps"]:
        processes.finish(whole)
    processes.finish(run)
    assert resume.left_by(run) == resume.left_by(whole), "another outcome than an unbroken run's"


def copy_of(unbroken, folder):
    run = folder / "run"
    shutil.copytree(unbroken[0], run)
    return run


def log_of(run):
    return pathlib.Path(f"{run}.log")


def text_of(path):
    return path.read_text() if path.exists() else ""


def fill(ballast, left):
    """Writes a file until its file system is full, and takes `left` bytes of it away again: others write there too."""
    with ballast.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(2**16)):
                pass
        file.truncate(max(file.tell() - left, 0))


# The rounds.


def read_rounds(path):
    """{(fault, round): what it gave}."""
    lines = [json.loads(line) for line in text_of(path).splitlines()]
    return {(line["fault"], line["round"]): line for line in lines}


def keep_rounds(workdir, fault):
    """`once` of a fault: a round's figure, from the file of rounds or, where it was asked for, by playing it now."""
    path = workdir / "rounds.jsonl"
    known = read_rounds(path)

    def once(name, do):
        if (fault, name) not in known:
            if fault not in (ONLY.value or FAULTS):
                raise NotDone
            folder, began = workdir / fault, time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            found = {"fault": fault, "round": name, "where": where()}
            try:
                found |= {"figure": do(folder), "lost": None}
                shutil.rmtree(folder)
            except (AssertionError, pytest.fail.Exception) as error:  # its folder stays, to look at
                found |= {"figure": None, "lost": f"{name}: {' '.join(str(error).split())[:500]}"}
            known[fault, name] = found | {"seconds": round(time.monotonic() - began)}
            with path.open("a") as file:
                file.write(json.dumps(known[fault, name]) + "\n")
        assert not known[fault, name]["lost"], known[fault, name]["lost"]
        return known[fault, name]["figure"]

    return once


def where():
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}"


def write_table(workdir, outcomes):
    """WORKDIR/README.md from {fault: (count, outcome)}."""
    rounds = read_rounds(workdir / "rounds.jsonl").values()
    rows = []
    for name, (count, outcome) in outcomes.items():
        minutes = sum(found["seconds"] for found in rounds if found["fault"] == name) / 60
        rows.append(f"| {' '.join(FAULTS[name].__doc__.split())} | {count} | {outcome} | {minutes:.1f} |\n")
    asked = [f"--{flag.name}={flag.value}" for flag in (KILLS, FLIPS, WORKERS, PEERS, STEPS)]
    head = HEAD.format(
        command=" ".join(["python -m experiments.faults", *asked]),
        where="; ".join(sorted({found["where"] for found in rounds} or {where()})),
    )
    (workdir / "README.md").write_text(head + "".join(rows))


def main(_):
    logging.set_verbosity(logging.WARNING)
    if unknown := set(ONLY.value) - set(FAULTS):
        sys.exit(f"--only={','.join(sorted(unknown))} is not known. Allowed: {', '.join(FAULTS)}.")
    workdir = pathlib.Path(WORKDIR.value).resolve()
    run = workdir / "unbroken" / "run"
    run.parent.mkdir(parents=True, exist_ok=True)
    if resume.complete(run) < resume.RUN["steps"]:
        code, printed = resume.finish(run)
        assert code == 0, printed
    unbroken, lost = (run, resume.left_by(run)), False
    outcomes = dict.fromkeys(FAULTS, (0, "not tried yet"))
    for name, fault in FAULTS.items():
        try:
            for row in fault(unbroken, keep_rounds(workdir, name)):
                outcomes[name] = row
                write_table(workdir, outcomes)
        except NotDone:
            pass
        except AssertionError as error:
            outcomes[name], lost = ("-", f"LOST: {error}"), True
        write_table(workdir, outcomes)
        print(name, *outcomes[name], flush=True)
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    app.run(main)
