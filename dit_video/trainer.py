"""Training: the state, one pure step, and the loop `train(config, workdir)`.

B rows, N patches per row, P values per patch, G groups per row, S text tokens per row.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import platform
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from dit_video import generate
from dit_video.checkpoint import Checkpoints
from dit_video.codecs import make_codec
from dit_video.data.loader import fill, make_loader, make_source
from dit_video.flow import BUCKETS, corrupt, draw_levels, loss_sums, named_key, patch_noise, per_patch
from dit_video.gallery import Sample, grow
from dit_video.metrics import MetricsWriter, Progress
from dit_video.model import block_parameters, macs, make_model, make_velocity
from dit_video.patches import Batch, Cond, Patches
from dit_video.sharding import batch_sharding, global_batch, make_mesh, state_shardings
from dit_video.tasks import Request
from dit_video.text import make_text

MAX_BAD_STEPS = 10
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved after SIGTERM or SIGINT; the same command goes on


class Preempted(SystemExit):
    """The run was asked to stop and has saved; the same command resumes it."""

    def __init__(self):
        super().__init__(EXIT_PREEMPTED)


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

    init(key) -> State. sums(params, batch, key) -> gradient of the loss' sum, sums: what data parallel forms add up.
    update(state, gradient, sums) -> state, metrics, from global sums. step(state, batch, key) is both. evaluate(params,
    batch, key) -> sums at fixed levels.
    """

    config: Any
    codec: Any
    text: Any
    model: Any
    optimizer: optax.GradientTransformation
    init: Any
    sums: Any
    update: Any
    step: Any
    evaluate: Any


def make_run(config) -> Run:
    """Builds what `train` jits. Raises ValueError for a config that cannot be run."""
    codec, text = make_codec(config.codec), make_text(config.text)
    model = make_model(config, codec.channels, span=config.data.max_tokens)
    optimizer, velocity = make_optimizer(config, model), make_velocity(model, config)
    abstract = abstract_batch(config, model, text)

    def init(key) -> State:
        batch = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)
        text_params = text.module.init(named_key(key, "text"), batch.ids_BxSxK, batch.prompt_BxS)["params"]
        text_BxSxE = text.module.apply({"params": text_params}, batch.ids_BxSxK, batch.prompt_BxS)
        dit_params = model.init(named_key(key, "dit"), batch.patches, Cond(text_BxSxE, batch.prompt_BxS))["params"]
        params = {"text": text_params, "dit": dit_params}
        # Buffers are donated, so the average must not share the parameters' own.
        ema = jax.tree.map(jnp.copy, params)
        zero = jnp.zeros((), jnp.int32)
        return State(zero, params, ema, optimizer.init(params), zero, zero)

    def errors(params, batch: Batch, patches: Patches, weight_BxG, key, drop_BxS):
        """Sums of the loss of `patches`, which have their levels, with noise from `key`."""
        clean_BxNxP = jnp.where((patches.seg_BxN != 0)[..., None], patches.x_BxNxP, 0)
        noise_BxNxP = patch_noise(named_key(key, "noise"), patches.uid_BxN, clean_BxNxP.shape[-1])
        level_BxN = per_patch(patches.level_BxG, patches)
        z_BxNxP, target_BxNxP = corrupt(noise_BxNxP, clean_BxNxP, level_BxN)
        ids, prompt_BxS = text.drop(batch.ids_BxSxK, batch.prompt_BxS, drop_BxS)
        cond = Cond(text.module.apply({"params": params["text"]}, ids, prompt_BxS), prompt_BxS)
        v_BxNxP = velocity(params["dit"], dataclasses.replace(patches, x_BxNxP=z_BxNxP), cond)
        weight_BxN = jnp.where(patches.seg_BxN != 0, per_patch(weight_BxG, patches), 0)
        return loss_sums(v_BxNxP, target_BxNxP, weight_BxN, level_BxN)

    def loss(params, batch: Batch, key):
        patches, weight_BxG = draw_levels(named_key(key, "levels"), batch.patches, config.flow)
        drop_BxS = drop_prompts(named_key(key, "text"), batch, config.text.dropout)
        sums = errors(params, batch, patches, weight_BxG, key, drop_BxS)
        return sums["loss"], sums

    def evaluate(params, batch: Batch, key):
        """Sums at the levels in the middle of the buckets, each clip at one of them by its name."""
        p = batch.patches
        level_BxG = (p.clip_BxG % BUCKETS + 0.5) / BUCKETS
        patches = dataclasses.replace(p, level_BxG=level_BxG.astype(jnp.float32))
        weight_BxG = (p.seg_BxG != 0).astype(jnp.float32)
        return errors(params, batch, patches, weight_BxG, key, jnp.zeros(batch.prompt_BxS.shape, bool))

    def gradient_sums(params, batch: Batch, key):
        """Sums over the batch, in config.optimizer.accumulate parts one after the other."""
        parts = config.optimizer.accumulate
        gradient = jax.grad(loss, has_aux=True)
        if parts == 1:
            return gradient(params, batch, key)
        # Every parts-th row, so that each part still has rows on every device.
        split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
        one = jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], split), key)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), one)
        add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(params, part, key)), None)
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

        old = (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.lax.cond(good, move, lambda old: old, old)
        bad = jnp.where(good, 0, state.bad_steps + 1)
        state = State(state.step + 1, params, ema, opt_state, bad, state.bad_total + ~good)
        return state, sums | {"gradient_norm": norm, "bad_steps": bad, "bad_total": state.bad_total}

    def step(state: State, batch: Batch, key):
        gradient, sums = gradient_sums(state.params, batch, jax.random.fold_in(key, state.step))
        return update(state, gradient, sums)

    return Run(config, codec, text, model, optimizer, init, gradient_sums, update, step, evaluate)


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
    )
    return Batch(patches, shape(d.text_length, ids.shape[1], dtype=ids.dtype), shape(d.text_length))


def drop_prompts(key, batch: Batch, share: float):
    """drop_BxS: the tokens of the clips that train without their prompt, each drawn by its clip's name."""
    p = batch.patches
    coin_BxG = jax.vmap(jax.vmap(lambda uid: jax.random.uniform(jax.random.fold_in(key, uid))))(p.clip_BxG)
    dropped_BxG = (coin_BxG < share) & (p.seg_BxG != 0)
    return (dropped_BxG[:, None, :] & (batch.prompt_BxS[:, :, None] == p.seg_BxG[:, None, :])).any(-1)


def check_config(config) -> None:
    """Raises ValueError for values that would fail, or be of no effect, only once the run is under way."""
    for name in ("steps", "log_every", "checkpoint_every", "keep"):
        if config[name] < 1:
            raise ValueError(f"{name}={config[name]} must be at least 1.")
    rows, parts = config.data.rows, config.optimizer.accumulate
    if parts < 1 or rows % parts or (rows // parts) % jax.device_count():
        raise ValueError(
            f"data.rows={rows} do not split into optimizer.accumulate={parts} parts over {jax.device_count()} devices."
        )
    for name, value in (("text.dropout", config.text.dropout), ("optimizer.decay", config.optimizer.decay)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is a share: give 0 to 1.")


def train(config, workdir) -> State:
    """Trains `config` in `workdir` from its newest checkpoint, or from the start; returns the last State.

    Leaves there: config.json, versions.json, checkpoints/, metrics.jsonl, tensorboard/, gallery/index.html and, at
    the end, weights.safetensors. Typed again it resumes; a finished run says so and returns. After SIGTERM or SIGINT
    it saves and raises Preempted (exit code 75). Raises FloatingPointError after ten bad gradients in a row, and
    ValueError for a config that cannot run, or that is not the one the workdir was begun with.
    """
    # The config.
    check_config(config)
    workdir = epath.Path(workdir)
    run, mesh, first = make_run(config), make_mesh(config.mesh), jax.process_index() == 0
    # On every device: the transfer guard forbids to bring it there step by step.
    key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=NamedSharding(mesh, PartitionSpec()))()

    with Checkpoints(workdir / "checkpoints", config.keep) as checkpoints:
        _require_same_config(checkpoints.config(), config)

        # The state, in its shardings from the first moment.
        abstract = jax.eval_shape(run.init, key)
        shardings = state_shardings(abstract, mesh)
        abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
        restored = checkpoints.restore(abstract)
        if restored is not None:
            state, start, extra = restored.state, restored.step, restored.extra
        else:
            state, start, extra = jax.jit(run.init, out_shardings=shardings)(named_key(key, "init")), 0, {}
            if config.init_from:
                state = _start_from(config.init_from, state, shardings)
        if start >= config.steps:
            print(f"{workdir} is finished: {start} of {config.steps} steps. Raise config.steps to go on.")
            return state
        if first:
            _describe(config, workdir, state, start)

        # The data.
        loader = make_loader(config, run.text.tokenise, run.codec, "train", jax.process_index(), jax.process_count())
        if extra:
            loader.set_state(extra["loader"])
        held_out = _held_out(config, run, mesh) if config.eval_every else []

        # The step, compiled once: another shape would be an error, not a recompilation.
        batch_shape = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=batch_sharding(mesh)),
            abstract_batch(config, run.model, run.text),
        )
        began = time.monotonic()
        step_fn = jax.jit(run.step, donate_argnums=0, out_shardings=(shardings, None)).lower(abstract, batch_shape, key)
        step_fn = step_fn.compile()
        evaluate = jax.jit(run.evaluate)
        logging.info("compiled the step in %.1f s", time.monotonic() - began)
        compilations = _count_compilations()
        peak = matmul_peak(run.model.dtype)

        stop = _StopRequests()
        meter = Meter(config, run.model, peak, extra.get("meter", []))
        open_writer = MetricsWriter(workdir, start) if first else contextlib.nullcontext()
        with contextlib.closing(loader), stop, open_writer as writer, Progress(config.steps, start) as progress:

            def save(step, loader_state, wait=False):
                if first:
                    writer.flush()
                extra = {"loader": _all_shards(loader_state), "meter": meter.pending}
                checkpoints.save(step, state, extra, config.to_dict(), wait=wait)

            def read(step, metrics, counts):
                """Fetches a step's metrics, one step late, so that the devices never wait for the host."""
                line = meter.add(step, jax.device_get(metrics), counts)
                progress.update(step, meter.loss, counts["patches"])
                if meter.bad_steps >= MAX_BAD_STEPS:
                    raise FloatingPointError(
                        f"{MAX_BAD_STEPS} gradients in a row were not finite, up to step {step}. The last good state "
                        f"is checkpoint {checkpoints.latest()}; lower optimizer.lr or optimizer.clip."
                    )
                if line and first:
                    writer.write(step, line | {"compilations": compilations()})

            # The loop.
            local = next(loader)
            batch, counts = global_batch(local, mesh), _global_counts(fill(local), local)
            late = None
            for step in range(start + 1, config.steps + 1):
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch, key)
                loader_state, done = loader.get_state(), (step, metrics, counts)
                if step < config.steps:
                    local = next(loader)
                    batch, counts = global_batch(local, mesh), _global_counts(fill(local), local)
                if late:
                    read(*late)
                late = done
                checkpoints.check()
                stopping = stop.agreed()
                final = step == config.steps
                evaluating = config.eval_every and (step % config.eval_every == 0 or final)
                sampling = final or (config.sample_every and step % config.sample_every == 0)
                saving = stopping or final or step % config.checkpoint_every == 0
                if saving or evaluating or sampling:
                    read(*late)
                    late = None
                # What a step leaves comes before its checkpoint: a run that is killed in between makes it again.
                if evaluating:
                    line = _validate(evaluate, state.ema, held_out, named_key(key, "validation"))
                    if first:
                        writer.write(step, line)
                if sampling:
                    ema = _fetch(state.ema)
                    if first:
                        _sample_gallery(config, workdir, writer, ema, step)
                    if first and final:
                        generate.save_weights(workdir / "weights.safetensors", ema, config, step)
                # Where gradients are not finite, the checkpoints stay as they are, unless the run ends here.
                if saving and (not meter.bad_steps or stopping or final):
                    save(step, loader_state, wait=stopping)
                if stopping:
                    print(f"stopped by a signal: saved at step {step}. The same command goes on from there.")
                    raise Preempted
            checkpoints.wait()
        if first:
            print(f"finished: {config.steps} steps. Look at {workdir / 'gallery' / 'index.html'}")
    return state


class Meter:
    """Turns steps' sums into a line of metrics every log_every steps.

    pending: the sums since the last line, plain floats, which a checkpoint keeps: the line after a resume is the very
    line of an unbroken run.
    """

    def __init__(self, config, model, peak: float, pending: list):
        self.config, self.model, self.peak, self.pending = config, model, peak, pending
        self.loss, self.bad_steps, self._since = None, 0, time.monotonic()
        self._work = collections.Counter()

    def add(self, step: int, metrics: dict, counts: dict) -> dict | None:
        """Takes a step's metrics; returns the line where one is due."""
        row = {k: np.asarray(v, np.float64).tolist() for k, v in metrics.items()}
        row |= {k: counts[k] for k in ("patches", "text", "clips", "patch_fill", "text_fill")}
        self.pending.append(row)
        self.bad_steps = int(row["bad_steps"])
        loss = row["loss"] / max(row["weight"], 1)
        if math.isfinite(loss):
            self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        self._work.update(patches=counts["patches"], macs=counts["macs"](self.model))
        if step % self.config.log_every:
            return None
        rows, now = self.pending, time.monotonic()
        total = lambda name: np.sum([row[name] for row in rows], axis=0)
        mean = lambda name: float(np.mean([row[name] for row in rows]))
        line = {"loss": float(total("loss") / max(total("weight"), 1))}
        line |= _by_level("loss", total("loss_Q"), total("weight_Q"))
        line |= {"gradient_norm": mean("gradient_norm"), "bad_total": int(rows[-1]["bad_total"])}
        line |= {"lr": float(make_schedule(self.config, self.config.optimizer.lr)(step - rows[-1]["bad_total"]))}
        line |= {name: mean(name) for name in ("patch_fill", "text_fill", "clips")}
        # Three times the forward pass; two floating-point operations per multiply-accumulate.
        flops = 6 * self._work["macs"] / (now - self._since)
        line |= {"tokens_per_second": self._work["patches"] / (now - self._since), "model_flops_per_second": flops}
        line |= {"share_ofmatmul_peak": flops / self.peak}
        self.pending, self._since, self._work = [], now, collections.Counter()
        return line


def _by_level(name: str, sum_Q, weight_Q) -> dict[str, float]:
    """{'name/0.00-0.12': mean, ...} of the buckets that were met."""
    edges = np.linspace(0, 1, BUCKETS + 1)
    return {
        f"{name}/{edges[q]:.2f}-{edges[q + 1]:.2f}": float(sum_Q[q] / weight_Q[q])
        for q in range(BUCKETS)
        if weight_Q[q]
    }


def _global_counts(counts: dict, local: Batch) -> dict:
    """Counts of all processes' rows, taking this one's for typical, and the model's work on them, when asked for."""
    processes = jax.process_count()
    seg_BxN, prompt_BxS = np.asarray(local.patches.seg_BxN), np.asarray(local.prompt_BxS)
    groups = local.patches.seg_BxG.size * processes

    def work(model):
        lengths = [np.bincount(row, minlength=row.max() + 1)[1:] for row in seg_BxN]
        texts = [np.bincount(row, minlength=len(n) + 1)[1 : len(n) + 1] for row, n in zip(prompt_BxS, lengths)]
        return processes * macs(model, np.concatenate(lengths).tolist(), np.concatenate(texts).tolist()) + (
            macs(model, [], [], groups) - macs(model, [], [], 1)
        )

    return counts | {k: counts[k] * processes for k in ("patches", "text", "clips")} | {"macs": work}


def _held_out(config, run: Run, mesh) -> list[Batch]:
    """The first batches of the validation stream, the same for every run and step."""
    loader = make_loader(config, run.text.tokenise, run.codec, "validation", jax.process_index(), jax.process_count())
    batches = [global_batch(next(loader), mesh) for _ in range(config.eval_batches)]
    loader.close()
    return batches


def _validate(evaluate, params, batches, key) -> dict[str, float]:
    sums = [jax.device_get(evaluate(params, batch, jax.random.fold_in(key, i))) for i, batch in enumerate(batches)]
    total = {k: np.sum([np.asarray(s[k], np.float64) for s in sums], axis=0) for k in sums[0]}
    loss = {"validation": float(total["loss"] / max(total["weight"], 1))}
    return loss | _by_level("validation", total["loss_Q"], total["weight_Q"])


def gallery_requests(config, count: int = 8) -> list[Request]:
    """What the run's gallery shows: config.sample.prompts, or captions and sizes of the held-out stream."""
    if config.sample.prompts:
        return [parse_prompt(text, seed) for seed, text in enumerate(config.sample.prompts)]
    source, requests = make_source(config, "validation"), []
    for i in range(len(source)):
        if config.data.kind == "shapes":
            clip = source[i]
            frames, height, width, _ = clip.video_TxYxXx3.shape
            time_T, caption = clip.time_T, clip.caption
        else:
            found = source.layout(i, 0)
            frames, height, width, time_T, caption = (
                found.frames,
                found.height,
                found.width,
                found.time_T,
                found.caption,
            )
        fps = (frames - 1) / float(time_T[-1] - time_T[0]) if frames > 1 else 8.0
        requests.append(Request(caption, width, height, frames, round(fps, 3), seed=i))
        if len(requests) == count:
            break
    return requests


def parse_prompt(text: str, seed: int = 0) -> Request:
    """A Request from 'WIDTHxHEIGHTxFRAMES@FPS: prompt'. Raises ValueError for another form."""
    try:
        shape, prompt = text.split(":", 1)
        size, fps = shape.split("@")
        width, height, frames = map(int, size.split("x"))
        return Request(prompt.strip(), width, height, frames, float(fps), seed)
    except ValueError as error:
        raise ValueError(f"sample.prompts: {text!r} is not of the form '48x32x9@8: a red circle'.") from error


def _fetch(tree):
    """numpy copies of arrays that may lie on several processes' devices; all processes call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def _sample_gallery(config, workdir, writer, ema, step: int) -> None:
    requests = gallery_requests(config)
    trained = generate.Trained(ema, config, step, str(workdir))
    how = {k: config.sample[k] for k in ("steps", "solver", "guidance")}
    samples = [
        Sample(video, r.fps, r.prompt, r.seed, how | {"config": config.name, "checkpoint_step": step})
        for r, video in zip(requests, generate.sample(requests, trained))
    ]
    grow(workdir / "gallery", step, samples, title=f"{config.name}", summary={"workdir": str(workdir), **how})
    for i, sample in enumerate(samples):
        if len(sample.video_TxYxXx3) > 1:
            writer.video(step, f"sample/{i}", sample.video_TxYxXx3, sample.fps)


def _start_from(path, state: State, shardings) -> State:
    """The state with another run's averaged weights, and a fresh optimizer. Raises ValueError where they differ."""
    given = generate.load(path).params
    describe = lambda tree: {jax.tree_util.keystr(k): a.shape for k, a in jax.tree_util.tree_leaves_with_path(tree)}
    theirs, ours = describe(given), describe(state.params)
    wrong = [
        f"{k}: {theirs.get(k)} there, {ours.get(k)} here" for k in {**ours, **theirs} if theirs.get(k) != ours.get(k)
    ]
    if wrong:
        raise ValueError(f"init_from={path} has other weights than this config:\n  " + "\n  ".join(wrong[:20]))
    place = lambda new, old, s: jax.device_put(np.asarray(new, old.dtype), s)
    params = jax.tree.map(place, given, state.params, shardings.params)
    return dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params))


def _require_same_config(saved: dict | None, config) -> None:
    """A workdir goes on with the config it was begun with; how long, and what is looked at meanwhile, may change."""
    free = (
        "steps",
        "log_every",
        "eval_every",
        "eval_batches",
        "sample_every",
        "checkpoint_every",
        "keep",
        "sample",
        "mesh",
    )
    if saved is None:
        return
    flat = lambda d: {
        jax.tree_util.keystr(k, simple=True, separator="."): v
        for k, v in jax.tree_util.tree_leaves_with_path(json.loads(json.dumps(d)))
    }
    old, new = flat(saved), flat(config.to_dict())
    changed = [
        f"{k}: {old.get(k)!r} -> {new.get(k)!r}"
        for k in sorted({*old, *new})
        if old.get(k) != new.get(k) and k.split(".")[0] not in free
    ]
    if changed:
        raise ValueError(
            "the workdir was begun with another config; use another workdir (and init_from), or undo:\n  "
            + "\n  ".join(changed)
        )


def _describe(config, workdir, state: State, start: int) -> None:
    """Prints the parameters, and leaves the resolved config and the versions in the workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av", "pillow")
    versions = {name: importlib.metadata.version(name) for name in names}
    versions |= {"python": platform.python_version(), "devices": [str(d) for d in jax.devices()]}
    (workdir / "versions.json").write_text(json.dumps(versions, indent=1))
    rows = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), str(leaf.shape), leaf.size)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    ]
    total = sum(size for *_, size in rows)
    table = "\n".join(f"  {name:<32}{shape:<20}{size:>12,}" for name, shape, size in rows)
    print(f"{table}\n  {'total':<52}{total:>12,}")
    devices = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    print(f"{config.name}: from step {start} to {config.steps} on {devices}")


def matmul_peak(dtype, side: int = 1536) -> float:
    """FLOP/s that all devices together reach on square products of `dtype`, measured now."""
    product = jax.jit(lambda a: a @ a)
    a = jnp.ones((side, side), dtype)
    product(a).block_until_ready()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - began)
    # Devices that the host's processor plays share its cores.
    devices = 1 if jax.devices()[0].platform == "cpu" else jax.device_count()
    return devices * 2 * side**3 / min(times)


def _count_compilations():
    """A function that gives how many programs were compiled since now."""
    seen = collections.Counter()

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen[event] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: sum(seen.values())


def _all_shards(own: dict) -> dict:
    """The loader's states of all processes' shards."""
    if jax.process_count() == 1:
        return own
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(own).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
    texts = multihost_utils.process_allgather(np.pad(text, (0, longest - len(text)), constant_values=32))
    return functools.reduce(dict.__or__, (json.loads(row.tobytes()) for row in texts))


class _StopRequests:
    """SIGTERM and SIGINT, noted; the loop asks between steps. All processes stop at the same step."""

    def __enter__(self):
        self.asked = False
        note = lambda *_: setattr(self, "asked", True)
        try:
            self._old = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread (a notebook's worker): its owner handles signals
            self._old = {}
        return self

    def __exit__(self, *_):
        for s, handler in self._old.items():
            signal.signal(s, handler)

    def agreed(self) -> bool:
        if jax.process_count() == 1:
            return self.asked
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(self.asked)).any())
