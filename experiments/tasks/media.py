"""Draws the small clips, the picture and the mask that README.md's commands start from: experiments/tasks/media/.

python -m experiments.tasks.media
"""

import pathlib

import numpy as np

from dit_video.data import shapes
from dit_video.gallery import write_mp4, write_png

FOLDER = pathlib.Path(__file__).parent / "media"
BACKGROUND = shapes.Background(0.5, (0.02, -0.01, -0.01), 0.1, 0.3, "waves", 0.08, 2.0, 0.4, (0.1, 0.2))
OBJECTS = {
    "circle": shapes.Object("circle", "blue", "clockwise", (0.5, 0.5), 0.0),
    "cross": shapes.Object("cross", "red", "left-right", (0.5, 0.5), 1.0),
}

for name, thing in OBJECTS.items():
    video_TxYxXx3 = shapes.render(shapes.Scene((thing,), BACKGROUND), np.arange(13) / 8, 32, 48)
    write_mp4(FOLDER / f"{name}.mp4", video_TxYxXx3, fps=8, scale=1)
    write_png(FOLDER / f"{name}.png", video_TxYxXx3[0])
    if name == "circle":  # most of a period, for a loop to close
        write_mp4(FOLDER / "arc.mp4", video_TxYxXx3[:9], fps=8, scale=1)
mask_YxXx3 = np.zeros((32, 48, 3), np.uint8)
mask_YxXx3[8:24, 20:40] = 255
write_png(FOLDER / "mask.png", mask_YxXx3)
