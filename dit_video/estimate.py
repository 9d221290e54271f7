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

# Arrays that one layer's backward pass holds at once, counted among the live ones of programs compiled for v5p: of
# [N, D] whole and along tensor (with heads), as many more with attention to text, of [N, F], and of [G, D]. The forward
# pass holds fewer of [N, D].
WHOLE, OF_HEADS, TEXT_WHOLE, TEXT_OF_HEADS, OF_MLP, OF_GROUPS, FORWARD = 5, 8, 2, 5, 2, 8, 11
LANES, BAND = 128, 64  # columns of a tile of a TPU; queries of a block of `attend`, where a span bounds its keys
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


def keys_per_query(m: DiT, N: int, mesh, block: int = BAND) -> int:
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

    The state, the gradients and the batch are counted array by array. Activations are what is kept for the backward
    pass: by the scan over layers, by a text encoder that learns, and of the noised patches and their error. Gathered
    weights are those outside the blocks, which a program gathers once, in float32, and keeps; one layer's in the
    model's dtype; and all layers' q, k, v and o once more, cut, in the layout of the loop. The working set is what one
    layer's backward pass holds; or Muon's update, as far as it is more than all that is gone by then. Arrays are those
    of programs compiled for TPUs, within 10% of those that experiments/scale/README.md lists, of 0.07 to 57 GB; a
    model of a few MB is mostly tiles that are not full, and other compilers' temporaries are not these.

    An optimizer that is offloaded comes for the update alone, when activations, gathered weights and the working set
    are gone: it counts as far as it is more than these.
    """
    m, d, parts = run.model, run.config.data, run.config.optimizer.accumulate
    size = lambda name: mesh.shape.get(name, 1)
    rows = d.rows / parts / (size("data") * size("fsdp"))
    batch, held = abstract_batch(run.config, run.model, run.text), _state_bytes(run, mesh, state)
    blocks, width = block_parameters(m).values(), m.dtype.itemsize
    layer = sum(math.prod(shape) for _, shape, _ in blocks) / m.depth
    outside = sum(a.size for a in jax.tree.leaves(state.params)) - layer * m.depth
    square = (4 + 2 * (m.text == "cross")) * m.width**2 * m.depth
    cut, T = size("fsdp") * size("sequence"), size("tensor")
    gathered = (outside * 4 + layer * width / T + square * 4 / T / cut) * (cut > 1)
    patches = 2 * rows * d.length / size("sequence") * m.patch_values * 4
    kept = m.depth * _kept(run, mesh, rows, layer) + _kept_of_words(run, rows) + patches
    working = max(_working(run, mesh, rows), _update(run, held["parameters"]) - kept - gathered)
    passing = {"activations": kept, "gathered weights": gathered, "working set": working}
    passing = {kind: int(n) for kind, n in passing.items()}
    if run.config.optimizer.offload:
        held["optimizer"] = max(held["optimizer"] - sum(passing.values()), 0)
    return held | passing | {"batch": _shard_bytes(batch, batch_shardings(batch, mesh))}


def _kept(run: Run, mesh, rows: float, layer: float) -> float:
    """Bytes that a device keeps of each layer for the backward pass; layer: a layer's weights.

    Where keys are bounded by a span, what `attend` lays out in blocks of BAND queries is kept as it was laid out.
    """
    m, d, T = run.model, run.config.data, mesh.shape.get("tensor", 1)
    N, S = rows * d.length / mesh.shape.get("sequence", 1), rows * d.text_length
    D, F, width, cross, normed = m.width, m.mlp_width, m.dtype.itemsize, m.text == "cross", m.qk_norm != "none"
    attended = _attention(m, d.length, mesh, rows)
    wider = _lanes(D // m.heads) / (D // m.heads) - 1 if attended.banded else 0  # a head's values in tiles
    if m.remat == "full":
        return N * D * width
    lse = N * (1 + cross) * 4 * m.heads / T
    if m.remat == "dots":
        # What goes in, the product after o and the last one; q, k, v and what is attended; the same of the text.
        kept = N * ((3 + cross) * D + ((4 + 2 * cross + wider) * D + F) / T)
        kept += S * 2 * D / T * cross + rows * d.groups * 6 * D * (m.modulation == "block")
        return kept * width + lse
    # As the step is traced, what q, k and v are made of once: float32 in norms. Those with heads lie along tensor.
    floats, others = 4 + 2 * cross * m.text_norm, 9 + cross * (2 + m.text_norm)
    floats_of_heads, others_of_heads = (6 + 3 * cross) * normed, 6 + 2 * cross + 2 * wider
    if attended.banded:
        others_of_heads += 2 * (_lanes(attended.keys) / BAND - 1)  # k and v once more for each block that sees them
    kept = 4 * (floats + floats_of_heads / T) + width * (others + others_of_heads / T)
    return N * D * kept + (N * 6 * F + layer) / T * width + lse


def _kept_of_words(run: Run, rows: float) -> float:
    """Bytes that a device keeps of the text encoder: all of it, float32, with the weights of its attention.

    Nothing of it is computed again: what its backward pass would, XLA finds to be the same, and keeps.
    """
    w, S = run.text.module, run.config.data.text_length
    if not isinstance(w, WordEncoder) or run.model.text == "none":
        return 0
    return 4 * rows * S * (w.depth * (w.heads * S + 18 * w.width) + S)


def _update(run: Run, gradients: float) -> float:
    """Bytes that Muon holds: all gradients once more, scaled, and one stack of matrices whole, with its square."""
    if run.config.optimizer.kind != "muon":
        return 0
    matrices = [shape for _, shape, _ in block_parameters(run.model).values() if len(shape) == 3]
    return gradients + 4 * max(layers * (n_in * n_out + min(n_in, n_out) ** 2) for layers, n_in, n_out in matrices)


def _working(run: Run, mesh, rows: float) -> float:
    """Bytes of what a layer's backward pass holds: arrays of [N, D], the ring's, and those of attention.

    Of attention, weights in float32 and their gradient in the model's dtype, for a block of queries (in a loop over
    blocks in place of the weights, if it can be); where a span bounds the keys, k and v, or their gradients, as each
    block sees them. Attention to text holds as much, at the same time: but not if attention to patches is a loop, which
    has the device to itself. The forward pass may hold more in a loop over blocks: logits, and what hides some of them.
    """
    m, d, T = run.model, run.config.data, mesh.shape.get("tensor", 1)
    N, S = rows * d.length / mesh.shape.get("sequence", 1), d.text_length
    D, H, width, cross = m.width, m.heads / T, m.dtype.itemsize, m.text == "cross"
    one, queries = _attention(m, d.length, mesh, rows), d.length // mesh.shape.get("sequence", 1)
    pairs = max(rows, 1) * one.heads * one.block * _lanes(one.keys)
    logits = pairs * (4 if one.blocks and width == 4 else 4 + width)
    text = cross * max(rows, 1) * H * query_block(queries, max(int(rows * H), 1) * S) * _lanes(S) * (4 + width)
    attention = max(logits, text) if one.ring or one.blocks else logits + text
    if one.banded:
        wider = 3 * (_lanes(D // m.heads) - D // m.heads) * one.heads * rows * d.length  # of q, o and its gradient
        attention += (2 * rows * one.heads * d.length / BAND * _lanes(one.keys) * D // m.heads + wider) * width
    if one.ring:
        # The sums of dq, dk and dv, and of one device's dk and dv, in float32; keys and values that come.
        attention += N * D / T * (5 * 4 + 2 * width)
    arrays = WHOLE + TEXT_WHOLE * cross + (OF_HEADS + TEXT_OF_HEADS * cross) / T
    backward = (arrays * N * D + OF_MLP * N * m.mlp_width / T + OF_GROUPS * rows * d.groups * D) * width + attention
    return max(backward, (FORWARD * N * D * width + 8 * pairs) * one.blocks)


@dataclasses.dataclass(frozen=True)
class _Attention:
    """What a device attends to at a time: `block` queries to `keys` with `heads`, of each of its rows.

    ring: keys come from other devices, in a loop; banded: a span bounds them; blocks: of queries, in a loop.
    """

    block: int
    keys: int
    heads: float
    ring: bool
    banded: bool
    blocks: bool


def _attention(m: DiT, N: int, mesh, rows: float) -> _Attention:
    devices, heads = mesh.shape.get("sequence", 1), m.heads / mesh.shape.get("tensor", 1)
    ring = devices > 1 and m.exchange == "ring"
    if ring:
        queries = keys = N // devices
    else:  # whole rows, with a part of the heads
        queries, keys, heads = N, keys_per_query(m, N, mesh), heads / devices
    banded = not ring and keys < N
    block = queries if banded else query_block(queries, max(int(rows * heads), 1) * keys, N // devices)
    return _Attention(block, keys, heads, ring, banded, block < queries)


def _lanes(n: int) -> int:
    """n in whole tiles."""
    return -(-n // LANES) * LANES


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
