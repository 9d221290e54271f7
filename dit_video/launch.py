"""What every command does before it touches a device; how processes join, agree on what they do, and leave a run."""

import contextlib
import ipaddress
import json
import multiprocessing
import os
import platform
import re
import secrets
import socket
import sys
import threading
import time
import traceback

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

HEARTBEAT = 15  # seconds without a sign of life after which a process counts as dead, and all others end
JOIN = 600.0  # seconds that a process waits for the others to come: the hosts of a pod come up minutes apart
FAILED = "failed.txt"
LOOKS = 5.0  # seconds between looks for it
LEAVING = 5.0  # seconds that it may take to leave it, and then to speak before another does
PATIENCE = 3600  # seconds that processes which are done wait for the first, which may be sampling the last gallery


def prepare() -> None:
    """Sets up the log and the cache of compiled programs (JAX_COMPILATION_CACHE_DIR, by default in ~/.cache)."""
    logging.set_verbosity(logging.WARNING)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/dit_video/xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = JOIN,
) -> None:
    """Joins a run's processes, before any device is touched; alone, where nothing says that there are others.

    coordinator: HOST:PORT of process 0; without it TPU pods, SLURM, Open MPI and Kubernetes are asked, as
    `jax.distributed.initialize` does. Returns once all have come: from then on the death of one ends all within 30 s.
    Until then nothing is known of the others, and after `timeout` s the process ends, with the reason. Raises
    ValueError where only some of the three are given, for a coordinator without a port, and for a port in use.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) not in (0, 3):
        raise ValueError(f"{', '.join(missing)} must be given too: a process needs all of --{', --'.join(given)}.")
    if not missing and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id={process_id} must lie in 0 to {num_processes - 1} (--num_processes).")
    if not missing and not _port(coordinator):
        raise ValueError(f"--coordinator={coordinator} is not of the form HOST:PORT, as 10.0.0.1:8476.")
    if process_id == 0:
        _require_free(coordinator)
    limits = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": PATIENCE}
    # jax would end the process too, in C++ and without a word of who is missing: here that is not waited for.
    limits["initialization_timeout"] = int(timeout) + 60
    try:
        with _within(timeout, coordinator, num_processes, process_id):
            jax.distributed.initialize(coordinator, num_processes, process_id, **limits)
    except ValueError as error:
        if not missing or "coordinator_address" not in str(error):
            raise


def _require_free(address: str) -> None:
    """Raises ValueError where process 0 could not listen at its address's port: jax may crash of that, without a word.

    An address that is found, not given, is not known before jax uses it, and so not looked at.
    """
    port, both = _port(address), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen at {address}, which another may do ({os.strerror(error.errno)}). Give "
            "all processes another port (--coordinator)."
        ) from error


def _port(address: str) -> int | None:
    """The port of HOST:PORT, where HOST may be [an address of IPv6]."""
    found = re.fullmatch(r"(?:[^:\[\]\s]+|\[[^\s\]]+\]):(\d{1,5})", address)
    return int(found[1]) if found and 0 < int(found[1]) < 2**16 else None


@contextlib.contextmanager
def _within(timeout: float, *given):
    """Ends the process, whatever jax does in C++ meanwhile, where this lasts longer."""
    timer = threading.Timer(timeout, _give_up, [timeout, *given])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(timeout: float, address: str | None, count: int | None, process: int | None) -> None:
    """Ends a process that has waited for long enough, and tells what it can know of those it waited for."""
    if address is None:
        found = "whom it waits for was found, not given; --coordinator, --num_processes and --process_id say it"
    elif process:
        found = f"process {process} of {count} found no process 0 at {address}"
        if _answers(address):
            found = f"process 0 answers at {address}, but not all of the {count} have come: its log says how many"
    elif not (peers := _connected(_port(address))):  # no Linux
        found = f"some of the {count} processes have not come to {address}"
    else:
        found = f"of {count} processes {len(peers)} have come to {address}, from {', '.join(peers)}"
        found += f"; still missing: {count - len(peers)}"
    reason = f"Not all had joined within --join_timeout={timeout:g} s: {found}."
    print(f"{platform.node()} (pid {os.getpid()}) ends the run. {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _connected(port: int) -> list[str]:
    """Whence others, and this process itself, are connected to a port of this machine, as Linux tells it."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table) as file:
                lines = [line.split() for line in file][1:]
        except OSError:
            continue
        for _, local, remote, state, *_ in lines:
            if int(local.rpartition(":")[2], 16) == port and state == "01":  # established
                words = bytes.fromhex(remote.rpartition(":")[0])  # of 32 bits each, the last byte first
                address = ipaddress.ip_address(b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4)))
                found.append(str(getattr(address, "ipv4_mapped", None) or address))
    return sorted(found)


class Disagreement(ValueError):
    """What the processes were started with is not the same; all of them raise it, at the same point."""


def agree(config: dict, allow_changed, workdir) -> None:
    """Raises Disagreement unless all processes have this config, these keys that may change, and one workdir.

    Before anything is compiled: processes that differ would train as one all the same, on other losses or learning
    rates, or wait for each other without end. All of them call it. The workdir is left as it was.
    """
    if jax.process_count() == 1:
        (epath.Path(workdir) / FAILED).unlink(missing_ok=True)
        return
    given = dict(_flat(json.loads(json.dumps(config)))) | {"--allow_changed": ",".join(allow_changed) or "nothing"}
    if found := _differences([json.loads(text) for text in all_texts(json.dumps(given))]):
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise Disagreement(f"the processes of a run must be given the same: {'; '.join(found[:8])}{more}.")
    _share(epath.Path(workdir))
    _attend(workdir)


def all_texts(text: str) -> list[str]:
    """The texts of all processes, by their numbers; all of them call it."""
    own = np.frombuffer(text.encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(own))).max())
    longest = -(-longest // 4096) * 4096  # each length is a program of its own to compile
    rows = multihost_utils.process_allgather(np.pad(own, (0, longest - len(own)), constant_values=32))
    return [row.tobytes().decode().rstrip(" ") for row in rows]


def _flat(config: dict, prefix: str = ""):
    """(dotted key, value as text) of a config."""
    for key, value in config.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", repr(value))]


def _differences(given: list[dict]) -> list[str]:
    """Of the keys that are not the same in all processes, each one's values and whose they are."""
    lines = []
    for key in sorted(set().union(*given)):
        who = {}
        for process, own in enumerate(given):
            who.setdefault(own.get(key, "not there"), []).append(process)
        if len(who) > 1:
            lines.append(f"{key} is {', '.join(f'{value} in {_named(found)}' for value, found in who.items())}")
    return lines


def _named(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:4]))
    more = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
    return f"process{'es' if len(processes) > 1 else ''} {shown}{more}"


def _share(workdir) -> None:
    """Raises Disagreement unless all processes see, in the workdir, a file that the first one has left there."""
    first, new = jax.process_index() == 0, not workdir.exists()
    token = all_texts(secrets.token_hex(8))[0]
    path = workdir / f".joined-{token}"
    if first:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / FAILED).unlink(missing_ok=True)
        path.touch()
    all_texts("left")
    # Where NFS remembers that there was no such folder, making it asks the server again.
    workdir.mkdir(parents=True, exist_ok=True)
    own = f"{os.path.abspath(workdir)!r} on {platform.node()}" if "://" not in str(workdir) else f"{str(workdir)!r}"
    places = [json.loads(text) for text in all_texts(json.dumps([own, _appears(path)]))]
    if first:
        path.unlink()
    blind = [process for process, (_, seen) in enumerate(places) if not seen]
    if blind:
        if new:
            with contextlib.suppress(OSError):  # it is not empty after all
                workdir.rmdir()
        told = "; ".join(f"{_named([process])} has {places[process][0]}" for process in [0, *blind[:8]])
        raise Disagreement(
            f"the workdir is not one folder for all: what process 0 leaves there {len(blind)} of {len(places)} do not "
            f"see. {told}. Give one on a file system that all hosts mount, or on gs://."
        )


def _appears(path) -> bool:
    """Whether a file is there, or comes to be within a few seconds."""
    for wait in (0, 1, 1, 1, 1):
        time.sleep(wait)
        if path.exists():
            return True
    return False


def fail(error: Exception, expected: bool, workdir=None) -> None:
    """Ends the process with exit code 1 and the reason: a line if the error was `expected`, else its traceback too.

    One of several processes ends at once, without waiting for the others, who wait for it in some collective: its
    closed connections, or at the latest its missing heartbeat, end them. The first leaves its reason in the workdir, in
    FAILED, where the others look for it. Only what all of them raise lets them leave together: so each has said it
    before another's end cuts it off.
    """
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, Disagreement):
        jax.distributed.shutdown()
    if not jax.distributed.is_initialized():
        if expected:
            sys.exit(reason)
        raise error
    if not expected:
        traceback.print_exception(error)
    tell(f"process {jax.process_index()}, {platform.node()} (pid {os.getpid()}) ends the run. {reason}", workdir)
    sys.stdout.flush()
    os._exit(1)


def tell(reason: str, workdir=None) -> None:
    """Prints why a process ends its run, on stderr, and what another has left in the workdir, if it was first."""
    print(reason, file=sys.stderr, flush=True)
    if workdir is None:
        return
    first = []

    def leave():
        path = epath.Path(workdir) / FAILED
        with contextlib.suppress(Exception):  # what is told may be that nothing can be written there
            if not path.exists():
                path.write_text(reason)
            first.append(path.read_text())

    # A file system that hangs is what often ends a run: it must not keep this process from its end.
    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(LEAVING)
    if first and first[0] not in ("", reason):
        print(f"Another was first: {first[0]}", file=sys.stderr, flush=True)


def _attend(workdir) -> None:
    """Ends this process with the reason that another has left in the workdir, in a thread, seconds after it came.

    jax ends a process whose peer is gone with a word of its own alone, unless it waits for that peer in a collective
    which fails. Whoever fails by itself in these seconds speaks for itself.
    """
    path = epath.Path(workdir) / FAILED

    def look():
        while True:
            time.sleep(LOOKS)
            with contextlib.suppress(Exception):  # a file system may be away for a while
                if path.exists():
                    time.sleep(LEAVING)
                    print(f"This process ends too. {path.read_text()}", file=sys.stderr, flush=True)
                    for child in multiprocessing.active_children():
                        child.kill()
                    os._exit(1)

    threading.Thread(target=look, name="failed", daemon=True).start()
