"""The embedded world: captioned clips of coloured shapes on closed orbits, drawn on the fly from (seed, index).

Everything in a clip follows from its caption and a few numbers: an object's orbit has one period for all, its size
and amplitude follow from the canvas and the number of objects, and so its centre and phase can be read from any five
frames. Some combinations are never drawn for training, so that prompts can ask for them. `evaluation/scorer.py`
reads the labels back from pixels.

T frames, Y x X the canvas in pixels, K objects (at most 2), P pixels in a list, R draws. Positions are (y, x) in
pixels, y down; pixel (0, 0) covers [0, 1] x [0, 1]. Time is in seconds. "Short" is a canvas' shorter side.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import re
import typing

import numpy as np

from dit_video.patches import Clip

PERIOD = 1.6  # seconds, of every orbit
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (225, 25, 35),
    "orange": (255, 125, 0),
    "yellow": (250, 225, 20),
    "green": (30, 170, 45),
    "cyan": (15, 205, 220),
    "blue": (35, 75, 235),
    "purple": (135, 45, 210),
    "pink": (255, 75, 185),
}
_SLANT = 0.5**0.5
# An orbit is this matrix times (cos, sin), in amplitudes; its rows are y and x. Clockwise is as the viewer sees it.
ORBITS = {
    "left-right": ((0, 0), (0, 1)),
    "up-down": ((0, 1), (0, 0)),
    "rising": ((0, -_SLANT), (0, _SLANT)),
    "falling": ((0, _SLANT), (0, _SLANT)),
    "clockwise": ((0, 1), (1, 0)),
    "counterclockwise": ((0, -1), (1, 0)),
}
MOTIONS = {
    "left-right": "moves left and right",
    "up-down": "moves up and down",
    "rising": "moves along the rising diagonal",
    "falling": "moves along the falling diagonal",
    "clockwise": "circles clockwise",
    "counterclockwise": "circles counterclockwise",
}
# No colour is in more than one pair of each kind, so every shape, colour and motion stays common in training.
HELD_OUT_SHAPES = frozenset({("circle", "red"), ("square", "yellow"), ("triangle", "cyan"), ("cross", "purple")})
HELD_OUT_MOTIONS = frozenset(
    {
        ("orange", "left-right"),
        ("green", "up-down"),
        ("blue", "rising"),
        ("pink", "falling"),
        ("yellow", "clockwise"),
        ("purple", "counterclockwise"),
    }
)
CANVASES = ((32, 32), (48, 32), (32, 48), (40, 40), (64, 32), (32, 64))  # width, height
DURATIONS = {5: (8,), 9: (8, 12), 13: (8, 12)}  # frames: frames per second
SPLITS = ("train", "validation")

# By a scene's size, how many objects it has or "large": one alone that is easier to draw.
RADIUS = {1: 0.20, 2: 0.14, "large": 0.26}  # of an object, in short sides
AMPLITUDE = {1: 0.26, 2: 0.17, "large": 0.20}  # of an orbit, likewise
_JITTER = {1: 0.1, 2: 0.1}  # how far apart the orbits' centres may be drawn, in shares of the room
_HALF_SQUARE, _TRIANGLE, _CROSS_LENGTH, _CROSS_WIDTH = 0.88, 1.36, 1.12, 0.36  # in radii; areas are nearly equal
_EXTENT = {  # in radii: up, down, left or right
    "circle": (1.0, 1.0, 1.0),
    "square": (_HALF_SQUARE, _HALF_SQUARE, _HALF_SQUARE),
    "triangle": (_TRIANGLE, _TRIANGLE / 2, _TRIANGLE * 0.75**0.5),
    "cross": (_CROSS_LENGTH, _CROSS_LENGTH, _CROSS_LENGTH),
}
_BOUND = {  # in radii: the circle around the shape
    "circle": 1.0,
    "square": _HALF_SQUARE * 2**0.5,
    "triangle": _TRIANGLE,
    "cross": (_CROSS_LENGTH**2 + _CROSS_WIDTH**2) ** 0.5,
}
_RIM, _RIM_SHADE = 0.16, 0.6  # the darker outline, inside the shape: its width in radii, its brightness


class Label(typing.NamedTuple):
    """What a caption says of one object. `motion` is None in a still picture, "none" where a scorer saw none."""

    shape: str
    colour: str
    motion: str | None


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape on its orbit.

    centre_yx: the orbit's centre as a share of the room that the canvas leaves it, in [0, 1] (0: as far up or left as
    it fits), so that one scene fits any canvas; phase: radians at time 0.
    """

    shape: str
    colour: str
    motion: str
    centre_yx: tuple[float, float]
    phase: float


@dataclasses.dataclass(frozen=True)
class Background:
    """A static grey texture: a gradient and a pattern. Brightness in [0, 1], lengths in short sides, angles in radians.

    tint_rgb sums to 0 and is far paler than any colour in COLOURS.
    """

    grey: float
    tint_rgb: tuple[float, float, float]
    slope: float
    slope_angle: float
    pattern: str  # "waves" or "weave"
    contrast: float
    frequency: float
    angle: float
    shift_yx: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects in painter's order (the last is in front), over a background; large: one alone, larger, moving less."""

    objects: tuple[Object, ...]
    background: Background
    large: bool = False

    @property
    def size(self):
        """The key of RADIUS and AMPLITUDE."""
        return "large" if self.large else len(self.objects)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request for a clip."""

    caption: str
    width: int
    height: int
    frames: int
    fps: int


def held_out(label):
    """Whether training never shows this object: its (shape, colour) or its (colour, motion) is held out."""
    return (label.shape, label.colour) in HELD_OUT_SHAPES or (label.colour, label.motion) in HELD_OUT_MOTIONS


_ALL_LABELS = tuple(Label(*x) for x in itertools.product(SHAPES, COLOURS, MOTIONS))
_TRAINED = tuple(x for x in _ALL_LABELS if not held_out(x))
_HELD_OUT = tuple(x for x in _ALL_LABELS if held_out(x))


# Drawing a scene


def draw_labels(rng, count, pool=_TRAINED):
    """`count` labels of different colours, each uniform in `pool`."""
    labels = [pool[rng.integers(len(pool))]]
    while len(labels) < count:
        label = pool[rng.integers(len(pool))]
        if label.colour not in [x.colour for x in labels]:
            labels.append(label)
    return tuple(labels)


def draw_scene(rng, labels, large=False):
    """A Scene of these labels (with motions): centres, phases and background from `rng`; large: where it is one object.

    One object circles about the middle. Of two, the one named first has the upper left corner of the room, the other
    the lower right one, and their phases are such that they stay apart at all times; if no draw of 256 does, the one
    that comes nearest to it is taken. Where an orbit lies is thus known well before its motion is: with centres
    anywhere a model needs some ten times the steps to follow motions.
    """
    best, best_gap = None, -np.inf
    for _ in range(8):
        centre_RxKx2, phase_RxK = _draw_centres(rng, len(labels)), rng.uniform(0, 2 * np.pi, (32, len(labels)))
        gap_R = _gap(labels, centre_RxKx2, phase_RxK) if len(labels) > 1 else np.full(32, np.inf)
        apart_R = gap_R > 0.02
        row = int(np.argmax(apart_R) if apart_R.any() else np.argmax(gap_R))
        if gap_R[row] > best_gap:
            best, best_gap = (centre_RxKx2[row], phase_RxK[row]), gap_R[row]
        if apart_R.any():
            break
    objects = tuple(Object(*x, tuple(c.tolist()), float(p)) for x, c, p in zip(labels, *best, strict=True))
    return Scene(objects, _draw_background(rng), large and len(objects) == 1)


def _draw_centres(rng, count):
    """centre_RxKx2 of 32 draws, in shares of the room."""
    jitter_RxKx2 = _JITTER[count] * rng.random((32, count, 2))
    if count == 1:
        return 0.5 + jitter_RxKx2 - _JITTER[1] / 2
    return np.abs(np.array([[0, 0], [1, 1]]) - jitter_RxKx2)


def _draw_background(rng):
    tint_3 = rng.uniform(-1, 1, 3)
    tint_3 -= tint_3.mean()
    return Background(
        grey=float(rng.uniform(0.4, 0.7)),
        tint_rgb=tuple((0.05 * tint_3).tolist()),
        slope=float(rng.uniform(0, 0.12)),
        slope_angle=float(rng.uniform(0, 2 * np.pi)),
        pattern=("waves", "weave")[rng.integers(2)],
        contrast=float(rng.uniform(0.03, 0.08)),
        frequency=float(rng.uniform(0.5, 1.5)),
        angle=float(rng.uniform(0, np.pi)),
        shift_yx=tuple(rng.random(2).tolist()),
    )


@functools.lru_cache(maxsize=4096)
def _room(shape, motion, size, height, width):
    """Where an orbit's centre may lie: (lowest, highest), each (y, x) in pixels, so that the object stays inside."""
    short = min(height, width)
    up, down, side = (RADIUS[size] * short * e for e in _EXTENT[shape])
    reach_y, reach_x = AMPLITUDE[size] * short * np.linalg.norm(ORBITS[motion], axis=1)
    room = np.array([(up + reach_y, side + reach_x), (height - down - reach_y, width - side - reach_x)])
    room.flags.writeable = False
    return room


def _gap(labels, centre_RxKx2, phase_RxK):
    """The least distance between two objects' bounding circles over a period, in short sides; gap_R.

    It is that of a square canvas; a longer one moves the two centres apart.
    """
    # Paths of one period: their difference is a centre_Rx2 plus an orbit_Rx2x2 times (cos, sin) of the time.
    centre_Rx2, orbit_Rx2x2 = 0, 0
    for k, (label, sign) in enumerate(zip(labels, (1, -1), strict=True)):
        low_2, high_2 = _room(label.shape, label.motion, 2, 1, 1)
        centre_Rx2 = centre_Rx2 + sign * (low_2 + centre_RxKx2[:, k] * (high_2 - low_2))
        cos_R, sin_R = np.cos(phase_RxK[:, k]), np.sin(phase_RxK[:, k])
        turn_Rx2x2 = np.stack([cos_R, -sin_R, sin_R, cos_R], -1).reshape(-1, 2, 2)
        orbit_Rx2x2 = orbit_Rx2x2 + sign * AMPLITUDE[2] * (np.array(ORBITS[label.motion]) @ turn_Rx2x2)
    apart_Rx2xt = centre_Rx2[..., None] + orbit_Rx2x2 @ _CIRCLE_2xt
    return np.sqrt(np.square(apart_Rx2xt).sum(1).min(1)) - RADIUS[2] * sum(_BOUND[x.shape] for x in labels)


_CIRCLE_2xt = np.array([f(np.linspace(0, 2 * np.pi, 32, endpoint=False)) for f in (np.cos, np.sin)])


# Pixels


def centres(scene, time_T, height, width):
    """Where the objects are: centre_TxKx2, (y, x) in pixels, for any times in seconds."""
    time_T = np.asarray(time_T, np.float64)
    centre_KxTx2 = []
    for o in scene.objects:
        low_2, high_2 = _room(o.shape, o.motion, scene.size, height, width)
        angle_T = 2 * np.pi * time_T / PERIOD + o.phase
        orbit_Tx2 = np.stack([np.cos(angle_T), np.sin(angle_T)], 1) @ np.transpose(ORBITS[o.motion])
        amplitude = AMPLITUDE[scene.size] * min(height, width)
        centre_KxTx2.append(low_2 + np.array(o.centre_yx) * (high_2 - low_2) + amplitude * orbit_Tx2)
    return np.stack(centre_KxTx2, 1)


def depth_inside(shape, centre_Tx2, radius, height, width):
    """How deep inside the shape each pixel's centre lies, depth_TxYxX in pixels; negative outside."""
    y_TxYx1 = (np.arange(height) + 0.5 - centre_Tx2[:, :1]).astype(np.float32)[:, :, None]
    x_Tx1xX = (np.arange(width) + 0.5 - centre_Tx2[:, 1:]).astype(np.float32)[:, None, :]
    if shape == "circle":
        return radius - np.sqrt(y_TxYx1**2 + x_Tx1xX**2)
    if shape == "square":
        return _HALF_SQUARE * radius - np.maximum(np.abs(y_TxYx1), np.abs(x_Tx1xX))
    if shape == "triangle":
        slanted_TxYxX = 0.5 * y_TxYx1 - 0.75**0.5 * np.abs(x_Tx1xX)
        return _TRIANGLE / 2 * radius + np.minimum(slanted_TxYxX, -y_TxYx1)
    y_TxYx1, x_Tx1xX, length, thin = np.abs(y_TxYx1), np.abs(x_Tx1xX), _CROSS_LENGTH * radius, _CROSS_WIDTH * radius
    upright_TxYxX = np.minimum(length - y_TxYx1, thin - x_Tx1xX)
    return np.maximum(upright_TxYxX, np.minimum(thin - y_TxYx1, length - x_Tx1xX))


def cover_and_shade(depth, radius):
    """How much of a pixel the shape covers, and how bright its colour is there; both in [0, 1]."""
    core = np.clip(0.5 + depth - _RIM * radius, 0, 1)
    return np.clip(0.5 + depth, 0, 1), _RIM_SHADE + (1 - _RIM_SHADE) * core


def _depths(scene, time_T, height, width):
    radius, centre_TxKx2 = RADIUS[scene.size] * min(height, width), centres(scene, time_T, height, width)
    return [depth_inside(o.shape, centre_TxKx2[:, k], radius, height, width) for k, o in enumerate(scene.objects)]


def visibility(scene, time_T, height, width):
    """The share of each object that no object in front of it covers: visible_TxK in [0, 1]."""
    cover_KxTxYxX = np.clip(0.5 + np.stack(_depths(scene, time_T, height, width)), 0, 1)
    clear_KxTxYxX = np.ones_like(cover_KxTxYxX)
    for k in range(len(scene.objects)):
        clear_KxTxYxX[:k] *= 1 - cover_KxTxYxX[k]
    return ((cover_KxTxYxX * clear_KxTxYxX).sum((2, 3)) / cover_KxTxYxX.sum((2, 3))).T


def _paint_background(background, height, width):
    """rgb_YxXx3 in [0, 255], float32."""
    b, short = background, min(height, width)
    y_Yx1 = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / short)[:, None]
    x_1xX = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / short)[None]
    slope_y, slope_x = b.slope * math.sin(b.slope_angle), b.slope * math.cos(b.slope_angle)
    grey_YxX = slope_y * y_Yx1 + (slope_x * x_1xX + b.grey)
    shift_y, shift_x = (2 * math.pi * s for s in b.shift_yx)
    along_y, along_x = (2 * math.pi * b.frequency * f(b.angle) for f in (math.sin, math.cos))
    along_YxX = along_y * y_Yx1 + (along_x * x_1xX + shift_y)
    across_YxX = along_x * y_Yx1 + (shift_x - along_y * x_1xX)
    pattern_YxX = np.sin(along_YxX)
    if b.pattern == "weave":
        pattern_YxX = pattern_YxX * np.sin(across_YxX)
    return 255 * (grey_YxX + b.contrast * pattern_YxX)[..., None] + 255 * np.array(b.tint_rgb, np.float32)


def render(scene, time_T, height, width):
    """The scene at any times, in seconds, on any canvas, in pixels: video_TxYxXx3, uint8, anti-aliased."""
    time_T = np.atleast_1d(time_T)
    to_pixels = lambda painted: np.clip(np.rint(painted), 0, 255).astype(np.uint8)
    background_YxXx3 = _paint_background(scene.background, height, width)
    video_TxYxXx3 = np.repeat(to_pixels(background_YxXx3)[None], len(time_T), 0)
    # Only the pixels that some object touches are painted in each frame.
    radius, depths = RADIUS[scene.size] * min(height, width), _depths(scene, time_T, height, width)
    touched_P = np.flatnonzero(functools.reduce(np.maximum, depths) > -0.5)
    painted_Px3 = background_YxXx3.reshape(-1, 3)[touched_P % (height * width)]
    for o, depth_TxYxX in zip(scene.objects, depths, strict=True):
        cover_P, shade_P = cover_and_shade(depth_TxYxX.ravel()[touched_P], radius)
        object_Px3 = shade_P[:, None] * np.array(COLOURS[o.colour], np.float32)
        painted_Px3 += cover_P[:, None] * (object_Px3 - painted_Px3)
    video_TxYxXx3.reshape(-1, 3)[touched_P] = to_pixels(painted_Px3)
    return video_TxYxXx3


# Captions


def describe(labels, moving):
    """The caption of these labels (or Objects), in their order; without motions where `moving` is False."""
    names = [f"{'an' if x.colour[0] in 'aeiou' else 'a'} {x.colour} {x.shape}" for x in labels]
    if not moving:
        return "a picture of " + " and ".join(names)
    return " and ".join(f"{name} {MOTIONS[x.motion]}" for name, x in zip(names, labels, strict=True))


def caption(scene, moving):
    """The caption of a scene, as a video (`moving`) or as a picture."""
    return describe(scene.objects, moving)


_NAMED = re.compile(rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?: ({'|'.join(MOTIONS.values())}))?")


def parse_caption(text):
    """The labels of a caption, a tuple of Label; motion is None in the caption of a picture.

    Raises ValueError for text that `describe` never writes.
    """
    motions = {phrase: motion for motion, phrase in MOTIONS.items()}
    labels = tuple(Label(shape, colour, motions.get(phrase)) for colour, shape, phrase in _NAMED.findall(text))
    moving = all(x.motion for x in labels)
    if not 1 <= len(labels) <= 2 or describe(labels, moving) != text:
        raise ValueError(
            f"caption={text!r} is not of the shapes world. It looks like "
            "'a red circle moves left and right' or 'a picture of a red circle and a blue cross'."
        )
    return labels


# The data source


@dataclasses.dataclass(frozen=True)
class ShapesSource:
    """An endless set of clips by index: the same clip for the same (seed, split, index).

    split: "train" or "validation" (other clips of the same combinations); pair_share: of clips with two objects;
    still_share: of pictures; large: whether an object alone is larger and moves less. Canvas, length and content are
    independent of each other.
    """

    seed: int = 0
    split: str = "train"
    pair_share: float = 0.5
    still_share: float = 0.2
    large: bool = False

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} is not a split of the shapes world. Choose from {SPLITS}.")
        for name in ("pair_share", "still_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a share. Choose a value from 0 to 1.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is negative. Choose 0 or above.")

    def __len__(self):
        return 2**31 - 1

    def __getitem__(self, index):
        frames, fps, height, width, labels, rng = self._plan(index)
        time_T = (np.arange(frames) / fps).astype(np.float32)
        scene = draw_scene(rng, labels, self.large)
        name = f"shapes/{self.seed}/{self.split}/{index}".encode()
        uid = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little")
        return Clip(render(scene, time_T, height, width), time_T, caption(scene, frames > 1), uid)

    def scene(self, index):
        """The Scene that clip `index` shows."""
        *_, labels, rng = self._plan(index)
        return draw_scene(rng, labels, self.large)

    def layout(self, index):
        """(frames, height, width, caption) of clip `index`, without drawing it."""
        frames, _, height, width, labels, _ = self._plan(index)
        return frames, height, width, describe(labels, frames > 1)

    def _plan(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} is outside the shapes world. Choose from 0 to {len(self) - 1}.")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        width, height = CANVASES[rng.integers(len(CANVASES))]
        frames, fps = _draw_duration(rng)
        if rng.random() < self.still_share:
            frames = 1
        labels = draw_labels(rng, 2 if rng.random() < self.pair_share else 1)
        return frames, fps, height, width, labels, rng


def _draw_duration(rng):
    frames = tuple(DURATIONS)[rng.integers(len(DURATIONS))]
    return frames, DURATIONS[frames][rng.integers(len(DURATIONS[frames]))]


def prompts(count, split, seed=0, objects=None):
    """`count` Prompts for videos; every canvas and length equally often.

    split: "train" asks for combinations that training shows, "heldout" for objects each of which it never shows;
    objects: 1 or 2, or None for each in turn.
    """
    pools = {"train": _TRAINED, "heldout": _HELD_OUT}
    if split not in pools:
        raise ValueError(f"split={split!r} has no prompts. Choose from {tuple(pools)}.")
    if objects not in (None, 1, 2):
        raise ValueError(f"objects={objects!r} cannot be asked for. Choose 1, 2 or None (each in turn).")
    rng = np.random.default_rng((seed, len(SPLITS) + tuple(pools).index(split)))
    durations = [(frames, fps) for frames, rates in DURATIONS.items() for fps in (rates * 2)[:2]]
    out = []
    for i in range(count):
        # Like the digits of a clock: every 12 have all canvases and lengths, every 72 all their combinations.
        labels = draw_labels(rng, objects or 1 + i % 2, pools[split])
        width, height = CANVASES[i // 2 % len(CANVASES)]
        frames, fps = durations[(i // 2 + i // 12) % len(durations)]
        out.append(Prompt(describe(labels, moving=True), width, height, frames, fps))
    return out
