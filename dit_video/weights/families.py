"""The published families: how their files are recognised, and which of our configs each is.

D model width, C latent channels. 'Published' is the configuration that a family's own class is made with.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

from dit_video.model import block_parameters, make_model
from dit_video.weights import Rule, dit, kl, latte, sit, wan, wan_vae

DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width; Peebles and Xie 2023, table 1
WAN_HEAD = 128  # width of a head in every published Wan transformer
WAN_TOKENS = 21 * 30 * 52  # patches of 81 frames at 832x480, which all of them were trained on at least
# What files are wrapped in: data parallel's and compilers' module names, and those of whole pipelines.
PREFIXES = ("", "module.", "_orig_mod.", "model.", "model.diffusion_model.", "diffusion_model.", "transformer.")


class Family(NamedTuple):
    """published(shapes, given) -> the published configuration, from the tensors' shapes and what its config.json
    gives, or None where the names are another family's; rules(published); overrides(published) -> our config's keys,
    flat; theirs(config) -> the published configuration of a config of ours, or None where it is no such model;
    config_json(published) -> what its own loader reads beside the weights, with the name of its class; dead: of
    published weights, the names of those that its own class does not read either, as a regular expression.
    """

    published: Callable
    rules: Callable
    overrides: Callable
    theirs: Callable
    config_json: Callable
    class_name: str
    dead: str = "(?!)"


def find(shapes: Mapping[str, tuple], given: Mapping, family: str | None = None) -> tuple[str, str, dict]:
    """(family, prefix of all its names, published configuration) of the tensors in a file.

    given: the file's config.json, and what else is known. SiT's names are DiT's: its config.json's `_class_name` says
    which it is, or `family`. Raises ValueError where no family fits, or more than one.
    """
    found, named = [], [name for name, one in FAMILIES.items() if one.class_name == given.get("_class_name")]
    for name in [family] if family else named or FAMILIES:
        for prefix in PREFIXES:
            inside = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
            published = FAMILIES[name].published(inside, given)
            if published is not None:
                found.append((name, prefix, published))
                break
    if len(found) != 1:
        known = [family] if family else [*FAMILIES, *AUTOENCODERS]
        which = f"those of {[name for name, *_ in found]}" if found else f"none of {known}"
        some = sorted(shapes)[:6]
        raise ValueError(
            f"the file's names ({some}, ...) are {which}: say which --family it is, and --entry if needed."
        )
    return found[0]


def family_of(config) -> tuple[str, dict] | None:
    """(family, published configuration) of a config of ours, or None where no published class is this model."""
    for name, family in FAMILIES.items():
        if (published := family.theirs(config)) is not None:
            return name, published
    return None


def model_overrides(arguments: Mapping) -> dict:
    """The keys of our config's model that a family's `arguments` gives under the same name."""
    ours = "width depth heads mlp_width modulation position qk_norm text text_norm image_width level_scale".split()
    ours += ["level_direction", "attention_pattern", "pos_scale", "pos_offset"]
    return {f"model.{key}": arguments[key] for key in ours if key in arguments}


def own_rules(config) -> list[Rule]:
    """The block matrices of a model that no published class is, under names in the published manner."""
    blocks = block_parameters(make_model(config, channels=1))
    return [
        Rule(f"blocks.{{}}.{name}.weight", shape[:0:-1], (f"dit/block_{name}",), lambda w: [w.T], lambda w: w.T)
        for name, (_, shape, _) in blocks.items()
        if len(shape) == 3
    ]


def _depth(shapes: Mapping) -> int:
    return 1 + max((int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d{1,4})\.", name))), default=-1)


# DiT, SiT, Latte


def dit_published(shapes: Mapping, given: Mapping) -> dict | None:
    """DiT's, and SiT's, which has the same names and the same arguments."""
    return None if "temp_embed" in shapes else _dit(shapes, given)


def latte_published(shapes: Mapping, given: Mapping) -> dict | None:
    if len(shapes.get("temp_embed", ())) != 3 or (published := _dit(shapes, given)) is None:
        return None
    extras = 2 if "y_embedder.embedding_table.weight" in shapes else 1
    return published | {"num_frames": shapes["temp_embed"][1], "extras": given.get("extras", extras)}


def _dit(shapes: Mapping, given: Mapping) -> dict | None:
    if not {"x_embedder.proj.weight", "final_layer.linear.weight", "pos_embed"} <= shapes.keys():
        return None
    if not any("adaLN_modulation" in name for name in shapes):
        return None
    if len(shapes["x_embedder.proj.weight"]) != 4 or len(shapes["pos_embed"]) != 3:
        return None
    D, C, p = shapes["x_embedder.proj.weight"][:3]
    F = shapes.get("blocks.0.mlp.fc1.weight", (4 * D,))[0]
    published = {
        "input_size": round(shapes["pos_embed"][1] ** 0.5) * p,
        "patch_size": p,
        "in_channels": C,
        "hidden_size": D,
        "depth": _depth(shapes),
        "num_heads": DIT_HEADS.get(D),
        "mlp_ratio": F / D,
        "num_classes": shapes.get("y_embedder.embedding_table.weight", (1001,))[0] - 1,
        "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * p * p * C,
    }
    published |= {key: given[key] for key in published if given.get(key) is not None}
    if published["num_heads"] is None:
        raise ValueError(f"DiT's width {D} is no published size: give --published='{{\"num_heads\": ...}}'.")
    return published


def dit_overrides(published: Mapping) -> dict:
    D, C, p = published["hidden_size"], published["in_channels"], published["patch_size"]
    return model_overrides(dit.arguments(published)) | {
        "name": "DiT",
        "codec.kind": "latents",
        "codec.stride": (1, 8, 8),
        "codec.channels": C,
        "text.kind": "labels",
        "text.width": D,
        "text.classes": published["num_classes"],
        "data.max_tokens": (published["input_size"] // p) ** 2,
        "model.patch": (1, p, p),
        "model.out_channels": C * (2 if published["learn_sigma"] else 1),
        "model.predict": "ddpm",
    }


def sit_overrides(published: Mapping) -> dict:
    more = {"name": "SiT", "model.predict": "v", "flow.distribution": "uniform"}
    return dit_overrides(published) | model_overrides(sit.arguments(published)) | more


def latte_overrides(published: Mapping) -> dict:
    dits = dit_overrides(published)
    more = {"name": "Latte", "data.group_by": "clip"}
    more["data.max_tokens"] = published["num_frames"] * dits["data.max_tokens"]
    return dits | model_overrides(latte.arguments(published)) | more


def dit_theirs(config) -> dict | None:
    return _dit_theirs(config, ("ddpm", 1000.0, "noise"), ("all",), ("pooled",))


def sit_theirs(config) -> dict | None:
    return _dit_theirs(config, ("v", 1.0, "data"), ("all",), ("pooled",))


def latte_theirs(config) -> dict | None:
    published = _dit_theirs(config, ("ddpm", 1000.0, "noise"), ("space", "time"), ("pooled", "none"))
    extras = 2 if config.model.text == "pooled" else 1
    return published and published | {"num_frames": 16, "extras": extras}  # as published; it has no table either


def _dit_theirs(config, told: tuple, pattern: tuple, texts: tuple) -> dict | None:
    """told: what the network gives, and how it is told the level."""
    m = config.model
    if (m.modulation, m.position, m.qk_norm, config.text.kind) != ("block", "table", "none", "labels"):
        return None
    if (m.predict, m.level_scale, m.level_direction) != told or m.text not in texts:
        return None
    if m.patch[0] != 1 or m.patch[1] != m.patch[2] or tuple(m.attention_pattern) != pattern:
        return None
    C = config.codec.channels
    return {
        "input_size": 32,  # the grid of the published 256x256 models; any grid's table is computed, none is learned
        "patch_size": m.patch[1],
        "in_channels": C,
        "hidden_size": m.width,
        "depth": m.depth,
        "num_heads": m.heads,
        "mlp_ratio": m.mlp_width / m.width,
        "num_classes": config.text.classes,
        "learn_sigma": (m.out_channels or C) == 2 * C,
    }


# Wan

# The names of Wan's own repository as those of diffusers, each a part of a name between dots. Established from
# diffusers' conversion table and from listings of the checkpoints; not yet read from a published file here.
ORIGINAL_NAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("proj_out", "head.head"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn1.to_q", "self_attn.q"),
    ("attn1.to_k", "self_attn.k"),
    ("attn1.to_v", "self_attn.v"),
    ("attn1.norm_q", "self_attn.norm_q"),
    ("attn1.norm_k", "self_attn.norm_k"),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn2.to_q", "cross_attn.q"),
    ("attn2.to_k", "cross_attn.k"),
    ("attn2.to_v", "cross_attn.v"),
    ("attn2.norm_q", "cross_attn.norm_q"),
    ("attn2.norm_k", "cross_attn.norm_k"),
    ("attn2.add_k_proj", "cross_attn.k_img"),
    ("attn2.add_v_proj", "cross_attn.v_img"),
    ("attn2.norm_added_k", "cross_attn.norm_k_img"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),  # the affine norm before cross-attention, third in the original's order
)
ORIGINAL_KEYS = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "num_layers": "num_layers",
    "cross_attn_norm": "cross_attn_norm",
    "eps": "eps",
    "patch_size": "patch_size",
}


def original_name(name: str) -> str:
    """Wan's own name of a weight that diffusers calls `name`."""
    if name == "scale_shift_table":
        return "head.modulation"
    name = name.replace("scale_shift_table", "modulation")
    for theirs, original in ORIGINAL_NAMES:
        # At most once, and between dots: 'norm2' of a block, not of the image embedder, which has gone by then.
        name, changed = re.subn(rf"(^|\.){re.escape(theirs)}(?=\.|$)", rf"\g<1>{original}", name)
        if changed:
            break
    return name


def wan_original_rules(published: Mapping) -> list[Rule]:
    return [dataclasses.replace(rule, theirs=original_name(rule.theirs)) for rule in wan.rules(published)]


def wan_published(shapes: Mapping, given: Mapping) -> dict | None:
    names = ("patch_embedding.weight", "proj_out.weight", "condition_embedder.time_embedder.linear_1.weight")
    return _wan(shapes, given, names, lambda name: name)


def wan_original_published(shapes: Mapping, given: Mapping) -> dict | None:
    given = {theirs: given[key] for theirs, key in ORIGINAL_KEYS.items() if key in given} | dict(given)
    names = ("patch_embedding.weight", "head.head.weight", "time_embedding.0.weight")
    return _wan(shapes, given, names, original_name)


def _wan(shapes: Mapping, given: Mapping, marks: Sequence[str], called: Callable) -> dict | None:
    if not set(marks) <= shapes.keys() or len(shapes[marks[0]]) != 5:
        return None
    size = lambda name, axis, default: shapes[called(name)][axis] if called(name) in shapes else default
    D, C, *patch = shapes["patch_embedding.weight"]
    cells = max(patch[0] * patch[1] * patch[2], 1)
    image_dim = size("condition_embedder.image_embedder.norm1.weight", 0, None)
    heads = given.get("num_attention_heads") or (D // WAN_HEAD if D % WAN_HEAD == 0 else None)
    if heads is None:
        raise ValueError(
            f"Wan of width {D} has no heads of {WAN_HEAD}: give --published='{{\"num_attention_heads\": ...}}'."
        )
    published = {
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": D // heads,
        "in_channels": C,
        "out_channels": shapes[marks[1]][0] // cells,
        "text_dim": size("condition_embedder.text_embedder.linear_1.weight", 1, 4096),
        "freq_dim": shapes[marks[2]][1],
        "ffn_dim": size("blocks.0.ffn.net.0.proj.weight", 0, None),
        "num_layers": _depth(shapes),
        "cross_attn_norm": called("blocks.0.norm2.weight") in shapes,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": image_dim,
        "added_kv_proj_dim": D if image_dim else None,
    }
    # `qk_norm` is true in the original's config.json, and a name in diffusers'.
    known = {key: given[key] for key in published if given.get(key) is not None}
    return published | {key: value for key, value in known.items() if (key, value) != ("qk_norm", True)}


def wan_overrides(published: Mapping) -> dict:
    """Latents of 48 channels are those of Wan 2.2's autoencoder: 16 pixels and, at 24 frames per second, 6 a second."""
    if published["freq_dim"] != 256:
        raise ValueError(f"freq_dim={published['freq_dim']} cannot be run: the model embeds levels in 256 features.")
    stride, rate = (16, 6.0) if published["out_channels"] == 48 else (8, 4.0)
    return model_overrides(wan.arguments(published, stride, rate)) | {
        "name": "Wan",
        "codec.kind": "latents",
        "codec.stride": (4, stride, stride),
        "codec.channels": published["in_channels"],
        "text.kind": "frozen",
        "text.width": published["text_dim"],
        "text.tokens": 512,
        "model.patch": tuple(published["patch_size"]),
        "model.out_channels": published["out_channels"],
        "model.predict": "v",
        "data.group_by": "clip",
        "data.max_tokens": WAN_TOKENS,
        "sample.steps": 50,
        "sample.shift": 5.0,
        "sample.guidance": 5.0,
    }


def wan_theirs(config) -> dict | None:
    m = config.model
    if (m.modulation, m.position, m.text, m.qk_norm, m.text_pool) != ("shared", "rope", "cross", "width", False):
        return None
    if tuple(m.attention_pattern) != ("all",):
        return None
    return {
        "patch_size": list(m.patch),
        "num_attention_heads": m.heads,
        "attention_head_dim": m.width // m.heads,
        "in_channels": config.codec.channels,
        "out_channels": m.out_channels or config.codec.channels,
        "text_dim": config.text.width,
        "freq_dim": 256,
        "ffn_dim": m.mlp_width,
        "num_layers": m.depth,
        "cross_attn_norm": m.text_norm,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": m.image_width or None,
        "added_kv_proj_dim": m.width if m.image_width else None,
    }


def wan_config_json(published: Mapping) -> dict:
    return {"rope_max_seq_len": 1024, **published}


def wan_original_config_json(published: Mapping) -> dict:
    kept = {key: published[theirs] for theirs, key in ORIGINAL_KEYS.items() if theirs != "patch_size"}
    kind = "i2v" if published["image_dim"] else "ti2v" if published["out_channels"] == 48 else "t2v"
    width = published["num_attention_heads"] * published["attention_head_dim"]
    return {"model_type": kind, "dim": width, "text_len": 512, **kept}


# One line for each; of families with the same names, the config.json or --family must say which.
FAMILIES = {
    "dit": Family(dit_published, dit.rules, dit_overrides, dit_theirs, dict, "DiT"),
    "sit": Family(dit_published, sit.rules, sit_overrides, sit_theirs, dict, "SiT"),
    "latte": Family(latte_published, latte.rules, latte_overrides, latte_theirs, dict, "Latte"),
    "wan": Family(
        wan_published,
        wan.rules,
        wan_overrides,
        wan_theirs,
        wan_config_json,
        "WanTransformer3DModel",
        r"\.attn2\.norm_added_q\.weight$",
    ),
    "wan-original": Family(
        wan_original_published,
        wan_original_rules,
        wan_overrides,
        lambda config: None,
        wan_original_config_json,
        "WanModel",
    ),
}


# Autoencoders


class Autoencoder(NamedTuple):
    """module: that of its weights; kind: as codec.kind; axes: of its convolutions' weights."""

    module: ModuleType
    kind: str
    axes: int
    class_name: str


AUTOENCODERS = {
    "kl": Autoencoder(kl, "kl", 4, "AutoencoderKL"),
    "wan-vae": Autoencoder(wan_vae, "wan", 5, "AutoencoderKLWan"),
}
MARKS = ("encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.weight")


def find_autoencoder(shapes: Mapping[str, tuple], given: Mapping, family: str | None = None) -> str | None:
    """Which of AUTOENCODERS the tensors in a file are, or None.

    given: as in `find`. Raises ValueError where they are not the one that `family` asks for.
    """
    axes = {len(shapes.get(name, ())) for name in MARKS}
    class_name = given.get("_class_name")
    found = [n for n, a in AUTOENCODERS.items() if axes == {a.axes} and class_name in (None, a.class_name)]
    if family in AUTOENCODERS and family not in found:
        raise ValueError(f"the file's names ({sorted(shapes)[:6]}, ...) are not those of --family={family}.")
    return found[0] if found and family in (None, found[0]) else None
