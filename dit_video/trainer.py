"""Training: the state, one pure step, and the loop `train(config, workdir)`.

B rows, N patches per row, P values per patch, G groups per row, S text tokens per row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dit_video.codecs import make_codec
from dit_video.flow import corrupt, draw_levels, loss_sums, named_key, patch_noise, per_patch
from dit_video.model import block_parameters, make_model, make_velocity
from dit_video.patches import Batch, Cond
from dit_video.text import make_text

MAX_BAD_STEPS = 10


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that a checkpoint needs beside the loader. params, ema: {'text': ..., 'dit': ...}.

    bad_steps: int32, steps in a row whose gradient was not finite; bad_total: all of them.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    bad_steps: jax.Array
    bad_total: jax.Array


def make_schedule(config, peak: float):
    """Linear warm-up, a plateau, and a linear decay to 0 over the last `decay` share of the steps."""
    warm, down = config.optimizer.warmup, int(config.optimizer.decay * config.steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / (warm + 1), peak, warm),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, max(down, 1)),
        ],
        [warm, max(config.steps - down, warm)],
    )


def make_optimizer(config, model) -> optax.GradientTransformation:
    """AdamW, or Muon for the blocks' matrices (each of the L layers orthogonalised by itself) and AdamW for the rest."""
    o = config.optimizer
    adamw = dict(b1=o.b1, b2=o.b2)
    if o.kind == "adamw":
        update = optax.adamw(make_schedule(config, o.lr), weight_decay=o.weight_decay, **adamw)
    elif o.kind == "muon":
        matrices = {f"block_{name}" for name, (_, shape, _) in block_parameters(model).items() if len(shape) == 3}
        each_layer = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        update = optax.contrib.muon(
            make_schedule(config, o.muon_lr),
            weight_decay=o.weight_decay,
            adam_learning_rate=make_schedule(config, o.lr),
            adam_b1=o.b1,
            adam_b2=o.b2,
            adam_weight_decay=o.weight_decay,
            muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: each_layer if path[-1].key in matrices else None, params
            ),
        )
    else:
        raise ValueError(f"optimizer.kind={o.kind!r} is not known. Allowed: 'adamw', 'muon'.")
    return optax.chain(optax.clip_by_global_norm(o.clip), update)


def make_step(config, model, text, optimizer):
    """(init, gradient_sums, train_step) of a config: pure functions.

    init(key, batch) -> State. gradient_sums(params, batch, key) -> gradient of the loss' sum, sums: what data
    parallel forms add up. train_step(state, batch, key) -> state, metrics.
    """
    velocity = make_velocity(model, config)

    def init(key, batch: Batch) -> State:
        text_key, dit_key = named_key(key, "text"), named_key(key, "dit")
        text_params = text.module.init(text_key, batch.ids_BxSxK, batch.prompt_BxS)["params"]
        text_BxSxE = text.module.apply({"params": text_params}, batch.ids_BxSxK, batch.prompt_BxS)
        dit_params = model.init(dit_key, batch.patches, Cond(text_BxSxE, batch.prompt_BxS))["params"]
        params = {"text": text_params, "dit": dit_params}
        # Buffers are donated, so the average must not share the parameters' own.
        ema = jax.tree.map(jnp.copy, params)
        zero = jnp.zeros((), jnp.int32)
        return State(zero, params, ema, optimizer.init(params), zero, zero)

    def loss(params, batch: Batch, key):
        patches, weight_BxG = draw_levels(named_key(key, "levels"), batch.patches, config.flow)
        clean_BxNxP = jnp.where((patches.seg_BxN != 0)[..., None], patches.x_BxNxP, 0)
        noise_BxNxP = patch_noise(named_key(key, "noise"), patches.uid_BxN, clean_BxNxP.shape[-1])
        level_BxN = per_patch(patches.level_BxG, patches)
        z_BxNxP, target_BxNxP = corrupt(noise_BxNxP, clean_BxNxP, level_BxN)
        cond = encode(params["text"], batch, drop_prompts(named_key(key, "text"), batch, config.text.dropout))
        v_BxNxP = velocity(params["dit"], dataclasses.replace(patches, x_BxNxP=z_BxNxP), cond)
        weight_BxN = jnp.where(patches.seg_BxN != 0, per_patch(weight_BxG, patches), 0)
        sums = loss_sums(v_BxNxP, target_BxNxP, weight_BxN, level_BxN)
        return sums["loss"], sums

    def encode(params, batch: Batch, drop_BxS) -> Cond:
        ids, prompt_BxS = text.drop(batch.ids_BxSxK, batch.prompt_BxS, drop_BxS)
        return Cond(text.module.apply({"params": params}, ids, prompt_BxS), prompt_BxS)

    def gradient_sums(params, batch: Batch, key):
        """Sums over the batch, in config.optimizer.accumulate parts one after the other."""
        parts = config.optimizer.accumulate
        gradient = jax.grad(loss, has_aux=True)
        if parts == 1:
            return gradient(params, batch, key)
        # Every parts-th row, so that each part still has rows on every device.
        split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
        add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(params, part, key)), None)
        zeros = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype),
            jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], split), key),
        )
        return jax.lax.scan(add, zeros, split)[0]

    def apply_sums(state: State, gradient, sums):
        """One update from the global sums. A gradient that is not finite moves the step on and nothing else."""
        gradient = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1), gradient)
        norm = optax.tree.norm(gradient)
        good = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.optimizer.ema, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, params)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        state = State(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(ema, state.ema),
            opt_state=keep(opt_state, state.opt_state),
            bad_steps=jnp.where(good, 0, state.bad_steps + 1),
            bad_total=state.bad_total + ~good,
        )
        return state, sums | {"gradient_norm": norm, "bad_steps": state.bad_steps, "bad_total": state.bad_total}

    def train_step(state: State, batch: Batch, key):
        gradient, sums = gradient_sums(state.params, batch, jax.random.fold_in(key, state.step))
        return apply_sums(state, gradient, sums)

    return init, loss, gradient_sums, apply_sums, train_step


def drop_prompts(key, batch: Batch, share: float):
    """drop_BxS: the tokens of the clips that train without their prompt, each drawn by its clip's name."""
    p = batch.patches
    coin_BxG = jax.vmap(jax.vmap(lambda uid: jax.random.uniform(jax.random.fold_in(key, uid))))(p.clip_BxG)
    dropped_BxG = (coin_BxG < share) & (p.seg_BxG != 0)
    return (dropped_BxG[:, None, :] & (batch.prompt_BxS[:, :, None] == p.seg_BxG[:, None, :])).any(-1)
