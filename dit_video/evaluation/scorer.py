"""Reads colours, shapes and motions of the embedded world back from pixels alone, of drawn and of generated clips.

T frames, Y x X the canvas in pixels, C colours, P coordinates in a list. Positions are (y, x) in pixels, y down; pixel
(0, 0) covers [0, 1] x [0, 1]. Time is in seconds.
"""

import dataclasses

import numpy as np

from dit_video.data.shapes import (
    AMPLITUDE,
    COLOURS,
    ORBITS,
    PERIOD,
    RADIUS,
    SHAPES,
    Label,
    cover_and_shade,
    depth_inside,
)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the scorer saw of one object: its label, and where it was, centre_Tx2 in pixels (nan: not seen).

    shape and motion are "none" where nothing fits; motion is None in a picture.
    """

    label: Label
    centre_Tx2: np.ndarray


def _chroma(rgb):
    """Colour less its brightness: what mixing with grey shrinks and does not turn."""
    rgb = np.asarray(rgb, np.float32) / 255
    return rgb - rgb.mean(-1, keepdims=True)


_CHROMA_Cx3 = _chroma(list(COLOURS.values()))
_DIRECTION_Cx3 = _CHROMA_Cx3 / np.linalg.norm(_CHROMA_Cx3, axis=1, keepdims=True)
_STRONG = 0.35  # the share of colour in a pixel that counts as the object's rather than as a ghost or as noise
_LEAST_AREA, _MOST_AREA = 0.8, 6.0  # of an object, in squared radii of the pair's and of the single's rule
_LEAST_LIKENESS = 0.8  # correlation with the best template; less is no shape


def score(video_TxYxXx3, time_T):
    """Reads colours, shapes and motions from pixels alone: a tuple of at most 2 Readings, the largest first.

    video_TxYxXx3: uint8; time_T: seconds. It bears blur, noise of 8 / 255 per channel and faint ghosts. Without a
    saturated region as large as an object there is no reading.
    """
    time_T = np.asarray(time_T, np.float64)
    frames, height, width, _ = video_TxYxXx3.shape
    chroma_TxYxXx3 = _chroma(video_TxYxXx3)
    chroma_TxYxXx3 = chroma_TxYxXx3 - np.median(chroma_TxYxXx3, axis=(0, 1, 2))  # the background's tint
    along_TxYxXxC = chroma_TxYxXx3 @ _DIRECTION_Cx3.T
    nearest_TxYxX = along_TxYxXxC.argmax(-1)
    # A mixture of a colour and grey holds the colour in this share.
    share_TxYxXxC = np.clip(along_TxYxXxC / np.linalg.norm(_CHROMA_Cx3, axis=1), 0, 1)
    own_TxYxX = np.take_along_axis(share_TxYxXxC, nearest_TxYxX[..., None], -1)[..., 0]
    own_TxYxX = np.where(own_TxYxX > _STRONG, own_TxYxX, 0)
    area_C = np.bincount(nearest_TxYxX.ravel(), own_TxYxX.ravel(), len(COLOURS)) / frames

    short = min(height, width)
    least, most = _LEAST_AREA * (RADIUS[2] * short) ** 2, _MOST_AREA * (RADIUS[1] * short) ** 2
    found = [c for c in np.argsort(-area_C)[:2] if max(least, 0.3 * area_C.max()) < area_C[c] < most]
    # Noise has all colours: what is in neither of the two is no world of at most two objects.
    if not found or area_C[found].sum() < 0.6 * area_C.sum():
        return ()
    nearest_TxYxX = np.array(found)[along_TxYxXxC[..., found].argmax(-1)]
    readings = []
    for c in found:
        share_TxYxX = np.where(nearest_TxYxX == c, share_TxYxXxC[..., c], 0)
        share_TxYxX, centre_Tx2 = _locate(share_TxYxX, RADIUS[len(found)] * short, least)
        motion = _read_motion(centre_Tx2, time_T, AMPLITUDE[len(found)] * short) if frames > 1 else None
        label = Label(_read_shape(share_TxYxX, centre_Tx2), tuple(COLOURS)[c], motion)
        readings.append(Reading(label, centre_Tx2))
    return tuple(readings)


def _locate(share_TxYxX, radius, least):
    """The object in each frame: its pixels' share_TxYxX (0 elsewhere) and its centre_Tx2.

    nan where its area is below `least` or where much of its colour is elsewhere, as in a clip with two of it.
    """
    _, height, width = share_TxYxX.shape
    y_Y, x_X = np.arange(height) + 0.5, np.arange(width) + 0.5
    # A sum over boxes finds the object among ghosts and specks; its centre of mass then moves the box onto it.
    strong_TxYxX = np.where(share_TxYxX > _STRONG, share_TxYxX, 0)
    near_YxY, near_XxX = np.abs(y_Y[:, None] - y_Y) < radius, np.abs(x_X[:, None] - x_X) < radius
    sum_TxYxX = near_YxY.astype(np.float32) @ strong_TxYxX @ near_XxX.astype(np.float32)
    peak_T = sum_TxYxX.reshape(len(sum_TxYxX), -1).argmax(1)
    centre_Tx2 = np.stack([y_Y[peak_T // width], x_X[peak_T % width]], 1)
    weak_TxYxX = np.where(share_TxYxX > 0.12, share_TxYxX, 0)  # above the noise: the soft edge that centres need
    for _ in range(3):
        far_TxY, far_TxX = np.abs(y_Y - centre_Tx2[:, :1]), np.abs(x_X - centre_Tx2[:, 1:])
        near_TxYxX = (far_TxY < 1.7 * radius)[:, :, None] & (far_TxX < 1.7 * radius)[:, None]
        mass_TxYxX = weak_TxYxX * near_TxYxX
        area_T = np.maximum(mass_TxYxX.sum((1, 2)), 1e-6)
        centre_Tx2 = np.stack([mass_TxYxX.sum(2) @ y_Y, mass_TxYxX.sum(1) @ x_X], 1) / area_T[:, None]
    alone_T = (strong_TxYxX * near_TxYxX).sum((1, 2)) > 0.65 * strong_TxYxX.sum((1, 2))
    return mass_TxYxX, np.where(((area_T > least) & alone_T)[:, None], centre_Tx2, np.nan)


def _read_shape(share_TxYxX, centre_Tx2):
    """The shape whose template, of the same area at the same centres, correlates best over all frames; or "none"."""
    seen_T = np.isfinite(centre_Tx2[:, 0])
    if not seen_T.any():
        return "none"
    share_TxYxX, centre_Tx2 = share_TxYxX[seen_T], centre_Tx2[seen_T]
    _, height, width = share_TxYxX.shape
    size = np.sqrt(share_TxYxX.sum((1, 2)).mean())
    likeness = {}
    for shape in SHAPES:
        radius = size / _AREA_ROOT[shape]
        depth_TxYxX = depth_inside(shape, centre_Tx2, radius, height, width)
        cover_TxYxX, shade_TxYxX = cover_and_shade(depth_TxYxX, radius)
        likeness[shape] = np.corrcoef((cover_TxYxX * shade_TxYxX).ravel(), share_TxYxX.ravel())[0, 1]
    best = max(likeness, key=likeness.get)
    return best if likeness[best] > _LEAST_LIKENESS else "none"


def _area_root(shape):
    depth_1xYxX = depth_inside(shape, np.array([[64.0, 64.0]]), 32, 128, 128)
    return float(np.sqrt(np.prod(cover_and_shade(depth_1xYxX, 32), axis=0).sum()) / 32)


_AREA_ROOT = {shape: _area_root(shape) for shape in SHAPES}  # of a shape of radius 1, its rim counted by its shade


def _read_motion(centre_Tx2, time_T, amplitude):
    """The motion whose orbit fits best (least squares over centre, amplitude and phase); "none" where none fits."""
    seen_T = np.isfinite(centre_Tx2[:, 0])
    if seen_T.sum() < max(4, 0.6 * len(time_T)):
        return "none"
    angle_T = 2 * np.pi * time_T[seen_T] / PERIOD
    cos_sin_Tx2 = np.stack([np.cos(angle_T), np.sin(angle_T)], 1)
    later_Tx2 = np.stack([-np.sin(angle_T), np.cos(angle_T)], 1)  # a quarter period on
    target_P = centre_Tx2[seen_T].ravel()
    shift_Px2 = np.tile(np.eye(2), (len(angle_T), 1))
    best, best_error = "none", 0.3 * amplitude
    for motion, orbit_2x2 in ORBITS.items():
        waves_Px2 = np.stack([(x @ np.transpose(orbit_2x2)).ravel() for x in (cos_sin_Tx2, later_Tx2)], 1)
        design_Px4 = np.concatenate([shift_Px2, waves_Px2], 1)
        fit_4 = np.linalg.lstsq(design_Px4, target_P, rcond=None)[0]
        error = np.sqrt(2 * np.mean((design_Px4 @ fit_4 - target_P) ** 2))
        if error < best_error and 0.4 < np.hypot(*fit_4[2:]) / amplitude < 2:
            best, best_error = motion, error
    return best
