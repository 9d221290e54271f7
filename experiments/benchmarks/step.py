"""What does a training step cost, and how much of the machine's matmul peak is that?

    python experiments/benchmarks/step.py --models=S/2,B/2 --tokens=256,1024

Prints a row per model and row length: seconds per step (median), model FLOP/s (three times the forward pass's
multiply-accumulates, two operations each) and their share of the peak that square products reached in the same run,
taken before and after. float32 on CPU, bfloat16 elsewhere. 'default' is the embedded world's own model.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from configs import dit, shapes
from dit_video import step as training
from dit_video.meter import matmul_peak
from dit_video.model import macs
from dit_video.patches import Batch, Patches

MODELS = flags.DEFINE_list("models", ["S/2", "B/2"], "Of S, B, L, XL / 2, 4, 8; 'default'; 'wide', width 2048.")
TOKENS = flags.DEFINE_list("tokens", ["256", "1024", "4096"], "Patches of a row: one clip each.")
BATCH = flags.DEFINE_integer("batch_tokens", 2048, "Patches of a batch, at least one row.")
RUNS = flags.DEFINE_integer("runs", 5, "Counted steps.", lower_bound=1)
WARMUP = flags.DEFINE_integer("warmup", 1, "Steps before those that count; the program is compiled before them.")
REMAT = flags.DEFINE_string("remat", "dots", "model.remat.")
DTYPE = flags.DEFINE_string("dtype", "", "model.dtype; by default float32 on CPU, bfloat16 elsewhere.")


def model_config(name: str, tokens: int):
    """A config of the model with rows of one clip of `tokens` patches."""
    if name in ("default", "wide"):
        config = shapes.get_config()
        if name == "wide":
            config.model.width, config.model.heads, config.model.mlp_width, config.model.depth = 2048, 16, 8192, 12
    else:
        config = dit.get_config(name)
    config.data.length = config.data.max_tokens = tokens
    config.data.rows = config.data.shards = max(BATCH.value // tokens, 1)
    config.data.groups, config.data.text_length = 8, 64
    config.model.remat = REMAT.value
    on_cpu = jax.default_backend() == "cpu"
    config.model.dtype = DTYPE.value or ("float32" if on_cpu else "bfloat16")
    return config


def random_batch(config, run) -> Batch:
    """One clip of random latents per row, with a prompt of one token."""
    rng, shapes_of = np.random.default_rng(0), training.abstract_batch(config, run.model, run.text)
    batch = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes_of)
    p, (B, N) = batch.patches, batch.patches.seg_BxN.shape
    p.x_BxNxP[:] = rng.standard_normal(p.x_BxNxP.shape, np.float32)
    p.pos_BxNx3[:] = 8 * np.stack([np.zeros(N), np.arange(N) // int(N**0.5), np.arange(N) % int(N**0.5)], -1)
    p.seg_BxN[:], p.prompt_BxN[:], p.seg_BxG[:, 0], batch.prompt_BxS[:, 0] = 1, 1, 1, 1
    p.uid_BxN[:] = rng.integers(2**32, size=(B, N), dtype=np.uint32)
    return Batch(Patches(**vars(p)), batch.ids_BxSxK, batch.prompt_BxS)


def timed(step, state, batch, key):
    """(the state after a step, the seconds until all of it was there)."""
    began = time.perf_counter()
    state, metrics = step(state, batch, key)
    jax.block_until_ready((state, metrics))
    return state, time.perf_counter() - began


def main(_):
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("model     tokens  rows  seconds  GFLOP/s  peak GFLOP/s  share")
    for name in MODELS.value:
        for tokens in map(int, TOKENS.value):
            config = model_config(name, tokens)
            run = training.make_run(config)
            key = jax.random.key(0)
            state, batch = jax.jit(run.init)(key), jax.device_put(random_batch(config, run))
            step = jax.jit(run.step, donate_argnums=0).lower(state, batch, key).compile()
            before = matmul_peak(jnp.dtype(config.model.dtype), side=3072)
            seconds = []
            for _ in range(WARMUP.value + RUNS.value):
                state, took = timed(step, state, batch, key)
                seconds.append(took)
            peak = max(before, matmul_peak(jnp.dtype(config.model.dtype), side=3072))
            median = statistics.median(seconds[WARMUP.value :])
            rows = config.data.rows
            speed = 6 * rows * macs(run.model, [tokens], [1]) / median
            figures = f"{median:>9.3f}{speed / 1e9:>9.1f}{peak / 1e9:>14.1f}{speed / peak:>7.1%}"
            print(f"{name:<9}{tokens:>7}{rows:>6}{figures}", flush=True)
            del state, batch


if __name__ == "__main__":
    app.run(main)
