"""Learned autoencoders: layers as in a plain float64 rebuild, outputs as the reference's, chunked equal to whole.

B clips, T x Y x X their grid, C channels.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import rebuild_codecs
import safetensors.numpy

from dit_video.codecs import autoencoder, layers, make_codec, wan
from dit_video.codecs import kl as kl_modules
from dit_video.codecs.autoencoder import build, in_chunks, in_tiles, next_chunk
from dit_video.weights import kl, wan_vae
from experiments.parity import autoencoders as parity
from experiments.parity.arrays import error, load

PUBLISHED = {
    "autoencoder_kl_sd": (kl, kl_modules),
    "autoencoder_kl_wan": (wan_vae, wan),
    "autoencoder_kl_wan22": (wan_vae, wan),
}


# Layers, against sums written out in float64


class One(nn.Module):
    """A layer alone."""

    layer: Any

    @nn.compact
    def __call__(self, x_BxTxYxXxC):
        return self.layer(self, "one", x_BxTxYxXxC)


def run(layer, x, **shapes):
    """The layer's output in float64, and its parameters drawn at random, all of them."""
    drawn = np.random.default_rng(1)
    params = {name: drawn.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return np.asarray(One(layer).apply({"params": params}, jnp.float32(x)), np.float64), {
        name: np.float64(w) for name, w in params.items()
    }


def draw(*shape):
    return np.float64(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def convolve(x_TxYxXxC, w, bias, padding, stride=(1, 1, 1)):
    """out[t, y, x] = sum of x[t st + i, y sy + j, x sx + k] @ w[i, j, k] over the window, zeros around."""
    x = np.pad(x_TxYxXxC, (*padding, (0, 0)))
    size = [(n - k) // s + 1 for n, k, s in zip(x.shape, w.shape, stride)]
    out = np.zeros((*size, w.shape[-1])) + bias
    for window in np.ndindex(*w.shape[:3]):
        at = tuple(slice(i, i + s * (n - 1) + 1, s) for i, n, s in zip(window, size, stride))
        out += x[at] @ w[window]
    return out


def test_a_causal_convolution_sees_a_frame_and_two_before_it():
    x = draw(2, 4, 4, 5, 3)
    y, p = run(lambda m, n, x: layers.causal_conv(m, n, x, 6), x, one=(3, 3, 3, 3, 6), one_bias=(6,))
    for ours, clip in zip(y, x):
        np.testing.assert_allclose(ours, convolve(clip, p["one"], p["one_bias"], [(2, 0), (1, 1), (1, 1)]), atol=2e-5)


def test_halving_in_space_pads_right_and_bottom_alone():
    x = draw(1, 2, 4, 6, 3)
    y, p = run(layers.halve_space, x, one=(3, 3, 3, 3), one_bias=(3,))
    np.testing.assert_allclose(
        y[0], convolve(x[0], p["one"][None], p["one_bias"], [(0, 0), (0, 1), (0, 1)], (1, 2, 2)), atol=2e-5
    )


def test_doubling_in_space_repeats_pixels():
    x = draw(1, 2, 3, 4, 3)
    y, p = run(lambda m, n, x: layers.double_space(m, n, x, 5), x, one=(3, 3, 3, 5), one_bias=(5,))
    large = x[0].repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(
        y[0], convolve(large, p["one"][None], p["one_bias"], [(0, 0), (1, 1), (1, 1)]), atol=2e-5
    )


def test_halving_in_time_passes_frame_0_and_joins_the_rest_by_threes():
    x = draw(1, 7, 2, 3, 4)
    y, p = run(layers.halve_time, x, one=(3, 1, 1, 4, 4), one_bias=(4,))
    w = p["one"][:, 0, 0]
    expected = [x[0, 0]] + [sum(x[0, 2 * k + i] @ w[i] for i in range(3)) + p["one_bias"] for k in range(3)]
    np.testing.assert_allclose(y[0], expected, atol=1e-5)


def test_doubling_in_time_passes_frame_0_and_gives_pairs_in_order():
    """The first C outputs are the earlier frame, the last C the later; frame 0 is not in the convolution."""
    x = draw(1, 4, 2, 3, 4)
    y, p = run(layers.double_time, x, one=(3, 1, 1, 4, 8), one_bias=(8,))
    w, rest = p["one"][:, 0, 0], [np.zeros((2, 3, 4))] * 2 + list(x[0, 1:])
    expected = [x[0, 0]]
    for k in range(3):
        pair = sum(rest[k + i] @ w[i] for i in range(3)) + p["one_bias"]
        expected += [pair[..., :4], pair[..., 4:]]
    np.testing.assert_allclose(y[0], expected, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_group_norm(scale):
    """Over a frame's pixels and a group's channels; at the small scale epsilon, 1e-6, is half of the variance."""
    x = draw(2, 2, 3, 4, 6) * scale
    y, p = run(lambda m, n, x: layers.group_norm(m, n, x, 2), x, one_gain=(6,), one_bias=(6,))
    for b, t in np.ndindex(2, 2):
        for group in (slice(0, 3), slice(3, 6)):
            part = x[b, t, :, :, group]
            normed = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
            np.testing.assert_allclose(
                y[b, t, :, :, group], normed * p["one_gain"][group] + p["one_bias"][group], atol=1e-5
            )


def test_pixel_norm():
    """Every pixel by its own length, which is taken as 1e-12 at least."""
    x = draw(1, 2, 3, 4, 6) * np.array([1, 1e-5, 1e-13, 0])[:, None]
    y, p = run(layers.pixel_norm, x, one_gain=(6,))
    length = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    np.testing.assert_allclose(y, x / length * np.sqrt(6) * p["one_gain"], atol=2e-6)


def test_attention_is_each_frame_s_own():
    x = draw(1, 2, 2, 3, 4)
    shapes = {f"one_{part}": (4, 4) for part in "qkvo"} | {f"one_{part}_bias": (4,) for part in "qkvo"}
    layer = lambda m, n, x: layers.attention(m, n, x, layers.pixel_norm)
    y, p = run(layer, x, one_norm_gain=(4,), **shapes)
    for t in range(2):
        h = x[0, t].reshape(6, 4)
        normed = h / np.linalg.norm(h, axis=-1, keepdims=True) * 2 * p["one_norm_gain"]
        q, k, v = (normed @ p[f"one_{part}"] + p[f"one_{part}_bias"] for part in "qkv")
        share = np.exp(q @ k.T / 2)
        out = h + (share / share.sum(-1, keepdims=True) @ v) @ p["one_o"] + p["one_o_bias"]
        np.testing.assert_allclose(y[0, t].reshape(6, 4), out, atol=1e-5)


def test_average_and_repeat_number_a_block_s_values_channel_first():
    st, s, x = 2, 2, draw(1, 3, 4, 4, 4)
    y = wan.average(jnp.float32(x), st, s, 8)
    padded = np.concatenate([np.zeros((1, 4, 4, 4)), x[0]])
    for at in np.ndindex(2, 2, 2):
        block = padded[tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, (st, s, s)))]
        values = [block[i, j, k, c] for c, i, j, k in np.ndindex(4, st, s, s)]
        np.testing.assert_allclose(y[(0, *at)], np.reshape(values, (8, -1)).mean(-1), atol=1e-6)
    for starts in (True, False):
        z = wan.repeat(jnp.float32(x), st, s, 2, starts)
        assert z.shape == (1, 5 if starts else 6, 8, 8, 2)
        whole = np.concatenate([np.zeros_like(z[:, :1]), z], 1) if starts else z
        for at in np.ndindex(3, 4, 4):
            values = x[(0, *at)].repeat(2 * st * s * s // 4).reshape(2, st, s, s)
            block = whole[(0, *(slice(i * n, (i + 1) * n) for i, n in zip(at, (st, s, s))))]
            first = int(starts and at[0] == 0)
            np.testing.assert_array_equal(block[first:], np.moveaxis(np.float32(values), 0, -1)[first:])


# Chunks


def tiny(carried: bool):
    """A codec of two levels, random parameters, 1 + 2k frames, without a reference."""
    fields = {"channels": 3, "widths": (4, 4), "depth": 1, "in_time": (True,), "patch": 2, "carried": carried}
    settings = {"encoder": fields, "decoder": fields, "mean": (0.1, 0.2, -0.3), "std": (1.0, 2.0, 0.5)}
    modules, drawn, params = (wan.Encoder(**fields), wan.Decoder(**fields)), np.random.default_rng(0), {}
    for part, m, shape in zip(("encoder", "decoder"), modules, ((1, 1, 8, 8, 3), (1, 1, 2, 2, 3))):
        shapes = jax.eval_shape(m.init, jax.random.key(0), jnp.zeros(shape))["params"]
        scale = lambda w: np.prod(w.shape[:-1]) ** -0.5 if w.ndim > 1 else 0.1
        params[part] = {
            k: np.float32(k.endswith("gain") + scale(w) * drawn.normal(size=w.shape)) for k, w in shapes.items()
        }
    return build(wan, settings, jax.device_put(params))


@pytest.fixture(scope="module", params=[False, True], ids=["2.1", "2.2"])
def small(request):
    return tiny(request.param)


def test_chunked_equals_whole(small):
    """Whatever the chunk; and latents and frames come as the stride says."""
    video = np.tanh(draw(9, 8, 12, 3)).astype(np.float32)
    assert small.stride == (2, 4, 4) and small.channels == 3
    moments, _ = next_chunk(small.encoder, small.params["encoder"], {}, video[None])
    assert moments.shape == (1, 5, 2, 3, 6)
    z = np.float32(moments[0, ..., :3])
    decoded, _ = next_chunk(small.decoder, small.params["decoder"], {}, z[None])
    assert decoded.shape == (1, 9, 8, 12, 3)
    for chunk in (1, 3):
        ours = in_chunks(small.encoder, small.params["encoder"], video, 2 * chunk)
        np.testing.assert_allclose(ours, moments[0], atol=1e-5 * np.abs(moments).max())
        ours = in_chunks(small.decoder, small.params["decoder"], z, chunk)
        np.testing.assert_allclose(ours, decoded[0], atol=1e-5 * np.abs(decoded).max())


def test_the_cache_does_not_grow(small):
    """What one chunk leaves to the next has the same shapes after every chunk: two frames a convolution at most."""
    for part, frames, C in (("encoder", 2, 3), ("decoder", 1, small.channels)):
        step = functools.partial(next_chunk, getattr(small, part), small.params[part])
        kept = [{}]
        for n in (1, frames, 3 * frames):
            kept.append(jax.eval_shape(step, kept[-1], jnp.zeros((1, n, 8, 8, C)))[1])
        assert kept[1] == kept[2] == kept[3]
        assert max(leaf.shape[1] for leaf in jax.tree.leaves(kept[1])) == 2


def test_no_frame_reaches_back_in_time(small):
    """A changed frame leaves the latents before it as they were, and changes its own; decoding likewise."""
    video = np.tanh(draw(5, 8, 8, 3)).astype(np.float32)
    latents = small.encode(video)
    frames = small.decode(latents)
    for t in (0, 2, 3):
        changed = video.copy()
        changed[t] *= -1
        different = (small.encode(changed) != latents).any((1, 2, 3))
        assert np.flatnonzero(different)[0] == (t + 1) // 2
    for t in range(3):
        changed = latents.copy()
        changed[t] += 1
        different = (small.decode(changed) != frames).any((1, 2, 3))
        assert np.flatnonzero(different)[0] == max(2 * t - 1, 0)


def test_a_draw_has_the_distribution_s_mean_and_deviation(small):
    """In every channel, and is the key's; deviations are moved away from 1."""
    encoder = dict(small.params["encoder"])
    encoder["moments_bias"] = encoder["moments_bias"] + jnp.float32([0, 0, 0, 2, -3, -50])
    codec = dataclasses.replace(small, params={"encoder": encoder})
    video = np.tanh(draw(1, 128, 128, 3)).astype(np.float32)
    mean, logvar = codec.moments(video)
    assert logvar.min() == -30  # the reference's limit
    drawn = codec.encode(video, jax.random.key(3))
    noise = (drawn * np.float32(codec.std) + np.float32(codec.mean) - mean) / np.exp(logvar / 2)
    noise = noise[..., :2]  # the last channel's deviation is below float32's steps
    assert np.abs(noise.mean((0, 1, 2))).max() < 0.1 and np.abs(noise.std((0, 1, 2)) - 1).max() < 0.1
    np.testing.assert_array_equal(drawn, codec.encode(video, jax.random.key(3)))
    np.testing.assert_allclose(codec.encode(video), (mean - np.float32(codec.mean)) / np.float32(codec.std))


# Tiles


@pytest.mark.parametrize("tile", [0, 4, 5, 7, 9, 40])
def test_tiles_of_a_layer_that_sees_single_pixels_make_the_whole(tile):
    x = draw(2, 2 * 13, 2 * 20, 3).astype(np.float32)
    seen = []

    def halve(part):
        seen.append(part.shape[1:3])
        return part.reshape(2, part.shape[1] // 2, 2, part.shape[2] // 2, 2, 3).mean((2, 4))

    np.testing.assert_allclose(in_tiles(halve, x, tile, 2, 1), halve(x), atol=1e-6)
    side = lambda n: 2 * min(tile or n, n)
    assert set(seen[:-1]) == {(side(13), side(20))}  # one shape: one program
    assert in_tiles(lambda part: part.repeat(3, 1).repeat(3, 2), x, tile, 2, 6).shape == (2, 6 * 13, 6 * 20, 3)


def test_seams_are_blended():
    """Two tiles that disagree are joined by a line, not by a step."""
    x, calls = np.zeros((1, 8, 12, 1), np.float32), []
    other = lambda part: calls.append(0) or part + len(calls) - 1
    out = in_tiles(other, x, 8, 1, 1)[0, 0, :, 0]
    assert out[0] == 0 and out[-1] == 1 and np.abs(np.diff(out)).max() < 0.35


# Whole autoencoders, against a rebuild in float64

TINY = {
    "kl": {"block_out_channels": [4, 6], "layers_per_block": 1, "latent_channels": 3, "norm_num_groups": 2},
    "2.1": {
        "base_dim": 4, "z_dim": 3, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True],
        "latents_mean": [0.0] * 3, "latents_std": [1.0] * 3,
    },
}  # fmt: skip
TINY["2.2"] = TINY["2.1"] | {"dim_mult": [1, 1], "patch_size": 2, "is_residual": True, "decoder_base_dim": 6}


@functools.cache
def rebuilt_and_ours(name: str, part: str):
    """(the rebuild, of keywords; what the codec gives), C x T x Y x X, of a clip of random numbers."""
    weights, modules, again = (kl, kl_modules, rebuild_codecs.kl)
    if name != "kl":
        weights, modules, again = wan_vae, wan, rebuild_codecs.wan
    config, drawn, state = TINY[name], np.random.default_rng(0), {}
    for rule in weights.rules(config):
        gain = float(rule.theirs.endswith("gamma") or "norm" in rule.theirs and rule.theirs.endswith("weight"))
        scale = 0.1 if gain or rule.theirs.endswith("bias") else np.prod(rule.shape[1:]) ** -0.5
        state[rule.theirs] = (gain + scale * drawn.normal(size=rule.shape)).astype(np.float32)
    x = drawn.normal(size=(3, 5, 8, 12) if part == "encoder" else (3, 3, 4, 6)).astype(np.float32)
    x = 0.01 * x if name == "kl" else x  # so small that the norms' epsilon counts
    codec = build(modules, weights.settings(config), weights.to_ours(state, config))
    out, _ = next_chunk(getattr(codec, part), codec.params[part], {}, np.moveaxis(x, 0, -1)[None])
    return functools.partial(again, state, config, x, part), np.moveaxis(np.asarray(out[0]), -1, 0)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("name", TINY)
def test_whole_autoencoders_equal_their_rebuild(name, part):
    again, ours = rebuilt_and_ours(name, part)
    assert error(ours, again()) < 1e-5


@pytest.mark.parametrize(
    ("name", "part", "wrong"),
    [
        ("kl", "encoder", {"eps": 1e-5}), ("kl", "encoder", {"halving_pads": (1, 0)}), ("kl", "decoder", {"scale": 1}),
        ("2.1", "encoder", {"causal": False}), ("2.1", "encoder", {"halving_pads": (1, 0)}),
        ("2.1", "decoder", {"pair_outer": False}), ("2.1", "decoder", {"first_in": True}),
        ("2.2", "encoder", {"scale": 1}), ("2.2", "decoder", {"pair_outer": False}),
    ],
)  # fmt: skip
def test_the_rebuild_tells_a_wrong_reading(name, part, wrong):
    """Epsilon, the sides that are padded, attention's scale, causality, the order of doubled frames: each is seen."""
    again, ours = rebuilt_and_ours(name, part)
    assert error(ours, again(**wrong)) > 1e-4


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_rebuild_gives_the_references_arrays(golden, name):
    """So that it is worth holding the codecs against it."""
    state, config, io = load(golden, f"diffusers/{name}")
    if name.endswith("sd"):
        moments = rebuild_codecs.kl(state, config, io["x"][:1].swapaxes(0, 1), "encoder")
        image = rebuild_codecs.kl(state, config, io["mean"][:1].swapaxes(0, 1), "decoder")
        assert error(moments[:4, 0], io["mean"][0]) < 1e-5 and error(image[:, 0], io["decoded_from_mean"][0]) < 1e-5
    else:
        moments = rebuild_codecs.wan(state, config, io["x"][0], "encoder")
        video = rebuild_codecs.wan(state, config, io["mean"][0], "decoder")
        assert error(moments[: len(io["mean"][0])], io["mean"][0]) < 1e-5
        assert error(np.clip(video, -1, 1), io["decoded_clamped"][0]) < 1e-5


@pytest.mark.parametrize("model", ["sd", "wan21", "wan22"])
def test_outputs_are_the_reference_s(golden, model):
    """Clips in chunks and whole, images: within 1e-5 of the largest value."""
    errors = getattr(parity, f"{model}_errors")(golden)
    assert max(errors.values()) < 1e-5, errors


def test_tiles_of_a_reference_s_weights_stay_close(golden):
    """With random weights and small tiles: far from equal, but bounded."""
    codec, io = parity.read(golden, "autoencoder_kl_wan", wan_vae, wan)
    z = parity.last(io["z_random"])
    whole = parity.last(io["decoded_random_clamped"])
    tiled = dataclasses.replace(codec, tile=4).decode((z - codec.mean) / codec.std)
    assert 1e-3 < np.sqrt(np.mean((tiled - whole) ** 2)) / whole.std() < 0.5


# Weights


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_there_and_back(golden, name):
    """Export is the inverse of import, and import gives every parameter that the modules have."""
    (weights, modules), (state, config, _) = PUBLISHED[name], load(golden, f"diffusers/{name}")
    params = weights.to_ours(state, config)
    again = weights.to_theirs(params, config)
    assert again.keys() == state.keys()
    jax.tree.map(np.testing.assert_array_equal, again, state)
    codec = build(modules, weights.settings(config), params)
    for part, side, C in (("encoder", 32, 3), ("decoder", 2, codec.channels)):
        x = jnp.zeros((1, 1, side, side, C))
        init = jax.eval_shape(getattr(codec, part).init, jax.random.key(0), x)["params"]
        assert {k: w.shape for k, w in init.items()} == {k: w.shape for k, w in params[part].items()}
    with pytest.raises(ValueError, match="lack 'decoder.conv_in.weight'"):
        weights.to_ours({k: w for k, w in state.items() if k != "decoder.conv_in.weight"}, config)


def test_older_names_of_attention_are_read(golden):
    state, config, _ = load(golden, "diffusers/autoencoder_kl_sd")
    new = ("attentions.0.to_q.", "attentions.0.to_k.", "attentions.0.to_v.", "attentions.0.to_out.0.")
    old = dict(zip(new, ("query", "key", "value", "proj_attn")))

    def rename(name):
        for part, layer in old.items():
            name = name.replace(part, f"attentions.0.{layer}.")
        return name

    renamed = {rename(name): w for name, w in state.items()}
    assert renamed.keys() != state.keys()
    jax.tree.map(np.testing.assert_array_equal, kl.to_ours(renamed, config), kl.to_ours(state, config))


def test_published_sizes_have_the_published_numbers_of_parameters():
    """84 million in Stable Diffusion's, 127 in Wan 2.1's, 705 in Wan 2.2's."""
    millions = lambda rules: round(sum(int(np.prod(rule.shape)) for rule in rules) / 1e6)
    widths = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    assert millions(kl.rules({**widths, "latent_channels": 4, "norm_num_groups": 32})) == 84
    levels = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
    config = {**levels, "base_dim": 96, "z_dim": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    assert millions(wan_vae.rules(config)) == 127
    config = {**config, "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "patch_size": 2, "is_residual": True}
    assert millions(wan_vae.rules(config)) == 705


def test_a_configuration_that_the_codec_does_not_know_is_refused():
    sd = {"block_out_channels": [8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    with pytest.raises(ValueError, match="use_quant_conv=False cannot be imported. Allowed: True"):
        kl.settings({**sd, "use_quant_conv": False})
    assert kl.settings({**sd, "scaling_factor": 0.5, "shift_factor": 0.1})["std"] == [2.0] * 4
    with pytest.raises(ValueError, match="attn_scales=.1.0. cannot be imported"):
        wan_vae.settings({"attn_scales": [1.0]})


# The codec in a config


def test_a_converted_file_makes_the_codec(small, tmp_path):
    path, other = tmp_path / "codec.safetensors", tmp_path / "other.safetensors"
    fields = {name: getattr(small.encoder, name) for name in "channels widths depth in_time patch carried".split()}
    settings = {"encoder": fields, "decoder": fields, "mean": small.mean, "std": small.std}
    autoencoder.save(path, "wan", settings, jax.device_get(small.params))
    config = {"kind": "wan", "weights": str(path), "stride": (2, 4, 4), "chunk": 2, "tile": 0, "channels": 0}
    codec = make_codec(ml_collections.ConfigDict(config))
    assert codec == dataclasses.replace(small, chunk=2)
    jax.tree.map(np.testing.assert_array_equal, codec.params, small.params)

    def refused(says, **changes):
        with pytest.raises(ValueError, match=says):
            make_codec(ml_collections.ConfigDict(config | changes))

    refused("codec.kind='kl', but .* holds 'wan': set codec.kind='wan'", kind="kl")
    refused(r"codec.stride=\(4, 1, 1\) is not that of .*: set \(2, 4, 4\)", stride=(4, 1, 1))
    refused("needs codec.weights", weights="")
    refused("codec.chunk=0 latent frames cannot .* at least 1", chunk=0)
    refused("codec.tile=2 is too small to blend: at least 4 latents, or 0", tile=2)
    other.write_bytes(safetensors.numpy.save({"w": np.zeros(3)}))
    refused("other.safetensors' is no converted autoencoder", weights=str(other))


def test_videos_that_fit_no_latents_are_refused(small):
    with pytest.raises(ValueError, match="frames=4 cannot be encoded.*Nearest: 3 or 5"):
        small.encode(np.zeros((4, 8, 8, 3)))
    with pytest.raises(ValueError, match="width=9 cannot be encoded.*Nearest: 8 or 12"):
        small.encode(np.zeros((3, 8, 9, 3)))
