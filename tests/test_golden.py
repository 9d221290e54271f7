"""Wan's transformer gives what its reference gave, and what a rebuild in float64 gives; weights go out as they came in.

C channels, T x Y x X a clip's grid, S text tokens, I image tokens, E their width.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import rebuild
import safetensors.numpy

from dit_video import patches as pt
from dit_video.codecs import Pixels
from dit_video.model import DiT
from dit_video.weights import dit, latte, sit, wan
from experiments.parity import arrays, rows
from experiments.parity import wan as parity_wan
from experiments.parity.arrays import limit


@pytest.fixture(scope="module")
def load(golden):
    """A reference's state dict, the arguments of its class, and the arrays that it took and gave."""
    return functools.partial(arrays.load, golden)


# Wan


def test_wan(golden):
    found = parity_wan.errors(golden)
    assert len(found) == 4
    assert not {what: e for what, e in found.items() if not e < limit(what)}


@pytest.mark.parametrize("path", ["diffusers/wan_transformer", "diffusers/wan_transformer_i2v"])
def test_the_rebuild_gives_the_references_arrays(load, path):
    """So that it is worth holding the model against it."""
    state, config, io = load(path)
    for b, t in enumerate(io["t"]):
        image = io["image"][b] if "image" in io else None
        ours = rebuild.wan_forward(state, config, io["x"][b], t, io["text"][b], image)
        assert arrays.error(ours, io["out"][b]) < (1e-5 if t < 900 else 5e-5)


TINY = {
    "patch_size": [1, 2, 2], "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 4,
    "text_dim": 10, "freq_dim": 256, "ffn_dim": 48, "num_layers": 2, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": None, "added_kv_proj_dim": None,
}  # fmt: skip
FORMS = {"text": TINY, "image": TINY | {"image_dim": 6, "added_kv_proj_dim": 32}}


@pytest.fixture(scope="module", params=FORMS)
def tiny(request, tmp_path_factory):
    """(what the model gives for two clips in one row, all that the rebuild needs for it), random weights."""
    folder, config, rng = tmp_path_factory.mktemp("wan"), FORMS[request.param], np.random.default_rng(0)
    state = {}
    for rule in wan.rules(config):
        for name in rule.names(config["num_layers"]):
            # Small tokens of the image, whose norm's own epsilon then counts; modulation and gains are open.
            scale = 0.1 if name.endswith("bias") or len(rule.shape) == 1 else np.prod(rule.shape[1:]) ** -0.5
            gain = float("norm" in name and name.endswith("weight"))
            state[name] = (gain + scale * rng.normal(size=rule.shape)).astype(np.float32)
    io = {"x": rng.normal(size=(2, 3, 3, 4, 6)), "text": rng.normal(size=(2, 7, 10)), "t": np.array([16.0, 40.0])}
    if config["image_dim"]:
        io["image"] = rng.normal(size=(2, 5, 6))
    io = {name: a.astype(np.float32) for name, a in io.items()}
    if config["image_dim"]:  # the row's tokens serve its first clip alone
        io = {name: a[:1] for name, a in io.items()}
    safetensors.numpy.save_file(state, folder / "tiny.safetensors", {"config": json.dumps(config)})
    np.savez(folder / "tiny_io.npz", **io)
    out, _ = parity_wan.run(folder, "tiny")
    clips = list(zip(*(io[name] for name in ("x", "t", "text", "image") if name in io)))
    return out, lambda **wrong: np.stack([rebuild.wan_forward(state, config, *clip, **wrong) for clip in clips])


def test_wan_equals_the_rebuild(tiny):
    assert arrays.error(tiny[0], tiny[1]()) < 3e-6


@pytest.mark.parametrize(
    "wrong",
    [
        {"eps": 1e-5}, {"gelu": rebuild.exact_gelu}, {"shift_first": False}, {"interleaved": False},
        {"dims": (4, 6, 6)}, {"per_head": True}, {"last_silu": True}, {"gate_text": True},
    ],
)  # fmt: skip
def test_the_rebuild_tells_a_wrong_reading(tiny, wrong):
    """Epsilon, the form of GELU, the order of shift and scale, RoPE's pairs and axes: each would be seen."""
    assert arrays.error(tiny[0], tiny[1](**wrong)) > 6e-6


def test_image_latents_as_channels_around_a_velocity(load):
    """A sampler's patches hold the noise alone; the reference was given both halves as one clip."""
    state, config, io = load("diffusers/wan_transformer_i2v")
    model, params = DiT(**wan.arguments(config)), wan.to_ours(state, config)["dit"]
    C, text = config["out_channels"], lambda b: io["text"][b]
    lay = lambda x: rows.rows_of(np.moveaxis(x, 1, -1), text, np.arange(x.shape[2]) / 4, per_row=1)
    (noise, grids), (shown, _) = lay(io["x"][:, :C]), lay(io["x"][:, C:])
    image = io["image"], np.ones(io["image"].shape[:2], np.int32)
    cond = pt.Cond(noise.ids_BxSxK, noise.prompt_BxS, *image)
    velocity = wan.with_channels(
        jax.jit(lambda patches, cond: model.apply({"params": params}, patches, cond)), shown.patches.x_BxNxP, cells=4
    )
    level_BxG = rows.levels(io["t"], noise.patches.level_BxG.shape)
    out = velocity(dataclasses.replace(noise.patches, level_BxG=level_BxG), cond)
    assert out.shape == noise.patches.x_BxNxP.shape
    assert arrays.error(np.moveaxis(rows.frames(out, grids), 1, 2), io["out"]) < 1e-5


def test_what_the_image_model_is_shown():
    """Four flags, up in the first latent frame alone, then the latents of the picture with grey after it."""
    codec, picture = Pixels((4, 8, 8)), np.random.default_rng(0).uniform(-1, 1, (8, 16, 3)).astype(np.float32)
    shown = wan.image_channels(codec, picture, frames=9)
    assert shown.shape == (3, 1, 2, 4 + codec.channels)
    assert (shown[0, ..., :4] == 1).all() and (shown[1:, ..., :4] == 0).all()
    video = codec.decode(shown[..., 4:])
    np.testing.assert_array_equal(video[0], picture)
    assert (video[1:] == 0).all()


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
