"""What does a training step cost, and how many clips is it, when a share of the patches is left out before packing?

    python -m experiments.token_drop.cost --rates=0,0.25,0.5,0.75

Rows are as long at every rate, and hold more clips; places for text and groups grow with them, by the power 2/3 of how
many times the clips: the more clips a row has the less rows differ, and hardly fewer clips fit. Prints for each rate
the clips of a step (counted in --batches packed batches), how full rows are, the model's multiply-accumulates per clip,
the step's seconds (median; the rates take turns, so that a machine whose speed drifts treats them alike) and the clips
per second, each against nothing left out. --runs=0 packs alone, in seconds. --wide times a model of DiT-S's size.
"""

import statistics
import time

import jax
import numpy as np
from absl import app, flags

from configs import shapes
from dit_video.data.loader import fill, make_loader
from dit_video.meter import global_work
from dit_video.step import make_run

RATES = flags.DEFINE_list("rates", ["0", "0.25", "0.5", "0.75"], "Shares left out; the first is compared with.")
BATCHES = flags.DEFINE_integer("batches", 40, "Packed batches that are counted.", lower_bound=1)
WIDE = flags.DEFINE_bool("wide", False, "A model of 384 x 12, in place of the embedded world's 192 x 4.")
RUNS = flags.DEFINE_integer("runs", 7, "Counted steps of each rate, after one warm-up; 0 = none.", lower_bound=0)


def config_of(rate: float, wide: bool = False):
    """The embedded world's config with a share left out, and places for the text and groups of as many more clips."""
    config = shapes.get_config()
    config.data.drop = (rate, rate)
    more = lambda count: 8 * round(count / (1 - rate) ** (2 / 3) / 8)
    config.data.text_length, config.data.groups = more(config.data.text_length), more(config.data.groups)
    if wide:
        config.model.width, config.model.depth, config.model.heads, config.model.mlp_width = 384, 12, 6, 1536
    return config


def packed(config, run, count: int):
    """The first batch, and the means over `count` of clips, of the share of patches that are real, and of the work."""
    loader = make_loader(config, run.text.tokenise, run.codec)
    batches = [next(loader) for _ in range(count)]
    loader.close()
    counts = [fill(batch) for batch in batches]
    means = [np.mean([c[name] for c in counts]) for name in ("clips", "patch_fill")]
    return batches[0], *means, np.mean([global_work(batch)(run.model) for batch in batches])


def main(_):
    key, steps, rows = jax.random.key(0), {}, {}
    for rate in map(float, RATES.value):
        config = config_of(rate, WIDE.value)
        run = make_run(config)
        batch, *rows[rate] = packed(config, run, BATCHES.value)
        if RUNS.value:
            step = jax.jit(run.step, donate_argnums=0)
            steps[rate] = [step, jax.jit(run.init)(key), jax.device_put(batch), []]
    for _ in range(RUNS.value + bool(RUNS.value)):
        for timed in steps.values():
            step, state, batch, seconds = timed
            began = time.perf_counter()
            timed[1], metrics = step(state, batch, key)
            jax.block_until_ready((timed[1], metrics))
            seconds.append(time.perf_counter() - began)
    N, first = config.data.rows * config.data.length, next(iter(rows))
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}; {N} patches a step")
    print("| left out | clips a step | against | filled | MACs a clip | s a step | clips a second | against |")
    print("|---|---|---|---|---|---|---|---|")
    per_second = {rate: rows[rate][0] / statistics.median(seconds[1:]) for rate, (*_, seconds) in steps.items()}
    for rate, (clips, filled, work) in rows.items():
        line = (
            f"| {rate:.0%} | {clips:.1f} | {clips / rows[first][0]:.2f} | {filled:.1%} | {work / clips / 1e6:.1f} M |"
        )
        if rate in per_second:
            ratio = per_second[rate] / per_second[first]
            line += f" {clips / per_second[rate]:.3f} | {per_second[rate]:.1f} | {ratio:.2f} |"
        else:
            line += " | | |"
        print(line, flush=True)


if __name__ == "__main__":
    app.run(main)
