"""The transformer: its cost, that packed clips do not see each other, and attention against plain numpy.

B rows, N patches and S text tokens per row, G groups per row, P values per patch, E text width, H heads, K head
width, n patches of one clip.
"""

import ast
import collections
import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dit_video
from configs import base, dit, shapes
from dit_video import patches as pt
from dit_video.attention import attend as attend_eagerly
from dit_video.attention import spread
from dit_video.model import DiT, macs, make_model

P, E, PATCH, STRIDE = 8, 10, (1, 2, 2), (8, 8)
DEFAULT = DiT(
    P, P, width=48, depth=2, heads=2, mlp_width=96, text_width=E, level_scale=1000.0,
    pos_scale=(4.0, 1 / 16, 1 / 16), pos_offset=(0.0, -0.5, -0.5), position="both", text_pool=True,
)  # fmt: skip
# Every knob turned the other way (as in Latte), so that packing is proven for them too.
OTHER = dataclasses.replace(
    DEFAULT, modulation="block", position="table", qk_norm="none", text="pooled", text_width=48,
    attention_pattern=("space", "time"), level_direction="data",
)  # fmt: skip
SHAPES = [(2, 3, 5), (1, 2, 3), (3, 2, 4), (1, 4, 8), (4, 2, 2), (2, 1, 1), (1, 1, 1)]  # of the clips, in patches
ROWS = [[0, 1, 2, 3], [4, 5, 6, 0]]


# Laying out


def piece(clip: int, text_width: int) -> pt.Piece:
    """Clip `clip`, of SHAPES[clip], its values and prompt drawn from its number; each frame is a group."""
    rng, (T, Y, X) = np.random.default_rng(clip), SHAPES[clip]
    latents = rng.normal(size=(T, 2 * Y, 2 * X, P // 4)).astype(np.float32)
    text = rng.normal(size=(1 + clip % 4, text_width)).astype(np.float32)
    return pt.lay_out(latents, np.arange(T) / 4, PATCH, STRIDE, text, clip)[0]


def lay(model, rows, length: int):
    """Patches, Cond and where each clip lies: [(clip, row, first patch, patches)]; levels hang on (clip, frame)."""
    pieces = [[piece(clip, model.text_width) for clip in row] for row in rows]
    batch, places = pt.pack(pieces, length, groups=6 + length // 16, text=6 + length // 16)
    level_BxG = np.zeros(batch.patches.seg_BxG.shape, np.float32)
    for b, row in enumerate(rows):
        level_BxG[b, : sum(SHAPES[c][0] for c in row)] = [
            s for c in row for s in np.random.default_rng(100 + c).uniform(size=SHAPES[c][0])
        ]
    patches = dataclasses.replace(batch.patches, level_BxG=level_BxG)
    at = [(clip, *place) for row, found in zip(rows, places) for clip, place in zip(row, found)]
    return patches, pt.Cond(batch.ids_BxSxK, batch.prompt_BxS), at


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, patches, cond):
    return model.apply({"params": params}, patches, cond)


def of_clips(out_BxNxP, places):
    """[(clip, its patches' values)] out of packed rows."""
    return [(clip, np.asarray(out_BxNxP)[b, n0 : n0 + n]) for clip, b, n0, n in places]


@functools.cache
def random_params(model):
    """Every parameter random, those that start at zero too: closed gates would hide what the layers do."""
    patches, cond, _ = lay(model, [[0]], 32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), patches, cond)["params"]
    rng = np.random.default_rng(0)

    def draw(name, w):
        if len(w.shape) > 1 and not name.endswith(("_bias", "_norm", "_gain", "_table")):
            return rng.normal(size=w.shape).astype(np.float32) / math.sqrt(w.shape[-2])
        return (name.endswith(("_norm", "_gain")) + 0.1 * rng.normal(size=w.shape)).astype(np.float32)

    return {name: draw(name, w) for name, w in shapes.items()}


# Cost


@pytest.mark.parametrize("modulation", ["block", "shared"])
@pytest.mark.parametrize("size", dit.SIZES)
def test_a_level_for_each_of_many_groups_stays_cheap(size, modulation):
    """32 groups in a row of 1024 patches: all modulation is at most 3% of a training step's matrix products.

    A step is three forward passes' worth; to it come, in the backward pass, the products with the groups' one-hot that
    sum each modulation's gradient over the group's patches.
    """
    depth, D, heads = dit.SIZES[size]
    model = DiT(16, 16, D, depth, heads, 4 * D, modulation=modulation, text="pooled", text_width=D, level_scale=1000.0)
    assert share_of_modulation(model, [128] * 8, 32) <= 0.03


@pytest.mark.parametrize("config", [base.get_config(), shapes.get_config()], ids=["base", "shapes"])
def test_a_level_for_each_of_many_groups_stays_cheap_in_our_own_rows(config):
    clips, texts = [config.data.max_tokens // 2] * (2 * config.data.length // config.data.max_tokens), [24] * 8
    assert share_of_modulation(make_model(config, 12 * 64), clips, config.data.groups, texts) <= 0.03


def share_of_modulation(model, clips, groups, texts=()):
    step = 3 * macs(model, clips, texts, groups)
    one_hot = sum(clips) * groups * model.width * (6 * model.depth + 2)
    return (step - 3 * macs(model, clips, texts, groups=0) + one_hot) / step


# Exactness of packing


@pytest.mark.parametrize("model", [DEFAULT, OTHER], ids=["default", "other"])
def test_packed_equals_alone(model):
    """A clip's output does not depend on what shares its row, on the row's length, nor on where the clip lies."""
    params = random_params(model)
    alone = dict(of_clips(forward(model, params, *(a := lay(model, [[c] for c in range(7)], 40))[:2]), a[2]))
    assert all(np.abs(out).max() > 0.1 for out in alone.values())
    for rows in (ROWS, [row[::-1] for row in ROWS[::-1]]):
        for span in (None, 33):
            patches, cond, places = lay(model, rows, 256)
            out = forward(dataclasses.replace(model, span=span), params, patches, cond)
            for clip, values in of_clips(out, places):
                np.testing.assert_allclose(values, alone[clip], rtol=0, atol=1e-5, err_msg=f"clip {clip}, span {span}")


@pytest.mark.parametrize(
    "model", [DEFAULT, OTHER, dataclasses.replace(DEFAULT, span=33)], ids=["default", "other", "span"]
)
def test_a_neighbour_changes_nothing(model):
    """Bit for bit within one layout: neither another clip of the row, 10,000 times larger, nor another prompt."""
    params, (patches, cond, places) = random_params(model), lay(model, ROWS, 256)
    before = of_clips(forward(model, params, patches, cond), places)
    seg, prompt = patches.seg_BxN == 2, cond.prompt_BxS == 2
    shouting = dataclasses.replace(patches, x_BxNxP=np.where(seg[..., None], 1e4 * patches.x_BxNxP, patches.x_BxNxP))
    reworded = dataclasses.replace(cond, text_BxSxE=np.where(prompt[..., None], 1 - cond.text_BxSxE, cond.text_BxSxE))
    for changed in ((shouting, cond), (patches, reworded)):
        after = of_clips(forward(model, params, *changed), places)
        same = [np.array_equal(a, b) for (_, a), (_, b) in zip(before, after)]
        assert same == [clip not in (ROWS[0][1], ROWS[1][1]) for clip, *_ in places]


@pytest.mark.parametrize(
    "model", [DEFAULT, OTHER, dataclasses.replace(DEFAULT, span=33)], ids=["default", "other", "span"]
)
def test_nan_in_padding_changes_nothing(model):
    params, (patches, cond, places) = random_params(model), lay(model, ROWS, 256)
    after = forward(model, params, *poisoned(patches, cond))
    for (_, a), (_, b) in zip(of_clips(forward(model, params, patches, cond), places), of_clips(after, places)):
        np.testing.assert_array_equal(a, b)


def test_beyond_the_largest_canvas_a_model_sees_none():
    """Of a larger canvas it is told what it is of the largest; of what lies within that, as it is."""
    patches, cond, _ = lay(DEFAULT, [[0]], 64)
    params = random_params(DEFAULT)

    def at(side, **knobs):
        """The same patches in the middle of a canvas of this side."""
        old_BxGx3, new_BxGx3 = patches.canvas_BxGx3, patches.canvas_BxGx3 * [1, 0, 0] + [0, side, side]
        moved_BxNx3 = (new_BxGx3 - old_BxGx3)[:, :1] / 2 * [0, 1, 1]
        moved = dataclasses.replace(
            patches,
            canvas_BxGx3=new_BxGx3.astype(np.float32),
            pos_BxNx3=(patches.pos_BxNx3 + moved_BxNx3).astype(np.float32),
        )
        return forward(dataclasses.replace(DEFAULT, **knobs), params, moved, cond)

    np.testing.assert_allclose(at(160, canvas_most=128.0), at(128, canvas_most=128.0), atol=2e-5)
    np.testing.assert_array_equal(at(96, canvas_most=128.0), at(96))
    assert np.abs(at(160) - at(128)).max() > 1e-2


def poisoned(patches, cond):
    """The same with NaN wherever there is no patch and no text token."""
    x = np.where((patches.seg_BxN == 0)[..., None], np.nan, patches.x_BxNxP)
    text = np.where((cond.prompt_BxS == 0)[..., None], np.nan, cond.text_BxSxE)
    return dataclasses.replace(patches, x_BxNxP=x), dataclasses.replace(cond, text_BxSxE=text)


@pytest.mark.parametrize("attended", ["space", "time"])
def test_a_layer_attends_within_its_frame_or_its_place(attended):
    """Clip 2 is 3 frames of 2 x 4 patches of one pixel; a change in one reaches its frame, or its place, alone."""
    model = dataclasses.replace(OTHER, attention_pattern=(attended,))
    patches, cond, places = lay(model, [[6, 2]], 40)
    patches = dataclasses.replace(patches, pos_BxNx3=patches.pos_BxNx3 / np.array([1, 16, 16], np.float32))
    (_, before), (_, _, n0, n) = of_clips(forward(model, random_params(model), patches, cond), places)[1], places[1]
    changed, (t, y, x) = patches.x_BxNxP.copy(), np.unravel_index(np.arange(n), SHAPES[2])
    changed[0, n0 + 13] += 1  # frame 1, row 1, column 1
    patches = dataclasses.replace(patches, x_BxNxP=changed)
    after = of_clips(forward(model, random_params(model), patches, cond), places)[1][1]
    reached = t == 1 if attended == "space" else (y == 1) & (x == 1)
    np.testing.assert_array_equal((before != after).any(-1), reached)


# Gradients, rematerialisation, precision


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(model, params, patches, cond):
    def loss(params):
        out_BxNxP = model.apply({"params": params}, patches, cond)
        return jnp.where(patches.seg_BxN[..., None] != 0, jnp.square(out_BxNxP - 1), 0).mean()

    return jax.value_and_grad(loss)(params)


def test_gradients_are_finite_where_there_is_nothing_to_see():
    """NaN in padding, a row of nothing but padding, and a clip without a prompt."""
    patches, cond, _ = lay(DEFAULT, [[2], [1], []], 40)
    cond = dataclasses.replace(cond, prompt_BxS=np.where(np.arange(3)[:, None] == 1, 0, cond.prompt_BxS))
    loss, gradient = loss_and_gradient(DEFAULT, random_params(DEFAULT), *poisoned(patches, cond))
    assert np.isfinite(loss)
    for name, g in gradient.items():
        assert np.isfinite(g).all() and np.abs(g).max() > 0, name


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots", "unroll": 2}], ids=["full", "dots"])
def test_remat_and_unroll_change_no_value(change):
    patches, cond, _ = lay(DEFAULT, [[2], [1], []], 40)
    loss, gradient = loss_and_gradient(DEFAULT, random_params(DEFAULT), patches, cond)
    again, g = loss_and_gradient(dataclasses.replace(DEFAULT, **change), random_params(DEFAULT), patches, cond)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    largest = max(np.abs(w).max() for w in gradient.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest), g, gradient)


def test_bfloat16_is_near_float32():
    """Within what its 8 bits allow; parameters stay float32. The second cross-attention is open here too."""
    model = dataclasses.replace(DEFAULT, image_width=12)
    patches, cond, places = lay(model, [[0], [1], [2]], 40)
    image = np.random.default_rng(5).normal(size=(3, 2, 12)).astype(np.float32)
    cond = dataclasses.replace(cond, image_BxIxE=image, image_prompt_BxI=np.ones((3, 2), np.int32))
    params = {**random_params(DEFAULT)}
    rng = np.random.default_rng(6)
    shapes = jax.eval_shape(model.init, jax.random.key(0), patches, cond)["params"]
    params |= {k: rng.normal(0, 0.2, w.shape).astype(np.float32) for k, w in shapes.items() if k not in params}
    full = forward(model, params, patches, cond)
    half = forward(dataclasses.replace(model, dtype=jnp.bfloat16), params, patches, cond)
    assert half.dtype == jnp.bfloat16
    for (_, a), (_, b) in zip(of_clips(full, places), of_clips(half, places)):
        assert 0 < np.abs(a - b.astype(np.float32)).max() < 0.05 * np.abs(a).max()


# Attention


attend = jax.jit(attend_eagerly, static_argnames=("window", "span"))


def random_qkv(rng, B, N, M, H=2, K=4):
    return [rng.normal(size=(B, n, H, K)).astype(np.float32) for n in (N, M, M)]


def plain_attention(q, k, v, q_tag, k_tag, window):
    """The definition, one query at a time, in float64."""
    B, N, H, K = q.shape
    o, lse = np.zeros((B, N, H, v.shape[-1])), np.full((B, N, H), -np.inf)
    for b in range(B):
        for n in range(N):
            (seg, block), keys = (q_tag[0][b, n], q_tag[1][b, n]), []
            for m in range(k.shape[1]):
                key_seg, key_block = k_tag[0][b, m], k_tag[1][b, m]
                near = key_block <= block and (window is None or key_block > block - window)
                if key_seg == seg and key_seg != 0 and near:
                    keys.append(m)
            for h in range(H if keys else 0):
                logits = k[b, keys, h].astype(np.float64) @ q[b, n, h].astype(np.float64) / np.sqrt(K)
                lse[b, n, h] = np.log(np.exp(logits).sum())
                o[b, n, h] = np.exp(logits - lse[b, n, h]) @ v[b, keys, h].astype(np.float64)
    return o, lse


@pytest.mark.parametrize("window", [None, 1, 2])
def test_attend_is_softmax_over_the_keys_seen(window):
    """Random segments and blocks: bidirectional within a block, causal over blocks, windowed."""
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(rng, 2, 17, 23)
    q_tag, k_tag = ([rng.integers(0, 4, (2, n)) for _ in range(2)] for n in (17, 23))
    o, lse = attend(q, k, v, q_tag, k_tag, window)
    expected_o, expected_lse = plain_attention(q, k, v, q_tag, k_tag, window)
    np.testing.assert_allclose(o, expected_o, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


def test_a_query_without_keys_gives_zero():
    q, k, v = random_qkv(np.random.default_rng(0), 1, 3, 4)
    tag = lambda *seg: (np.array([seg]), np.zeros((1, len(seg)), int))
    o, lse = attend(q, k, v, tag(1, 0, 2), tag(1, 1, 0, 0))
    assert (o[0, 0] != 0).all() and np.isfinite(lse[0, 0]).all()
    assert (o[0, 1:] == 0).all() and (lse[0, 1:] == -np.inf).all()


def test_lse_merges_two_halves_of_the_keys():
    rng = np.random.default_rng(1)
    q, k, v = random_qkv(rng, 2, 9, 12)
    q_tag, k_tag = ((rng.integers(0, 4, (2, n)), np.zeros((2, n), int)) for n in (9, 12))
    whole, whole_lse = attend(q, k, v, q_tag, k_tag)
    halves = [slice(0, 5), slice(5, 12)]
    o, lse = zip(*(attend(q, k[:, h], v[:, h], q_tag, [t[:, h] for t in k_tag]) for h in halves))
    merged_lse = np.logaddexp(*lse)
    share = [np.where(np.isfinite(part), np.exp(part - merged_lse), 0)[..., None] for part in lse]
    np.testing.assert_allclose(merged_lse, whole_lse, atol=2e-6)
    np.testing.assert_allclose(share[0] * o[0] + share[1] * o[1], whole, atol=2e-6)


@pytest.mark.parametrize("window", [None, 1])
def test_banded_attention_equals_dense(window):
    """With its gradients; and no array of N x N pairs is computed on the way."""
    rng, N, span = np.random.default_rng(2), 256, 40
    q, k, v = random_qkv(rng, 2, N, N)
    lengths = rng.integers(1, span + 1, (2, 30))
    seg = np.stack([np.repeat(np.arange(1, 31), row)[:N] for row in lengths])
    seg = np.where(rng.uniform(size=seg.shape) < 0.05, 0, seg)  # padding, also amid segments
    tag = seg, rng.integers(0, 3, seg.shape)
    weight = [rng.normal(size=s).astype(np.float32) for s in (q.shape, q.shape[:3])]

    def run(span):
        def loss(qkv):
            o, lse = attend(*qkv, tag, tag, window, span)
            return jnp.sum(weight[0] * o) + jnp.sum(weight[1] * jnp.where(jnp.isfinite(lse), lse, 0)), (o, lse)

        return jax.value_and_grad(loss, has_aux=True)

    ((_, dense), dense_grad), ((_, banded), banded_grad) = (jax.jit(run(s))([q, k, v]) for s in (None, span))
    for a, b in zip([*dense, *dense_grad], [*banded, *banded_grad]):
        np.testing.assert_allclose(b, a, atol=1e-5)
    pairs = f"{N},{N}]"
    assert pairs in str(jax.make_jaxpr(run(None))([q, k, v])) and pairs not in str(jax.make_jaxpr(run(span))([q, k, v]))


def test_spread_and_its_gradient_are_those_of_take():
    rng = np.random.default_rng(3)
    table, group = rng.normal(size=(2, 5, 3)).astype(np.float32), rng.integers(0, 5, (2, 17))
    weight = rng.normal(size=(2, 17, 3)).astype(np.float32)
    take = lambda table: jnp.stack([row[g] for row, g in zip(table, group)])
    np.testing.assert_array_equal(spread(table, group), take(table))
    gradient = jax.grad(lambda t: jnp.sum(weight * spread(t, group)))(table)
    np.testing.assert_allclose(gradient, jax.grad(lambda t: jnp.sum(weight * take(t)))(table), atol=1e-6)


# One house


def attends_and_modulates(tree: ast.AST) -> tuple[set[str], bool]:
    """The functions that call attention of any make, and whether something is multiplied by (1 + a variable)."""
    made = ("attend", "attention", "softmax")
    attending, modulates = set(), False
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            calls = [c.func for c in ast.walk(node) if isinstance(c, ast.Call)]
            names = [getattr(f, "attr", getattr(f, "id", "")).lower() for f in calls]
            attending |= {node.name for name in names if name.endswith(made)}
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for term in (node.left, node.right):
                if isinstance(term, ast.BinOp) and isinstance(term.op, ast.Add):
                    kinds = {type(t) for t in (term.left, term.right)}
                    modulates |= ast.Constant in kinds and bool(kinds & {ast.Name, ast.Subscript})
    return attending, modulates


def test_there_is_one_diffusion_block():
    """Only the model's module both attends and modulates, x * (1 + scale), and it attends in one function."""
    found = collections.defaultdict(set)
    for path in Path(dit_video.__file__).parent.rglob("*.py"):
        source = path.read_text()
        if "jax.numpy" not in source:
            continue  # it counts, it does not compute
        attending, modulates = attends_and_modulates(ast.parse(source))
        if attending and modulates:
            found[path.name] = attending
    assert dict(found) == {"model.py": {"block"}}
