"""What is asked for, and the canvas that it becomes: a clip as patches, some of whose pixels are given.

n patches of one request, g its groups, P values per patch, K = M + 1 levels, C channels. T x Y x X: of a video, its
frames and pixels; of latents, a clip's grid. F frames of a video that is given.

Patches that are given wholly start, and stay, at level 0; the others start from noise (level 1), or, for editing, from
their own pixels at a level between. Given pixels in a patch that is not wholly given are unknown to the model; they are
put back after decoding. So through a lossless codec all that is given comes back bit for bit.
"""

import dataclasses
import typing
from collections.abc import Callable, Sequence

import numpy as np

from dit_video.codecs import Pixels, check_frames, to_float
from dit_video.patches import Grid, Piece, lay_out, patchify

SLOWEST = 0.01  # frames per second that players and the files' formats bear


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample asked for. width, height: pixels; frames: 1 = a picture; fps: frames per second; seed: of its noise.

    image_YxXx3: uint8, a picture to animate (the clip's first frame), or None. guidance, history: the scales, or None
    for the caller's. task: a key of TASKS; '' = 'animate' where there is an image, else 'text'.
    videos: uint8 FxYxXx3, as the task takes them: two to connect, one or none to loop, else one; at `fps` (to
    interpolate: at fps / factor). frames is not read where the videos say how long the clip is.
    new_frames: how many to extend, connect or close a loop by; direction: 'forward' or 'backward'. context: how many
    frames on either side of the new ones the model may see; None = all that fit in the window (to loop and to roll
    out: the codec's stride + 1). mask_TxYxX: bool, True = make anew, of the video's frames or of one for all.
    strength: the level that what is edited starts from. factor: frames out per frame in. timeline: (seconds, prompt),
    the first at 0. window: frames laid out at once, of a roll-out and of a longer video (parts.py); None = those of the
    longest clip trained on. causal: a roll-out makes one latent frame after the other, by a cache of those before;
    context and window are not read, as the model's own window says what is seen.
    """

    prompt: str
    width: int
    height: int
    frames: int = 1
    fps: float = 8.0
    seed: int = 0
    image_YxXx3: np.ndarray | None = None
    guidance: float | None = None
    history: float | None = None
    task: str = ""
    videos: tuple[np.ndarray, ...] = ()
    new_frames: int = 8
    direction: str = "forward"
    context: int | None = None
    mask_TxYxX: np.ndarray | None = None
    strength: float = 0.6
    factor: float = 2
    timeline: tuple[tuple[float, str], ...] = ()
    window: int | None = None
    causal: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """How clips become patches: what a config's codec, patch size, tokeniser and groups say.

    longest: frames of the longest clip that the model was trained on.
    """

    codec: Pixels
    patch: tuple[int, int, int]
    tokenise: Callable[[str], np.ndarray]
    group_by: str = "frame"
    longest: int = 13


@dataclasses.dataclass(frozen=True)
class Task:
    """A request laid out, and how its decoded video is finished (see `finish`).

    piece: its noise and what is known; grid: where the patches lie; level_Kxg: the schedule of each group.
    given_TxYxXx3 (uint8) is put back where known_TxYxX; then `take` says which frames are the answer, and they go
    between before_FxYxXx3 and after_FxYxXx3, frames of the request that the model need not see.
    course_nxP: the velocity of values that are given in patches that are not known (see `_course`); nan elsewhere.
    """

    piece: Piece
    grid: Grid
    level_Kxg: np.ndarray
    given_TxYxXx3: np.ndarray
    known_TxYxX: np.ndarray
    take: slice = dataclasses.field(default_factory=lambda: slice(None))
    before_FxYxXx3: np.ndarray | None = None
    after_FxYxXx3: np.ndarray | None = None
    course_nxP: np.ndarray | None = None


# What requests are held against.


def check_request(request: Request, layout: Layout) -> None:
    """Raises ValueError for what cannot be laid out, naming the value and the nearest legal one."""
    st = layout.codec.stride[0]
    check_frames(request.frames, st)
    latents, pt = 1 + (request.frames - 1) // st, layout.patch[0]
    if latents % pt:
        nearest = " or ".join(str(1 + (n * pt - 1) * st) for n in (latents // pt, latents // pt + 1) if n)
        raise ValueError(f"frames={request.frames} cannot be cut into patches of {pt} latents. Nearest: {nearest}.")
    check_size(request, layout)
    image = request.image_YxXx3
    if image is not None and (image.dtype != np.uint8 or image.shape[2:] != (3,)):
        raise ValueError(f"the image is {image.dtype} {image.shape}; give uint8, height x width x 3 (RGB).")
    if image is not None and image.shape[:2] != (request.height, request.width):
        raise ValueError(
            f"the image is {image.shape[1]}x{image.shape[0]} and the clip {request.width}x{request.height} "
            "(WIDTHxHEIGHT): give the clip the image's size, or resize the image."
        )


def check_size(request, layout):
    (_, sy, sx), (_, py, px) = layout.codec.stride, layout.patch
    check_sides(request.width, request.height, (sy * py, sx * px))
    if not (np.isfinite(request.fps) and SLOWEST <= request.fps):
        raise ValueError(f"fps={request.fps} is not a frame rate. Give frames per second, {SLOWEST} or more.")


def check_sides(width: int, height: int, step_yx: tuple[int, int]) -> None:
    """Raises ValueError for sides, in pixels, that are not whole patches of step_yx pixels."""
    for side, length, step in (("height", height, step_yx[0]), ("width", width, step_yx[1])):
        if length <= 0 or length % step:
            below = length // step * step
            nearest = f"{below} or {below + step}" if below > 0 else f"{step}"
            raise ValueError(f"{side}={length} cannot be cut into patches of {step} pixels. Nearest: {nearest}.")


def check_levels(what, layout):
    if layout.group_by != "frame" or layout.patch[0] != 1:
        raise ValueError(
            f"{what} needs a level for each latent frame: data.group_by='frame' and model.patch=(1, y, x); "
            f"they are {layout.group_by!r} and {layout.patch}."
        )


# From canvases to patches.


def legal(frames: int, stride: int) -> int:
    """The next length that the codec takes."""
    return 1 + -(-(frames - 1) // stride) * stride


def window_of(request: Request, layout: Layout) -> int:
    """How many frames are laid out at once: a length that the codec takes, with room for new frames between known ones.

    Raises ValueError for another.
    """
    st = layout.codec.stride[0]
    least = 1 + 2 * st
    if request.window is None:
        return max(1 + (layout.longest - 1) // st * st, least)
    if request.window < least or request.window != legal(request.window, st):
        nearest = max(legal(request.window, st), least)
        raise ValueError(
            f"window={request.window} must be 1 + {st}k frames (the codec's stride), {least} or more. "
            f"Nearest: {nearest}."
        )
    return request.window


def place(request, frames, *parts):
    """given_TxYxXx3 (uint8) and known_TxYxX of a clip that holds each (first frame, video_FxYxXx3) of `parts`.

    Frames between and beyond them repeat the nearest: that is the context in which a learned codec encodes the given.
    """
    given_TxYxXx3 = np.zeros((frames, request.height, request.width, 3), np.uint8)
    known_TxYxX = np.zeros(given_TxYxXx3.shape[:3], bool)
    for first, video_FxYxXx3 in parts:
        at = slice(first, first + len(video_FxYxXx3))
        given_TxYxXx3[at], known_TxYxX[at] = video_FxYxXx3, True
    if parts:
        given_F = np.flatnonzero(known_TxYxX[:, 0, 0])
        given_TxYxXx3 = given_TxYxXx3[given_F[np.abs(np.arange(frames)[:, None] - given_F).argmin(1)]]
    return given_TxYxXx3, known_TxYxX


def known_patches(known_TxYxX, layout, reduce=np.all):
    """Of each patch in raster order, whether all of its pixels are known (or any: `reduce`)."""
    (st, sy, sx), (pt, py, px) = layout.codec.stride, layout.patch
    # The first latent frame holds the first frame alone.
    known_TxYxX = np.concatenate([np.repeat(known_TxYxX[:1], st - 1, 0), known_TxYxX])
    T, Y, X = known_TxYxX.shape
    cells = known_TxYxX.reshape(T // (st * pt), st * pt, Y // (sy * py), sy * py, X // (sx * px), sx * px)
    return reduce(cells, axis=(1, 3, 5)).ravel()


def as_patches(request, layout, level_K, given_TxYxXx3, known_TxYxX, start_n=None) -> Task:
    """A canvas as patches; start_n: the level that each patch starts from where it is not known, by default 1.

    A group's schedule is level_K times what it starts from: known patches start at 0 and stay there.
    """
    (st, sy, sx), (pt, py, px) = layout.codec.stride, layout.patch
    known_n = known_patches(known_TxYxX, layout)
    led = isinstance(
        layout.codec, Pixels
    )  # then the model sees pixels of patches that are given in part: see `_course`
    if known_TxYxX.any() and not (known_n.any() or led or start_n is not None):
        raise ValueError(
            f"the model would see nothing of what is given: no patch of {st * pt} frames of {sx * px}x{sy * py} pixels "
            "is given wholly. Give more frames, or a smaller mask."
        )
    start_n = np.where(known_n, 0, np.float32(1) if start_n is None else start_n).astype(np.float32)
    if (start_n == 1).all() and not known_TxYxX.any():
        T, Y, X = known_TxYxX.shape
        latents_TxYxXxC = np.zeros((1 + (T - 1) // st, Y // sy, X // sx, layout.codec.channels), np.float32)
    else:
        latents_TxYxXxC = layout.codec.encode(to_float(given_TxYxXx3))
    time_T = np.arange(len(latents_TxYxXxC)) * st / request.fps
    ids_sxK = layout.tokenise(request.prompt)
    piece, grid = lay_out(
        latents_TxYxXxC, time_T, layout.patch, (sy, sx), ids_sxK, request.seed & 0xFFFFFFFF, layout.group_by
    )
    # A group holds the patches of a frame (or of the clip) that start from one level.
    of_g, group_n = np.unique(np.stack([piece.group_n, start_n], 1), axis=0, return_inverse=True)
    noise_nxP = np.random.default_rng(request.seed).standard_normal(piece.x_nxP.shape, np.float32)
    start_nx1 = start_n[:, None]
    x_nxP = (1 - start_nx1) * piece.x_nxP + start_nx1 * noise_nxP
    course_nxP = _course(layout, known_TxYxX, known_n, noise_nxP - piece.x_nxP)
    return Task(
        piece=dataclasses.replace(piece, x_nxP=x_nxP, group_n=group_n.reshape(-1).astype(np.int32)),
        grid=grid,
        level_Kxg=level_K[:, None] * of_g[:, 1].astype(np.float32),
        given_TxYxXx3=given_TxYxXx3,
        known_TxYxX=known_TxYxX,
        course_nxP=course_nxP,
    )


def _course(layout, known_TxYxX, known_n, velocity_nxP):
    """Of patches that are given in part, the velocity e - x of the values given, which leads them down their own noise
    to what they are, so that the rest of the patch is made beside them; nan elsewhere. None where there are none, and
    for learned codecs, whose latents no pixel has to itself.
    """
    if not isinstance(layout.codec, Pixels) or not (known_patches(known_TxYxX, layout, np.any) & ~known_n).any():
        return None
    given_TxYxXx3 = np.repeat(known_TxYxX[..., None], 3, -1).astype(np.float32)
    given_nxP, _ = patchify(layout.codec.encode(given_TxYxXx3), layout.patch)
    return np.where((given_nxP > 0) & ~known_n[:, None], velocity_nxP, np.float32(np.nan)).astype(np.float32)


# The answer.


def finish(task: Task, video_TxYxXx3: np.ndarray) -> np.ndarray:
    """The answer, uint8, from the decoded clip: what is given put back, surplus frames cut, the rest joined on."""
    video_TxYxXx3 = np.where(task.known_TxYxX[..., None], task.given_TxYxXx3, video_TxYxXx3)[task.take]
    ends = [end for end in (task.before_FxYxXx3, video_TxYxXx3, task.after_FxYxXx3) if end is not None]
    return np.concatenate(ends)


class Seen(typing.NamedTuple):
    """How much of what is given the model knows, of one task or of several.

    known: patches, of all `patches`. Given, but not known: whole `frames` that share a group of the codec's stride with
    frames that are not given, and, apart from them, `pixels` of other patches that are given in part (masks are dilated
    to whole patches). ends: frames seen at the beginning and at the end, where there are any.
    """

    known: int
    patches: int
    frames: int
    pixels: int
    ends: tuple[int, ...]


def seen(task: Task, layout: Layout) -> Seen:
    (st, sy, sx), (pt, py, px) = layout.codec.stride, layout.patch
    known_n = task.level_Kxg[0][task.piece.group_n] == 0
    seen_TxYxX = known_n.reshape(task.grid.shape).repeat(st * pt, 0)[st - 1 :].repeat(sy * py, 1).repeat(sx * px, 2)
    # What is cut may be frames that repeat the last; but of a loop it is the video itself.
    unseen_TxYxX = (task.known_TxYxX & ~seen_TxYxX)[task.take if task.before_FxYxXx3 is None else slice(None)]
    whole_T, seen_T = unseen_TxYxX.all((1, 2)), seen_TxYxX.all((1, 2))
    ends = tuple(int(n) for n in (seen_T.argmin(), seen_T[::-1].argmin()) if n)
    return Seen(int(known_n.sum()), known_n.size, int(whole_T.sum()), int(unseen_TxYxX[~whole_T].sum()), ends)


def told(parts: Sequence[Seen], layout: Layout, context: int | None = None) -> str:
    """What was seen of a request's parts in words; '' where it is all, or, of one part, the context asked for."""
    (st, sy, sx), (_, py, px) = layout.codec.stride, layout.patch
    known, patches, frames, pixels = (sum(part[i] for part in parts) for i in range(4))
    ends, words = parts[-1].ends, []
    if context is not None and ends != (context,) * len(ends):
        words += [f"of context={context} frames the model sees {' and '.join(map(str, ends))}, in whole groups of {st}"]
    if frames + pixels:
        words += [
            f"the model knows {known} of {patches} patches; not among them, and put back after decoding: "
            f"{frames} given frames in groups of {st} that are given in part, {pixels} given pixels in patches of "
            f"{sx * px}x{sy * py} that the mask touches"
        ]
    return "; ".join(words)


def prompts_of(request: Request) -> list[str]:
    """All that a request asks to show."""
    return [text for _, text in request.timeline] or [request.prompt]
