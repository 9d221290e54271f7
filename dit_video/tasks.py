"""What each task lays out: which patches, and how their levels fall. No task has a model or a sampler of its own.

n patches of one request, g its groups, P values per patch, K = M + 1 levels, C channels. T x Y x X: of a video, its
frames and pixels; of latents, a clip's grid. F frames of a video that is given.

A request becomes a canvas (canvas.py): a clip of a legal length and size, some of whose pixels are given.
"""

import dataclasses
from fractions import Fraction

import numpy as np

from dit_video.canvas import (
    Layout,
    Request,
    Task,
    as_patches,
    check_levels,
    check_request,
    check_size,
    known_patches,
    legal,
    place,
    prompts_of,
    window_of,
)
from dit_video.patches import name, patchify

MOST_PARTS = 16  # of a second's frames: frame rates change by fractions p / q with p, q up to this

# The tasks: each takes (request, layout, level_K) and raises ValueError for what cannot be laid out.


def text_to_video(request: Request, layout: Layout, level_K: np.ndarray) -> Task:
    """All patches come from noise to clean together; one frame means a picture."""
    check_request(request, layout)
    return as_patches(request, layout, level_K, *place(request, request.frames))


def animate(request: Request, layout: Layout, level_K: np.ndarray) -> Task:
    """The first frame is the request's image, at level 0 throughout; the rest comes from noise."""
    check_request(request, layout)
    check_levels("animating", layout)
    if request.image_YxXx3 is None:
        raise ValueError("animating needs an image: give image_YxXx3.")
    return as_patches(request, layout, level_K, *place(request, request.frames, (0, request.image_YxXx3[None])))


def extend(request: Request, layout: Layout, level_K: np.ndarray) -> Task:
    """The video's end, or with direction='backward' its beginning, is known; new_frames more come from noise.

    As many frames are laid out as fill groups of the codec's stride: of the video's far end a few are left out, beyond
    the new ones a few are made and cut. Backward, times start at 0 with the first frame laid out.
    """
    check_levels("extending", layout)
    (video_FxYxXx3,) = _videos(request, layout, 1)
    _check_new_frames(request)
    st, F, new = layout.codec.stride[0], len(video_FxYxXx3), request.new_frames
    seen = min(F, F if request.context is None else request.context)
    if request.direction == "forward":
        seen = 1 + (seen - 1) // st * st
        canvas = place(request, legal(seen + new, st), (0, video_FxYxXx3[F - seen :]))
        task = as_patches(request, layout, level_K, *canvas)
        return dataclasses.replace(task, take=slice(0, seen + new), before_FxYxXx3=video_FxYxXx3[: F - seen])
    if request.direction != "backward":
        raise ValueError(f"direction={request.direction!r} is not known. Allowed: 'forward', 'backward'.")
    if seen < st:
        few = f"context={seen}" if F >= st else f"the video has {F}"
        raise ValueError(
            f"extending backward needs {st} known frames (the codec's stride) or more; {few}. Nearest: {st}."
        )
    seen = seen // st * st
    T = legal(seen + new, st)
    task = as_patches(request, layout, level_K, *place(request, T, (T - seen, video_FxYxXx3[:seen])))
    return dataclasses.replace(task, take=slice(T - seen - new, T), after_FxYxXx3=video_FxYxXx3[seen:])


def connect(request: Request, layout: Layout, level_K: np.ndarray) -> Task:
    """The first video's end and the second's beginning are known; new_frames between them come from noise.

    Unless the codec's stride divides new_frames, the second's first frames lie in a group that is known in part.
    """
    check_levels("connecting", layout)
    before_FxYxXx3, after_FxYxXx3 = _videos(request, layout, 2)
    _check_new_frames(request)
    st, F, new = layout.codec.stride[0], len(before_FxYxXx3), request.new_frames
    most = max(F, len(after_FxYxXx3)) if request.context is None else request.context
    head = 1 + (min(F, most) - 1) // st * st
    start = head + new
    partly = legal(start, st) - start  # frames of the second that share a group with new ones
    groups = min(len(after_FxYxXx3) - partly, max(most, st)) // st
    if groups < 1:
        instead = f", or new_frames={-(-new // st) * st} and {st}" * (partly > 0)
        raise ValueError(
            f"after new_frames={new}, the {len(after_FxYxXx3)} frames of the video that follows fill no group of {st} "
            f"(the codec's stride). Give {partly + st} of them at least{instead}."
        )
    T = start + partly + groups * st
    parts = (0, before_FxYxXx3[F - head :]), (start, after_FxYxXx3[: T - start])
    task = as_patches(request, layout, level_K, *place(request, T, *parts))
    return dataclasses.replace(
        task, before_FxYxXx3=before_FxYxXx3[: F - head], after_FxYxXx3=after_FxYxXx3[T - start :]
    )


def loop(request: Request, layout: Layout, level_K: np.ndarray) -> Task:
    """The video, and new_frames that lead from its end back to its beginning: shown again and again it has no seam."""
    check_levels("looping", layout)
    (video_FxYxXx3,) = _videos(request, layout, 1)
    st, F = layout.codec.stride[0], len(video_FxYxXx3)
    _check_new_frames(request)
    least = legal(1 + request.new_frames, st) - request.new_frames - 1 + st  # those that share a group with new ones
    if F < least:
        raise ValueError(
            f"looping by new_frames={request.new_frames} needs a video of {least} frames, in groups of {st} (the "
            f"codec's stride), and this has {F}. Nearest: {least}."
        )
    context = 1 + st if request.context is None else request.context
    # Another stream of noise than that of a video made from the same seed.
    both = dataclasses.replace(
        request, task="connect", videos=(video_FxYxXx3,) * 2, context=context, seed=request.seed ^ (1 << 62)
    )
    task = connect(both, layout, level_K)
    start = 1 + (min(F, context) - 1) // st * st
    take = slice(start, start + request.new_frames)
    return dataclasses.replace(task, take=take, before_FxYxXx3=video_FxYxXx3, after_FxYxXx3=None)


def paint(request: Request, layout: Layout, level_K: np.ndarray) -> Task:
    """Where the mask is True, and around the video where the request is larger (out-painting), comes from noise.

    The video lies in the middle, to the nearest whole patch. Frames beyond a legal length repeat the last, and are cut.
    """
    check_levels("painting", layout)
    video_FxYxXx3, new_FxYxX = on_canvas(request, layout)
    if request.mask_TxYxX is None and not new_FxYxX.any():
        raise ValueError(
            f"painting needs a mask, or a size larger than the video's {request.width}x{request.height}: the request "
            "is as large."
        )
    given_TxYxXx3, known_TxYxX = _to_legal(video_FxYxXx3, new_FxYxX, layout)
    check_mask(known_TxYxX)
    task = as_patches(request, layout, level_K, given_TxYxXx3, known_TxYxX)
    return dataclasses.replace(task, take=slice(0, len(video_FxYxXx3)))


def edit(request: Request, layout: Layout, level_K: np.ndarray) -> Task:
    """The video, noised to level `strength`, comes back as the prompt says (SDEdit; Meng et al. 2022, alg. 1).

    With a mask, what lies outside it is known. Frames beyond a legal length repeat the last, and are cut.
    """
    if not 0 < request.strength <= 1:
        raise ValueError(f"strength={request.strength} is no level to start from. Choose above 0, and 1 at most.")
    video_FxYxXx3, new_FxYxX = on_canvas(request, layout)
    given_TxYxXx3, known_TxYxX = _to_legal(video_FxYxXx3, new_FxYxX, layout)
    if request.mask_TxYxX is not None:
        check_levels("editing with a mask", layout)
        check_mask(known_TxYxX)
    start_n = np.full(known_patches(known_TxYxX, layout).shape, request.strength, np.float32)
    task = as_patches(request, layout, level_K, given_TxYxXx3, known_TxYxX, start_n)
    return dataclasses.replace(task, take=slice(0, len(video_FxYxXx3)))


def on_canvas(request: Request, layout: Layout):
    """What is painted or edited, at the request's size: video_FxYxXx3, and new_FxYxX, True = make anew.

    A smaller video lies in the middle, to the nearest whole patch, and what is around it is new. Without a mask all
    that is edited is. Raises ValueError for a video or a mask that does not fit.
    """
    (video_FxYxXx3,) = _videos(request, layout, 1, smaller=task_of(request) == "paint")
    F, height, width, _ = video_FxYxXx3.shape
    inside_new_FxYxX = _mask(request)
    if request.mask_TxYxX is None and task_of(request) == "edit":
        inside_new_FxYxX = np.ones_like(inside_new_FxYxX)
    (_, sy, sx), (_, py, px) = layout.codec.stride, layout.patch
    y = round((request.height - height) / (2 * sy * py)) * sy * py
    x = round((request.width - width) / (2 * sx * px)) * sx * px
    inside = slice(None), slice(y, y + height), slice(x, x + width)
    whole_FxYxXx3 = np.zeros((F, request.height, request.width, 3), np.uint8)
    new_FxYxX = np.ones(whole_FxYxXx3.shape[:3], bool)
    whole_FxYxXx3[inside], new_FxYxX[inside] = video_FxYxXx3, inside_new_FxYxX
    return whole_FxYxXx3, new_FxYxX


def _to_legal(video_FxYxXx3, new_FxYxX, layout):
    """given_TxYxXx3 and known_TxYxX of a length that the codec takes: frames beyond the last repeat it."""
    F = len(video_FxYxXx3)
    index_T = np.minimum(np.arange(legal(F, layout.codec.stride[0])), F - 1)
    return video_FxYxXx3[index_T], ~new_FxYxX[index_T]


def interpolate(request: Request, layout: Layout, level_K: np.ndarray) -> Task:
    """Every p-th frame is known, at p times the video's frame rate; of the result every q-th is taken, factor = p / q.

    Groups of the codec's stride that are known in part start, at level `strength`, from the blend of the frames known
    around them (as in `edit`), since the model could not know those frames else; groups without a known frame start
    from noise.
    """
    check_levels("interpolating", layout)
    (video_FxYxXx3,) = _videos(request, layout, 1)
    F = len(video_FxYxXx3)
    factor = nearest_factor(request.factor)
    if not is_factor(request.factor):
        raise ValueError(
            f"factor={request.factor:g} is no fraction p/q with p and q up to {MOST_PARTS}. "
            f"Nearest: {float(factor):.4g}."
        )
    p, q = factor.numerator, factor.denominator
    if F < 2 or not 0 < request.strength <= 1:
        raise ValueError(
            f"the video has {F} frames and strength={request.strength}: interpolating needs 2 frames at least, "
            "and a strength above 0, 1 at most."
        )
    shown = (F - 1) * p + 1
    T = legal(shown, layout.codec.stride[0])
    given_TxYxXx3, known_TxYxX = place(request, T)
    at_T = np.minimum(np.arange(T) / p, F - 1)
    low_T = np.minimum(at_T.astype(int), F - 2)
    share_Tx1x1x1 = (at_T - low_T)[:, None, None, None]
    blend_TxYxXx3 = (1 - share_Tx1x1x1) * video_FxYxXx3[low_T] + share_Tx1x1x1 * video_FxYxXx3[low_T + 1]
    given_TxYxXx3[:] = np.round(blend_TxYxXx3)
    known_TxYxX[:shown:p] = True
    some_n = known_patches(known_TxYxX, layout, np.any)
    start_n = np.where(some_n, request.strength, 1).astype(np.float32)
    fine = dataclasses.replace(request, fps=request.fps * q)
    task = as_patches(fine, layout, level_K, given_TxYxXx3, known_TxYxX, start_n)
    return dataclasses.replace(task, take=slice(0, shown, q))


def nearest_factor(factor: float) -> Fraction:
    """The fraction p / q nearest to it, p and q up to MOST_PARTS."""
    parts = range(1, MOST_PARTS + 1)
    return min({Fraction(p, q) for p in parts for q in parts}, key=lambda rate: abs(rate - factor))


def is_factor(factor: float) -> bool:
    """Whether it is, to 0.2%, such a fraction."""
    return abs(nearest_factor(factor) - factor) <= 2e-3 * factor


def timeline(request: Request, layout: Layout, level_K: np.ndarray) -> Task:
    """As text to video, but each latent frame sees the prompt of its own time (that of its last frame)."""
    check_request(request, layout)
    check_levels("a timeline", layout)
    time_j, prompts = np.array([t for t, _ in request.timeline], float), prompts_of(request)
    if not len(time_j) or time_j[0] != 0 or (np.diff(time_j) <= 0).any():
        raise ValueError(f"the timeline's times are {time_j.tolist()} s: they must start at 0 and ascend.")
    first = dataclasses.replace(request, prompt=prompts[0])
    task = as_patches(first, layout, level_K, *place(request, request.frames))
    prompt_n = np.searchsorted(time_j, task.piece.pos_nx3[:, 0] + 1e-4, side="right") - 1
    unseen = sorted(set(range(len(time_j))) - set(prompt_n))
    if unseen:
        times, j = np.unique(task.piece.pos_nx3[:, 0]), np.arange(len(time_j))
        # Each at the first latent frame from its time on that none before it holds, as far as there are any.
        at_j = np.maximum.accumulate(np.searchsorted(times, time_j - 1e-4) - j) + j
        at_j = np.minimum(at_j, len(times) - len(j) + j)
        st = layout.codec.stride[0]
        more = f"frames={max(1 + (len(j) - 1) * st, legal(1 + int(np.ceil(time_j[-1] * request.fps)), st))}"
        nearest = ", ".join(f"{t:g}" for t in times[at_j]) + " s, or more frames" if at_j[0] == 0 else more
        raise ValueError(
            f"the timeline's prompt at {time_j[unseen[0]]:g} s is seen by nothing: frames={request.frames} at "
            f"{request.fps:g} a second have latent frames at {', '.join(f'{t:g}' for t in times)} s, and each sees one "
            f"prompt. Nearest: {nearest}."
        )
    ids = [layout.tokenise(text) for text in prompts]
    piece = dataclasses.replace(
        task.piece,
        ids_sxK=np.concatenate(ids),
        prompt_s=np.repeat(np.arange(len(ids)), [len(i) for i in ids]),
        prompt_n=prompt_n,
    )
    return dataclasses.replace(task, piece=piece)


TASKS = {
    "text": text_to_video,
    "animate": animate,
    "extend": extend,
    "connect": connect,
    "loop": loop,
    "paint": paint,
    "edit": edit,
    "interpolate": interpolate,
    "timeline": timeline,
}


def task_of(request: Request) -> str:
    """What a request asks for, a key of TASKS or 'rollout'. Raises ValueError for another."""
    task = request.task or ("text" if request.image_YxXx3 is None else "animate")
    if task not in (*TASKS, "rollout"):
        raise ValueError(f"task={task!r} is not known. Allowed: {', '.join(map(repr, (*TASKS, 'rollout')))}.")
    return task


# A roll-out: a window of latent frames that moves along a long video.


@dataclasses.dataclass(frozen=True)
class Window:
    """A roll-out between two chunks.

    chunk: how many are done; first: the index in the long video of the window's first latent frame, which stands
    there as a picture of its last frame does at the head of a clip; latents_TxYxXxC: as they are, noise included.
    """

    chunk: int
    first: int
    latents_TxYxXxC: np.ndarray


def start_rollout(request: Request, layout: Layout) -> tuple[Task, Window]:
    """The layout that all chunks share, and the window before the first: noise alone."""
    _check_rollout(request, layout)
    _check_new_frames(request)
    st, context = layout.codec.stride[0], _context(request, layout)
    if context != legal(context, st):
        above = legal(context, st)
        raise ValueError(
            f"context={context} must be 1 + {st}k frames (the codec's stride). Nearest: {above - st} or {above}."
        )
    window = window_of(request, layout)
    if window <= context:
        raise ValueError(f"window={window} must be more than context={context}. Nearest: {context + st}.")
    task = as_patches(request, layout, np.ones(1, np.float32), *place(request, window))
    T = rollout_latents(request, layout)[0]
    return task, Window(0, 0, np.stack([_latent_noise(request, layout, t) for t in range(T)]))


def rollout_latents(request: Request, layout: Layout) -> tuple[int, int, int]:
    """Latent frames of the window, those of them that come down at once, and those of the whole video."""
    st = layout.codec.stride[0]
    window = 1 + (window_of(request, layout) - 1) // st
    return window, window - (1 + (_context(request, layout) - 1) // st), 1 + -(-(request.frames - 1) // st)


def roll(task: Task, window: Window, active: int, steps: int, level_K: np.ndarray) -> Task:
    """One chunk: a staircase of levels, each frame one stair further than the next, comes down by one stair.

    Latent frame t begins its descent from level 1 in chunk t and ends it `active` chunks later at 0 (rolling
    diffusion; Ruhe et al. 2024, sec. 3; diffusion forcing, Chen et al. 2024, fig. 2). steps: of one chunk.
    """
    t_g = window.first + np.arange(len(window.latents_TxYxXxC))
    descent_Sxg = (window.chunk - t_g + np.arange(steps + 1)[:, None] / steps) / active
    at_Sxg = np.clip(descent_Sxg, 0, 1) * (len(level_K) - 1)
    level_Sxg = np.interp(at_Sxg, np.arange(len(level_K)), level_K).astype(np.float32)
    x_nxP, _ = patchify(window.latents_TxYxXxC, task.grid.patch)
    return dataclasses.replace(task, piece=dataclasses.replace(task.piece, x_nxP=x_nxP), level_Kxg=level_Sxg)


def advance(request: Request, layout: Layout, window: Window, latents_TxYxXxC: np.ndarray):
    """The window after a chunk, and the frames (float, in [-1, 1]) that became clean in it, or None.

    It moves on by a latent frame as soon as it holds more clean ones than the context. What was its second frame
    becomes the first: a picture of its last frame.
    """
    T, active, _ = rollout_latents(request, layout)
    codec, chunk = layout.codec, window.chunk + 1
    clean, done = chunk - active - window.first, None
    if clean == 0:
        done = codec.decode(latents_TxYxXxC[:1])
    elif clean > 0:
        done = codec.decode(latents_TxYxXxC[clean - 1 : clean + 1])[1:]
    if clean + 1 <= T - active:
        return Window(chunk, window.first, latents_TxYxXxC), done
    picture_1xYxXxC = codec.encode(codec.decode(latents_TxYxXxC[:2])[-1:])
    fresh_1xYxXxC = _latent_noise(request, layout, window.first + T)[None]
    moved_TxYxXxC = np.concatenate([picture_1xYxXxC, latents_TxYxXxC[2:], fresh_1xYxXxC])
    return Window(chunk, window.first + 1, moved_TxYxXxC), done


def start_causal(request: Request, layout: Layout, level_K: np.ndarray) -> Task:
    """The layout of a causal roll-out's latent frames, one of which is made at a time: that of the first."""
    _check_rollout(request, layout)
    task = as_patches(request, layout, level_K, *place(request, 1))
    step = layout.codec.stride[0] / request.fps  # that of the whole video: no frame of it is a picture
    return dataclasses.replace(task, piece=dataclasses.replace(task.piece, canvas=(step, *task.piece.canvas[1:])))


def latent_frame(request: Request, layout: Layout, task: Task, t: int) -> Task:
    """Latent frame t of a causal roll-out, as noise, where it lies in the long video; `task`: that of the first."""
    x_nxP, _ = patchify(_latent_noise(request, layout, t)[None], layout.patch)
    pos_nx3 = task.piece.pos_nx3.copy()
    pos_nx3[:, 0] = t * layout.codec.stride[0] / request.fps
    n = np.arange(len(x_nxP))
    piece = dataclasses.replace(
        task.piece,
        x_nxP=x_nxP,
        pos_nx3=pos_nx3,
        frame_n=np.full_like(task.piece.frame_n, t),
        uid_n=name(task.piece.clip, t * len(n) + n),
    )
    return dataclasses.replace(task, piece=piece)


def _check_rollout(request, layout):
    check_size(request, layout)
    check_levels("a roll-out", layout)
    if request.frames < 1:
        raise ValueError(f"frames={request.frames}: a roll-out makes 1 frame at least.")


def _latent_noise(request, layout, t):
    _, sy, sx = layout.codec.stride
    shape = request.height // sy, request.width // sx, layout.codec.channels
    return np.random.default_rng((request.seed, t)).standard_normal(shape, np.float32)


def _context(request, layout):
    return 1 + layout.codec.stride[0] if request.context is None else request.context


# What requests are held against.


def _check_new_frames(request):
    for what, value in (("new_frames", request.new_frames), ("context", request.context)):
        if value is not None and value < 1:
            raise ValueError(f"{what}={value}: give 1 frame at least.")


def _videos(request, layout, count, smaller=False):
    """The request's videos. Raises ValueError unless they are `count` of its size (or, if `smaller`, within it)."""
    check_size(request, layout)
    if len(request.videos) != count:
        raise ValueError(f"task={task_of(request)!r} takes {count} videos; {len(request.videos)} are given.")
    for video in request.videos:
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or not len(video):
            raise ValueError(f"a video is {video.dtype} {video.shape}; give uint8, frames x height x width x 3 (RGB).")
    sizes = [f"{video.shape[2]}x{video.shape[1]}" for video in request.videos]
    if len(set(sizes)) > 1:
        raise ValueError(f"the videos are {' and '.join(sizes)} (WIDTHxHEIGHT): resize one to the other's size.")
    height, width = request.videos[0].shape[1:3]
    same = (height, width) == (request.height, request.width)
    if not (same or (smaller and height <= request.height and width <= request.width)):
        raise ValueError(
            f"the video is {sizes[0]} and the clip {request.width}x{request.height} (WIDTHxHEIGHT): give the clip "
            f"the video's size{', or a larger one' * smaller}, or resize the video."
        )
    return request.videos


def _mask(request):
    """mask_FxYxX of the request's video, True = make anew. Raises ValueError for one of another size or length."""
    F, height, width, _ = request.videos[0].shape
    mask_TxYxX = request.mask_TxYxX
    if mask_TxYxX is None:
        return np.zeros((F, height, width), bool)
    if mask_TxYxX.dtype != bool or mask_TxYxX.ndim != 3:
        raise ValueError(f"the mask is {mask_TxYxX.dtype} {mask_TxYxX.shape}; give bool, frames x height x width.")
    if mask_TxYxX.shape[1:] != (height, width):
        raise ValueError(
            f"the mask is {mask_TxYxX.shape[2]}x{mask_TxYxX.shape[1]} and the video {width}x{height} (WIDTHxHEIGHT): "
            f"give a mask of {width}x{height}."
        )
    if len(mask_TxYxX) not in (1, F):
        raise ValueError(f"the mask has {len(mask_TxYxX)} frames and the video {F}: give {F}, or 1 for all.")
    return np.broadcast_to(mask_TxYxX, (F, height, width))


def check_mask(known_TxYxX):
    """Raises ValueError unless a mask leaves something known and something to make."""
    if not known_TxYxX.any():
        raise ValueError(
            "the mask is True (white) everywhere, so that nothing of the video is known. Give one that is False "
            "(black) where the video stays, or no mask, with task='edit'."
        )
    if known_TxYxX.all():
        raise ValueError(
            "the mask is True (white) nowhere, so that nothing is made anew. Give one that is True (white) somewhere: "
            "white is what is nearer to it in brightness than to black, and what is transparent is black."
        )
