"""python tests/held.py OUT, and the flags of dit_video.train: trains, and writes down what the process holds.

A line of JSON in OUT after each validation, when neither a step nor a save is under way. In use is what was allocated
and not freed, by glibc's own count (mallinfo2, glibc 2.33): resident memory has, beside it, what the allocator keeps of
what was freed, which varies by tens of MB, and in which a leak may hide for long.
"""

import ctypes
import gc
import json
import os
import pathlib
import re
import sys

# All in one arena, large blocks in none, and Python's own objects among them.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONMALLOC": "malloc"}
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class Heap(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def held():
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()  # from now on only what is new is looked through
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Heap
    heap, status = mallinfo2(), pathlib.Path("/proc/self/status").read_text()
    return {
        "MB in use": round((heap.uordblks + heap.hblkhd) / 1e6, 1),
        "MB resident": round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1e3, 1),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def main():
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)
    from dit_video.checkpoint import Checkpoints
    from dit_video.metrics import MetricsWriter
    from dit_video.train import run

    out, write, save, saving = sys.argv.pop(1), MetricsWriter.write, Checkpoints.save, []

    def save_and_keep(checkpoints, *given, **named):
        saving[:] = [checkpoints]
        save(checkpoints, *given, **named)

    def write_and_look(writer, step, metrics):
        write(writer, step, metrics)
        if "validation" in metrics:
            for checkpoints in saving:
                checkpoints.wait()
            with open(out, "a") as file:
                file.write(json.dumps({"step": step} | held()) + "\n")

    MetricsWriter.write, Checkpoints.save = write_and_look, save_and_keep
    run()


if __name__ == "__main__":
    main()
