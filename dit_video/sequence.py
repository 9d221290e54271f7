"""Attention where each device holds its own rows, heads and patches: rows longer than one device can hold.

B rows, N queries and M keys per row, H heads, K head width; here those of one device, unless said otherwise.

Two ways across the cuts of `sequence`. The ring (Liu et al. 2023, alg. 1) sends keys, values and their tags from
device to device and merges what is attended by lse: any number of heads, and never more than one device's share of the
keys at once. All-to-all (Jacobs et al. 2023, sec. 3.1) exchanges patches for heads, so that each device attends to
whole rows with some of the heads: two exchanges of all arrays, and heads that the axis must divide. It takes as many
queries at a time as a device holds patches of a row, at most: at no N is there an N x N array. Both take the tags
along, so that a segment may lie across any number of cuts. Rotary positions are in q and k before they get here.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from dit_video.attention import attend, attend_gradients, merge
from dit_video.sharding import ROWS

AXIS = "sequence"


def attend_across(mesh, exchange: str, q, k, v, q_tag, k_tag, window=None, span=None):
    """`attend` of patches to themselves, on global arrays that lie along the mesh; exchange: 'ring' or 'all_to_all'."""
    how = ring if exchange == "ring" else all_to_all
    if mesh.shape[AXIS] == 1:
        how = attend
    return _per_device(mesh, functools.partial(how, window=window, span=span), AXIS)(q, k, v, q_tag, k_tag)


def attend_to_all(mesh, q, k, v, q_tag, k_tag):
    """`attend` on global arrays, to keys that all devices of `sequence` hold whole: text."""
    return _per_device(mesh, attend, None)(q, k, v, q_tag, k_tag)


def _per_device(mesh, how, keys_along):
    queries, keys = (PartitionSpec(ROWS, along, "tensor") for along in (AXIS, keys_along))
    q_tag, k_tag = (PartitionSpec(ROWS, along) for along in (AXIS, keys_along))
    specs = (queries, keys, keys, (q_tag, q_tag), (k_tag, k_tag))
    return jax.shard_map(how, mesh=mesh, in_specs=specs, out_specs=(queries, queries), check_vma=False)


def all_to_all(q_BxNxHxK, k_BxNxHxK, v_BxNxHxK, q_tag, k_tag, window=None, span=None):
    """`attend` over the whole row, of which a device holds N patches, by exchanging patches for heads and back."""
    devices, heads = lax.axis_size(AXIS), q_BxNxHxK.shape[2]
    if heads % devices:
        raise ValueError(f"{heads} heads do not divide among the {devices} devices of {AXIS!r}. Use the ring.")
    whole = lambda a: lax.all_to_all(a, AXIS, split_axis=2, concat_axis=1, tiled=True)
    own = lambda a: lax.all_to_all(a, AXIS, split_axis=1, concat_axis=2, tiled=True)
    tags = jax.tree.map(lambda t: lax.all_gather(t, AXIS, axis=1, tiled=True), (q_tag, k_tag))
    qkv = (whole(a) for a in (q_BxNxHxK, k_BxNxHxK, v_BxNxHxK))
    o, lse = attend(*qkv, *tags, window=window, span=span, most=q_BxNxHxK.shape[1])
    return own(o), own(lse)


def ring(q_BxNxHxK, k_BxNxHxK, v_BxNxHxK, q_tag, k_tag, window=None, span=None):
    """`attend` over the whole row, of which a device holds N patches, by sending keys round the ring.

    With a span (see `attend`) they go no further than it reaches, either way.
    """
    devices, N = lax.axis_size(AXIS), q_BxNxHxK.shape[1]
    reach = devices if span is None else -(-(span - 1) // N)
    # The first block is of the device `ahead` places on; each further one of the device before.
    ahead, blocks = (reach, 2 * reach + 1) if 2 * reach + 1 < devices else (0, devices)
    return _ring(q_BxNxHxK, k_BxNxHxK, v_BxNxHxK, q_tag, k_tag, window, ahead, blocks)


def _send(tree, places):
    """To the device `places` further on."""
    devices = lax.axis_size(AXIS)
    if places % devices == 0:
        return tree
    route = [(i, (i + places) % devices) for i in range(devices)]
    return jax.tree.map(lambda a: lax.ppermute(a, AXIS, route), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _ring(q, k, v, q_tag, k_tag, window, ahead, blocks):
    """o and lse. The backward pass goes round again with (k, v, dk, dv): nothing is kept of others' keys."""

    def step(carry, _):
        (k, v, k_tag), o, lse = carry
        sent = _send((k, v, k_tag), 1)  # while these are attended to
        o, lse = merge(o, lse, *attend(q, k, v, q_tag, k_tag, window))
        return (sent, o, lse), None

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    start = _send((k, v, k_tag), -ahead), *nothing
    ((k, v, k_tag), o, lse), _ = lax.scan(step, start, length=blocks - 1)
    o, lse = merge(o, lse, *attend(q, k, v, q_tag, k_tag, window))
    return o.astype(q.dtype), lse


def _ring_forward(q, k, v, q_tag, k_tag, window, ahead, blocks):
    o, lse = (checkpoint_name(a, "attended") for a in _ring(q, k, v, q_tag, k_tag, window, ahead, blocks))
    return (o, lse), (q, k, v, q_tag, k_tag, o, lse)


def _ring_backward(window, ahead, blocks, saved, gradients):
    q, k, v, q_tag, k_tag, o, lse = saved

    def attended(keys, dq, dk, dv):
        k, v, k_tag = keys
        parts = attend_gradients(q, k, v, q_tag, k_tag, o, lse, *gradients, window)
        return tuple(total + part for total, part in zip((dq, dk, dv), parts))

    def step(carry, _):
        keys, *totals = carry
        dq, dk, dv = attended(keys, *totals)
        return (*_send((keys,), 1), dq, *_send((dk, dv), 1)), None

    zeros = (jnp.zeros(a.shape, jnp.float32) for a in (q, k, v))
    (keys, *totals), _ = lax.scan(step, (_send((k, v, k_tag), -ahead), *zeros), length=blocks - 1)
    dq, dk, dv = attended(keys, *totals)
    dk, dv = _send((dk, dv), ahead - blocks + 1)  # back home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_ring.defvjp(_ring_forward, _ring_backward)
