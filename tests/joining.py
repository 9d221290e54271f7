"""python tests/joining.py '[["127.0.0.1:PORT", COUNT, PROCESS, SECONDS], ...]': processes that join, in a fork each.

jax is loaded once, and all begin at the same moment. A line of JSON for each, in their order: its exit code and what it
said.
"""

import importlib
import json
import os
import pathlib
import sys
import tempfile

sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

launch = importlib.import_module("dit_video.launch")


def begin(coordinator, count, process, seconds):
    """(its pid, the file that it writes to) of a process that joins."""
    said = tempfile.TemporaryFile("w+")
    pid = os.fork()
    if not pid:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        try:
            launch.join(coordinator, count, process, seconds)
        except ValueError as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    return pid, said


if __name__ == "__main__":
    for pid, said in [begin(*given) for given in json.loads(sys.argv[1])]:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        print(json.dumps({"code": code, "said": said.read()}), flush=True)
