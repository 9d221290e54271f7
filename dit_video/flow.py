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


def draw_levels(key, patches: Patches, config):
    """Levels for training: patches with level_BxG drawn, and the loss weight_BxG of each group.

    Each clip draws from fold_in(key, its name), so its levels do not depend on what it is packed with. A share
    `known_first` of the clips of more than one frame has its first frame clean and of no weight (an image to
    animate). shift_tokens: levels are shifted by sqrt(patches of the clip / shift_tokens); 0 = no shift.
    """
    seg_BxG, frame_BxG = patches.seg_BxG, group_frames(patches)

    def draw(uid):
        level_key, known_key = jax.random.split(jax.random.fold_in(key, uid))
        level = sample_level(level_key, (), config.distribution, config.mean, config.deviation)
        return level, jax.random.uniform(known_key)

    level_BxG, coin_BxG = jax.vmap(jax.vmap(draw))(patches.clip_BxG)
    if config.shift_tokens:
        same_BxGxN = seg_BxG[:, :, None] == patches.seg_BxN[:, None, :]
        level_BxG = shift_level(level_BxG, jnp.sqrt(same_BxGxN.sum(-1) / config.shift_tokens))
    several_BxG = ((seg_BxG[:, :, None] == seg_BxG[:, None, :]).sum(-1)) > 1
    known_BxG = several_BxG & (frame_BxG == 0) & (coin_BxG < config.known_first)
    level_BxG = jnp.where(known_BxG | (seg_BxG == 0), 0, level_BxG)
    # A level of 0.1 alone would weigh 100 times one of 1 in the gradient of x, and hide what is learnt there.
    floor = max(config.weight_floor, 1e-6)
    weight_BxG = jnp.square(jnp.minimum(level_BxG / floor, 1.0)) if config.weight_floor else jnp.ones_like(level_BxG)
    weight_BxG = jnp.where(known_BxG | (seg_BxG == 0), 0.0, weight_BxG)
    return dataclasses.replace(patches, level_BxG=level_BxG), weight_BxG


def group_frames(patches: Patches):
    """frame_BxG: the first latent frame of each group."""
    mine_BxGxN = patches.group_BxN[:, None, :] == jnp.arange(patches.seg_BxG.shape[1])[None, :, None]
    mine_BxGxN &= patches.seg_BxN[:, None, :] != 0
    return jnp.where(mine_BxGxN, patches.frame_BxN[:, None, :], jnp.iinfo(jnp.int32).max).min(-1)


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
