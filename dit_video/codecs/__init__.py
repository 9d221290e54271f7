"""Codecs: video in [-1, 1] <-> latents. Each has `stride` (t, y, x), `channels`, `encode` and `decode`, causal in time:
1 + st*k frames become 1 + k latent frames, so an image is one latent frame."""

import dataclasses

from dit_video.codecs.pixels import Pixels, check_frames, to_float, to_uint8

__all__ = ["Latents", "Pixels", "check_frames", "make_codec", "to_float", "to_uint8"]


@dataclasses.dataclass(frozen=True)
class Latents:
    """The shape of latents whose autoencoder is not here: models over them can be built, sized and timed."""

    stride: tuple[int, int, int]
    channels: int

    def encode(self, video_TxYxXx3):
        raise ValueError("codec.kind='latents' cannot encode videos: choose codec.kind='pixels'.")

    def decode(self, latents_TxYxXxC):
        raise ValueError("codec.kind='latents' cannot decode to videos: choose codec.kind='pixels'.")


def make_codec(config) -> Pixels | Latents:
    """The codec that `config.codec` asks for."""
    if config.kind == "pixels":
        return Pixels(tuple(config.stride))
    if config.kind == "latents":
        return Latents(tuple(config.stride), config.channels)
    raise ValueError(f"codec.kind={config.kind!r} is not known. Allowed: 'pixels', 'latents'.")
