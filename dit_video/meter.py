"""What a step did and what it cost, as lines of metrics.

B rows, N patches per row, S text tokens per row, Q buckets of the level.
"""

import collections
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.flow import BUCKETS
from dit_video.model import macs
from dit_video.patches import Batch
from dit_video.step import make_schedule


class Meter:
    """Turns steps' sums into a line of metrics every log_every steps.

    pending: the sums since the last line, plain floats, which a checkpoint keeps: the line after a resume is the very
    line of an unbroken run.
    """

    def __init__(self, config, model, peak: float, pending: list):
        self.config, self.model, self.peak, self.pending = config, model, peak, pending
        self.loss, self.bad_steps, self.patches, self._since = None, 0, 0, time.monotonic()
        self._work = collections.Counter()

    def add(self, step: int, metrics: dict, work: Callable) -> dict | None:
        """Takes a step's metrics and its `global_work`; returns the line where one is due."""
        row, data = {k: np.asarray(v, np.float64).tolist() for k, v in metrics.items()}, self.config.data
        row["patch_fill"] = row["patches"] / (data.rows * data.length)
        row["text_fill"] = row["text"] / (data.rows * data.text_length)
        self.pending.append(row)
        self.bad_steps = int(row["bad_steps"])
        loss = row["loss"] / max(row["weight"], 1)
        if math.isfinite(loss):
            self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        self.patches = row["patches"]
        self._work.update(patches=self.patches, macs=work(self.model))
        if step % self.config.log_every:
            return None
        rows, now = self.pending, time.monotonic()
        total = lambda name: np.sum([row[name] for row in rows], axis=0)
        mean = lambda name: float(np.mean([row[name] for row in rows]))
        line = {"loss": float(total("loss") / max(total("weight"), 1))}
        line |= by_level("loss", total("loss_Q"), total("weight_Q"))
        line |= {"gradient_norm": mean("gradient_norm"), "bad_total": int(rows[-1]["bad_total"])}
        line |= {"lr": float(make_schedule(self.config, self.config.optimizer.lr)(step - rows[-1]["bad_total"]))}
        line |= {name: mean(name) for name in ("patch_fill", "text_fill", "clips")}
        # Three times the forward pass; two floating-point operations per multiply-accumulate.
        flops = 6 * self._work["macs"] / (now - self._since)
        line |= {"tokens_per_second": self._work["patches"] / (now - self._since), "model_flops_per_second": flops}
        line |= {"share_of_matmul_peak": flops / self.peak}
        self.pending, self._since, self._work = [], now, collections.Counter()
        return line


def by_level(name: str, sum_Q, weight_Q) -> dict[str, float]:
    """{'name/0.00-0.12': mean, ...} of the buckets that were met."""
    edges = np.linspace(0, 1, BUCKETS + 1)
    return {
        f"{name}/{edges[q]:.2f}-{edges[q + 1]:.2f}": float(sum_Q[q] / weight_Q[q])
        for q in range(BUCKETS)
        if weight_Q[q]
    }


def global_work(local: Batch, shares: int = 1) -> Callable:
    """model -> its multiply-accumulates on all `shares` of a batch's rows, taking this share of them for typical."""
    seg_BxN, prompt_BxS = np.asarray(local.patches.seg_BxN), np.asarray(local.prompt_BxS)
    groups = local.patches.seg_BxG.size * shares

    def work(model):
        lengths = [np.bincount(row, minlength=row.max() + 1)[1:] for row in seg_BxN]
        texts = [np.bincount(row, minlength=len(n) + 1)[1 : len(n) + 1] for row, n in zip(prompt_BxS, lengths)]
        return shares * macs(model, np.concatenate(lengths).tolist(), np.concatenate(texts).tolist()) + (
            macs(model, [], [], groups) - macs(model, [], [], 1)
        )

    return work


def matmul_peak(dtype, side: int = 1536) -> float:
    """FLOP/s that all devices together reach on square products of `dtype`, measured now."""
    product = jax.jit(lambda a: a @ a)
    a = jnp.ones((side, side), dtype)
    product(a).block_until_ready()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - began)
    # Devices that the host's processor plays share its cores.
    devices = 1 if jax.devices()[0].platform == "cpu" else jax.device_count()
    return devices * 2 * side**3 / min(times)


def count_compilations():
    """A function that gives how many programs were compiled since now."""
    seen = collections.Counter()

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen[event] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: sum(seen.values())
