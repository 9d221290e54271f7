"""A folder of real videos and pictures as training clips, each at its own size, duration and frame rate. Host only.

T frames, Y x X pixels. Captions come from `manifest.jsonl` in the folder (lines with "file" and "caption"), else
from a .txt beside the file, else are empty. What a clip shows in an epoch (its window in time, its size) is drawn by
(seed, epoch, index) alone, under a budget of tokens; `layout` gives it without decoding, so that packing can plan.
"""

import dataclasses
import hashlib
import json
import mimetypes
import os
import uuid
from concurrent import futures

import numpy as np
from etils import epath

from dit_video import watchdog
from dit_video.data.decode import LIMITS, Media, MediaError, check, decode
from dit_video.patches import Clip

_SIDECARS = {".txt", ".json", ".jsonl", ".md", ".sh"}
MANIFEST = "manifest.jsonl"


def list_files(root):
    """All files below `root` that may be media, and what is not worth opening.

    Returns sorted names relative to root, with "/", and [(name, reason)] of the rest. Hidden names and sidecars are
    in neither. Links to files are followed, links to folders are not: they may lead back here. Raises ValueError if
    root is no folder.
    """
    root = epath.Path(root)
    if not root.is_dir():
        raise ValueError(f"root={os.fspath(root)!r} is not a folder")
    names, refused, folders = [], [], [(root, "")]
    while folders:
        folder, prefix = folders.pop()
        try:
            entries = list(folder.iterdir())
        except OSError as error:
            refused.append((prefix.rstrip("/") or ".", f"folder cannot be listed: {error.strerror}"))
            continue
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                if os.path.islink(entry):
                    refused.append((name, "link to a folder: not followed"))
                    continue
                if (mimetypes.guess_type(entry.name)[0] or "").startswith(("video/", "image/")):
                    refused.append((name, "a directory with a clip's name"))
                folders.append((entry, name + "/"))
            elif entry.suffix.lower() not in _SIDECARS:
                names.append(name)
    return sorted(names), sorted(refused)


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # links that loop
        return False


def read_captions(root):
    """{name: caption} of root's manifest; {} without one. Raises ValueError, with the line, if it cannot be read."""
    manifest = epath.Path(root) / MANIFEST
    captions = {}
    if not manifest.exists():
        return captions
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions[os.path.normpath(entry["file"])] = entry.get("caption")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{manifest}, line {number}: {error!r}; each line is {{"file": ..., "caption": ...}}'
            ) from error
    return captions


def _caption(root, name, captions):
    if captions.get(name) is not None:
        return str(captions[name])
    try:
        return (epath.Path(root) / name).with_suffix(".txt").read_bytes().decode("utf-8", "replace").strip()
    except OSError:
        return ""


def scan(root, limits=LIMITS, cache=None):
    """Decodes every file below `root` once. Returns [(Media, caption)], sorted by name, and the report.

    report: dict(file, status, reason, frames_decoded, frames_promised) for every file, status "ok", "partial" (the
    frames before the damage are used) or "rejected" (not in the list); see `decode.check`. Files that the manifest
    names and the folder lacks are rejected too.

    cache: a JSON-lines path that keeps reports and time stamps; a file whose size and modification time are those
    of the cache, under the same limits, is not decoded again. Of several hosts one should scan, for the others to
    `recall`: a file that runs into `limits.timeout_s` is used as far as the scan came, which depends on the machine.
    """
    root = os.fspath(epath.Path(root))
    names, refused = list_files(root)
    captions = read_captions(root)
    known = _read_cache(cache) if cache is not None else {}

    def examine(name):
        watchdog.moved()
        path = f"{root}/{name}"
        key = _cache_key(path, limits)
        if key is not None and known.get(name, {}).get("key") == key:
            return known[name]
        try:
            media, report = check(path, limits)
        except MediaError as error:
            media, report = None, dict(status="rejected", reason=error.reason, frames_decoded=0, frames_promised=None)
        return dict(key=key, report=dict(file=name, **report), media=media and dataclasses.asdict(media))

    with futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # decoders let go of the interpreter lock
        found = list(pool.map(examine, names))
    if cache is not None:
        write_report(found, cache)

    missing = captions.keys() - set(names) - {name for name, _ in refused}
    refused += [(name, f"named in {MANIFEST}, but missing") for name in missing]
    report = [entry["report"] for entry in found]
    for name, reason in refused:
        report.append(dict(file=name, status="rejected", reason=reason, frames_decoded=0, frames_promised=None))
    return _usable(root, found, captions), sorted(report, key=lambda row: row["file"])


def recall(root, cache):
    """[(Media, caption)] as a scan, of another process too, left them in its cache: no clip is opened."""
    root = os.fspath(epath.Path(root))
    found = sorted(_read_cache(cache).values(), key=lambda entry: entry["report"]["file"])
    return _usable(root, found, read_captions(root))


def _usable(root, found, captions):
    return [
        (_media(root, entry), _caption(root, entry["report"]["file"], captions)) for entry in found if entry["media"]
    ]


def write_report(rows, path):
    """Writes dicts as JSON lines, in one move: a reader never sees half a file."""
    path = epath.Path(path)
    # By chance: processes of several hosts may have the same id, in containers nearly always.
    partial = path.parent / f"{path.name}.{uuid.uuid4().hex}.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(path)


def _cache_key(path, limits):
    """What must not have changed since the scan, as JSON gives it back; None where the file cannot be asked."""
    try:
        if "://" in path:
            state = epath.Path(path).stat()
            size, modified = state.length, state.mtime
        else:
            state = os.stat(path)
            size, modified = state.st_size, state.st_mtime_ns
    except OSError:
        return None
    return [size, modified, dataclasses.asdict(limits)]


def _read_cache(path):
    """{name: entry}. A cache that cannot be read only costs time: lines that are not ours are passed over."""
    known = {}
    if epath.Path(path).exists():
        for line in epath.Path(path).read_text().splitlines():
            try:
                entry = json.loads(line)
                known[entry["report"]["file"]] = entry
            except (ValueError, KeyError, TypeError):
                continue
    return known


def _media(root, entry):
    fields = dict(entry["media"], path=f"{root}/{entry['report']['file']}", stamps=tuple(entry["media"]["stamps"]))
    return Media(**fields)


def legal_sizes(height, width, patch, min_side, max_side, max_patches):
    """Sizes, in pixels, at which a clip of height x width may be shown: [(height, width)], small to large.

    Multiples of the patch, never beyond native (one patch at least), at most max_patches patches, no side over
    max_side; where any allow it, no side under min_side. The longer side runs over all its multiples and the shorter
    follows to the nearest one, so the aspect ratio changes by less than a patch. [] if no size has this aspect.
    """
    sides, unit = (height, width), patch
    long = 0 if height >= width else 1
    short = 1 - long
    sizes = []
    for count in range(1, max(1, sides[long] // unit[long]) + 1):
        exact = count * unit[long] * sides[short] / sides[long] / unit[short]
        if exact < 0.5 and sides[short] >= unit[short]:
            continue
        other = min(max(1, round(exact)), max(1, sides[short] // unit[short]))
        size = [0, 0]
        size[long], size[short] = count * unit[long], other * unit[short]
        if count * other <= max_patches and max(size) <= max_side:
            sizes.append(tuple(size))
    return [size for size in sizes if min(size) >= min_side] or sizes[-1:]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one record shows: known before decoding.

    height, width: pixels of the clip; scaled: (height, width) of the whole frame, from which the clip is cut at
    corner = (y, x). These differ only for strips too thin for the budget. start_s: seconds from the file's first
    frame to the clip's; time_T: float64 seconds from the clip's first frame.
    """

    index: int
    epoch: int
    uid: int
    caption: str
    height: int
    width: int
    scaled: tuple[int, int]
    corner: tuple[int, int]
    start_s: float
    time_T: tuple[float, ...]

    @property
    def frames(self):
        return len(self.time_T)


class ClipsSource:
    """The usable files of a folder as clips, at random windows in time and at random sizes.

    len(source) files. source.layout(index, epoch) -> Layout, without decoding; source.clip(index, epoch) -> Clip, or
    raises MediaError where the file is no longer what the scan found. source[index, epoch] -> Clip, or None with a
    dict(file, index, epoch, reason) appended to source.errors (of this process): the caller leaves the clip out, and
    no other clip moves, for none depends on it.

    A clip has 1 + time_stride k frames and covers (1 + k) (height / patch[0]) (width / patch[1]) <= max_tokens
    tokens. The frame count is drawn first (k >= 1 wherever the video is long enough; a picture or a shorter video
    gives one frame), then the start, uniformly, then the size from those that the budget leaves (`legal_sizes`).

    fps: rates to draw from, in frames per second, never above the file's own; None keeps the file's own frames and
    stamps, every n-th with n drawn from `strides` as far as the file is long enough. max_frames bounds the frames,
    min_side and max_side the sides in pixels. scan's report is in source.report. name tells sources apart in uid.
    scanned: what the cache says of the files is taken as it is (`recall`), without a report.
    """

    def __init__(
        self,
        root,
        *,
        max_tokens,
        seed=0,
        patch=(8, 8),
        time_stride=4,
        min_side=64,
        max_side=512,
        fps=None,
        strides=(1,),
        max_frames=65,
        limits=LIMITS,
        cache=None,
        name="clips",
        scanned=False,
    ):
        if max_tokens < 1 or max_frames < 1 or max_side < max(patch):
            raise ValueError(
                f"max_tokens={max_tokens}, max_frames={max_frames} and max_side={max_side} must hold one patch {patch}"
            )
        self.media, self.report = (recall(root, cache), []) if scanned else scan(root, limits, cache)
        if not self.media:
            reasons = [f"{row['file']!r}: {row['reason']}" for row in self.report[:5]]
            raise ValueError(f"root={os.fspath(root)!r} holds no usable clip: {'; '.join(reasons) or 'it is empty'}")
        self.root, self.errors = os.fspath(epath.Path(root)), []
        self._seed, self._name, self._limits = seed, name, limits
        self._max_tokens, self._max_frames, self._patch, self._time_stride = max_tokens, max_frames, patch, time_stride
        self._min_side, self._max_side, self._fps, self._strides = min_side, max_side, fps, strides

    def __len__(self):
        return len(self.media)

    def layout(self, index, epoch):
        """What record (index, epoch) shows, as Layout."""
        media, caption = self.media[index]
        rng = np.random.default_rng((self._seed, epoch, index))
        size_of = lambda patches: legal_sizes(
            media.height, media.width, self._patch, self._min_side, self._max_side, patches
        )
        smallest = size_of(self._max_tokens)[:1]
        cheapest = _patches(smallest[0], self._patch) if smallest else self._max_tokens
        longest = 1 + self._time_stride * (self._max_tokens // cheapest - 1)
        start_s, time_T = _draw_times(
            rng, media, min(longest, self._max_frames), self._time_stride, self._fps, self._strides
        )
        patches = self._max_tokens // (1 + (len(time_T) - 1) // self._time_stride)
        sizes = size_of(patches)
        if sizes:
            scaled = size = sizes[rng.integers(len(sizes))]
            corner = (0, 0)
        else:
            scaled, size, corner = _draw_cut(rng, media, self._patch, self._max_side, patches)
        uid = hashlib.blake2b(f"{self._name} {index} {epoch}".encode(), digest_size=4).digest()
        return Layout(index, epoch, int.from_bytes(uid, "little"), caption, *size, scaled, corner, start_s, time_T)

    def clip(self, index, epoch):
        """Decodes record (index, epoch). Raises MediaError(path, reason)."""
        layout = self.layout(index, epoch)
        media, _ = self.media[index]
        video_TxYxXx3 = decode(media, layout.start_s, layout.time_T, *layout.scaled, self._limits)
        y, x = layout.corner
        video_TxYxXx3 = np.ascontiguousarray(video_TxYxXx3[:, y : y + layout.height, x : x + layout.width])
        return Clip(video_TxYxXx3, np.asarray(layout.time_T, np.float32), layout.caption, layout.uid)

    def __getitem__(self, record):
        index, epoch = record
        try:
            return self.clip(index, epoch)
        except MediaError as error:
            self.errors.append(dict(file=error.path, index=index, epoch=epoch, reason=error.reason))
            return None


def _patches(size, patch):
    return (size[0] // patch[0]) * (size[1] // patch[1])


def _draw_times(rng, media, max_frames, time_stride, fps, strides):
    """A window drawn uniformly in time: (start_s, time_T), 1 + time_stride k frames, at most max_frames."""
    stamps = np.asarray(media.stamps)
    own = fps is None or media.fps is None or media.kind == "image"
    if own:
        fitting = [stride for stride in strides if (len(stamps) - 1) // stride >= time_stride]
        stride = fitting[rng.integers(len(fitting))] if fitting else 1
        available = 1 + (len(stamps) - 1) // stride
    else:
        rate = min(fps[rng.integers(len(fps))], media.fps)
        available = 1 + int((stamps[-1] - stamps[0] + 1e-6) * rate)
    longest = (min(available, max_frames) - 1) // time_stride
    frames = 1 + time_stride * (int(rng.integers(1, longest + 1)) if longest > 0 else 0)
    if own:
        first = int(rng.integers(len(stamps) - (frames - 1) * stride))
        time_T = stamps[first : first + (frames - 1) * stride + 1 : stride]
        return float(time_T[0]), tuple((time_T - time_T[0]).tolist())
    time_T = np.arange(frames) / rate
    latest = max(stamps[0], stamps[-1] - time_T[-1])
    return float(rng.uniform(stamps[0], latest)), tuple(time_T.tolist())


def _draw_cut(rng, media, patch, max_side, max_patches):
    """For a strip that no budget holds whole: (scaled, size, corner), one patch thin, cut at a random place."""
    long = 0 if media.height >= media.width else 1
    sides = (media.height, media.width)
    count = min(max_patches, max_side // patch[long])
    scaled, size, corner = list(patch), list(patch), [0, 0]
    scaled[long] = max(count * patch[long], round(sides[long] * patch[1 - long] / sides[1 - long]))
    size[long] = count * patch[long]
    corner[long] = int(rng.integers(scaled[long] - size[long] + 1))
    return tuple(scaled), tuple(size), tuple(corner)
