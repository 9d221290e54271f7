"""DiT's published weights (Peebles and Xie 2023) as our parameters, and back.

D model width, F width of the feed-forward, C latent channels, p patch side. `config` holds the arguments that the
published class is made with: input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio,
num_classes, learn_sigma.
"""

import re
from collections.abc import Mapping

import numpy as np

from dit_video.model import sincos_table
from dit_video.weights import Rule, dense, export_weights, import_weights, patch_dense, same
from dit_video.weights.files import Stored

# diffusers' names of DiT's layers, and DiT's own. q, k and v are apart there; what is in EMBEDDERS is in every block.
DIFFUSERS_NAMES = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}


def arguments(config: Mapping, stride: int = 8) -> dict:
    """What DiT(...) takes to be this model. stride: codec pixels per latent.

    The output holds 2C channels, noise and then sigma's, where learn_sigma. Level s is timestep 1000 * s.
    """
    p, C, D = config["patch_size"], config["in_channels"], config["hidden_size"]
    return {
        "patch_values": p * p * C,
        "out_values": p * p * C * (2 if config["learn_sigma"] else 1),
        "width": D,
        "depth": config["depth"],
        "heads": config["num_heads"],
        "mlp_width": int(D * config["mlp_ratio"]),
        "modulation": "block",
        "position": "table",
        "qk_norm": "none",
        "text": "pooled",
        "text_width": D,
        "level_scale": 1000.0,
        "pos_scale": (0.0, 1 / (stride * p), 1 / (stride * p)),
        "pos_offset": (0.0, -0.5, -0.5),
    }


def fused(names: tuple[str, ...], theirs: str, width: int) -> list[Rule]:
    """A linear layer that holds several of ours, one after the other in its output: [q; k; v]."""
    n = len(names)
    weight = Rule(
        f"{theirs}.weight", (n * width, width), names, lambda w: np.split(w.T, n, 1), lambda *w: np.concatenate(w, 1).T
    )
    biases = tuple(f"{name}_bias" for name in names)
    return [
        weight,
        Rule(f"{theirs}.bias", (n * width,), biases, lambda w: np.split(w, n), lambda *w: np.concatenate(w)),
    ]


def fixed(theirs: str, table_1xNxD: np.ndarray) -> Rule:
    """A sin-cos table that the model computes: checked at import, written at export."""

    def check(w):
        if np.abs(w - table_1xNxD).max() > 1e-4:
            raise ValueError(f"{theirs!r} is not the fixed sin-cos table of its grid, and the model has no other.")
        return []

    return Rule(theirs, table_1xNxD.shape, (), check, lambda: table_1xNxD)


def rules(config: Mapping) -> list[Rule]:
    """Which of our parameters each published weight is."""
    ours = arguments(config)
    D, F, p, C = ours["width"], ours["mlp_width"], config["patch_size"], config["in_channels"]
    y, x = np.indices([config["input_size"] // p] * 2).reshape(2, 1, -1)
    return [
        fixed("pos_embed", np.asarray(sincos_table(np.stack([0 * y, y, x], -1), D))),
        same("text/table", "y_embedder.embedding_table.weight", (config["num_classes"] + 1, D)),
        *patch_dense("dit/patch", "x_embedder.proj", C, (p, p), D),
        *dense("dit/level_in", "t_embedder.mlp.0", 256, D),
        *dense("dit/level_out", "t_embedder.mlp.2", D, D),
        *fused(("dit/block_q", "dit/block_k", "dit/block_v"), "blocks.{}.attn.qkv", D),
        *dense("dit/block_o", "blocks.{}.attn.proj", D, D),
        *dense("dit/block_mlp_in", "blocks.{}.mlp.fc1", D, F),
        *dense("dit/block_mlp_out", "blocks.{}.mlp.fc2", F, D),
        *dense("dit/block_mod", "blocks.{}.adaLN_modulation.1", D, 6 * D),
        *dense("dit/last_mod", "final_layer.adaLN_modulation.1", D, 2 * D),
        *dense("dit/last", "final_layer.linear", D, ours["out_values"]),
    ]


def from_diffusers(tensors: Mapping[str, Stored], known: Mapping) -> tuple[dict[str, Stored], dict]:
    """(tensors, configuration) as DiT has them of those that diffusers has (facebook/DiT-XL-2-256); others as they are.

    known: the file's config.json. A tensor that fits nowhere keeps its name. Reading raises ValueError where the copies
    of the embedders in its blocks are not one.
    """
    if "proj_out_1.weight" not in tensors or "pos_embed.proj.weight" not in tensors:
        return dict(tensors), dict(known)
    own, parts, copies = {}, {}, {}
    for name, stored in tensors.items():
        layer, dot, kind = name.rpartition(".") if name != "pos_embed.pos_embed" else (name, "", "")
        at = re.match(r"transformer_blocks\.(\d{1,4})\.", layer)
        block, inside = (f"blocks.{at[1]}.", layer[at.end() :]) if at else ("", layer)
        if at and inside.removeprefix("norm1.emb.") in EMBEDDERS:
            copies.setdefault(EMBEDDERS[inside.removeprefix("norm1.emb.")] + dot + kind, []).append(stored)
        elif at and inside in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
            parts.setdefault(f"{block}attn.qkv.{kind}", {})[inside[-1]] = (name, stored)
        else:
            own[block + DIFFUSERS_NAMES[inside] + dot + kind if inside in DIFFUSERS_NAMES else name] = stored
    own |= {name: _one(name, stored) for name, stored in copies.items()}
    for name, part in parts.items():
        own |= {name: _joined([part[x][1] for x in "qkv"])} if len(part) == 3 else dict(part.values())
    ours = {"input_size": "sample_size", "num_heads": "num_attention_heads"}
    published = {"_class_name": "DiT"} | {key: known[theirs] for key, theirs in ours.items() if known.get(theirs)}
    D, _, p = own["x_embedder.proj.weight"].shape[:3]
    y, x = np.indices([published.get("input_size", 16 * p) // p] * 2).reshape(2, 1, -1)
    table_1xNxD = np.asarray(sincos_table(np.stack([0 * y, y, x], -1), D))  # computed there too
    own.setdefault("pos_embed", Stored(table_1xNxD.shape, np.dtype(np.float32), lambda: table_1xNxD))
    return own, {**known, **published}


def _joined(stored: list[Stored]) -> Stored:
    """Tensors one after the other along their first axis."""
    shape = (sum(s.shape[0] for s in stored), *stored[0].shape[1:])
    return Stored(shape, stored[0].dtype, lambda: np.concatenate([np.asarray(s) for s in stored]))


def _one(name: str, copies: list[Stored]) -> Stored:
    """The tensor that all of the copies are."""

    def read():
        first = np.asarray(copies[0])
        if any(not np.array_equal(first, np.asarray(other)) for other in copies[1:]):
            raise ValueError(f"{name!r}, of which each block has a copy, is not the same in all: the model has one.")
        return first

    return Stored(copies[0].shape, copies[0].dtype, read)


def to_ours(state: Mapping[str, np.ndarray], config: Mapping) -> dict:
    """{'text': LabelEncoder's parameters, 'dit': DiT's} from the published state dict; see `import_weights`."""
    return import_weights(state, rules(config), config["depth"])


def to_theirs(params: Mapping, config: Mapping) -> dict[str, np.ndarray]:
    """The published state dict from our parameters; see `export_weights`."""
    return export_weights(params, rules(config), config["depth"])
