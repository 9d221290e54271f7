"""Solvers of dz/ds = v(z, s) along a schedule of levels, and guidance. Nothing here knows the model.

B rows, N patches per row, P values per patch, G groups per row, K = M + 1 levels of M steps.

A group whose level stays where it is does not move, bit for bit: conditioning needs no mask. A velocity_fn takes
Patches and gives v_BxNxP.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dit_video.attention import spread
from dit_video.flow import shift_level
from dit_video.patches import Patches


def uniform_levels(steps: int, shift: float = 1.0, start: float = 1.0) -> np.ndarray:
    """level_K from `start` down to 0 in equal steps, shifted towards noise by `shift` (Esser et al. 2024, eq. 23)."""
    _require_steps(steps, shift)
    return shift_level(np.linspace(start, 0, steps + 1), shift).astype(np.float32)


def flow_match_levels(steps: int, shift: float = 3.0) -> np.ndarray:
    """level_K of the published flow-matching Euler scheduler (Esser et al. 2024, sec. 5.3.2; diffusers' class).

    Its thousand training levels, 1/1000 to 1, are shifted when it is made. Sampling takes M equally spaced levels
    between the ends of those, shifts them once more, and ends at 0.
    """
    _require_steps(steps, shift)
    level_M = shift_level(np.linspace(1, shift_level(1e-3, shift), steps), shift)
    return np.append(level_M, 0).astype(np.float32)


def unipc_levels(steps: int, shift: float = 5.0) -> np.ndarray:
    """level_K of UniPC (Zhao et al. 2023) in its flow form, as published for Wan: diffusers' multistep class.

    M + 1 equally spaced levels from 1 to 1/1000, the last of which gives way to 0, shifted once. The first is
    1 - 1e-6, where the log of the signal is finite. The network is asked at whole timesteps, floor(1000 level).
    """
    _require_steps(steps, shift)
    level_M = shift_level(np.linspace(1, 1e-3, steps + 1)[:-1], shift)
    return np.append(np.minimum(level_M, 1 - 1e-6), 0).astype(np.float32)


def _require_steps(steps: int, shift: float) -> None:
    if steps < 1 or not shift > 0:
        raise ValueError(f"steps={steps} and shift={shift}: give at least 1 step and a shift above 0.")


def sample(velocity_fn: Callable, patches: Patches, level_KxBxG, solver: str = "euler") -> Patches:
    """The patches at the schedule's last levels, by 'euler', 'heun', 'heun_full' or 'ab2'; one scan.

    heun: Heun's second-order method, but Euler where the next level is 0 (Karras et al. 2022, alg. 1); heun_full
    corrects that step too. ab2: Adams-Bashforth of second order with variable steps, per group, Euler on a group's
    first move: one velocity per step.
    """
    level_KxBxG = jnp.asarray(level_KxBxG, jnp.float32)
    patches = replace(patches, level_BxG=level_KxBxG[0])
    zero_BxG = jnp.zeros_like(patches.level_BxG)

    def moved(patches, next_level_BxG, velocity_BxNxP):
        """One straight step of each group to its next level."""
        ds_BxNx1 = spread((next_level_BxG - patches.level_BxG)[..., None], patches.group_BxN)
        x_BxNxP = patches.x_BxNxP + (ds_BxNx1 * velocity_BxNxP).astype(patches.x_BxNxP.dtype)
        x_BxNxP = jnp.where((ds_BxNx1 == 0) | (patches.seg_BxN == 0)[..., None], patches.x_BxNxP, x_BxNxP)
        return replace(patches, x_BxNxP=x_BxNxP, level_BxG=next_level_BxG)

    def euler(carry, next_level_BxG):
        return (moved(carry[0], next_level_BxG, velocity_fn(carry[0])), *carry[1:]), None

    def heun(carry, next_level_BxG):
        patches = carry[0]
        v_BxNxP = velocity_fn(patches)
        ahead = moved(patches, next_level_BxG, v_BxNxP)
        correct_BxG = (next_level_BxG > 0) | (solver == "heun_full")
        both_BxNxP = (v_BxNxP + velocity_fn(ahead)) / 2
        correct_BxNx1 = spread(correct_BxG[..., None].astype(jnp.float32), patches.group_BxN) > 0
        return (moved(patches, next_level_BxG, jnp.where(correct_BxNx1, both_BxNxP, v_BxNxP)), *carry[1:]), None

    def ab2(carry, next_level_BxG):
        patches, last_v_BxNxP, last_ds_BxG = carry
        v_BxNxP = velocity_fn(patches)
        ds_BxG = next_level_BxG - patches.level_BxG
        # v + (ds / 2 last_ds) (v - last_v); a group that has not moved yet has last_ds = 0 and takes Euler.
        ratio_BxG = jnp.where(last_ds_BxG == 0, 0, ds_BxG / jnp.where(last_ds_BxG == 0, 1, 2 * last_ds_BxG))
        slope_BxNxP = spread(ratio_BxG[..., None], patches.group_BxN) * (v_BxNxP - last_v_BxNxP)
        return (moved(patches, next_level_BxG, v_BxNxP + slope_BxNxP), v_BxNxP, ds_BxG), None

    steps = {"euler": euler, "heun": heun, "heun_full": heun, "ab2": ab2}
    if solver not in steps:
        raise ValueError(f"solver={solver!r} is not known. Allowed: {', '.join(map(repr, steps))}.")
    return lax.scan(steps[solver], (patches, jnp.zeros_like(patches.x_BxNxP), zero_BxG), level_KxBxG[1:])[0][0]


def guided(velocity_fn: Callable, cond, uncond, scale_BxG, interval: tuple[float, float] = (0.0, 1.0)) -> Callable:
    """Classifier-free guidance, v = v_u + w (v_c - v_u) (Ho and Salimans 2022, eq. 6), per group.

    velocity_fn takes (patches, cond). Outside the interval of levels (lo, hi] the scale is 1 (Kynkaanniemi et al.
    2024). Both conditions run as one batch of 2B rows.
    """

    def velocity(patches: Patches):
        rows, conds = jax.tree.map(lambda *halves: jnp.concatenate(halves), (patches, cond), (patches, uncond))
        v_c, v_u = jnp.split(velocity_fn(rows, conds), 2)
        level_BxG = patches.level_BxG
        inside = (level_BxG > interval[0]) & (level_BxG <= interval[1])
        scale_BxNx1 = spread(jnp.where(inside, scale_BxG, 1.0)[..., None], patches.group_BxN)
        return v_u + scale_BxNx1 * (v_c - v_u)

    return velocity


def led(velocity_fn: Callable, course_BxNxP) -> Callable:
    """v, but of values whose own velocity is known, course_BxNxP (nan: not known), that: they go where it leads."""
    return lambda patches: jnp.where(jnp.isnan(course_BxNxP), velocity_fn(patches), course_BxNxP)


def recalled(velocity_fn: Callable, known_BxG, noise_BxNxP, scale_BxG) -> Callable:
    """Guidance by what is known, v = v_0 + w (v_k - v_0), per group (vanilla history guidance; Song et al. 2025).

    In v_0 the known groups are replaced by noise at level 1, so that the model sees nothing of them.
    """

    def velocity(patches: Patches):
        known_BxNx1 = spread(known_BxG[..., None].astype(jnp.float32), patches.group_BxN) > 0
        forgotten = replace(
            patches,
            x_BxNxP=jnp.where(known_BxNx1, noise_BxNxP, patches.x_BxNxP),
            level_BxG=jnp.where(known_BxG, 1.0, patches.level_BxG),
        )
        v_0 = velocity_fn(forgotten)
        return v_0 + spread(scale_BxG[..., None], patches.group_BxN) * (velocity_fn(patches) - v_0)

    return velocity
