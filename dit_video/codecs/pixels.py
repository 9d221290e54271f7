"""The lossless pixel codec: a causal rearrangement of 1 + st*k frames into 1 + k latent frames.

T x Y x X a clip's grid, C = st*sy*sx*3 latent channels. numpy in, numpy out; jax in, jax out.
"""

import dataclasses

import numpy as np
from einops import rearrange, repeat


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
        check_frames(video_TxYxXx3.shape[0], st)
        for side, length, step in (("height", video_TxYxXx3.shape[1], sy), ("width", video_TxYxXx3.shape[2], sx)):
            if length % step:
                raise ValueError(f"{side}={length} cannot be encoded: the codec takes multiples of {step}.")
        first, rest = video_TxYxXx3[:1], video_TxYxXx3[1:]
        cut = lambda v: rearrange(v, "(T st) (Y sy) (X sx) c -> T Y X (st sy sx c)", st=st, sy=sy, sx=sx)
        parts = [cut(repeat(first, "1 Y X c -> st Y X c", st=st))] + ([cut(rest)] if rest.shape[0] else [])
        return parts[0] if len(parts) == 1 else _namespace(first).concatenate(parts)

    def decode(self, latents_TxYxXxC):
        """The video_TxYxXx3 of `encode`, exactly; of frame 0's copies the last is taken."""
        st, sy, sx = self.stride
        video = rearrange(latents_TxYxXxC, "T Y X (st sy sx c) -> (T st) (Y sy) (X sx) c", st=st, sy=sy, sx=sx)
        return video[st - 1 :]


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
    return video_uint8.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)


def to_uint8(video_float) -> np.ndarray:
    """float in [-1, 1] -> uint8, rounded and clipped."""
    return np.clip(np.round((np.asarray(video_float, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def _namespace(array):
    return array.__array_namespace__()
