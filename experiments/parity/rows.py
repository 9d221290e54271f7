"""Reference arrays laid out as our clips are, in packed rows, and out of them.

B clips in the arrays, N patches per row, C channels; a clip is F x C x Y x X in the arrays.
"""

import dataclasses

import numpy as np

from dit_video import patches as pt


def rows_of(x_BxTxYxXxC, text_of, times_T, per_row: int, padding: int = 5):
    """Packs the clips, `per_row` to a row with padding at its end; each is a group. Returns Batch and Grids."""
    laid = [
        pt.lay_out(x, times_T, (1, 2, 2), (8, 8), text_of(b), clip=b, groups="clip") for b, x in enumerate(x_BxTxYxXxC)
    ]
    pieces = [piece for piece, _ in laid]
    n, s, _ = pieces[0].size
    rows = [pieces[i : i + per_row] for i in range(0, len(pieces), per_row)]
    batch, places = pt.pack(rows, per_row * n + padding, per_row + 1, per_row * s + padding)
    at = [place for row in places for place in row]
    return batch, [dataclasses.replace(g, row=row, offset=offset) for (_, g), (row, offset, _) in zip(laid, at)]


def levels(t, shape) -> np.ndarray:
    """Levels such that level * 1000 is the reference's timestep to the bit; groups beyond the clips get 0."""
    level = np.asarray(t, np.float32) / np.float32(1000)
    np.testing.assert_array_equal(level * np.float32(1000), np.asarray(t, np.float32))
    return per_clip(level, shape)


def per_clip(value, shape) -> np.ndarray:
    """Each clip's value at its group, BxG of `shape`; 0 beyond the clips."""
    value = np.asarray(value, np.float32).ravel()
    per_row = -(-value.size // shape[0])
    value = np.pad(value, (0, shape[0] * per_row - value.size)).reshape(shape[0], per_row)
    return np.pad(value, ((0, 0), (0, shape[1] - per_row)))


def frames(x_BxNxP, grids) -> np.ndarray:
    """The clips out of packed rows, as the arrays have them: B x F x C x Y x X."""
    return np.stack([np.moveaxis(np.asarray(clip), -1, 1) for clip in pt.unpack(x_BxNxP, grids)])
