"""Real videos and pictures, read as they are, from bytes that nobody has vouched for. Host only; PyAV and Pillow.

T frames asked for, Y x X pixels of an upright frame with square pixels. Colours are what the decoder and swscale
give: limited and full range and the tagged matrix are honoured, high dynamic range is not tone-mapped. What is
transparent is laid on white, or on another grey.
"""

import contextlib
import dataclasses
import math
import os
import stat
import time

import av
import numpy as np
from av.video.reformatter import Interpolation
from etils import epath
from PIL import Image

# Formats whose first bytes cannot be mistaken; Pillow's other readers are asked only after FFmpeg has declined.
_CERTAIN = {"JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000"}
# Never asked: these run another program (EPS), or name a format without being able to read it.
_REFUSED = {"EPS", "MPEG", "WMF", "BUFR", "GRIB", "HDF5"}
_EXIF_ORIENTATION = 0x0112
# EXIF orientation -> (rotation, mirror), in the sense of Media.
_ORIENTATION = {
    2: (180, True),
    3: (180, False),
    4: (0, True),
    5: (-90, True),
    6: (-90, False),
    7: (90, True),
    8: (90, False),
}
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# Times this close are one moment: far below a frame, far above what float32 loses in an hour's clip.
_SAME_S = 1e-4


class MediaError(Exception):
    """A file cannot be used; `path` says which, `reason` why, in words for the owner of the folder."""

    def __init__(self, path, reason):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self):
        return f"{self.path!r}: {self.reason}"  # repr: a name may hold newlines, or bytes that are not text


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one file may ask of us. What its header claims is held against it before a frame is decoded.

    max_pixels of a frame; max_frames, max_seconds and max_fps of a video; max_volume = pixels x frames, what a
    bomb is large in; timeout_s of this thread's processor time for one check or one decode: what is used of a file must
    not depend on what else the machine does.
    """

    max_pixels: int = 2 * 3840 * 2160
    max_frames: int = 36_000
    max_seconds: float = 3600.0
    max_fps: float = 240.0
    max_volume: int = 20_000_000_000
    timeout_s: float = 20.0


LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Media:
    """One readable file.

    width, height: pixels, upright and with square pixels (rotation and sample aspect ratio applied).
    rotation: degrees counter-clockwise that make a stored frame upright, after it is turned upside down if `mirror`.
    frames: how many the header promises to show, or None. duration: seconds, or None.
    fps: mean rate, frames per second; None for a picture.
    first_pts: seconds; None for a video without time stamps, whose `fps` is then a guess.
    stamps: seconds of each usable frame from the first frame, increasing; () until `check` has decoded the file.
    """

    path: str
    kind: str
    reader: str
    width: int
    height: int
    rotation: int
    mirror: bool
    frames: int | None
    duration: float | None
    fps: float | None
    first_pts: float | None
    bytes: int
    stamps: tuple[float, ...] = ()


def probe(path, limits=LIMITS):
    """What the file's header and its first frame say, as Media. Raises MediaError(path, reason).

    The type is found from the bytes, never from the name. Nothing larger than `limits` is decoded.
    """
    path = os.fspath(path)
    with _reading(path) as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise MediaError(path, "empty file")
        media = _probe_picture(path, file, _CERTAIN, limits)
        if media is None:
            try:
                media = _probe_video(path, file, limits)
            except av.FFmpegError as error:
                media = _probe_picture(path, file, set(Image.OPEN) - _CERTAIN - _REFUSED, limits)
                if media is None:
                    why = _words(error)
                    raise MediaError(path, f"not media, or its index is missing or damaged: {why}") from error
        return dataclasses.replace(media, bytes=size)


def check(path, limits=LIMITS):
    """Decodes the file once, in order, with one thread and a frame at a time. Raises MediaError(path, reason).

    Returns (Media with the stamps of the usable frames, report). report: dict(status, reason, frames_decoded,
    frames_promised); status is "ok", or "partial" where frames that were promised do not come, in which case only
    those before the damage are usable; frames that the decoder flags as concealed, or that have an earlier frame's
    time stamp, are left out. Wholly unusable: no frame, most frames flagged, stamps out of order, a size that changes.
    """
    media = probe(path, limits)
    if media.kind == "image":
        with _reading(media.path) as file:
            _opaque(media.path, _picture(media.path, file, limits))
        return dataclasses.replace(media, stamps=(0.0,)), _report("ok", "", 1, 1)

    stamps, seen, size = [], set(), None
    decoded = flagged = repeated = back = 0
    damage, last_s = "", 0.0
    with _reading(media.path) as file:
        try:
            for stamp, length, frame in _frames(file, media, limits, time.thread_time() + limits.timeout_s):
                decoded += 1
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    change = f"{size[0]}x{size[1]} -> {frame.width}x{frame.height}"
                    raise MediaError(media.path, f"frame size changes mid-stream ({change}): split the file")
                if decoded > limits.max_frames:
                    raise MediaError(media.path, f"over {limits.max_frames} frames (max_frames): split the file")
                if getattr(frame, "is_corrupt", False):
                    flagged += 1
                elif stamp in seen:
                    repeated += 1
                elif stamps and stamp < stamps[-1]:
                    back += 1
                else:
                    stamps.append(stamp)
                    last_s = length
                seen.add(stamp)
        except (av.FFmpegError, OSError, EOFError, ValueError) as error:
            damage = _words(error)

    promised = media.frames
    if decoded == 0:
        raise MediaError(media.path, f"no frame decodes of {promised or 'an unknown number'}: {damage or 'no data'}")
    if 2 * flagged > decoded or not stamps:
        raise MediaError(media.path, f"{flagged} of {decoded} frames are flagged corrupt: encrypted, or damaged")
    if back > repeated:
        raise MediaError(media.path, f"time stamps go back at {back} of {decoded} frames: their order is lost")
    fps = (len(stamps) - 1) / (stamps[-1] - stamps[0]) if len(stamps) > 1 else media.fps
    gap = 1 / fps if fps else 0.0
    end = stamps[-1] + (last_s if 10 * last_s > gap else gap)  # some writers give the last frame no length
    if fps is not None and fps > limits.max_fps:
        raise MediaError(media.path, f"implausible frame rate {fps:.4g} (max_fps {limits.max_fps:g})")
    if end > limits.max_seconds:
        raise MediaError(media.path, f"lasts {end:.4g} s (max_seconds {limits.max_seconds:g}): split the file")

    reasons = [f"damage after frame {decoded}: {damage}"] if damage else []
    if promised and not damage and decoded < promised:
        reasons.append(f"the file ends early: {decoded} of {promised} frames")
    # Without a count, the duration is the promise; sound may outlast the picture a little.
    if not promised and not damage and media.duration and end < media.duration - max(1.0, 0.1 * media.duration):
        reasons.append(f"the file ends early: {end:.4g} of {media.duration:.4g} s")
    if flagged:
        reasons.append(f"{flagged} of {decoded} frames flagged corrupt, left out")
    if repeated or back:
        reasons.append(f"time stamps do not advance: {repeated + back} of {decoded} frames left out")
    status = "partial" if reasons else "ok"
    if media.first_pts is None:
        reasons.append(f"no time stamps: {media.fps:g} frames per second assumed")
    media = dataclasses.replace(media, stamps=tuple(stamps), duration=end, fps=fps)
    return media, _report(status, "; ".join(reasons), decoded, promised)


def decode(media, start_s, time_T, height, width, limits=LIMITS, ground=255):
    """Frames of `media` at start_s + time_T seconds from its first frame, as uint8 video_TxYxXx3, RGB and upright.

    time_T: ascending. For each time, the last usable frame whose stamp is not after it (the first, before all; the
    last, after all); a picture is the same at all times. Each frame is resized on its own (bicubic, antialiased), so
    that memory is bounded by the result and a few frames of the file. ground: the grey level, 0 to 255, that what is
    transparent is laid on. Raises MediaError where the file is no longer what `media` says, ValueError for times that
    do not ascend.
    """
    wanted_T = start_s + np.asarray(time_T, np.float64)
    if wanted_T.size == 0 or np.any(np.diff(wanted_T) < 0):
        raise ValueError(f"time_T={time_T} must hold at least one time, ascending")
    with _reading(media.path) as file:
        size = file.seek(0, os.SEEK_END)
        if size != media.bytes:
            raise MediaError(media.path, f"changed on disk: {size} bytes, {media.bytes} when probed")
        if media.kind == "image":
            picture_YxXx3 = _rgb(_picture(media.path, file, limits), media, height, width, ground)
            return np.repeat(picture_YxXx3[None], len(wanted_T), axis=0)
        if media.stamps:
            stamps = np.asarray(media.stamps)
            wanted_T = stamps[np.maximum(np.searchsorted(stamps, wanted_T + _SAME_S, side="right") - 1, 0)]
        deadline = time.thread_time() + limits.timeout_s
        window = lambda seek: _window(file, media, wanted_T, height, width, limits, ground, deadline, seek)
        # A container without stamps cannot tell where a seek has led.
        if media.first_pts is not None and media.reader == "av" and wanted_T[0] > 0:
            with contextlib.suppress(_Lost, av.FFmpegError):
                return window(seek=True)
        try:
            return window(seek=False)
        except _Lost as error:
            raise MediaError(media.path, f"changed on disk: {error}") from error


class _Lost(Exception):
    """The decoder did not give the frame that it should have: a seek that overshot, or a file that changed."""


def _window(file, media, wanted_T, height, width, limits, ground, deadline, seek):
    video_TxYxXx3 = np.empty((len(wanted_T), height, width, 3), np.uint8)
    usable, held, done = set(media.stamps), None, 0

    def fill(frame, until):
        nonlocal done
        if done < until:
            video_TxYxXx3[done:until] = _rgb(frame, media, height, width, ground)
            done = until

    for stamp, _, frame in _frames(file, media, limits, deadline, wanted_T[0] if seek else None):
        if getattr(frame, "is_corrupt", False) or (usable and stamp not in usable):
            continue
        before = int(np.searchsorted(wanted_T, stamp - _SAME_S))  # how many of the times are past without this frame
        if before > done and (usable or (seek and held is None)):
            raise _Lost(f"the frame at {wanted_T[done]:.4g} s is gone, or damaged")
        fill(held or frame, before)
        held = frame
        if usable:
            fill(held, int(np.searchsorted(wanted_T, stamp + _SAME_S)))
        if done == len(wanted_T):
            return video_TxYxXx3
    if held is None or usable:
        raise _Lost(f"the frame at {wanted_T[done]:.4g} s is gone, or damaged")
    fill(held, len(wanted_T))
    return video_TxYxXx3


@contextlib.contextmanager
def _reading(path):
    """The file's bytes, opened for reading; whatever goes wrong comes out as MediaError."""
    try:
        with _open(path) as file:
            yield file
    except MediaError:
        raise
    except Exception as error:  # on hostile bytes the decoders raise nearly anything; one file must not end a run
        raise MediaError(path, _words(error)) from error


def _open(path):
    if "://" in path:
        return epath.Path(path).open("rb")
    # Without O_NONBLOCK, opening a FIFO waits for a writer, for ever.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise MediaError(path, "link to nothing" if os.path.islink(path) else "no such file") from None
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise MediaError(path, "a directory" if stat.S_ISDIR(mode) else "not a regular file (pipe, socket or device)")


def _words(error):
    if isinstance(error, av.FFmpegError):
        log = f" ({error.log[2].strip()})" if error.log else ""
        return f"{error.strerror}{log}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"


def _report(status, reason, decoded, promised):
    return dict(status=status, reason=reason, frames_decoded=decoded, frames_promised=promised)


def _check_limits(path, limits, width, height, frames=None, seconds=None, fps=None):
    """Raises MediaError if a claim, where it is known, is over its limit."""
    volume = width * height * (frames or (seconds or 0) * (fps or 0))
    for what, value, name in (
        (f"a frame of {width}x{height} pixels", width * height, "max_pixels"),
        (f"{frames} frames", frames, "max_frames"),
        (f"{seconds} s", seconds, "max_seconds"),
        (f"an implausible frame rate of {fps}", fps, "max_fps"),
        (f"{width}x{height} pixels for {frames or 'all'} frames", volume, "max_volume"),
    ):
        if value is not None and value > getattr(limits, name):
            raise MediaError(path, f"claims {what}, over {name}={getattr(limits, name):g}: shrink or split it")


# Pictures: Pillow.


def _identify(file, formats):
    """The picture with its header read and no pixel decoded, or None if it is none of `formats`."""
    Image.init()
    file.seek(0)
    try:
        return Image.open(file, formats=sorted(formats & set(Image.OPEN)))
    except Image.UnidentifiedImageError:
        return None


def _probe_picture(path, file, formats, limits):
    picture = _identify(file, formats)
    if picture is None:
        return None
    _check_limits(path, limits, *picture.size)
    moving = picture.format in ("GIF", "PNG", "WEBP", "AVIF") and getattr(picture, "is_animated", False)
    if moving and picture.format != "WEBP":
        return None  # FFmpeg plays these, not animated WebP
    rotation, mirror = (0, False) if moving else _ORIENTATION.get(_orientation(picture), (0, False))
    width, height = picture.size[:: -1 if rotation % 180 else 1]
    frames = picture.n_frames if moving else 1
    if moving:
        _check_limits(path, limits, width, height, frames)
    first_pts = 0.0 if moving else None
    kind = "video" if moving else "image"
    return Media(path, kind, "pillow", width, height, rotation, mirror, frames, None, None, first_pts, 0)


def _orientation(picture):
    try:
        return picture.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF, in as many ways as there are cameras; the pixels are good
        return 1


def _picture(path, file, limits):
    picture = _identify(file, _CERTAIN) or _identify(file, set(Image.OPEN) - _CERTAIN - _REFUSED)
    if picture is None:
        raise MediaError(path, "changed on disk: no picture")
    _check_limits(path, limits, *picture.size)
    picture.load()
    if picture.format == "JPEG" and picture.mode == "RGB":
        # libjpeg fills what a cut file lacks with mid grey, without a word.
        grey_Y = np.all(np.asarray(picture) == 128, axis=(1, 2))
        there = picture.height - int(np.argmin(grey_Y[::-1])) if not grey_Y.all() else 0
        if 2 * there < picture.height:
            raise MediaError(path, f"truncated: {there} of {picture.height} rows hold a picture")
    return picture


def _opaque(path, picture, ground=255):
    """The picture in 8-bit RGB; 16-bit grey is scaled, what is transparent is laid on the grey level `ground`."""
    if picture.mode.startswith("I"):
        grey_YxX = np.asarray(picture)
        if grey_YxX.min() < 0 or grey_YxX.max() > 65535:
            raise MediaError(path, f"grey levels from {grey_YxX.min()} to {grey_YxX.max()} are not 16-bit")
        clear_YxX = grey_YxX == picture.info.get("transparency", -1)
        return Image.fromarray(np.where(clear_YxX, ground, grey_YxX // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise MediaError(path, "floating-point grey has no range to scale to 8 bits from")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    under = Image.new("RGBA", picture.size, (ground, ground, ground, 255))
    return Image.alpha_composite(under, picture).convert("RGB")


# Videos: PyAV.

# Tags that are no UTF-8 must not stop a sound file. From PyAV 19 on they never do, and nothing need be said of them.
_LENIENT = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def _container(file, limits):
    file.seek(0)
    options = {
        "max_pixels": str(limits.max_pixels),  # held by the decoder itself, before it allocates
        "threads": "1",
        "protocol_whitelist": "none",  # a playlist must not reach other files, nor the network
    }
    return av.open(file, options=options, timeout=limits.timeout_s, **_LENIENT)


def _stream(container, limits):
    """The first video stream that is not a cover picture, ready to decode; None if there is none."""
    attached = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & attached]
    if not streams:
        return None
    if streams[0].codec_context is not None:  # None: FFmpeg does not know the codec
        # One thread: the frames before a damage are then the same on every machine, and workers do not fight.
        streams[0].codec_context.thread_count = 1
        streams[0].codec_context.options = {"max_pixels": str(limits.max_pixels)}
    return streams[0]


def _probe_video(path, file, limits):
    with _container(file, limits) as container:
        stream = _stream(container, limits)
        if stream is None:
            raise MediaError(path, "no video stream")
        if stream.codec_context is None:
            raise MediaError(path, "unknown codec, or encrypted")
        pillow_reads = stream.codec_context.name in ("mjpeg", "png", "gif", "webp", "bmp", "tiff")
        if pillow_reads and container.format.name.endswith(("image2", "_pipe")):
            raise MediaError(path, "a damaged picture")  # FFmpeg would show what it can of one
        if stream.duration:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = container.duration / av.time_base if container.duration else None
        rate = stream.average_rate or stream.guessed_rate
        fps = float(rate) if rate else None
        frames = stream.frames or None
        codec = stream.codec_context
        _check_limits(path, limits, codec.width or 0, codec.height or 0, frames, duration, fps)

        try:
            frame = next((f for p in container.demux(stream) for f in p.decode()), None)
        except av.FFmpegError as error:
            raise MediaError(path, f"the first frame does not decode: {_words(error)}") from error
        if frame is None:
            raise MediaError(path, f"no frame comes out, {frames or 'an unknown number'} promised")
        if frames and container.format.name.startswith("mov"):
            # The count is of the samples stored; an edit list may show fewer of them.
            frames = sum(not entry.is_discard for entry in stream.index_entries)
        aspect = stream.sample_aspect_ratio
        width = max(1, round(frame.width * aspect)) if aspect else frame.width
        _check_limits(path, limits, max(width, frame.width), frame.height, frames, duration, fps)
        if frame.rotation % 90:
            raise MediaError(path, f"rotation by {frame.rotation} degrees is not a multiple of 90")
        size = (frame.height, width) if frame.rotation % 180 else (width, frame.height)
        first_pts = None if frame.pts is None else float(frame.pts * stream.time_base)
        if first_pts is None and fps is None:
            fps = 25.0
        return Media(path, "video", "av", *size, frame.rotation, _mirrored(frame), frames, duration, fps, first_pts, 0)


def _mirrored(frame):
    """Whether the display matrix holds a reflection, which `frame.rotation` leaves out."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV knows fewer kinds of side data than FFmpeg
        return False
    if data is None:
        return False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(np.float64)
    return bool(a * d - b * c < 0)


def _frames(file, media, limits, deadline, seek_s=None):
    """Yields (seconds from the first frame, seconds that it lasts, frame), in the order of display.

    From the key frame at or before seek_s, or from the start. Raises what the decoder raises, and TimeoutError past
    the deadline (time.thread_time).
    """
    late = TimeoutError(f"decoding took over {limits.timeout_s:g} s (timeout_s)")
    if media.reader == "pillow":
        picture = _identify(file, _CERTAIN)
        stamp = 0.0
        for index in range(media.frames):
            if time.thread_time() > deadline:
                raise late
            picture.seek(index)
            picture.load()
            length = (picture.info.get("duration") or 100) / 1000  # 0 means as browsers read it
            yield stamp, length, picture.copy()
            stamp += length
        return

    with _container(file, limits) as container:
        stream = _stream(container, limits)
        tick = stream.time_base
        if seek_s is not None:
            container.seek(math.floor((seek_s + media.first_pts) / tick), stream=stream)
        gap = 1 / media.fps if media.fps else 0.0
        counted = 0
        for packet in container.demux(stream):
            if time.thread_time() > deadline:
                raise late
            for frame in packet.decode():
                if media.first_pts is None:
                    stamp = counted * gap
                elif frame.pts is None:
                    raise ValueError(f"frame {counted} has no time stamp")
                else:
                    stamp = float(frame.pts * tick) - media.first_pts
                counted += 1
                yield stamp, float(frame.duration * tick) if frame.duration else gap, frame


def _rgb(frame, media, height, width, ground):
    """The frame (of PyAV or Pillow) at the asked size and upright, as uint8 YxXx3; ground: see `decode`."""
    raw_height, raw_width = (width, height) if media.rotation % 180 else (height, width)
    if isinstance(frame, av.VideoFrame):
        if frame.format.has_palette or any(part.is_alpha for part in frame.format.components):
            frame = Image.fromarray(frame.reformat(format="rgba", threads=1).to_ndarray())
        else:
            frame = frame.reformat(raw_width, raw_height, "rgb24", interpolation=_SCALING, threads=1)
            stored_YxXx3 = frame.to_ndarray()
    if isinstance(frame, Image.Image):
        frame = _opaque(media.path, frame, ground)
        stored_YxXx3 = np.asarray(frame.resize((raw_width, raw_height), Image.Resampling.BICUBIC))
    if media.mirror:
        stored_YxXx3 = stored_YxXx3[::-1]
    return np.rot90(stored_YxXx3, media.rotation // 90)
