"""How well samples follow their prompts, in the embedded world, by its scorer: pixels in, shares of prompts out."""

import dataclasses

import numpy as np

from dit_video.data.shapes import COLOURS, MOTIONS, SHAPES, parse_caption
from dit_video.evaluation.scorer import score

PARTS = ("colour", "shape", "motion", "all")


@dataclasses.dataclass(frozen=True)
class Followed:
    """Which parts of a caption a clip shows. `all` is not the conjunction: it asks for them on the same objects."""

    colour: bool
    shape: bool
    motion: bool
    all: bool


def followed(readings, text):
    """What of a caption the readings show, as Followed. A caption of a picture asks for no motion."""
    asked = parse_caption(text)
    seen = [r.label for r in readings]
    if not any(x.motion for x in asked):
        seen = [x._replace(motion=None) for x in seen]
    same = [sorted(map(str, a)) == sorted(map(str, b)) for a, b in zip(_parts(asked), _parts(seen), strict=True)]
    return Followed(*same)


def _parts(labels):
    return [x.colour for x in labels], [x.shape for x in labels], [x.motion for x in labels], labels


def chance(text):
    """The probabilities of each part of Followed for a clip of as many objects with random labels."""
    asked = parse_caption(text)
    moving = any(x.motion for x in asked)
    c, s, m = len(COLOURS), len(SHAPES), len(MOTIONS) if moving else 1
    if len(asked) == 1:
        return {"colour": 1 / c, "shape": 1 / s, "motion": 1 / m, "all": 1 / (c * s * m)}
    pairs = c * (c - 1)  # two objects have different colours; the order is free
    orders_s, orders_m = (len({getattr(x, part) for x in asked}) for part in ("shape", "motion"))
    return {
        "colour": 2 / pairs,
        "shape": orders_s / s**2,
        "motion": orders_m / m**2,
        "all": 2 / (pairs * s**2 * m**2),
    }


def follow(prompts, videos) -> dict[str, dict[str, float]]:
    """{'one object': {...}, 'two objects': {...}}: the share of the prompts followed in colour, shape, motion and in
    all at once (of two objects both), chance beside it, and how many prompts there were.

    prompts: data.shapes.Prompt; videos: uint8 TxYxXx3 of each. What the scorer cannot read counts as wrong.
    """
    rows = {"one object": [], "two objects": []}
    for prompt, video in zip(prompts, videos):
        time_T = np.arange(prompt.frames, dtype=np.float32) / prompt.fps
        found = followed(score(video, time_T), prompt.caption)
        kind = ("one object", "two objects")[len(parse_caption(prompt.caption)) - 1]
        rows[kind].append(([getattr(found, part) for part in PARTS], chance(prompt.caption)["all"]))
    return {
        kind: dict(zip(PARTS, np.mean([f for f, _ in found], axis=0).tolist()))
        | {"chance": float(np.mean([c for _, c in found])), "prompts": len(found)}
        for kind, found in rows.items()
        if found
    }
