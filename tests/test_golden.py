"""Wan's transformer gives what its reference gave; every family's weights go out as they came in."""

import functools

import jax
import numpy as np
import pytest

from dit_video import patches as pt
from dit_video.model import DiT
from dit_video.weights import dit, latte, sit, wan
from experiments.parity import arrays
from experiments.parity import wan as parity_wan
from experiments.parity.arrays import limit


@pytest.fixture(scope="module")
def load(shared):
    """A reference's state dict, the arguments of its class, and the arrays that it took and gave."""
    return functools.partial(arrays.load, shared / "golden")


# Wan


def test_wan(shared):
    found = parity_wan.errors(shared / "golden")
    assert len(found) == 4
    assert not {what: e for what, e in found.items() if not e < limit(what)}


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
