"""Weights of Wan's video autoencoders, 2.1 and 2.2, as diffusers publishes them (AutoencoderKLWan), and back.

C latent channels, p side of 2.2's patches. `config` holds the fields of the published vae/config.json.
"""

from collections.abc import Mapping

import numpy as np

from dit_video.weights import Rule, convolution, export_weights, import_weights, same


def settings(config: Mapping) -> dict:
    """The codec's settings, as `codecs.autoencoder.save` and `build` take them.

    Raises ValueError where the published configuration asks for what the codec does not do.
    """
    p = config.get("patch_size") or 1
    colours = 3 * p * p
    allowed = {"attn_scales": [], "in_channels": colours, "out_channels": colours}
    for name, value in allowed.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name}={config[name]!r} cannot be imported. Allowed: {value!r}.")
    if config["dim_mult"][0] != 1:
        raise ValueError(f"dim_mult={config['dim_mult']} cannot be imported: it is to begin with 1.")

    def fields(width):
        return {
            "channels": config["z_dim"],
            "widths": [width * n for n in config["dim_mult"]],
            "depth": config["num_res_blocks"],
            "in_time": list(config["temperal_downsample"]),
            "patch": p,
            "carried": bool(config.get("is_residual")),
        }

    return {
        "encoder": fields(config["base_dim"]),
        "decoder": fields(config.get("decoder_base_dim") or config["base_dim"]),
        "mean": list(config["latents_mean"]),
        "std": list(config["latents_std"]),
    }


def rules(config: Mapping) -> list[Rule]:
    """Which of our parameters each published weight is."""
    ours = settings(config)
    C, p, carried = ours["encoder"]["channels"], ours["encoder"]["patch"], ours["encoder"]["carried"]
    depth, in_time, colours = ours["encoder"]["depth"], ours["encoder"]["in_time"], 3 * p * p
    out, last = [], len(in_time)
    for part, theirs, name, width in (
        ("encoder", "quant_conv", "moments", 2 * C),
        ("decoder", "post_quant_conv", "latents", C),
    ):
        coarse, fine = ours[part]["widths"][-1], ours[part]["widths"][0]
        out += convolution(f"{part}/{name}", theirs, (1, 1, 1), width, width)
        for j in range(2):
            out += _residual(f"{part}/mid_{j}", f"{part}.mid_block.resnets.{j}", coarse, coarse)
        out += _mid_rules(f"{part}/mid_attention", f"{part}.mid_block.attentions.0", coarse)
        out.append(_gain(f"{part}/norm", f"{part}.norm_out", coarse if part == "encoder" else fine))

    # 2.1 counts the encoder's blocks one by one, 2.2 (carried) level by level.
    widths = ours["encoder"]["widths"]
    out += _in_patch_order(convolution("encoder/in", "encoder.conv_in", (3, 3, 3), colours, widths[0]), p, axis=1)
    for i, (before, width) in enumerate(zip([widths[0], *widths], widths)):
        level = f"encoder.down_blocks.{i}"
        flat = [f"encoder.down_blocks.{i * (depth + 1) + j}" for j in range(depth + 1)]
        for j in range(depth):
            theirs = f"{level}.resnets.{j}" if carried else flat[j]
            out += _residual(f"encoder/down_{i}_{j}", theirs, width if j else before, width)
        if i < last:
            theirs = f"{level}.downsampler" if carried else flat[depth]
            out += convolution(f"encoder/down_{i}_half", f"{theirs}.resample.1", (3, 3), width, width)
            if in_time[i]:
                out += convolution(f"encoder/down_{i}_half_time", f"{theirs}.time_conv", (3, 1, 1), width, width)
    out += convolution("encoder/out", "encoder.conv_out", (3, 3, 3), widths[-1], 2 * C)

    widths = ours["decoder"]["widths"][::-1]
    out += convolution("decoder/in", "decoder.conv_in", (3, 3, 3), C, widths[0])
    before = widths[0]
    for i, width in enumerate(widths):
        level = f"decoder.up_blocks.{i}"
        for j in range(depth + 1):
            out += _residual(f"decoder/up_{i}_{j}", f"{level}.resnets.{j}", width if j else before, width)
        before = width
        if i < last:
            theirs = f"{level}.upsampler" if carried else f"{level}.upsamplers.0"
            before = width if carried else width // 2
            out += convolution(f"decoder/up_{i}_double", f"{theirs}.resample.1", (3, 3), width, before)
            if in_time[last - 1 - i]:
                out += convolution(f"decoder/up_{i}_double_time", f"{theirs}.time_conv", (3, 1, 1), width, 2 * width)
    return out + _in_patch_order(convolution("decoder/out", "decoder.conv_out", (3, 3, 3), before, colours), p, axis=0)


def _gain(ours: str, theirs: str, width: int, axes: int = 3) -> Rule:
    return same(f"{ours}_gain", f"{theirs}.gamma", (width, *[1] * axes), (width,))


def _residual(ours: str, theirs: str, n_in: int, n_out: int) -> list[Rule]:
    short = convolution(f"{ours}_short", f"{theirs}.conv_shortcut", (1, 1, 1), n_in, n_out) if n_in != n_out else []
    return [
        _gain(f"{ours}_norm1", f"{theirs}.norm1", n_in),
        *convolution(f"{ours}_conv1", f"{theirs}.conv1", (3, 3, 3), n_in, n_out),
        _gain(f"{ours}_norm2", f"{theirs}.norm2", n_out),
        *convolution(f"{ours}_conv2", f"{theirs}.conv2", (3, 3, 3), n_out, n_out),
        *short,
    ]


def _mid_rules(ours: str, theirs: str, width: int) -> list[Rule]:
    """Its q, k and v are published as one convolution of one pixel, [q; k; v]."""
    names, shape = tuple(f"{ours}_{x}" for x in "qkv"), (3 * width, width, 1, 1)
    there = lambda w: np.split(w.reshape(shape[:2]).T, 3, 1)
    return [
        _gain(f"{ours}_norm", f"{theirs}.norm", width, axes=2),
        Rule(f"{theirs}.to_qkv.weight", shape, names, there, lambda *w: np.concatenate(w, 1).T.reshape(shape)),
        Rule(
            f"{theirs}.to_qkv.bias",
            shape[:1],
            tuple(f"{name}_bias" for name in names),
            lambda w: np.split(w, 3),
            lambda *w: np.concatenate(w),
        ),
        *convolution(f"{ours}_o", f"{theirs}.proj", (1, 1), width, width),
    ]


def _in_patch_order(rules: list[Rule], p: int, axis: int) -> list[Rule]:
    """The rules with a patch's values, along an axis of their weight: theirs in the order (colour, x, y), ours (y, x,
    colour). The bias goes along where they are the outputs, axis 0."""
    there = np.arange(3 * p * p).reshape(3, p, p).transpose(2, 1, 0).reshape(-1)
    back = np.argsort(there)

    def reordered(rule):
        if rule.theirs.endswith(".bias") and axis == 1:
            return rule
        return Rule(
            rule.theirs,
            rule.shape,
            rule.ours,
            lambda w: rule.there(np.take(w, there, axis)),
            lambda w: np.take(rule.back(w), back, axis),
        )

    return [reordered(rule) for rule in rules]


def new_name(name: str) -> str:
    return name  # there are no old ones


def to_ours(state: Mapping[str, np.ndarray], config: Mapping) -> dict:
    """{'encoder', 'decoder': their parameters} from the published state dict; see `import_weights`."""
    return import_weights(state, rules(config), 0)


def to_theirs(params: Mapping, config: Mapping) -> dict[str, np.ndarray]:
    """The published state dict from our parameters; see `export_weights`."""
    return export_weights(params, rules(config), 0)
