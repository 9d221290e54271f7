"""python tests/cached.py, and the flags of dit_video.train: trains, and every process keeps what it has compiled.

jax (0.10.2) lets only a run's first process write to the cache of compiled programs, and on CPUs what that one wrote is
of no use to the others: each would compile anew, for half a minute of a core, at every start.
"""

import pathlib
import sys


def keep_all():
    from jax._src import compilation_cache, compiler, distributed

    write = compiler._cache_write

    def write_everywhere(key, seconds, name, backend, executable, callbacks):
        if distributed.global_state.process_id == 0:
            write(key, seconds, name, backend, executable, callbacks)
        elif seconds >= 0.5 and not callbacks:
            compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))

    compiler._cache_write = write_everywhere


def main():
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)
    from dit_video.train import run

    keep_all()
    run()


if __name__ == "__main__":
    main()
