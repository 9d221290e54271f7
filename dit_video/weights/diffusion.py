"""Diffusion as DiT and Latte are trained and sampled with it (DDPM), in levels too; and random steps, SiT's among them.

T timesteps of a schedule, M steps, B rows, N patches per row, P values per patch, O of the output, G groups per row.

Theirs: x_t = alpha x + sigma e, alpha^2 + sigma^2 = 1; the network gives e and, in the second half of its channels, f,
which places the variance between two bounds. Ours: z = (1 - s) x + s e. So s = sigma / (alpha + sigma) and
z = x_t / (alpha + sigma), and the last timestep lies at s < 1. In the functions of x, e and t, t is an array of
indices in the schedule whose axes are the first ones of x.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.attention import spread
from dit_video.model import DiT, split_output
from dit_video.model import make_velocity as model_velocity
from dit_video.patches import Patches


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Timesteps in order of growing noise, float64, host only. timestep_T: what the network gets; abar_T: alpha^2."""

    timestep_T: np.ndarray
    abar_T: np.ndarray

    @property
    def previous_T(self) -> np.ndarray:
        """alpha^2 one step nearer to the data."""
        return np.append(1.0, self.abar_T[:-1])

    @property
    def beta_T(self) -> np.ndarray:
        return 1 - self.abar_T / self.previous_T

    @property
    def posterior_variance_T(self) -> np.ndarray:
        """The variance of x_{t-1} given x_t and x (Ho et al. 2020, eq. 7)."""
        return self.beta_T * (1 - self.previous_T) / (1 - self.abar_T)

    @property
    def level_T(self) -> np.ndarray:
        """s = sigma / (alpha + sigma)."""
        return np.sqrt(1 - self.abar_T) / (np.sqrt(self.abar_T) + np.sqrt(1 - self.abar_T))


def linear_schedule(steps: int = 1000) -> Schedule:
    """beta from 1e-4 to 0.02 in equal steps (Ho et al. 2020, sec. 4)."""
    return Schedule(np.arange(steps), np.cumprod(1 - np.linspace(1e-4, 0.02, steps)))


def respaced(schedule: Schedule, spacing: str) -> Schedule:
    """Fewer timesteps of a schedule: '250', equally spaced from the first to the last (Nichol and Dhariwal 2021,
    sec. 4); 'ddim50', every T/50-th from the first (Song et al. 2021).

    Raises ValueError for a number that the schedule does not have, or that does not divide it ('ddim').
    """
    T, every = len(schedule.abar_T), spacing.startswith("ddim")
    count = int(spacing.removeprefix("ddim"))
    if not 2 <= count <= T or (every and T % count):
        raise ValueError(f"{spacing!r} of {T} timesteps: give 2 to {T}, after 'ddim' a divisor of {T}.")
    kept = np.arange(0, T, T // count) if every else np.round(np.arange(count) * (T - 1) / (count - 1)).astype(int)
    return Schedule(schedule.timestep_T[kept], schedule.abar_T[kept])


# As it is trained


def _at(table_T, t_, x_):
    """The table's float32 entries at t, with as many axes as x."""
    return jnp.asarray(table_T, jnp.float32)[t_].reshape(*np.shape(t_), *[1] * (np.ndim(x_) - np.ndim(t_)))


def q_sample(schedule: Schedule, x_, e_, t_):
    """x_t = alpha x + sigma e (Ho et al. 2020, eq. 4)."""
    return _at(np.sqrt(schedule.abar_T), t_, x_) * x_ + _at(np.sqrt(1 - schedule.abar_T), t_, x_) * e_


def clean(schedule: Schedule, x_t_, e_, t_):
    """x from x_t and e: the inverse of `q_sample`."""
    return (x_t_ - _at(np.sqrt(1 - schedule.abar_T), t_, x_t_) * e_) / _at(np.sqrt(schedule.abar_T), t_, x_t_)


def posterior(schedule: Schedule, x_, x_t_, t_):
    """The mean and the log-variance of x_{t-1} given x_t and x (Ho et al. 2020, eqs. 6 and 7).

    The variance at t = 0 is 0; its logarithm takes the next one's place (Nichol and Dhariwal 2021).
    """
    s = schedule
    of_x_T = np.sqrt(s.previous_T) * s.beta_T / (1 - s.abar_T)
    of_x_t_T = np.sqrt(1 - s.beta_T) * (1 - s.previous_T) / (1 - s.abar_T)
    log_variance = _at(np.log(s.posterior_variance_T[np.maximum(np.arange(len(s.abar_T)), 1)]), t_, x_)
    return _at(of_x_T, t_, x_) * x_ + _at(of_x_t_T, t_, x_) * x_t_, log_variance


def learned_log_variance(schedule: Schedule, f_, t_):
    """log beta at f = 1, the posterior's at f = -1, and on the line between (Nichol and Dhariwal 2021, eq. 15)."""
    low, high = posterior(schedule, f_, f_, t_)[1], _at(np.log(schedule.beta_T), t_, f_)
    return low + (f_ + 1) / 2 * (high - low)


def losses(schedule: Schedule, e_hat_, f_hat_, x_, e_, t_):
    """(squared error of e, variational bound in bits), each the mean over x's axes after t's: DiT trains on their sum.

    The bound is the KL divergence to the posterior, at t = 0 the likelihood of x in 256 steps over [-1, 1]; its
    gradient reaches f alone (Nichol and Dhariwal 2021, eq. 16).
    """
    axes = tuple(range(np.ndim(t_), np.ndim(x_)))
    x_t_ = q_sample(schedule, x_, e_, t_)
    mean, log_variance = posterior(schedule, x_, x_t_, t_)
    x_hat_ = clean(schedule, x_t_, jax.lax.stop_gradient(e_hat_), t_)
    mean_hat, log_variance_hat = posterior(schedule, x_hat_, x_t_, t_)[0], learned_log_variance(schedule, f_hat_, t_)
    kl = gaussian_kl(mean, log_variance, mean_hat, log_variance_hat)
    bound = jnp.where(
        _at(np.arange(len(schedule.abar_T)), t_, x_) == 0, nll_256(x_, mean_hat, log_variance_hat / 2), kl
    )
    return jnp.square(e_ - e_hat_).mean(axes), bound.mean(axes) / np.log(2)


def gaussian_kl(mean_p, log_variance_p, mean_q, log_variance_q):
    """KL(p || q) of two normal distributions, in nats, value by value."""
    ratio = jnp.exp(log_variance_p - log_variance_q)
    distance = jnp.square(mean_p - mean_q) * jnp.exp(-log_variance_q)
    return (ratio + distance - 1 + log_variance_q - log_variance_p) / 2


def nll_256(x_, mean_, log_deviation_):
    """-log of a normal's mass around x, in nats: the bin of width 2/255, open beyond -1 and 1 (Ho et al. 2020, eq. 13).

    The normal's distribution function by its tanh approximation, as the published bound has it: a logistic function,
    so that the bin's mass, a difference of two, is a product: sigmoid(p) sigmoid(-q) (1 - exp(q - p)).
    """
    a, b = ((x_ + h - mean_) * jnp.exp(-log_deviation_) for h in (1 / 255, -1 / 255))
    p, q = (np.sqrt(8 / np.pi) * (c + 0.044715 * c**3) for c in (a, b))
    apart = np.sqrt(8 / np.pi) * (2 / 255) * jnp.exp(-log_deviation_) * (1 + 0.044715 * (a * a + a * b + b * b))
    below, above = jax.nn.log_sigmoid(p), jax.nn.log_sigmoid(-q)
    inside = below + above + jnp.log(-jnp.expm1(-apart))
    return -jnp.maximum(jnp.where(x_ < -0.999, below, jnp.where(x_ > 0.999, above, inside)), np.log(1e-12))


# As it is sampled


def guided_channels(forward: Callable, cond, uncond, scale: float, channels: int, cells: int) -> Callable:
    """Guidance as published: only the first `channels` of each latent are guided, 3 in DiT and SiT, 4 in Latte.

    forward takes (patches, cond) and gives the raw output, of `cells` latents per patch; so does what is returned,
    from patches alone. The channels left, and the variances, are the condition's own.
    """

    def guided(patches: Patches):
        rows, conds = jax.tree.map(lambda *halves: jnp.concatenate(halves), (patches, cond), (patches, uncond))
        c_BxNxO, u_BxNxO = jnp.split(forward(rows, conds), 2)
        O = c_BxNxO.shape[-1]
        return jnp.where(np.arange(O) % (O // cells) < channels, u_BxNxO + scale * (c_BxNxO - u_BxNxO), c_BxNxO)

    return guided


def predictions(forward: Callable, schedule: Schedule, cells: int) -> Callable:
    """From a network trained by `losses` to (v_BxNxP, share_BxNxP): our velocity, and (f + 1) / 2.

    forward takes patches that hold x_t, whose level is t / 1000, and gives its raw output. Between the schedule's
    levels the timestep is interpolated; a level above the last is taken for the last.
    """
    # The share of data, 1 - s, is looked up: near s = 1 the difference would lose half of float32's digits.
    level, time, data = (
        np.append(first, table).astype(np.float32)
        for first, table in ((0, schedule.level_T), (0, schedule.timestep_T / 1000), (1, 1 - schedule.level_T))
    )

    def predict(patches: Patches):
        data_BxG = jnp.interp(patches.level_BxG, level, data)
        scale_BxG = jax.lax.rsqrt(jnp.square(patches.level_BxG) + jnp.square(data_BxG))  # alpha + sigma
        data_BxNx1, scale_BxNx1 = (spread(a[..., None], patches.group_BxN) for a in (data_BxG, scale_BxG))
        z_BxNxP = patches.x_BxNxP
        told = dataclasses.replace(
            patches, x_BxNxP=z_BxNxP * scale_BxNx1, level_BxG=jnp.interp(patches.level_BxG, level, time)
        )
        e_BxNxP, f_BxNxP = split_output(forward(told), z_BxNxP.shape[-1], cells)
        # Above the last level x_t is what it would be there, and z too: else the velocity from pure noise lacks e.
        last_BxG = jnp.sqrt(level[-1] ** 2 + data[-1] ** 2) * scale_BxG
        last_BxNx1 = spread(jnp.where(patches.level_BxG > level[-1], last_BxG, 1)[..., None], patches.group_BxN)
        return (e_BxNxP - z_BxNxP * last_BxNx1) / data_BxNx1, (f_BxNxP + 1) / 2

    return predict


def make_velocity(model: DiT, config):
    """`model.make_velocity` of every config: where model.predict is 'ddpm', by `predictions` from DiT's schedule."""
    if config.model.predict != "ddpm":
        return model_velocity(model, config)
    schedule, cells = linear_schedule(), int(np.prod(config.model.patch))

    def velocity(params, patches: Patches, cond, cache=None):
        if cache is not None:
            raise ValueError("model.predict='ddpm' has no frame-causal mode: its levels are not those of a cache.")
        forward = lambda told: model.apply({"params": params}, told, cond).astype(jnp.float32)
        return predictions(forward, schedule, cells)(patches)[0], None

    return velocity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """M steps of a sampler from level_M to next_M: z' = data x + noise e + fresh * reach^share * n, n ~ N(0, 1).

    x and e are what the velocity at z says that z is made of. reach: by which factor a learned share of 1 widens the
    fresh noise; 1 where it is not learned.
    """

    level_M: np.ndarray
    next_M: np.ndarray
    data_M: np.ndarray
    noise_M: np.ndarray
    fresh_M: np.ndarray
    reach_M: np.ndarray


def ddim_steps(schedule: Schedule, eta: float = 0.0, learned: bool = False) -> Steps:
    """DDIM from the last timestep to the data (Song et al. 2021, eq. 12); eta = 0 is Euler's method in our levels.

    eta = 1 with learned variances is ancestral sampling (Ho et al. 2020, alg. 2; Nichol and Dhariwal 2021, eq. 15).
    """
    s = schedule
    scale_T = np.sqrt(s.previous_T) + np.sqrt(1 - s.previous_T)
    fresh_T = eta * np.sqrt(s.posterior_variance_T)
    reach_T = np.sqrt(s.beta_T / np.where(fresh_T > 0, s.posterior_variance_T, s.beta_T))
    columns = (
        s.level_T,
        np.append(0, s.level_T[:-1]),
        np.sqrt(s.previous_T) / scale_T,
        np.sqrt(1 - s.previous_T - fresh_T**2) / scale_T,
        fresh_T / scale_T,
        reach_T if learned else np.ones_like(reach_T),
    )
    return Steps(*(column[::-1].astype(np.float32) for column in columns))


def stochastic_step(step: Steps, z_, v_, share_, n_):
    """One step from z with velocity v and fresh noise n: DDIM's, ancestral DDPM's or SiT's, by its coefficients."""
    x_, e_ = z_ - step.level_M * v_, z_ + (1 - step.level_M) * v_
    return step.data_M * x_ + step.noise_M * e_ + step.fresh_M * step.reach_M**share_ * n_


def sample_stochastic(predict: Callable, patches: Patches, steps: Steps, n_MxBxNxP) -> Patches:
    """The patches after M steps; all groups share each step's level. predict(patches) gives (v_BxNxP, share)."""

    def one(patches, row):
        step, n_BxNxP = row
        patches = dataclasses.replace(patches, level_BxG=jnp.full_like(patches.level_BxG, step.level_M))
        x_BxNxP = stochastic_step(step, patches.x_BxNxP, *predict(patches), n_BxNxP)
        x_BxNxP = jnp.where((patches.seg_BxN == 0)[..., None], patches.x_BxNxP, x_BxNxP)
        level_BxG = jnp.full_like(patches.level_BxG, step.next_M)
        return dataclasses.replace(patches, x_BxNxP=x_BxNxP, level_BxG=level_BxG), None

    return jax.lax.scan(one, patches, (steps, n_MxBxNxP))[0]
