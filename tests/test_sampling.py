"""Solvers against an exact solution, groups that move each by a schedule of its own, and guidance.

B rows, N patches per row, P values per patch, G groups per row, K = M + 1 levels of M steps.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.attention import spread
from dit_video.patches import Patches
from dit_video.sampling import flow_match_levels, guided, led, recalled, sample, uniform_levels, unipc_levels
from experiments.parity import schedules

B, N, P, G = 2, 12, 3, 3
GROUP_BxN = np.array([[0] * 4 + [1] * 5 + [0] * 3, [2] * 2 + [0] * 4 + [1] * 6], np.int32)
SEG_BxN = np.array([[1] * 9 + [0] * 3, [2] * 2 + [1] * 10], np.int32)  # row 0 ends in padding
MEAN, DEVIATION = 0.7, 0.4


def noise_patches():
    int_BxN, int_BxG = np.zeros((B, N), np.int32), np.zeros((B, G), np.int32)
    x_BxNxP = np.random.default_rng(0).normal(size=(B, N, P)).astype(np.float32)
    return Patches(
        x_BxNxP, np.zeros((B, N, 3), np.float32), SEG_BxN, int_BxN, GROUP_BxN, int_BxN, int_BxN,
        np.zeros((B, G), np.float32), int_BxG, int_BxG,
    )  # fmt: skip


def gaussian_velocity(patches):
    """E[e - x | z] on the path z = (1 - s) x + s e, for data x ~ N(MEAN, DEVIATION^2) and noise e ~ N(0, 1)."""
    s = spread(patches.level_BxG[..., None], patches.group_BxN)
    variance = (1 - s) ** 2 * DEVIATION**2 + s**2
    return -MEAN + (s - (1 - s) * DEVIATION**2) / variance * (patches.x_BxNxP - (1 - s) * MEAN)


def exact(x_BxNxP, start: float):
    """Where dz/ds = E[e - x | z] leads from level `start` to 0: the flow keeps each value's quantile."""
    deviation = np.sqrt((1 - start) ** 2 * DEVIATION**2 + start**2)
    return MEAN + DEVIATION * (x_BxNxP - (1 - start) * MEAN) / deviation


def rough_levels(steps):
    """Steps that are in turn one and three parts long."""
    ends = np.cumsum([0, *([1, 3] * (steps // 2))])
    return (1 - ends / ends[-1]).astype(np.float32)


solve = jax.jit(sample, static_argnums=(0, 3))


def run(velocity_fn, levels_KxG, solver, patches=None):
    """The patches' values at the end of per-group levels, the same in all rows."""
    level_KxBxG = np.repeat(np.asarray(levels_KxG, np.float32)[:, None], B, 1)
    return np.asarray(solve(velocity_fn, noise_patches() if patches is None else patches, level_KxBxG, solver).x_BxNxP)


def together(level_K):
    return np.repeat(np.asarray(level_K)[:, None], G, 1)


# Order


@pytest.mark.parametrize("levels", [uniform_levels, rough_levels])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("heun_full", 2), ("ab2", 2)])
def test_solvers_have_their_order(solver, order, levels):
    """The slope of error against steps, from an exact solution, over three doublings."""
    truth = exact(noise_patches().x_BxNxP, 1.0)
    real, steps = SEG_BxN != 0, np.array([8, 16, 32, 64])
    error = [np.abs(run(gaussian_velocity, together(levels(m)), solver) - truth)[real].mean() for m in steps]
    slope = -np.polyfit(np.log(steps[1:]), np.log(error[1:]), 1)[0]
    assert abs(slope - order) < 0.25, error
    assert error[-1] < (0.02 if order == 1 else 2e-3)


def test_one_straight_step_is_exact_where_the_velocity_is_constant():
    data_BxNxP = np.random.default_rng(1).normal(size=(B, N, P)).astype(np.float32)
    constant = jnp.asarray(noise_patches().x_BxNxP - data_BxNxP)
    for solver in ("euler", "heun", "heun_full", "ab2"):
        for steps in (1, 5):
            found = run(lambda _: constant, together(uniform_levels(steps, 3.0)), solver)
            np.testing.assert_allclose(found[SEG_BxN != 0], data_BxNxP[SEG_BxN != 0], atol=1e-5)


def test_heun_ends_with_a_step_of_euler():
    """As the published algorithm does, where the next level is 0; heun_full corrects that step too."""
    level_K = np.array([1.0, 0.5, 0.0])
    found = {solver: run(gaussian_velocity, together(level_K), solver) for solver in ("heun", "heun_full")}
    x_BxNxP = noise_patches().x_BxNxP
    for solver, last in (("heun", 0), ("heun_full", 1)):
        at = lambda x, s: np.asarray(gaussian_velocity(dataclasses.replace(
            noise_patches(), x_BxNxP=x, level_BxG=np.full((B, G), s, np.float32))))  # fmt: skip
        v = at(x_BxNxP, 1.0)
        x = x_BxNxP - 0.5 * (v + at(x_BxNxP - 0.5 * v, 0.5)) / 2
        v = at(x, 0.5)
        x = x - 0.5 * (1 - last / 2) * v - 0.5 * last / 2 * at(x - 0.5 * v, 0.0)
        np.testing.assert_allclose(found[solver][SEG_BxN != 0], x[SEG_BxN != 0], atol=1e-5)
    assert np.abs(found["heun"] - found["heun_full"]).max() > 0.01


def test_a_start_below_noise_follows_the_same_path():
    """Levels from 0.6: what an edit of a given video starts from."""
    truth = exact(noise_patches().x_BxNxP, 0.6)
    found = run(gaussian_velocity, together(uniform_levels(64, start=0.6)), "ab2")
    np.testing.assert_allclose(found[SEG_BxN != 0], truth[SEG_BxN != 0], atol=5e-3)


def test_a_solver_that_is_none_is_refused():
    with pytest.raises(ValueError, match="solver='rk4' is not known. Allowed: 'euler', 'heun', 'heun_full', 'ab2'"):
        sample(gaussian_velocity, noise_patches(), np.zeros((2, B, G)), "rk4")


# Schedules


def test_levels_fall_from_start_to_nothing():
    for shift in (1.0, 0.5, 4.0):
        level_K = uniform_levels(10, shift, 0.8)
        assert level_K.shape == (11,) and level_K.dtype == np.float32 and level_K[-1] == 0
        assert (np.diff(level_K) < 0).all()
    np.testing.assert_allclose(uniform_levels(4), [1, 0.75, 0.5, 0.25, 0], atol=1e-7)
    np.testing.assert_allclose(uniform_levels(2, 3.0), [1, 0.75, 0], atol=1e-7)  # 3 (1/2) / (1 + 2 (1/2))
    for steps, shift in ((0, 1.0), (4, 0.0), (4, np.nan)):
        for levels in (uniform_levels, flow_match_levels, unipc_levels):
            with pytest.raises(ValueError, match=f"steps={steps} and shift={shift}: give at least 1 step"):
                levels(steps, shift)


def test_published_schedules_by_hand():
    """Flow-matching Euler shifts twice, as figured by hand in thirds; UniPC once, and starts just below 1."""
    np.testing.assert_allclose(flow_match_levels(4), [1, 0.8576923, 0.6021506, 0.0089286, 0], atol=1e-7)
    least, most = 0.003 / 1.002, 1.0
    middle = (least + most) / 2
    last, between = (3 * s / (1 + 2 * s) for s in (least, middle))
    np.testing.assert_allclose(flow_match_levels(3), [1, between, last, 0], atol=1e-7)
    np.testing.assert_allclose(unipc_levels(3, 1.0), [1 - 1e-6, 0.667, 0.334, 0], atol=1e-7)
    np.testing.assert_allclose(unipc_levels(3, 5.0)[1:3], [3.335 / 3.668, 1.67 / 2.336], atol=1e-7)
    for steps in (1, 2, 50):
        for level_K in (flow_match_levels(steps), unipc_levels(steps)):
            assert level_K.shape == (steps + 1,) and level_K.dtype == np.float32 and level_K[-1] == 0
            assert (np.diff(level_K) < 0).all() and level_K[0] <= 1


@pytest.fixture
def schedulers(golden):
    return dict(np.load(golden / "diffusers" / "schedulers.npz"))


def test_published_schedules_are_their_reference(golden):
    """Levels, and the timesteps that the network is asked at, for all shifts and numbers of steps there."""
    found = schedules.errors(golden)
    assert len(found) == 4 and max(found.values()) < 1e-6, found
    assert found["unipc timesteps"] == 0


def test_euler_on_a_published_schedule_is_its_reference(schedulers):
    """Where it ends, on velocities that were given for each of eight steps; a clip is one patch here."""
    x_BxP, v_MxBxP = (a.reshape(*a.shape[:-4], -1) for a in (schedulers["x_init"], schedulers["model_outputs"][:8]))
    one, zero = np.ones((B, 1), np.int32), np.zeros((B, 1), np.int32)
    patches = Patches(
        x_BxP[:, None], np.zeros((B, 1, 3), np.float32), one, zero, zero, one, zero, zero.astype(np.float32), one, zero
    )

    def given(patches):
        step = (patches.level_BxG[0, 0] < level_K - 1e-6).sum()  # how many levels lie above this one
        return jnp.asarray(v_MxBxP)[step][:, None]

    for shift in (1.0, 3.0, 5.0):
        level_K = flow_match_levels(8, shift)
        found = sample(given, patches, np.repeat(level_K[:, None, None], B, 1)).x_BxNxP[:, 0]
        last = schedulers[f"flowmatch_euler/shift{shift}/n8_traj/traj"][-1].reshape(B, -1)
        assert np.abs(found - last).max() / np.abs(last).max() < 1e-5


@pytest.mark.parametrize("solver", ["euler", "heun", "heun_full", "ab2"])
def test_what_keeps_its_level_never_moves_and_padding_stays(solver):
    """Bit for bit, whatever the velocity there, NaN included: known patches need no mask."""
    levels_KxG = together(uniform_levels(6))
    levels_KxG[:, 1] = [0.0] * 7  # known
    levels_KxG[:, 2] = [0.3] * 7  # noisy, and left so

    def velocity(patches):
        moving = (patches.group_BxN == 0) & (patches.seg_BxN != 0)
        return jnp.where(moving[..., None], gaussian_velocity(patches), jnp.nan)

    found, x_BxNxP = run(velocity, levels_KxG, solver), noise_patches().x_BxNxP
    moved = (GROUP_BxN == 0) & (SEG_BxN != 0)
    np.testing.assert_array_equal(found[~moved], x_BxNxP[~moved])
    assert np.isfinite(found).all() and (np.abs(found - x_BxNxP)[moved] > 1e-3).any(-1).all()


def test_the_last_levels_come_back_with_the_patches():
    levels_KxBxG = np.repeat(np.array([[1.0, 0, 0.5], [0.5, 0, 0.25]], np.float32)[:, None], B, 1)
    np.testing.assert_array_equal(
        solve(gaussian_velocity, noise_patches(), levels_KxBxG, "euler").level_BxG, levels_KxBxG[-1]
    )


@pytest.mark.parametrize("solver", ["euler", "heun", "heun_full", "ab2"])
def test_each_group_moves_as_if_alone(solver):
    """A group that starts three steps later, and one that rests in between, as in a staircase of levels.

    A step of the second order that looks back takes Euler on a group's first move, and after a rest.
    """
    own = {0: uniform_levels(6), 1: uniform_levels(3, 2.0), 2: rough_levels(6)}
    ways = {
        0: [0, 1, 2, 3, 4, 5, 6, 6, 6],
        1: [0, 0, 0, 0, 1, 1, 2, 3, 3],
        2: [0, 1, 2, 3, 4, 5, 6, 6, 6],
    }
    found = run(gaussian_velocity, np.stack([own[g][ways[g]] for g in range(G)], 1), solver)
    if solver == "ab2":  # a rest forgets the last velocity: what is left is a run of its own
        first = run(gaussian_velocity, together(own[1][:2]), solver)
        patches = dataclasses.replace(noise_patches(), x_BxNxP=first)
        alone = {1: run(gaussian_velocity, together(own[1][1:]), solver, patches)}
    else:
        alone = {1: run(gaussian_velocity, together(own[1]), solver)}
    alone |= {g: run(gaussian_velocity, together(own[g]), solver) for g in (0, 2)}
    for g in range(G):
        mine = (GROUP_BxN == g) & (SEG_BxN != 0)
        np.testing.assert_allclose(found[mine], alone[g][mine], atol=1e-6)


def test_a_first_step_of_ab2_is_one_of_euler():
    one = together(uniform_levels(3)[:2])
    np.testing.assert_array_equal(run(gaussian_velocity, one, "ab2"), run(gaussian_velocity, one, "euler"))
    two = together(uniform_levels(3)[:3])
    assert np.abs(run(gaussian_velocity, two, "ab2") - run(gaussian_velocity, two, "euler")).max() > 1e-3


# Guidance


def conditioned(patches, cond_BxN):
    """A velocity that hangs on the patch, its level and its condition."""
    s = spread(patches.level_BxG[..., None], patches.group_BxN)
    return jnp.sin(3 * patches.x_BxNxP) * (1 + s) + cond_BxN[..., None] ** 2


def guide(scale_BxG, levels=(0.2, 0.5, 0.9), interval=(0.0, 1.0)):
    """(guided, conditional, unconditional) velocities; every row's groups have the given levels."""
    level_BxG = np.repeat(np.array([levels], np.float32), B, 0)
    patches = dataclasses.replace(noise_patches(), level_BxG=level_BxG)
    cond, uncond = np.random.default_rng(2).normal(size=(2, B, N)).astype(np.float32)
    scale_BxG = np.broadcast_to(np.asarray(scale_BxG, np.float32), (B, G))
    velocity = jax.jit(guided(conditioned, cond, uncond, scale_BxG, interval))
    return (
        np.asarray(velocity(patches)),
        np.asarray(conditioned(patches, cond)),
        np.asarray(conditioned(patches, uncond)),
    )


def test_guidance_extrapolates_from_without_to_with_the_condition():
    """Scale 1 is the condition alone, 0 none of it, and it is linear in the scale, each group with its own."""
    for scale in (0.0, 1.0, 2.5, 7.0):
        v, v_c, v_u = guide(scale)
        np.testing.assert_allclose(v, v_u + scale * (v_c - v_u), atol=1e-5)
    scales = np.array([1.0, 4.0, 0.5])
    v, v_c, v_u = guide(scales)
    np.testing.assert_allclose(v, v_u + scales[GROUP_BxN][..., None] * (v_c - v_u), atol=1e-5)


def test_guidance_by_what_is_known_extrapolates_from_without_it():
    """Without: the known groups hold noise at level 1. Scale 1 is no guidance; other groups' levels are untouched."""
    level_BxG, known_BxG = np.float32([[0, 0.5, 0.7], [0.4, 0.6, 0]]), np.array([[1, 0, 0], [0, 0, 1]], bool)
    patches = dataclasses.replace(noise_patches(), level_BxG=level_BxG)
    noise_BxNxP = np.random.default_rng(5).normal(size=(B, N, P)).astype(np.float32)
    mixes = lambda p: jnp.tanh(p.x_BxNxP + p.x_BxNxP.mean(1, keepdims=True)) + p.level_BxG.sum(-1)[:, None, None]
    known_BxNx1 = np.take_along_axis(known_BxG, GROUP_BxN, 1)[..., None]
    forgotten = dataclasses.replace(
        patches,
        x_BxNxP=np.where(known_BxNx1, noise_BxNxP, patches.x_BxNxP),
        level_BxG=np.float32([[1, 0.5, 0.7], [0.4, 0.6, 1]]),
    )
    v, v_0 = mixes(patches), mixes(forgotten)
    scale_BxG = np.float32([[0, 1, 2.5], [2.5, 0, 1]])
    found = jax.jit(recalled(mixes, known_BxG, noise_BxNxP, scale_BxG))(patches)
    scale_BxNx1 = np.take_along_axis(scale_BxG, GROUP_BxN, 1)[..., None]
    np.testing.assert_allclose(found, v_0 + scale_BxNx1 * (v - v_0), atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun", "heun_full", "ab2"])
def test_values_that_are_led_come_to_where_they_are_led(solver):
    """e - x leads a value from noise e to x whatever the steps; the others go where the model's velocity takes them,
    which sees the led ones on their way."""
    patches, level_KxBxG = noise_patches(), np.repeat(uniform_levels(5, 3.0)[:, None, None], B, 1) * np.ones((B, G))
    rng, held_BxNxP = np.random.default_rng(6), np.random.default_rng(7).random((B, N, P)) < 0.4
    x_BxNxP = rng.normal(size=(B, N, P)).astype(np.float32)
    course_BxNxP = np.where(held_BxNxP, patches.x_BxNxP - x_BxNxP, np.nan).astype(np.float32)
    mixes = lambda p: gaussian_velocity(p) + p.x_BxNxP.mean(-1, keepdims=True)
    real_BxN = (SEG_BxN != 0)[..., None]
    free = np.asarray(sample(mixes, patches, level_KxBxG, solver).x_BxNxP)
    found = np.asarray(sample(led(mixes, course_BxNxP), patches, level_KxBxG, solver).x_BxNxP)
    np.testing.assert_allclose(found[held_BxNxP & real_BxN], x_BxNxP[held_BxNxP & real_BxN], atol=1e-5)
    beside = ~held_BxNxP & held_BxNxP.any(-1, keepdims=True) & real_BxN
    assert np.isfinite(found).all() and (np.abs(found - free)[beside] > 1e-4).all()


def test_guidance_acts_within_its_interval_of_levels():
    """(lo, hi]: groups at 0.2 and 0.9 take the condition alone, as does one at the lower end."""
    v, v_c, v_u = guide(5.0, interval=(0.25, 0.5))
    inside = (GROUP_BxN == 1)[..., None]  # its level, 0.5, is the upper end
    np.testing.assert_allclose(v, np.where(inside, v_u + 5 * (v_c - v_u), v_c), atol=1e-5)
    assert np.abs(v - v_c)[GROUP_BxN == 1].max() > 0.1
    v, v_c, _ = guide(5.0, interval=(0.5, 0.8))
    np.testing.assert_allclose(v, v_c, atol=1e-5)
