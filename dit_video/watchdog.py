"""Ends a process that no longer gets on, with the reason: what it does is noted, and a thread looks whether that moves.

One of several that is stuck in Python (a read that hangs, a decoder without end) keeps its heartbeat, so that jax does
not miss it, and the others would wait for it in a collective without end. It ends itself; they then end as they do
where a peer dies. A worker that hangs ends a run of one process in the same way.
"""

import contextlib
import dataclasses
import faulthandler
import multiprocessing
import os
import platform
import sys
import threading

import jax

# Seconds of patience at least, whatever was asked for, in the start, with what is compiled, and the first steps: others
# may still compile while one waits for them there. What begins before, joining, has a limit of its own.
START = 1800.0
FIRST_STEPS = 2
TICK = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """times: how many times the patience, or `least` seconds where that is more, it may last without moving.

    Three times where a process waits for others too, and fewer where it has only itself to wait for: so the one that
    they wait for is the first to speak.
    """

    name: str = "start"
    step: int = 0
    times: float = 3
    least: float = START


_phase, _moves, _steps, _process = Phase(), 0, 0, None


def at_step(step: int) -> None:
    """Notes that training has come to this step, in which it is but for the phases within."""
    global _phase, _steps, _process
    _phase = Phase("step", step, least=START if _steps < FIRST_STEPS else 0.0)
    _steps, _process = _steps + 1, jax.process_index()


@contextlib.contextmanager
def phase(name: str, times: float = 3):
    """Notes what is done in the meantime; a decorator too. The main thread's alone. times: see `Phase`."""
    global _phase
    before, _phase = _phase, dataclasses.replace(_phase, name=name, times=times)
    try:
        yield
    finally:
        _phase = dataclasses.replace(before)  # another object: it moved


def moved() -> None:
    """Notes that the phase gets on, as from any thread of it."""
    global _moves
    _moves += 1


@contextlib.contextmanager
def watch(patience: float, tell=lambda reason: print(reason, file=sys.stderr, flush=True)):
    """Ends the process, with exit code 1 and the reason given to `tell`, once its phase has not moved for `patience` s.

    For longer, where a `Phase` says so: in the start, and where it waits for others.
    """
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(patience, tell, done), name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(patience: float, tell, done: threading.Event) -> None:
    seen, still = (None, 0), 0.0
    # Counted, not read from a clock: a process that was stopped as a whole (Ctrl-Z) has not been stuck in that time.
    while not done.wait(TICK):
        now = _phase, _moves
        still = still + TICK if now[0] is seen[0] and now[1] == seen[1] else 0.0
        seen, phase = now, now[0]
        limit = phase.times * max(patience, phase.least)
        if still >= limit:
            _end(phase, limit, patience, tell)


def _end(phase: Phase, seconds: float, patience: float, tell) -> None:
    faulthandler.dump_traceback(file=sys.stderr)
    who = "" if _process is None else f"process {_process}, "
    tell(
        f"{who}{platform.node()} (pid {os.getpid()}) ends the run. For {seconds:g} s it has not got on with "
        f"{phase.name!r} of step {phase.step}; above is where. If it only needs longer, raise --patience={patience:g}."
    )
    for child in multiprocessing.active_children():  # a decoding worker that hangs would outlive this process
        child.kill()
    os._exit(1)
