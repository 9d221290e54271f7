"""Clips longer than a model was trained on: what is asked for in parts, each of which is laid out as a task of its own.

F x Y x X: frames and pixels of a video. W, the window: frames laid out at once, by default those of the longest clip
trained on. c: frames of context, those next to the new ones that a part sees.

What a request becomes is a generator. It yields lists of requests, of which those of one list do not hang on one
another, is sent their videos, and returns the answer; most yield the request alone. Part k > 0 draws noise of its own.
"""

import dataclasses
from collections.abc import Generator

import numpy as np

from dit_video.canvas import Layout, Request, legal, window_of
from dit_video.tasks import check_mask, is_factor, nearest_factor, on_canvas, task_of

Parts = Generator[list[Request], list[np.ndarray], np.ndarray]


def in_parts(request: Request, layout: Layout) -> Parts:
    """The parts of a request for one of TASKS. Raises ValueError for what cannot be cut."""
    task = task_of(request)
    if task == "loop" and not request.videos:
        return _loop_from_prompt(request)
    by_frame, given = (layout.group_by, layout.patch[0]) == ("frame", 1), len(request.videos) == 1 + (task == "connect")
    return PARTS[task](request, layout) if task in PARTS and by_frame and given else _whole(request)


def numbered(request: Request, k: int) -> Request:
    """Part k, with noise of its own."""
    return dataclasses.replace(request, seed=request.seed + (k << 64))


def _whole(request: Request) -> Parts:
    (video,) = yield [request]
    return video


def _loop_from_prompt(request: Request) -> Parts:
    (video,) = yield [dataclasses.replace(request, task="text")]
    (video,) = yield [dataclasses.replace(request, videos=(video,))]
    return video


def _extend(request: Request, layout: Layout) -> Parts:
    """A part sees as much of the video as fits beside the new frames, and makes as many as fit beside its context."""
    st, W = layout.codec.stride[0], window_of(request, layout)
    forward, (video,) = request.direction != "backward", request.videos
    if request.context is None and legal(len(video) + request.new_frames, st) <= W or request.new_frames < 1:
        return (yield from _whole(request))
    least = st + forward  # the frame at the start is a group of its own
    new = min(request.new_frames, W - least)
    context = request.context
    if context is None:
        context = max((W - new - forward) // st * st + forward, least)
    step = max((W - min(context, W)) // st * st, st)
    if step >= request.new_frames:
        return (yield from _whole(dataclasses.replace(request, context=context)))
    # The last part makes as many as the others, so that all are one program.
    most = len(video) + request.new_frames
    for k in range(-(-request.new_frames // step)):
        part = dataclasses.replace(request, videos=(video,), new_frames=step, context=context)
        (video,) = yield [numbered(part, k)]
    return video[:most] if forward else video[len(video) - most :]


def _connect(request: Request, layout: Layout) -> Parts:
    """As much of both videos is seen as fits beside the new frames."""
    st, W = layout.codec.stride[0], window_of(request, layout)
    if request.context is None and sum(map(len, request.videos)) + request.new_frames > W:
        each = max((W - 1 - request.new_frames) // 2 // st * st, st)
        request = dataclasses.replace(request, context=1 + each)
    return (yield from _whole(request))


def _paint(request: Request, layout: Layout) -> Parts:
    """Painting and editing: windows along the frames that are made anew, each with what is known, or made by now,
    before them, and after them where they end. What nothing comes before is made from its end on.
    """
    st, W = layout.codec.stride[0], window_of(request, layout)
    if len(request.videos[0]) <= W:
        return (yield from _whole(request))
    (video_FxYxXx3, new_FxYxX), k = on_canvas(request, layout), 0
    if request.mask_TxYxX is not None or task_of(request) == "paint":
        check_mask(~new_FxYxX)
    while (touched_F := new_FxYxX.any((1, 2))).any():
        start, end = _window_around(touched_F, W, st)
        mask_TxYxX = None if new_FxYxX[start:end].all() and task_of(request) == "edit" else new_FxYxX[start:end]
        part = dataclasses.replace(request, videos=(video_FxYxXx3[start:end],), mask_TxYxX=mask_TxYxX)
        (video_FxYxXx3[start:end],) = yield [numbered(part, k)]
        new_FxYxX[start:end], k = False, k + 1
    return video_FxYxXx3


def _window_around(touched_F, W, st) -> tuple[int, int]:
    """The first and one past the last frame of the next window: it holds some of the first run of touched frames."""
    F, a = len(touched_F), int(touched_F.argmax())
    b = a + int((~np.append(touched_F[a:], False)).argmax())
    if a == 0 and b < F:
        end = min(max(b + st, W), F)
        return max(end - W, 0), end
    start = max(a - 1 - st, 0)
    closing = legal(b - start, st) + st
    if closing > W + st:  # too long to be made at once
        return start, min(start + W, F)
    start -= min((max(W - closing, 0)) // 2 // st, start // st) * st
    return start, min(start + max(closing, W), F)


def _interpolate(request: Request, layout: Layout) -> Parts:
    """Parts that have their ends, which are known, in common."""
    W, (video_FxYxXx3,) = window_of(request, layout), request.videos
    rate = nearest_factor(request.factor)
    p, q, gaps = rate.numerator, rate.denominator, len(video_FxYxXx3) - 1
    count = -(-gaps // max((W - 1) // p, 1))
    if count < 2 or not is_factor(request.factor):
        return (yield from _whole(request))
    cuts = [gaps * k // count for k in range(count + 1)]
    fine = dataclasses.replace(request, factor=request.factor * q, fps=request.fps * q)
    videos = yield [
        numbered(dataclasses.replace(fine, videos=(video_FxYxXx3[a : b + 1],)), k)
        for k, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))
    ]
    return np.concatenate([videos[0], *(video_TxYxXx3[1:] for video_TxYxXx3 in videos[1:])])[::q]


PARTS = {"extend": _extend, "connect": _connect, "paint": _paint, "edit": _paint, "interpolate": _interpolate}
