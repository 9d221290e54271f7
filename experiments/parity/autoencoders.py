"""How far the autoencoders are from their reference: the largest error of each output, relative to its largest value.

python -m experiments.parity.autoencoders GOLDEN_DIR

T x Y x X a clip's grid, C channels.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from dit_video.codecs import kl as kl_modules
from dit_video.codecs import wan as wan_modules
from dit_video.codecs.autoencoder import Autoencoder, build, in_chunks, next_chunk
from dit_video.weights import kl, wan_vae
from experiments.parity.arrays import error, load


def sd_errors(golden_dir) -> dict[str, float]:
    """Stable Diffusion's image autoencoder: the images as the frames of one clip."""
    codec, io = read(golden_dir, "autoencoder_kl_sd", kl, kl_modules)
    mean, logvar = codec.moments(np.moveaxis(io["x"], 1, -1))
    decoded = lambda z: in_chunks(codec.decoder, codec.params["decoder"], np.moveaxis(io[z], 1, -1), codec.chunk)
    z = mean + np.exp(logvar / 2) * np.moveaxis(io["eps"], 1, -1)
    divergence = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum((1, 2, 3))
    latents = codec.encode(np.moveaxis(io["x"], 1, -1))
    return {
        "mean": error(mean, np.moveaxis(io["mean"], 1, -1)),
        "logvar": error(logvar, np.moveaxis(io["logvar"], 1, -1)),
        "draw": error(z, np.moveaxis(io["z"], 1, -1)),
        "divergence": error(divergence, io["kl"]),
        "latents": error(latents, np.moveaxis(io["mean"] * io["scaling_factor"], 1, -1)),
        "decoded draw": error(decoded("z"), np.moveaxis(io["decoded_from_z"], 1, -1)),
        "decoded mean": error(decoded("mean"), np.moveaxis(io["decoded_from_mean"], 1, -1)),
    }


def wan21_errors(golden_dir) -> dict[str, float]:
    """Wan 2.1: whole, in chunks, a clip's beginning, an image, and another shape."""
    codec, io = read(golden_dir, "autoencoder_kl_wan", wan_vae, wan_modules)
    video, z = last(io["x"]), last(io["mean"])
    mean, logvar = codec.moments(video)
    return {
        "moments, whole": error(whole(codec, "encoder", video), last(io["moments"])),
        "mean": error(mean, z),
        "logvar": error(logvar, last(io["logvar"])),
        "latents": error(codec.encode(video), (z - np.float32(codec.mean)) / np.float32(codec.std)),
        "mean of the first 5 frames": error(codec.moments(video[:5])[0], last(io["mean_first5frames"])),
        "mean of an image": error(codec.moments(last(io["image_x"]))[0], last(io["image_mean"])),
        "decoded": error(chunked(codec, "decoder", z), last(io["decoded_unclamped"])),
        "decoded, clipped": error(decode(codec, z), last(io["decoded_clamped"])),
        "decoded image": error(chunked(codec, "decoder", last(io["image_mean"])), last(io["image_decoded_unclamped"])),
        "decoded noise, whole": error(
            whole(codec, "decoder", last(io["z_random"])), last(io["decoded_random_unclamped"])
        ),
    }


def wan22_errors(golden_dir) -> dict[str, float]:
    """Wan 2.2, in chunks."""
    codec, io = read(golden_dir, "autoencoder_kl_wan22", wan_vae, wan_modules)
    video, z = last(io["x"]), last(io["mean"])
    # The reference's decoder gives a patch's values in the order (colour, x, y).
    _, T, Y, X = io["decoded_unclamped_prepatch"].shape[1:]
    unclipped = io["decoded_unclamped_prepatch"].reshape(3, 2, 2, T, Y, X).transpose(3, 4, 2, 5, 1, 0)
    unclipped = unclipped.reshape(T, 2 * Y, 2 * X, 3)
    return {
        "mean": error(codec.moments(video)[0], z),
        "decoded": error(chunked(codec, "decoder", z), unclipped),
        "decoded, clipped": error(decode(codec, z), last(io["decoded_clamped"])),
    }


def tiled(golden_dir) -> dict[str, float]:
    """Not parity: the rms error that tiles of 8 latents bring to 16 x 16, relative to the output's deviation.

    With the reference's random weights, drawn latents and blocks of drawn colours, one frame; minutes.
    """
    out, drawn = {}, np.random.default_rng(0)
    for name, weights, modules in (
        ("autoencoder_kl_sd", kl, kl_modules),
        ("autoencoder_kl_wan", wan_vae, wan_modules),
        ("autoencoder_kl_wan22", wan_vae, wan_modules),
    ):
        codec, _ = read(golden_dir, name, weights, modules)
        tiles, s = dataclasses.replace(codec, tile=8), codec.stride[1]
        latents = drawn.normal(size=(1, 16, 16, codec.channels)).astype(np.float32)
        video = np.tanh(drawn.normal(size=(1, 16, 16, 3))).repeat(s, 1).repeat(s, 2).astype(np.float32)
        for what, x in (("decode", latents), ("encode", video)):
            whole, parts = getattr(codec, what)(x), getattr(tiles, what)(x)
            out[f"{name} {what}"] = float(np.sqrt(np.mean((parts - whole) ** 2)) / whole.std())
    return out


def read(golden_dir, name: str, weights, modules) -> tuple[Autoencoder, dict]:
    """The codec of a reference's weights, and the arrays that the reference took and gave."""
    state, config, io = load(golden_dir, f"diffusers/{name}")
    return build(modules, weights.settings(config), jax.device_put(weights.to_ours(state, config))), io


def whole(codec: Autoencoder, part: str, x_TxYxXxC):
    return next_chunk(getattr(codec, part), codec.params[part], {}, x_TxYxXxC[None])[0][0]


def chunked(codec: Autoencoder, part: str, x_TxYxXxC):
    return in_chunks(getattr(codec, part), codec.params[part], x_TxYxXxC, codec.chunk)


def decode(codec: Autoencoder, z_TxYxXxC):
    """The codec's video from latents that are not normalised."""
    return codec.decode((z_TxYxXxC - np.float32(codec.mean)) / np.float32(codec.std))


def last(array_1xCxTxYxX) -> np.ndarray:
    """One clip, channels last."""
    return np.moveaxis(array_1xCxTxYxX[0], 0, -1)


def errors(golden_dir) -> dict[str, float]:
    """All of them, each under its model's name."""
    models = {"sd": sd_errors, "wan 2.1": wan21_errors, "wan 2.2": wan22_errors}
    return {f"{name} {what}": e for name, of in models.items() for what, e in of(golden_dir).items()}


if __name__ == "__main__":
    print(json.dumps(errors(sys.argv[1]), indent=1))
