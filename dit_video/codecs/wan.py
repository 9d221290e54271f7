"""Wan's causal autoencoders of video (Wan 2025, sec. 4.1): 2.1, 4x in time and 8x in space, and 2.2, 4x and 16x.

B clips, T frames, Y x X pixels or latents, C latent channels. 2.2 first cuts frames in patches, and carries a
parameter-free average past each level that halves and a repetition past each that doubles.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from dit_video.codecs import layers
from dit_video.codecs.layers import causal_conv, pixel_norm


class Encoder(nn.Module):
    """widths: of the levels, fine to coarse; depth: residual blocks per level; in_time: which halvings halve time too;
    patch: side of the frames' patches; carried: averages past the levels (2.2)."""

    channels: int = 16
    widths: tuple[int, ...] = (96, 192, 384, 384)
    depth: int = 2
    in_time: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    carried: bool = False

    @property
    def stride(self) -> tuple[int, int, int]:
        return (2 ** sum(self.in_time), *[self.patch * 2 ** len(self.in_time)] * 2)

    @nn.compact
    def __call__(self, video_BxTxYxXx3):
        """moments_BxTxYxXx2C of the latents: their mean and the logarithm of their variance."""
        p = self.patch
        x = rearrange(video_BxTxYxXx3, "b t (y p) (x q) c -> b t y x (p q c)", p=p, q=p)
        x = causal_conv(self, "in", x, self.widths[0])
        for i, width in enumerate(self.widths):
            before, halves = x, i < len(self.in_time)
            for j in range(self.depth):
                x = layers.residual(self, f"down_{i}_{j}", x, width, pixel_norm, causal_conv)
            if halves:
                x = layers.halve_space(self, f"down_{i}_half", x)
                x = layers.halve_time(self, f"down_{i}_half_time", x) if self.in_time[i] else x
            if self.carried:
                x = x + average(before, 1 + (halves and self.in_time[i]), 1 + halves, width)
        x = layers.middle(self, x, pixel_norm, causal_conv)
        x = causal_conv(self, "out", nn.silu(pixel_norm(self, "norm", x)), 2 * self.channels)
        return layers.dense(self, "moments", x, 2 * self.channels)


class Decoder(nn.Module):
    """The encoder's way back, with one block more per level; the fields are the encoder's."""

    channels: int = 16
    widths: tuple[int, ...] = (96, 192, 384, 384)
    depth: int = 2
    in_time: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    carried: bool = False

    @nn.compact
    def __call__(self, latents_BxTxYxXxC):
        """video_BxTxYxXx3, not clipped."""
        p, in_time, starts = self.patch, self.in_time[::-1], not self.has_variable("cache", "in")
        x = layers.dense(self, "latents", latents_BxTxYxXxC, self.channels)
        x = causal_conv(self, "in", x, self.widths[-1])
        x = layers.middle(self, x, pixel_norm, causal_conv)
        for i, width in enumerate(reversed(self.widths)):
            before = x
            for j in range(self.depth + 1):
                x = layers.residual(self, f"up_{i}_{j}", x, width, pixel_norm, causal_conv)
            if i < len(in_time):
                x = layers.double_time(self, f"up_{i}_double_time", x) if in_time[i] else x
                x = layers.double_space(self, f"up_{i}_double", x, width if self.carried else width // 2)
                if self.carried:
                    x = x + repeat(before, 1 + in_time[i], 2, width, starts)
        x = causal_conv(self, "out", nn.silu(pixel_norm(self, "norm", x)), 3 * p * p)
        return rearrange(x, "b t y x (p q c) -> b t (y p) (x q) c", p=p, q=p)


def average(x_BxTxYxXxC, st: int, s: int, width: int):
    """Blocks of st x s x s pixels as one, of `width` channels: each the mean of neighbours in the order (C, st, s, s).

    A clip's frame 0 has zeros before it, to fill its block.
    """
    x = jnp.pad(x_BxTxYxXxC, ((0, 0), (-x_BxTxYxXxC.shape[1] % st, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (t i) (y j) (x k) c -> b t y x (c i j k)", i=st, j=s, k=s)
    return x.reshape(*x.shape[:-1], width, -1).mean(-1)


def repeat(x_BxTxYxXxC, st: int, s: int, width: int, starts: bool):
    """Each pixel as st x s x s of `width` channels: its channels repeated, and laid out in the order (C, st, s, s).

    starts: the chunk begins the clip, and of frame 0's copies the last is taken.
    """
    x = jnp.repeat(x_BxTxYxXxC, width * st * s * s // x_BxTxYxXxC.shape[-1], -1)
    x = rearrange(x, "b t y x (c i j k) -> b (t i) (y j) (x k) c", i=st, j=s, k=s)
    return x[:, st - 1 :] if starts else x
