"""Weights of Wan's transformer, text and image to video, as diffusers publishes them, as our parameters, and back.

D model width, H heads, K head width, C latent channels, E values that a patch is shown beside its own. `config` holds
the fields of the published transformer/config.json. Wan pads its text with zeroed tokens that stay ordinary keys: lay
out 512 tokens per prompt (text.kind='frozen', text.tokens=512; `frozen.zero_padded`).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from dit_video.patches import Patches
from dit_video.weights import Rule, affine, dense, export_weights, import_weights, patch_dense, same


def arguments(config: Mapping, stride: int = 8, rate: float = 4.0) -> dict:
    """What DiT(...) takes to be this model. stride: codec pixels per latent; rate: latent frames per second.

    Raises ValueError where the published configuration asks for what the model does not do.
    """
    allowed = {"qk_norm": ["rms_norm_across_heads"], "eps": [1e-6], "added_kv_proj_dim": [None, width(config)]}
    for name, values in allowed.items():
        if config.get(name) not in values:
            raise ValueError(f"{name}={config.get(name)!r} cannot be imported. Allowed: {values}.")
    pt, ph, pw = config["patch_size"]
    return {
        "patch_values": pt * ph * pw * config["in_channels"],
        "out_values": pt * ph * pw * config["out_channels"],
        "width": width(config),
        "depth": config["num_layers"],
        "heads": config["num_attention_heads"],
        "mlp_width": config["ffn_dim"],
        "modulation": "shared",
        "position": "rope",
        "qk_norm": "width",
        "text": "cross",
        "text_width": config["text_dim"],
        "text_norm": config["cross_attn_norm"],
        "image_width": config.get("image_dim") or 0,
        "level_scale": 1000.0,
        "level_features": config["freq_dim"],
        # A patch's time is that of its last latent frame.
        "pos_scale": (rate / pt, 1 / (stride * ph), 1 / (stride * pw)),
        "pos_offset": (1 / pt - 1, -0.5, -0.5),
    }


def width(config: Mapping) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def rotated(ours: str, theirs: str, shape: tuple[int, ...], heads: int) -> Rule:
    """A weight or gain whose outputs RoPE rotates: theirs in pairs (2i, 2i + 1) of a head, ours in (i, i + K/2)."""
    K = shape[0] // heads
    there = (np.arange(heads)[:, None] * K + np.arange(K).reshape(K // 2, 2).T.reshape(-1)).reshape(-1)
    back = np.argsort(there)
    return Rule(theirs, shape, (ours,), lambda w: [w[there].T], lambda w: w.T[back])


def rules(config: Mapping) -> list[Rule]:
    """Which of our parameters each published weight is."""
    ours = arguments(config)
    D, H, F, I = ours["width"], ours["heads"], ours["mlp_width"], ours["image_width"]
    out = [
        *patch_dense("dit/patch", "patch_embedding", config["in_channels"], config["patch_size"], D),
        *dense("dit/level_in", "condition_embedder.time_embedder.linear_1", ours["level_features"], D),
        *dense("dit/level_out", "condition_embedder.time_embedder.linear_2", D, D),
        *dense("dit/mod", "condition_embedder.time_proj", D, 6 * D),
        *dense("dit/text_in", "condition_embedder.text_embedder.linear_1", ours["text_width"], D),
        *dense("dit/text_out", "condition_embedder.text_embedder.linear_2", D, D),
        *dense("dit/block_v", "blocks.{}.attn1.to_v", D, D),
        *dense("dit/block_o", "blocks.{}.attn1.to_out.0", D, D),
        *dense("dit/block_mlp_in", "blocks.{}.ffn.net.0.proj", D, F),
        *dense("dit/block_mlp_out", "blocks.{}.ffn.net.2", F, D),
        same("dit/block_mod_table", "blocks.{}.scale_shift_table", (1, 6, D), (6 * D,)),
        same("dit/last_table", "scale_shift_table", (1, 2, D), (2 * D,)),
        *dense("dit/last", "proj_out", D, ours["out_values"]),
    ]
    for x in "qk":
        out += [
            rotated(f"dit/block_{x}", f"blocks.{{}}.attn1.to_{x}.weight", (D, D), H),
            rotated(f"dit/block_{x}_bias", f"blocks.{{}}.attn1.to_{x}.bias", (D,), H),
            rotated(f"dit/block_{x}_norm", f"blocks.{{}}.attn1.norm_{x}.weight", (D,), H),
            same(f"dit/block_text_{x}_norm", f"blocks.{{}}.attn2.norm_{x}.weight", (D,)),
        ]
    for x, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
        out += dense(f"dit/block_text_{x}", f"blocks.{{}}.attn2.{theirs}", D, D)
    if ours["text_norm"]:
        out += affine("dit/block_text_norm", "blocks.{}.norm2", D)
    if I:
        embedder = "condition_embedder.image_embedder"
        out += [
            *affine("dit/image_norm_in", f"{embedder}.norm1", I),
            *dense("dit/image_in", f"{embedder}.ff.net.0.proj", I, I),
            *dense("dit/image_out", f"{embedder}.ff.net.2", I, D),
            *affine("dit/image_norm_out", f"{embedder}.norm2", D),
            *dense("dit/block_image_k", "blocks.{}.attn2.add_k_proj", D, D),
            *dense("dit/block_image_v", "blocks.{}.attn2.add_v_proj", D, D),
            same("dit/block_image_k_norm", "blocks.{}.attn2.norm_added_k.weight", (D,)),
        ]
    return out


def to_ours(state: Mapping[str, np.ndarray], config: Mapping) -> dict:
    """{'dit': DiT's parameters} from the published state dict; see `import_weights`."""
    return import_weights(state, rules(config), config["num_layers"])


def to_theirs(params: Mapping, config: Mapping) -> dict[str, np.ndarray]:
    """The published state dict from our parameters; see `export_weights`."""
    return export_weights(params, rules(config), config["num_layers"])


# Image to video


def image_channels(codec, image_YxXx3, frames: int) -> np.ndarray:
    """shown_TxYxXx(st + C): what the image-to-video model is shown of its first frame, in [-1, 1], beside each latent.

    First st flags, 1 where the latent's frames are given, then the latents of the video whose other frames are grey
    (Wan 2.1, 2025, sec. 5.1). st: the codec's stride in time.
    """
    video_FxYxXx3 = np.zeros((frames, *image_YxXx3.shape), np.float32)
    video_FxYxXx3[0] = image_YxXx3
    latents_TxYxXxC = codec.encode(video_FxYxXx3)
    given = np.zeros((*latents_TxYxXxC.shape[:3], codec.stride[0]), np.float32)
    given[0] = 1
    return np.concatenate([given, latents_TxYxXxC], -1)


def with_channels(velocity: Callable, shown_BxNxE, cells: int) -> Callable:
    """The velocity of latents alone, from that of a model whose patches hold more channels behind each latent's own.

    shown_BxNxE: these channels, patchified (see `image_channels`); cells: latents in a patch.
    """

    def narrow(patches: Patches, *more):
        parts = [a.reshape(*a.shape[:2], cells, -1) for a in (patches.x_BxNxP, shown_BxNxE)]
        wide_BxNxP = jnp.concatenate(parts, -1).reshape(*shown_BxNxE.shape[:2], -1)
        return velocity(replace(patches, x_BxNxP=wide_BxNxP), *more)

    return narrow
