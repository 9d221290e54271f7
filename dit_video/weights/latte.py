"""Latte's published weights (Ma et al. 2024, "Latte") as our parameters, and back.

F frames, D model width. DiT's class and DiT's table of weights; its blocks attend over space and over time in turn, and
a table of times is added before the first of time. `config` holds DiT's arguments and num_frames and extras: 1 for no
condition, 2 for class labels.
"""

from collections.abc import Mapping

import numpy as np

from dit_video.model import sincos
from dit_video.weights import Rule, dit, export_weights, import_weights


def arguments(config: Mapping, stride: int = 8, rate: float = 8.0) -> dict:
    """What DiT(...) takes to be this model. stride: codec pixels per latent; rate: frames per second.

    Raises ValueError where the published configuration asks for what the model does not do.
    """
    if config["extras"] not in (1, 2):
        raise ValueError(f"extras={config['extras']} cannot be imported. Allowed: 1 (no condition), 2 (class labels).")
    settings = dit.arguments(config, stride) | {"attention_pattern": ("space", "time")}
    settings["pos_scale"] = (rate, *settings["pos_scale"][1:])
    return settings if config["extras"] == 2 else settings | {"text": "none", "text_width": 0}


def rules(config: Mapping) -> list[Rule]:
    """Which of our parameters each published weight is."""
    times_1xFxD = np.asarray(sincos(np.arange(config["num_frames"]), config["hidden_size"]))[None]
    labelled = [rule for rule in dit.rules(config) if config["extras"] == 2 or rule.ours != ("text/table",)]
    return [dit.fixed("temp_embed", times_1xFxD), *labelled]


def to_ours(state: Mapping[str, np.ndarray], config: Mapping) -> dict:
    """{'text': LabelEncoder's parameters, if any, 'dit': DiT's} from the published state dict; see `import_weights`."""
    return import_weights(state, rules(config), config["depth"])


def to_theirs(params: Mapping, config: Mapping) -> dict[str, np.ndarray]:
    """The published state dict from our parameters; see `export_weights`."""
    return export_weights(params, rules(config), config["depth"])
