"""python -m dit_video.sample --workdir=RUN --prompt='a red circle moves up and down' --size=48x32 --frames=9 --out=OUT

Samples what is asked for, packed in shared batches, and writes for each an mp4, a GIF and a PNG (one frame: a PNG), a
page to look at them, index.html, and samples.json, which says how to make each again: its "request" is a line for
--requests. Flags that may be given several times: the i-th value goes with the i-th prompt, a single one with all.
"""

import contextlib
import sys

from absl import app, flags

TASKS = ["text", "animate", "extend", "connect", "loop", "paint", "edit", "interpolate", "timeline", "rollout"]

WORKDIR = flags.DEFINE_string("workdir", None, "A run, whose newest checkpoint's averaged weights are taken.")
WEIGHTS = flags.DEFINE_string("weights", None, "Or weights without a run: a .safetensors file, or its directory.")
LORA = flags.DEFINE_string("lora", None, "A .safetensors file of low-rank factors to merge into the weights.")
LORA_STRENGTH = flags.DEFINE_float("lora_strength", 1.0, "How much of them; 1 = as they were trained.")
REQUESTS = flags.DEFINE_string(
    "requests", None, "A JSON lines file of requests; keys as the flags from --task to --num, --guidance and --history."
)
TASK = flags.DEFINE_enum("task", "text", TASKS, "What is asked for; README.md has a command of each.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to show; '' = anything. --task=timeline: 'SECONDS: prompt'.")
SIZE = flags.DEFINE_multi_string("size", [], "WIDTHxHEIGHT in pixels. By default that of what is given, else 48x32.")
FRAMES = flags.DEFINE_multi_integer(
    "frames",
    [],
    "Frames, 9 by default (timeline: up to a second after the last prompt begins); 1 makes a picture.",
    lower_bound=1,
)
FPS = flags.DEFINE_multi_float("fps", [], "Frames per second; by default the video's, else 8.")
SEED = flags.DEFINE_multi_integer("seed", [], "Seed of the noise, 0 by default.", lower_bound=0)
IMAGE = flags.DEFINE_multi_string("image", [], "animate: the picture to start from.")
VIDEO = flags.DEFINE_multi_string("video", [], "The file to start from; connect: the two files.")
MASK = flags.DEFINE_multi_string(
    "mask", [], "paint, edit: a picture or video, white = anew, or box:y0,x0,y1,x1[,t0,t1] of the video as it is read."
)
DIRECTION = flags.DEFINE_multi_enum("direction", [], ["forward", "backward"], "extend: where to; forward by default.")
NEW_FRAMES = flags.DEFINE_multi_integer("new_frames", [], "extend, connect, loop: frames to make, 8 by default.")
CONTEXT = flags.DEFINE_multi_integer(
    "context",
    [],
    "Frames next to the new ones that the model sees, in whole groups; by default all that fit (loop, rollout: 5).",
)
STRENGTH = flags.DEFINE_multi_float("strength", [], "edit, interpolate: the level to start from, 0.6 by default.")
FACTOR = flags.DEFINE_multi_float("factor", [], "interpolate: frames out per frame in; or give --fps.")
WINDOW = flags.DEFINE_multi_integer(
    "window", [], "Frames laid out at once; by default those of the longest clip trained on."
)
CAUSAL = flags.DEFINE_bool("causal", None, "rollout: frame by frame, with a cache, by a model trained frame-causally.")
NUM = flags.DEFINE_multi_integer("num", [1], "Samples of each, with seeds seed, seed + 1, ...", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; by default the config's.", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; by default the config's. 1 = none.")
HISTORY = flags.DEFINE_float("history", None, "Guidance scale of what is known; by default the config's. 1 = none.")
SOLVER = flags.DEFINE_enum("solver", None, ["euler", "heun", "heun_full", "ab2"], "By default the config's.")
SAVE = flags.DEFINE_enum(
    "save", "all", ["all", "png", "latents"], "png: every frame as a lossless PNG too; latents: an .npz, undecoded."
)
OUT = flags.DEFINE_string("out", "samples", "The folder to write to.")

FOR_ALL = (
    WORKDIR, WEIGHTS, LORA, LORA_STRENGTH, REQUESTS, TASK, CAUSAL, STEPS, GUIDANCE, HISTORY, SOLVER, SAVE, OUT,
)  # fmt: skip
for one in FOR_ALL:  # given twice, it is refused; absl would take the last
    flags.FLAGS[one.name].allow_overwrite = False

SEVERAL = {
    "size": SIZE,
    "frames": FRAMES,
    "fps": FPS,
    "seed": SEED,
    "image": IMAGE,
    "mask": MASK,
    "direction": DIRECTION,
    "new_frames": NEW_FRAMES,
    "context": CONTEXT,
    "strength": STRENGTH,
    "factor": FACTOR,
    "window": WINDOW,
    "num": NUM,
}


def each(name: str, values: list, count: int) -> list:
    """One value per request. Raises ValueError unless there is one for each, or one for all."""
    if len(values) not in (1, count):
        several = f"s: give it once, or {count} times" if count > 1 else ": give it once"
        raise ValueError(f"--{name} was given {len(values)} times for {count} request{several}.")
    return values * count if len(values) == 1 else values


def fields_from_flags() -> list[dict]:
    """What the flags ask for, request by request, in the form of a line of --requests."""
    task, prompts, videos = TASK.value, PROMPT.value, VIDEO.value
    if task == "text" and not prompts:
        raise ValueError("give at least one --prompt ('' = anything).")
    prompts = [prompts] * bool(prompts) if task == "timeline" else prompts
    if task == "connect":
        if len(videos) % 2:
            raise ValueError(f"--task=connect takes videos in pairs; --video was given {len(videos)} times.")
        videos = [list(pair) for pair in zip(videos[::2], videos[1::2])]
    several = {name: flag.value for name, flag in SEVERAL.items()} | {"prompt": prompts, "video": videos}
    count = max(1, len(prompts), len(IMAGE.value), len(videos))
    values = {name: each(name, given, count) for name, given in several.items() if given}
    alike = {"task": task} | ({} if CAUSAL.value is None else {"causal": CAUSAL.value})
    return [alike | {k: v[i] for k, v in values.items()} for i in range(count)]


def asked(step_yx: tuple[int, int]) -> list:
    """What --requests or the other flags ask for, media read; step_yx: pixels of a patch."""
    from dit_video.requests import read, read_lines

    if REQUESTS.value is None:
        return [one for fields in fields_from_flags() for one in read(fields, step_yx)]
    beside = ["task", "prompt", "video", "causal", *SEVERAL]
    given = [name for name in beside if flags.FLAGS[name].using_default_value is False]
    if given:
        raise ValueError(f"--{given[0]} goes with no --requests: write it in the lines of {REQUESTS.value}.")
    return read_lines(REQUESTS.value, step_yx)


@contextlib.contextmanager
def made_out():
    """OUT, made and tried, since what takes hours to sample may not be lost; a new one goes if nothing comes of it.

    Raises ValueError if it cannot be written to.
    """
    from etils import epath

    folder = epath.Path(OUT.value)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".trial"
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise ValueError(
            f"--out={OUT.value} cannot be written to ({error.strerror or error}): give a folder that can."
        ) from error
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()
        raise


def save_latents(latents, requests):
    """Writes OUT/latents.npz: latents_000, ... (TxYxXxC, float32), prompts, seeds and fps; returns its path."""
    import numpy as np
    from etils import epath

    path = epath.Path(OUT.value) / "latents.npz"
    arrays = {f"latents_{i:03d}": latents_TxYxXxC for i, latents_TxYxXxC in enumerate(latents)}
    arrays |= {f"{name}s": [getattr(r, name) for r in requests] for name in ("prompt", "seed")}
    with path.open("wb") as file:
        np.savez(file, **arrays, fps=[r.fps for r in requests])
    return path


def main(argv):
    import jax

    from dit_video import generate, launch
    from dit_video.checkpoint import CheckpointError
    from dit_video.codecs import make_codec
    from dit_video.data.decode import MediaError
    from dit_video.gallery import Sample, write_samples

    launch.prepare()
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r} is no flag: put the whole prompt in quotes.")
        if (WORKDIR.value is None) == (WEIGHTS.value is None):
            raise ValueError("give one of --workdir and --weights.")
        on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        trained = generate.load(WORKDIR.value or WEIGHTS.value, on_device)
        if LORA.value:
            trained = generate.add_lora(trained, LORA.value, LORA_STRENGTH.value)
        config = trained.config
        (_, sy, sx), (_, py, px) = make_codec(config.codec).stride, config.model.patch
        wanted = asked((sy * py, sx * px))
        given = {"steps": STEPS, "guidance": GUIDANCE, "history": HISTORY, "solver": SOLVER}
        asked_for = {k: flag.value for k, flag in given.items() if flag.value is not None}
        settings = generate.settings_of(config, asked_for)
        requests = [one.request for one in wanted]
        with made_out():
            if SAVE.value == "latents":
                print(save_latents(generate.sample_latents(requests, trained, **asked_for), requests))
                return
            videos = generate.sample(requests, trained, **asked_for)
    except generate.RequestError as error:
        sys.exit(f"ValueError: {wanted[error.index].place}{error}")
    except (ValueError, FileNotFoundError, MediaError, CheckpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    how = {k: settings[k] for k in ("steps", "solver")}
    scales = [generate.scales_again(request, settings) for request in requests]
    made_by = {"config": config.name, "checkpoint_step": trained.step, "weights": trained.source}
    samples = [
        Sample(
            video,
            one.request.fps,
            one.request.prompt,
            one.request.seed,
            {"task": one.fields["task"], **how, **scale, **made_by, "request": one.fields | scale},
        )
        for one, scale, video in zip(wanted, scales, videos)
    ]
    print(write_samples(OUT.value, samples, title=f"Samples of {config.name}", every_frame=SAVE.value == "png"))


def run():
    app.run(main)


if __name__ == "__main__":
    run()
