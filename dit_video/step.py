"""One training step: the state, the optimizer, and the pure functions that a config makes of a model.

B rows, N patches per row, P values per patch, G groups per row, S text tokens per row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dit_video.codecs import make_codec
from dit_video.flow import BUCKETS, corrupt, draw_levels, first_late_step, loss_sums, named_key, patch_noise, per_patch
from dit_video.model import block_parameters, make_model
from dit_video.patches import Batch, Cond, Patches
from dit_video.sharding import along, check_layout
from dit_video.text import make_text
from dit_video.weights import lora
from dit_video.weights.diffusion import make_velocity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that a checkpoint needs beside the loader. params, ema: {'text': ..., 'dit': ...}.

    Where low-rank factors are trained, params and ema are {'lora': ...} alone, and frozen has the weights themselves.
    bad_steps: int32, steps in a row whose gradient was not finite; bad_total: all of them.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    bad_steps: jax.Array
    bad_total: jax.Array
    frozen: Any = dataclasses.field(default_factory=dict)


def make_schedule(config, peak: float):
    """Linear warm-up, a plateau, and a linear decay to 0 over the last `decay` share of the steps.

    The last `restart` share of the steps do not belong to these: there it rises to `restart_lr` of the peak, and falls.
    """
    o = config.optimizer
    again = int(o.restart * config.steps)
    steps, warm = config.steps - again, o.warmup
    down = int(o.decay * steps)
    parts = {
        0: optax.linear_schedule(peak / (warm + 1), peak, warm),
        warm: optax.constant_schedule(peak),
        max(steps - down, warm): optax.linear_schedule(peak, 0.0, max(down, 1)),
    }
    if again:
        second, begin = o.restart_lr * peak, max(steps, warm)
        parts[begin] = optax.linear_schedule(second / (warm + 1), second, warm)
        parts[begin + warm] = optax.linear_schedule(second, 0.0, max(again - warm, 1))
    return optax.join_schedules([*parts.values()], [*parts][1:])


def make_optimizer(config, model) -> optax.GradientTransformation:
    """AdamW, or Muon for the blocks' matrices (each layer's by itself) and AdamW for the rest.

    The text encoder learns at text_lr: at the blocks' rate what all tokens share outgrows the words within a hundred
    steps, and prompts are ignored from then on.
    """
    o = config.optimizer
    adamw = lambda peak: optax.adamw(make_schedule(config, peak), o.b1, o.b2, weight_decay=o.weight_decay)
    if o.kind == "adamw":
        blocks = {}
    elif o.kind == "muon":
        blocks = {f"block_{name}" for name, (_, shape, _) in block_parameters(model).items() if len(shape) == 3}
    else:
        raise ValueError(f"optimizer.kind={o.kind!r} is not known. Allowed: 'adamw', 'muon'.")
    each_layer = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    muon = optax.contrib.muon(
        make_schedule(config, o.muon_lr),
        weight_decay=o.weight_decay,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: each_layer, params),
    )

    def kind(path, _):
        return "text" if path[0].key == "text" else "muon" if path[-1].key in blocks else "rest"

    by_kind = {"muon": muon, "text": adamw(o.text_lr), "rest": adamw(o.lr)}
    update = optax.partition(by_kind, lambda params: jax.tree_util.tree_map_with_path(kind, params))
    return optax.chain(optax.clip_by_global_norm(o.clip), update)


@dataclasses.dataclass(frozen=True)
class Run:
    """The pure functions of a config, before any device is touched.

    init(key) -> State. whole(params, frozen) -> {'text', 'dit'}: what is trained and what is not, as one.
    sums(params, batch, key, frozen, late) -> gradient of the loss' sum, sums: what data parallel forms add up; late:
    whether the keys that are named `late_` hold.
    update(state, gradient, sums) -> state, metrics, from global sums. step(state, batch, key) is both. evaluate(params,
    batch, key, frozen) -> sums at fixed levels.
    """

    config: Any
    codec: Any
    text: Any
    model: Any
    optimizer: optax.GradientTransformation
    init: Any
    whole: Any
    sums: Any
    update: Any
    step: Any
    evaluate: Any


def make_run(config, mesh=None) -> Run:
    """Builds what `train` jits. Raises ValueError for a config that cannot be run, or not on this mesh.

    mesh: what the arrays will lie along (`sharding.py`); None = one device, or rows alone along devices.
    """
    if mesh is not None:
        check_layout(config, mesh)
        mesh = mesh if mesh.size > 1 else None
    codec, text = make_codec(config.codec), make_text(config.text)
    model = make_model(config, codec.channels, span=config.data.max_tokens, mesh=mesh)
    optimizer, velocity = make_optimizer(config, model), make_velocity(model, config)
    abstract = abstract_batch(config, model, text)

    def init(key) -> State:
        batch = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)
        text_params = text.module.init(named_key(key, "text"), batch.ids_BxSxK, batch.prompt_BxS).get("params", {})
        text_BxSxE = text.module.apply({"params": text_params}, batch.ids_BxSxK, batch.prompt_BxS)
        # Models that are shown an image are made as all others; no task lays out its tokens yet.
        image_BxIxE = jnp.zeros((config.data.rows, 1, model.image_width))
        image = (image_BxIxE, jnp.zeros((config.data.rows, 1), jnp.int32)) if model.image_width else ()
        cond = Cond(text_BxSxE, batch.prompt_BxS, *image)
        dit_params = model.init(named_key(key, "dit"), batch.patches, cond)["params"]
        params, frozen = {"text": text_params, "dit": dit_params}, {}
        if config.lora.rank:
            params, frozen = {"lora": lora.init(named_key(key, "lora"), model, config)}, params
        # Buffers are donated, so the average must not share the parameters' own.
        ema = jax.tree.map(jnp.copy, params)
        zero = jnp.zeros((), jnp.int32)
        return State(zero, params, ema, optimizer.init(params), zero, zero, frozen)

    def whole(params, frozen):
        if not config.lora.rank:
            return params
        return frozen | {"dit": lora.merge(frozen["dit"], params["lora"], lora.scale(config))}

    def errors(params, batch: Batch, patches: Patches, weight_BxG, key, drop_BxS):
        """Sums of the loss of `patches`, which have their levels, with noise from `key`."""
        clean_BxNxP = jnp.where((patches.seg_BxN != 0)[..., None], patches.x_BxNxP, 0)
        noise_BxNxP = patch_noise(named_key(key, "noise"), patches.uid_BxN, clean_BxNxP.shape[-1])
        level_BxN = per_patch(patches.level_BxG, patches)
        z_BxNxP, target_BxNxP = corrupt(noise_BxNxP, clean_BxNxP, level_BxN)
        ids, prompt_BxS = text.drop(batch.ids_BxSxK, batch.prompt_BxS, drop_BxS)
        text_params = jax.tree.map(lambda w: along(mesh, w), params["text"])  # small: gathered as one
        cond = Cond(text.module.apply({"params": text_params}, ids, prompt_BxS), prompt_BxS)
        v_BxNxP, _ = velocity(params["dit"], dataclasses.replace(patches, x_BxNxP=z_BxNxP), cond)
        weight_BxN = jnp.where(patches.seg_BxN != 0, per_patch(weight_BxG, patches), 0)
        if config.model.predict == "ddpm":  # its error of e, as it was trained: the velocity's is 1 / (1 - s) of it
            weight_BxN *= jnp.square(1 - level_BxN)
        return loss_sums(v_BxNxP, target_BxNxP, weight_BxN, level_BxN)

    def loss(params, batch: Batch, key, frozen, late):
        params = whole(params, frozen)
        late = late if config.late else None
        patches, weight_BxG = draw_levels(named_key(key, "levels"), batch.patches, config.flow, late)
        drop_BxS = drop_prompts(named_key(key, "text"), batch, config.text.dropout)
        sums = errors(params, batch, patches, weight_BxG, key, drop_BxS)
        # What is real of the batch is counted where all of it is: each process has its own rows alone.
        sums["patches"], sums["text"] = jnp.count_nonzero(patches.seg_BxN), jnp.count_nonzero(batch.prompt_BxS)
        sums["clips"] = patches.seg_BxN.max(1).sum()
        return sums["loss"], sums

    def evaluate(params, batch: Batch, key, frozen=None):
        """Sums at the levels in the middle of the buckets, each clip at one of them by its name."""
        params = whole(params, frozen)
        p = batch.patches
        level_BxG = (p.clip_BxG % BUCKETS + 0.5) / BUCKETS
        patches = dataclasses.replace(p, level_BxG=level_BxG.astype(jnp.float32))
        weight_BxG = (p.seg_BxG != 0).astype(jnp.float32)
        return errors(params, batch, patches, weight_BxG, key, jnp.zeros(batch.prompt_BxS.shape, bool))

    def gradient_sums(params, batch: Batch, key, frozen=None, late=False):
        """Sums over the batch, in config.optimizer.accumulate parts one after the other."""
        parts = config.optimizer.accumulate
        gradient = jax.grad(loss, has_aux=True)
        if parts == 1:
            return gradient(params, batch, key, frozen, late)
        # Every parts-th row, so that each part still has rows on every device.
        split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
        one = jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], split), key, frozen, late)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), one)
        add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(params, part, key, frozen, late)), None)
        return jax.lax.scan(add, zeros, split)[0]

    def update(state: State, gradient, sums):
        """One update from the global sums. A gradient that is not finite moves the step on and nothing else."""
        gradient = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1), gradient)
        norm = optax.tree.norm(gradient)
        good = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])

        def move(old):
            updates, opt_state = optimizer.update(gradient, old[2], old[0])
            params = optax.apply_updates(old[0], updates)
            decay = jnp.minimum(config.optimizer.ema, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, old[1], params)
            return params, ema, opt_state

        opt_state = state.opt_state
        if config.optimizer.offload:  # it comes from the host, and goes back there by the step's out_shardings
            opt_state = jax.device_put(opt_state, jax.memory.Space.Device)
        old = (state.params, state.ema, opt_state)
        params, ema, opt_state = jax.lax.cond(good, move, lambda old: old, old)
        bad = jnp.where(good, 0, state.bad_steps + 1)
        state = State(state.step + 1, params, ema, opt_state, bad, state.bad_total + ~good, state.frozen)
        return state, sums | {"gradient_norm": norm, "bad_steps": bad, "bad_total": state.bad_total}

    def step(state: State, batch: Batch, key):
        key, late = jax.random.fold_in(key, state.step), state.step >= first_late_step(config)
        gradient, sums = gradient_sums(state.params, batch, key, state.frozen, late)
        return update(state, gradient, sums)

    return Run(config, codec, text, model, optimizer, init, whole, gradient_sums, update, step, evaluate)


def abstract_batch(config, model, text) -> Batch:
    """The global batch's shapes and dtypes."""
    d, ids = config.data, text.tokenise("")
    shape = lambda *dims, dtype=jnp.int32: jax.ShapeDtypeStruct((d.rows, *dims), dtype)
    N, G, f32, u32 = d.length, d.groups, jnp.float32, jnp.uint32
    patches = Patches(
        x_BxNxP=shape(N, model.patch_values, dtype=f32),
        pos_BxNx3=shape(N, 3, dtype=f32),
        seg_BxN=shape(N),
        frame_BxN=shape(N),
        group_BxN=shape(N),
        prompt_BxN=shape(N),
        uid_BxN=shape(N, dtype=u32),
        level_BxG=shape(G, dtype=f32),
        seg_BxG=shape(G),
        clip_BxG=shape(G, dtype=u32),
        canvas_BxGx3=shape(G, 3, dtype=f32),
    )
    return Batch(patches, shape(d.text_length, ids.shape[1], dtype=ids.dtype), shape(d.text_length))


def drop_prompts(key, batch: Batch, share: float):
    """drop_BxS: the tokens of the clips that train without their prompt, each drawn by its clip's name."""
    p = batch.patches
    coin_BxG = jax.vmap(jax.vmap(lambda uid: jax.random.uniform(jax.random.fold_in(key, uid))))(p.clip_BxG)
    dropped_BxG = (coin_BxG < share) & (p.seg_BxG != 0)
    return (dropped_BxG[:, None, :] & (batch.prompt_BxS[:, :, None] == p.seg_BxG[:, None, :])).any(-1)
