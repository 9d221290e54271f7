"""What each key of a config may be, and `check_config`, which holds a run to it before jax is loaded."""

import difflib
import re

# A key that has words is one of them, or a tuple of some.
WORDS = {
    "data.kind": ("shapes", "clips"),
    "data.group_by": ("frame", "clip"),
    "codec.kind": ("pixels", "latents", "kl", "wan"),
    "text.kind": ("words", "labels", "embeddings", "frozen"),
    "model.predict": ("x", "v", "e", "ddpm"),
    "model.modulation": ("shared", "block"),
    "model.position": ("rope", "table", "both"),
    "model.qk_norm": ("none", "head", "width"),
    "model.text": ("none", "pooled", "cross"),
    "model.level_direction": ("noise", "data"),
    "model.attention_pattern": ("all", "space", "time"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.remat": ("none", "dots", "full"),
    "lora.targets": (
        *("q", "k", "v", "o", "text_q", "text_k", "text_v", "text_o", "image_k", "image_v"),
        *("mlp_in", "mlp_out", "mod"),
    ),
    "flow.distribution": ("uniform", "logit_normal", "mode"),
    "optimizer.kind": ("adamw", "muon"),
    "mesh.exchange": ("ring", "all_to_all"),
    "sample.solver": ("euler", "heun", "heun_full", "ab2"),
}

# Intervals, of a number or of each number of a tuple; a bracket's end belongs to it, a parenthesis' does not.
INTERVALS = {
    "[0, 4294967295]": "seed",
    "[1, 2147483647]": "steps",
    "[1, inf)": (
        "data.rows data.length data.text_length data.groups data.shards data.waiting data.max_tokens data.max_frames "
        "data.max_side codec.stride codec.chunk text.width text.heads text.classes model.patch model.width model.depth "
        "model.heads model.mlp_width model.unroll optimizer.accumulate mesh.fsdp mesh.tensor mesh.sequence log_every "
        "eval_batches checkpoint_every keep sample.steps"
    ),
    "[0, inf)": (
        "data.workers data.min_side codec.channels codec.tile text.depth text.tokens model.out_channels "
        "model.image_width model.pos_scale model.canvas_most model.window lora.rank lora.alpha flow.shift_tokens "
        "optimizer.lr optimizer.text_lr optimizer.muon_lr optimizer.warmup optimizer.weight_decay eval_every"
    ),
    "(0, inf)": "data.fps model.level_scale model.rope_theta sample.shift",
    "(0, inf]": "optimizer.clip",
    "[0, 1]": (
        "late data.pair_share data.still_share data.whole text.dropout flow.weight_floor "
        "flow.light flow.causal_share "
        "flow.mixture.first flow.mixture.prefix flow.mixture.suffix flow.mixture.ends flow.mixture.every "
        "flow.mixture.light flow.mixture.box flow.mixture.forcing "
        "optimizer.decay optimizer.restart optimizer.restart_lr sample.interval"
    ),
    "[-1, 1]": (
        "data.late_pair_share flow.late_mixture.first flow.late_mixture.prefix flow.late_mixture.suffix "
        "flow.late_mixture.ends flow.late_mixture.every flow.late_mixture.light flow.late_mixture.box "
        "flow.late_mixture.forcing"
    ),
    "[0, 1)": "data.drop optimizer.b1 optimizer.b2 optimizer.ema",
    "(0, 1]": "model.s_min",
    "[-1, inf)": "mesh.data sample_every",
    "(-inf, inf)": (
        "model.pos_offset flow.mean flow.deviation sample.guidance sample.guidance_given sample.history "
        "sample.history_given"
    ),
}
WHOLE = {"codec.stride", "model.patch"}  # tuples of whole numbers; of other keys the config holds the type
LENGTHS = {
    "data.drop": 2,
    "codec.stride": 3,
    "model.patch": 3,
    "model.pos_scale": 3,
    "model.pos_offset": 3,
    "sample.interval": 2,
}


def check_config(config) -> None:
    """Raises ValueError for a value that is none of its key's, with what it may be and, of words, the nearest."""
    for name, words in WORDS.items():
        _check_words(name, _value(config, name), words)
    for interval, names in INTERVALS.items():
        for name in names.split():
            _check_numbers(name, _value(config, name), interval)
    for name in ("data.drop", "sample.interval"):
        low, high = _value(config, name)
        if low > high:
            raise ValueError(f"{name}={(low, high)} must be in order. Give {(high, low)}.")
    for name, part in (("model.width", "model.heads"), ("text.width", "text.heads"), ("data.rows", "data.shards")):
        whole, parts = _value(config, name), _value(config, part)
        if whole % parts and not (name == "text.width" and config.text.kind != "words"):
            raise ValueError(
                f"{name}={whole} must be a multiple of {part}={parts}. Nearest: {-(-whole // parts) * parts}."
            )
    if config.mesh.data == 0:
        raise ValueError("mesh.data=0 must be -1, all devices that the other axes leave, or lie in [1, inf).")
    if config.model.text == "none" and config.model.text_pool:
        raise ValueError(
            "model.text_pool=True pools a text, and model.text='none' has none. Give --config.model.text_pool=False "
            "too, or model.text='pooled' or 'cross'."
        )
    period = len(config.model.attention_pattern)
    if not period or config.model.depth % period:
        raise ValueError(
            f"model.depth={config.model.depth} must be a multiple of the {period} layers of model.attention_pattern="
            f"{tuple(config.model.attention_pattern)}, which has one at least."
        )
    shares = config.flow.mixture.to_dict()
    late_shares = {kind: shares[kind] if share < 0 else share for kind, share in config.flow.late_mixture.items()}
    for name, of in (("mixture", shares), ("late_mixture", late_shares)):
        if (total := sum(of.values())) > 1 + 1e-6:
            raise ValueError(f"flow.{name}'s shares sum to {total:g}. Give shares that sum to 1 at most.")
    for prompt in config.sample.prompts:
        if not re.fullmatch(r"\d+x\d+x\d+@\d+(\.\d*)?:.*", str(prompt), re.DOTALL):
            raise ValueError(f"sample.prompts: {prompt!r} is not of the form '48x32x9@8: a red circle'.")


def _value(config, name):
    for part in name.split("."):
        config = config[part]
    return config


def _check_words(name, value, words):
    for word in value if isinstance(value, tuple | list) else (value,):
        if word not in words:
            near = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
            mean = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}={value!r} is not known.{mean} Allowed: {', '.join(map(repr, words))}.")


def _check_numbers(name, value, interval):
    numbers = value if isinstance(value, tuple | list) else (value,)
    if len(numbers) != LENGTHS.get(name, len(numbers)):
        raise ValueError(f"{name}={value!r} has {len(numbers)} numbers. Give {LENGTHS[name]}.")
    low, high = map(float, interval[1:-1].split(","))
    for number in numbers:
        kind = int if name in WHOLE else int | float
        inside = isinstance(number, kind) and not isinstance(number, bool) and low <= number <= high
        if not inside or (number == low and interval[0] == "(") or (number == high and interval[-1] == ")"):
            whole = "whole numbers " if name in WHOLE else ""
            raise ValueError(f"{name}={value!r} must lie in {whole}{interval}.")
