"""For how long does an asynchronous checkpoint hold up the steps?

    python experiments/benchmarks/checkpoint.py --model=B/2 --folder=/somewhere/with/5/GB

Trains a model of about 128 million parameters (with their average and AdamW's moments: 2 GB of state) on random rows,
its buffers donated, saves in between as `train` does, and prints how long `save` took to return, when the checkpoint
was complete, how long the steps meanwhile took, and how long a restore takes, verification included. Before it
it takes the host memory that saves on a GPU are copied through, as `train` does while it compiles the step.
"""

import pathlib
import shutil
import statistics
import tempfile
import time

import jax
from absl import app, flags, logging
from step import model_config, random_batch, timed

from dit_video.checkpoint import Checkpoints, digest
from dit_video.step import make_run

MODEL = flags.DEFINE_string("model", "B/2", "As in step.py.")
FOLDER = flags.DEFINE_string("folder", None, "Where checkpoints go; by default the system's temporary folder.")
SAVES = flags.DEFINE_integer("saves", 3, "Checkpoints.")
LENGTH = flags.DEFINE_integer("length", 64, "Patches of the one row that a step computes.")


def main(_):
    logging.set_verbosity(logging.WARNING)
    folder = pathlib.Path(tempfile.mkdtemp(dir=FOLDER.value))
    config = model_config(MODEL.value, LENGTH.value)
    config.data.rows = config.data.shards = 1
    config.optimizer.kind = "adamw"
    run, key = make_run(config), jax.random.key(0)
    state, batch = jax.jit(run.init)(key), jax.device_put(random_batch(config, run))
    step = jax.jit(run.step, donate_argnums=0)
    parameters = sum(a.size for a in jax.tree.leaves(state.params))
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    print(f"{MODEL.value}: {parameters / 1e6:.1f} million parameters, {held / 1e9:.2f} GB of state")

    def once():
        nonlocal state
        state, seconds = timed(step, state, batch, key)
        return seconds

    blocked = []
    try:
        with Checkpoints(folder, keep=1) as checkpoints:
            began = time.perf_counter()
            taken = checkpoints.reserve(state).result()
            print(f"{taken / 1e9:.2f} GB of host memory taken ahead in {time.perf_counter() - began:.1f} s")
            once()
            before = statistics.median(once() for _ in range(3))
            print(f"a step: {before:.3f} s\nsave blocks  complete after  a step meanwhile")
            for i in range(1, SAVES.value + 1):
                saved = digest(state) if i == SAVES.value else None
                began = time.perf_counter()
                checkpoints.save(i, state, {}, {})
                blocked.append(time.perf_counter() - began)
                meanwhile = []
                while checkpoints.latest() != i:
                    meanwhile.append(once())
                    checkpoints.check()
                took = time.perf_counter() - began
                print(f"{blocked[-1]:>10.3f}s{took:>15.1f}s{statistics.median(meanwhile):>17.3f}s", flush=True)
        with Checkpoints(folder) as checkpoints:
            began = time.perf_counter()
            restored = checkpoints.restore(jax.eval_shape(lambda: state))
            print(f"restored in {time.perf_counter() - began:.1f} s, bit for bit: {digest(restored.state) == saved}")
    finally:
        shutil.rmtree(folder)
    print(f"longest block: {max(blocked):.3f} s")


if __name__ == "__main__":
    app.run(main)
