"""What a step costs, worked out without compiling it: its products, its memory per device, its collectives.

B rows, N patches per row, M keys per query, S text tokens per row, E text width, G groups per row, P values per patch,
D model width, F width of the feed-forward, L layers.
"""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from dit_video.model import POSITION_FEATURES, DiT, block_parameters, macs
from dit_video.sharding import batch_sharding, state_shardings
from dit_video.step import Run, abstract_batch
from dit_video.text.words import BYTES, WordEncoder

MUON_ITERATIONS = 5  # of Newton and Schulz, optax's default


@dataclasses.dataclass(frozen=True)
class Product:
    """`batch` products of [m, k] by [k, n], made `passes` times a step (forward, again under remat, backward).

    weight: [k, n] is a weight, one for the whole batch, and every device reads it whole.
    """

    name: str
    batch: int
    m: int
    k: int
    n: int
    passes: int
    weight: bool = True

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n * self.passes

    def bytes(self, devices: int, width: int) -> float:
        """Read and written by each device, values of `width` bytes, if all else is fused with the products."""
        whole = self.k * self.n if self.weight else self.batch * self.k * self.n / devices
        return self.passes * width * (self.batch * self.m * (self.k + self.n) / devices + whole)


def keys_per_query(N: int, span: int | None, block: int = 64) -> int:
    """M of self-attention, as `attend` lays it out for a row of N and a longest clip of `span`."""
    if span is None or N % block:
        return N
    return min(N, (2 * -(-(span - 1) // block) + 1) * block)


def products(run: Run) -> list[Product]:
    """Every product of a training step, by what the model is: their FLOPs are those of the step's dot_generals."""
    config, m, d = run.config, run.model, run.config.data
    B, N, S, G = d.rows, d.length, d.text_length, d.groups
    D, F, E, L = m.width, m.mlp_width, m.text_width, m.depth
    again = {"full": (1, 1), "dots": (0, 0), "none": (0, 0)}[m.remat]  # of weights' products, of attention's
    learned = bool(jax.tree.leaves(jax.eval_shape(run.init, jax.random.key(0)).params["text"]))
    out = []

    def dense(name, tokens, k, n, layers=1, inner=True, remat=0):
        """Forward, the weight's gradient and, where what goes in has one, the input's."""
        out.append(Product(name, 1, B * tokens, k, n, layers * (2 + inner + remat)))

    def attention(name, queries, keys, width, layers, remat=0):
        """Two products forward; backward the logits again and four gradients."""
        out.append(Product(name, B, queries, width, keys, layers * (7 + 2 * remat), weight=False))

    dense("patch", N, m.patch_values, D, inner=False)
    dense("last", N, D, m.out_values)
    dense("level", G, m.level_features, D, inner=False)
    dense("level", G, D, D)
    if m.position == "both":
        dense("position", N, 3 * POSITION_FEATURES, D, inner=False)
    if m.modulation == "shared":
        dense("modulation", G, D, 6 * D)
    else:
        dense("modulation", G, D, 6 * D, L, remat=again[0])
        dense("modulation", G, D, 2 * D)
    # From patches back to their groups, by one-hot: six parts a layer, and the last layer's two in one.
    out.append(Product("groups", B, G, N, D, 6 * L + 2, weight=False))
    for name in ("q", "k", "v", "o"):
        dense(name, N, D, D, L, remat=again[0])
    attention("attention", N, keys_per_query(N, m.span), D, L, again[1])
    dense("feed-forward", N, D, F, L, remat=again[0])
    dense("feed-forward", N, F, D, L, remat=again[0])
    if m.text == "cross":
        dense("text", S, E, D, inner=learned)
        dense("text", S, D, D)
        for name in ("text q", "text o"):
            dense(name, N, D, D, L, remat=again[0])
        for name in ("text k", "text v"):
            dense(name, S, D, D, L, remat=again[0])
        attention("text attention", N, S, D, L, again[1])
    if m.text_pool or m.text == "pooled":
        out.append(Product("text pool", B, G, S, E, 1 + learned, weight=False))
    if m.text_pool:
        dense("text pool", G, E, D, inner=learned)
    if isinstance(run.text.module, WordEncoder):
        w = run.text.module
        dense("words", S, BYTES * w.byte_width, E)
        dense("words", S, 32, E, inner=False)
        dense("words", S, E, E, 4 * w.depth)
        dense("words", S, E, 4 * E, 2 * w.depth)
        attention("words", S, S, E, w.depth)
    if config.optimizer.kind == "muon":
        for _, (layers, *shape), _ in (spec for spec in block_parameters(m).values() if len(spec[1]) == 3):
            small, large = sorted(shape)
            out.append(Product("muon", layers, small, large, small, 2 * MUON_ITERATIONS, weight=False))
            out.append(Product("muon", layers, small, small, small, MUON_ITERATIONS, weight=False))
    return out


def model_flops(run: Run) -> int:
    """FLOPs that the model itself asks for: three times the forward pass over rows full of the longest clips."""
    d, m = run.config.data, run.model
    clips, rest = divmod(d.length, min(d.max_tokens, d.length))
    lengths = [min(d.max_tokens, d.length)] * clips + [rest] * (rest > 0)
    texts = [d.text_length // len(lengths)] * len(lengths)
    return 6 * d.rows * macs(m, lengths, texts, d.groups)


def walk(jaxpr) -> int:
    """FLOPs of all dot_generals of a jaxpr, loops counted as often as they run.

    Of a cond's branches the dearest counts; the body of a shard_map counts on each of its devices. Raises ValueError
    for a product in a loop whose length is not known.
    """
    total = 0
    for eqn in jaxpr.eqns:
        inner = [walk(j) for value in eqn.params.values() for j in _jaxprs(value)]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[a] for a in contracted)
        elif eqn.primitive.name == "scan":
            total += eqn.params["length"] * sum(inner)
        elif eqn.primitive.name == "cond":
            total += max(inner)
        elif eqn.primitive.name == "while" and sum(inner):
            raise ValueError("a product in a loop of unknown length: its FLOPs cannot be counted.")
        elif eqn.primitive.name == "shard_map":
            shape = dict(eqn.params["mesh"].shape)
            total += math.prod(shape[a] for a in eqn.params["manual_axes"]) * sum(inner)
        else:
            total += sum(inner)
    return total


def _jaxprs(value):
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
