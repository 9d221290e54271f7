"""NaViT on our rows: its mask from our packing, its forward pass through our attention, and its grouping.

B rows, N patches per row, I images of one row, D width, H heads, K head width.
"""

import functools
import math

import jax
import numpy as np
import pytest

from dit_video.attention import sees
from experiments.parity import navit
from experiments.parity.arrays import error, load

CONFIG = {"patch_size": 2, "num_classes": 5, "dim": 12, "depth": 2, "heads": 2, "mlp_dim": 16, "dim_head": 4}
SIZES = [(4, 6), (2, 8), (8, 2), (2, 2), (6, 6)]  # pixels
ROWS = [[0, 1, 3], [2, 4]]


@functools.cache
def tiny():
    """Random weights under the published names, and five images, so faint that the first norm's epsilon counts."""
    D, inner, P, rng = CONFIG["dim"], CONFIG["heads"] * CONFIG["dim_head"], 12, np.random.default_rng(0)
    shapes = {"pos_embed_height": (4, D), "pos_embed_width": (4, D), "attn_pool_queries": (D,)}
    norms = {"to_patch_embedding.0": P, "to_patch_embedding.2": D, "transformer.norm": D, "mlp_head.0": D}
    shapes |= {"to_patch_embedding.1.weight": (D, P), "to_patch_embedding.1.bias": (D,), "mlp_head.1.weight": (5, D)}
    for name in ("attn_pool", *(f"transformer.layers.{i}.0" for i in range(2))):
        norms[f"{name}.norm"] = D
        shapes |= {f"{name}.{x}_norm.gamma": (CONFIG["heads"], 1, CONFIG["dim_head"]) for x in "qk"}
        shapes |= {f"{name}.to_q.weight": (inner, D), f"{name}.to_kv.weight": (2 * inner, D)}
        shapes |= {f"{name}.to_out.0.weight": (D, inner)}
    for mlp in (f"transformer.layers.{i}.1" for i in range(2)):
        norms[f"{mlp}.0"] = D
        shapes |= {
            f"{mlp}.1.weight": (16, D),
            f"{mlp}.1.bias": (16,),
            f"{mlp}.4.weight": (D, 16),
            f"{mlp}.4.bias": (D,),
        }
    shapes |= {f"{name}.{x}": (n,) for name, n in norms.items() for x in ("gamma", "beta")}
    scale = lambda name, shape: shape[-1] ** -0.5 if name.endswith("weight") else 1.0
    draw = lambda name, shape: rng.normal(size=shape) * scale(name, shape) + ("gamma" in name)
    state = {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}
    return state, [(0.02 * rng.normal(size=(3, *size))).astype(np.float32) for size in SIZES]


def rebuild(state, config, image_3xYxX, eps=1e-5, scale=1.0, per_head=True):
    """logits_C of one image alone, in float64 (Dehghani et al. 2023, sec. 2.2 and 3; Dosovitskiy et al. 2021)."""
    w = {name: np.asarray(array, np.float64) for name, array in state.items()}
    H, K, p = config["heads"], config["dim_head"], config["patch_size"]
    gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    dense = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[f"{name}.gamma"] + w[f"{name}.beta"]

    def attention(x, context, name):
        q, kv = dense(x, f"{name}.to_q"), dense(context, f"{name}.to_kv")
        k, v = kv[:, : H * K], kv[:, H * K :]
        out = []
        for head in range(H):
            mine = slice(head * K, (head + 1) * K)
            unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True) * math.sqrt(K)
            q_gain, k_gain = (w[f"{name}.{x}_norm.gamma"][head if per_head else 0, 0] for x in "qk")
            logits = scale * (unit(q[:, mine]) * q_gain) @ (unit(k[:, mine]) * k_gain).T
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out.append(weights / weights.sum(-1, keepdims=True) @ v[:, mine])
        return dense(np.concatenate(out, -1), f"{name}.to_out.0")

    _, Y, X = (n // p for n in image_3xYxX.shape)
    places = [(y, x) for y in range(Y) for x in range(X)]
    patches = np.stack([image_3xYxX[:, y * p : y * p + p, x * p : x * p + p].reshape(-1) for y, x in places])
    h = norm(dense(norm(patches, "to_patch_embedding.0"), "to_patch_embedding.1"), "to_patch_embedding.2")
    h = h + np.stack([w["pos_embed_height"][y] + w["pos_embed_width"][x] for y, x in places])
    for i in range(config["depth"]):
        layer = f"transformer.layers.{i}"
        x = norm(h, f"{layer}.0.norm")
        h = h + attention(x, x, f"{layer}.0")
        h = h + dense(gelu(dense(norm(h, f"{layer}.1.0"), f"{layer}.1.1")), f"{layer}.1.4")
    query = w["attn_pool_queries"][None]
    pooled = query + attention(norm(query, "attn_pool.norm"), norm(h, "transformer.norm"), "attn_pool")
    return dense(norm(pooled, "mlp_head.0"), "mlp_head.1")[0]


@functools.cache
def packed():
    """The five images' logits, packed two or three to a row."""
    state, images = tiny()
    patches = navit.pack_images([[images[i] for i in row] for row in ROWS], CONFIG["patch_size"])
    logits = np.asarray(jax.jit(lambda state, p: navit.forward(state, CONFIG, p))(state, patches)["logits"])
    return {i: logits[b, j] for b, row in enumerate(ROWS) for j, i in enumerate(row)}


def errors(**wrong):
    state, images = tiny()
    return [error(packed()[i], rebuild(state, CONFIG, image, **wrong)) for i, image in enumerate(images)]


def test_packed_images_are_what_the_paper_says_of_each_alone():
    assert max(errors()) < 1e-5


@pytest.mark.parametrize("wrong", [{"eps": 1e-6}, {"scale": 0.5}, {"per_head": False}])
def test_a_wrong_detail_would_be_seen(wrong):
    """A scale on unit vectors, one gain for all heads, or the epsilon that our other models have."""
    assert max(errors(**wrong)) > 1e-4


def test_an_image_sees_itself_alone():
    """The mask of packed rows is blocks on the diagonal; nothing sees padding, which sees nothing."""
    _, images = tiny()
    patches = navit.pack_images([[images[i] for i in row] for row in ROWS], CONFIG["patch_size"])
    zero = np.zeros_like(patches.seg_BxN)
    found = np.asarray(sees((patches.seg_BxN, zero), (patches.seg_BxN, zero)))
    for b, row in enumerate(ROWS):
        expected, at = np.zeros(found.shape[1:], bool), 0
        for n in (np.prod(SIZES[i]) // 4 for i in row):
            expected[at : at + n, at : at + n] = True
            at += n
        np.testing.assert_array_equal(found[b], expected)


# Grouping


def rebuilt_rows(size_I, length):
    """The rule by running sums: a row ends before the first image with which it would hold more than `length`."""
    total_I, ends = np.cumsum(size_I), [0]
    while ends[-1] < len(size_I):
        before = total_I[ends[-1] - 1] if ends[-1] else 0
        ends.append(int(np.searchsorted(total_I, before + length, side="right")))
    return [list(range(a, b)) for a, b in zip(ends, ends[1:])]


def test_images_are_grouped_by_the_reference_rule():
    """On a thousand random sets of sizes, rows that are just full and images as long as a row among them."""
    rng, full = np.random.default_rng(0), 0
    for _ in range(1000):
        length = int(rng.integers(4, 65))
        size_I = rng.integers(1, rng.integers(2, length + 2), rng.integers(0, 40))
        rows = navit.group_greedily(size_I, length)
        assert rows == rebuilt_rows(size_I, length)
        assert [i for row in rows for i in row] == list(range(len(size_I)))
        full += sum(size_I[row].sum() == length for row in rows)
    assert full > 500


def test_an_image_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="image 1 has 9 patches, and a row holds 8"):
        navit.group_greedily([8, 9], 8)


# Against the reference's arrays


def test_navit_gives_what_its_reference_gave(golden):
    """Masks and rows exactly; tokens, blocks, pooling and logits, packed and alone, to 1e-5 of their largest."""
    found = navit.errors(golden)
    assert len(found) == 9 and max(found.values()) < 1e-5, found
    assert found["navit mask"] == found["navit rows"] == 0


def test_the_mask_is_the_reference_one_to_the_last_entry(golden):
    """Padding included: there the reference lets queries see the row's first image, whose number padding has."""
    _, config, io = load(golden, "navit/navit_packed")
    images, rows = navit.reference_images(io)
    seg_BxN = navit.pack_images([[images[i] for i in row] for row in rows], config["patch_size"]).seg_BxN
    zero = np.zeros_like(seg_BxN)
    found = sees((np.maximum(seg_BxN, 1), zero), (seg_BxN, zero))
    np.testing.assert_array_equal(found, io["attn_mask"][:, 0])
    pool = sees((np.arange(1, 4)[None], np.zeros((1, 3), int)), (seg_BxN, zero))
    np.testing.assert_array_equal(pool, io["pool_mask"][:, 0])


def test_the_rebuild_gives_what_the_reference_gave(golden):
    """So that it can stand for it where its arrays are not."""
    state, config, io = load(golden, "navit/navit_packed")
    logits = np.stack([rebuild(state, config, image) for image in navit.reference_images(io)[0]])
    assert error(logits, io["logits_alone"]) < 2e-6
