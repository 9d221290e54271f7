"""Published models give what their reference implementations gave: weights imported, clips laid out as ours are.

B clips in the arrays, R rows that they are packed in, N patches per row, n of one clip, P values per patch.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from dit_video import patches as pt
from dit_video.attention import rope_angles
from dit_video.model import DiT, block, sincos_table
from dit_video.text.labels import LabelEncoder, tokenise
from dit_video.weights import dit, wan


@pytest.fixture(scope="module")
def load(shared):
    """A reference's state dict, the arguments of its class, and the arrays that it took and gave."""

    def read(path: str):
        with safetensors.safe_open(shared / "golden" / f"{path}.safetensors", "np") as file:
            state, config = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])
        return state, config, dict(np.load(shared / "golden" / f"{path}_io.npz"))

    return read


def error(ours, theirs) -> float:
    """The largest difference, relative to the reference's largest value."""
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def rows_of(x_BxTxYxXxC, text_of, times_T, per_row: int, padding: int = 5):
    """Packs the clips, `per_row` to a row with padding at its end; each is a group. Returns Batch and Grids."""
    laid = [
        pt.lay_out(x, times_T, (1, 2, 2), (8, 8), text_of(b), clip=b, groups="clip") for b, x in enumerate(x_BxTxYxXxC)
    ]
    pieces = [piece for piece, _ in laid]
    n, s, _ = pieces[0].size
    rows = [pieces[i : i + per_row] for i in range(0, len(pieces), per_row)]
    batch, places = pt.pack(rows, per_row * n + padding, per_row + 1, per_row * s + padding)
    at = [place for row in places for place in row]
    return batch, [dataclasses.replace(g, row=row, offset=offset) for (_, g), (row, offset, _) in zip(laid, at)]


def levels(t, shape) -> np.ndarray:
    """Levels such that level * 1000 is the reference's timestep to the bit; groups beyond the clips get 0."""
    level = np.asarray(t, np.float32) / np.float32(1000)
    np.testing.assert_array_equal(level * np.float32(1000), np.asarray(t, np.float32))
    return np.pad(level.reshape(shape[0], -1), ((0, 0), (0, shape[1] - level.size // shape[0])))


def to_channels_first(clips) -> np.ndarray:
    return np.stack([np.moveaxis(np.asarray(c), -1, 0) for c in clips])


# DiT


@pytest.fixture(scope="module")
def dit_golden(load):
    state, config, io = load("dit/dit_tiny")
    model = DiT(**dit.arguments(config))
    params = dit.to_ours(state, config)
    forward = jax.jit(lambda p, c: model.apply({"params": params["dit"]}, p, c))

    def run(x_BxCxYxX, t_B, y_B):
        ids = lambda b: tokenise("" if y_B[b] == config["num_classes"] else str(y_B[b]), config["num_classes"])
        batch, grids = rows_of(np.moveaxis(x_BxCxYxX, 1, -1)[:, None], ids, [0.0], per_row=2)
        patches = dataclasses.replace(batch.patches, level_BxG=levels(t_B, batch.patches.level_BxG.shape))
        text = LabelEncoder(config["hidden_size"], config["num_classes"]).apply(
            {"params": params["text"]}, batch.ids_BxSxK, batch.prompt_BxS
        )
        out = np.asarray(forward(patches, pt.Cond(text, batch.prompt_BxS)))
        return to_channels_first(pt.unpack(out, grids))[:, :, 0]

    return run, model, params, io


def test_dit_forward(dit_golden):
    """Labels, the null class among them, and timesteps 0 to 999; two clips to a row, and padding."""
    run, _, _, io = dit_golden
    out = run(io["x"], io["t"], io["y"])
    late = io["t"] > 900
    assert error(out[~late], io["out"][~late]) < 1e-5
    assert error(out[late], io["out"][late]) < 5e-5


def test_dit_forward_at_fractional_timesteps(dit_golden):
    run, _, _, io = dit_golden
    out, late = run(io["x"], io["t_frac"], io["y"]), io["t_frac"] > 900
    assert error(out[~late], io["out_t_frac"][~late]) < 1e-5
    assert error(out[late], io["out_t_frac"][late]) < 5e-5


def test_dit_blocks_one_by_one(dit_golden):
    """Each block's output from the reference's input to it, so that no error hides behind the next norm."""
    _, model, params, io = dit_golden
    B, N, _ = io["act_block0"].shape
    seg, group = np.ones((B, N), np.int32), np.zeros((B, N), np.int32)
    context = {"tags": {"all": (seg, group)}, "rope": None, "group_BxN": group, "prompt_tag": (seg, group)}
    context["c_BxGxD"] = jax.nn.silu(io["act_t_embedder"] + io["act_y_embedder"])[:, None]
    stacked = {k.removeprefix("block_"): v for k, v in params["dit"].items() if k.startswith("block_")}
    one = jax.jit(lambda w, h: block(model, w, h, context, "all"))
    h = io["act_x_embedder"] + io["pos_embed_96_4"]
    for i in range(model.depth):
        assert error(one({k: v[i] for k, v in stacked.items()}, h), io[f"act_block{i}"]) < 2e-6
        h = io[f"act_block{i}"]


@pytest.mark.parametrize("width, side", [(96, 4), (384, 16)])
def test_dit_position_table(dit_golden, width, side):
    y, x = np.divmod(np.arange(side * side), side)
    table = sincos_table(np.stack([y, y, x], -1)[None], width)[0]
    assert error(table, dit_golden[3][f"pos_embed_{width}_{side}"]) < 2e-6


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
    return to_channels_first(pt.unpack(out, grids)), io


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


FAMILIES = [(dit, "dit/dit_tiny"), (wan, "diffusers/wan_transformer"), (wan, "diffusers/wan_transformer_i2v")]


@pytest.mark.parametrize("family, path", FAMILIES)
def test_export_is_the_inverse_of_import(load, family, path):
    state, config, _ = load(path)
    params = family.to_ours(state, config)
    again = family.to_theirs(params, config)
    assert again.keys() == state.keys()
    for name in state:
        np.testing.assert_allclose(again[name], state[name], rtol=0, atol=2e-6 if name == "pos_embed" else 0)
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
