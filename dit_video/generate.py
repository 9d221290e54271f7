"""From requests to videos: lays them out, packs them in shared batches, samples, and takes them out again.

B rows, N patches per row, G groups per row, K = M + 1 levels, T x Y x X a clip's grid.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from configs import base
from dit_video import checkpoint
from dit_video.canvas import Layout, Request, Task, finish, prompts_of, seen, told
from dit_video.codecs import make_codec, to_uint8
from dit_video.flow import patch_noise
from dit_video.model import empty_cache, make_model
from dit_video.parts import Parts, in_parts
from dit_video.patches import Cond, choose, pack, unpack
from dit_video.sampling import guided, led, recalled, uniform_levels
from dit_video.sampling import sample as integrate
from dit_video.sharding import batch_sharding
from dit_video.tasks import (
    TASKS,
    advance,
    latent_frame,
    roll,
    rollout_latents,
    start_causal,
    start_rollout,
    task_of,
    text_to_video,
)
from dit_video.text import make_text
from dit_video.weights import lora
from dit_video.weights.diffusion import make_velocity
from dit_video.weights.encoders import complete
from dit_video.weights.native import load_weights, nest, read_weights, save_weights

__all__ = ["Trained", "add_lora", "load", "sample", "sample_latents", "save_weights", "weights_file"]

FAR = 8  # times the patches of the longest clip trained on: a request beyond is worth a word


@dataclasses.dataclass(frozen=True)
class Trained:
    """Weights to sample from: the averaged params {'text', 'dit'}, the run's config, their step and where they lie."""

    params: Any
    config: ml_collections.ConfigDict
    step: int
    source: str


def load(path, sharding=None, check=lambda abstract, config: None) -> Trained:
    """The averaged weights of a run's workdir (its newest sound checkpoint), or of a .safetensors file of ours.

    sharding: how they are laid out on devices, a Sharding or a tree of one for each: straight from the file or the
    checkpoint, of which a host reads no more at a time than a tensor, or its own devices' share; None gives numpy
    arrays. check(abstract, config): called with what is there, arrays without their values and a dict, before any is
    read. Raises FileNotFoundError where there is neither.
    """
    path = epath.Path(path)
    if file := weights_file(path):
        tensors, metadata = read_weights(file)
        check(nest(tensors), with_newer_keys(metadata["config"]))
        params, config, step = load_weights(file, sharding)
        return Trained(params, ml_collections.ConfigDict(with_newer_keys(config)), step, str(path))
    directory = _checkpoints(path)
    if directory is None:
        convert = (
            " of weights, into which `python -m dit_video.convert` turns others" if path.is_file() else " of weights"
        )
        raise FileNotFoundError(f"{path} holds no checkpoint. Give a run's workdir or a .safetensors file{convert}.")

    def place(saved, config):
        if "lora" in saved:  # the factors of what is frozen: small
            return saved
        check(saved, with_newer_keys(config))
        return _laid_out(saved, sharding)

    restored = checkpoint.load(directory, "ema", place)
    params, config = restored.state, ml_collections.ConfigDict(with_newer_keys(restored.config))
    if "lora" in params:
        whole, merge = checkpoint.load(directory, "frozen", place).state, lora.merge
        if sharding is not None:
            merge = jax.jit(merge, donate_argnums=0, out_shardings=jax.tree.map(lambda w: w.sharding, whole["dit"]))
        params = whole | {"dit": merge(whole["dit"], params["lora"], lora.scale(config))}
    return Trained(params, config, restored.step, str(path))


def _laid_out(abstract, sharding):
    """Arrays without values, and how each is to lie: `sharding` as in `load`."""
    if sharding is None:
        return abstract
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, abstract)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, sharding)


def weights_file(path):
    """The .safetensors file that a path is, or that a directory without checkpoints has; else None."""
    path = epath.Path(path)
    if path.suffix == ".safetensors":
        return path
    file = path / "weights.safetensors"
    return file if file.exists() and _checkpoints(path) is None else None


def add_lora(trained: Trained, path, strength: float = 1.0) -> Trained:
    """The weights with a file of low-rank factors merged in, `strength` times; see `lora.read`."""
    factors = lora.read(path, trained.config)
    dit = lora.merge(trained.params["dit"], factors, strength)
    times = "" if strength == 1 else f"{strength:g} x "
    return dataclasses.replace(
        trained, params=trained.params | {"dit": dit}, source=f"{trained.source} + {times}{path}"
    )


def with_newer_keys(saved: dict) -> dict:
    """A saved config with the keys that configs/base.py has gained since, at their defaults."""

    def overlay(default: dict, given: dict) -> dict:
        both = {k: overlay(v, given[k]) if isinstance(v, dict) else given[k] for k, v in default.items() if k in given}
        return {**default, **given, **both}

    return overlay(base.get_config().to_dict(), saved)


def _checkpoints(path):
    """The directory of checkpoints that a path is or has, or None."""
    for directory in (path / "checkpoints", path):
        if (directory / checkpoint.SUMS).exists() or _holds_checkpoints(directory):
            return directory
    return None


def _holds_checkpoints(directory) -> bool:
    return directory.is_dir() and any((p / checkpoint.SUMS).exists() for p in directory.iterdir() if p.name.isdigit())


def sample(requests: Sequence[Request], trained, mesh=None, **settings) -> list[np.ndarray]:
    """The requests' videos, each uint8 TxYxXx3, sampled packed in shared batches, whatever their tasks.

    trained: Trained, or what `load` takes. settings: any key of config.sample (steps, solver, shift, guidance,
    interval, ...) and `row`, the patches of a row, in place of the config's. A request gives the same sample alone
    or packed with others, up to float rounding. Raises ValueError, before anything is compiled, for one that cannot be
    laid out, and where the model has no autoencoder.
    """
    trained = trained if isinstance(trained, Trained) else load(trained)
    if trained.config.codec.kind == "latents":
        raise ValueError(
            f"{trained.config.name} makes latents, and has no autoencoder that makes pixels of them "
            "(codec.kind='latents'): write the latents (--save=latents, sample_latents)."
        )
    how, layout, level_K = _prepare(requests, trained, settings)

    rolled, causal, clips, ready = {}, {}, [], {}
    for i, request in enumerate(requests):
        with _naming(i):
            if task_of(request) != "rollout":
                clips.append(i)
                first = _rehearse(i, request, layout, level_K, trained.config.data.max_tokens)
                ready |= {(i, j): task for j, task in enumerate(first)}
            elif request.causal:
                _check_causal(trained.config, scales_of(request, how)[1])
                causal[i] = start_causal(request, layout, level_K)
            else:
                rolled[i] = start_rollout(request, layout)

    trained = _placed(trained, mesh)

    def solve(tasks: dict, asked: dict) -> dict:
        scales = [scales_of(asked[key], how) for key in tasks]
        latents, _ = _pack_and_solve([*tasks.values()], scales, trained, how, mesh)
        return dict(zip(tasks, latents))

    def make(parts: dict) -> dict:
        lay = lambda part: TASKS[task_of(part)](part, layout, level_K)
        tasks = {key: ready.pop(key) if key in ready else lay(part) for key, part in parts.items()}
        return {key: finish(tasks[key], to_uint8(layout.codec.decode(x))) for key, x in solve(tasks, parts).items()}

    videos = _make_parts({i: in_parts(requests[i], layout) for i in clips}, make)
    if rolled:
        own = {i: requests[i] for i in rolled}
        videos |= _roll_out(own, rolled, layout, level_K, how.steps, functools.partial(solve, asked=own))
    if causal:
        scales = [scales_of(requests[i], how) for i in causal]
        own = [requests[i] for i in causal], [*causal.values()], layout, scales
        videos |= dict(zip(causal, _roll_out_causally(*own, trained, how, mesh)))
    return [videos[i] for i in range(len(requests))]


class RequestError(ValueError):
    """A request cannot be laid out; `index` says which of those asked for."""

    def __init__(self, text: str, index: int):
        super().__init__(text)
        self.index = index


@contextlib.contextmanager
def _naming(index: int):
    """Says of a ValueError which request it is about."""
    try:
        yield
    except ValueError as error:
        raise RequestError(str(error), index) from error


def _rehearse(index: int, request: Request, layout: Layout, level_K, trained_on: int) -> list[Task]:
    """Lays out all of a request's parts, each after what was given instead of what will be made, for their errors, and
    logs what there is to tell. Returns the first of them, which stay as they are.
    """
    parts, counts, first, largest, answers = in_parts(request, layout), [], [], None, None
    with contextlib.suppress(StopIteration):
        while True:
            asked, beginning, answers = parts.send(answers), answers is None, []
            for part in asked:
                task = TASKS[task_of(part)](part, layout, level_K)
                counts.append(seen(task, layout))
                first += [task] * beginning
                largest = task if largest is None or task.grid.size > largest.grid.size else largest
                answers.append(finish(task, task.given_TxYxXx3))
    words = [f"made in {len(counts)} parts"] if len(counts) > 1 and request.videos else []
    words += [said] if (said := told(counts, layout, request.context)) else []
    if words:
        logging.warning("request %d, %s: %s.", index, task_of(request), "; ".join(words))
    _warn_of_large(index, request, largest, layout, trained_on)
    return first


def _make_parts(parts: dict[int, Parts], make) -> dict[int, np.ndarray]:
    """The answers: asks `make` for the next parts of all requests together, until none has more."""
    videos, sent = {}, dict.fromkeys(parts)
    while len(videos) < len(parts):
        asked = {}
        for i in parts.keys() - videos.keys():
            try:
                asked[i] = parts[i].send(sent[i])
            except StopIteration as stop:
                videos[i] = stop.value
        made = make({(i, j): part for i in sorted(asked) for j, part in enumerate(asked[i])}) if asked else {}
        sent = {i: [made[i, j] for j in range(len(some))] for i, some in asked.items()}
    return videos


def sample_latents(requests: Sequence[Request], trained, mesh=None, **settings) -> list[np.ndarray]:
    """The requests' latents_TxYxXxC, float32, undecoded; else as `sample`, for requests of text alone."""
    trained = trained if isinstance(trained, Trained) else load(trained)
    how, layout, level_K = _prepare(requests, trained, settings)
    if others := sorted({task_of(request) for request in requests} - {"text"}):
        raise ValueError(f"latents are left undecoded for tasks of text alone, and these are {others}.")
    tasks = []
    for i, request in enumerate(requests):
        with _naming(i):
            tasks.append(text_to_video(request, layout, level_K))
    scales = [scales_of(request, how) for request in requests]
    return _pack_and_solve(tasks, scales, _placed(trained, mesh), how, mesh)[0] if tasks else []


def settings_of(config, settings: dict) -> ml_collections.ConfigDict:
    """How a config's model is sampled, with what the caller asks for in its place; see `sample`."""
    defaults = {"row": config.data.length} | config.sample.to_dict()
    if unknown := set(settings) - set(defaults):
        raise ValueError(f"settings {sorted(unknown)} are not known. Allowed: {sorted(defaults)}.")
    for name in set(settings) & {"guidance", "history"}:  # asked for, and so of all requests
        defaults[f"{name}_given"] = 0.0
    return ml_collections.ConfigDict(defaults | settings)


def scales_of(request: Request, how) -> tuple[float, float]:
    """(guidance, history): the request's own, or the settings' for its kind.

    What is given says what else a prompt alone does; a roll-out gives itself to itself, and so counts with text.
    """
    given = (request.image_YxXx3 is not None or len(request.videos) > 0) and task_of(request) != "rollout"

    def scale(name, own):
        return own if own is not None else given and how[f"{name}_given"] or how[name]

    return scale("guidance", request.guidance), scale("history", request.history)


def scales_again(request: Request, how) -> dict[str, float]:
    """The scales that make a request again whatever the settings; none that differs between its parts."""
    names, parts = ("guidance", "history"), [request]
    if task_of(request) == "loop" and not request.videos:
        parts.append(dataclasses.replace(request, videos=(np.zeros((1, request.height, request.width, 3), np.uint8),)))
    used = [scales_of(part, how) for part in parts]
    return {name: some[0] for name, some in zip(names, zip(*used)) if len(set(some)) == 1}


def _placed(trained: Trained, mesh) -> Trained:
    """The weights on every device, once: a roll-out asks for them again and again. Those cut along the mesh stay so."""
    everywhere = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    lies_there = lambda w: mesh is not None and getattr(getattr(w, "sharding", None), "mesh", None) == mesh
    place = lambda w: w if lies_there(w) else jax.device_put(w, everywhere)
    return dataclasses.replace(trained, params=jax.tree.map(place, trained.params))


def _prepare(requests: Sequence[Request], trained: Trained, settings: dict):
    """(the settings, what lays requests out, the schedule of levels), and the prompts encoded that are not yet."""
    config = trained.config
    if config.model.image_width:
        raise ValueError(f"{config.name} is shown an image encoder's tokens, which no task lays out yet.")
    how = settings_of(config, settings)
    if config.text.kind == "frozen" and config.text.encoder:
        complete(config.text, [text for request in requests for text in prompts_of(request)])
    text = make_text(config.text)
    data, patch = config.data, tuple(config.model.patch)
    layout = Layout(make_codec(config.codec), patch, text.tokenise, data.group_by, data.max_frames)
    return how, layout, uniform_levels(how.steps, how.shift)


def _warn_of_large(index: int, r: Request, task: Task, layout: Layout, trained_on: int) -> None:
    """Says so where a request lays out much more at once than any clip trained on has, and what would be as large."""
    (T, Y, X), frames = task.grid.shape, len(task.known_TxYxX)
    if task.grid.size > FAR * trained_on:
        share = min(trained_on / task.grid.size, 1) ** 0.5
        fit = lambda pixels, count: pixels // count * max(round(share * count), 1)
        logging.warning(
            "request %d has %d patches, and the model was trained on clips of up to %d: smaller ones are what it "
            "knows, and faster. Nearest: --size=%dx%d%s.",
            index, task.grid.size, trained_on, fit(r.width, X), fit(r.height, Y),
            " or a smaller --window" if r.videos and T > 8 else "",
        )  # fmt: skip
    if frames > layout.longest + 2 * layout.codec.stride[0]:
        instead = " --task=rollout makes longer videos." if task_of(r) == "text" else ""
        logging.warning(
            "request %d lays out %d frames at once, and the model was trained on clips of up to %d: what it makes may "
            "move badly.%s",
            index, frames, layout.longest, instead,
        )  # fmt: skip


def _roll_out(requests: dict, rolled: dict, layout: Layout, level_K, steps: int, solve) -> dict[int, np.ndarray]:
    """Roll-outs, {i: (layout of a window, window)}, in step with one another: one program for all chunks.

    Those of as many latent frames at once go together: how fine the stairs of one are does not hang on another.
    """
    active, windows = {i: rollout_latents(r, layout)[1] for i, r in requests.items()}, {i: rolled[i][1] for i in rolled}
    videos = {i: [] for i in rolled}
    for at_once in sorted(set(active.values())):
        some = [i for i in rolled if active[i] == at_once]
        for _ in range(max(rollout_latents(requests[i], layout)[2] for i in some) + at_once - 1):
            latents = solve({i: roll(rolled[i][0], windows[i], at_once, -(-steps // at_once), level_K) for i in some})
            for i in some:
                windows[i], frames = advance(requests[i], layout, windows[i], latents[i])
                videos[i] += [] if frames is None else [to_uint8(frames)]
    return {i: np.concatenate(videos[i])[: requests[i].frames] for i in rolled}


def _check_causal(config, history: float) -> None:
    """Raises ValueError for a model or a scale that rolls out by no cache."""
    if not config.model.window:
        raise ValueError(
            "a causal roll-out needs a model that trained with a window, and this one has model.window=0. Train with "
            "flow.causal_share and model.window, or leave causal out."
        )
    if history != 1:
        raise ValueError(f"history={history} goes with no causal roll-out, whose past is cached as it is. Give 1.")
    if not config.flow.causal_share:
        logging.warning("the model trained with flow.causal_share=0: a causal roll-out is not what it learnt.")


def _roll_out_causally(requests, starts, layout: Layout, scales, trained: Trained, how, mesh) -> list[np.ndarray]:
    """Causal roll-outs in step with one another: one program, asked for the next latent frame of each again and again.

    All that it sees of the past is a cache of the model's window, so that a frame's cost and the device's memory stay
    the same however long the video is.
    """
    counts = [rollout_latents(request, layout)[2] for request in requests]
    videos, last, caches = [[] for _ in requests], [], []
    for t in range(max(counts)):
        tasks = [latent_frame(request, layout, start, t) for request, start in zip(requests, starts)]
        frames, caches = _pack_and_solve(tasks, scales, trained, how, mesh, caches)
        for i, frame_1xYxXxC in enumerate(frames):
            # Decoded as it comes, after the one before it.
            latents_TxYxXxC = np.concatenate([last[i], frame_1xYxXxC]) if t else frame_1xYxXxC
            videos[i] += [to_uint8(layout.codec.decode(latents_TxYxXxC)[min(t, 1) :])] if t < counts[i] else []
        last = frames
    return [np.concatenate(video)[: request.frames] for video, request in zip(videos, requests)]


def _pack_and_solve(tasks: Sequence[Task], scales: Sequence[tuple], trained: Trained, how, mesh, caches=None):
    """The tasks' latents_TxYxXxC, each guided by its two scales: packs them in rows, batched by one size.

    caches: of a causal roll-out, those of the batches after the frames before, [] at first. Returns the list of latents
    and the caches after these.
    """
    config = trained.config
    largest = max(task.grid.size for task in tasks)
    length = _round_up(max(largest, min(how.row, sum(t.grid.size for t in tasks))), 64)
    rows = _rows(tasks, length)
    # Batches of one size, so that all of them are one program.
    at_once = _round_up(min(len(rows), config.data.rows), mesh.size if mesh is not None else 1)
    rows += [[]] * (-len(rows) % at_once)
    packed = [[tasks[i].piece for i in row] for row in rows]
    groups = _round_up(max(sum(p.size[2] for p in row) for row in packed), 8)
    tokens = _round_up(max(sum(p.size[1] for p in row) for row in packed), 64)
    batch, places = pack(packed, length, groups, tokens)

    level_KxBxG = np.zeros((len(tasks[0].level_Kxg), len(rows), groups), np.float32)
    scale_2xBxG = np.ones((2, len(rows), groups), np.float32)  # of guidance and of history
    grids = {}
    for b, row in enumerate(rows):
        for seg, i in enumerate(row, start=1):
            mine_G = batch.patches.seg_BxG[b] == seg
            level_KxBxG[:, b, mine_G] = tasks[i].level_Kxg
            scale_2xBxG[:, b, mine_G] = np.float32(scales[i])[:, None]
            grids[i] = dataclasses.replace(tasks[i].grid, row=b, offset=places[b][seg - 1][1])

    course_BxNxP = None
    if any(task.course_nxP is not None for task in tasks):
        course_BxNxP = np.full(batch.patches.x_BxNxP.shape, np.nan, np.float32)
        for task, grid in zip(tasks, (grids[i] for i in range(len(tasks)))):
            if task.course_nxP is not None:
                course_BxNxP[grid.row, grid.offset : grid.offset + grid.size] = task.course_nxP

    guide = bool((scale_2xBxG[0] != 1).any())
    recall = bool(((scale_2xBxG[1] != 1) & (level_KxBxG == 0).all(0)).any())  # an edit may have nothing that is known
    if caches is not None:
        block_BxN = np.where(batch.patches.seg_BxN != 0, batch.patches.frame_BxN + 1, 0).astype(np.int32)
        batch = dataclasses.replace(batch, patches=dataclasses.replace(batch.patches, block_BxN=block_BxN))
        model = make_model(config, make_codec(config.codec).channels)
        # Both conditions of guidance have a past of their own.
        caches = caches or [empty_cache(model, at_once * (1 + guide), length) for _ in range(0, len(rows), at_once)]
    run = _sampler(config.to_json(), how.solver, tuple(how.interval), guide, recall, largest)
    put = lambda a, axis=0: a if mesh is None else jax.device_put(a, batch_sharding(mesh, axis))
    done, after = [], []
    for i, start in enumerate(range(0, len(rows), at_once)):
        part = slice(start, start + at_once)
        some = jax.tree.map(lambda a, part=part: put(a[part]), batch)
        cache = caches[i] if caches else None
        course = None if course_BxNxP is None else put(course_BxNxP[part])
        levels, scale = put(level_KxBxG[:, part], 1), put(scale_2xBxG[:, part], 1)
        x_BxNxP, cache = run(trained.params, some, levels, scale, course, cache)
        done.append(np.asarray(x_BxNxP))
        after.append(cache)
    return unpack(np.concatenate(done), [grids[i] for i in range(len(tasks))]), after


def _rows(tasks, length: int) -> list[list[int]]:
    """Which requests share a row, in order of asking."""
    left, rows = list(range(len(tasks))), []
    while left:
        chosen = choose([(tasks[i].grid.size,) for i in left], (length,))
        rows.append(sorted(left[c] for c in chosen))
        left = [i for i in left if i not in rows[-1]]
    return rows


@functools.lru_cache(maxsize=8)
def _sampler(config_json: str, solver: str, interval: tuple[float, float], guide: bool, recall: bool, span: int):
    """The compiled sampler of a config; jit keeps one program per layout."""
    config = ml_collections.ConfigDict(json.loads(config_json))
    text = make_text(config.text)
    velocity = make_velocity(make_model(config, make_codec(config.codec).channels, span=span), config)

    @functools.partial(jax.jit, donate_argnames="cache")
    def run(params, batch, level_KxBxG, scale_2xBxG, course_BxNxP, cache):
        def encode(drop):
            ids, prompt = text.drop(batch.ids_BxSxK, batch.prompt_BxS, jnp.full(batch.prompt_BxS.shape, drop))
            return Cond(text.module.apply({"params": params["text"]}, ids, prompt), prompt)

        cond = encode(False)
        conditioned = lambda patches, cond: velocity(params["dit"], patches, cond, cache)[0]
        velocity_fn = functools.partial(conditioned, cond=cond)
        if guide:
            uncond = encode(True)
            velocity_fn = guided(conditioned, cond, uncond, scale_2xBxG[0], interval)
        if recall:
            known_BxG = (level_KxBxG == 0).all(0) & (batch.patches.seg_BxG != 0)
            noise_BxNxP = patch_noise(jax.random.key(0), batch.patches.uid_BxN, batch.patches.x_BxNxP.shape[-1])
            velocity_fn = recalled(velocity_fn, known_BxG, noise_BxNxP, scale_2xBxG[1])
        if course_BxNxP is not None:
            velocity_fn = led(velocity_fn, course_BxNxP)
        patches = integrate(velocity_fn, batch.patches, level_KxBxG, solver)
        x_BxNxP = patches.x_BxNxP
        if cache is not None:  # what is clean now is run once more, for the frames to come to see
            if guide:
                twice = (patches, cond), (patches, uncond)
                patches, cond = jax.tree.map(lambda *halves: jnp.concatenate(halves), *twice)
            _, cache = velocity(params["dit"], patches, cond, cache)
        return x_BxNxP, cache

    return run


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
