"""What does the running loader cost a training step?

    python experiments/benchmarks/loader.py

Times blocks of steps in turn: each on a new batch while the loader makes the next in the background, and all on one
cached batch with the loader at rest. Prints both medians and the median of the ratios, block by block.
"""

import statistics
import time

import jax
from absl import app, flags

from configs import shapes
from dit_video.data.loader import make_loader
from dit_video.step import make_run

BLOCKS = flags.DEFINE_integer("blocks", 5, "Pairs of blocks.")
STEPS = flags.DEFINE_integer("steps", 15, "Steps of a block.")


def main(_):
    config = shapes.get_config()
    run = make_run(config)
    key = jax.random.key(0)
    state, step = jax.jit(run.init)(key), jax.jit(run.step, donate_argnums=0)
    loader = make_loader(config, run.text.tokenise, run.codec)
    cached = jax.device_put(next(loader))
    state, metrics = step(state, cached, key)
    jax.block_until_ready(metrics)

    def block(state, next_batch):
        began, batch = time.perf_counter(), next_batch()
        for _ in range(STEPS.value):
            state, metrics = step(state, batch, key)
            batch = next_batch()
            jax.block_until_ready(metrics)
        return state, (time.perf_counter() - began) / STEPS.value

    with_loader, without = [], []
    for _ in range(BLOCKS.value):
        state, seconds = block(state, lambda: jax.device_put(next(loader)))
        with_loader.append(seconds)
        time.sleep(3)  # until what the loader makes ahead is made, and it rests
        state, seconds = block(state, lambda: cached)
        without.append(seconds)
    loader.close()
    print(
        f"with the loader {statistics.median(with_loader):.3f} s, one cached batch {statistics.median(without):.3f} s"
    )
    print(f"ratio {statistics.median(a / b for a, b in zip(with_loader, without)):.3f}")


if __name__ == "__main__":
    app.run(main)
