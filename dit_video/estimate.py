"""What a step costs, worked out without compiling it: its products, its memory per device, its collectives.

B rows, N patches per row, M keys per query, S text tokens per row, E text width, G groups per row, P values per patch,
D model width, F width of the feed-forward, L layers.
"""

import dataclasses
import math

import jax
from jax.extend import core

from dit_video.attention import query_block
from dit_video.chips import Chip
from dit_video.flow import BUCKETS
from dit_video.model import POSITION_FEATURES, DiT, block_parameters, macs
from dit_video.sharding import batch_shardings, state_shardings
from dit_video.step import Run, abstract_batch
from dit_video.text.words import BYTES, WordEncoder

# What one layer's backward pass holds at once, counted among the live arrays of programs compiled for v5p: of [N, D] in
# the model's dtype, whole and along tensor (with heads); of [N, F]; and of the ring, float32 counting twice: its sums
# of dq, dk and dv, what dk and dv of one device's keys are added up in, and the keys and values that come.
WHOLE, OF_HEADS, OF_MLP, OF_RING = 7, 12, 2, 12
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


def keys_per_query(m: DiT, N: int, mesh, block: int = 64) -> int:
    """M of self-attention over a row of N, as `attend` lays it out, or the ring, by whole shares of a row."""
    sequence, span = mesh.shape.get("sequence", 1), m.span
    if sequence > 1 and m.exchange == "ring":
        reach = sequence if span is None else -(-(span - 1) // (N // sequence))
        return min(sequence, 2 * reach + 1) * (N // sequence)
    if span is None or N % block:
        return N
    return min(N, (2 * -(-(span - 1) // block) + 1) * block)


def products(run: Run, mesh) -> list[Product]:
    """Every product of a training step, by what the model is: their FLOPs are those of the step's dot_generals."""
    config, m, d = run.config, run.model, run.config.data
    B, N, S, G = d.rows, d.length, d.text_length, d.groups
    D, F, E, L = m.width, m.mlp_width, m.text_width, m.depth
    again = {"full": (1, 1), "dots": (0, 0), "none": (0, 0)}[m.remat]  # of weights' products, of attention's
    learned = config.text.kind != "frozen"
    out = []

    def dense(name, tokens, k, n, layers=1, inner=True, remat=0):
        """Forward, the weight's gradient and, where what goes in has one, the input's."""
        out.append(Product(name, 1, B * tokens, k, n, layers * (2 + inner + remat)))

    def attention(name, queries, keys, width, heads, layers, remat=0):
        """Two products forward; backward the logits again and four gradients."""
        passes = layers * (7 + 2 * remat)
        out.append(Product(name, B * heads, queries, width // heads, keys, passes, weight=False))

    dense("patch", N, m.patch_values, D, inner=False)
    dense("last", N, D, m.out_values)
    dense("level", G, m.level_features, D, inner=False)
    dense("level", G, D, D)
    if m.position == "both":
        dense("position", N, 6 * POSITION_FEATURES, D, inner=False)
    if m.modulation == "shared":
        dense("modulation", G, D, 6 * D)
    else:
        dense("modulation", G, D, 6 * D, L, remat=again[0])
        dense("modulation", G, D, 2 * D)
    # From patches back to their groups, by one-hot: six parts a layer, and the last layer's two in one.
    out.append(Product("groups", B, G, N, D, 6 * L + 2, weight=False))
    out.append(Product("loss by level", 1, BUCKETS, B * N, 1, 2, weight=False))
    for name in ("q", "k", "v", "o"):
        dense(name, N, D, D, L, remat=again[0])
    attention("attention", N, keys_per_query(m, N, mesh), D, m.heads, L, again[1])
    dense("feed-forward", N, D, F, L, remat=again[0])
    dense("feed-forward", N, F, D, L, remat=again[0])
    if m.text == "cross":
        dense("text", S, E, D, inner=learned)
        dense("text", S, D, D)
        for name in ("text q", "text o"):
            dense(name, N, D, D, L, remat=again[0])
        for name in ("text k", "text v"):
            dense(name, S, D, D, L, remat=again[0])
        attention("text attention", N, S, D, m.heads, L, again[1])
    pools = m.text_pool + (m.text == "pooled")
    out.append(Product("text pool", B, G, S, E, pools * (1 + learned), weight=False))
    if m.text_pool:
        dense("text pool", G, E, D, inner=learned)
    if isinstance(run.text.module, WordEncoder):
        w, first = run.text.module, len(out)
        dense("words", S, BYTES * w.byte_width, E)
        dense("words", S, 32, E, inner=False)
        dense("words", S, E, E, 4 * w.depth)
        dense("words", S, E, 4 * E, 2 * w.depth)
        attention("words", S, S, E, w.heads, w.depth)
        attention("words", S, S, E, 1, 1)  # the mean of a prompt's tokens
        if m.text == "none":  # encoded all the same, but nothing comes back
            forward = (1, 1, 4 * w.depth, 2 * w.depth, 2 * w.depth, 2)
            out[first:] = (dataclasses.replace(p, passes=n) for p, n in zip(out[first:], forward, strict=True))
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

    Of a cond's branches the dearest counts; the body of a shard_map counts on each device. Raises ValueError
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
            total += math.prod(eqn.params["mesh"].shape.values()) * sum(inner)
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


def memory(run: Run, mesh, state) -> dict[str, int]:
    """Bytes per device, by kind, of a training step; mesh: any with axis sizes; state: the State's shapes.

    The state, the gradients and the batch are counted array by array. Activations are what the scan over layers keeps
    for the backward pass. Gathered weights are those outside the blocks, which a program gathers once, in float32, and
    keeps; one layer's in the model's dtype; and all layers' q, k, v and o once more, cut, in the layout of the loop.
    The working set is what one layer's backward pass holds, with attention's logits: those of a block of queries and,
    in the model's dtype, their gradient; where all queries are taken at once, those of the forward pass too.

    An optimizer that is offloaded comes for the update alone, when activations, gathered weights and the working set
    are gone: it counts as far as it is more than these.
    """
    m, d, parts = run.model, run.config.data, run.config.optimizer.accumulate
    size = lambda name: mesh.shape.get(name, 1)
    rows = d.rows / parts / (size("data") * size("fsdp"))
    N, S, T = rows * d.length / size("sequence"), rows * d.text_length, size("tensor")
    D, F, H, width = m.width, m.mlp_width, m.heads / T, m.dtype.itemsize
    batch, held = abstract_batch(run.config, run.model, run.text), _state_bytes(run, mesh, state)
    blocks = block_parameters(m).values()
    layer = sum(math.prod(shape) for _, shape, _ in blocks) / m.depth
    cross = m.text == "cross"
    kept = {
        "full": N * D * width,
        # What goes in, o and the last product; q, k, v and what is attended; the same of the text, and its k and v.
        "dots": N * ((3 + cross) * D + ((4 + 2 * cross) * D + F) / T) * width
        + N * (1 + cross) * 4 * H
        + (S * 2 * D / T * width if cross else 0),
        # Thirty of the fifty as fifteen in float32; and each layer's weights as they were gathered.
        "none": (N * (50 * D + 6 * F / T) + layer / T) * width,
    }[m.remat]
    keys = keys_per_query(m, d.length, mesh)
    keys = min(keys, d.length // size("sequence")) if m.exchange == "ring" else keys
    here = d.length // size("sequence")
    block = query_block(here, max(int(rows), 1) * int(H) * keys) if keys == here else here
    logits = max(rows, 1) * H * block * keys * (4 + width + (4 if block == here else 0))
    outside = sum(a.size for a in jax.tree.leaves(state.params)) - layer * m.depth
    square = (4 + 2 * cross) * D * D * m.depth
    cut = size("fsdp") * size("sequence")
    gathered = (outside * 4 + layer * width / T + square * 4 / T / cut) * (cut > 1)
    arrays = WHOLE + (OF_HEADS + OF_RING * (m.exchange == "ring" and size("sequence") > 1)) / T
    working = (arrays * N * D + OF_MLP * N * F / T) * width + logits
    passing = {"activations": int(kept * m.depth), "gathered weights": int(gathered), "working set": int(working)}
    if run.config.optimizer.offload:
        held["optimizer"] = max(held["optimizer"] - sum(passing.values()), 0)
    return held | passing | {"batch": _shard_bytes(batch, batch_shardings(batch, mesh))}


def _state_bytes(run: Run, mesh, state) -> dict[str, int]:
    """Bytes of each device's share of the state and of its gradients, wherever they lie."""
    shards = state_shardings(state, mesh)
    parameters = _shard_bytes(state.params, shards.params)
    return {
        "parameters": parameters,
        "average": _shard_bytes(state.ema, shards.ema),
        "optimizer": _shard_bytes(state.opt_state, shards.opt_state),
        "gradients": parameters * (2 if run.config.optimizer.accumulate > 1 else 1),
    }


def _shard_bytes(tree, shardings) -> int:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize for a, s in pairs)


def traffic(run: Run, mesh, state) -> float:
    """Bytes that each device reads and writes in its own memory a step: the products' and the state's."""
    devices, width = math.prod(mesh.shape.values()), run.model.dtype.itemsize
    state = 2 * sum(_state_bytes(run, mesh, state).values())
    return state + sum(p.bytes(devices, width) for p in products(run, mesh))


def exchange(run: Run, mesh, state, slices: int = 1) -> dict[str, float]:
    """Bytes that each device sends a step, by kind, if nothing is sent twice: to rank meshes without compiling.

    Weights are gathered for each pass, in the model's dtype, and their gradients scattered; copies along data are
    reduced, within each slice first, then a part by each of its devices between slices, which lie along data; keys and
    values go round the ring, twice as many on the way back; activations are reduced along tensor.
    """
    m, d, parts = run.model, run.config.data, run.config.optimizer.accumulate
    data, fsdp, tensor, sequence = (mesh.shape.get(a, 1) for a in ("data", "fsdp", "tensor", "sequence"))
    width, weights = m.dtype.itemsize, sum(a.size for a in jax.tree.leaves(state.params)) / tensor
    cut = fsdp * sequence
    tokens = d.rows * d.length / (data * fsdp * sequence)
    inner, reduced = data // slices, 2 * weights * 4 / cut
    passes, share = (3 if m.remat == "full" else 2) * parts, (cut - 1) / cut
    ring = 2 * (6 if m.remat == "full" else 5) * tokens * m.width / tensor * width * (sequence - 1) * m.depth
    return {
        "all-gather": passes * weights * width * share,
        "reduce-scatter": parts * weights * width * share,
        "between slices": reduced / inner * (slices - 1) / slices,
        "all-reduce": reduced * (inner - 1) / inner
        + 2 * (2 + passes / parts) * tokens * m.width * width * m.depth * 2 * (tensor - 1) / tensor,
        "collective-permute": ring if m.exchange == "ring" else 0.0,
        "all-to-all": 0.0 if m.exchange == "ring" else 8 * tokens * m.width / tensor * width * m.depth * (sequence > 1),
    }


# The shares of the published figures that a plan counts on; each of the three goes on while the others do.
REACHED = {"compute": 0.6, "memory": 0.8, "interconnect": 0.8, "network": 0.8}


def roofline(chip: Chip, flops: float, traffic: float, sent: float, between_slices: float = 0.0) -> dict[str, float]:
    """Seconds a step of each, at the published figures: a chip's FLOPs, bytes of its memory, and bytes sent."""
    return {
        "compute": flops / chip.flops,
        "memory": traffic / chip.bandwidth,
        "interconnect": sent / chip.links,
        "network": between_slices / chip.network,
    }


def step_seconds(times: dict[str, float]) -> float:
    """The longest of the roofline's times, each at the share of its published figure that REACHED counts on."""
    return max(times[kind] / REACHED[kind] for kind in times)
