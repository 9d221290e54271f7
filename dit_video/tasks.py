"""What each task lays out: which patches, and how their levels fall. No task has a model or a sampler of its own.

n patches of one request, g its groups, P values per patch, K = M + 1 levels, T x Y x X a clip's grid, C channels.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from dit_video.codecs import Pixels, check_frames, to_float
from dit_video.patches import Grid, Piece, lay_out


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample asked for. width, height: pixels; frames: 1 = a picture; fps: frames per second; seed: of its noise.

    image_YxXx3: uint8, a picture to animate (the clip's first frame), or None. guidance: the scale, or None for
    the caller's.
    """

    prompt: str
    width: int
    height: int
    frames: int = 1
    fps: float = 8.0
    seed: int = 0
    image_YxXx3: np.ndarray | None = None
    guidance: float | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How clips become patches: what a config's codec, patch size, tokeniser and groups say."""

    codec: Pixels
    patch: tuple[int, int, int]
    tokenise: Callable[[str], np.ndarray]
    group_by: str = "frame"


@dataclasses.dataclass(frozen=True)
class Task:
    """A request laid out: its noise and known patches, where they lie in its grid, and level_Kxg of each group."""

    piece: Piece
    grid: Grid
    level_Kxg: np.ndarray


def check_request(request: Request, layout: Layout) -> None:
    """Raises ValueError for what cannot be laid out, naming the value and the nearest legal one."""
    st, sy, sx = layout.codec.stride
    check_frames(request.frames, st)
    latents, pt = 1 + (request.frames - 1) // st, layout.patch[0]
    if latents % pt:
        nearest = " or ".join(str(1 + (n * pt - 1) * st) for n in (latents // pt, latents // pt + 1) if n)
        raise ValueError(f"frames={request.frames} cannot be cut into patches of {pt} latents. Nearest: {nearest}.")
    for side, length, step in (
        ("height", request.height, sy * layout.patch[1]),
        ("width", request.width, sx * layout.patch[2]),
    ):
        if length <= 0 or length % step:
            below = length // step * step
            nearest = f"{below} or {below + step}" if below > 0 else f"{step}"
            raise ValueError(f"{side}={length} cannot be cut into patches of {step} pixels. Nearest: {nearest}.")
    if not (np.isfinite(request.fps) and request.fps > 0):
        raise ValueError(f"fps={request.fps} is not a frame rate. Give frames per second above 0.")
    image = request.image_YxXx3
    if image is not None and (image.dtype != np.uint8 or image.shape[2:] != (3,)):
        raise ValueError(f"the image is {image.dtype} {image.shape}; give uint8, height x width x 3 (RGB).")
    if image is not None and image.shape[:2] != (request.height, request.width):
        raise ValueError(
            f"the image is {image.shape[1]}x{image.shape[0]} and the clip {request.width}x{request.height} "
            "(WIDTHxHEIGHT): give the clip the image's size, or resize the image."
        )


def text_to_video(request: Request, layout: Layout, level_K: np.ndarray) -> Task:
    """All patches come from noise to clean together; one frame means a picture."""
    check_request(request, layout)
    piece, grid = _noise(request, layout)
    return Task(piece, grid, np.repeat(level_K[:, None], piece.size[2], 1))


def animate(request: Request, layout: Layout, level_K: np.ndarray) -> Task:
    """The first frame is the request's image, at level 0 throughout; the rest comes from noise."""
    check_request(request, layout)
    if layout.group_by != "frame" or layout.patch[0] != 1:
        raise ValueError(
            "animating needs a level for each latent frame: data.group_by='frame' and model.patch=(1, y, x); "
            f"they are {layout.group_by!r} and {layout.patch}."
        )
    piece, grid = _noise(request, layout)
    latents_1xYxXxC = layout.codec.encode(to_float(request.image_YxXx3[None]))
    known, _ = lay_out(latents_1xYxXxC, [0.0], layout.patch, layout.codec.stride[1:], piece.ids_sxK, request.seed)
    x_nxP = np.concatenate([known.x_nxP, piece.x_nxP[len(known.x_nxP) :]])
    level_Kxg = np.repeat(level_K[:, None], piece.size[2], 1)
    level_Kxg[:, 0] = 0
    return Task(dataclasses.replace(piece, x_nxP=x_nxP), grid, level_Kxg)


def _noise(request: Request, layout: Layout) -> tuple[Piece, Grid]:
    """The request's grid filled with noise of its own seed, before any packing."""
    st, sy, sx = layout.codec.stride
    shape = (1 + (request.frames - 1) // st, request.height // sy, request.width // sx, layout.codec.channels)
    last_frame_T = np.arange(shape[0]) * st / request.fps
    ids_sxK = layout.tokenise(request.prompt)
    empty = np.zeros(shape, np.float32)
    piece, grid = lay_out(
        empty, last_frame_T, layout.patch, (sy, sx), ids_sxK, request.seed & 0xFFFFFFFF, layout.group_by
    )
    noise_nxP = np.random.default_rng(request.seed).standard_normal(piece.x_nxP.shape, np.float32)
    return dataclasses.replace(piece, x_nxP=noise_nxP), grid
