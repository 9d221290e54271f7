"""A learned autoencoder as a codec: chunk by chunk in time, tile by tile in space, numpy in, numpy out.

T x Y x X a clip's grid, C latent channels. The device holds one chunk of one tile, and what its causal layers keep of
the frames before: memory does not grow with duration. Chunked in time equals whole, up to float rounding. Tiled in
space does not: convolutions meet zeros at a tile's edges, attention and group norms see the tile instead of the frame.
With random weights, 16 x 16 latents in tiles of 8 are off by 11 to 31% of the output's deviation (root mean square;
`tiled` in experiments/parity/autoencoders.py). Larger tiles are closer.
"""

import dataclasses
import functools
import itertools
import json
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

from dit_video.codecs.pixels import check_size

METADATA = "dit_video_codec"


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """encoder, decoder: flax modules, with their parameters {'encoder', 'decoder'} on the device.

    mean, std: of a latent's channels, by which latents are normalised; chunk: latent frames at a time; tile: latents
    on a side of a tile, 0 = whole frames. Neighbouring tiles share a quarter of it at least, where they are blended.
    """

    encoder: nn.Module
    decoder: nn.Module
    params: Any = dataclasses.field(compare=False, repr=False)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    chunk: int = 1
    tile: int = 0

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"codec.chunk={self.chunk} latent frames cannot be encoded at a time: at least 1.")
        if self.tile and self.tile < 4:
            raise ValueError(
                f"codec.tile={self.tile} is too small to blend: at least 4 latents, or 0 for whole frames."
            )

    @property
    def stride(self) -> tuple[int, int, int]:
        return self.encoder.stride

    @property
    def channels(self) -> int:
        return self.encoder.channels

    def moments(self, video_TxYxXx3):
        """mean_TxYxXxC and logarithm of the variance_TxYxXxC of the latents of a video in [-1, 1], not normalised.

        Raises ValueError unless there are 1 + st*k frames of a size that (sy, sx) divides.
        """
        check_size(video_TxYxXx3.shape, self.stride)
        st, s, _ = self.stride
        run = lambda video: in_chunks(self.encoder, self.params["encoder"], video, self.chunk * st)
        moments = in_tiles(run, np.asarray(video_TxYxXx3, np.float32), self.tile, s, 1)
        mean, logvar = np.split(moments, 2, -1)
        return mean, np.clip(logvar, -30, 20)

    def encode(self, video_TxYxXx3, key=None):
        """latents_TxYxXxC, normalised: the mean, or with a jax.random key a draw from their distribution."""
        latents, logvar = self.moments(video_TxYxXx3)
        if key is not None:
            latents = latents + np.exp(logvar / 2) * jax.device_get(jax.random.normal(key, latents.shape))
        return (latents - np.float32(self.mean)) / np.float32(self.std)

    def decode(self, latents_TxYxXxC):
        """The video_TxYxXx3, clipped to [-1, 1], float32."""
        latents = np.asarray(latents_TxYxXxC, np.float32) * np.float32(self.std) + np.float32(self.mean)
        run = lambda latents: in_chunks(self.decoder, self.params["decoder"], latents, self.chunk)
        return np.clip(in_tiles(run, latents, self.tile, 1, self.stride[1]), -1, 1)


def in_chunks(module: nn.Module, params, x_TxYxXxC, frames: int):
    """module(x_TxYxXxC) computed `frames` frames at a time, the first of all alone."""
    cache, parts = {}, []
    for start, end in itertools.pairwise([0, *range(1, len(x_TxYxXxC), frames), len(x_TxYxXxC)]):
        part, cache = next_chunk(module, params, cache, jax.device_put(x_TxYxXxC[None, start:end]))
        parts.append(jax.device_get(part)[0])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def next_chunk(module: nn.Module, params, cache, x_BxTxYxXxC):
    """The module's output for a clip's next frames, and the cache for those after them; at the start it is {}.

    The first chunk holds 1 + n frames, those after it multiples of what the module makes one frame of.
    """
    y, kept = module.apply({"params": params, "cache": cache}, x_BxTxYxXxC, mutable=["cache"])
    return y, kept.get("cache", {})


def in_tiles(run, x_TxYxXxC, tile: int, side_in: int, side_out: int):
    """run(x_TxYxXxC) computed tile by tile, and blended linearly where tiles overlap.

    tile: latents on a side, 0 = whole; side_in, side_out: values of x and of run(x) on a latent's side.
    """
    ys, xs = (_starts(length // side_in, tile) for length in x_TxYxXxC.shape[1:3])
    if len(ys) * len(xs) == 1:
        return run(x_TxYxXxC)
    spans = [min(tile, length // side_in) for length in x_TxYxXxC.shape[1:3]]
    weight_YxXx1 = np.multiply.outer(*(_tent(n * side_out, tile // 4 * side_out) for n in spans))[..., None]
    size_out = [length // side_in * side_out for length in x_TxYxXxC.shape[1:3]]
    total, weights = 0.0, np.zeros((*size_out, 1), np.float32)
    for start in itertools.product(ys, xs):
        cut = lambda side, start=start: tuple(slice(a * side, (a + n) * side) for a, n in zip(start, spans))
        part = run(x_TxYxXxC[:, *cut(side_in)])
        if isinstance(total, float):
            total = np.zeros((len(part), *size_out, part.shape[-1]), np.float32)
        total[:, *cut(side_out)] += weight_YxXx1 * part
        weights[cut(side_out)] += weight_YxXx1
    return total / weights


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles of one size begin that cover a length, evenly, and overlap by a quarter at least."""
    if not tile or length <= tile:
        return [0]
    overlap = tile // 4
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _tent(length: int, ramp: int) -> np.ndarray:
    """Weights of a tile's values: 1, and falling linearly to nearly 0 over `ramp` values at both ends."""
    from_end = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
    return np.minimum(from_end / ramp, 1).astype(np.float32)


def save(path, kind: str, settings: dict, params: dict) -> None:
    """Writes parameters {'encoder', 'decoder'} to a .safetensors file that `load` reads.

    settings: {'encoder': the module's fields, 'decoder': likewise, 'mean', 'std'}; kind: as codec.kind.
    """
    tensors = {
        f"{part}/{name}": np.ascontiguousarray(w, np.float32) for part in params for name, w in params[part].items()
    }
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serialise(tensors, {METADATA: json.dumps({"kind": kind, **settings})}))


@functools.lru_cache(maxsize=1)
def load(path: str) -> tuple[str, dict, dict]:
    """kind, settings and parameters, on the device, of a file that `save` wrote.

    Raises ValueError where it carries no settings: published weights are to be converted first.
    """
    data = epath.Path(path).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {})
    if METADATA not in metadata:
        raise ValueError(f"codec.weights={path!r} is no converted autoencoder: convert the published weights first.")
    settings, params = json.loads(metadata[METADATA]), {}
    for name, w in parse(data).items():
        part, leaf = name.split("/")
        params.setdefault(part, {})[leaf] = w
    return settings.pop("kind"), settings, jax.device_put(params)


def build(modules, settings: dict, params: dict, chunk: int = 1, tile: int = 0) -> Autoencoder:
    """The codec of `settings`, as `save` takes them; modules: the Python module that Encoder and Decoder are of."""
    fields = lambda part: {k: tuple(v) if isinstance(v, list) else v for k, v in settings[part].items()}
    encoder, decoder = modules.Encoder(**fields("encoder")), modules.Decoder(**fields("decoder"))
    return Autoencoder(encoder, decoder, params, tuple(settings["mean"]), tuple(settings["std"]), chunk, tile)
