"""How near Wan's transformer, with its published weights' names, comes to what its reference gave.

B clips in the arrays, N patches per row, n of one clip, D model width, S text tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.attention import rope_angles
from dit_video.model import DiT, block
from dit_video.patches import Cond
from dit_video.weights import wan
from experiments.parity.arrays import error, load
from experiments.parity.rows import frames, levels, rows_of


def run(golden_dir, path: str, per_token: bool = False):
    """(the clips that the model gives, BxCxFxYxX; what the reference took and gave): clips in one row, each with its
    timestep and its prompt, or with `per_token` a row and a timestep for each patch."""
    state, config, io = load(golden_dir, path)
    model, params = DiT(**wan.arguments(config)), wan.to_ours(state, config)["dit"]
    x = np.moveaxis(io["x"], 1, -1)
    times = np.arange(x.shape[1]) / 4
    batch, grids = rows_of(x, lambda b: io["text"][b], times, per_row=1 if per_token else len(x))
    patches = batch.patches
    if per_token:
        # Every patch is a group of its own, and the padding's patches share the last one.
        B, N = patches.seg_BxN.shape
        n = io["t_per_token"].shape[1]
        group = np.minimum(np.arange(N), n)[None].repeat(B, 0).astype(np.int32)
        seg = np.pad(np.ones((B, n), np.int32), ((0, 0), (0, 1)))
        level = levels(io["t_per_token"], seg.shape)
        patches = dataclasses.replace(patches, group_BxN=group, seg_BxG=seg, clip_BxG=seg, level_BxG=level)
    else:
        patches = dataclasses.replace(patches, level_BxG=levels(io["t"], patches.level_BxG.shape))
    image = (io["image"], np.ones(io["image"].shape[:2], np.int32)) if "image" in io else ()
    cond = Cond(batch.ids_BxSxK, batch.prompt_BxS, *image)
    out = np.asarray(jax.jit(lambda p, c: model.apply({"params": params}, p, c))(patches, cond))
    return np.moveaxis(frames(out, grids), 1, 2), io


def block_error(golden_dir) -> float:
    """The second block, from the first one's output."""
    state, config, io = load(golden_dir, "diffusers/wan_transformer")
    model, params = DiT(**wan.arguments(config)), wan.to_ours(state, config)["dit"]
    B, N, D = io["act_block0"].shape
    T, Y, X = io["x"].shape[2], io["x"].shape[3] // 2, io["x"].shape[4] // 2
    pos = np.stack(np.meshgrid(np.arange(T), np.arange(Y), np.arange(X), indexing="ij"), -1).reshape(1, N, 3)
    angles = rope_angles(pos.repeat(B, 0), D // model.heads)
    ones, zeros = np.ones((B, N), np.int32), np.zeros((B, N), np.int32)
    S = io["text"].shape[1]
    context = {
        "tags": {"all": (ones, zeros)},
        "rope": (jnp.cos(angles), jnp.sin(angles)),
        "group_BxN": zeros,
        "mod_BxGx6D": io["timestep_proj"][:, None],
        "text_BxSxD": io["text_ctx"],
        "prompt_tag": (ones, zeros),
        "text_tag": (ones[:, :S], zeros[:, :S]),
    }
    w = {k.removeprefix("block_"): v[1] for k, v in params.items() if k.startswith("block_")}
    ours = jax.jit(lambda w, h, context: block(model, w, h, context, "all"))(w, io["act_block0"], context)
    return error(ours, io["act_block1"])


def errors(golden_dir) -> dict[str, float]:
    """Text to video, with a timestep per patch too; image to video, whose prompt is 512 tokens, zeros at its end that
    are keys like any other; the second block."""
    out, io = run(golden_dir, "diffusers/wan_transformer")
    per_patch, _ = run(golden_dir, "diffusers/wan_transformer", per_token=True)
    from_image, image_io = run(golden_dir, "diffusers/wan_transformer_i2v")
    return {
        "Wan: forward": error(out, io["out"]),
        "Wan: forward with a timestep per patch": error(per_patch, io["out_per_token"]),
        "Wan: forward, image to video": error(from_image, image_io["out"]),
        "Wan: block 1": block_error(golden_dir),
    }
