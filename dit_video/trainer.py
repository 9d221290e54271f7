"""Training: the loop, `train(config, workdir)`.

B rows, N patches per row, P values per patch, G groups per row, S text tokens per row.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dit_video import generate, launch, watchdog
from dit_video.allowed import check_config
from dit_video.canvas import Layout, Request, check_request
from dit_video.checkpoint import Checkpoints, check_place
from dit_video.data.clips import write_report
from dit_video.data.loader import make_loader, make_source, split_indices
from dit_video.flow import named_key
from dit_video.gallery import Sample, grow
from dit_video.meter import Meter, by_level, count_compilations, global_work, matmul_peak
from dit_video.metrics import MetricsWriter, Progress, read_metrics
from dit_video.patches import Batch
from dit_video.sharding import batch_shardings, global_batch, left_whole, make_mesh, row_share, state_shardings
from dit_video.step import Run, State, abstract_batch, make_run
from dit_video.weights import lora
from dit_video.weights.files import Stored
from dit_video.weights.native import read_weights

MAX_BAD_STEPS = 10
AT_ONCE = 2**28  # bytes of an array that each device comes to hold while it is gathered
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved after SIGTERM or SIGINT; the same command goes on


class Preempted(SystemExit):
    """The run was asked to stop and has saved; the same command resumes it."""

    def __init__(self):
        super().__init__(EXIT_PREEMPTED)


def train(config, workdir, allow_changed=()) -> State:
    """Trains `config` in `workdir` from its newest checkpoint, or from the start; returns the last State.

    Leaves there: config.json, versions.json, checkpoints/, metrics.jsonl, tensorboard/, gallery/index.html and, at
    the end, weights.safetensors. Typed again it resumes; a finished run says so and returns. After SIGTERM or SIGINT
    it saves and raises Preempted (exit code 75). Raises FloatingPointError after ten bad gradients in a row, and
    ValueError for a config that cannot run, or that is not the one the workdir was begun with (but for the keys, or
    sections of keys, in allow_changed), for a workdir that is neither on a disk nor on gs://, and where a run's
    processes were given different ones. Whatever the state hangs on ends the run; validation and pictures that fail are
    logged as errors, and the run goes on.
    """
    # The config.
    check_config(config)
    check_place(workdir)
    launch.agree(config.to_dict(), allow_changed, workdir)
    workdir = epath.Path(workdir)
    mesh, first, alone = make_mesh(config.mesh), jax.process_index() == 0, jax.process_count() == 1
    run = make_run(config, mesh)
    check_sample(config, run)
    # On every device: the transfer guard forbids to bring it there step by step.
    key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=NamedSharding(mesh, PartitionSpec()))()

    with Checkpoints(workdir / "checkpoints", config.keep) as checkpoints, _StopRequests() as stop:
        _require_same_config(checkpoints.config(), config, allow_changed)

        # The state, in its shardings from the first moment.
        abstract = abstract_state(run, mesh)
        shardings = jax.tree.map(lambda a: a.sharding, abstract)
        restored = checkpoints.restore(abstract)
        if restored is not None:
            state, start, extra = restored.state, restored.step, restored.extra
        else:
            state, start, extra = jax.jit(run.init, out_shardings=shardings)(named_key(key, "init")), 0, {}
            if config.init_from:
                state = start_from(config.init_from, state, shardings, config.model)
            if config.lora.rank and config.lora.init_from:
                state = start_factors_from(config, state, shardings)
        undone = _undone(config, workdir, start)
        if start >= config.steps and not any(undone.values()):
            if first:
                print(f"{workdir} is finished: {start} of {config.steps} steps. Raise config.steps to go on.")
            return state
        if first:
            _describe(config, workdir, state, start)

        # The data.
        scanned = workdir / "media_cache.jsonl"
        share = (*row_share(mesh), scanned)
        loader = make_loader(config, run.text.tokenise, run.codec, "train", *share)
        if first and loader.report:
            _report_media(loader.report, workdir)
        if extra:
            loader.set_state(extra["loader"])
        held_out = _held_out(config, run, mesh, share) if config.eval_every else []

        # The step, compiled once: another shape would be an error, not a recompilation.
        began = time.monotonic()
        reserved = checkpoints.reserve(state)
        step_fn = trace_step(run, mesh).lower().compile()
        evaluate = jax.jit(run.evaluate)
        whole = jax.jit(run.whole) if config.lora.rank else run.whole
        logging.info("compiled the step in %.1f s", time.monotonic() - began)
        reserved.result()  # before the state is donated
        compilations = count_compilations()
        peak = matmul_peak(run.model.dtype)

        meter = Meter(config, run.model, peak, extra.get("meter", []))
        open_writer = MetricsWriter(workdir, start) if first else contextlib.nullcontext()
        show = Progress(config.steps, start) if first else contextlib.nullcontext()
        with contextlib.closing(loader), open_writer as writer, show as progress:
            # The first process hashes while the others wait for it: it is the first to speak where that hangs. Whether
            # it is another's part that does, it cannot tell.
            own = "save" if alone else "save, each process its part"

            @watchdog.phase(own if first else "save, which process 0 completes", times=2 if first else 3)
            def save(step, loader_state, wait=False):
                if first:
                    writer.flush()
                extra = {"loader": _all_shards(loader_state), "meter": meter.pending}
                checkpoints.save(step, state, extra, config.to_dict(), wait=wait)

            def read(step, metrics, work):
                """Fetches a step's metrics, one step late, so that the devices never wait for the host."""
                line = meter.add(step, jax.device_get(metrics), work)
                if first:
                    progress.update(step, meter.loss, meter.patches)
                if meter.bad_steps >= MAX_BAD_STEPS:
                    checkpoints.wait()
                    raise FloatingPointError(
                        f"{MAX_BAD_STEPS} gradients in a row were not finite, up to step {step}. The last good state "
                        f"is checkpoint {checkpoints.latest()}; lower optimizer.lr or optimizer.clip "
                        "(--allow_changed=optimizer)."
                    )
                if line and first:
                    writer.write(step, line | {"compilations": compilations()})

            def leave(step, evaluating, sampling, final):
                """What a step leaves beside its checkpoint, of which a run that is killed in between makes it later."""
                if evaluating:
                    # Processes that went on without one which failed would wait for it in the next step.
                    with _not_fatal(f"validation at step {step}") if alone else contextlib.nullcontext():
                        line = _validate(evaluate, state, held_out, named_key(key, "validation"))
                        if first:
                            writer.write(step, line)
                if not (sampling or final):
                    return
                ema = whole(state.ema, state.frozen)
                if final:
                    if config.lora.rank:
                        factors = jax.tree.map(_gathered, state.ema["lora"])
                        if first:
                            lora.write(workdir / "lora.safetensors", factors, lora.scale(config), config)
                    _write_weights(workdir / "weights.safetensors", ema, config, step)
                if sampling:
                    # Of several processes the first samples, by itself: it alone comes to hold the whole model, and may
                    # fail without the others.
                    ema = ema if alone else _on_the_first(ema)
                    if first:
                        with _not_fatal(f"the gallery of step {step}"):
                            _sample_gallery(config, workdir, writer, ema, step, mesh if alone else None)

            leave(start, **undone)

            # The loop.
            local = next(loader)
            batch, work = global_batch(local, mesh), global_work(local, share[1])
            late, saved = None, start
            for step in range(start + 1, config.steps + 1):
                watchdog.at_step(step)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch, key)
                loader_state, done = loader.get_state(), (step, metrics, work)
                if step < config.steps:
                    local = next(loader)
                    batch, work = global_batch(local, mesh), global_work(local, share[1])
                if late:
                    read(*late)
                late = done
                checkpoints.check()
                stopping = stop.agreed(step)
                due = _due(config, step)
                last = stopping or due["final"]
                saving = last or step % config.checkpoint_every == 0
                if saving or any(due.values()):
                    read(*late)
                    late = None
                # Bad gradients change no weight: what has been saved once before them need not be saved again, and
                # would push older checkpoints out.
                if saving and (last or step - saved > meter.bad_steps):
                    save(step, loader_state, wait=last)
                    saved = step
                if stopping:
                    if first:
                        print(f"stopped by a signal: saved at step {step}. The same command goes on from there.")
                    raise Preempted
                leave(step, **due)
        if first:
            print(f"finished: {config.steps} steps. Look at {workdir / 'gallery' / 'index.html'}")
    return state


def abstract_state(run: Run, mesh) -> State:
    """The state's shapes, dtypes and shardings on a mesh."""
    abstract = jax.eval_shape(run.init, jax.eval_shape(lambda: jax.random.key(0)))
    if jax.process_index() == 0 and (whole := left_whole((abstract.params, abstract.frozen), mesh)):
        _warn_once(whole)
    return jax.tree.map(_placed, abstract, state_shardings(abstract, mesh, run.config.optimizer.offload))


@functools.cache
def _warn_once(text: str) -> None:
    """Logs a warning, however often what it says is found."""
    logging.warning(text)


def trace_step(run: Run, mesh) -> jax.stages.Traced:
    """The step of `train` for a mesh, whose devices need not be there; nothing is allocated."""
    state, batch = abstract_state(run, mesh), abstract_batch(run.config, run.model, run.text)
    batch = jax.tree.map(_placed, batch, batch_shardings(batch, mesh))
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), NamedSharding(mesh, PartitionSpec()))
    shardings = jax.tree.map(lambda a: a.sharding, state)
    return jax.jit(run.step, donate_argnums=0, out_shardings=(shardings, None)).trace(state, batch, key)


def _placed(array, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _held_out(config, run: Run, mesh, share) -> list[Batch]:
    """The first batches of the validation stream, the same for every run and step."""
    loader = make_loader(config, run.text.tokenise, run.codec, "validation", *share)
    batches = [global_batch(next(loader), mesh) for _ in range(config.eval_batches)]
    loader.close()
    return batches


@watchdog.phase("evaluate")
def _validate(evaluate, state: State, batches, key) -> dict[str, float]:
    one = lambda i, batch: evaluate(state.ema, batch, jax.random.fold_in(key, i), state.frozen)
    sums = [jax.device_get(one(i, batch)) for i, batch in enumerate(batches)]
    total = {k: np.sum([np.asarray(s[k], np.float64) for s in sums], axis=0) for k in sums[0]}
    loss = {"validation": float(total["loss"] / max(total["weight"], 1))}
    return loss | by_level("validation", total["loss_Q"], total["weight_Q"])


def gallery_requests(config, count: int = 8, cache=None) -> list[Request]:
    """What the run's gallery shows: config.sample.prompts, or captions and sizes of the held-out stream."""
    if config.sample.prompts:
        return [parse_prompt(text, seed) for seed, text in enumerate(config.sample.prompts)]
    source, requests = make_source(config, "validation", cache), []
    for i in split_indices(source, "validation"):
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


def check_sample(config, run: Run) -> None:
    """Raises ValueError for what the gallery would fail of once the run is under way: its prompts."""
    layout = Layout(run.codec, tuple(config.model.patch), run.text.tokenise, config.data.group_by)
    for seed, text in enumerate(config.sample.prompts):
        request = parse_prompt(text, seed)
        check_request(request, layout)
        if not (config.text.kind == "frozen" and config.text.encoder):  # which encodes it when it is asked for
            layout.tokenise(request.prompt)


def _due(config, step: int) -> dict[str, bool]:
    """What a step leaves beside its checkpoint."""
    final = step == config.steps
    at = lambda every: step > 0 and every > 0 and step % every == 0
    evaluating = at(config.eval_every) or (final and config.eval_every > 0)
    sampling = config.sample_every >= 0 and final or at(config.sample_every)
    return {"evaluating": evaluating, "sampling": sampling, "final": final}


def _undone(config, workdir, step: int) -> dict[str, bool]:
    """Of what is due at a step, what is not there; the same on all processes: what the first one sees."""
    due = _due(config, step)
    if jax.process_index() == 0:
        metrics, gallery, weights = (workdir / name for name in ("metrics.jsonl", "gallery", "weights.safetensors"))
        folder = f"step_{step:08d}"
        if due["evaluating"] and metrics.exists():
            due["evaluating"] = not any(line["step"] == step and "validation" in line for line in read_metrics(metrics))
        if due["sampling"] and (gallery / folder / "samples.json").exists() and (gallery / "index.html").exists():
            due["sampling"] = folder not in (gallery / "index.html").read_text()
        if due["final"] and weights.exists():
            due["final"] = read_weights(weights)[1]["step"] != step
    if jax.process_count() > 1:
        answer = multihost_utils.broadcast_one_to_all(np.array([*due.values()], np.int32))
        due = dict(zip(due, map(bool, answer), strict=True))
    return due


@contextlib.contextmanager
def _not_fatal(what: str):
    """Logs a failure in what the state does not hang on, and lets the run go on."""
    try:
        yield
    except Exception as error:
        logging.exception("%s failed, and the run goes on without: %s: %s", what, type(error).__name__, error)


def _gathered(array) -> np.ndarray:
    """A numpy copy of an array that may lie on several processes' devices; all processes call it.

    Each device holds no more than AT_ONCE bytes of it meanwhile, or one entry of its first axis.
    """
    if jax.process_count() == 1:
        return np.asarray(array)
    rows = max(AT_ONCE * len(array) // array.nbytes, 1) if array.ndim else 1
    if array.ndim == 0 or rows >= len(array):
        return multihost_utils.process_allgather(array, tiled=True)
    whole = np.empty(array.shape, array.dtype)
    for start in range(0, len(array), rows):
        start = min(start, len(array) - rows)  # the last may begin in the one before
        whole[start : start + rows] = multihost_utils.process_allgather(_rows(array, start, rows), tiled=True)
    return whole


@functools.partial(jax.jit, static_argnums=2)
def _rows(array, start, count: int):
    return jax.lax.dynamic_slice_in_dim(array, start, count)


def _on_the_first(tree):
    """numpy copies on the first process; of the others none holds more than one at a time. All processes call it."""
    keep = lambda array: array if jax.process_index() == 0 else None
    return jax.tree.map(lambda array: keep(_gathered(array)), tree)


def _write_weights(path, params, config, step: int) -> None:
    """Leaves the file of weights. They are gathered as they are written, one by one: no host ever holds them all.

    All processes call it, and gather them in the file's order: by name.
    """
    bf16 = lambda array: _gathered(array.astype(jnp.bfloat16))  # a copy: jax keeps what was fetched beside its array
    if jax.process_index() == 0:
        stored = lambda array: Stored(array.shape, np.dtype(jnp.bfloat16), functools.partial(bf16, array))
        generate.save_weights(path, jax.tree.map(stored, params), config, step)
        return
    named = {"/".join(k.key for k in path): array for path, array in jax.tree_util.tree_leaves_with_path(params)}
    for name in sorted(named):
        bf16(named[name])


@watchdog.phase("sample", times=2)
def _sample_gallery(config, workdir, writer, ema, step: int, mesh) -> None:
    requests = gallery_requests(config, cache=workdir / "media_cache.jsonl")
    trained = generate.Trained(ema, config, step, str(workdir))
    how = {k: config.sample[k] for k in ("steps", "solver", "guidance")}
    samples = [
        Sample(video, r.fps, r.prompt, r.seed, how | {"config": config.name, "checkpoint_step": step})
        for r, video in zip(requests, generate.sample(requests, trained, mesh))
    ]
    grow(workdir / "gallery", step, samples, title=f"{config.name}", summary={"workdir": str(workdir), **how})
    for i, sample in enumerate(samples):
        if len(sample.video_TxYxXx3) > 1:
            writer.video(step, f"sample/{i}", sample.video_TxYxXx3, sample.fps)


# Of a model, what the same weights may be run with in another way.
FREE = ("dtype", "remat", "unroll", "window")


def start_from(path, state: State, shardings, model=None) -> State:
    """The state with another run's averaged weights, and a fresh optimizer. Raises ValueError where they differ.

    They go to their devices straight from the file or the checkpoint, in the place of those that were drawn at random:
    no host ever has the whole model. model: config.model; where the weights were trained as another one, a warning says
    so.
    """
    field = "frozen" if state.frozen else "params"
    old = getattr(state, field)
    describe = lambda tree: {jax.tree_util.keystr(k): a.shape for k, a in jax.tree_util.tree_leaves_with_path(tree)}
    as_json = lambda value: json.loads(json.dumps(value))

    def make_room(given, saved):
        """Lets the weights drawn at random go, once the `given` ones are seen to fit."""
        theirs, ours = describe(given), describe(old)
        wrong = [
            f"{k}: {theirs.get(k)} there, {ours.get(k)} here"
            for k in {**ours, **theirs}
            if theirs.get(k) != ours.get(k)
        ]
        if wrong:
            raise ValueError(f"init_from={path} has other weights than this config:\n  " + "\n  ".join(wrong[:20]))
        others = [
            f"model.{key}={saved['model'][key]!r} there, {value!r} here"
            for key, value in ({} if model is None else model.to_dict()).items()
            if key not in FREE and as_json(value) != as_json(saved["model"].get(key))
        ]
        if others:
            logging.warning("init_from=%s was trained as another model: %s.", path, "; ".join(others))
        jax.tree.map(lambda a: a.delete(), (old, state.ema) if field == "params" else old)

    new = generate.load(path, getattr(shardings, field), make_room).params
    if field == "frozen":
        return dataclasses.replace(state, frozen=new)
    return dataclasses.replace(state, params=new, ema=jax.tree.map(jnp.copy, new))


def start_factors_from(config, state: State, shardings) -> State:
    """The state with a file's low-rank factors. Raises ValueError where they are not those of the config."""
    given = lora.read(config.lora.init_from, config)
    describe = lambda factors: {name: (f["a"].shape, f["b"].shape) for name, f in factors.items()}
    theirs, ours = describe(given), describe(state.params["lora"])
    if theirs != ours:
        raise ValueError(f"lora.init_from={config.lora.init_from} has factors {theirs}, and this config {ours}.")
    factors = {name: {"a": f["a"], "b": f["b"] / np.float32(lora.scale(config))} for name, f in given.items()}
    params = jax.tree.map(jax.device_put, {"lora": factors}, shardings.params)
    return dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params))


# What neither the state so far nor the order of the data hangs on: how long, what is looked at meanwhile, where files
# lie, and how the step is computed.
MAY_CHANGE = ("steps", "log_every", "eval_every", "eval_batches", "sample_every", "checkpoint_every", "keep", "sample")
MAY_CHANGE += ("data.workers", "optimizer.offload")
FILES = ("data.root", "codec.weights", "text.file", "text.encoder")
ROUNDING = ("mesh", "model.remat", "model.unroll", "optimizer.accumulate")


def _require_same_config(saved: dict | None, config, allowed=()) -> None:
    """A workdir goes on with the config it was begun with, but for what may change, and what is `allowed` to."""
    if saved is None:
        return
    flat = lambda d: {
        jax.tree_util.keystr(k, simple=True, separator="."): v
        for k, v in jax.tree_util.tree_leaves_with_path(json.loads(json.dumps(d)))
    }
    old, new = flat(generate.with_newer_keys(saved)), flat(config.to_dict())
    within = lambda key, names: any(key == name or key.startswith(f"{name}.") for name in names)
    if unknown := [name for name in allowed if not any(within(key, [name]) for key in new)]:
        raise ValueError(f"allow_changed={','.join(unknown)}: no such keys in the config.")
    refused = []
    for key in sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
        line = f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        if key == "steps":
            logging.warning("%s: what holds in a last share of the steps (learning rates, `late`) moves with it.", line)
        elif within(key, FILES):
            logging.warning("%s, taken to hold the same.", line)
        elif within(key, ROUNDING):
            logging.warning("%s orders sums otherwise: from here on losses are the same up to rounding.", line)
        elif within(key, allowed):
            logging.warning("ALLOWED TO CHANGE, the run is another from here on: %s", line)
        elif not within(key, MAY_CHANGE):
            refused.append(line)
    if refused:
        raise ValueError(
            "the workdir was begun with another config; use another workdir (and init_from), undo, or take it on "
            "with --allow_changed=KEY,KEY:\n  " + "\n  ".join(refused)
        )


def _report_media(report: list[dict], workdir) -> None:
    """Leaves what was said of each file in media.jsonl, and prints how many were left out or are partial."""
    write_report(report, workdir / "media.jsonl")
    count = collections.Counter(row["status"] for row in report)
    print(f"media: {dict(count)}; each file with its reason: {workdir / 'media.jsonl'}")


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


def _all_shards(own: dict) -> dict:
    """The loader's states of all processes' shards. Raises ValueError where two that read a shard stand elsewhere."""
    if jax.process_count() == 1:
        return own
    states = {}
    for process, text in enumerate(launch.all_texts(json.dumps(own))):
        for shard, state in json.loads(text).items():
            if states.setdefault(shard, state) != state:
                raise ValueError(f"process {process} has read other clips of shard {shard} than one before it.")
    return states


class _StopRequests:
    """SIGTERM and SIGINT, noted; the loop asks between steps. All processes stop at the same step.

    Of several processes jax's preemption service takes SIGTERM: asking costs nothing while nobody got one, and a
    signal to any of them stops all.
    """

    def __enter__(self):
        self.asked, self._several = False, jax.process_count() > 1
        note = lambda *_: setattr(self, "asked", True)
        terminate = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
        handlers = {signal.SIGINT: terminate} if self._several else {signal.SIGTERM: note, signal.SIGINT: note}
        try:
            self._old = {s: signal.signal(s, handler) for s, handler in handlers.items()}
        except ValueError:  # not in the main thread (a notebook's worker): its owner handles signals
            self._old = {}
        return self

    def __exit__(self, *_):
        for s, handler in self._old.items():
            signal.signal(s, handler)

    def agreed(self, step: int) -> bool:
        if not self._several:
            return self.asked
        return multihost_utils.reached_preemption_sync_point(step)
