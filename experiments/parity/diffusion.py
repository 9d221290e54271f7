"""How near DiT, SiT and Latte, with their published weights' names, come to what their references gave.

B clips, F frames, C channels, M steps, N patches per row, P values per patch. Each function takes the folder of
reference arrays and gives {what: largest error}, relative to the reference's largest value.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from configs import dit as dit_config
from configs import sit as sit_config
from dit_video.attention import sinusoids
from dit_video.flow import corrupt, loss_sums
from dit_video.model import DiT, block, make_model, make_velocity, sincos, sincos_table, split_output, to_velocity
from dit_video.patches import Cond, patchify
from dit_video.sampling import sample
from dit_video.step import State, make_run
from dit_video.text.labels import LabelEncoder, tokenise
from dit_video.weights import diffusion, dit, latte, sit
from experiments.parity.arrays import error, load
from experiments.parity.rows import frames, levels, per_clip, rows_of

CELLS, CHANNELS = 4, 4  # latents in a patch of 1 x 2 x 2, and their channels
MODELS = {"dit": (dit, "dit/dit_tiny"), "sit": (sit, "sit/sit_tiny"), "latte": (latte, "latte/latte_tiny_class")}


@dataclasses.dataclass(frozen=True)
class Published:
    """A model with its weights, and what its reference took and gave."""

    model: DiT
    params: dict
    config: dict
    io: dict

    def lay(self, x_BxFxCxYxX, y_B, rate: float = 8.0):
        """Clips, two to a row, with their labels: patches, their condition, that of no class, and their places."""
        null = self.config["num_classes"]
        ids = lambda b: tokenise("" if y_B[b] == null else str(y_B[b]), null)
        times = np.arange(x_BxFxCxYxX.shape[1]) / rate
        batch, grids = rows_of(np.moveaxis(x_BxFxCxYxX, 2, -1), ids, times, per_row=2)
        cond, uncond = (
            Cond(self.embed(self.params, ids), batch.prompt_BxS)
            for ids in (batch.ids_BxSxK, np.full_like(batch.ids_BxSxK, -1))
        )
        return batch, cond, uncond, grids

    def embed(self, params, ids_BxSxK):
        encoder = LabelEncoder(self.config["hidden_size"], self.config["num_classes"])
        return encoder.apply({"params": params["text"]}, ids_BxSxK, None)

    @functools.cached_property
    def forward(self):
        return jax.jit(lambda patches, cond: self.model.apply({"params": self.params["dit"]}, patches, cond))

    def run(self, x_BxFxCxYxX, level_B, y_B):
        batch, cond, _, grids = self.lay(x_BxFxCxYxX, y_B)
        level = per_clip(level_B, batch.patches.level_BxG.shape)
        return frames(self.forward(dataclasses.replace(batch.patches, level_BxG=level), cond), grids)


def published(golden_dir, name: str) -> Published:
    family, path = MODELS[name]
    state, config, io = load(golden_dir, path)
    return Published(DiT(**family.arguments(config)), family.to_ours(state, config), config, io)


def of_size(config, p: Published):
    """A config of ours at the published model's size."""
    for key in ("depth", "width", "heads", "mlp_width"):
        config.model[key] = getattr(p.model, key)
    config.text.width, config.text.classes = p.config["hidden_size"], p.config["num_classes"]
    return config


def trajectory(step, patches, rows, grids, scale_M=None) -> np.ndarray:
    """Where a sampler of one step goes from each point to the next: M x B x F x C x Y x X."""
    points = []
    for row in rows:
        patches = step(patches, row)
        points.append(frames(patches.x_BxNxP, grids))
    scale_M = np.ones(len(points)) if scale_M is None else scale_M
    return np.stack(points) * scale_M[:, None, None, None, None, None]


def euler(velocity, level_K, patches, grids, scale_M=None, solver: str = "euler") -> np.ndarray:
    """The trajectory of `sample`, one step at a time."""
    level_KxBxG = np.broadcast_to(level_K[:, None, None], (len(level_K), *patches.level_BxG.shape)).astype(np.float32)
    rows = [level_KxBxG[i : i + 2] for i in range(len(level_K) - 1)]
    step = jax.jit(lambda patches, level_KxBxG: sample(velocity, patches, level_KxBxG, solver))
    return trajectory(step, patches, rows, grids, scale_M)


def random_step(predict):
    """`sample_stochastic` of one step, (steps, noise) of M = 1."""
    return jax.jit(lambda patches, row: diffusion.sample_stochastic(predict, patches, *row))


def stochastic(step, steps: diffusion.Steps, noise_MxBxNxP, patches, grids, scale_M=None) -> np.ndarray:
    """The trajectory of a `random_step`."""
    row = lambda i: jax.tree.map(lambda a: np.asarray(a[i : i + 1]), (steps, noise_MxBxNxP))
    return trajectory(step, patches, map(row, range(len(noise_MxBxNxP))), grids, scale_M)


def pointwise(ours, theirs) -> float:
    """The largest error of a trajectory's points, each relative to its own largest value."""
    return max(map(error, ours, theirs))


# DiT


def dit_errors(golden_dir) -> dict[str, float]:
    p = published(golden_dir, "dit")
    io, out = p.io, {}
    for name, t, theirs in (("", io["t"], io["out"]), (" at fractional timesteps", io["t_frac"], io["out_t_frac"])):
        level = levels(t, (4, 1))
        out[f"forward{name}"] = error(p.run(io["x"][:, None], level, io["y"])[:, 0], theirs)

    # The reference runs both halves with and without the label, and gives both; the first is the sample.
    batch, cond, uncond, grids = p.lay(io["cfg_x"][:2, None], io["cfg_y"])
    guided = diffusion.guided_channels(p.forward, cond, uncond, float(io["cfg_scale"]), channels=3, cells=CELLS)
    level_BxG = levels(io["cfg_t"][:2], batch.patches.level_BxG.shape)
    theirs = io["cfg_out"][:2]
    out["guidance, three channels"] = error(
        frames(guided(dataclasses.replace(batch.patches, level_BxG=level_BxG)), grids)[:, 0], theirs
    )

    one = jax.jit(lambda w, h, context: block(p.model, w, h, context, "all"))
    h, B, N = io["act_x_embedder"] + io["pos_embed_96_4"], *io["act_block0"].shape[:2]
    context = plain_context(B, N, io["act_t_embedder"] + io["act_y_embedder"])
    for i in range(p.model.depth):
        out[f"block {i}"] = error(one(block_weights(p.params, i), h, context), io[f"act_block{i}"])
        h = io[f"act_block{i}"]
    for width, side in ((96, 4), (384, 16)):
        y, x = np.indices((side, side)).reshape(2, -1)
        out[f"position table {side} x {side}"] = error(
            sincos_table(np.stack([y, y, x], -1), width), io[f"pos_embed_{width}_{side}"]
        )
    return out | training_errors(golden_dir, p)


def plain_context(B: int, N: int, c_BxD) -> dict:
    """What `block` takes where each row is one clip."""
    seg, group = np.ones((B, N), np.int32), np.zeros((B, N), np.int32)
    context = {"tags": {"all": (seg, group)}, "rope": None, "group_BxN": group, "prompt_tag": (seg, group)}
    return context | {"c_BxGxD": jax.nn.silu(np.asarray(c_BxD))[:, None]}


def block_weights(params, i: int) -> dict:
    return {k.removeprefix("block_"): v[i] for k, v in params["dit"].items() if k.startswith("block_")}


def training_errors(golden_dir, p: Published) -> dict[str, float]:
    """DiT's loss and its gradients, and three steps of the optimizer of ours that `configs/dit.py` gives."""
    io = dict(np.load(golden_dir / "dit/train_io.npz"))
    schedule = diffusion.linear_schedule()
    batch, _, _, grids = p.lay(io["x_start"][:, None], io["y"])
    noise = p.lay(io["noise"][:, None], io["y"])[0].patches.x_BxNxP
    patches = dataclasses.replace(batch.patches, level_BxG=levels(io["t"], batch.patches.level_BxG.shape))
    t_BxN = np.take_along_axis(np.rint(patches.level_BxG * 1000).astype(int), patches.group_BxN, 1)
    real = patches.seg_BxN != 0

    def loss(params):
        x_t = diffusion.q_sample(schedule, patches.x_BxNxP, noise, t_BxN)
        cond = Cond(p.embed(params, batch.ids_BxSxK), batch.prompt_BxS)
        out = p.model.apply({"params": params["dit"]}, dataclasses.replace(patches, x_BxNxP=x_t), cond)
        e, f = split_output(out, CELLS * CHANNELS, CELLS)
        mse, bound = diffusion.losses(schedule, e, f, patches.x_BxNxP, noise, t_BxN)
        return jnp.where(real, mse + bound, 0).sum() / real.sum(), (mse, bound)

    gradient_of = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, terms), gradient = gradient_of(p.params)
    by_clip = lambda a: np.array([np.asarray(a)[g.row, g.offset : g.offset + g.size].mean() for g in grids])
    out = {
        "loss, squared error": error(by_clip(terms[0]), io["loss_terms_mse"]),
        "loss, variational bound": error(by_clip(terms[1]), io["loss_terms_vb"]),
    }
    first, ours = load_file(golden_dir / "dit/train_grads_step0.safetensors"), dit.to_theirs(gradient, p.config)
    # One of the reference's 128 frequencies is an ulp off what its own float32 exponent gives, 3e-5 radians at t = 999.
    # The gradient of its cosine's and its sine's weights is told apart from all others.
    off = np.abs(sinusoids(p.io["temb_t"], 256) - p.io["temb_256"]).max(0) > 1e-6
    if sorted(np.flatnonzero(off) % 128) != [12, 12]:
        raise ValueError(f"the features {np.flatnonzero(off)} of the timestep are not the reference's.")
    name = "t_embedder.mlp.0.weight"
    pick = lambda a, columns: {name: a[:, columns]}
    out["gradients"] = worst(ours | pick(ours[name], ~off), first | pick(first[name], ~off))
    out["gradient of the frequency that is an ulp off"] = worst(pick(ours[name], off), pick(first[name], off))

    config = of_size(dit_config.get_config("S/2"), p)
    o = config.optimizer
    o.lr = o.text_lr = float(io["lr"])
    o.warmup, o.decay, o.clip, o.ema = 0, 0.0, 1e9, float(io["ema_decay"])
    (o.b1, o.b2), o.weight_decay = map(float, io["betas"]), float(io["weight_decay"])
    run, zero = make_run(config), jnp.zeros((), jnp.int32)
    # Far into the run, where the average's decay has reached its own.
    state = State(zero + 1000, p.params, p.params, run.optimizer.init(p.params), zero, zero)
    update, losses = jax.jit(run.update), []
    for _ in range(3):
        (total, _), gradient = gradient_of(state.params)
        state, _ = update(state, gradient, {"loss": total, "weight": jnp.ones(())})
        losses.append(total)
    out["three steps, losses"] = error(np.array(losses), io["losses"])
    after = load_file(golden_dir / "dit/train_params_after3.safetensors")
    averages = {name.removeprefix("ema_"): a for name, a in io.items() if name.startswith("ema_") and a.ndim}
    out["three steps, parameters"] = worst(dit.to_theirs(state.params, p.config), after, first)
    out["three steps, averages"] = worst(dit.to_theirs(state.ema, p.config), averages, first)
    return out


def worst(ours: dict, theirs: dict, gradient: dict | None = None) -> float:
    """The largest error of named arrays. The key's bias is left out: its true gradient is zero.

    gradient: leave out, too, what has less than 1e-4 of its array's largest. Adam divides by it, so that float32's
    rounding decides where such an entry goes.
    """
    largest = 0.0
    for name, a in theirs.items():
        counts = np.ones(a.shape, bool)
        if name.endswith("qkv.bias"):
            counts[len(a) // 3 : 2 * len(a) // 3] = False
        if gradient:
            g = np.abs(gradient[name])
            counts &= g > 1e-4 * g.max()
        largest = max(largest, np.abs(ours[name] - a)[counts].max() / np.abs(a).max())
    return float(largest)


# Diffusion


def ddpm_errors(golden_dir) -> dict[str, float]:
    """The schedules, one step of each kind with a made-up output, and whole trajectories of DiT with guidance."""
    tables, io, out = np.load(golden_dir / "dit/schedules_f64.npz"), np.load(golden_dir / "dit/diffusion_steps.npz"), {}
    full = diffusion.linear_schedule()
    for name in ("full1000", "250", "50", "10", "ddim50", "ddim250"):
        s = full if name == "full1000" else diffusion.respaced(full, name)
        theirs = {key.split("/")[-1]: tables[key] for key in tables.files if key.startswith(f"linear/{name}/")}
        ours = {"timestep_map": s.timestep_T, "alphas_cumprod": s.abar_T, "alphas_cumprod_prev": s.previous_T}
        ours |= {"betas": s.beta_T, "posterior_variance": s.posterior_variance_T}
        out[f"tables, {name}"] = max(error(a, theirs[key]) for key, a in ours.items())

    x, e, n = io["x_start"], io["noise_q"], io["noise_step"]
    e_hat, f_hat = np.split(io["model_output"], 2, 1)
    for name in ("full1000", "250", "ddim50"):
        s = full if name == "full1000" else diffusion.respaced(full, name)
        theirs = {key.removeprefix(f"{name}/"): io[key] for key in io.files if key.startswith(f"{name}/")}
        t = theirs["t"]
        x_t = diffusion.q_sample(s, x, e, t)
        x_hat = diffusion.clean(s, x_t, e_hat, t)
        mean, log_variance = diffusion.posterior(s, x, x_t, t)
        mse, bound = diffusion.losses(s, e_hat, f_hat, x, e, t)
        ours = {
            "model_timesteps_seen": s.timestep_T[t],
            "q_sample": x_t,
            "q_post_mean": mean,
            "q_post_logvar": np.broadcast_to(log_variance, x.shape),
            "p_clip0_pred_xstart": x_hat,
            "p_clip0_mean": diffusion.posterior(s, x_hat, x_t, t)[0],
            "p_clip0_log_variance": diffusion.learned_log_variance(s, f_hat, t),
            "loss_MSE_mse": mse,
            "loss_MSE_vb": bound,
        }
        wide = lambda a: np.asarray(a)[:, None, None, None]
        scale = wide((np.sqrt(s.abar_T) + np.sqrt(1 - s.abar_T))[t])
        after = wide((np.sqrt(s.previous_T) + np.sqrt(1 - s.previous_T))[t])
        data = wide(1 - s.level_T)[t].astype(np.float32)
        z = x_t / scale
        for key, eta, learned in (
            ("ddpm_sample_clip0", 1.0, True),
            ("ddim_eta0.0_clip0", 0.0, False),
            ("ddim_eta0.5_clip0", 0.5, False),
            ("ddim_eta1.0_clip0", 1.0, False),
        ):
            steps = dataclasses.asdict(diffusion.ddim_steps(s, eta, learned))
            step = diffusion.Steps(**{field: wide(a[::-1][t]) for field, a in steps.items()})
            ours[key] = diffusion.stochastic_step(step, z, (e_hat - z) / data, (f_hat + 1) / 2, n) * after
        out |= {f"{key}, {name}": error(a, theirs[key]) for key, a in ours.items()}
    nll = diffusion.nll_256(io["nll_x"], io["nll_means"], io["nll_log_scales"])
    out["likelihood in 256 steps"] = error(-nll, io["nll_out_f64"])
    return out | trajectory_errors(golden_dir)


def trajectory_errors(golden_dir) -> dict[str, float]:
    """DDIM by Euler's method of ours, and ancestral sampling, both of DiT with guidance."""
    p, io, full = (
        published(golden_dir, "dit"),
        np.load(golden_dir / "dit/sampling_loops.npz"),
        diffusion.linear_schedule(),
    )
    half = len(io["y"]) // 2
    batch, cond, uncond, grids = p.lay(io["z"][:half, None], io["y"])
    guided = diffusion.guided_channels(p.forward, cond, uncond, float(io["cfg_scale"]), channels=3, cells=CELLS)
    noise_MxBxNxP = np.stack([p.lay(n[:half, None], io["y"])[0].patches.x_BxNxP for n in io["noises"]])
    after = lambda s: (np.sqrt(s.previous_T) + np.sqrt(1 - s.previous_T))[::-1]
    first = lambda s: np.float32(np.sqrt(s.abar_T[-1]) + np.sqrt(1 - s.abar_T[-1]))
    start = lambda s: dataclasses.replace(batch.patches, x_BxNxP=batch.patches.x_BxNxP / first(s))

    s = diffusion.respaced(full, "ddim10")
    predict, level_K = diffusion.predictions(guided, s, CELLS), np.append(s.level_T[::-1], 0)
    ddim = euler(lambda p: predict(p)[0], level_K, start(s), grids, after(s))

    s = diffusion.respaced(full, "6")
    predict, steps = diffusion.predictions(guided, s, CELLS), diffusion.ddim_steps(s, 1.0, learned=True)
    ancestral = stochastic(random_step(predict), steps, noise_MxBxNxP, start(s), grids, after(s))
    return {
        "DDIM by Euler, step by step": pointwise(ddim, io["ddim_traj"][:, :half, None]),
        "ancestral sampling, step by step": pointwise(ancestral, io["ddpm_traj"][:, :half, None]),
    }


# SiT


def sit_errors(golden_dir) -> dict[str, float]:
    p = published(golden_dir, "sit")
    io, out = p.io, {}
    config = of_size(sit_config.get_config("S/2"), p)
    model_velocity = make_velocity(make_model(config, CHANNELS), config)
    velocity = lambda patches, cond: model_velocity(p.params["dit"], patches, cond)[0]
    theirs_of = lambda v: -v  # x - e

    def laid(x, y, t):
        batch, cond, uncond, grids = p.lay(x[:, None], y)
        level_BxG = per_clip(1 - t, batch.patches.level_BxG.shape)
        return dataclasses.replace(batch.patches, level_BxG=level_BxG), cond, uncond, grids

    jitted = jax.jit(velocity)
    patches, cond, _, grids = laid(io["x"], io["y"], io["t"])
    out["forward"] = error(theirs_of(frames(jitted(patches, cond), grids)[:, 0]), io["out"])
    patches, cond, uncond, grids = laid(io["cfg_x"][:2], io["cfg_y"], io["cfg_t"][:2])
    three = diffusion.guided_channels(velocity, cond, uncond, float(io["cfg_scale"]), channels=3, cells=CELLS)
    out["guidance, three channels"] = error(theirs_of(frames(jax.jit(three)(patches), grids)[:, 0]), io["cfg_out"][:2])
    return out | transport_errors(golden_dir, laid, jitted) | sampler_errors(golden_dir, laid, velocity)


def transport_errors(golden_dir, laid, velocity) -> dict[str, float]:
    """The straight path, what a velocity says of score and noise, the losses by our own, and SiT's diffusions."""
    io, out = np.load(golden_dir / "sit/transport.npz"), {}
    theirs = {key.removeprefix("Linear/"): io[key] for key in io.files if key.startswith("Linear/")}
    s = 1 - io["t"]
    z, v = corrupt(*(a.reshape(5, 1, -1) for a in (io["x0"], io["x1"])), s[:, None])
    fake = io["fake_output"].reshape(5, 1, -1)
    wide = s[:, None, None]
    noise = z + (1 - wide) * -fake
    ours = {"xt": z, "ut": -v, "noise_from_velocity": noise, "score_from_velocity": -noise / wide}
    out |= {name: error(a, theirs[name].reshape(a.shape)) for name, a in ours.items()}
    for form in ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"):
        w = theirs[f"diffusion_{form.replace('increasing-', 'inccreasing-')}"].ravel()
        out[f"diffusion, {form}"] = error(sit.diffusion(form, io["t"], 1.3) + 0 * w, w + 0 * io["t"])

    def loss(v_hat, weight=1.0):
        return weight * np.array(
            [loss_sums(a[None], b[None], np.ones((1, 1)), c[None, None])["loss"] for a, b, c in zip(v_hat, v, s)]
        )

    # A network that gives noise, or the score -e / s, is one that gives our velocity, its error weighted.
    weights = {"none": (1 - s) ** 2, "velocity": 1.0, "likelihood": (1 - s) / s}
    for kind, e_hat in (("noise", fake), ("score", -fake * wide)):
        for name, weight in weights.items():
            ours = loss(to_velocity(e_hat, z, s[:, None], "e", s_min=0.0), weight)
            out[f"loss, {kind}, weighted {name}"] = error(ours, theirs[f"{kind}/{name}/loss_fake"])
    out["loss, velocity"] = error(loss(-fake), theirs["velocity/none/loss_fake"])
    patches, cond, _, grids = laid(np.asarray(z).reshape(io["x0"].shape), io["y"], io["t"])
    v_hat = frames(velocity(patches, cond), grids).reshape(5, 1, -1)
    out["loss of the model"] = error(loss(v_hat), theirs["velocity/none/loss_model"])
    return out


def sampler_errors(golden_dir, laid, velocity) -> dict[str, float]:
    """Trajectories from noise, t = 0, step by step: by our solvers, and by the random step."""
    io, out, zeros = np.load(golden_dir / "sit/samplers.npz"), {}, np.zeros(3, np.float32)
    patches, cond, _, grids = laid(io["z"], io["y"], zeros)
    of = lambda patches: velocity(patches, cond)
    level_K = np.linspace(1, 0, 6)
    for solver, name in (("euler", "ode_euler_n6"), ("heun_full", "ode_heun2_n6")):
        out[name] = pointwise(euler(of, level_K, patches, grids, solver=solver), io[name][1:, :, None])

    noise_MxBxNxP = np.stack([laid(n, io["y"], zeros)[0].x_BxNxP for n in (*io["sde_noises"], 0 * io["z"])])
    step = random_step(lambda p: (of(p), 0.0))
    for name in [name for name in io.files if name.startswith("sde_Euler_")]:
        _, _, form, last = name.split("_")
        steps = sit.sde_steps(6, form, last, size=0.04, start=1e-3 if form == "SBDM" else 0.0)
        ours, theirs = stochastic(step, steps, noise_MxBxNxP, patches, grids), io[name][:, :, None]
        # SBDM's first point is 100 times larger than the next, whose float32 is then no finer than 1e-5.
        out[name] = error(ours, theirs) if form == "SBDM" else pointwise(ours, theirs)

    patches, cond, uncond, grids = laid(io["cfg_z"][:2], io["cfg_y"], zeros[:2])
    three = diffusion.guided_channels(velocity, cond, uncond, float(io["cfg_scale"]), channels=3, cells=CELLS)
    ours = euler(three, level_K, patches, grids)
    return out | {"ode_euler_n6_cfg": pointwise(ours, io["ode_euler_n6_cfg"][1:, :2, None])}


# Latte


def latte_errors(golden_dir) -> dict[str, float]:
    p, full = published(golden_dir, "latte"), diffusion.linear_schedule()
    io, arrays, out = p.io, dict(np.load(golden_dir / "latte/latte_diffusion.npz")), {}
    out["forward"] = error(p.run(io["x"], levels(io["t"], (2, 1)), io["y"]), io["out"])
    batch, cond, uncond, grids = p.lay(io["cfg_x"][:1], io["cfg_y"])
    guided = diffusion.guided_channels(p.forward, cond, uncond, float(io["cfg_scale"]), channels=4, cells=CELLS)
    level_BxG = levels(io["cfg_t"][:1], batch.patches.level_BxG.shape)
    ours = frames(guided(dataclasses.replace(batch.patches, level_BxG=level_BxG)), grids)
    out["guidance, all channels"] = error(ours, io["cfg_out"][:1])
    out |= latte_block_errors(p)

    x, e, t = arrays["x_start"], arrays["noise"], arrays["t"]
    x_t = np.asarray(diffusion.q_sample(full, x, e, t))
    e_hat, f_hat = np.split(p.run(x_t, levels(t, (2, 1)), arrays["y"]), 2, 2)
    mse, bound = diffusion.losses(full, e_hat, f_hat, x, e, t)
    out |= {"loss, squared error": error(mse, arrays["mse"]), "loss, variational bound": error(bound, arrays["vb"])}

    s = diffusion.respaced(full, "ddim10")
    scale_T = np.sqrt(s.abar_T) + np.sqrt(1 - s.abar_T)
    batch, cond, uncond, grids = p.lay(arrays["ddim10_z"][:1] / np.float32(scale_T[-1]), arrays["ddim10_y"])
    guided = diffusion.guided_channels(p.forward, cond, uncond, float(arrays["ddim10_cfg"]), channels=4, cells=CELLS)
    predict = diffusion.predictions(guided, s, CELLS)
    level_K, after_M = np.append(s.level_T[::-1], 0), np.append(scale_T[-2::-1], 1)
    ddim = euler(lambda p: predict(p)[0], level_K, batch.patches, grids, after_M)
    return out | {"DDIM by Euler, step by step": pointwise(ddim, arrays["ddim10_traj"][:, :1])}


def latte_block_errors(p: Published) -> dict[str, float]:
    """Each block's output from the reference's input to it; a frame, then a place, is a row of its own."""
    io, w = p.io, p.params["dit"]
    (B, F), D = io["x"].shape[:2], p.model.width
    c = jax.nn.silu(sinusoids(io["t"], 256) @ w["level_in"] + w["level_in_bias"]) @ w["level_out"] + w["level_out_bias"]
    c_BxD = np.asarray(c + p.params["text"]["table"][io["y"]])
    x_nxP = np.concatenate([patchify(clip, (1, 2, 2))[0] for clip in np.moveaxis(io["x"], 2, -1)])
    h = (x_nxP @ w["patch"] + w["patch_bias"]).reshape(B * F, -1, D) + io["pos_embed"]
    one, out = jax.jit(lambda w, h, context: block(p.model, w, h, context, "all")), {}
    for i in range(p.model.depth):
        if i % 2:  # (frames, places) -> (places, frames), and back
            h = np.swapaxes(np.asarray(h).reshape(B, F, -1, D), 1, 2).reshape(-1, F, D)
            h = h + np.asarray(sincos(np.arange(F), D)) if i == 1 else h
        elif i:
            h = np.swapaxes(h.reshape(B, -1, F, D), 1, 2).reshape(B * F, -1, D)
        theirs = io[f"act_block{i}_{'temporal' if i % 2 else 'spatial'}"]
        context = plain_context(*h.shape[:2], np.repeat(c_BxD, len(h) // B, 0))
        out[f"block {i}"] = error(one(block_weights(p.params, i), h, context), theirs)
        h = theirs
    return out


def errors(golden_dir) -> dict[str, float]:
    """All of them, named by family."""
    families = {"DiT": dit_errors, "DDPM": ddpm_errors, "SiT": sit_errors, "Latte": latte_errors}
    return {f"{family}: {what}": e for family, of in families.items() for what, e in of(golden_dir).items()}
