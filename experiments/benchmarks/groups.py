"""What does a level for each of many groups cost, against one level for the whole row?

    python experiments/benchmarks/groups.py --models=default,S/2 --groups=32

Prints, per model and kind of modulation, the seconds of a training step with one group in a row of --patches, with
many, and the ratio: medians of steps taken in turn. Seconds are the process's own on CPU, all its threads together, so
that what else the machine does counts little; else those that pass.
"""

import dataclasses
import statistics
import time

import jax
import numpy as np
from absl import app, flags
from step import MODELS, RUNS, model_config, random_batch

from dit_video.step import make_run

GROUPS = flags.DEFINE_integer("groups", 32, "Groups of a row, against 1.", lower_bound=2)
PATCHES = flags.DEFINE_integer("patches", 1024, "Of a row.", lower_bound=2)
DEPTH = flags.DEFINE_integer("depth", 0, "Layers, so that a large model fits; 0 = as many as it has.", lower_bound=0)


def prepared(name: str, modulation: str, groups: int):
    """(step, state, batch) of a model whose rows are cut in `groups` of one length."""
    config = model_config(name, PATCHES.value)
    config.model.modulation, config.data.groups = modulation, groups
    config.model.depth = DEPTH.value or config.model.depth
    run = make_run(config)
    batch = random_batch(config, run)
    p = batch.patches
    group_BxN = np.broadcast_to(
        (np.arange(PATCHES.value) * groups // PATCHES.value).astype(np.int32), p.group_BxN.shape
    )
    patches = dataclasses.replace(p, group_BxN=group_BxN, seg_BxG=np.ones_like(p.seg_BxG))
    batch = jax.device_put(dataclasses.replace(batch, patches=patches))
    return jax.jit(run.step, donate_argnums=0), jax.jit(run.init)(jax.random.key(0)), batch


def main(_):
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"| model | modulation | 1 group, s | {GROUPS.value} groups, s | ratio |\n|---|---|---|---|---|")
    for name in MODELS.value:
        for modulation in ("block", "shared"):
            both = [prepared(name, modulation, groups) for groups in (1, GROUPS.value)]
            seconds = [[], []]
            for _ in range(RUNS.value + 1):
                for i, (take, state, batch) in enumerate(both):
                    began = clock()
                    both[i] = take, jax.block_until_ready(take(state, batch, jax.random.key(0)))[0], batch
                    seconds[i].append(clock() - began)
            one, many = (statistics.median(s[1:]) for s in seconds)
            print(f"| {name} | {modulation} | {one:.3f} | {many:.3f} | {many / one:.3f} |", flush=True)


if __name__ == "__main__":
    app.run(main)
