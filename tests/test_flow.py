"""Levels, noise and the loss: their formulas, and that they hang on names alone, not on what shares a row.

B rows, N patches per row, P values per patch, G groups per row, S text tokens per row, Q buckets of the level.
"""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from dit_video import flow
from dit_video.model import to_velocity
from dit_video.patches import lay_out, pack
from dit_video.step import drop_prompts

SHAPES = [(3, 2, 4), (1, 2, 3), (4, 1, 2), (2, 4, 4), (1, 1, 1), (5, 2, 2)]  # of the clips, in patches
ROWS = [[0, 1, 2], [3, 4, 5], [], [], [], []]
ALONE = [[0], [1], [2], [3], [4], [5]]
P = 6
KEY = jax.random.key(7)


def draw_levels(key, patches, **changes):
    """Patches with levels, and weight_BxG, by the base config with changes."""
    settings = base.get_config().flow
    settings.update(changes)
    return jax.jit(lambda key, patches: flow.draw_levels(key, patches, settings))(key, patches)


def lay(rows):
    """A Batch of clips by number, and [(clip, row, segment)]."""
    pieces = [[piece(clip) for clip in row] for row in rows]
    places = [(clip, b, seg) for b, row in enumerate(rows) for seg, clip in enumerate(row, 1)]
    return pack(pieces, 64, 16, 16)[0], places


def piece(clip):
    rng, (T, Y, X) = np.random.default_rng(clip), SHAPES[clip]
    latents_TxYxXxP = rng.normal(size=(T, Y, X, P)).astype(np.float32)
    ids_sxK = rng.integers(1, 9, (1 + clip % 3, 2)).astype(np.int32)
    return lay_out(latents_TxYxXxP, np.arange(T) / 8, (1, 1, 1), (1, 1), ids_sxK, 1000 + 7 * clip)[0]


# The path


def test_the_path_is_straight_from_data_to_noise():
    noise, clean = np.random.default_rng(0).normal(size=(2, 2, 5, P)).astype(np.float32)
    at = lambda s: flow.corrupt(noise, clean, np.full((2, 5), s, np.float32))
    np.testing.assert_array_equal(at(0)[0], clean)
    np.testing.assert_array_equal(at(1)[0], noise)
    for low, high in ((0.0, 0.3), (0.3, 0.8), (0.8, 1.0)):
        (z, v), (z_on, _) = at(low), at(high)
        np.testing.assert_allclose(z_on, z + (high - low) * v, atol=1e-6)


def test_each_patch_has_its_own_level():
    noise, clean = np.random.default_rng(0).normal(size=(2, 1, 2, P)).astype(np.float32)
    z_BxNxP, _ = flow.corrupt(noise, clean, np.array([[0.0, 1.0]], np.float32))
    np.testing.assert_array_equal(z_BxNxP[0], [clean[0, 0], noise[0, 1]])


# Levels


@pytest.mark.parametrize(
    ("distribution", "mean", "deviation", "quantile", "average"),
    [
        ("uniform", 9.0, 9.0, lambda q: q, 0.5),
        # Of a sigmoid of a normal: the sigmoid of the normal's quantile; by symmetry 1/2 at the mean's middle.
        ("logit_normal", 0.6, 1.2, lambda q: 1 / (1 + np.exp(-0.6 - 1.2 * NormalDist().inv_cdf(q))), None),
        ("logit_normal", 0.0, 0.7, lambda q: 1 / (1 + np.exp(-0.7 * NormalDist().inv_cdf(q))), 0.5),
        # 1 - u - s (cos^2(pi u / 2) - 1 + u) falls in u, so its quantile is its value at u = 1 - q; its mean is 1/2.
        ("mode", 9.0, 1.29, lambda q: q - 1.29 * (np.cos(np.pi / 2 * (1 - q)) ** 2 - q), 0.5),
        ("mode", 9.0, -0.8, lambda q: q + 0.8 * (np.cos(np.pi / 2 * (1 - q)) ** 2 - q), 0.5),
    ],
)
def test_levels_follow_the_published_distributions(distribution, mean, deviation, quantile, average):
    level = np.asarray(flow.sample_level(KEY, (200_000,), distribution, mean, deviation))
    assert 0 <= level.min() and level.max() <= 1
    shares = np.array([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])
    np.testing.assert_allclose(np.quantile(level, shares), [quantile(q) for q in shares], atol=0.006)
    if average is not None:
        np.testing.assert_allclose(level.mean(), average, atol=0.003)


def test_distributions_that_are_none_are_refused():
    with pytest.raises(ValueError, match="flow.distribution='normal' .*'uniform', 'logit_normal', 'mode'"):
        flow.sample_level(KEY, (), "normal", 0.0, 1.0)
    with pytest.raises(ValueError, match=r"flow.deviation=2.0 takes 'mode' out of \[0, 1\].* -1 to 1.75"):
        flow.sample_level(KEY, (), "mode", 0.0, 2.0)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_a_shift_adds_the_logarithm_of_its_ratio_to_the_logit(ratio):
    logit = lambda s: np.log(s) - np.log1p(-s)
    s = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(logit(flow.shift_level(s, ratio)), logit(s) + np.log(ratio), atol=1e-12)
    assert flow.shift_level(0.0, ratio) == 0 and flow.shift_level(1.0, ratio) == 1


def test_clips_of_more_tokens_are_shifted_further():
    """By sqrt(patches / shift_tokens), so that at equal draws the level rises with the number of patches."""
    batch, places = lay(ROWS)
    plain, shifted = (
        np.asarray(draw_levels(KEY, batch.patches, mixture={"first": 0.0}, shift_tokens=tokens)[0].level_BxG)
        for tokens in (0.0, 4.0)
    )
    rise = {}
    for clip, b, seg in places:
        mine = batch.patches.seg_BxG[b] == seg
        s, r = plain[b, mine][0], shifted[b, mine][0]
        rise[np.prod(SHAPES[clip])] = np.log(r / (1 - r)) - np.log(s / (1 - s))
    for n, by in rise.items():
        np.testing.assert_allclose(by, 0.5 * np.log(n / 4), atol=1e-4)


@jax.jit
def draw(key, batch):
    """What training draws: patches with levels, weight_BxG, noise_BxNxP, drop_BxS."""
    patches, weight_BxG = draw_levels(key, batch.patches, mixture={"first": 0.5}, shift_tokens=8.0)
    return patches, weight_BxG, flow.patch_noise(key, patches.uid_BxN, P), drop_prompts(key, batch, 0.5)


def drawn(rows, key=KEY):
    """clip -> what is drawn for it: levels and weights of its groups, noise of its patches, drop of its text."""
    batch, places = lay(rows)
    patches, weight_BxG, noise_BxNxP, drop_BxS = jax.tree.map(np.asarray, draw(key, batch))
    found = {}
    for clip, b, seg in places:
        groups, at, tokens = patches.seg_BxG[b] == seg, patches.seg_BxN[b] == seg, batch.prompt_BxS[b] == seg
        found[clip] = [patches.level_BxG[b, groups], weight_BxG[b, groups], noise_BxNxP[b, at], drop_BxS[b, tokens]]
    return found


def test_what_a_clip_draws_hangs_on_its_name_alone():
    """Level, weight, noise and dropped text: packed equals alone, in any row and at any place in it."""
    alone = drawn(ALONE)
    for rows in (ROWS, [[], [2, 0], [], [], [4, 1, 5], [3]]):
        for clip, values in drawn(rows).items():
            for one, other in zip(values, alone[clip], strict=True):
                np.testing.assert_array_equal(one, other)
    assert {bool(values[3][0]) for values in alone.values()} == {True, False}
    assert all(len(set(values[3].tolist())) == 1 for values in alone.values())


def test_clips_patches_and_steps_draw_apart():
    """No two clips share a level, no two patches their noise, no two steps (keys) either; frames of a clip share it."""
    now, later = drawn(ROWS), drawn(ROWS, key=jax.random.fold_in(KEY, 1))
    levels, noise = [], []
    for values in (*now.values(), *later.values()):
        moving = values[0][values[1] > 0]
        assert len(set(moving.tolist())) == 1
        levels.append(float(moving[0]))
        noise.append(values[2])
    assert len(set(levels)) == 12
    noise_nxP = np.concatenate(noise)
    assert len(np.unique(noise_nxP)) > 0.999 * noise_nxP.size


def test_noise_is_standard_normal():
    noise_BxNxP = np.asarray(flow.patch_noise(KEY, np.arange(4000, dtype=np.uint32).reshape(2, -1), 24))
    shares = np.array([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
    expected = [NormalDist().inv_cdf(q) for q in shares]
    np.testing.assert_allclose(np.quantile(noise_BxNxP, shares), expected, atol=0.03)
    flat_nxP = noise_BxNxP.reshape(-1, 24)
    between = np.corrcoef(flat_nxP.T) - np.eye(24)
    assert np.abs(between).max() < 0.08 and abs(np.corrcoef(flat_nxP[:-1].ravel(), flat_nxP[1:].ravel())[0, 1]) < 0.02


def test_streams_are_told_apart_by_name():
    """Also by its letters' order; and a name's stream is pinned, as the resuming of runs hangs on it."""
    streams = ["noise", "levels", "text", "on", "no", "n", ""]
    draws = {name: float(jax.random.uniform(flow.named_key(KEY, name))) for name in streams}
    assert len(set(draws.values())) == len(streams)
    by_hand = jax.random.fold_in(jax.random.fold_in(KEY, 110), 111)
    assert draws["no"] == float(jax.random.uniform(by_hand))


def test_known_first_frames_are_clean_and_weigh_nothing():
    """Of clips of more than one frame; all other groups keep their level and their weight."""
    batch, places = lay(ROWS)
    known, weight_BxG = draw_levels(KEY, batch.patches, mixture={"first": 1.0})
    plain, ones_BxG = draw_levels(KEY, batch.patches, mixture={"first": 0.0})
    seg_BxG = batch.patches.seg_BxG
    first_BxG = np.zeros(seg_BxG.shape, bool)
    for clip, b, seg in places:
        if SHAPES[clip][0] > 1:
            first_BxG[b, np.flatnonzero(seg_BxG[b] == seg)[0]] = True
    assert first_BxG.sum() == 4
    np.testing.assert_array_equal(ones_BxG, seg_BxG != 0)
    np.testing.assert_array_equal(plain.level_BxG > 0, seg_BxG != 0)
    np.testing.assert_array_equal(weight_BxG, (seg_BxG != 0) & ~first_BxG)
    np.testing.assert_array_equal(known.level_BxG, np.where(first_BxG, 0, plain.level_BxG))


def test_known_first_frames_come_as_often_as_asked():
    """In 1000 clips of two frames; and not more often at one level than at another."""
    pieces = [
        lay_out(np.zeros((2, 1, 1, 1), np.float32), (0, 1), (1, 1, 1), (1, 1), np.ones((1, 1), np.int32), clip)[0]
        for clip in range(1000)
    ]
    rows = [pieces[i : i + 50] for i in range(0, 1000, 50)]
    patches, weight_BxG = draw_levels(KEY, pack(rows, 100, 100, 50)[0].patches, mixture={"first": 0.3})
    known = np.asarray(weight_BxG).reshape(-1, 2)[:, 0] == 0
    assert abs(known.mean() - 0.3) < 0.05
    assert abs(np.corrcoef(known, np.asarray(patches.level_BxG).reshape(-1, 2)[:, 1])[0, 1]) < 0.1


# What is known of a clip


MANY = 400  # clips of 5 latent frames of 4 x 6 patches, 20 to a row


@pytest.fixture(scope="module")
def many():
    """A Batch of MANY clips."""
    latents, ids_sxK = np.zeros((5, 4, 6, 1), np.float32), np.ones((1, 1), np.int32)
    pieces = [lay_out(latents, np.arange(5) / 2, (1, 1, 1), (8, 8), ids_sxK, uid)[0] for uid in range(MANY)]
    return pack([pieces[i : i + 20] for i in range(0, MANY, 20)], 2400, 100, 20)[0]


@pytest.fixture(scope="module")
def mixed(many):
    """Kind -> level and weight of each patch, n x T x Y x X, and group_BxN, where all clips are of it; '' = of none.

    'all' has the configs' own shares. One program for all.
    """

    @jax.jit
    def settle(patches):
        out = {}
        for kind in ("", *flow.KINDS, "all"):
            shares = (
                base.EVERY_TASK if kind == "all" else dict.fromkeys(flow.KINDS, 0.0) | ({kind: 1.0} if kind else {})
            )
            drawn, weight_BxG = flow.draw_levels(KEY, patches, mixture_config(shares))
            each = flow.per_patch(drawn.level_BxG, drawn), flow.per_patch(weight_BxG, drawn), drawn.group_BxN
            out[kind] = tuple(a.reshape(-1, 5, 4, 6) for a in each)
        return out

    return jax.tree.map(np.asarray, settle(many.patches))


def mixture_config(shares):
    settings = base.get_config().flow
    settings.mixture.update(shares)
    return settings


@pytest.mark.parametrize("late", [False, True])
def test_late_steps_draw_from_the_late_mixture(late):
    """The same levels, weights and groups as a run has whose only mixture it is."""
    both = mixture_config({"first": 0.5, "box": 0.3})
    both.late_mixture.update({"first": 0.0, "ends": 0.3, "light": 0.2, "forcing": 0.2})  # and boxes, as before
    ends = {"first": 0.0, "ends": 0.3, "light": 0.2, "forcing": 0.2}
    one = mixture_config({"box": 0.3} | (ends if late else {"first": 0.5}))
    drawn = jax.jit(lambda patches, late: flow.draw_levels(KEY, patches, both, late))(lay(ROWS)[0].patches, late)
    wanted = jax.jit(lambda patches: flow.draw_levels(KEY, patches, one))(lay(ROWS)[0].patches)
    jax.tree.map(np.testing.assert_array_equal, drawn, wanted)


FRAME_SETS = {  # of 5 latent frames, all the sets that may be known
    "first": [{0}],
    "prefix": [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}],
    "light": [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}],
    "suffix": [{4}, {3, 4}, {2, 3, 4}, {1, 2, 3, 4}],
    "ends": [{0, 1, 2, 4}, {0, 1, 3, 4}, {0, 2, 3, 4}, {0, 1, 4}, {0, 3, 4}, {0, 4}],
    "every": [{0, 2, 4}, {0, 3}],
    "forcing": [set()],
}


@pytest.mark.parametrize("kind", FRAME_SETS)
def test_known_frames_are_of_their_kind(mixed, kind):
    """All sets of frames that a kind names are drawn, and no other; whole frames; weight 0 where known, else 1."""
    level, weight, _ = mixed[kind]
    assert (level == level[:, :, :1, :1]).all() and (weight == weight[:, :, :1, :1]).all()
    level_nxT, weight_nxT = level[:, :, 0, 0], weight[:, :, 0, 0]
    found = {tuple(np.flatnonzero(row == 0)) for row in weight_nxT}
    assert found == {tuple(sorted(frames)) for frames in FRAME_SETS[kind]} and set(weight_nxT.ravel()) <= {0, 1}
    known = weight_nxT == 0
    if kind == "light":
        assert 0 < level_nxT[known].min() and 0.15 < level_nxT[known].max() < base.get_config().flow.light
    else:
        assert (level_nxT[known] == 0).all()
    plain = mixed[""][0][:, :, 0, 0]
    if kind == "forcing":
        assert len(np.unique(level_nxT)) > 0.99 * level_nxT.size
        np.testing.assert_allclose(
            np.quantile(level_nxT, [0.2, 0.5, 0.8]), np.quantile(plain, [0.2, 0.5, 0.8]), atol=0.05
        )
        assert abs(np.corrcoef(level_nxT[:, 0], level_nxT[:, 1])[0, 1]) < 0.15
    else:
        np.testing.assert_array_equal(level_nxT[~known], plain[~known])


def is_box(there_TxYxX):
    """Whether what is there fills the box that it spans, and there is something."""
    places_kx3 = np.argwhere(there_TxYxX)
    return len(places_kx3) > 0 and len(places_kx3) == np.prod(np.ptp(places_kx3, 0) + 1)


def test_boxes_are_boxes(mixed):
    """Unknown is a box in space and time, or, in three of ten, all but one; the rest is clean. Two groups to a clip."""
    level, weight, groups = mixed["box"]
    unknown, plain, out, whole, places = weight > 0, mixed[""][0], 0, 0, []
    np.testing.assert_array_equal(level, np.where(unknown, plain, 0))
    for clip in unknown:
        boxed = clip if is_box(clip) else ~clip
        assert is_box(boxed) and not boxed.all()
        t, y, x = np.nonzero(boxed)
        if boxed is clip:
            whole += set(t) == set(range(5))
        else:
            out += 1
            assert (clip == clip[:1]).all()
        places.append((y.min(), y.max(), x.min(), x.max()))
    assert 0.2 < out / MANY < 0.4 and 0.3 < whole / MANY < 0.8
    assert len(set(places)) > 40
    for i, mine in enumerate(groups):
        assert set(mine.ravel()) <= {5 * (i % 20), 5 * (i % 20) + 1}


def test_kinds_come_as_often_as_asked(mixed):
    """By what is known: of the configs' own shares, half of the clips have one level and nothing known."""
    shares = base.EVERY_TASK
    assert sum(shares.values()) <= 0.5 and set(shares) == set(flow.KINDS)
    level, weight, _ = mixed["all"]
    one = (level == level[:, :1, :1, :1]).all((1, 2, 3)) & (weight == 1).all((1, 2, 3))
    assert abs(one.mean() - (1 - sum(shares.values()))) < 0.08
    forced = (weight == 1).all((1, 2, 3)) & ~one
    boxed = (weight != weight[:, :, :1, :1]).any((1, 2, 3))
    assert abs(forced.mean() - shares["forcing"]) < 0.05 and abs(boxed.mean() - shares["box"]) < 0.05


def test_mixed_levels_hang_on_the_clips_name_alone():
    """Of each patch, for every kind at once: packed equals alone; clips of one latent frame have nothing known."""
    shares = dict.fromkeys(flow.KINDS, 1 / len(flow.KINDS))
    settle = jax.jit(lambda patches: flow.draw_levels(KEY, patches, mixture_config(shares)))

    def found(rows):
        batch, places = lay(rows)
        patches, weight_BxG = settle(batch.patches)
        level_BxN, weight_BxN = (np.asarray(flow.per_patch(v, patches)) for v in (patches.level_BxG, weight_BxG))
        at = lambda b, seg: batch.patches.seg_BxN[b] == seg
        return {clip: (level_BxN[b, at(b, seg)], weight_BxN[b, at(b, seg)]) for clip, b, seg in places}

    alone = found(ALONE)
    for rows in (ROWS, [[], [2, 0], [], [], [4, 1, 5], [3]]):
        for clip, values in found(rows).items():
            np.testing.assert_array_equal(values, alone[clip])
    assert all((alone[clip][1] == 1).all() for clip in (1, 4))
    assert any((alone[clip][1] == 0).any() for clip in (0, 2, 3, 5))


def test_shares_that_are_none_are_refused(many):
    for shares in ({"first": -0.1}, {"first": 0.6, "box": 0.5}):
        with pytest.raises(ValueError, match=r"flow.mixture's shares \[.*\] sum to (-0.1|1.1). Give shares from 0"):
            flow.draw_levels(KEY, many.patches, mixture_config(shares))


# The loss


def random_errors(seed=0):
    rng = np.random.default_rng(seed)
    velocity, target = rng.normal(size=(2, 3, 40, P)).astype(np.float32)
    weight_BxN = (rng.uniform(size=(3, 40)) < 0.7) * rng.uniform(0.5, 2, (3, 40)).astype(np.float32)
    level_BxN = rng.uniform(size=(3, 40)).astype(np.float32)
    level_BxN[0, :2] = 0, 1
    return velocity, target, weight_BxN, level_BxN


def test_sums_are_the_definition_and_buckets_add_up_to_them():
    velocity, target, weight_BxN, level_BxN = random_errors()
    sums = flow.loss_sums(velocity, target, weight_BxN, level_BxN)
    loss_Q, weight_Q = np.zeros((2, flow.BUCKETS))
    for b, n in np.ndindex(3, 40):
        q = min(int(level_BxN[b, n] * flow.BUCKETS), flow.BUCKETS - 1)
        loss_Q[q] += weight_BxN[b, n] * ((velocity[b, n] - target[b, n]) ** 2).mean()
        weight_Q[q] += weight_BxN[b, n]
    np.testing.assert_allclose(sums["loss_Q"], loss_Q, rtol=1e-5)
    np.testing.assert_allclose(sums["weight_Q"], weight_Q, rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], loss_Q.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["weight"], weight_Q.sum(), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_is_read_where_the_weight_is_zero(bad):
    """Neither in the sums nor in the gradient."""
    velocity, target, weight_BxN, level_BxN = random_errors()
    loss = lambda v, t: (sums := flow.loss_sums(v, t, weight_BxN, level_BxN))["loss"] + sums["loss_Q"].sum()
    off = (weight_BxN == 0)[..., None]
    loss_and_gradient = jax.jit(jax.value_and_grad(loss))
    expected, gradient = loss_and_gradient(velocity, target)
    found, again = loss_and_gradient(np.where(off, bad, velocity), np.where(off, bad, target))
    assert found == expected and np.isfinite(found)
    np.testing.assert_array_equal(again, gradient)
    np.testing.assert_array_equal(jnp.any(gradient != 0, -1), weight_BxN > 0)


@jax.jit
def sums_of(batch):
    """Training's sums with a network that answers patch by patch."""
    patches, weight_BxG, noise_BxNxP, _ = draw(KEY, batch)
    level_BxN = flow.per_patch(patches.level_BxG, patches)
    z_BxNxP, target_BxNxP = flow.corrupt(noise_BxNxP, patches.x_BxNxP, level_BxN)
    weight_BxN = jnp.where(patches.seg_BxN != 0, flow.per_patch(weight_BxG, patches), 0)
    return flow.loss_sums(jnp.tanh(z_BxNxP), target_BxNxP, weight_BxN, level_BxN)


def test_the_sums_of_packed_rows_are_those_of_the_clips_alone():
    alone = sums_of(lay(ALONE)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), sums_of(lay(ROWS)[0]), alone)
    assert alone["weight"] > 40


def test_exact_outputs_of_x_v_and_e_are_one_velocity():
    """Down to the least divisor s_min, on both ends of the path."""
    rng = np.random.default_rng(0)
    noise, clean = rng.normal(size=(2, 1, 50, P)).astype(np.float32)
    level_BxN = np.linspace(0.05, 0.95, 50, dtype=np.float32)[None]
    z, v = flow.corrupt(noise, clean, level_BxN)
    for predict, out in (("x", clean), ("v", v), ("e", noise)):
        np.testing.assert_allclose(to_velocity(out, z, level_BxN, predict), v, atol=2e-5)
    for predict, level in (("x", 0.0), ("e", 1.0)):
        assert np.isfinite(to_velocity(clean, noise, np.full((1, 50), level, np.float32), predict)).all()
    with pytest.raises(ValueError, match="model.predict='z' .*'x', 'v', 'e', 'ddpm'"):
        to_velocity(clean, z, level_BxN, "z")


@pytest.mark.parametrize(("predict", "divisor"), [("x", lambda s: s), ("e", lambda s: 1 - s)])
def test_the_loss_in_velocity_weighs_that_of_the_output_by_its_divisor(predict, divisor):
    """|v' - v|^2 = |x' - x|^2 / s^2, and |e' - e|^2 / (1 - s)^2."""
    rng = np.random.default_rng(1)
    noise, clean, wrong = rng.normal(size=(3, 1, 50, P)).astype(np.float32)
    level_BxN = np.linspace(0.05, 0.95, 50, dtype=np.float32)[None]
    z, v = flow.corrupt(noise, clean, level_BxN)
    truth = {"x": clean, "e": noise}[predict]
    ones = np.ones_like(level_BxN)
    in_velocity = flow.loss_sums(to_velocity(truth + wrong, z, level_BxN, predict), v, ones, level_BxN)["loss"]
    in_output = flow.loss_sums(truth + wrong, truth, 1 / divisor(level_BxN) ** 2, level_BxN)["loss"]
    np.testing.assert_allclose(in_velocity, in_output, rtol=1e-4)
