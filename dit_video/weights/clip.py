"""Weights of CLIP's text model, as transformers publishes them, as our parameters, and back.

E width, F width of the feed-forward, J width of the projection. `config` holds the fields of the published
config.json, or of its text_config where the file describes both halves of CLIP.
"""

from collections.abc import Mapping

import numpy as np

from dit_video.weights import Rule, affine, dense, export_weights, import_weights, same

# What a file may hold beside the text model: the image half, and a fixed count of positions.
OTHERS = ("vision_model.", "visual_projection.", "logit_scale", "text_model.embeddings.position_ids")
PROJECTION = "text_projection.weight"


def arguments(config: Mapping, projection: bool) -> dict:
    """What CLIPText(...) takes to be this model. projection: whether the file holds the projection's weight.

    Raises ValueError where the published configuration asks for what the model does not do.
    """
    allowed = {"hidden_act": ["quick_gelu", "gelu"], "layer_norm_eps": [1e-5]}
    for name, values in allowed.items():
        if config.get(name) not in values:
            raise ValueError(f"{name}={config.get(name)!r} cannot be imported. Allowed: {values}.")
    # The first published configs say 2 where they mean the last id of the vocabulary.
    end = config.get("eos_token_id", 2)
    return {
        "vocabulary": config["vocab_size"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
        "length": config["max_position_embeddings"],
        "end": config["vocab_size"] - 1 if end == 2 else end,
        "quick_gelu": config["hidden_act"] == "quick_gelu",
        "projection": config["projection_dim"] if projection else 0,
    }


def rules(config: Mapping, projection: bool) -> list[Rule]:
    """Which of our parameters each published weight is."""
    ours = arguments(config, projection)
    E, F = ours["width"], ours["mlp_width"]
    layer, embeddings = "text_model.encoder.layers.{}", "text_model.embeddings"
    out = [
        same("clip/embed", f"{embeddings}.token_embedding.weight", (ours["vocabulary"], E)),
        same("clip/position", f"{embeddings}.position_embedding.weight", (ours["length"], E)),
        *(r for x in "qkv" for r in dense(f"clip/block_{x}", f"{layer}.self_attn.{x}_proj", E, E)),
        *dense("clip/block_o", f"{layer}.self_attn.out_proj", E, E),
        *dense("clip/block_mlp_in", f"{layer}.mlp.fc1", E, F),
        *dense("clip/block_mlp_out", f"{layer}.mlp.fc2", F, E),
        *affine("clip/block_norm", f"{layer}.layer_norm1", E),
        *affine("clip/block_mlp_norm", f"{layer}.layer_norm2", E),
        *affine("clip/norm", "text_model.final_layer_norm", E),
    ]
    if projection:
        out.append(dense("clip/projection", "text_projection", E, ours["projection"])[0])
    return out


def to_ours(state: Mapping[str, np.ndarray], config: Mapping) -> dict:
    """{'clip': CLIPText's parameters} from the published state dict, of which the image half is left out."""
    state = {name: w for name, w in state.items() if not name.startswith(OTHERS)}
    return import_weights(state, rules(config, PROJECTION in state), config["num_hidden_layers"])


def to_theirs(params: Mapping, config: Mapping) -> dict[str, np.ndarray]:
    """The published state dict of the text model from our parameters; see `export_weights`."""
    return export_weights(params, rules(config, "projection" in params["clip"]), config["num_hidden_layers"])
