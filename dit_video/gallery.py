"""What a person looks at: videos as MP4, GIF and PNG, and a page which shows them side by side.

T frames, Y x X pixels, 3 colours; every video is uint8. Paths are local or remote (gs://, s3://): each file is
written in one piece, never appended to nor renamed, because object stores can do neither.
"""

import dataclasses
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from absl import logging
from etils import epath
from PIL import Image

DISPLAY_SIZE = 288  # pixels: small videos are enlarged as far as their longer side fits in this
MOST_GIF_FPS = 50  # browsers slow down frames that are shorter than 20 ms
PALETTE_PIXELS = 1 << 16  # how many of a video's pixels choose its GIF palette


@dataclasses.dataclass(frozen=True)
class Sample:
    """One video or picture (T = 1), and what is needed to make it again.

    video_TxYxXx3: uint8. fps: frames per second. extra: further fields for the page and for samples.json, such as
    steps, guidance, solver, config, checkpoint, weights; anything that JSON can hold, in the order to show.
    """

    video_TxYxXx3: np.ndarray
    fps: float
    prompt: str
    seed: int
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Encoding.


def mp4_bytes(video_TxYxXx3, fps, scale=None):
    """The video as H.264 (8-bit 4:2:0, BT.709), close to lossless to the eye; plays everywhere.

    Pixels are enlarged `scale` times (default: small videos up to DISPLAY_SIZE); an odd width or height then gains
    one repeated row or column, because 4:2:0 needs even sizes. Raises ValueError for what is not a video.
    """
    _check(video_TxYxXx3, fps)
    scale = scale or _display_scale(video_TxYxXx3)
    height, width = (scale * n + scale * n % 2 for n in video_TxYxXx3.shape[1:3])
    rate = Fraction(fps).limit_denominator(1001)  # 24000/1001 stays itself
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = av.video.reformatter.Colorspace.ITU709
        for t, frame_YxXx3 in enumerate(video_TxYxXx3):
            large_YxXx3 = _enlarge(frame_YxXx3, scale)
            margin = (0, height - large_YxXx3.shape[0]), (0, width - large_YxXx3.shape[1]), (0, 0)
            frame = av.VideoFrame.from_ndarray(np.pad(large_YxXx3, margin, mode="edge"), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            frame.pts, frame.time_base = t, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def gif_bytes(video_TxYxXx3, fps, scale=None):
    """The video as an endless GIF, enlarged like `mp4_bytes`.

    All frames share one palette, without dithering, so that what does not move does not flicker; up to 256 colours
    are exact. Delays are whole hundredths of a second, rounded so that they add up to the true duration. Above
    MOST_GIF_FPS only every k-th frame is kept. Pillow merges equal neighbours into one longer frame.
    """
    _check(video_TxYxXx3, fps)
    stride = math.ceil(fps / MOST_GIF_FPS)
    video_TxYxXx3 = video_TxYxXx3[::stride]
    index_TxYxX, palette_Kx3 = _one_palette(video_TxYxXx3)
    frames = [Image.fromarray(_enlarge(index_YxX, scale or _display_scale(video_TxYxXx3))) for index_YxX in index_TxYxX]
    for frame in frames:
        frame.putpalette(palette_Kx3.tobytes())
    ends = np.round(100 * stride * np.arange(len(frames) + 1) / fps)
    delays_ms = [int(10 * d) for d in np.diff(ends)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=delays_ms, loop=0, optimize=False)
    return buffer.getvalue()


def png_bytes(frame_YxXx3):
    """The frame as PNG: lossless, at its own size."""
    buffer = io.BytesIO()
    Image.fromarray(frame_YxXx3).save(buffer, "PNG")
    return buffer.getvalue()


def write_mp4(path, video_TxYxXx3, fps, scale=None):
    """Writes `mp4_bytes` to the local or remote path, whose directories are made."""
    _write(path, mp4_bytes(video_TxYxXx3, fps, scale))


def write_gif(path, video_TxYxXx3, fps, scale=None):
    """Writes `gif_bytes` to the local or remote path, whose directories are made."""
    _write(path, gif_bytes(video_TxYxXx3, fps, scale))


def write_png(path, frame_YxXx3):
    """Writes `png_bytes` to the local or remote path, whose directories are made."""
    _write(path, png_bytes(frame_YxXx3))


def write_frames(directory, video_TxYxXx3):
    """Writes each frame, lossless and at its own size: directory/f0000.png, f0001.png, ..., in the place of others."""
    for path in epath.Path(directory).glob("f*.png"):
        if re.fullmatch(r"f\d{4,}\.png", path.name):  # of a longer video before
            path.unlink()
    for t, frame_YxXx3 in enumerate(video_TxYxXx3):
        write_png(epath.Path(directory) / f"f{t:04d}.png", frame_YxXx3)


def _check(video_TxYxXx3, fps):
    shape, dtype = np.shape(video_TxYxXx3), getattr(video_TxYxXx3, "dtype", None)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise ValueError(
            f"video is {dtype} {shape}: it must be uint8 (frames, height, width, 3), none of them 0. "
            "From [-1, 1]: np.clip((video + 1) * 127.5, 0, 255).round().astype(np.uint8)."
        )
    if not 0 < fps < math.inf:
        raise ValueError(f"fps={fps}: frames per second must be above 0 and finite.")


def _display_scale(video_TxYxXx3):
    return max(1, DISPLAY_SIZE // max(video_TxYxXx3.shape[1:3]))


def _enlarge(frame_YxX_, scale):
    return frame_YxX_.repeat(scale, axis=0).repeat(scale, axis=1)


def _one_palette(video_TxYxXx3):
    """index_TxYxX (uint8) into palette_Kx3, K <= 256, one palette for all frames."""
    code_TxYxX = video_TxYxXx3.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    seen = np.zeros(1 << 24, bool)
    seen[code_TxYxX] = True
    codes_K = np.flatnonzero(seen)
    if len(codes_K) <= 256:
        palette_Kx3 = np.stack([codes_K >> 16, codes_K >> 8, codes_K], axis=-1).astype(np.uint8)
        return np.searchsorted(codes_K, code_TxYxX).astype(np.uint8), palette_Kx3
    pixels_Nx3 = video_TxYxXx3.reshape(-1, 3)
    pixels_Nx3 = pixels_Nx3[np.random.default_rng(0).integers(len(pixels_Nx3), size=PALETTE_PIXELS)]
    chosen = Image.fromarray(pixels_Nx3[None]).quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
    frames = (Image.fromarray(frame_YxXx3) for frame_YxXx3 in video_TxYxXx3)
    index_TxYxX = np.stack([frame.quantize(palette=chosen, dither=Image.Dither.NONE) for frame in frames])
    return index_TxYxX, np.array(chosen.getpalette(), np.uint8).reshape(-1, 3)


def _write(path, data):
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# Galleries.


def write_samples(directory, samples: Sequence[Sample], title="Samples", summary=None, every_frame=False, step=None):
    """Writes samples for a person to look at, and how to make each again; returns the path of the page.

    Per sample: NAME.png (the first frame, lossless, at its own size) and, for a video, NAME.mp4 and NAME.gif, with
    NAME/f0000.png, ... when `every_frame`. For all: samples.json, then index.html. `title` heads the page, `summary`
    (a mapping, e.g. of the config) is shown below it, `step` is the training step that all samples come from.
    """
    directory = epath.Path(directory)
    records = []
    for i, sample in enumerate(samples):
        name = _name(i, sample.prompt)
        _check(sample.video_TxYxXx3, sample.fps)
        frames, height, width, _ = sample.video_TxYxXx3.shape
        files = {"png": f"{name}.png"}
        write_png(directory / files["png"], sample.video_TxYxXx3[0])
        if frames > 1:
            files |= {"gif": f"{name}.gif", "mp4": f"{name}.mp4"}
            write_gif(directory / files["gif"], sample.video_TxYxXx3, sample.fps)
            write_mp4(directory / files["mp4"], sample.video_TxYxXx3, sample.fps)
            if every_frame:
                write_frames(directory / name, sample.video_TxYxXx3)
        size = {"width": width, "height": height, "frames": frames, "fps": sample.fps}
        record = {"name": name, "files": files, "prompt": sample.prompt, "seed": sample.seed} | size
        records.append(record | dict(sample.extra))
    group = plain({"title": title, "step": step, "summary": summary or {}, "samples": records})
    # Last, so that a directory with a samples.json is complete.
    _write(directory / "samples.json", json.dumps(group, indent=2, ensure_ascii=False, allow_nan=False).encode())
    _write(directory / "index.html", _page([("", group)]).encode())
    return directory / "index.html"


def grow(gallery, step, samples: Sequence[Sample], title="Training samples", summary=None):
    """Adds a training step's samples to a run's gallery; returns the path of its page, newest step first.

    The samples go to gallery/step_XXXXXXXX/ (see `write_samples`). The page is made anew from every samples.json
    there, so a step that a resumed run samples again replaces its first version.
    """
    gallery = epath.Path(gallery)
    write_samples(gallery / f"step_{step:08d}", samples, title, summary, step=step)
    groups = []
    for path in gallery.glob("step_*/samples.json"):
        try:
            groups.append((f"{path.parent.name}/", json.loads(path.read_bytes())))
        except ValueError:  # a run was killed while it wrote this file
            logging.warning("%s is not JSON: its samples are left out of the page.", path)
    groups.sort(key=lambda group: group[1]["step"], reverse=True)
    _write(gallery / "index.html", _page(groups).encode())
    return gallery / "index.html"


def plain(value):
    """`value` as legal JSON: arrays as lists, numbers that are not finite as "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _name(index, prompt):
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-")
    return f"{index:03d}-{slug}" if slug else f"{index:03d}"


# The page. One file without any reference outside its own directory, so that it opens from a disk or a bucket.

OPEN_STEPS = 4  # older steps are folded, and a browser does not load what is folded
NOT_EXTRA = {"name", "files", "prompt", "seed", "width", "height", "frames", "fps"}

CSS = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --stage: #ececea; --line: #dededa; --text: #1c1c1a;
  --soft: #6a6a65; --accent: #2b5fc7 }
@media (prefers-color-scheme: dark) { :root { --page: #141416; --card: #1e1e21; --stage: #2a2a2e; --line: #323237;
  --text: #ececf0; --soft: #9c9ca6; --accent: #8fb4ff } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 28px 20px 60px; max-width: 1320px; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif }
a { color: var(--accent); text-decoration: none } a:hover { text-decoration: underline }
h1 { margin: 0 0 4px; font-size: 26px; letter-spacing: -.01em }
.soft { color: var(--soft) }
summary { cursor: pointer }
.step { margin-top: 28px } .step > summary { padding: 6px 0; border-bottom: 1px solid var(--line) }
.step > summary b { font-size: 18px; margin-right: 8px }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 16px; margin-top: 16px }
.card { display: grid; grid-row: span 4; grid-template-rows: subgrid; row-gap: 0; overflow: hidden;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.card > * { min-width: 0; padding: 0 14px }
.card > .stage { display: flex; align-items: center; justify-content: center; padding: 0; background: var(--stage) }
.stage img { display: block; max-width: 100%; height: auto }
.stage img.pixels { image-rendering: pixelated }
.prompt { margin: 12px 0 8px; max-height: 7.3em; overflow-y: auto; overflow-wrap: anywhere }
.facts { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 13px }
.foot { display: flex; flex-wrap: wrap; gap: 4px 12px; margin: 8px 0 12px; font-size: 13px }
.foot summary { color: var(--soft) } .foot details[open] { flex-basis: 100% }
table { border-collapse: collapse; margin-top: 6px; font-size: 13px }
td { padding: 1px 14px 1px 0; vertical-align: top; overflow-wrap: anywhere }
td:first-child { color: var(--soft); white-space: nowrap }
"""


def _page(groups):
    """The page of (folder, what its samples.json holds) in the order given; the first names the run."""
    text = lambda value: html.escape(str(value))
    title, summary = groups[0][1]["title"], groups[0][1]["summary"]
    facts = "".join(f"<span><span class=soft>{text(k)}</span> {text(v)}</span>" for k, v in summary.items())
    sections = []
    for i, (folder, group) in enumerate(groups):
        count = f"{len(group['samples'])} sample{'s' * (len(group['samples']) != 1)}"
        cards = "\n".join(_card(folder, record) for record in group["samples"])
        grid = f"<div class=grid>\n{cards}\n</div>"
        head = "Samples" if group["step"] is None else f"Step {group['step']:,}"
        note = f'<span class=soft>{count} · <a href="{folder}samples.json">samples.json</a></span>'
        fold = "open" if i < OPEN_STEPS else ""
        sections.append(f"<details class=step {fold}><summary><b>{head}</b> {note}</summary>\n{grid}\n</details>")
    return f"""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{CSS}</style>
<h1>{text(title)}</h1>
<div class=facts>{facts}</div>
{chr(10).join(sections)}
</html>
"""


def _card(folder, record):
    files = {kind: folder + name for kind, name in record["files"].items()}
    width, height, frames, fps = (record[key] for key in ("width", "height", "frames", "fps"))
    fit = DISPLAY_SIZE / max(width, height)
    scale = int(fit) if fit >= 1 else fit  # whole, so that all pixels look alike
    facts = [f"{width}×{height}"]
    if frames > 1:
        facts += [f"{frames} frames", f"{fps:g} fps", f"{frames / fps:.1f} s"]
    facts.append(f"seed {record['seed']}")
    extra = {key: value for key, value in record.items() if key not in NOT_EXTRA}
    settings = f"<details><summary>settings</summary>{_table(extra)}</details>" if extra else ""
    prompt = html.escape(record["prompt"])
    links = "".join(f'<a href="{path}">{kind}</a>' for kind, path in files.items())
    return f"""<div class=card>
<a class=stage href="{files.get("mp4", files["png"])}"><img class="{"pixels" * (scale > 1)}" loading=lazy
 src="{files.get("gif", files["png"])}" width={round(scale * width)} height={round(scale * height)} alt="{prompt}"></a>
<p class=prompt>{prompt or "<span class=soft>(no prompt)</span>"}</p>
<div class="facts soft">{"".join(f"<span>{fact}</span>" for fact in facts)}</div>
<div class=foot>{links}{settings}</div></div>"""


def _table(fields):
    rows = (f"<tr><td>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in fields.items())
    return f"<table>{''.join(rows)}</table>"
