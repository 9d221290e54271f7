"""NaViT (Dehghani et al. 2023) on this project's rows: its greedy grouping, and its forward pass with our packing,
tags and attention and the reference's weights.

python -m experiments.parity.navit GOLDEN_DIR

B rows, N patches per row, P values per patch, D width, H heads, K head width, I images of the row with the most.
The model is a rebuild for comparison and no part of the package. Nor is the grouping: rows of the package are filled
by `choose`, which searches among waiting clips, while the reference takes images as they come.
"""

import json
import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.attention import attend, layer_norm, sees
from dit_video.patches import lay_out, pack
from experiments.parity.arrays import error, load


def group_greedily(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which images share a row: in their order, a new row where the next no longer fits (next-fit).

    sizes: patches of each. Raises ValueError for an image that no row can hold.
    """
    rows, used = [], length
    for i, size in enumerate(sizes):
        if size > length:
            raise ValueError(f"image {i} has {size} patches, and a row holds {length}.")
        if used + size > length:
            rows.append([])
            used = 0
        rows[-1].append(i)
        used += size
    return rows


def pack_images(rows: Sequence[Sequence[np.ndarray]], patch: int):
    """Patches of packed images_3xYxX, each row as long as the fullest, by the package's own `lay_out` and `pack`."""
    blank = np.zeros((1, 1), np.int32)
    pieces = [
        [
            lay_out(np.moveaxis(image, 0, -1)[None], [0.0], (1, patch, patch), (1, 1), blank, i)[0]
            for i, image in enumerate(row)
        ]
        for row in rows
    ]
    most = lambda axis: max(sum(piece.size[axis] for piece in row) for row in pieces)
    return pack(pieces, most(0), most(2), most(1))[0].patches


def forward(state: Mapping[str, np.ndarray], config: Mapping, patches) -> dict:
    """Each image's logits_BxIxC, and what leads there: 'tokens', 'x_in' (with positions), 'x_out', 'pooled'.

    sec. 2.2 and 3 of the paper: factorised positions, queries and keys normalised, pooling by attention.
    """
    H, K, p = config["heads"], config["dim_head"], config["patch_size"]
    P = patches.x_BxNxP.shape[-1]

    def norm(x, name):
        return layer_norm(x, 1e-5) * state[f"{name}.gamma"] + state[f"{name}.beta"]

    def dense(x, name):
        bias = state.get(f"{name}.bias")
        return x @ state[f"{name}.weight"].T + (0 if bias is None else bias)

    def heads(x, name):
        """Unit vectors times sqrt(K) and a gain for each head."""
        x = x.reshape(*x.shape[:2], H, K)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return x * K**0.5 * state[f"{name}.gamma"][:, 0]

    def attention(x, context, name, q_seg, k_seg):
        x = norm(x, f"{name}.norm")
        context = x if context is None else context
        k, v = jnp.split(dense(context, f"{name}.to_kv"), 2, -1)
        q, k = heads(dense(x, f"{name}.to_q"), f"{name}.q_norm"), heads(k, f"{name}.k_norm")
        tag = lambda seg: (seg, jnp.zeros_like(seg))
        # `attend` divides by sqrt(K), the model by nothing.
        o, _ = attend(q * K**0.5, k, v.reshape(*k.shape), tag(q_seg), tag(k_seg))
        return dense(o.reshape(*x.shape[:2], H * K), f"{name}.to_out.0")

    # The reference cuts patches channel by channel; ours hold (py, px, C).
    x_BxNxP = patches.x_BxNxP.reshape(*patches.x_BxNxP.shape[:2], p * p, P // (p * p))
    x_BxNxP = jnp.swapaxes(x_BxNxP, -1, -2).reshape(*patches.x_BxNxP.shape)
    embedding = "to_patch_embedding"
    tokens = norm(dense(norm(x_BxNxP, f"{embedding}.0"), f"{embedding}.1"), f"{embedding}.2")
    y, x = (jnp.asarray(patches.pos_BxNx3[..., axis] / p, jnp.int32) for axis in (1, 2))
    x_in = tokens + state["pos_embed_height"][y] + state["pos_embed_width"][x]

    h, seg_BxN = x_in, jnp.asarray(patches.seg_BxN)
    for i in range(config["depth"]):
        layer = f"transformer.layers.{i}"
        h = h + attention(h, None, f"{layer}.0", seg_BxN, seg_BxN)
        h = h + dense(jax.nn.gelu(dense(norm(h, f"{layer}.1.0"), f"{layer}.1.1"), approximate=False), f"{layer}.1.4")
    x_out = norm(h, "transformer.norm")

    B, I = patches.seg_BxG.shape  # an image is one group of patches
    q_seg_BxI = jnp.broadcast_to(jnp.arange(1, I + 1), (B, I))
    query_BxIxD = jnp.broadcast_to(state["attn_pool_queries"], (B, I, x_out.shape[-1]))
    pooled = attention(query_BxIxD, x_out, "attn_pool", q_seg_BxI, seg_BxN)
    logits = dense(norm(pooled + query_BxIxD, "mlp_head.0"), "mlp_head.1")
    return {"tokens": tokens, "x_in": x_in, "x_out": x_out, "pooled": pooled, "logits": logits}


def reference_images(io: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], list[list[int]]]:
    """The reference's images_3xYxX, and which of them lie in each row."""
    images = [io[f"img{i}"] for i in range(len(io["sizes"]))]
    ends = np.cumsum(io["pack_counts"])
    return images, [list(range(end - count, end)) for end, count in zip(ends, io["pack_counts"])]


def errors(golden_dir) -> dict[str, float]:
    """Largest errors relative to the reference's largest value; of masks and rows, how many entries differ.

    Padding is compared in neither: it sees the first image there and nothing here, and nobody sees it.
    """
    state, config, io = load(golden_dir, "navit/navit_packed")
    images, rows = reference_images(io)
    patches = pack_images([[images[i] for i in row] for row in rows], config["patch_size"])
    real_BxN, none = patches.seg_BxN != 0, np.zeros_like(patches.seg_BxN)
    mask_BxNxN = np.asarray(sees((patches.seg_BxN, none), (patches.seg_BxN, none)))
    run = jax.jit(lambda state, patches: forward(state, config, patches))
    out = run(state, patches)
    alone = np.asarray(run(state, pack_images([[image] for image in images], config["patch_size"]))["logits"][:, 0])
    packed = np.concatenate([np.asarray(out["logits"])[b, : len(row)] for b, row in enumerate(rows)])
    sizes = [int(np.prod(io["sizes"][i])) // config["patch_size"] ** 2 for i in range(len(images))]
    counts = [len(row) for row in group_greedily(sizes, int(io["autogroup_max_seq_len"]))]
    return {
        "navit mask": float((mask_BxNxN != io["attn_mask"][:, 0])[real_BxN].sum()),
        "navit rows": float(counts != io["autogroup_counts"].tolist()),
        "navit tokens": error(np.asarray(out["tokens"])[real_BxN], io["patch_tokens"][real_BxN]),
        "navit positions": error(np.asarray(out["x_in"])[real_BxN], io["x_in"][real_BxN]),
        "navit blocks": error(np.asarray(out["x_out"])[real_BxN], io["x_out"][real_BxN]),
        "navit pooled": error(out["pooled"], io["pooled"]),
        "navit packed": error(packed, io["logits_packed"]),
        "navit alone": error(alone, io["logits_alone"]),
        "navit packed against alone": error(packed, alone),
    }


if __name__ == "__main__":
    print(json.dumps(errors(sys.argv[1]), indent=1))
