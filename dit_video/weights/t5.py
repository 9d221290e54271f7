"""Weights of the encoders of T5 v1.1 and UMT5, as transformers publishes them, as our parameters, and back.

E width, H heads, K head width, F width of the feed-forward, R buckets. `config` holds the fields of the published
config.json.
"""

from collections.abc import Mapping

import numpy as np

from dit_video.weights import Rule, dense, export_weights, import_weights, same

# One table under two names; files that name each tensor once have the first alone.
EMBED = ("shared.weight", "encoder.embed_tokens.weight")


def arguments(config: Mapping) -> dict:
    """What T5Encoder(...) takes to be this model.

    Raises ValueError where the published configuration asks for what the encoder does not do.
    """
    allowed = {"model_type": ["t5", "umt5"], "feed_forward_proj": ["gated-gelu"], "layer_norm_epsilon": [1e-6]}
    for name, values in allowed.items():
        if config.get(name) not in values:
            raise ValueError(f"{name}={config.get(name)!r} cannot be imported. Allowed: {values}.")
    return {
        "vocabulary": config["vocab_size"],
        "width": config["d_model"],
        "depth": config["num_layers"],
        "heads": config["num_heads"],
        "head_width": config["d_kv"],
        "mlp_width": config["d_ff"],
        "shared_bias": config["model_type"] == "t5",
        "buckets": config["relative_attention_num_buckets"],
        "distance": config.get("relative_attention_max_distance", 128),  # older files leave it out
    }


def rules(config: Mapping) -> list[Rule]:
    """Which of our parameters each published weight is."""
    ours = arguments(config)
    E, F, inner = ours["width"], ours["mlp_width"], ours["heads"] * ours["head_width"]
    matrix = lambda ours, theirs, n_in, n_out: dense(ours, theirs, n_in, n_out)[0]
    attention, mlp = "encoder.block.{}.layer.0.SelfAttention", "encoder.block.{}.layer.1.DenseReluDense"
    first = attention.format(0) if ours["shared_bias"] else attention
    bias = "t5/bias" if ours["shared_bias"] else "t5/block_bias"
    return [
        *(same("t5/embed", name, (ours["vocabulary"], E)) for name in EMBED),
        same(bias, f"{first}.relative_attention_bias.weight", (ours["buckets"], ours["heads"])),
        *(matrix(f"t5/block_{x}", f"{attention}.{x}", E, inner) for x in "qkv"),
        matrix("t5/block_o", f"{attention}.o", inner, E),
        same("t5/block_norm", "encoder.block.{}.layer.0.layer_norm.weight", (E,)),
        matrix("t5/block_mlp_gate", f"{mlp}.wi_0", E, F),
        matrix("t5/block_mlp_in", f"{mlp}.wi_1", E, F),
        matrix("t5/block_mlp_out", f"{mlp}.wo", F, E),
        same("t5/block_mlp_norm", "encoder.block.{}.layer.1.layer_norm.weight", (E,)),
        same("t5/norm", "encoder.final_layer_norm.weight", (E,)),
    ]


def to_ours(state: Mapping[str, np.ndarray], config: Mapping) -> dict:
    """{'t5': T5Encoder's parameters} from the published state dict, of which a decoder is left out.

    Raises ValueError as `import_weights` does, and where the two names of the embedding differ.
    """
    state = {name: w for name, w in state.items() if not name.startswith(("decoder.", "lm_head."))}
    given = [state[name] for name in EMBED if name in state]
    if len(given) == 2 and not np.array_equal(*given):
        raise ValueError(f"{EMBED[0]!r} and {EMBED[1]!r} differ: the encoder has one table of embeddings.")
    if given:
        state |= dict.fromkeys(EMBED, given[0])
    return import_weights(state, rules(config), config["num_layers"])


def to_theirs(params: Mapping, config: Mapping) -> dict[str, np.ndarray]:
    """The published state dict of the encoder from our parameters; see `export_weights`."""
    return export_weights(params, rules(config), config["num_layers"])
