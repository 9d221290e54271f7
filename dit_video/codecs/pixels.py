"""The lossless pixel codec: a causal rearrangement of 1 + st*k frames into 1 + k latent frames.

T x Y x X a clip's grid, C = st*sy*sx*3 latent channels. numpy in, numpy out.
"""

import dataclasses

import numpy as np
from einops import rearrange


@dataclasses.dataclass(frozen=True)
class Pixels:
    """stride: (st, sy, sx) video frames and pixels per latent."""

    stride: tuple[int, int, int] = (4, 1, 1)

    @property
    def channels(self) -> int:
        return 3 * int(np.prod(self.stride))

    def encode(self, video_TxYxXx3):
        """latents_TxYxXxC of a video in [-1, 1]. Frame 0 is repeated st times: an image is one latent frame.

        Raises ValueError unless there are 1 + st*k frames of a size that (sy, sx) divides.
        """
        st, sy, sx = self.stride
        check_size(video_TxYxXx3.shape, self.stride)
        # A pixel's three values move as one item, which numpy copies twice as fast as three.
        pixel = np.dtype((np.void, 3 * video_TxYxXx3.dtype.itemsize))
        pixels_TxYxX = np.ascontiguousarray(video_TxYxXx3).view(pixel)[..., 0]
        T, Y, X = 1 + (len(pixels_TxYxX) - 1) // st, pixels_TxYxX.shape[1] // sy, pixels_TxYxX.shape[2] // sx
        latents_TxYxXxs = np.empty((T, Y, X, st, sy, sx), pixel)
        cut = lambda v, st: rearrange(v, "(T st) (Y sy) (X sx) -> T Y X st sy sx", st=st, sy=sy, sx=sx)
        latents_TxYxXxs[:1], latents_TxYxXxs[1:] = cut(pixels_TxYxX[:1], 1), cut(pixels_TxYxX[1:], st)
        return latents_TxYxXxs.view(video_TxYxXx3.dtype).reshape(T, Y, X, self.channels)

    def decode(self, latents_TxYxXxC):
        """The video_TxYxXx3 of `encode`, exactly; of frame 0's copies the last is taken."""
        st, sy, sx = self.stride
        video = rearrange(latents_TxYxXxC, "T Y X (st sy sx c) -> (T st) (Y sy) (X sx) c", st=st, sy=sy, sx=sx)
        return video[st - 1 :]


def check_size(shape_TxYxXx3, stride: tuple[int, int, int]) -> None:
    """Raises ValueError unless there are 1 + st*k frames of a size that (sy, sx) divides, naming the nearest."""
    frames, height, width, _ = shape_TxYxXx3
    check_frames(frames, stride[0])
    for side, length, step in (("height", height, stride[1]), ("width", width, stride[2])):
        if length % step:
            nearest = " or ".join(str(n * step) for n in (length // step, length // step + 1) if n)
            raise ValueError(
                f"{side}={length} cannot be encoded: the codec takes multiples of {step}. Nearest: {nearest}."
            )


def check_frames(frames: int, stride: int) -> None:
    """Raises ValueError unless frames = 1 + stride*k, naming the nearest that are."""
    if frames < 1 or (frames - 1) % stride:
        below = 1 + stride * max((frames - 1) // stride, 0)
        nearest = f"{below} or {below + stride}" if frames > 0 else "1"
        raise ValueError(
            f"frames={frames} cannot be encoded: the codec covers 1 + {stride}k frames (stride {stride}). "
            f"Nearest: {nearest}."
        )


def to_float(video_uint8):
    """uint8 -> float32 in [-1, 1]; `to_uint8` gives every value back."""
    video = video_uint8.astype(np.float32)
    video *= np.float32(1 / 127.5)
    video -= np.float32(1)
    return video


def to_uint8(video_float) -> np.ndarray:
    """float in [-1, 1] -> uint8, rounded and clipped."""
    return np.clip(np.round((np.asarray(video_float, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
