"""Codecs: video in [-1, 1] <-> latents. Each has `stride` (t, y, x), `channels`, `encode` and `decode`, causal in time:
1 + st*k frames become 1 + k latent frames, so an image is one latent frame."""

from dit_video.codecs.pixels import Pixels, check_frames, to_float, to_uint8

__all__ = ["Pixels", "check_frames", "make_codec", "to_float", "to_uint8"]


def make_codec(config) -> Pixels:
    """The codec that `config.codec` asks for."""
    if config.kind == "pixels":
        return Pixels(tuple(config.stride))
    raise ValueError(f"codec.kind={config.kind!r} is not known. Allowed: 'pixels'.")
