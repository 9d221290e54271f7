"""DiT's published weights (Peebles and Xie 2023) as our parameters, and back.

D model width, F width of the feed-forward, C latent channels, p patch side. `config` holds the arguments that the
published class is made with: input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio,
num_classes, learn_sigma.
"""

from collections.abc import Mapping

import numpy as np

from dit_video.model import sincos_table
from dit_video.weights import Rule, dense, export_weights, import_weights, patch_dense, same


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


def to_ours(state: Mapping[str, np.ndarray], config: Mapping) -> dict:
    """{'text': LabelEncoder's parameters, 'dit': DiT's} from the published state dict; see `import_weights`."""
    return import_weights(state, rules(config), config["depth"])


def to_theirs(params: Mapping, config: Mapping) -> dict[str, np.ndarray]:
    """The published state dict from our parameters; see `export_weights`."""
    return export_weights(params, rules(config), config["depth"])
