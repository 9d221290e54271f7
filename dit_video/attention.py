"""Attention over packed segments, with the norms and the rotary embedding that go with it.

B rows, N queries and M keys per row, H heads, K head width, D model width, A axes of a position (t, y, x).

A tag says who may see whom: tag = (segment_BxN, block_BxN). A key is seen iff its segment equals the query's, is not 0
(padding), and, in causal use, q_block - window < k_block <= q_block. Bidirectional: block 0 for all.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name


def matmul(x_, w_DxF):
    """x @ w over the last axis, as one product of two matrices.

    With more axes than two XLA's CPU backend copies both factors of the weight's gradient into a new layout first,
    which costs more than the product.
    """
    return (x_.reshape(-1, x_.shape[-1]) @ w_DxF).reshape(*x_.shape[:-1], -1)


def layer_norm(x_BxNxD, eps: float = 1e-6):
    """LayerNorm without affine, in float32 (Ba et al. 2016)."""
    x = x_BxNxD.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)).astype(x_BxNxD.dtype)


def rms_norm(x_, gain_, eps: float = 1e-6):
    """RMS norm over the last axis with a gain, in float32 (Zhang and Sennrich 2019)."""
    x = x_.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * gain_).astype(x_.dtype)


def sinusoids(t_, features: int, period: float = 10_000.0):
    """[cos | sin] features of a scalar, exponent i / (features/2) (Vaswani et al. 2017; the order of DiT and Wan)."""
    half = features // 2
    # The exponent in float32, as published models have it, and rounded once: at t = 999 an ulp of a frequency shows.
    exponent = np.float32(-math.log(period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    angles = t_[..., None].astype(jnp.float32) * np.exp(exponent.astype(np.float64)).astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def rope_angles(pos_BxNx3, head_width: int, theta: float = 10_000.0):
    """Angles_BxNx(K/2) of a rotary embedding over three axes (Su et al. 2021; split over t, y, x as in Wan 2.1).

    y and x get 2*(K//6) dimensions each, t the rest; positions are indices, of any real value.
    """
    side = 2 * (head_width // 6)
    angles = []
    for axis, width in enumerate((head_width - 2 * side, side, side)):
        frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angles.append(pos_BxNx3[..., axis, None].astype(jnp.float32) * frequency)
    return jnp.concatenate(angles, -1)


def rotate(x_BxNxHxK, cos_BxNxk, sin_BxNxk):
    """Rotates the pairs (i, i + K/2) of each head; k = K/2. Interleaved published weights are permuted at import."""
    cos, sin = cos_BxNxk[:, :, None], sin_BxNxk[:, :, None]
    a, b = jnp.split(x_BxNxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxNxHxK.dtype)


def sees(q_tag, k_tag, window: int | None = None):
    """mask_...xNxM: which keys a query sees, by the rule at the head of this module."""
    (q_seg, q_block), (k_seg, k_block) = q_tag, k_tag
    q_seg, q_block, k_seg, k_block = (
        q_seg[..., :, None],
        q_block[..., :, None],
        k_seg[..., None, :],
        k_block[..., None, :],
    )
    seen = (q_seg == k_seg) & (k_seg != 0) & (k_block <= q_block)
    return seen if window is None else seen & (q_block - window < k_block)


def attend(
    q_BxNxHxK, k_BxMxHxK, v_BxMxHxK, q_tag, k_tag, window: int | None = None, span: int | None = None, most: int = 0
):
    """Softmax attention of each query over the keys that its tag lets it see; plain XLA.

    span: a promise, for self-attention, that no two patches of a segment lie span or more places apart in the row
    (the longest clip's patches). Keys out of a query's reach are then never computed: cost falls from N to about
    2 * span keys per query. most: queries taken at a time, at most, where all keys are; 0 = as many as `query_block`
    says. Returns o_BxNxHxK, in q's dtype, and the log of the softmax's denominator
    lse_BxNxH, float32, by which parts can be merged. A query that sees no key gives 0 and -inf.
    """
    B, N, H, K = q_BxNxHxK.shape
    M, block = k_BxMxHxK.shape[1], 64
    reach = None if span is None else -(-(span - 1) // block)
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q_BxNxHxK, k_BxMxHxK, v_BxMxHxK))  # BxHxNxK, once for all products
    q_tag, k_tag = ([jnp.broadcast_to(t, (B, n))[:, None] for t in tag] for tag, n in ((q_tag, N), (k_tag, M)))

    def blocks(a, size):  # axis 2, of N, in blocks: C x size
        return a.reshape(*a.shape[:2], N // size, size, *a.shape[3:])

    if span is None or N % block or (2 * reach + 1) * block >= N:
        o, lse = _softmax_attend(q, k, v, q_tag, k_tag, window, query_block(N, B * H * M, most))
    else:

        def around(a):  # each block with the `reach` blocks on either side of it: C x (2 * reach + 1) * block
            padded = jnp.pad(blocks(a, block), [(0, 0), (0, 0), (reach, reach)] + [(0, 0)] * (a.ndim - 2))
            return jnp.concatenate([padded[:, :, i : i + N // block] for i in range(2 * reach + 1)], axis=3)

        q_tag, k_tag = [blocks(t, block) for t in q_tag], [around(t) for t in k_tag]
        o, lse = _softmax_attend(blocks(q, block), around(k), around(v), q_tag, k_tag, window, None)
    return jnp.swapaxes(o.reshape(B, H, N, K), 1, 2), jnp.swapaxes(lse.reshape(B, H, N), 1, 2)


def attend_gradients(q, k, v, q_tag, k_tag, o, lse, do, dlse, window: int | None = None):
    """dq, dk, dv of `attend` for some of the keys, from the o and lse of all of them (shapes as in `attend`)."""
    (B, N, H, _), M = q.shape, k.shape[1]
    q, k, v, o, lse, do, dlse = (jnp.swapaxes(a, 1, 2) for a in (q, k, v, o, lse, do, dlse))
    q_tag, k_tag = ([t[:, None] for t in tag] for tag in (q_tag, k_tag))
    saved = q, k, v, q_tag, k_tag, o, lse
    gradients = _attend_backward(window, query_block(N, B * H * M), saved, (do, dlse))[:3]
    return tuple(jnp.swapaxes(a, 1, 2) for a in gradients)


def merge(o_BxNxHxK, lse_BxNxH, more_o_BxNxHxK, more_lse_BxNxH):
    """o and lse over two sets of keys, float32, from those over each (Milakov and Gimelshein 2018, sec. 3.1)."""
    top = jnp.maximum(lse_BxNxH, more_lse_BxNxH)
    top = jnp.where(jnp.isfinite(top), top, 0)
    one, other = jnp.exp(lse_BxNxH - top), jnp.exp(more_lse_BxNxH - top)
    total = one + other
    share = lambda weight: (weight / jnp.where(total > 0, total, 1))[..., None]
    o = share(one) * o_BxNxHxK.astype(jnp.float32) + share(other) * more_o_BxNxHxK.astype(jnp.float32)
    return o, jnp.log(total) + top


def query_block(N: int, pairs_per_query: int, most: int = 0) -> int:
    """The largest divisor of N of which as many queries have at most 2^27 logits, and not above `most` (0 = any)."""
    most = min(most or N, max(2**27 // pairs_per_query, 1))
    return next(N // n for n in range(1, N + 1) if N % n == 0 and N // n <= most)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _softmax_attend(q, k, v, q_tag, k_tag, window, size):
    """q_...xNxK, k and v_...xMxK, tags_...xN and _...xM -> o_...xNxK, lse_...xN, float32.

    size: queries (axis 2) taken at a time, in either pass, so that no N x M array is ever whole; None = all of them.
    The backward pass computes the weights again from lse (Dao et al. 2022, alg. 4), so that no N x M array is kept.
    """
    if size not in (None, q.shape[2]):
        some = lambda part: _softmax_attend(part[0], k, v, part[1:], k_tag, window, None)
        return jax.tree.map(_joined, jax.lax.map(some, jax.tree.map(lambda a: _blocks(a, size), (q, *q_tag))))
    logits = _logits(q, k, q_tag, k_tag, window)
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    some = total > 0
    o = jnp.einsum("...nm,...mk->...nk", weights.astype(v.dtype), v) / jnp.where(some, total, 1).astype(v.dtype)
    return o, jnp.where(some, jnp.log(jnp.where(some, total, 1)) + top, -jnp.inf)[..., 0]


def _blocks(a, size):  # axis 2 in blocks of `size`, one after the other along a new first axis
    return jnp.moveaxis(a.reshape(*a.shape[:2], -1, size, *a.shape[3:]), 2, 0)


def _joined(a):  # its inverse
    a = jnp.moveaxis(a, 0, 2)
    return a.reshape(*a.shape[:2], -1, *a.shape[4:])


def _logits(q, k, q_tag, k_tag, window):
    scaled = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("...nk,...mk->...nm", scaled, k, preferred_element_type=jnp.float32)
    return jnp.where(sees(q_tag, k_tag, window), logits, -jnp.inf)


def _attend_forward(q, k, v, q_tag, k_tag, window, size):
    # Named, so that a checkpoint policy can keep them: a layer's backward pass then needs no second forward one.
    o, lse = (checkpoint_name(a, "attended") for a in _softmax_attend(q, k, v, q_tag, k_tag, window, size))
    return (o, lse), (q, k, v, q_tag, k_tag, o, lse)


def _attend_backward(window, size, saved, gradients):
    q, k, v, q_tag, k_tag, o, lse = saved
    do, dlse = gradients
    if size not in (None, q.shape[2]):

        def add(total, part):
            q, q_tag, *rest = part
            dq, dk, dv, *_ = _attend_backward(window, None, (q, k, v, q_tag, k_tag, *rest[:2]), rest[2:])
            return (total[0] + dk, total[1] + dv), dq

        parts = jax.tree.map(lambda a: _blocks(a, size), (q, q_tag, o, lse, do, dlse))
        zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        (dk, dv), dq = jax.lax.scan(add, zeros, parts)
        return _joined(dq), dk.astype(k.dtype), dv.astype(v.dtype), None, None
    weights = jnp.exp(_logits(q, k, q_tag, k_tag, window) - jnp.where(jnp.isfinite(lse), lse, 0)[..., None])
    dv = jnp.einsum("...nm,...nk->...mk", weights.astype(do.dtype), do)
    dweights = jnp.einsum("...nk,...mk->...nm", do, v, preferred_element_type=jnp.float32)
    inner = (do * o).astype(jnp.float32).sum(-1) - dlse
    dlogits = (weights * (dweights - inner[..., None])).astype(q.dtype)
    scale = q.shape[-1] ** -0.5
    dq = jnp.einsum("...nm,...mk->...nk", dlogits, k) * scale
    dk = jnp.einsum("...nm,...nk->...mk", dlogits, q) * scale
    return dq, dk, dv, None, None


_softmax_attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def spread(table_BxGxM, group_BxN):
    """Each patch's row of its group's table: out_BxNxM = table[b, group[b, n]].

    The gradient is a product with the groups' one-hot rather than a scatter, which accelerators and XLA's CPU
    backend both serialise.
    """
    return jnp.take_along_axis(table_BxGxM, group_BxN[..., None], axis=1)


def _spread_forward(table_BxGxM, group_BxN):
    return spread(table_BxGxM, group_BxN), (group_BxN, table_BxGxM.shape[1])


def _spread_backward(saved, grad_BxNxM):
    group_BxN, groups = saved
    one_hot = jax.nn.one_hot(group_BxN, groups, dtype=grad_BxNxM.dtype)
    return jnp.einsum("bng,bnm->bgm", one_hot, grad_BxNxM), None


spread.defvjp(_spread_forward, _spread_backward)
