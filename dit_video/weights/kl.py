"""Weights of the image autoencoder of Stable Diffusion, as diffusers publishes them (AutoencoderKL), and back.

`config` holds the fields of the published vae/config.json.
"""

from collections.abc import Mapping

import numpy as np

from dit_video.weights import Rule, affine, convolution, dense, export_weights, import_weights

# Checkpoints from before 2023 call the attention's layers so.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def settings(config: Mapping) -> dict:
    """The codec's settings, as `codecs.autoencoder.save` and `build` take them.

    Raises ValueError where the published configuration asks for what the codec does not do.
    """
    allowed = {
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "latents_mean": None,
        "latents_std": None,
    }
    for name, value in allowed.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name}={config[name]!r} cannot be imported. Allowed: {value!r}.")
    fields = {
        "channels": config["latent_channels"],
        "widths": list(config["block_out_channels"]),
        "depth": config["layers_per_block"],
        "groups": config["norm_num_groups"],
    }
    # Its pipelines scale: latents = (z - shift) * factor.
    C, factor, shift = fields["channels"], config.get("scaling_factor", 0.18215), config.get("shift_factor") or 0.0
    return {"encoder": fields, "decoder": fields, "mean": [shift] * C, "std": [1 / factor] * C}


def rules(config: Mapping) -> list[Rule]:
    """Which of our parameters each published weight is."""
    ours = settings(config)["encoder"]
    C, widths, depth = ours["channels"], ours["widths"], ours["depth"]
    out, last = [], len(widths) - 1
    for part, theirs in (("encoder", "quant_conv"), ("decoder", "post_quant_conv")):
        name, width = ("moments", 2 * C) if part == "encoder" else ("latents", C)
        out += convolution(f"{part}/{name}", theirs, (1, 1), width, width)
        for j in range(2):
            out += _residual(f"{part}/mid_{j}", f"{part}.mid_block.resnets.{j}", widths[-1], widths[-1])
        attention = f"{part}.mid_block.attentions.0"
        out += affine(f"{part}/mid_attention_norm", f"{attention}.group_norm", widths[-1])
        for x, layer in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
            out += dense(f"{part}/mid_attention_{x}", f"{attention}.{layer}", widths[-1], widths[-1])

    out += convolution("encoder/in", "encoder.conv_in", (3, 3), 3, widths[0])
    for i, (before, width) in enumerate(zip([widths[0], *widths], widths)):
        block = f"encoder.down_blocks.{i}"
        for j in range(depth):
            out += _residual(f"encoder/down_{i}_{j}", f"{block}.resnets.{j}", width if j else before, width)
        if i < last:
            out += convolution(f"encoder/down_{i}_half", f"{block}.downsamplers.0.conv", (3, 3), width, width)
    out += affine("encoder/norm", "encoder.conv_norm_out", widths[-1])
    out += convolution("encoder/out", "encoder.conv_out", (3, 3), widths[-1], 2 * C)

    out += convolution("decoder/in", "decoder.conv_in", (3, 3), C, widths[-1])
    for i, (before, width) in enumerate(zip([widths[-1], *widths[::-1]], widths[::-1])):
        block = f"decoder.up_blocks.{i}"
        for j in range(depth + 1):
            out += _residual(f"decoder/up_{i}_{j}", f"{block}.resnets.{j}", width if j else before, width)
        if i < last:
            out += convolution(f"decoder/up_{i}_double", f"{block}.upsamplers.0.conv", (3, 3), width, width)
    out += affine("decoder/norm", "decoder.conv_norm_out", widths[0])
    return out + convolution("decoder/out", "decoder.conv_out", (3, 3), widths[0], 3)


def _residual(ours: str, theirs: str, n_in: int, n_out: int) -> list[Rule]:
    short = convolution(f"{ours}_short", f"{theirs}.conv_shortcut", (1, 1), n_in, n_out) if n_in != n_out else []
    return [
        *affine(f"{ours}_norm1", f"{theirs}.norm1", n_in),
        *convolution(f"{ours}_conv1", f"{theirs}.conv1", (3, 3), n_in, n_out),
        *affine(f"{ours}_norm2", f"{theirs}.norm2", n_out),
        *convolution(f"{ours}_conv2", f"{theirs}.conv2", (3, 3), n_out, n_out),
        *short,
    ]


def to_ours(state: Mapping[str, np.ndarray], config: Mapping) -> dict:
    """{'encoder', 'decoder': parameters} from the published state dict, of old names or new; see `import_weights`."""
    return import_weights({new_name(name): w for name, w in state.items()}, rules(config), 0)


def new_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def to_theirs(params: Mapping, config: Mapping) -> dict[str, np.ndarray]:
    """The published state dict, of new names, from our parameters; see `export_weights`."""
    return export_weights(params, rules(config), 0)
