"""DiT, SiT and Latte with published weights: against their references' arrays, and against a rebuild in float64.

B clips, F frames, C channels, M steps, N patches per row, P values per patch, G groups per row.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rebuild

from configs import dit as dit_config
from configs import sit as sit_config
from dit_video import patches as pt
from dit_video.model import DiT, macs, make_model
from dit_video.sampling import guided, sample
from dit_video.text.labels import LabelEncoder
from dit_video.weights import diffusion, dit, latte, sit
from experiments.parity import diffusion as parity
from experiments.parity.arrays import error, limit
from experiments.parity.rows import frames, per_clip

FAMILIES = {"dit": dit, "sit": sit, "latte": latte}
TINY = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 4, "num_heads": 2,
    "mlp_ratio": 4.0, "num_classes": 10, "learn_sigma": True,
}  # fmt: skip


# Against the references' arrays


@pytest.mark.parametrize(
    "errors, fewest",
    [
        (parity.dit_errors, 15),
        (parity.ddpm_errors, 48),
        (parity.sit_errors, 30),
        (parity.latte_errors, 9),
    ],
)
def test_reference_arrays(golden, errors, fewest):
    found = errors(golden)
    assert len(found) >= fewest
    assert not {what: e for what, e in found.items() if not e < limit(what)}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rebuild_gives_the_references_arrays(golden, name):
    """So that it is worth holding the model against it. The references are float32, and so are their sinusoids."""
    state, config, io = parity.load(golden, parity.MODELS[name][1])
    x = io["x"] if name == "latte" else io["x"][:, None]
    for b, t in enumerate(io["t"]):
        ours = rebuild.forward(state, config, x[b], t, io["y"][b])
        theirs = io["out"][b] if name == "latte" else io["out"][b][None]
        assert error(ours[:, : theirs.shape[1]], theirs) < (1e-5 if t < 900 else 5e-5)


# Against the rebuild


@functools.cache
def ours_and_clips(name: str):
    """A family's model with random weights, what it gives for three clips, and all that the rebuild needs for it."""
    family, rng = FAMILIES[name], np.random.default_rng(0)
    config = TINY | ({"num_frames": 3, "extras": 2} if name == "latte" else {})
    F, D = config.get("num_frames", 1), config["hidden_size"]
    tables = {"pos_embed": rebuild.place_table(4, D)[None], "temp_embed": rebuild.time_table(F, D)[None]}
    state = {}
    for rule in family.rules(config):
        for weight in rule.names(config["depth"]):
            # Gates and the rest of the modulation are open: closed ones would hide what the layers do.
            scale = 0.1 if weight.endswith("bias") else np.prod(rule.shape[1:]) ** -0.5
            state[weight] = tables.get(weight, scale * rng.normal(size=rule.shape)).astype(np.float32)
    x = rng.normal(size=(3, F, 4, 8, 8)).astype(np.float32)
    # Early timesteps: of late ones float32 has the sinusoids to 3e-5 alone.
    t, y = np.array([0.25, 0.5, 0.875]) * (1 if name == "sit" else 64), np.array([3, 10, 9])
    p = parity.Published(DiT(**family.arguments(config)), family.to_ours(state, config), config, {})
    out = p.run(x, 1 - t if name == "sit" else t / 1000, y)
    return -out if name == "sit" else out, state, config, (x, t, y)


def rebuilt(name: str, **wrong):
    _, state, config, clips = ours_and_clips(name)
    return np.stack([rebuild.forward(state, config, *clip, **wrong) for clip in zip(*clips)])


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_equals_the_rebuild(name):
    assert error(ours_and_clips(name)[0], rebuilt(name)) < 3e-6


WRONG = [
    {"eps": 1e-5}, {"gelu": rebuild.exact_gelu}, {"shift_first": False}, {"column_first": False},
]  # fmt: skip
WRONG_IN_TIME = [{"space_first": False}, {"times_before": 0}, {"times_before": 3}, {"times_before": None}]


@pytest.mark.parametrize("name, wrong", [(n, w) for n in FAMILIES for w in WRONG + WRONG_IN_TIME * (n == "latte")])
def test_the_rebuild_tells_a_wrong_reading(name, wrong):
    """Epsilon, the form of GELU, the order of shift and scale, and of the tables: each would be seen."""
    assert error(ours_and_clips(name)[0], rebuilt(name, **wrong)) > 6e-6


def test_a_table_that_is_not_the_fixed_one_is_refused():
    _, state, config, _ = ours_and_clips("latte")
    for name in ("pos_embed", "temp_embed"):
        with pytest.raises(ValueError, match=f"'{name}' is not the fixed sin-cos table"):
            latte.to_ours({**state, name: state[name][:, ::-1]}, config)


def test_a_latte_of_captions_is_refused():
    with pytest.raises(ValueError, match="extras=78 cannot be imported. Allowed: 1"):
        latte.arguments({**TINY, "num_frames": 3, "extras": 78})


# Sizes


def parameters(model: DiT, classes: int) -> int:
    """Without allocating any."""
    array, D = jax.ShapeDtypeStruct, model.width
    ints = lambda *shape: array(shape, jnp.int32)
    patches = pt.Patches(
        array((1, 4, model.patch_values), jnp.float32), array((1, 4, 3), jnp.float32), *[ints(1, 4)] * 5,
        array((1, 1), jnp.float32), ints(1, 1), ints(1, 1),
    )  # fmt: skip
    cond = pt.Cond(array((1, 1, D), jnp.float32), ints(1, 1)) if classes else None
    shapes = [jax.eval_shape(model.init, jax.random.key(0), patches, cond)]
    if classes:
        shapes.append(jax.eval_shape(LabelEncoder(D, classes).init, jax.random.key(0), ints(1, 1, 1), ints(1, 1)))
    return sum(w.size for w in jax.tree.leaves(shapes))


@pytest.mark.parametrize("family", [dit_config, sit_config])
def test_configs_make_the_published_models(family):
    """By the arguments that the import of the weights asks for, and the sizes of the papers' tables."""
    weights = dit if family is dit_config else sit
    millions = {"S/8": 33, "B/4": 130, "L/2": 458, "XL/2": 675}
    for form, count in millions.items():
        config = family.get_config(form)
        model, m, patch = make_model(config, config.codec.channels), config.model, int(form.split("/")[1])
        published = {
            "input_size": 32, "patch_size": patch, "in_channels": 4, "hidden_size": m.width, "depth": m.depth,
            "num_heads": m.heads, "mlp_ratio": 4.0, "num_classes": config.text.classes, "learn_sigma": True,
        }  # fmt: skip
        theirs = DiT(**weights.arguments(published))
        same = {"dtype": model.dtype, "remat": model.remat, "pos_scale": (model.pos_scale[0], *theirs.pos_scale[1:])}
        assert model == dataclasses.replace(theirs, **same)
        assert round(parameters(model, config.text.classes) / 1e6) == count


def test_sizes_and_macs_are_the_published_ones(golden):
    """DiT's and Latte's, S, B, L and XL with patches of 2, 4 and 8: trainable parameters and MACs, to the unit."""
    sizes = {name: json.loads((golden / name / "sizes.json").read_text()) for name in ("dit", "latte")}
    for name, wanted in sizes["dit"].items():
        form, side = name.removeprefix("DiT-").split("@")
        config = dit_config.get_config(form)
        model = make_model(config, config.codec.channels)
        assert parameters(model, config.text.classes) == wanted["params_trainable"], name
        assert macs(model, [(int(side) // int(form[-1])) ** 2], [1]) == wanted["macs_formula"], name
    for name, wanted in sizes["latte"].items():
        form = name.removeprefix("Latte-")
        depth, width, heads = dit_config.SIZES[form.split("/")[0]]
        config = TINY | {
            "input_size": 32, "patch_size": int(form[-1]), "hidden_size": width, "depth": depth, "num_heads": heads,
            "num_frames": 16, "extras": 1,
        }  # fmt: skip
        assert parameters(DiT(**latte.arguments(config)), 0) == wanted["params_trainable"], name
        tables = sum(rule.shape[1] * rule.shape[2] for rule in latte.rules(config) if not rule.ours)
        assert wanted["params_trainable"] + tables == wanted["params_total"], name


# Diffusion


FULL = diffusion.linear_schedule()


def rows(x_BxCxYxX, level_B):
    """Patches of single frames, two to a row, at their levels; and their places."""
    ids = lambda b: np.zeros((1, 1), np.int32)
    batch, grids = parity.rows_of(np.moveaxis(x_BxCxYxX, 1, -1)[:, None], ids, [0.0], per_row=2)
    return dataclasses.replace(batch.patches, level_BxG=per_clip(level_B, batch.patches.level_BxG.shape)), grids


def by_hand(x_, timestep, xp=np):
    """Any smooth e and f of x_t and the timestep."""
    t = timestep / 1000
    return x_ / 2 + xp.sin(x_ + 3 * t) / 4, xp.cos(x_ - 2 * t)


def network(patches):
    """The same as a network has it: each latent of a patch with its 4 channels of e, then of f."""
    t_BxNx1 = jnp.take_along_axis(patches.level_BxG, patches.group_BxN, 1)[..., None] * 1000
    cells = [part.reshape(*part.shape[:2], 4, 4) for part in by_hand(patches.x_BxNxP, t_BxNx1, jnp)]
    return jnp.concatenate(cells, -1).reshape(*patches.x_BxNxP.shape[:2], 32)


@pytest.mark.parametrize("spacing", ["250", "ddim50", "6"])
def test_ancestral_sampling_is_bayes_rule(spacing):
    """One step from a few timesteps, the mean and the learned variance, against the rebuild."""
    s = diffusion.respaced(FULL, spacing)
    steps, T = diffusion.ddim_steps(s, 1.0, learned=True), len(s.abar_T)
    rng, predict = np.random.default_rng(1), diffusion.predictions(network, s, 4)
    move = jax.jit(lambda step, patches, n: diffusion.stochastic_step(step, patches.x_BxNxP, *predict(patches), n))
    for t in (T - 1, T // 2, 1, 0):
        x_t, n = rng.normal(size=(2, 2, 4, 4, 4))
        scale = lambda abar: np.sqrt(abar) + np.sqrt(1 - abar)
        patches, grids = rows(x_t.astype(np.float32) / np.float32(scale(s.abar_T[t])), [s.level_T[t]] * 2)
        noise, _ = rows(n.astype(np.float32), [0, 0])
        step = diffusion.Steps(*(column[T - 1 - t] for column in dataclasses.astuple(steps)))
        ours = frames(move(step, patches, noise.x_BxNxP), grids)[:, 0] * scale(s.previous_T[t])
        e, f = by_hand(x_t, s.timestep_T[t])
        mean, variance = rebuild.ddpm(x_t, e, t, s.timestep_T, f=f)
        assert error(ours, mean + np.sqrt(variance) * n) < 1e-5


def test_euler_is_ddim():
    """`sample` by Euler's method down the schedule's levels, DDIM's steps, and its formula: one trajectory."""
    s = diffusion.respaced(FULL, "ddim10")
    predict = diffusion.predictions(network, s, 4)
    x = np.random.default_rng(2).normal(size=(2, 4, 4, 4))
    patches, grids = rows((x / (np.sqrt(s.abar_T[-1]) + np.sqrt(1 - s.abar_T[-1]))).astype(np.float32), [0, 0])
    level_KxBxG = np.append(s.level_T[::-1], 0)[:, None, None] * np.ones(patches.level_BxG.shape)
    by_euler = jax.jit(lambda p: sample(lambda p: predict(p)[0], p, level_KxBxG))(patches)
    zeros_MxBxNxP = np.zeros((10, *patches.x_BxNxP.shape), np.float32)
    by_steps = jax.jit(lambda p: diffusion.sample_stochastic(predict, p, diffusion.ddim_steps(s), zeros_MxBxNxP))(
        patches
    )
    for t in range(9, -1, -1):
        e, _ = by_hand(x, s.timestep_T[t])
        clean = (x - np.sqrt(1 - s.abar_T[t]) * e) / np.sqrt(s.abar_T[t])
        x = np.sqrt(s.previous_T[t]) * clean + np.sqrt(1 - s.previous_T[t]) * e
    assert error(frames(by_euler.x_BxNxP, grids)[:, 0], x) < 1e-5
    assert error(frames(by_steps.x_BxNxP, grids)[:, 0], x) < 1e-5
    assert (np.asarray(by_euler.level_BxG) == 0).all() and (np.asarray(by_steps.level_BxG) == 0).all()


def test_from_pure_noise_the_velocity_is_that_of_the_last_timestep():
    """Of data at one point, whose noise is known: v = e - x also where levels are above the schedule's last."""
    rng = np.random.default_rng(5)
    point, e = rng.normal(size=(2, 1, 4, 4, 4))
    alpha_T, sigma_T = np.sqrt(FULL.abar_T), np.sqrt(1 - FULL.abar_T)
    data = rows(point.astype(np.float32), [0])[0].x_BxNxP

    def knows(patches):
        t = int(np.rint(patches.level_BxG[0, 0] * 1000))
        e_hat = (patches.x_BxNxP - alpha_T[t] * data) / sigma_T[t]
        return np.concatenate([part.reshape(*part.shape[:2], 4, 4) for part in (e_hat, e_hat)], -1).reshape(
            *data.shape[:2], 32
        )

    predict = diffusion.predictions(knows, FULL, 4)
    for level, most in ((FULL.level_T[500], 1e-5), (FULL.level_T[-1], 1e-3), (0.997, 0.01), (1.0, 0.01)):
        patches, grids = rows(((1 - level) * point + level * e).astype(np.float32), [level])
        assert error(frames(predict(patches)[0], grids)[:, 0], e - point) < most


losses = jax.jit(functools.partial(diffusion.losses, FULL))


def test_losses_are_what_their_papers_say():
    """Squared error, and the KL divergence of two normals or, at t = 0, a bin's mass: in float64, with its bounds."""
    rng = np.random.default_rng(3)
    x, e, e_hat, f = rng.normal(size=(4, 4, 60)) * np.array([0.6, 1, 1, 1])[:, None, None]
    e_hat, x[0, :2], t = e + 0.3 * e_hat, (-1.0, 1.0), np.array([0, 1, 400, 999])
    mse, bound = losses(*(a.astype(np.float32) for a in (e_hat, f, x, e)), t)
    np.testing.assert_allclose(mse, ((e - e_hat) ** 2).mean(1), rtol=1e-5)
    cdf = lambda a: (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) / 2
    for b, at in enumerate(t):
        abar = FULL.abar_T[at]
        x_t = np.sqrt(abar) * x[b] + np.sqrt(1 - abar) * e[b]
        mean, variance = rebuild.ddpm(x_t, e_hat[b], at, np.arange(1000), f=f[b])
        if at == 0:
            # The posterior's variance is 0 there, and that of t = 1 stands in.
            low, high = np.log(rebuild.ddpm(x_t, e[b], 1, np.arange(1000))[1]), np.log(1e-4)
            deviation = np.exp((low + (f[b] + 1) / 2 * (high - low)) / 2)
            above, below = (cdf((x[b] + h - mean) / deviation) for h in (1 / 255, -1 / 255))
            mass = np.where(x[b] < -0.999, above, np.where(x[b] > 0.999, 1 - below, above - below))
            nats = -np.log(np.maximum(mass, 1e-12))
        else:
            true_mean, true = rebuild.ddpm(x_t, None, at, np.arange(1000), x=x[b])
            nats = (true / variance + (mean - true_mean) ** 2 / variance - 1 - np.log(true / variance)) / 2
        np.testing.assert_allclose(bound[b], nats.mean() / np.log(2), rtol=1e-4)


def test_the_bounds_gradient_reaches_the_variance_alone():
    rng = np.random.default_rng(4)
    e_hat, f, x, e = rng.normal(size=(4, 3, 20)).astype(np.float32)
    t = np.array([0, 5, 900])
    of_e, of_f = jax.jit(jax.grad(lambda e_hat, f: losses(e_hat, f, x, e, t)[1].sum(), argnums=(0, 1)))(e_hat, f)
    assert (np.asarray(of_e) == 0).all()
    assert (np.abs(of_f).max(1) > 0).all() and np.isfinite(of_f).all()


@pytest.mark.parametrize("spacing", ["ddim300", "ddim1", "1001", "1"])
def test_a_spacing_that_the_schedule_has_not_is_refused(spacing):
    with pytest.raises(ValueError, match=f"'{spacing}' of 1000 timesteps"):
        diffusion.respaced(FULL, spacing)


def test_guidance_of_all_channels_is_the_samplers_own():
    """And of three, it leaves the fourth and the variances to the condition."""
    x = np.random.default_rng(5).normal(size=(2, 4, 4, 4)).astype(np.float32)
    patches, grids = rows(x, [0.5, 0.5])
    forward = lambda patches, cond: network(patches) * cond
    cond, uncond = (np.full((1, 1, 1), c, np.float32) for c in (3.0, 1.0))
    every = diffusion.guided_channels(forward, cond, uncond, 2.0, channels=8, cells=4)(patches)
    np.testing.assert_array_equal(every, guided(forward, cond, uncond, np.full((1, 3), 2.0, np.float32))(patches))
    three = frames(diffusion.guided_channels(forward, cond, uncond, 2.0, channels=3, cells=4)(patches), grids)[:, 0]
    both = np.concatenate(by_hand(x, 500), 1)
    np.testing.assert_allclose(three[:, :3], 5 * both[:, :3], rtol=1e-5)
    np.testing.assert_allclose(three[:, 3:], 3 * both[:, 3:], rtol=1e-5, atol=1e-6)


# SiT's random steps


@pytest.mark.parametrize("form", ["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"])
def test_random_steps_are_euler_maruyama(form):
    """dx = (v + w score) dt + sqrt(2 w) dW, in SiT's own time, its score from its velocity."""
    rng, t_K, dt = np.random.default_rng(6), np.linspace(0.001, 0.96, 6), 0.959 / 5
    x, noise = rng.normal(size=(2, 4, 4, 4)), rng.normal(size=(6, 2, 4, 4, 4))
    velocity = lambda x, t, xp=np: xp.cos(2 * x) - t
    patches, grids = rows(x.astype(np.float32), [1, 1])
    n = np.stack([rows(a.astype(np.float32), [0, 0])[0].x_BxNxP for a in noise])
    predict = lambda p: (-velocity(p.x_BxNxP, 1 - p.level_BxG[0, 0], jnp), 0.0)
    run = jax.jit(lambda p, steps: diffusion.sample_stochastic(predict, p, steps, n))
    ours = {last: run(patches, sit.sde_steps(6, form, last, start=0.001)) for last in ("Mean", "Euler", "Tweedie")}
    for i, t in enumerate(t_K):
        v, w = velocity(x, t), sit.diffusion(form, t)
        score = (t * v - x) / (1 - t)
        if i < 5:
            x = x + (v + w * score) * dt + np.sqrt(2 * w * dt) * noise[i]
    ends = {"Mean": x + (v + w * score) * 0.04, "Euler": x + v * 0.04, "Tweedie": (x + 0.04**2 * score) / 0.96}
    for last, end in ends.items():
        assert error(frames(ours[last].x_BxNxP, grids)[:, 0], end) < (1e-3 if form == "SBDM" else 1e-5), last


def test_unknown_forms_and_starts_are_refused():
    with pytest.raises(ValueError, match="form='sgima' is not known. Allowed: 'constant', 'SBDM'"):
        sit.sde_steps(6, "sgima")
    with pytest.raises(ValueError, match="last='Heun' is not known"):
        sit.sde_steps(6, "sigma", "Heun")
    with pytest.raises(ValueError, match="form='SBDM' divides by t, and start=0.0: give a start above 0"):
        sit.sde_steps(6, "SBDM")
