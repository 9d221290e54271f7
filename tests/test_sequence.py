"""Attention across the cuts of a row is attention over the whole row: values, lse and gradients, and no N x N array.

B rows, N patches per row, H heads, K head width; on a mesh of eight devices.
"""

import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from dit_video.attention import attend, merge
from dit_video.sequence import attend_across, attend_to_all
from dit_video.sharding import make_mesh

B, N, H, K, M = 2, 256, 4, 8, 24


def mesh_of(data=1, fsdp=1, tensor=1, sequence=1):
    return make_mesh(ml_collections.ConfigDict(dict(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence)))


@pytest.fixture(scope="module")
def arrays():
    """Queries, keys, values, and the tags of clips of 1 to 60 patches, padding within and at the end; what is asked."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    lengths = [[60, 1, 37, 13, 60, 5, 50], [7, 60, 60, 2, 59, 33]]
    seg_BxN, block_BxN = np.zeros((2, B, N), np.int32)
    for b, row in enumerate(lengths):
        start = 0
        for seg, n in enumerate(row, start=1):
            seg_BxN[b, start : start + n], block_BxN[b, start : start + n] = seg, np.arange(n) // 8
            start += n
        seg_BxN[b, 40:45] = 0
    return (draw(B, N, H, K), draw(B, N, H, K), draw(B, N, H, K)), (seg_BxN, block_BxN), draw(B, N, H, K), draw(B, N, H)


def with_gradients(how, tag, keys_tag, do, dlse):
    """Of q, k and v: o, lse (0 where it is -inf) and the gradients of a sum of both."""

    def asked(q, k, v):
        o, lse = how(q, k, v, tag, keys_tag)
        lse = jnp.where(jnp.isfinite(lse), lse, 0)
        return (o * do).sum() + (lse * dlse).sum(), (o, lse)

    return jax.jit(lambda *qkv: jax.value_and_grad(asked, argnums=(0, 1, 2), has_aux=True)(*qkv))


def agree(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(jnp.where(jnp.isfinite(b), b, 0)).max()), rtol=0)


@pytest.mark.parametrize(
    ("axes", "exchange", "window"),
    [
        ({"sequence": 8}, "ring", None),
        ({"data": 2, "tensor": 2, "sequence": 2}, "ring", 2),
        ({"fsdp": 2, "sequence": 4}, "all_to_all", None),
        ({"data": 2, "tensor": 2, "sequence": 2}, "all_to_all", 2),
        ({"data": 2, "tensor": 4}, "ring", None),
    ],
)
def test_a_cut_row_is_attended_as_a_whole_one(arrays, axes, exchange, window):
    """Clips across one and more cuts, and causal blocks of them."""
    qkv, (seg, block), do, dlse = arrays
    tag = (seg, block if window else 0 * block)
    ask = lambda how: with_gradients(lambda *a: how(*a, window=window), tag, tag, do, dlse)(*qkv)
    mesh = mesh_of(**axes)
    agree(ask(lambda *a, window: attend_across(mesh, exchange, *a, window)), ask(attend))


def test_keys_go_no_further_than_the_longest_clip(arrays):
    """With a span the ring has 5 blocks for 8 devices: the same result, of fewer sends."""
    qkv, (seg, block), do, dlse = arrays
    mesh, tag = mesh_of(sequence=8), (seg, 0 * block)
    across = lambda span: with_gradients(lambda *a: attend_across(mesh, "ring", *a, span=span), tag, tag, do, dlse)
    agree(across(60)(*qkv), with_gradients(attend, tag, tag, do, dlse)(*qkv))
    loops = [int(n) for n in re.findall(r"length=(\d+)", str(jax.make_jaxpr(across(60))(*qkv)))]
    assert loops == [4, 4]
    assert re.findall(r"length=(\d+)", str(jax.make_jaxpr(across(None))(*qkv))) == ["7", "7"]


def test_text_is_seen_from_every_part_of_a_row(arrays):
    """Keys that are not cut: their gradients are sums over the parts."""
    (q, k, v), (seg, block), do, dlse = arrays
    k, v, tags = k[:, :M], v[:, :M], ((seg, 0 * block), (seg[:, ::10][:, :M], 0 * block[:, :M]))
    mesh = mesh_of(data=2, tensor=2, sequence=2)
    found = with_gradients(lambda *a: attend_to_all(mesh, *a), *tags, do, dlse)(q, k, v)
    agree(found, with_gradients(attend, *tags, do, dlse)(q, k, v))


def test_merged_parts_are_the_whole(arrays):
    """Also where one part, or both, have no key that is seen."""
    (q, k, v), (seg, block), *_ = arrays
    tag, half = (seg, 0 * block), N // 2
    attend_ = jax.jit(attend)
    some = lambda part: attend_(q, k[:, part], v[:, part], tag, tuple(t[:, part] for t in tag))
    agree(jax.jit(merge)(*some(slice(None, half)), *some(slice(half, None))), attend_(q, k, v, tag, tag))


def test_heads_that_do_not_divide_are_refused(arrays):
    (q, k, v), (seg, block), *_ = arrays
    across = lambda *a: attend_across(mesh_of(sequence=8), "all_to_all", *a, (seg, block), (seg, block))
    with pytest.raises(ValueError, match="4 heads do not divide among the 8 devices of 'sequence'. Use the ring."):
        jax.eval_shape(across, q, k, v)


@pytest.mark.parametrize(("exchange", "length"), [("ring", 2**20), ("all_to_all", 2**20), ("all_to_all", 4096)])
def test_a_row_has_no_square_array(exchange, length):
    """In the compiled program of both passes no array is larger than a device's share of N x N, nor than 2^27."""
    heads, devices = 8, 8
    like = jax.ShapeDtypeStruct((1, length, heads, K), jnp.float32)
    tag = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mesh = mesh_of(sequence=devices)
    loss = lambda q, k, v, seg, block: attend_across(mesh, exchange, q, k, v, (seg, block), (seg, block))[0].sum()
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(like, like, like, tag, tag).compile()
    sizes = [
        np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w\d+\[([\d,]+)\]", compiled.as_text())
    ]
    assert length < max(sizes) <= min(2**27, length * length // devices)
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * 4 * max(sizes)  # a few blocks of logits
