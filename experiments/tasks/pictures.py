"""Draws a moving picture for each command in README.md's section on tasks, as it stands: experiments/tasks/pictures/.

    python -m experiments.tasks.pictures --weights=runs/tasks [--out=FOLDER]

Without --out, README.md shows them too: under its commands are their pictures, put there if they are not yet.
All that the commands ask for is sampled at once, packed; a picture has the name of its command's --out. Frames that
were given have a white edge. Of a video longer than MOST frames the first SHOWN and the last stand side by side.
"""

import dataclasses
import pathlib
import re
import shlex
import sys

import numpy as np
from absl import flags
from absl.testing import flagsaver

import dit_video.sample as command
from dit_video import generate, launch
from dit_video.codecs import make_codec
from dit_video.gallery import write_gif
from dit_video.requests import Asked, read

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SECTION = "## Every task from one model"
MOST, SHOWN, MOST_BYTES = 60, 13, 200_000
PICTURES = str(pathlib.Path(__file__).parent / "pictures")


def commands(text: str) -> list[list[str]]:
    """The flags of each of the section's commands that `wanted` says."""
    section = text.split(SECTION)[1].split("\n## ")[0]
    return [shlex.split(line)[3:] for line in section.splitlines() if wanted(line)]


def wanted(line: str) -> bool:
    """Whether a line is a command with a --task that starts from the small trained model."""
    return line.startswith("python -m dit_video.sample --weights=") and "--task=" in line


def asked_by(words: list[str], step_yx) -> tuple[str, Asked]:
    """The name of a command's --out, and its request."""
    with flagsaver.flagsaver():
        for flag in command.FOR_ALL:  # some were given to this program
            flags.FLAGS[flag.name].unparse()
        flags.FLAGS(["sample", *words])
        (asked,) = [one for fields in command.fields_from_flags() for one in read(fields, step_yx)]
        asked = dataclasses.replace(asked, request=dataclasses.replace(asked.request, guidance=command.GUIDANCE.value))
        return pathlib.Path(command.OUT.value).name, asked


def illustrated(text: str) -> str:
    """README.md's text with the pictures of each of the section's blocks of commands in the line below it."""

    def under(block: re.Match) -> str:
        names = [re.search(r"--out=samples/(\w+)", line)[1] for line in block[1].splitlines() if wanted(line)]
        pictures = " ".join(f"![{name}](experiments/tasks/pictures/{name}.gif)" for name in names)
        return block[1] + (f"\n{pictures}\n" if names else block[2] or "")

    before, section = text.split(SECTION)
    section, *rest = section.split("\n## ", 1)
    section = re.sub(r"(```sh\n.*?```\n)(\n!\[.*?\n)?", under, section, flags=re.DOTALL)
    return before + SECTION + "\n## ".join([section, *rest])


def edged(video: np.ndarray, given: list[np.ndarray]) -> np.ndarray:
    """The video with an edge: white around frames that are among those given, else dark."""
    white_T = [any(frame.shape == g.shape and (frame == g).all() for g in given) for frame in video]
    framed = np.pad(video, [(0, 0), (2, 2), (2, 2), (0, 0)], constant_values=40)
    inside = np.zeros(framed.shape[1:3], bool)
    inside[2:-2, 2:-2] = True
    return np.where(np.array(white_T)[:, None, None, None] & ~inside[..., None], np.uint8(255), framed)


def main() -> None:
    launch.prepare()
    trained, out, readme = generate.load(command.WEIGHTS.value), pathlib.Path(command.OUT.value), ROOT / "README.md"
    (_, sy, sx), (_, py, px) = make_codec(trained.config.codec).stride, trained.config.model.patch
    wanted = [asked_by(words, (sy * py, sx * px)) for words in commands(readme.read_text())]
    videos = generate.sample([asked.request for _, asked in wanted], trained)
    for (name, asked), video in zip(wanted, videos):
        request = asked.request
        given = [frame for v in request.videos for frame in v]
        given += [] if request.image_YxXx3 is None else [request.image_YxXx3]
        video = edged(video, given)
        if len(video) > MOST:
            video = np.concatenate([video[:SHOWN], video[-SHOWN:]], axis=2)
        file = out / f"{name}.gif"
        write_gif(file, video, request.fps, scale=3)
        if file.stat().st_size > MOST_BYTES:
            write_gif(file, video, request.fps, scale=2)
        print(f"{file} {file.stat().st_size / 1000:.0f} kB")

    if command.OUT.value == PICTURES:
        readme.write_text(illustrated(readme.read_text()))


if __name__ == "__main__":
    flags.FLAGS.set_default("out", PICTURES)
    flags.FLAGS(sys.argv)
    main()
