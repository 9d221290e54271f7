"""Requests as people write them: flags, or lines of a JSON file, naming real media files. Host only.

F x Y x X: frames, height and width of a video as it is read: at the size and rate that it is sampled at.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from absl import logging
from etils import epath

from dit_video.canvas import SLOWEST, Request, check_sides
from dit_video.data.decode import LIMITS, Media, MediaError, check, decode, probe
from dit_video.tasks import MOST_PARTS, nearest_factor

# What each task takes beside what is in ALWAYS: the first names are needed, those in brackets may be left.
FIELDS = {
    "text": ((), ("size", "frames", "fps")),
    "animate": (("image",), ("size", "frames", "fps")),
    "extend": (("video",), ("direction", "new_frames", "context", "window", "size", "fps")),
    "connect": (("video",), ("new_frames", "context", "window", "size", "fps")),
    "loop": ((), ("video", "new_frames", "context", "size", "frames", "fps")),
    "paint": (("video",), ("mask", "window", "size", "fps")),
    "edit": (("video",), ("strength", "mask", "window", "size", "fps")),
    "interpolate": (("video",), ("factor", "fps", "strength", "window", "size")),
    "timeline": (("prompt",), ("size", "frames", "fps")),
    "rollout": ((), ("frames", "window", "context", "causal", "size", "fps")),
}
ALWAYS = ("task", "prompt", "seed", "num", "guidance", "history")
# What JSON may hold for each; a prompt or a video may be a list of such.
KINDS = dict.fromkeys(("task", "prompt", "size", "image", "video", "mask", "direction"), str)
KINDS |= dict.fromkeys(("frames", "new_frames", "context", "window", "seed", "num"), int)
KINDS |= dict.fromkeys(("fps", "strength", "factor", "guidance", "history"), float) | {"causal": bool}
PATIENT = dataclasses.replace(LIMITS, timeout_s=600.0)  # of a file that is named, not one of a folder's many
ROUNDED_S = 0.005  # stamps of a GIF are whole hundredths of a second: each may be this much late
FRAMES, FPS, SIZE, INTERPOLATION_STRENGTH = 9, 8.0, (48, 32), 0.6  # where nothing says otherwise


@dataclasses.dataclass(frozen=True)
class Asked:
    """A Request, the fields that make it again, and where it was asked for, '' = by flags."""

    request: Request
    fields: Mapping
    place: str = ""


def read_lines(path, step_yx: tuple[int, int]) -> list[Asked]:
    """The requests of a JSON lines file, one object a line. Raises ValueError with the line's number."""
    asked = []
    for number, line in enumerate(epath.Path(path).read_text().split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line, object_pairs_hook=_once)
            if not isinstance(fields, dict):
                raise ValueError(f'{line!r} is no JSON object, such as {{"task": "text", "prompt": "..."}}.')
            asked += [dataclasses.replace(one, place=f"{path}, line {number}: ") for one in read(fields, step_yx)]
        except json.JSONDecodeError as error:  # whose own words count lines too: of this one alone
            raise ValueError(f"{path}, line {number}: no JSON, {error.msg} at column {error.colno}.") from error
        except (ValueError, MediaError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not asked:
        raise ValueError(f'{path} asks for nothing: give a line such as {{"task": "text", "prompt": "..."}}.')
    return asked


def _once(pairs) -> dict:
    """A JSON object's pairs as a dict. Raises ValueError for a key that it has twice; json would take the last."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is given {len(twice)} times: give it once.")
    return dict(pairs)


def read(fields: Mapping, step_yx: tuple[int, int]) -> list[Asked]:
    """The requests, `num` of them with seeds seed, seed + 1, ..., that `fields` ask for, their media read.

    step_yx: pixels of a patch, to which sizes are fitted where none is given. Raises ValueError, or MediaError.
    """
    _check_kinds(fields)
    task = fields.get("task", "text")
    if task not in FIELDS:
        raise ValueError(f"task={task!r} is not known. Allowed: {', '.join(FIELDS)}.")
    needed, more = FIELDS[task]
    for name in needed:
        if not fields.get(name):
            raise ValueError(f"task={task} needs {name}: give --{name}.")
    for name in fields:
        if name not in (*ALWAYS, *needed, *more):
            others = [other for other, names in FIELDS.items() if name in names[0] + names[1]]
            mend = f"it belongs to {', '.join(others)}" if others else f"allowed: {', '.join(ALWAYS + needed + more)}"
            raise ValueError(f"task={task} takes no {name}; {mend}.")
    for name in ("window", "context"):
        if fields.get("causal") and name in fields:
            raise ValueError(f"a causal roll-out takes no {name}: it sees the window that its model trained with.")
    if "size" in fields:  # before a frame is decoded
        check_sides(*parse_size(fields["size"]), step_yx)
    prompt, read_task = fields.get("prompt", ""), READERS.get(task, _read_video)
    if isinstance(prompt, str) == (task == "timeline"):
        raise ValueError(
            f"task={task} takes {'a list of prompts' if task == 'timeline' else 'one prompt'}: {prompt!r}."
        )
    seed, num = fields.get("seed", 0), fields.get("num", 1)
    if seed < 0 or num < 1:
        raise ValueError(f"seed={seed!r} and num={num!r}: give whole numbers, from 0 and from 1.")
    scales = {name: fields.get(name) for name in ("guidance", "history")}
    request = dataclasses.replace(read_task(dict(fields), step_yx), task=task, seed=seed, **scales)
    again = {name: value for name, value in fields.items() if name not in ("num", "seed")} | {"task": task}
    return [Asked(dataclasses.replace(request, seed=seed + i), again | {"seed": seed + i}) for i in range(num)]


def _check_kinds(fields: Mapping) -> None:
    """Raises ValueError for a field that holds what it cannot."""
    names = {str: "text", int: "whole number", float: "finite number", bool: "true or false"}
    for name, value in fields.items():
        kind = KINDS.get(name)
        values = value if name in ("prompt", "video") and isinstance(value, (list, tuple)) else [value]
        for v in values if kind else ():
            right = isinstance(v, (int, float) if kind is float else kind) and isinstance(v, bool) == (kind is bool)
            if not right or (kind is float and not np.isfinite(v)):
                raise ValueError(f"{name}={value!r} is no {names[kind]}.")


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of 'WIDTHxHEIGHT'. Raises ValueError for another form."""
    width, cross, height = str(text).lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise ValueError(f"size={text!r} is not of the form WIDTHxHEIGHT, such as 48x32.")
    return int(width), int(height)


def parse_timeline(prompts: Sequence[str]) -> tuple[tuple[float, str], ...]:
    """((seconds, prompt), ...) of ['SECONDS: prompt', ...]. Raises ValueError for another form."""
    timeline = []
    for text in prompts:
        seconds, colon, prompt = text.partition(":")
        try:
            timeline.append((float(seconds), prompt.strip()))
        except ValueError:
            colon = ""
        if not colon or not np.isfinite(timeline[-1][0]):
            raise ValueError(f"prompt={text!r} is not of the form 'SECONDS: prompt', such as '1.5: a red circle'.")
    return tuple(timeline)


# One reader for each form of request: (fields, step_yx) -> Request.


def _read_text(fields, step_yx):
    width, height = parse_size(fields["size"]) if "size" in fields else SIZE
    return _numbers(Request(fields.get("prompt", ""), width, height, FRAMES, FPS), fields)


def _read_timeline(fields, step_yx):
    timeline = parse_timeline(fields.pop("prompt"))
    request = _read_text(fields, step_yx)
    if "frames" not in fields:  # a second of the last prompt, to the next length that any stride of 1, 2, 4 takes
        request = dataclasses.replace(request, frames=1 + -(-int((timeline[-1][0] + 1) * request.fps) // 4) * 4)
    return dataclasses.replace(request, prompt="; ".join(f"{t:g}: {p}" for t, p in timeline), timeline=timeline)


def _read_animate(fields, step_yx):
    path = fields["image"]
    media = probe(path)
    width, height = _size(fields, media, step_yx)
    picture_YxXx3 = decode(media, 0.0, [0.0], height, width, PATIENT)[0]
    request = Request(fields.get("prompt", ""), width, height, FRAMES, FPS, image_YxXx3=picture_YxXx3)
    return _numbers(request, fields)


def _read_video(fields, step_yx):
    """Every task that is given videos; a loop without one is laid out as text is."""
    task, paths = fields["task"], fields.get("video")
    if not paths:
        return _read_text(fields, step_yx)
    paths, count = [paths] if isinstance(paths, str) else list(paths), 2 if task == "connect" else 1
    if len(paths) != count:
        raise ValueError(f"task={task} takes {count} video{'s' * (count > 1)}; {len(paths)} were given: {paths}.")
    if "frames" in fields:
        raise ValueError(f"frames={fields['frames']} goes with no video: the video says how long the clip is.")
    medias = [_checked(path) for path in paths]
    sizes = {f"{media.width}x{media.height}" for media in medias}
    if len(sizes) > 1 and "size" not in fields:
        first = "x".join(map(str, _size(fields, medias[0], step_yx)))
        raise ValueError(
            f"the videos are {' and '.join(f'{m.width}x{m.height}' for m in medias)} (WIDTHxHEIGHT): give the size "
            f"that both are resized to. Nearest: --size={first}."
        )
    width, height = inner_width, inner_height = _size(fields, medias[0], step_yx)
    if task == "paint":
        inner_width, inner_height = _within(medias[0], width, height, step_yx, "mask" in fields)
    fps = None if task == "interpolate" else fields.get("fps")
    if fps is None and len(moving := [media for media in medias if len(media.stamps) > 1]) < len(medias):
        # A single frame says nothing of a rate: that of the other video goes, or what its file's header claims.
        fps = _times(moving[0], None)[1] if moving else medias[0].fps
    videos = []
    for media in medias:
        time_F, fps = _times(media, fps)
        videos.append(_read_frames(media, time_F, inner_height, inner_width, fps))
    request = Request(fields.get("prompt", ""), width, height, len(videos[0]), fps, videos=tuple(videos))
    if "mask" in fields:
        mask_TxYxX = read_mask(fields["mask"], media, time_F, inner_height, inner_width)
        request = dataclasses.replace(request, mask_TxYxX=mask_TxYxX)
    if task == "interpolate":
        request = _frame_rate(request, fields)
    return _numbers(request, {k: v for k, v in fields.items() if k not in ("fps", "factor")})


READERS = {"text": _read_text, "rollout": _read_text, "timeline": _read_timeline, "animate": _read_animate}


def _numbers(request: Request, fields) -> Request:
    """The request with the fields that are plain numbers or words."""
    plain = "frames", "fps", "new_frames", "context", "window", "strength", "direction", "causal"
    return dataclasses.replace(request, **{name: KINDS[name](fields[name]) for name in plain if name in fields})


def _frame_rate(request: Request, fields) -> Request:
    """The request at the frame rate that `factor` or `fps` asks for; its own fps is the video's."""
    if ("factor" in fields) == ("fps" in fields):
        raise ValueError("task=interpolate takes either a factor, frames out per frame in, or fps, the frame rate out.")
    factor = float(fields["factor"]) if "factor" in fields else float(fields["fps"]) / request.fps
    if not (np.isfinite(factor) and factor > 0):
        raise ValueError(f"factor={factor:g} is no multiple of a frame rate. Give one above 0.")
    nearest = nearest_factor(factor)
    if "fps" in fields and abs(nearest - factor) > 2e-3 * factor:
        raise ValueError(
            f"fps={fields['fps']:g} of a video at {request.fps:g} is {factor:.4g} times as many frames, no fraction "
            f"p/q with p and q up to {MOST_PARTS}. Nearest: fps={request.fps * nearest:.6g}."
        )
    return dataclasses.replace(request, factor=factor, fps=request.fps * factor, strength=INTERPOLATION_STRENGTH)


# Media.


def _checked(path) -> Media:
    """A file as `check` sees it, with a word where it can be used in part alone. Raises MediaError."""
    media, report = check(path, PATIENT)
    if report["status"] == "partial":
        logging.warning("%s: only %d frames can be used (%s).", path, len(media.stamps), report["reason"])
    return media


def _size(fields, media: Media, step_yx):
    """The size asked for, or the media's own to the nearest whole patches."""
    if "size" in fields:
        return parse_size(fields["size"])
    fit = lambda length, step: max(round(length / step), 1) * step
    return fit(media.width, step_yx[1]), fit(media.height, step_yx[0])


def _within(media: Media, width: int, height: int, step_yx, masked: bool):
    """The size at which a video is painted around: its own if it fits, else the largest that does, in whole patches.

    With a mask, and a size that is nowhere larger than the video's (to whole patches), that size: it is painted within
    alone. Raises ValueError where there is neither a mask nor anything around.
    """
    own = _size({}, media, step_yx)
    if masked and width <= own[0] and height <= own[1]:
        return width, height
    scale = min(width / media.width, height / media.height, 1)
    fit = lambda length, step, most: min(max(round(scale * length / step), 1) * step, most)
    inner = fit(media.width, step_yx[1], width), fit(media.height, step_yx[0], height)
    if not masked and (width, height) in (own, inner):
        raise ValueError(
            f"painting needs a mask, or a size larger than the video's {media.width}x{media.height}, such as "
            f"--size={own[0] + 2 * step_yx[1]}x{own[1] + 2 * step_yx[0]}: at {width}x{height} nothing is around it."
        )
    return (media.width, media.height) if media.width <= width and media.height <= height else inner


def _times(media: Media, fps: float | None):
    """time_F, the seconds at which a video is read, and their rate: at `fps`, as long as the last frame lasts; or, for
    None or the video's own rate to 1%, the stamps of its frames.
    """
    if fps is not None and not (np.isfinite(fps) and fps >= SLOWEST):
        raise ValueError(f"fps={fps} is not a frame rate. Give frames per second, {SLOWEST} or more.")
    stamps_F = np.asarray(media.stamps)
    if len(stamps_F) == 1:
        return stamps_F, fps or FPS
    own = (len(stamps_F) - 1) / (stamps_F[-1] - stamps_F[0])
    lasts_F = np.diff([*stamps_F, media.duration])
    even = lasts_F.max() <= 1.5 * np.median(lasts_F) + 0.02
    if fps is not None and not (even and abs(own - fps) <= 0.01 * fps):
        return np.arange(max(round(media.duration * fps), 1)) / fps + ROUNDED_S, fps
    fps = fps or float(Fraction(own).limit_denominator(1001))
    if not even:
        logging.warning(
            "%s: its frames last %.3g to %.3g s, and are taken as evenly spaced, %.4g a second: another fps reads them "
            "by their times.",
            media.path, lasts_F.min(), lasts_F.max(), fps,
        )  # fmt: skip
    return stamps_F, fps


def _read_frames(media: Media, time_F, height: int, width: int, fps: float):
    """video_FxYxXx3, uint8, at its times."""
    if (width, height) != (media.width, media.height) or len(time_F) != len(media.stamps):
        logging.warning(
            "%s: %dx%d, %d frames, is read as %dx%d, %d frames at %.4g a second.",
            media.path, media.width, media.height, len(media.stamps), width, height, len(time_F), fps,
        )  # fmt: skip
    return decode(media, 0.0, time_F, height, width, PATIENT)


def read_mask(text: str, media: Media, time_F: np.ndarray, height: int, width: int) -> np.ndarray:
    """mask_TxYxX, True = make anew: of a picture or video that is white there, or of 'box:y0,x0,y1,x1[,t0,t1]'.

    White is what is nearer to it in brightness than to black; what is transparent is black. A picture or video must
    have the size of `media`, the file that it masks, and is resized with it. A box is in pixels of the video as it is
    read, height x width at time_F, its ends not in it, and t0, t1 in frames. Raises ValueError, or MediaError.
    """
    F = len(time_F)
    if text.startswith("box:"):
        try:
            y0, x0, y1, x1, *t = map(int, text[4:].split(","))
            t0, t1 = t or (0, F)
        except ValueError:
            raise ValueError(f"mask={text!r} is not of the form box:y0,x0,y1,x1 or box:y0,x0,y1,x1,t0,t1.") from None
        if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width and 0 <= t0 < t1 <= F):
            y0, x0, t0 = (min(max(n, 0), most - 1) for n, most in ((y0, height), (x0, width), (t0, F)))
            y1, x1, t1 = (
                min(max(n, low + 1), most) for n, low, most in ((y1, y0, height), (x1, x0, width), (t1, t0, F))
            )
            raise ValueError(
                f"mask={text!r} does not lie in a video of {height}x{width} (height, width) and {F} frames. "
                f"Nearest: box:{y0},{x0},{y1},{x1},{t0},{t1}."
            )
        mask_TxYxX = np.zeros((F, height, width), bool)
        mask_TxYxX[t0:t1, y0:y1, x0:x1] = True
        return mask_TxYxX
    mask = _checked(text)
    sizes = {(media.width, media.height), (width, height)}
    if (mask.width, mask.height) not in sizes:
        raise ValueError(
            f"the mask {text} is {mask.width}x{mask.height} and the video {media.width}x{media.height}"
            f"{f', sampled at {width}x{height}' * (len(sizes) > 1)}: give a mask of the video's size."
        )
    return _white(decode(mask, 0.0, _mask_times(mask, media, time_F), height, width, PATIENT, ground=0))


def _mask_times(mask: Media, media: Media, time_F: np.ndarray):
    """When a mask shows what belongs to the times of the video that it masks: one time for all where it is a picture.

    Of as many frames as the video's file it goes frame by frame, whatever its rate; else it must last as long.
    """
    if len(mask.stamps) == 1:
        return np.zeros(1)
    if len(mask.stamps) == len(media.stamps):
        return np.asarray(mask.stamps)[np.searchsorted(media.stamps, time_F + 1e-4, side="right") - 1]
    lasts = media.duration or 0
    if abs(mask.duration - lasts) > lasts / len(time_F) / 2 + ROUNDED_S:
        raise ValueError(
            f"the mask {mask.path} has {len(mask.stamps)} frames in {mask.duration:.4g} s and the video "
            f"{len(media.stamps)} in {lasts:.4g} s: give {len(media.stamps)}, or as many seconds, or a picture."
        )
    return time_F + ROUNDED_S


def _white(video_TxYxXx3):
    """Whether each pixel's luma (ITU-R BT.601) is nearer to white than to black."""
    return video_TxYxXx3 @ np.array([0.299, 0.587, 0.114], np.float32) > 127.5
