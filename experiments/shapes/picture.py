"""The README's moving picture: prompts of several sizes, sampled in one packed batch and tiled.

python experiments/shapes/picture.py --weights=experiments/shapes/weights.safetensors
"""

import numpy as np
from absl import app, flags

from dit_video import Request, sample
from dit_video.gallery import write_gif

WEIGHTS = flags.DEFINE_string("weights", "experiments/shapes/weights.safetensors", "A file or a workdir.")
OUT = flags.DEFINE_string("out", "experiments/shapes/samples.gif", "The GIF.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the first sample.")

# Columns of clips that are as wide as one another: (width, [(height, prompt), ...]).
COLUMNS = (
    (48, [(32, "a red cross moves up and down"), (32, "a green circle moves left and right")]),
    (32, [(64, "a cyan square moves up and down and a pink circle circles counterclockwise")]),
    (40, [(32, "a blue square circles clockwise"), (32, "an orange circle circles counterclockwise")]),
    (64, [(32, "a yellow triangle moves left and right and a purple circle moves up and down")] * 2),
    (32, [(32, "a pink square moves along the rising diagonal"), (32, "a purple triangle moves up and down")]),
)


def main(_):
    asked = [(width, height, prompt) for width, column in COLUMNS for height, prompt in column]
    requests = [
        Request(prompt, width, height, frames=13, fps=8.0, seed=SEED.value + i)
        for i, (width, height, prompt) in enumerate(asked)
    ]
    videos = iter(sample(requests, WEIGHTS.value))
    edge = 2
    columns = [
        np.concatenate([np.pad(next(videos), [(0, 0), (edge,) * 2, (edge,) * 2, (0, 0)]) for _ in column], axis=1)
        for _, column in COLUMNS
    ]
    tallest = max(c.shape[1] for c in columns)
    fit = lambda c: np.pad(c, [(0, 0), (0, tallest - c.shape[1]), (0, 0), (0, 0)])
    write_gif(OUT.value, np.concatenate([fit(c) for c in columns], axis=2), 8.0, scale=3)


if __name__ == "__main__":
    app.run(main)
