"""python tests/cached.py, and the flags of dit_video.train: trains, and every process keeps what it has compiled.

jax lets only a run's first process write to the cache of compiled programs, and on CPUs what that one wrote is of no
use to the others: each would compile anew, for half a minute of a core, at every start.
"""

import inspect
import pathlib
import sys

WRITES = ["cache_key", "compile_time_secs", "module_name", "backend", "executable"]


def keep_all():
    """Of jax's inner parts (0.10 and 0.11 have them): where they are others, nothing is kept, and tests take longer."""
    from jax._src import compilation_cache, compiler, distributed

    write = getattr(compiler, "_cache_write", None)
    if write is None or list(inspect.signature(write).parameters)[: len(WRITES)] != WRITES:
        return

    def write_everywhere(key, seconds, name, backend, executable, *callbacks):
        if distributed.global_state.process_id == 0:
            write(key, seconds, name, backend, executable, *callbacks)
        elif seconds >= 0.5 and not any(callbacks):
            compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))

    compiler._cache_write = write_everywhere


def main():
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)
    from dit_video import trainer
    from dit_video.train import run

    trainer.AT_ONCE = 4096  # bytes: what is gathered from several processes comes in pieces, as of a large model
    keep_all()
    run()


if __name__ == "__main__":
    main()
