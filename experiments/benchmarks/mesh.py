"""What does sharding itself cost? A step on eight devices of this host against one device doing the same work.

    python experiments/benchmarks/mesh.py --model=S/2 --length=256 --rows=8

The devices share the host's cores, as one device has them all: what differs is what sharding adds (gathers, sums, more
and smaller products). The steps are timed in turn, so that a drift of the machine's speed falls on all; the ratio is
the median over the rounds of each to one device's in the same round.
"""

import os
import statistics

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
from absl import app, flags
from step import model_config, random_batch, timed

from dit_video.sharding import global_batch, make_mesh, state_shardings
from dit_video.step import make_run

MODEL = flags.DEFINE_string("model", "S/2", "As in step.py.")
LENGTH = flags.DEFINE_integer("length", 256, "Patches of a row.")
ROWS = flags.DEFINE_integer("rows", 8, "Rows of the batch.")
MESHES = flags.DEFINE_list("meshes", ["fsdp=8", "data=8"], "Meshes beside one device: axes joined by +.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Counted rounds.")


def stepper(sizes: dict | None):
    """A function that takes a step and waits for it; sizes: the mesh's axes, None for one device."""
    config = model_config(MODEL.value, LENGTH.value)
    config.data.rows = config.data.shards = ROWS.value
    config.mesh.update({"data": 1} | (sizes or {}))
    mesh = make_mesh(config.mesh, jax.devices()[: 8 if sizes else 1])
    run, key = make_run(config, mesh), jax.random.key(0)
    shardings = state_shardings(jax.eval_shape(run.init, key), mesh)
    state = jax.jit(run.init, out_shardings=shardings)(key)
    batch = global_batch(random_batch(config, run), mesh)
    step = jax.jit(run.step, donate_argnums=0, out_shardings=(shardings, None))

    def once():
        nonlocal state
        state, seconds = timed(step, state, batch, key)
        return seconds

    return once


def main(_):
    names = ["one device", *MESHES.value]
    parse = lambda text: {axis: int(size) for axis, size in (pair.split("=") for pair in text.split("+"))}
    steppers = [stepper(None), *(stepper(parse(text)) for text in MESHES.value)]
    rounds = [[once() for once in steppers] for _ in range(ROUNDS.value + 1)][1:]  # the first compiles
    print(f"{MODEL.value}, {ROWS.value} rows of {LENGTH.value}, {os.cpu_count()} cores, {len(rounds)} rounds")
    for name, seconds in zip(names, zip(*rounds)):
        ratios = [each / first[0] for each, first in zip(seconds, rounds)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name:<12}{statistics.median(seconds):>8.3f} s  ratio {statistics.median(ratios):.3f} ({spread})")


if __name__ == "__main__":
    app.run(main)
