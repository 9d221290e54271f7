"""What the table of the tasks asks for and measures: requests whose truth is known, and figures read from pixels alone.

T frames of an answer, Y x X pixels, K objects of the scene, in its order. Positions (y, x) in pixels, times in seconds.
A figure is a number per answer: 1.0 or 0.0 for what holds or does not, or a length. Nothing here samples.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from dit_video.canvas import Request
from dit_video.data import shapes
from dit_video.evaluation.scorer import score

KNOWN = 5  # frames given to extend, and on the near side of what is connected
FRAMES = 13  # of the longest clip trained on
EDIT_STRENGTH, EDIT_GUIDANCE = 0.45, 4.0
MARGIN = 2  # pixels around the object that is hidden
SEAM, JUMP = 1.25, 1.5  # the largest step allowed across a seam, and in a connection, against the largest elsewhere


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, and what a perfect answer shows: `scene` at time_T; known_TxYxX, bool, is what was given of it."""

    request: Request
    scene: shapes.Scene
    time_T: np.ndarray
    known_TxYxX: np.ndarray

    @property
    def made_T(self):
        """Frames of which something was made."""
        return ~self.known_TxYxX.all((1, 2))


def truth(case: Case) -> np.ndarray:
    """video_TxYxXx3, uint8, that the scene shows at the answer's times."""
    return shapes.render(case.scene, case.time_T, case.request.height, case.request.width)


# What is asked for: the i-th case of each task, objects, canvases and frame rates in turn.


def world(i: int, rates=(8, 12)):
    """(scene, width, height, frames per second): of one object for even i, of two for odd."""
    rng = np.random.default_rng((2, i))
    scene = shapes.draw_scene(rng, shapes.draw_labels(rng, 1 + i % 2))
    return scene, *shapes.CANVASES[i // 2 % len(shapes.CANVASES)], rates[(i // 2 + i // 12) % len(rates)]


def animate(i: int) -> Case:
    scene, width, height, fps = world(i)
    case = _case(i, scene, width, height, fps, np.arange(FRAMES), slice(0, 1), "animate", frames=FRAMES)
    return _with(case, image_YxXx3=truth(case)[0])


def extend(direction: str, new: int, rates, frames: int = KNOWN) -> Callable[[int], Case]:
    first = -new if direction == "backward" else 0
    known = slice(-first, frames - first)

    def case_of(i):
        at_T = np.arange(frames + new) + first
        case = _case(i, *world(i, rates), at_T, known, "extend", new_frames=new, direction=direction)
        return _with(case, videos=(truth(case)[known],))

    return case_of


def connect(new: int, rates) -> Callable[[int], Case]:
    def case_of(i):
        T = KNOWN + new + KNOWN - 1
        case = _case(i, *world(i, rates), np.arange(T), slice(0, KNOWN), "connect", new_frames=new)
        case.known_TxYxX[KNOWN + new :] = True
        video = truth(case)
        return _with(case, videos=(video[:KNOWN], video[KNOWN + new :]))

    return case_of


def loop(given: bool) -> Callable[[int], Case]:
    """Nine frames, given or made from the prompt, and four that close them: 13 at 8 a second, a period being 12.8."""

    def case_of(i):
        known = slice(0, 9 if given else 0)
        case = _case(i, *world(i, (8,)), np.arange(13), known, "loop", frames=9, new_frames=4)
        return _with(case, videos=(truth(case)[known],) if given else ())

    return case_of


def paint_in(i: int, frames: int = FRAMES, hidden: int = FRAMES // 3) -> Case:
    """The first object is hidden, with a margin, by one box for some frames in the middle."""
    case = _case(i, *world(i), np.arange(frames), slice(None), "paint")
    middle = slice((frames - hidden) // 2 + 1, (frames - hidden) // 2 + 1 + hidden)
    touched_TxYxX = objects_pixels(case, (0,))[middle]
    rows, columns = np.flatnonzero(touched_TxYxX.any((0, 2))), np.flatnonzero(touched_TxYxX.any((0, 1)))
    box = (slice(max(n[0] - MARGIN, 0), n[-1] + 1 + MARGIN) for n in (rows, columns))
    case.known_TxYxX[(middle, *box)] = False
    return _with(case, videos=(truth(case),), mask_TxYxX=~case.known_TxYxX)


def paint_around(i: int) -> Case:
    """The clip's inner part is given, 8 pixels less on every side."""
    case = _case(i, *world(i), np.arange(FRAMES), slice(0), "paint")
    inside = slice(None), slice(8, -8), slice(8, -8)
    case.known_TxYxX[inside] = True
    return _with(case, videos=(truth(case)[inside],))


def edit(i: int) -> Case:
    """The first object's colour is another in the prompt; the rest of the caption stays."""
    scene, width, height, fps = world(i)
    how = {"strength": EDIT_STRENGTH, "guidance": EDIT_GUIDANCE}
    source = _case(i, scene, width, height, fps, np.arange(FRAMES), slice(0), "edit", **how)
    first, *others = scene.objects
    taken = {o.colour for o in scene.objects}
    free = [c for c in shapes.COLOURS if c not in taken and not shapes.held_out(dataclasses.replace(first, colour=c))]
    colour = free[np.random.default_rng((3, i)).integers(len(free))]
    wanted = dataclasses.replace(scene, objects=(dataclasses.replace(first, colour=colour), *others))
    case = dataclasses.replace(source, scene=wanted)
    return _with(case, videos=(truth(source),), prompt=shapes.caption(wanted, moving=True))


def interpolate(i: int) -> Case:
    """Every second frame is given."""
    case = _case(i, *world(i), np.arange(FRAMES), slice(None, None, 2), "interpolate", factor=2)
    return _with(case, videos=(truth(case)[::2],))


def interpolate_long(i: int) -> Case:
    """A clip at four times its frame rate."""
    scene, width, height, fps = world(i)
    at_T = np.arange(4 * FRAMES - 3)
    case = _case(i, scene, width, height, 4 * fps, at_T, slice(None, None, 4), "interpolate", factor=4)
    return _with(case, videos=(truth(case)[::4],))


def _case(i, scene, width, height, fps, at_T, known, task, **fields) -> Case:
    """at_T: the answer's frames, counted in the scene's time; known: those of them that are given."""
    known_TxYxX = np.zeros((len(at_T), height, width), bool)
    known_TxYxX[known] = True
    request = Request(shapes.caption(scene, moving=True), width, height, fps=float(fps), seed=i, task=task, **fields)
    return Case(request, scene, at_T / fps, known_TxYxX)


def _with(case: Case, **fields) -> Case:
    return dataclasses.replace(case, request=dataclasses.replace(case.request, **fields))


# What is read from an answer: (case, video_TxYxXx3) -> {figure: number}.


def unchanged(case: Case, video: np.ndarray) -> dict[str, float]:
    """Whether all that was given is in the answer, bit for bit; nothing where nothing was."""
    if not case.known_TxYxX.any():
        return {}
    return {"given pixels unchanged": float((video == truth(case))[case.known_TxYxX].all())}


def identity(case: Case, video: np.ndarray) -> dict[str, float]:
    """Colour, shape and motion of every object, known by its colour, read from the frames made alone: in all of them
    each must be seen."""
    read, objects = score(video[case.made_T], case.time_T[case.made_T]), case.scene.objects
    seen = {r.label.colour: r.label for r in read if np.isfinite(r.centre_Tx2).all()}
    same = lambda part: all(o.colour in seen and getattr(seen[o.colour], part) == getattr(o, part) for o in objects)
    colour = set(seen) == {o.colour for o in objects} == {r.label.colour for r in read}
    return {"colour": float(colour), "shape": float(same("shape")), "motion": float(same("motion"))}


def path(limit: float, objects: int = 2) -> Callable[[Case, np.ndarray], dict[str, float]]:
    """How far from the true ones the centres of the first `objects` are, on average over the frames made, and whether
    an answer keeps within `limit` pixels. An object that is not seen in a frame is as far off as the canvas is long."""

    def figures(case, video):
        error_TxK = np.linalg.norm(centres_read(case, video) - true_centres(case), axis=-1)[case.made_T, :objects]
        away = max(case.request.width, case.request.height)
        mean = float(np.where(np.isfinite(error_TxK), error_TxK, away).mean())
        return {"path error": mean, f"path within {limit:g} px": float(mean <= limit)}

    return figures


def seam(case: Case, video: np.ndarray) -> dict[str, float]:
    """Of an endless loop: whether the step from its end to its beginning is like the others, and whether it moves."""
    step_TxK = steps(centres_read(case, video), closed=True)
    # A nan, an object that is not seen, is never below anything.
    seamless = (step_TxK[-1] <= SEAM * step_TxK[:-1].max(0)).all()
    r = case.request
    moving = (step_TxK.mean(0) >= 0.5 * true_steps(case.scene, r.width, r.height, r.fps).mean(0)).all()
    return {"seamless": float(seamless), "moving": float(moving), "seamless and moving": float(seamless and moving)}


def jump(case: Case, video: np.ndarray) -> dict[str, float]:
    """Whether no step is much larger than the largest of real clips of this size and frame rate; and whether none is
    much larger than the largest that the same object of this clip ever takes, up to 1.53 times less."""
    r, step_TxK = case.request, steps(centres_read(case, video))
    largest = largest_step(r.width, r.height, r.fps)
    own_K = true_steps(case.scene, r.width, r.height, r.fps).max(0)
    below = lambda most: float((step_TxK <= JUMP * most).all())
    return {"no jump": below(largest), "no jump by its own steps": below(own_K)}


def background(case: Case, video: np.ndarray) -> dict[str, float]:
    """The mean error of what was made, in shares of the range, where no object should be."""
    count = len(case.scene.objects)
    empty_TxYxX = ~case.known_TxYxX & ~objects_pixels(case, range(count))
    error_TxYxXx3 = np.abs(video.astype(np.float32) - truth(case)) / 255
    return {"background error": float(error_TxYxXx3[empty_TxYxX].mean())}


# Places and steps.


def centres_read(case: Case, video: np.ndarray) -> np.ndarray:
    """centre_TxKx2 of the scene's objects, known by their colours, as the scorer sees them; nan: not seen."""
    seen = {r.label.colour: r.centre_Tx2 for r in score(video, case.time_T)}
    nowhere_Tx2 = np.full((len(video), 2), np.nan)
    return np.stack([seen.get(o.colour, nowhere_Tx2) for o in case.scene.objects], 1)


def true_centres(case: Case) -> np.ndarray:
    """centre_TxKx2 of the scene's objects at the answer's times."""
    return shapes.centres(case.scene, case.time_T, case.request.height, case.request.width)


def steps(centre_TxKx2: np.ndarray, closed: bool = False) -> np.ndarray:
    """step_TxK: how far each object moves from frame to frame; closed: from the last to the first too, as the last."""
    after_TxKx2 = np.concatenate([centre_TxKx2[1:], centre_TxKx2[: int(closed)]])
    return np.linalg.norm(after_TxKx2 - centre_TxKx2[: len(after_TxKx2)], axis=-1)


def true_steps(scene: shapes.Scene, width: int, height: int, fps: float) -> np.ndarray:
    """step_RxK of the scene's objects from each of R times of a period to a frame later."""
    begin_R = np.linspace(0, shapes.PERIOD, 64, endpoint=False)
    at = lambda time_R: shapes.centres(scene, time_R, height, width)
    return np.linalg.norm(at(begin_R + 1 / fps) - at(begin_R), axis=-1)


@functools.cache
def largest_step(width: int, height: int, fps: float) -> float:
    """The largest step of any object in 64 real clips of this size and frame rate, in which all motions are."""
    return max(float(true_steps(world(i)[0], width, height, fps).max()) for i in range(64))


def objects_pixels(case: Case, which) -> np.ndarray:
    """touched_TxYxX: the pixels that some of these objects touch, as these are what another colour changes."""
    names = list(shapes.COLOURS)
    objects = list(case.scene.objects)
    for k in which:
        other = names[(names.index(objects[k].colour) + len(names) // 2) % len(names)]
        objects[k] = dataclasses.replace(objects[k], colour=other)
    recoloured = dataclasses.replace(case, scene=dataclasses.replace(case.scene, objects=tuple(objects)))
    return (truth(recoloured) != truth(case)).any(-1)
