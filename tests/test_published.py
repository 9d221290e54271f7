"""From published files to pixels, by the commands of the README, and on from there: small random models, whole ways.

D model width, B rows, N patches per row, P values per patch.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_cli import sample_here
from test_convert import CONVERT, DIT, assert_equal, random_weights, read, save
from test_text_encoders import folder as umt5_folder
from test_text_encoders import json_tokeniser
from test_trainer import first_batches

from configs import dit as dit_config
from configs import latte as latte_config
from configs import sit as sit_config
from dit_video import generate
from dit_video.flow import corrupt, named_key, patch_noise, per_patch
from dit_video.patches import Cond
from dit_video.step import State, make_run
from dit_video.text import frozen
from dit_video.trainer import start_from, train
from dit_video.weights import families, kl, wan_vae
from dit_video.weights.encoders import load_encoder

__all__ = ["json_tokeniser", "umt5_folder"]  # fixtures
KL = {"block_out_channels": [8] * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
WAN_VAE = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_scales": [],
    "temperal_downsample": [False, True, True], "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.0, 2.0, 1.5, 1.0],
}  # fmt: skip


def convert(source, to, *, settings=(), **how):
    return CONVERT.import_file(source, to, settings=CONVERT.parse_settings(settings), **how)


def converted_autoencoder(folder, module, config, class_name):
    """The keys of our config, as --set takes them, of a published autoencoder with random weights, converted."""
    rng, published = np.random.default_rng(1), folder / "vae"
    published.mkdir()
    state = {rule.theirs: (0.2 * rng.normal(size=rule.shape)).astype(np.float32) for rule in module.rules(config)}
    save(published / "diffusion_pytorch_model.safetensors", state)
    (published / "config.json").write_text(json.dumps({"_class_name": class_name, **config}))
    said = CONVERT.import_file(published, folder / "vae.safetensors")
    return [word.removeprefix("--set=") for word in said.split() if word.startswith("--set=")]


# Class labels to images


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A DiT, converted for an image autoencoder that was."""
    folder = tmp_path_factory.mktemp("dit")
    settings = converted_autoencoder(folder, kl, KL, "AutoencoderKL")
    source = save(folder / "theirs.safetensors", random_weights("dit"))
    convert(source, folder / "dit.safetensors", given={"num_heads": 2}, family="dit", settings=settings)
    return folder


def test_labels_to_pictures(labelled, tmp_path):
    """Several sizes at once; a class is another picture than no class, and one that there is not is refused."""
    given = [f"--weights={labelled / 'dit.safetensors'}", "--frames=1", "--steps=2", "--seed=1", "--guidance=1"]
    prompts, sizes = ("3", "4", "", "3"), ("32x32", "32x32", "32x32", "32x48")
    asked = [f"--prompt={p}" for p in prompts] + [f"--size={size}" for size in sizes]
    sample_here(*given, *asked, f"--out={tmp_path / 'a'}")
    three, four, none, tall = (np.asarray(Image.open(f)) for f in sorted((tmp_path / "a").glob("*.png")))
    assert (three != four).any() and (three != none).any() and tall.shape == (48, 32, 3)
    with pytest.raises(SystemExit, match="caption '5' is no class: .* takes 0 to 4"):
        sample_here(*given, "--prompt=5", f"--out={tmp_path / 'c'}")


def small(config, folder, weights):
    """A config of the published size's file, of the test model's size, on a folder of labelled pictures."""
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for i in range(6):
        pixels = np.random.default_rng(i).integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(str(i % 5))
    config.update_from_flattened_dict(
        {
            "steps": 1, "eval_every": 0, "sample.prompts": ("32x32x1@8: 3",), "sample.steps": 2,
            "model.width": 32, "model.depth": 2, "model.heads": 2, "model.mlp_width": 64, "text.width": 32,
            "text.classes": 5, "data.root": str(pictures), "data.rows": 8, "data.length": 8, "data.groups": 4,
            "data.text_length": 4, "data.waiting": 4, "data.shards": 2, "data.min_side": 32, "data.max_side": 32,
            "codec.kind": "kl", "codec.weights": str(weights), "optimizer.ema": 0.5, "optimizer.warmup": 0,
        }
    )  # fmt: skip
    return config


def test_a_published_model_is_trained_on_and_goes_back(labelled, tmp_path, caplog):
    """By configs/dit.py as it stands; what comes out loads as DiT. The config of another model warns."""
    config = small(dit_config.get_config("S/2"), tmp_path, labelled / "vae.safetensors")
    config.init_from = str(labelled / "dit.safetensors")
    train(config, tmp_path / "run")
    assert "trained as another model" not in caplog.text, caplog.text
    before, after = generate.load(labelled / "dit.safetensors"), generate.load(tmp_path / "run")
    moved = {n: np.abs(w - before.params["dit"][n]).max() for n, w in after.params["dit"].items()}
    assert 0 < moved["block_q"] < 1e-3  # lr is 1e-4
    said = CONVERT.export_file(tmp_path / "run", tmp_path / "theirs")
    assert "under the names of dit" in said
    assert read(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors").keys() == random_weights("dit").keys()
    convert(tmp_path / "theirs", tmp_path / "again.safetensors")
    jax.tree.map(np.testing.assert_array_equal, generate.load(tmp_path / "again.safetensors").params, after.params)

    params = jax.device_put(before.params)
    state = State(0, params, jax.tree.map(jnp.copy, params), {}, 0, 0)
    shardings = jax.tree.map(lambda w: w.sharding, dataclasses.replace(state, step=params, bad_steps={}, bad_total={}))
    start_from(config.init_from, state, shardings, sit_config.get_config("S/2").model)
    assert "trained as another model: " in caplog.text and "model.predict='ddpm' there, 'v' here" in caplog.text


def test_ddpms_loss_is_that_of_its_noise(labelled, tmp_path):
    """Not of the velocity, whose error is 1 / (1 - s) times as large: there the last timesteps would be all."""
    config = small(dit_config.get_config("S/2"), tmp_path, labelled / "vae.safetensors")
    config.model.out_channels = 4
    run, key = make_run(config), jax.random.key(2)
    (batch,) = first_batches(run, 1)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(run.init, key).params
    params = jax.tree.map(lambda a: (0.2 * rng.normal(size=a.shape)).astype(np.float32), shapes)
    found = jax.jit(run.evaluate)(params, batch, key)

    p = batch.patches
    level_BxG = (np.asarray(p.clip_BxG) % 8 + 0.5) / 8
    level_BxN = np.asarray(per_patch(level_BxG, p))
    e_BxNxP = patch_noise(named_key(key, "noise"), p.uid_BxN, p.x_BxNxP.shape[-1])
    z_BxNxP, _ = corrupt(e_BxNxP, p.x_BxNxP, level_BxN)
    abar_T = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    level_T = np.sqrt(1 - abar_T) / (np.sqrt(abar_T) + np.sqrt(1 - abar_T))
    scale_BxN = 1 / np.hypot(level_BxN, 1 - level_BxN)  # alpha + sigma
    told = dataclasses.replace(
        p,
        x_BxNxP=z_BxNxP * scale_BxN[..., None],
        level_BxG=np.interp(level_BxG, level_T, np.arange(1000) / 1000).astype(np.float32),
    )
    text = run.text.module.apply({"params": params["text"]}, batch.ids_BxSxK, batch.prompt_BxS)
    e_hat = jax.jit(run.model.apply)({"params": params["dit"]}, told, Cond(text, batch.prompt_BxS))
    wanted = np.square(e_hat - e_BxNxP).mean(-1)[np.asarray(p.seg_BxN) != 0].sum()
    np.testing.assert_allclose(found["loss"], wanted, rtol=2e-4)


@pytest.mark.parametrize("name", ["dit", "sit", "latte"])
def test_configs_are_what_conversion_says(name):
    """Every key that a published file's conversion sets, the family's config sets to the same."""
    configs = {"dit": dit_config, "sit": sit_config, "latte": latte_config}
    forms = ["XL/2", "S/8"] if name != "latte" else ["XL/2", "L/2:101"]
    for form in forms:
        config = configs[name].get_config(form)
        family, published = families.family_of(config)
        assert family == name
        flat = {f"{a}.{k}": v for a in ("model", "codec", "text", "flow", "data") for k, v in config[a].items()}
        for key, value in families.FAMILIES[name].overrides(published).items():
            assert key == "name" or flat[key] == value, (form, key)


# DiT by diffusers' names


def diffusers_names(state, depth):
    """As facebook/DiT-XL-2-256 has them: q, k and v apart, and the embedders in every block."""
    state, out = {n: w for n, w in state.items() if n != "pos_embed"}, {}
    layers = {"attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    layers["adaLN_modulation.1"] = "norm1.linear"
    once = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1"}
    once["final_layer.linear"] = "proj_out_2"
    time = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
    time["y_embedder.embedding_table"] = "class_embedder.embedding_table"
    for name, w in state.items():
        layer, _, kind = name.rpartition(".")
        if layer in once:
            out[f"{once[layer]}.{kind}"] = w
        elif layer in time:
            out |= {f"transformer_blocks.{i}.norm1.emb.{time[layer]}.{kind}": w for i in range(depth)}
        else:
            _, i, inside = layer.split(".", 2)
            block = f"transformer_blocks.{i}."
            if inside == "attn.qkv":
                out |= {f"{block}attn1.to_{x}.{kind}": part for x, part in zip("qkv", np.split(w, 3))}
            else:
                out[f"{block}{layers[inside]}.{kind}"] = w
    return out


def test_dit_by_the_names_of_diffusers(tmp_path):
    """The same file comes of both; copies that differ, and what is missing or left over, are refused."""
    state = random_weights("dit")
    theirs = diffusers_names(state, DIT["depth"])
    assert len(theirs) == 2 * (5 + 2 * 7) + 6
    known = {
        "_class_name": "Transformer2DModel", "num_attention_heads": 2, "sample_size": 8, "num_layers": 2,
        "attention_head_dim": 16, "num_embeds_ada_norm": 5, "norm_num_groups": 32,
    }  # fmt: skip
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(known))
    file = folder / "diffusion_pytorch_model.safetensors"
    save(file, theirs)
    assert ": dit, " in convert(tmp_path, tmp_path / "ours.safetensors")
    source = save(tmp_path / "own.safetensors", state)
    convert(source, tmp_path / "wanted.safetensors", given={"num_heads": 2}, family="dit")
    assert_equal(read(tmp_path / "ours.safetensors"), read(tmp_path / "wanted.safetensors"))
    CONVERT.export_file(tmp_path / "ours.safetensors", tmp_path / "back.safetensors")
    assert read(tmp_path / "back.safetensors").keys() == state.keys()

    other = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    save(file, theirs | {other: theirs[other] + 1})
    with pytest.raises(ValueError, match="'t_embedder.mlp.0.weight', of which each block has a copy, is not the same"):
        convert(tmp_path, tmp_path / "ours.safetensors")
    save(file, {n: w for n, w in theirs.items() if "0.attn1.to_k.bias" not in n} | {"extra": np.zeros(3)})
    with pytest.raises(ValueError, match=r"1 missing:\n  blocks.0.attn.qkv.bias \(96,\)\n3 unused"):
        convert(tmp_path, tmp_path / "ours.safetensors")


# Prompts to videos


def test_prompts_to_videos(tmp_path, umt5_folder):
    """Wan's transformer, its autoencoder and UMT5, each from its published form; prompts are encoded as they come."""
    settings = converted_autoencoder(tmp_path, wan_vae, WAN_VAE, "AutoencoderKLWan")
    file = frozen.fill(load_encoder(umt5_folder), [], tmp_path / "embeddings")
    settings += [f"text.encoder={umt5_folder}", f"text.file={file}"]
    source = save(tmp_path / "theirs.safetensors", random_weights("wan"))
    said = convert(source, tmp_path / "wan.safetensors", given={"num_attention_heads": 2}, settings=settings)
    assert ": wan, " in said
    given = [f"--weights={tmp_path / 'wan.safetensors'}", "--steps=2", "--seed=1", "--save=png", "--size=32x16"]
    sample_here(
        *given, "--prompt=a red cat", "--prompt=a blue dog", "--frames=5", "--fps=16", f"--out={tmp_path / 'a'}"
    )
    frames = {out.name[4:]: sorted(out.iterdir()) for out in (tmp_path / "a").iterdir() if out.is_dir()}
    assert {name: len(files) for name, files in frames.items()} == {"a-red-cat": 5, "a-blue-dog": 5}
    red, blue = (np.stack([np.asarray(Image.open(f)) for f in files]) for _, files in sorted(frames.items()))
    assert red.shape == (5, 16, 32, 3) and (red != blue).any() and red.std() > 1
