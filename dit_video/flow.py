"""Levels, corruption and the loss (rectified flow; Liu et al. 2022, eq. 1; Lipman et al. 2022, sec. 4.1).

B rows, N patches per row, P values per patch, G groups per row, Q buckets of the level.
One path: z = (1 - s) x + s e, v = e - x; level s = 0 is data x, s = 1 is noise e.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.attention import spread
from dit_video.patches import Patches

BUCKETS = 8
# What is known of a clip in training, in T latent frames: the first; the first or last 1 ... T - 1; all but a gap;
# every second or third; the first ones, but lightly noised; all but a box in space and time, or what lies in one;
# and nothing, while each frame has a level of its own (diffusion forcing; Chen et al. 2024, alg. 1).
KINDS = ("first", "prefix", "suffix", "ends", "every", "light", "box", "forcing")


def named_key(key, name: str):
    """A stream of randomness of its own, by the bytes of its name: stable across Python runs and versions."""
    for byte in name.encode():
        key = jax.random.fold_in(key, byte)
    return key


def patch_noise(key, uid_BxN, values: int):
    """e_BxNxP ~ N(0, 1), patch by patch from fold_in(key, uid): the same whatever else is in the row."""
    draw = lambda uid: jax.random.normal(jax.random.fold_in(key, uid), (values,))
    return jax.vmap(jax.vmap(draw))(uid_BxN)


def shift_level(s, ratio):
    """Moves levels towards noise by `ratio` >= 1: r s / (1 + (r - 1) s) (Esser et al. 2024, eq. 23)."""
    return ratio * s / (1 + (ratio - 1) * s)


def sample_level(key, shape, distribution: str, mean: float, deviation: float):
    """s ~ the training distribution of levels.

    'uniform'; 'logit_normal', sigmoid(mean + deviation * n), mean > 0 is towards noise (Esser et al. 2024, eq. 19);
    'mode', 1 - u - deviation (cos^2(pi u / 2) - 1 + u), heavier in the middle for deviation > 0 (ibid., eq. 20).
    """
    if distribution == "logit_normal":
        return jax.nn.sigmoid(mean + deviation * jax.random.normal(key, shape))
    u = jax.random.uniform(key, shape)
    if distribution == "mode" and not -1 <= deviation <= 2 / (np.pi - 2):
        raise ValueError(f"flow.deviation={deviation} takes 'mode' out of [0, 1]. Choose from -1 to 1.75.")
    if distribution == "uniform":
        return u
    if distribution == "mode":
        return 1 - u - deviation * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)
    raise ValueError(f"flow.distribution={distribution!r} is not known. Allowed: 'uniform', 'logit_normal', 'mode'.")


def first_late_step(config) -> int:
    """The step of a run from which on the keys hold whose names begin with `late_`."""
    return config.steps - int(config.late * config.steps)


def draw_levels(key, patches: Patches, config, late=None):
    """Levels for training: patches with level_BxG (and groups) drawn, and the loss weight_BxG of each group.

    Each clip draws from fold_in(key, its name), so its levels do not depend on what it is packed with. Shares of the
    clips of more than one latent frame, `config.mixture`, train with a part known: clean, and of no weight; all else,
    and what is unknown of these, has one level per clip. KINDS says which part. shift_tokens: levels are shifted by
    sqrt(patches of the clip / shift_tokens); 0 = no shift. Groups must be latent frames (or clips: then nothing is
    known). A clip with a box needs two levels within a frame and no more than two in all, so that its patches move to
    its first group (known) and its second (not), of those that it has. Raises ValueError for shares that are none.
    A share of the videos, `config.causal_share`, is frame-causal instead: block_BxN says so, the first 0 ... T - 1
    latent frames are known, and each other has a level of its own, as in a roll-out frame by frame.
    late: whether `config.late_mixture`, where it is not below 0, holds instead, a bool that may be traced; None = it
    never does.
    """
    shares = {"mixture": [config.mixture[kind] for kind in KINDS]}
    if late is not None:
        both = zip([config.late_mixture[kind] for kind in KINDS], shares["mixture"], strict=True)
        shares["late_mixture"] = [share if late_share < 0 else late_share for late_share, share in both]
    for name, of in shares.items():
        if min(of) < 0 or sum(of) > 1 + 1e-6:
            raise ValueError(f"flow.{name}'s shares {of} sum to {sum(of):g}. Give shares from 0, that sum to 1.")
    # Of kinds without a share nothing is traced: what would be drawn for them costs nothing.
    drawn = [i for i in range(len(KINDS)) if any(of[i] for of in shares.values())]
    until_k = jnp.cumsum(jnp.array(shares["mixture"]))
    if late is not None:
        until_k = jnp.where(late, jnp.cumsum(jnp.array(shares["late_mixture"])), until_k)
    seg_BxG, frame_BxG = patches.seg_BxG, group_frames(patches)

    def draw(uid, frame):
        level_key, known_key = jax.random.split(jax.random.fold_in(key, uid))
        level_of = lambda key: sample_level(key, (), config.distribution, config.mean, config.deviation)
        more_j = jax.random.uniform(jax.random.fold_in(known_key, 1), (9,))
        return (
            level_of(level_key),
            level_of(jax.random.fold_in(level_key, frame)),
            jax.random.uniform(known_key),
            more_j,
        )

    level_BxG, own_BxG, coin_BxG, u_BxGxj = jax.vmap(jax.vmap(draw))(patches.clip_BxG, frame_BxG)
    same_BxGxG = (seg_BxG[:, :, None] == seg_BxG[:, None, :]) & (seg_BxG != 0)[:, None, :]
    count_BxG = same_BxGxG.sum(-1)  # latent frames of the clip
    kind_BxG = jnp.searchsorted(until_k, coin_BxG, side="right")
    kind_BxG = jnp.where(count_BxG > 1, kind_BxG, len(KINDS))
    if config.causal_share:
        coin_BxGx2 = _causal_coins(key, patches)
        causal_BxG = (coin_BxGx2[..., 0] < config.causal_share) & (count_BxG > 1)
        kind_BxG = jnp.where(causal_BxG, len(KINDS), kind_BxG)
        level_BxG = jnp.where(causal_BxG, own_BxG, level_BxG)
        causal_BxN = jnp.take_along_axis(causal_BxG, patches.group_BxN, 1) & (patches.seg_BxN != 0)
        patches = dataclasses.replace(patches, block_BxN=jnp.where(causal_BxN, patches.frame_BxN + 1, 0))
    if KINDS.index("forcing") in drawn:
        level_BxG = jnp.where(kind_BxG == KINDS.index("forcing"), own_BxG, level_BxG)
    if config.shift_tokens:
        same_BxGxN = seg_BxG[:, :, None] == patches.seg_BxN[:, None, :]
        level_BxG = shift_level(level_BxG, jnp.sqrt(same_BxGxN.sum(-1) / config.shift_tokens))
    if KINDS.index("box") in drawn:
        patches = _cut_boxes(patches, kind_BxG == KINDS.index("box"), jnp.argmax(same_BxGxG, -1), count_BxG, u_BxGxj)
    known_BxG = _known_frames(drawn, kind_BxG, frame_BxG, count_BxG, u_BxGxj) | (seg_BxG == 0)
    if config.causal_share:
        known_BxG |= causal_BxG & (frame_BxG < jnp.floor(coin_BxGx2[..., 1] * count_BxG))
    least_BxG = jnp.zeros_like(level_BxG)
    if KINDS.index("light") in drawn:
        least_BxG = jnp.where(kind_BxG == KINDS.index("light"), config.light * u_BxGxj[..., 8], 0)
    level_BxG = jnp.where(known_BxG, least_BxG, level_BxG)
    # A level of 0.1 alone would weigh 100 times one of 1 in the gradient of x, and hide what is learnt there.
    floor = max(config.weight_floor, 1e-6)
    weight_BxG = jnp.square(jnp.minimum(level_BxG / floor, 1.0)) if config.weight_floor else jnp.ones_like(level_BxG)
    return dataclasses.replace(patches, level_BxG=level_BxG), jnp.where(known_BxG, 0.0, weight_BxG)


def _causal_coins(key, patches: Patches):
    """Two draws of each group's clip, by its name: whether it is causal, and how much of it is known."""
    key = named_key(key, "causal")
    return jax.vmap(jax.vmap(lambda uid: jax.random.uniform(jax.random.fold_in(key, uid), (2,))))(patches.clip_BxG)


def _known_frames(drawn, kind_BxG, frame_BxG, count_BxG, u_BxGxj):
    """known_BxG: which groups each clip's kind, of those `drawn`, leaves known; at least one frame never is."""
    f, T, (u, v, w) = frame_BxG, count_BxG, jnp.moveaxis(u_BxGxj[..., :3], -1, 0)
    whole = lambda share, most: jnp.minimum((share * most).astype(jnp.int32), most - 1)  # 0 ... most - 1
    k = 1 + whole(u, T - 1)
    gap = 1 + whole(v, jnp.maximum(T - 2, 1))
    start = 1 + whole(w, jnp.maximum(T - 1 - gap, 1))
    known = {
        "first": f == 0,
        "prefix": f < k,
        "suffix": f >= T - k,
        "ends": (f < start) | (f >= start + gap),
        "every": f % (2 + whole(u, 2)) == 0,
        "light": f < k,
        "box": f == 0,  # its first group, where its known patches are
        "forcing": jnp.zeros(f.shape, bool),
    }
    found_BxG = jnp.zeros(f.shape, bool)
    for i in drawn:
        found_BxG |= known[KINDS[i]] & (kind_BxG == i)
    return found_BxG


def _cut_boxes(patches: Patches, box_BxG, first_BxG, count_BxG, u_BxGxj):
    """The patches with those of each clip of box_BxG in two groups, its first (known) and its second (not).

    Not known are those whose centres lie in a box in y, x and (in half of the clips) in frames, or, in three of ten,
    those out of it, in all frames. first_BxG: the clip's first group.
    """
    mine_BxGxNx1 = _members(patches)[..., None]
    yx_BxNx2 = patches.pos_BxNx3[..., 1:]
    most_BxGx2 = jnp.where(mine_BxGxNx1, yx_BxNx2[:, None], -jnp.inf).max(2)
    least_BxGx2 = jnp.where(mine_BxGxNx1, yx_BxNx2[:, None], jnp.inf).min(2)
    size_BxGx2 = jnp.where(jnp.isfinite(most_BxGx2), most_BxGx2 + least_BxGx2, 1)  # centres: half a patch on each side
    side_BxGx2 = 0.3 + 0.5 * u_BxGxj[..., 0:2]
    low_BxGx2 = (1 - side_BxGx2) * u_BxGxj[..., 2:4]
    always_BxG, out_BxG = u_BxGxj[..., 4] < 0.5, u_BxGxj[..., 5] < 0.3
    begin_BxG = jnp.floor(u_BxGxj[..., 6] * count_BxG)
    end_BxG = begin_BxG + 1 + jnp.floor(u_BxGxj[..., 7] * (count_BxG - begin_BxG))
    begin_BxG, end_BxG = jnp.where(always_BxG, 0, begin_BxG), jnp.where(always_BxG, count_BxG, end_BxG)

    of = lambda value_BxG: jnp.take_along_axis(value_BxG, patches.group_BxN, 1)
    of2 = lambda value_BxGx2: jnp.take_along_axis(value_BxGx2, patches.group_BxN[..., None], 1)
    share_BxNx2 = yx_BxNx2 / of2(size_BxGx2)
    inside_BxN = ((share_BxNx2 >= of2(low_BxGx2)) & (share_BxNx2 < of2(low_BxGx2 + side_BxGx2))).all(-1)
    during_BxN = (patches.frame_BxN >= of(begin_BxG)) & (patches.frame_BxN < of(end_BxG))
    unknown_BxN = jnp.where(of(out_BxG), ~inside_BxN, inside_BxN & during_BxN)
    cut_BxN = of(box_BxG) & (patches.seg_BxN != 0)
    group_BxN = jnp.where(cut_BxN, of(first_BxG) + unknown_BxN, patches.group_BxN)
    return dataclasses.replace(patches, group_BxN=group_BxN.astype(jnp.int32))


def _members(patches: Patches):
    """mine_BxGxN: which patches each group holds."""
    mine_BxGxN = patches.group_BxN[:, None, :] == jnp.arange(patches.seg_BxG.shape[1])[None, :, None]
    return mine_BxGxN & (patches.seg_BxN[:, None, :] != 0)


def group_frames(patches: Patches):
    """frame_BxG: the first latent frame of each group."""
    return jnp.where(_members(patches), patches.frame_BxN[:, None, :], jnp.iinfo(jnp.int32).max).min(-1)


def per_patch(value_BxG, patches: Patches):
    """Each patch's share of a per-group value, value_BxN."""
    return spread(value_BxG[..., None], patches.group_BxN)[..., 0]


def corrupt(noise_BxNxP, clean_BxNxP, level_BxN):
    """The point at `level` on the straight path from data (0) to noise (1), and the velocity there.

    Returns z_BxNxP = (1 - s) x + s e and v_BxNxP = e - x, in the inputs' dtype.
    """
    s = level_BxN[..., None]
    z_BxNxP = (1 - s) * clean_BxNxP + s * noise_BxNxP
    return z_BxNxP, noise_BxNxP - clean_BxNxP


def loss_sums(velocity_BxNxP, target_BxNxP, weight_BxN, level_BxN):
    """Sums for a mean over tokens: of the weighted squared error, of the weights, and both by bucket of the level.

    The error is the mean over a patch's values. Where the weight is 0 nothing is read, NaN included.
    """
    real_BxN = weight_BxN > 0
    difference = jnp.where(real_BxN[..., None], velocity_BxNxP - target_BxNxP, 0).astype(jnp.float32)
    error_BxN = weight_BxN * jnp.square(difference).mean(-1)
    bucket_BxN = jnp.clip((level_BxN * BUCKETS).astype(jnp.int32), 0, BUCKETS - 1)
    one_hot_BxNxQ = jax.nn.one_hot(bucket_BxN, BUCKETS) * real_BxN[..., None]
    return {
        "loss": error_BxN.sum(),
        "weight": weight_BxN.sum(),
        "loss_Q": jnp.einsum("bnq,bn->q", one_hot_BxNxQ, error_BxN),
        "weight_Q": jnp.einsum("bnq,bn->q", one_hot_BxNxQ, weight_BxN),
    }
