"""Layers of the autoencoders: channels last, their parameters flat on the flax module `m` that calls them.

B clips, T frames, Y x X pixels or latents, C channels. Convolutions store [*kernel, in, out], dense layers [in, out].

A causal layer sees the frames before its chunk through the module's 'cache' collection: where the collection is
mutable it leaves there what the next chunk needs, and where it holds nothing the chunk begins the clip. Without a
cache a clip goes through whole.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dit_video.attention import attend

FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def weights(m: nn.Module, name: str, *shape: int):
    """A kernel [*window, in, out] and its bias [out]."""
    return m.param(name, FAN_IN, shape, jnp.float32), m.param(
        f"{name}_bias", nn.initializers.zeros, shape[-1:], jnp.float32
    )


def dense(m, name, x_BxTxYxXxC, width: int):
    """A convolution of one pixel."""
    weight, bias = weights(m, name, x_BxTxYxXxC.shape[-1], width)
    return x_BxTxYxXxC @ weight + bias


def conv(m, name, x_BxTxYxXxC, width: int, stride: int = 1, padding=((1, 1), (1, 1))):
    """A 3 x 3 convolution of each frame alone."""
    weight, bias = weights(m, name, 3, 3, x_BxTxYxXxC.shape[-1], width)
    frames = x_BxTxYxXxC.reshape(-1, *x_BxTxYxXxC.shape[2:])
    y = jax.lax.conv_general_dilated(
        frames, weight, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y.reshape(*x_BxTxYxXxC.shape[:2], *y.shape[1:]) + bias


def causal_conv(m, name, x_BxTxYxXxC, width: int):
    """A 3 x 3 x 3 convolution of a frame and the two before it; before the clip there are zeros."""
    weight_bias = weights(m, name, 3, 3, 3, x_BxTxYxXxC.shape[-1], width)
    return _conv_in_time(continued(m, name, x_BxTxYxXxC, 2), *weight_bias, padding=(1, 1))


def _conv_in_time(x_BxTxYxXxC, weight, bias, stride: int = 1, padding=(0, 0)):
    return bias + jax.lax.conv_general_dilated(
        x_BxTxYxXxC, weight, (stride, 1, 1), ((0, 0), padding, padding), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def continued(m, name, x_BxTxYxXxC, frames: int):
    """The chunk with the `frames` frames before it; before the clip there are zeros."""
    past = m.get_variable("cache", name)
    if past is None:
        past = jnp.zeros_like(x_BxTxYxXxC, shape=(x_BxTxYxXxC.shape[0], frames, *x_BxTxYxXxC.shape[2:]))
    x_BxTxYxXxC = jnp.concatenate([past, x_BxTxYxXxC], 1)
    keep(m, name, x_BxTxYxXxC[:, -frames:])
    return x_BxTxYxXxC


def keep(m, name, last_frames) -> None:
    if m.is_mutable_collection("cache"):
        m.put_variable("cache", name, last_frames)


def halve_time(m, name, x_BxTxYxXxC):
    """1 + 2k frames -> 1 + k: frame 0 passes; (2k-2, 2k-1, 2k) make frame k, by a convolution of 3 frames, stride 2."""
    C = x_BxTxYxXxC.shape[-1]
    weight_bias, past = weights(m, name, 3, 1, 1, C, C), m.get_variable("cache", name)
    keep(m, name, x_BxTxYxXxC[:, -1:])
    if past is None:
        passed = x_BxTxYxXxC[:, :1]
    else:
        passed, x_BxTxYxXxC = x_BxTxYxXxC[:, :0], jnp.concatenate([past, x_BxTxYxXxC], 1)
    if x_BxTxYxXxC.shape[1] < 3:  # an image
        return passed
    return jnp.concatenate([passed, _conv_in_time(x_BxTxYxXxC, *weight_bias, stride=2)], 1)


def double_time(m, name, x_BxTxYxXxC):
    """1 + k frames -> 1 + 2k: frame 0 passes, and each after it becomes two by a causal convolution without frame 0."""
    C = x_BxTxYxXxC.shape[-1]
    weight_bias = weights(m, name, 3, 1, 1, C, 2 * C)
    starts = int(m.get_variable("cache", name) is None)
    passed, rest = x_BxTxYxXxC[:, :starts], x_BxTxYxXxC[:, starts:]
    rest = continued(m, name, rest, 2)
    if rest.shape[1] < 3:
        return passed
    pairs = rearrange(_conv_in_time(rest, *weight_bias), "b t y x (pair c) -> b (t pair) y x c", pair=2)
    return jnp.concatenate([passed, pairs], 1)


def halve_space(m, name, x_BxTxYxXxC):
    """A convolution of stride 2, padded on the right and at the bottom alone."""
    return conv(m, name, x_BxTxYxXxC, x_BxTxYxXxC.shape[-1], stride=2, padding=((0, 1), (0, 1)))


def double_space(m, name, x_BxTxYxXxC, width: int):
    """Each pixel four times, then a convolution."""
    B, T, Y, X, C = x_BxTxYxXxC.shape
    four = jnp.broadcast_to(x_BxTxYxXxC[:, :, :, None, :, None], (B, T, Y, 2, X, 2, C))
    return conv(m, name, four.reshape(B, T, 2 * Y, 2 * X, C), width)


def group_norm(m, name, x_BxTxYxXxC, groups: int, eps: float = 1e-6):
    """Each frame's groups of channels to mean 0 and variance 1 over all its pixels, with affine (Wu and He 2018)."""
    B, T, Y, X, C = x_BxTxYxXxC.shape
    gain = m.param(f"{name}_gain", nn.initializers.ones, (C,), jnp.float32)
    bias = m.param(f"{name}_bias", nn.initializers.zeros, (C,), jnp.float32)
    x = x_BxTxYxXxC.astype(jnp.float32).reshape(B, T, Y, X, groups, C // groups)
    x = x - x.mean((2, 3, 5), keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean((2, 3, 5), keepdims=True) + eps)
    return (x.reshape(B, T, Y, X, C) * gain + bias).astype(x_BxTxYxXxC.dtype)


def pixel_norm(m, name, x_BxTxYxXxC):
    """Each pixel's channels to length sqrt(C), with a gain; zeros stay zeros."""
    C = x_BxTxYxXxC.shape[-1]
    gain = m.param(f"{name}_gain", nn.initializers.ones, (C,), jnp.float32)
    x = x_BxTxYxXxC.astype(jnp.float32)
    length = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
    return (x / jnp.maximum(length, 1e-12) * (math.sqrt(C) * gain)).astype(x_BxTxYxXxC.dtype)


def residual(m, name, x_BxTxYxXxC, width: int, norm, conv):
    """Norm, SiLU and convolution, twice, beside the input (He et al. 2016); norm and conv are layers of this module."""
    y = conv(m, f"{name}_conv1", nn.silu(norm(m, f"{name}_norm1", x_BxTxYxXxC)), width)
    y = conv(m, f"{name}_conv2", nn.silu(norm(m, f"{name}_norm2", y)), width)
    return y + (x_BxTxYxXxC if x_BxTxYxXxC.shape[-1] == width else dense(m, f"{name}_short", x_BxTxYxXxC, width))


def attention(m, name, x_BxTxYxXxC, norm):
    """Each frame's pixels attend to one another, one head, beside the input."""
    B, T, Y, X, C = x_BxTxYxXxC.shape
    normed = norm(m, f"{name}_norm", x_BxTxYxXxC)
    q, k, v = (dense(m, f"{name}_{part}", normed, C).reshape(B * T, Y * X, 1, C) for part in "qkv")
    all_see_all = (jnp.ones((B * T, Y * X), jnp.int32), jnp.zeros((B * T, Y * X), jnp.int32))
    o, _ = attend(q, k, v, all_see_all, all_see_all)
    return x_BxTxYxXxC + dense(m, f"{name}_o", o.reshape(B, T, Y, X, C), C)


def middle(m, x_BxTxYxXxC, norm, conv):
    """The coarsest level: attention between two residual blocks."""
    C = x_BxTxYxXxC.shape[-1]
    x_BxTxYxXxC = residual(m, "mid_0", x_BxTxYxXxC, C, norm, conv)
    x_BxTxYxXxC = attention(m, "mid_attention", x_BxTxYxXxC, norm)
    return residual(m, "mid_1", x_BxTxYxXxC, C, norm, conv)
