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


def make_codec(config):
    """The codec that `config.codec` asks for: Pixels, Latents or Autoencoder.

    Raises ValueError for a kind that is none, and where weights are of another kind or stride than the config's.
    """
    if config.kind == "pixels":
        return Pixels(tuple(config.stride))
    if config.kind == "latents":
        return Latents(tuple(config.stride), config.channels)
    if config.kind in ("kl", "wan"):
        return _learned(config)
    raise ValueError(f"codec.kind={config.kind!r} is not known. Allowed: 'pixels', 'latents', 'kl', 'wan'.")


def _learned(config):
    # Imported here: decoding workers of the pixel codec need no flax.
    from dit_video.codecs import autoencoder, kl, wan

    if not config.weights:
        raise ValueError(f"codec.kind={config.kind!r} needs codec.weights, a .safetensors file of converted weights.")
    kind, settings, params = autoencoder.load(str(config.weights))
    if kind != config.kind:
        raise ValueError(f"codec.kind={config.kind!r}, but {config.weights} holds {kind!r}: set codec.kind={kind!r}.")
    codec = autoencoder.build({"kl": kl, "wan": wan}[kind], settings, params, config.chunk, config.tile)
    if tuple(config.stride) != codec.stride:
        raise ValueError(f"codec.stride={tuple(config.stride)} is not that of {config.weights}: set {codec.stride}.")
    return codec
