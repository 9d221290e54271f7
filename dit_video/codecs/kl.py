"""The image autoencoder of latent diffusion (Rombach et al. 2022, sec. 3.1, app. G.1): frame by frame, 8x in space.

B clips, T frames, Y x X pixels or latents, C latent channels. Frames are images of their own: time is a batch axis.
"""

import functools

import flax.linen as nn

from dit_video.codecs import layers


class Encoder(nn.Module):
    """widths: of the levels, fine to coarse; depth: residual blocks per level; groups: of the norms' channels."""

    channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    depth: int = 2
    groups: int = 32

    @property
    def stride(self) -> tuple[int, int, int]:
        return (1, *[2 ** (len(self.widths) - 1)] * 2)

    @nn.compact
    def __call__(self, video_BxTxYxXx3):
        """moments_BxTxYxXx2C of the latents: their mean and the logarithm of their variance."""
        norm = functools.partial(layers.group_norm, groups=self.groups)
        x = layers.conv(self, "in", video_BxTxYxXx3, self.widths[0])
        for i, width in enumerate(self.widths):
            for j in range(self.depth):
                x = layers.residual(self, f"down_{i}_{j}", x, width, norm, layers.conv)
            if i < len(self.widths) - 1:
                x = layers.halve_space(self, f"down_{i}_half", x)
        x = layers.middle(self, x, norm, layers.conv)
        x = layers.conv(self, "out", nn.silu(norm(self, "norm", x)), 2 * self.channels)
        return layers.dense(self, "moments", x, 2 * self.channels)


class Decoder(nn.Module):
    """The encoder's way back, with one block more per level; the fields are the encoder's."""

    channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    depth: int = 2
    groups: int = 32

    @nn.compact
    def __call__(self, latents_BxTxYxXxC):
        """video_BxTxYxXx3, not clipped."""
        norm = functools.partial(layers.group_norm, groups=self.groups)
        x = layers.dense(self, "latents", latents_BxTxYxXxC, self.channels)
        x = layers.conv(self, "in", x, self.widths[-1])
        x = layers.middle(self, x, norm, layers.conv)
        for i, width in enumerate(reversed(self.widths)):
            for j in range(self.depth + 1):
                x = layers.residual(self, f"up_{i}_{j}", x, width, norm, layers.conv)
            if i < len(self.widths) - 1:
                x = layers.double_space(self, f"up_{i}_double", x, width)
        return layers.conv(self, "out", nn.silu(norm(self, "norm", x)), 3)
