"""Low-rank factors: what they are worth, the files they come in, and that training moves them and nothing else.

L blocks, D model width, r rank.
"""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_convert import DIT, WAN, random_weights, read
from test_trainer import WHOLE, awake, first_batches, tiny

from configs import base
from dit_video import generate
from dit_video.checkpoint import Checkpoints, digest
from dit_video.codecs import make_codec
from dit_video.model import make_model
from dit_video.step import State, make_run
from dit_video.trainer import start_factors_from, train
from dit_video.weights import dit, families, lora, wan


def config_of(family, **more):
    config = base.get_config()
    published = {"dit": DIT, "wan": WAN}[family]
    config.update_from_flattened_dict(families.FAMILIES[family].overrides(published) | more)
    return config


def random_factors(config, seed=0):
    """Factors of every matrix that config.lora adapts, none of them 0."""
    return jax.tree.map(np.asarray, awake(lora.init(jax.random.key(seed), model_of(config), config)))


def model_of(config):
    return make_model(config, make_codec(config.codec).channels)


def products(factors, scale=1.0):
    return {n: np.float64(scale) * (np.float64(f["a"]) @ np.float64(f["b"])) for n, f in factors.items()}


def assert_same(found, wanted, **how):
    assert found.keys() == wanted.keys()
    for name in wanted:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **how), found[name], wanted[name])


# The arithmetic.


def test_merged_is_base_plus_the_scaled_product():
    """Exactly: on whole numbers, where nothing is rounded. All else stays the very same array."""
    rng = np.random.default_rng(0)
    whole = lambda *shape: rng.integers(-8, 9, shape).astype(np.float32)
    params = {"block_q": whole(2, 6, 4), "block_k": whole(2, 6, 6), "last": whole(6, 3)}
    factors = {"block_q": {"a": whole(2, 6, 3), "b": whole(2, 3, 4)}}
    merged = jax.jit(lora.merge)(params, factors, 0.5)
    for i in range(2):
        np.testing.assert_array_equal(
            merged["block_q"][i], params["block_q"][i] + 0.5 * factors["block_q"]["a"][i] @ factors["block_q"]["b"][i]
        )
    plain = lora.merge(params, factors, 0.5)
    assert plain["block_k"] is params["block_k"] and plain["last"] is params["last"]


def test_new_factors_change_nothing():
    """b begins as 0, a does not: the model begins as its base, and the factors' gradient is not 0 for long."""
    config = tiny({"lora.rank": 4})
    run = make_run(config)
    factors = lora.init(jax.random.key(0), run.model, config)
    assert {n.removeprefix("block_") for n in factors} == set(config.lora.targets)
    assert all(f["a"].shape[2] == f["b"].shape[1] == 4 and f["a"].std() > 0 for f in factors.values())
    base_ = {n: jnp.full((2, f["a"].shape[1], f["b"].shape[2]), 0.1) for n, f in factors.items()}
    jax.tree.map(np.testing.assert_array_equal, lora.merge(base_, factors, 1.0), base_)
    config.lora.targets = ("image_k",)
    with pytest.raises(ValueError, match=r"lora.targets=\('image_k',\) adapt nothing. Matrices of this model: \['k', "):
        lora.init(jax.random.key(0), run.model, config)


def test_every_block_matrix_can_have_factors():
    """DiT's modulation and Wan's cross-attention too."""
    for family, matrices in (("dit", "q k v o mlp_in mlp_out mod"), ("wan", "q k v o text_q text_k text_v text_o")):
        config = config_of(family, **{"lora.rank": 2, "lora.targets": tuple(matrices.split())})
        model = model_of(config)
        assert {n.removeprefix("block_") for n in lora.init(jax.random.key(0), model, config)} == set(matrices.split())


# Files.


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["dit", "wan", "own"])
def test_saved_and_loaded_factors_are_the_same(tmp_path, family, layout):
    """To the bit, where the scale is a power of two; the scale is in what is loaded."""
    config = tiny() if family == "own" else config_of(family)
    config.lora.rank, config.lora.alpha = 4, 2.0
    factors = random_factors(config)
    lora.write(tmp_path / "lora.safetensors", factors, lora.scale(config), config, layout)
    found = lora.read(tmp_path / "lora.safetensors", config)
    wanted = {n: {"a": f["a"], "b": f["b"] / 2} for n, f in factors.items()}
    assert_same(found, wanted, rtol=0)
    assert_same(products(found), products(factors, 0.5), rtol=1e-6)


def theirs_of(family, state, rng, rank, matrices):
    """Published factors {weight: (down [r, in], up [out, r])} for some of the state dict's matrices."""
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    names = [n for n, w in state.items() if w.ndim == 2 and n.startswith("blocks.") and any(m in n for m in matrices)]
    return {n.removesuffix(".weight"): (draw(rank, state[n].shape[1]), draw(state[n].shape[0], rank)) for n in names}


original = families.original_name
underscored = lambda name: original(name).replace(".", "_")
LAYOUTS = {
    "diffusers": ("transformer.", ".lora_A.weight", ".lora_B.weight", str),
    "PEFT": ("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight", str),
    "original names": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight", original),
    "original names, kohya's ends": ("diffusion_model.", ".lora_down.weight", ".lora_up.weight", original),
    "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight", underscored),
    "kohya, two": ("lora_unet__", ".lora_down.weight", ".lora_up.weight", underscored),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_published_factors_are_worth_here_what_they_are_there(tmp_path, layout, alpha):
    """Merged here = imported from weights they were merged into there: W + alpha / r * up down, in RoPE's order."""
    prefix, down_end, up_end, rename = LAYOUTS[layout]
    state, rank = random_weights("wan"), 4
    factors = theirs_of("wan", state, np.random.default_rng(1), rank, ("attn1", "attn2", "ffn"))
    tensors, merged = {}, dict(state)
    for name, (down, up) in factors.items():
        stem = prefix + rename(name)
        tensors |= {stem + down_end: down, stem + up_end: up}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.asarray(alpha, np.float32)
        merged[f"{name}.weight"] = state[f"{name}.weight"] + (alpha or rank) / rank * (up @ down)
    safetensors.numpy.save_file(tensors, tmp_path / "lora.safetensors")
    found = lora.read(tmp_path / "lora.safetensors", config_of("wan"))
    ours = lora.merge(wan.to_ours(state, WAN)["dit"], found, 1.0)
    wanted = wan.to_ours(merged, WAN)["dit"]
    assert ours.keys() == wanted.keys() and len(found) == 10
    for name in wanted:
        np.testing.assert_allclose(ours[name], wanted[name], atol=1e-5, err_msg=name)


def test_factors_of_a_fused_matrix_and_of_unequal_ranks(tmp_path):
    """DiT's [q; k; v] in one; blocks of other ranks, or without factors, beside one another."""
    state, rng = random_weights("dit"), np.random.default_rng(0)
    merged, tensors = dict(state), {}
    for name, rank in (("blocks.0.attn.qkv", 3), ("blocks.1.attn.qkv", 5), ("blocks.1.mlp.fc1", 2)):
        ((_, (down, up)),) = theirs_of("dit", {f"{name}.weight": state[f"{name}.weight"]}, rng, rank, ("",)).items()
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        merged[f"{name}.weight"] = state[f"{name}.weight"] + up @ down
    safetensors.numpy.save_file(tensors, tmp_path / "lora.safetensors")
    found = lora.read(tmp_path / "lora.safetensors", config_of("dit"))
    assert {n: f["a"].shape[2] for n, f in found.items()} == {
        "block_q": 5, "block_k": 5, "block_v": 5, "block_mlp_in": 2,
    }  # fmt: skip
    ours, wanted = lora.merge(dit.to_ours(state, DIT)["dit"], found, 1.0), dit.to_ours(merged, DIT)["dit"]
    for name in wanted:
        np.testing.assert_allclose(ours[name], wanted[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.0.attn1.to_q.diff_b": (3,)}, r"holds 'blocks\.0\.attn1\.to_q\.diff_b' \(3,\), which is no low-rank"),
        ({"blocks.7.attn1.to_q.lora_A.weight": (2, 32)}, "which is no low-rank factor of this model"),
        ({"blocks.0.attn1.to_q.lora_A.weight": (2, 31)}, r"product of \(32, 2\) x \(2, 31\), and .*\(32, 32\)"),
        ({"blocks.0.attn1.to_q.lora_B.weight": (32, 3)}, r"product of \(32, 3\) x \(2, 32\)"),
        ({"blocks.1.attn1.to_q.lora_A.weight": (2, 32)}, "without the other factor"),
    ],
)
def test_factors_that_do_not_fit_are_named(tmp_path, change, words):
    shapes = {"blocks.0.attn1.to_q.lora_A.weight": (2, 32), "blocks.0.attn1.to_q.lora_B.weight": (32, 2)}
    tensors = {n: np.ones(s, np.float32) for n, s in (shapes | change).items()}
    safetensors.numpy.save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=words):
        lora.read(tmp_path / "lora.safetensors", config_of("wan"))


# Training, on all devices.


def settings(**more):
    rest = {"lora.rank": 2, "lora.alpha": 4.0, "optimizer.warmup": 1, "optimizer.ema": 0.5}
    return tiny(WHOLE | {"checkpoint_every": 2} | rest | more)


def drawn(shapes):
    """Parameters at random, none of them 0: without a program that makes a new model's."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: (0.1 * rng.standard_normal(a.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The base's file, an unbroken run of 4 steps, and one that went on from its second."""
    folder = tmp_path_factory.mktemp("lora")
    run = make_run(tiny())
    params = drawn(jax.eval_shape(run.init, jax.random.key(3)).params)
    generate.save_weights(folder / "base.safetensors", params, tiny(), 0)
    given = {"init_from": str(folder / "base.safetensors")}
    train(settings(steps=4, **given), folder / "whole")
    shutil.copytree(folder / "whole", folder / "twice")
    shutil.rmtree(folder / "twice" / "checkpoints" / "00000004")
    (folder / "twice" / "lora.safetensors").unlink()
    train(settings(steps=4, **given), folder / "twice")
    return folder


def restored(workdir):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore()


def test_training_moves_the_factors_alone(trained):
    """The base is to the bit what it began from; nothing but factors has a gradient's moments or an average."""
    state = restored(trained / "whole").state
    given = generate.load(trained / "base.safetensors").params
    jax.tree.map(np.testing.assert_array_equal, state["frozen"], given)
    assert state["params"].keys() == state["ema"].keys() == {"lora"}
    assert all(np.abs(f["b"]).max() > 0 for f in state["params"]["lora"].values())
    factors = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if np.ndim(leaf) == 3]
    assert sum(leaf.size for leaf in moments) == 2 * factors < sum(leaf.size for leaf in jax.tree.leaves(given))


def test_a_resumed_run_is_an_unbroken_one(trained):
    whole, twice = restored(trained / "whole"), restored(trained / "twice")
    assert (whole.step, digest(whole.state)) == (twice.step, digest(twice.state))
    file = lambda run: (trained / run / "lora.safetensors").read_bytes()
    assert file("whole") == file("twice")


def test_what_a_run_leaves_is_its_base_and_its_factors(trained):
    """The run's own weights, its merged file and base + factors' file are the same model."""
    config = settings(steps=4)
    averaged = generate.load(trained / "whole").params
    plain = generate.load(trained / "base.safetensors")
    together = generate.add_lora(plain, trained / "whole" / "lora.safetensors").params
    for name, w in averaged["dit"].items():
        np.testing.assert_allclose(together["dit"][name], w, atol=1e-6, err_msg=name)
    changed = [n for n, w in averaged["dit"].items() if np.abs(w - plain.params["dit"][n]).max() > 0]
    assert {n.removeprefix("block_") for n in changed} == set(config.lora.targets)
    merged = generate.load(trained / "whole" / "weights.safetensors").params
    for name, w in averaged["dit"].items():
        np.testing.assert_allclose(merged["dit"][name], w, rtol=2**-8, atol=1e-6, err_msg=name)
    half = generate.add_lora(plain, trained / "whole" / "lora.safetensors", 0.5).params["dit"]["block_q"]
    middle = (plain.params["dit"]["block_q"] + averaged["dit"]["block_q"]) / 2
    np.testing.assert_allclose(half, middle, atol=1e-6)
    names = read(trained / "whole" / "lora.safetensors").keys()
    assert {"transformer.blocks.0.q.lora_A.weight", "transformer.blocks.1.mlp_out.lora_B.weight"} <= names


def test_training_goes_on_from_a_file_of_factors(trained):
    """The first state has the file's product; another rank is refused, and both are named."""
    config = settings(**{"lora.init_from": str(trained / "whole" / "lora.safetensors"), "lora.alpha": 1.0})
    state = restored(trained / "whole").state
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda tree: jax.tree.map(lambda _: device, tree)
    one = jnp.zeros((), jnp.int32)
    begun = State(one, jax.tree.map(jnp.zeros_like, state["params"]), state["ema"], {}, one, one, {})
    begun = start_factors_from(config, begun, place(begun))
    assert lora.scale(config) == 0.5
    wanted = products(state["ema"]["lora"], 2.0)
    for tree in (begun.params, begun.ema):
        assert_same(products(jax.device_get(tree["lora"]), 0.5), wanted, rtol=1e-5, atol=1e-9)
    config.lora.rank = 3
    begun = dataclasses.replace(begun, params={"lora": random_factors(config)})
    with pytest.raises(ValueError, match=r"lora.init_from=.* has factors .* and this config"):
        start_factors_from(config, begun, place(begun))


def test_gradients_of_the_factors_are_those_of_the_merged_weights():
    """dA = scale dW B', dB = scale A' dW: the loss is that of the merged model and of no other."""
    run, plain = make_run(tiny({"lora.rank": 2, "lora.alpha": 4.0})), make_run(tiny())
    (batch,) = first_batches(run, 1)
    state, key = jax.eval_shape(run.init, jax.random.key(0)), jax.random.key(1)
    params, frozen = drawn(state.params), drawn(state.frozen)
    found, sums = jax.jit(run.sums)(params, batch, key, frozen)
    merged = run.whole(params, frozen)
    wanted, same = jax.jit(plain.sums)(merged, batch, key)
    np.testing.assert_allclose(sums["loss"], same["loss"], rtol=1e-6)
    for name, f in params["lora"].items():
        dW = np.float64(wanted["dit"][name])
        dA = 2.0 * dW @ np.swapaxes(f["b"], 1, 2)
        dB = 2.0 * np.swapaxes(f["a"], 1, 2) @ dW
        for part, there in (("a", dA), ("b", dB)):
            here = np.asarray(found["lora"][name][part])
            assert np.abs(here - there).max() <= 1e-4 * max(np.abs(there).max(), 1e-3 * np.abs(dW).max()), (name, part)


def test_wan_factors_are_saved_under_the_names_that_others_load(tmp_path):
    config = config_of("wan", **{"lora.rank": 2})
    lora.write(tmp_path / "a.safetensors", random_factors(config), 1.0, config)
    lora.write(tmp_path / "b.safetensors", random_factors(config), 1.0, config, "kohya")
    shapes = {n: a.shape for n, a in read(tmp_path / "a.safetensors").items()}
    assert shapes["transformer.blocks.1.attn1.to_out.0.lora_A.weight"] == (2, 32)
    assert shapes["transformer.blocks.0.ffn.net.0.proj.lora_B.weight"] == (48, 2)
    assert len(shapes) == 2 * 2 * 10
    kohya = {n: a.shape for n, a in read(tmp_path / "b.safetensors").items()}
    assert kohya["lora_unet_blocks_1_self_attn_o.lora_down.weight"] == (2, 32)
    assert kohya["lora_unet_blocks_0_ffn_0.lora_up.weight"] == (48, 2)
    assert kohya["lora_unet_blocks_0_cross_attn_k.alpha"] == () and len(kohya) == 3 * 2 * 10
