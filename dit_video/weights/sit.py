"""SiT's published weights (Ma et al. 2024) as our parameters, and back; its stochastic sampler.

K time points. DiT's class and DiT's table of weights, with a time that runs from noise, t = 0, to data, t = 1: the
network is told t = 1 - s, and its velocity x - e is the negative of ours, so the last layer's sign is turned. The half
of the output that is sigma's in DiT is dropped.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dit_video.weights import Rule, dit, export_weights, import_weights
from dit_video.weights.diffusion import Steps


def arguments(config: Mapping, stride: int = 8) -> dict:
    """What DiT(...) takes to be this model; see `dit.arguments`."""
    return dit.arguments(config, stride) | {"level_scale": 1.0, "level_direction": "data"}


def turned(rule: Rule) -> Rule:
    """The same weight with its sign turned."""
    return replace(rule, there=lambda w: rule.there(-w), back=lambda *w: -rule.back(*w))


def rules(config: Mapping) -> list[Rule]:
    """Which of our parameters each published weight is."""
    return [turned(rule) if rule.theirs.startswith("final_layer.linear") else rule for rule in dit.rules(config)]


def to_ours(state: Mapping[str, np.ndarray], config: Mapping) -> dict:
    """{'text': LabelEncoder's parameters, 'dit': DiT's} from the published state dict; see `import_weights`."""
    return import_weights(state, rules(config), config["depth"])


def to_theirs(params: Mapping, config: Mapping) -> dict[str, np.ndarray]:
    """The published state dict from our parameters; see `export_weights`."""
    return export_weights(params, rules(config), config["depth"])


def diffusion(form: str, t, norm: float = 1.0):
    """w(t) of SiT's SDE on the straight path, by the name of its form (Ma et al. 2024, sec. 2.4)."""
    forms = {
        "constant": lambda: norm + 0 * t,
        "SBDM": lambda: norm * (1 - t) / t,
        "sigma": lambda: norm * (1 - t),
        "linear": lambda: norm * (1 - t),
        "decreasing": lambda: (norm * np.cos(np.pi * t) + 1) ** 2 / 4,
        "increasing-decreasing": lambda: norm * np.sin(np.pi * t) ** 2,
    }
    if form not in forms:
        raise ValueError(f"form={form!r} is not known. Allowed: {', '.join(map(repr, forms))}.")
    return forms[form]()


def sde_steps(points: int, form: str, last: str = "Mean", size: float = 0.04, start: float = 0.0) -> Steps:
    """Euler-Maruyama from t = start to 1 - size over K = points, then a last step to the data without fresh noise.

    dx = (v + w score) dt + sqrt(2 w) dW, score = -e / s (Ma et al. 2024, eq. 6). last: 'Mean', the same step; 'Euler',
    without w; 'Tweedie', the expected data: on the straight path the same as 'Euler'.
    Raises ValueError for a form that is infinite at `start`, and for an unknown form or last step.
    """
    if last not in ("Mean", "Euler", "Tweedie"):
        raise ValueError(f"last={last!r} is not known. Allowed: 'Mean', 'Euler', 'Tweedie'.")
    if form == "SBDM" and start <= 0:
        raise ValueError(f"form='SBDM' divides by t, and start={start}: give a start above 0, such as 0.001.")
    t_K = np.linspace(start, 1 - size, points)
    next_K = np.append(t_K[1:], 1.0)
    w_K, ahead_K = diffusion(form, t_K), next_K - t_K
    fresh_K = np.sqrt(2 * w_K * ahead_K)
    fresh_K[-1] = 0
    if last != "Mean":
        w_K[-1] = 0
    noise_K = 1 - next_K - w_K * ahead_K / (1 - t_K)
    columns = (1 - t_K, 1 - next_K, next_K, noise_K, fresh_K, np.ones(points))
    return Steps(*(column.astype(np.float32) for column in columns))
