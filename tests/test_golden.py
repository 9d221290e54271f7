"""Published models give what their reference implementations gave: weights imported, clips laid out as ours are.

B clips in the arrays, R rows that they are packed in, N patches per row, n of one clip, P values per patch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video import patches as pt
from dit_video.attention import rope_angles
from dit_video.model import DiT, block
from dit_video.weights import dit, latte, sit, wan
from experiments.parity import arrays
from experiments.parity.arrays import error
from experiments.parity.rows import frames, levels, rows_of


@pytest.fixture(scope="module")
def load(shared):
    """A reference's state dict, the arguments of its class, and the arrays that it took and gave."""
    return functools.partial(arrays.load, shared / "golden")


# Wan


def wan_run(load, path: str, per_token: bool = False):
    state, config, io = load(path)
    settings = wan.arguments(config)
    model, params = DiT(**settings), wan.to_ours(state, config)["dit"]
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
    cond = pt.Cond(batch.ids_BxSxK, batch.prompt_BxS, *image)
    out = np.asarray(jax.jit(lambda p, c: model.apply({"params": params}, p, c))(patches, cond))
    return np.moveaxis(frames(out, grids), 1, 2), io


def test_wan_forward(load):
    """Two clips in one row, each with its timestep and its prompt."""
    out, io = wan_run(load, "diffusers/wan_transformer")
    assert error(out, io["out"]) < 1e-5


def test_wan_forward_with_a_timestep_per_patch(load):
    out, io = wan_run(load, "diffusers/wan_transformer", per_token=True)
    assert error(out, io["out_per_token"]) < 1e-5


def test_wan_image_to_video(load):
    """The prompt is 512 tokens, zeros at its end that are keys like any other."""
    out, io = wan_run(load, "diffusers/wan_transformer_i2v")
    assert error(out, io["out"]) < 1e-5


def test_wan_second_block(load):
    state, config, io = load("diffusers/wan_transformer")
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
    assert error(ours, io["act_block1"]) < 2e-6


# Import and export


FAMILIES = [
    (dit, "dit/dit_tiny"),
    (sit, "sit/sit_tiny"),
    (latte, "latte/latte_tiny_class"),
    (wan, "diffusers/wan_transformer"),
    (wan, "diffusers/wan_transformer_i2v"),
]


@pytest.mark.parametrize("family, path", FAMILIES)
def test_export_is_the_inverse_of_import(load, family, path):
    state, config, _ = load(path)
    params = family.to_ours(state, config)
    again = family.to_theirs(params, config)
    assert again.keys() == state.keys()
    for name in state:
        np.testing.assert_allclose(
            again[name], state[name], rtol=0, atol=2e-6 if name in ("pos_embed", "temp_embed") else 0
        )
    jax.tree.map(np.testing.assert_array_equal, params, family.to_ours(again, config))


@pytest.mark.parametrize("family, path", FAMILIES)
def test_import_fills_every_parameter_of_the_model(load, family, path):
    state, config, _ = load(path)
    settings = family.arguments(config)
    zeros = lambda *shape: np.zeros(shape, np.int32)
    patches = pt.Patches(
        np.zeros((1, 4, settings["patch_values"]), np.float32), np.zeros((1, 4, 3), np.float32),
        *(zeros(1, 4) for _ in range(5)), np.zeros((1, 1), np.float32), zeros(1, 1), zeros(1, 1),
    )  # fmt: skip
    image = (np.zeros((1, 1, settings.get("image_width", 0)), np.float32), zeros(1, 1))
    cond = pt.Cond(np.zeros((1, 1, settings["text_width"]), np.float32), zeros(1, 1), *image)
    init = jax.eval_shape(DiT(**settings).init, jax.random.key(0), patches, cond)["params"]
    shapes = lambda tree: jax.tree.map(lambda w: (w.shape, w.dtype), tree)
    assert shapes(family.to_ours(state, config)["dit"]) == shapes(init)


@pytest.mark.parametrize("family, path", FAMILIES)
def test_a_weight_missing_left_over_or_misshapen_is_named(load, family, path):
    state, config, _ = load(path)
    name = "blocks.0.attn1.to_q.weight" if family is wan else "blocks.0.attn.qkv.weight"
    with pytest.raises(ValueError, match=f"lack '{name}'"):
        family.to_ours({k: v for k, v in state.items() if k != name}, config)
    with pytest.raises(ValueError, match="hold .'blocks.9.extra.weight'"):
        family.to_ours({**state, "blocks.9.extra.weight": state[name]}, config)
    with pytest.raises(ValueError, match=f"'{name}' is .*by its configuration"):
        family.to_ours({**state, name: state[name][:-1]}, config)
    params = family.to_ours(state, config)
    with pytest.raises(ValueError, match="lack 'dit/block_o'"):
        family.to_theirs({**params, "dit": {k: v for k, v in params["dit"].items() if k != "block_o"}}, config)
    with pytest.raises(ValueError, match="hold .'dit/novel'"):
        family.to_theirs({**params, "dit": {**params["dit"], "novel": np.zeros(3)}}, config)
    with pytest.raises(ValueError, match="block_o"):
        family.to_theirs({**params, "dit": {**params["dit"], "block_o": params["dit"]["block_o"][:, :-1]}}, config)


def test_a_configuration_that_the_model_does_not_know_is_refused(load):
    _, config, _ = load("diffusers/wan_transformer")
    with pytest.raises(ValueError, match="qk_norm='rms_norm' cannot be imported. Allowed: .'rms_norm_across_heads'"):
        wan.arguments({**config, "qk_norm": "rms_norm"})
