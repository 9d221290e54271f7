"""python tests/refusals.py '[["--config.steps=0"], ...]': the train command with each list of flags, in a fork each.

Modules are loaded once, so that thirty wrong commands take as long as one. A line of JSON for each: its exit code, what
it said, its seconds and whether it had loaded jax; one that is not refused does not train, but says so.
"""

import importlib
import json
import os
import pathlib
import sys
import tempfile
import time

sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

train = importlib.import_module("dit_video.train")  # as an attribute of the package it is the function


def refused(given):
    with tempfile.TemporaryFile("w+") as said:
        began, pid = time.monotonic(), os.fork()
        if not pid:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.argv, code = ["train", *given], 0
            train.main = lambda _: print("not refused")
            try:
                train.run()
            except SystemExit as error:
                code = error.code
            except BaseException:
                code = 1
                sys.excepthook(*sys.exc_info())
            if isinstance(code, str):  # as the interpreter does
                print(code, file=sys.stderr)
                code = 1
            print("jax" in sys.modules, flush=True)
            sys.stderr.flush()
            os._exit(code or 0)
        code, seconds = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - began
        said.seek(0)
        *lines, jax = said.read().splitlines()
    return {"code": code, "said": "\n".join(lines), "seconds": round(seconds, 3), "jax": jax == "True"}


if __name__ == "__main__":
    for given in json.loads(sys.argv[1]):
        print(json.dumps(refused(given)), flush=True)
