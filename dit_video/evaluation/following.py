"""How well samples follow their prompts, in the embedded world, by its scorer: pixels in, shares of prompts out."""

import numpy as np

from dit_video.data import shapes

PARTS = ("colour", "shape", "motion", "all")


def follow(prompts, videos) -> dict[str, dict[str, float]]:
    """{'one object': {...}, 'two objects': {...}}: the share of the prompts followed in colour, shape, motion and in
    all at once (of two objects both), chance beside it, and how many prompts there were.

    prompts: shapes.Prompt; videos: uint8 TxYxXx3 of each. What the scorer cannot read counts as wrong.
    """
    rows = {"one object": [], "two objects": []}
    for prompt, video in zip(prompts, videos):
        time_T = np.arange(prompt.frames, dtype=np.float32) / prompt.fps
        found = shapes.followed(shapes.score(video, time_T), prompt.caption)
        kind = ("one object", "two objects")[len(shapes.parse_caption(prompt.caption)) - 1]
        rows[kind].append(([getattr(found, part) for part in PARTS], shapes.chance(prompt.caption)["all"]))
    return {
        kind: dict(zip(PARTS, np.mean([f for f, _ in found], axis=0).tolist()))
        | {"chance": float(np.mean([c for _, c in found])), "prompts": len(found)}
        for kind, found in rows.items()
        if found
    }
