"""What every command does before it touches a device, and how a process leaves a run of several."""

import os
import platform
import sys
import traceback

import jax
from absl import logging

HEARTBEAT = 15  # seconds without a sign of life after which a process counts as dead, and all others end
PATIENCE = 3600  # seconds that processes which are done wait for the first, which may be sampling the last gallery


def prepare() -> None:
    """Sets up the log and the cache of compiled programs (JAX_COMPILATION_CACHE_DIR, by default in ~/.cache)."""
    logging.set_verbosity(logging.WARNING)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/dit_video/xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins a run's processes, before any device is touched; alone, where nothing says that there are others.

    coordinator: HOST:PORT of process 0; without it TPU pods, SLURM, Open MPI and Kubernetes are asked, as
    `jax.distributed.initialize` does. From then on the death of a process ends all within 30 s. Raises ValueError where
    only some of the three are given.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) not in (0, 3):
        raise ValueError(f"{', '.join(missing)} must be given too: a process needs all of --{', --'.join(given)}.")
    if not missing and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id={process_id} must lie in 0 to {num_processes - 1} (--num_processes).")
    try:
        limits = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": PATIENCE}
        jax.distributed.initialize(coordinator, num_processes, process_id, **limits)
    except ValueError as error:
        if not missing or "coordinator_address" not in str(error):
            raise


def fail(error: Exception, expected: bool) -> None:
    """Ends the process with exit code 1 and the reason: a line if the error was `expected`, else its traceback too.

    One of several processes ends at once, without waiting for the others, who wait for it in some collective: its
    closed connections, or at the latest its missing heartbeat, end them.
    """
    reason = f"{type(error).__name__}: {error}"
    if not jax.distributed.is_initialized():
        if expected:
            sys.exit(reason)
        raise error
    if not expected:
        traceback.print_exception(error)
    print(f"{platform.node()} (pid {os.getpid()}) ends the run. {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
