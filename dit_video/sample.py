"""python -m dit_video.sample --workdir=RUN --prompt='a red circle moves up and down' --size=48x32 --frames=9 --out=OUT

Samples prompts, packed in shared batches, and writes for each an mp4, a GIF and a PNG (one frame: a PNG), a page to
look at them, index.html, and samples.json, which says how to make each again. --prompt, --size, --frames, --fps, --seed
and --image may be given several times: the i-th value goes with the i-th prompt, a single one with all.
"""

import sys

from absl import app, flags

WORKDIR = flags.DEFINE_string("workdir", None, "A run, whose newest checkpoint's averaged weights are taken.")
WEIGHTS = flags.DEFINE_string("weights", None, "Or a .safetensors file of weights.")
TASK = flags.DEFINE_enum("task", "text", ["text", "animate"], "What is given: a text, or a text and the first frame.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to show; '' = anything.")
SIZE = flags.DEFINE_multi_string("size", [], "WIDTHxHEIGHT in pixels. By default the image's, else 48x32.")
FRAMES = flags.DEFINE_multi_integer("frames", [9], "Frames; 1 makes a picture.", lower_bound=1)
FPS = flags.DEFINE_multi_float("fps", [8.0], "Frames per second.")
SEED = flags.DEFINE_multi_integer("seed", [0], "Seed of the noise.", lower_bound=0)
IMAGE = flags.DEFINE_multi_string("image", [], "--task=animate: the picture to start from; resized to --size.")
NUM = flags.DEFINE_integer("num", 1, "Samples of each prompt, with seeds seed, seed + 1, ...", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; by default the config's.", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; by default the config's. 1 = none.")
SOLVER = flags.DEFINE_enum("solver", None, ["euler", "heun", "heun_full", "ab2"], "By default the config's.")
SAVE = flags.DEFINE_enum("save", "all", ["all", "png"], "png: every frame as a lossless PNG too.")
OUT = flags.DEFINE_string("out", "samples", "The folder to write to.")


def each(name: str, values: list, count: int) -> list:
    """One value per prompt. Raises ValueError unless there is one for each, or one for all."""
    if len(values) not in (1, count):
        raise ValueError(f"--{name} was given {len(values)} times for {count} prompts: give it once, or {count} times.")
    return values * count if len(values) == 1 else values


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of 'WIDTHxHEIGHT'. Raises ValueError for another form."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise ValueError(f"--size={text!r} is not of the form WIDTHxHEIGHT, such as 48x32.")
    return int(width), int(height)


def requests_from_flags(step_y: int, step_x: int) -> list:
    """The Requests that the flags ask for; step_y, step_x: pixels of a patch, to which an image's size is fitted."""
    from dit_video.tasks import Request

    prompts = PROMPT.value or [""]
    if TASK.value == "text" and not PROMPT.value:
        raise ValueError("give at least one --prompt ('' = anything).")
    if (TASK.value == "animate") != bool(IMAGE.value):
        raise ValueError("--task=animate takes an --image, and no other task does.")
    count = max(len(prompts), len(IMAGE.value))
    prompts = each("prompt", prompts, count)
    images = each("image", IMAGE.value, count) if IMAGE.value else [None] * count
    sizes = [parse_size(text) for text in each("size", SIZE.value, count)] if SIZE.value else [None] * count
    requests = []
    for prompt, image, size, frames, fps, seed in zip(
        prompts,
        images,
        sizes,
        each("frames", FRAMES.value, count),
        each("fps", FPS.value, count),
        each("seed", SEED.value, count),
    ):
        picture = None
        if image is not None:
            picture, size = read_image(image, size, step_y, step_x)
        width, height = size or (48, 32)
        requests += [Request(prompt, width, height, frames, fps, seed + j, picture) for j in range(NUM.value)]
    return requests


def read_image(path: str, size, step_y: int, step_x: int):
    """The picture as uint8 YxXx3 at `size`, or at the nearest whole patches to its own, and that (width, height)."""
    from dit_video.data.decode import decode, probe

    media = probe(path)
    if size is None:
        fit = lambda length, step: max(round(length / step), 1) * step
        size = fit(media.width, step_x), fit(media.height, step_y)
    if size != (media.width, media.height):
        print(f"{path}: {media.width}x{media.height} is resized to {size[0]}x{size[1]}", file=sys.stderr)
    return decode(media, 0.0, [0.0], size[1], size[0])[0], size


def main(argv):
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
        trained = generate.load(WORKDIR.value or WEIGHTS.value)
        config = trained.config
        (_, sy, sx), (_, py, px) = make_codec(config.codec).stride, config.model.patch
        requests = requests_from_flags(sy * py, sx * px)
        given = {"steps": STEPS.value, "guidance": GUIDANCE.value, "solver": SOLVER.value}
        how = {k: config.sample[k] for k in given} | {k: v for k, v in given.items() if v is not None}
        videos = generate.sample(requests, trained, **how)
    except (ValueError, FileNotFoundError, MediaError, CheckpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    extra = {
        "task": TASK.value,
        **how,
        "config": config.name,
        "checkpoint_step": trained.step,
        "weights": trained.source,
    }
    samples = [Sample(video, r.fps, r.prompt, r.seed, extra) for r, video in zip(requests, videos)]
    print(write_samples(OUT.value, samples, title=f"Samples of {config.name}", every_frame=SAVE.value == "png"))


def run():
    app.run(main)


if __name__ == "__main__":
    run()
