"""Clips as spacetime patches, and many clips packed in one row (Patch n' Pack; Dehghani et al. 2023, sec. 2).

B rows in a batch, N patches per row, G groups per row, P values per patch (pt*ph*pw*C), S text tokens per row,
K values per text token, E text width, T x Y x X a clip's grid of latents, C latent channels, n patches and s text
tokens of one clip.

Everything here but `Patches` itself is numpy: the loader packs without touching a device.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from einops import rearrange


@dataclasses.dataclass(frozen=True)
class Clip:
    """One captioned clip, as every data source gives it. Host only.

    video_TxYxXx3: uint8, T frames (1 = a picture); time_T: float32 seconds of each frame, from 0, increasing;
    caption: may be empty; uid: 32-bit name of (source, index, epoch); noise and levels in training hang on it.
    """

    video_TxYxXx3: np.ndarray
    time_T: np.ndarray
    caption: str
    uid: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches:
    """Rows of packed patches: what they hold, where they lie, and how noisy each group of them is.

    x_BxNxP: float, patch contents (latents); 0 in padding.
    pos_BxNx3: float32 (t, y, x): t in seconds, the last frame that the patch covers; y, x its centre in codec pixels.
    seg_BxN: int32, which clip of the row, from 1; 0 = padding. A clip's patches are contiguous.
    frame_BxN: int32, the index of the latent frame in its clip.
    group_BxN: int32 in [0, G), the group of the row that shares one level: a clip, a frame or a region.
    prompt_BxN: int32, which of the row's prompts the patch sees; by default its clip's segment.
    uid_BxN: uint32, the patch's name, from (clip, index in the full clip): training noise hangs on it.
    level_BxG: float32, the group's noise level: 0 = clean, 1 = pure noise.
    seg_BxG: int32, the clip of a group; 0 = no group there.
    clip_BxG: uint32, the name of the group's clip: levels and text dropout hang on it.
    canvas_BxGx3: float32, what the group's whole clip spans: seconds from a latent frame to the next (0 in a picture),
    height and width in codec pixels; None = unknown.
    block_BxN: int32, in frame-causal clips 1 + the index of the latent frame, which sees none after it, and 0 in
    bidirectional ones; None = all are bidirectional.
    """

    x_BxNxP: jax.Array
    pos_BxNx3: jax.Array
    seg_BxN: jax.Array
    frame_BxN: jax.Array
    group_BxN: jax.Array
    prompt_BxN: jax.Array
    uid_BxN: jax.Array
    level_BxG: jax.Array
    seg_BxG: jax.Array
    clip_BxG: jax.Array
    canvas_BxGx3: jax.Array | None = None
    block_BxN: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows and the prompts that they see, as the loader yields them.

    ids_BxSxK: text tokens as their encoder takes them (int32 bytes of one word each, class labels, or precomputed
    embeddings); prompt_BxS: int32, which prompt of the row a token belongs to, from 1; 0 = padding.
    """

    patches: Patches
    ids_BxSxK: jax.Array
    prompt_BxS: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cond:
    """What the patches are asked to show.

    text_BxSxE: embeddings of the row's prompts; prompt_BxS: int32, which prompt a token belongs to, 0 = padding.
    A class label, or any pooled vector, is a prompt of one token. image_BxIxE, image_prompt_BxI: likewise for
    the `image` knob.
    """

    text_BxSxE: jax.Array
    prompt_BxS: jax.Array
    image_BxIxE: jax.Array | None = None
    image_prompt_BxI: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """One clip laid out as patches, before it is packed: the fields of Patches without B, groups from 0. Host only.

    prompt_n, prompt_s: which of the clip's prompts, from 0, a patch sees and a text token is of; None = it has one.
    groups: how many there are, where the last of them may have no patch left; 0 = one after the largest of group_n.
    canvas: the clip's row of canvas_BxGx3.
    """

    x_nxP: np.ndarray
    pos_nx3: np.ndarray
    frame_n: np.ndarray
    group_n: np.ndarray
    uid_n: np.ndarray
    clip: int
    ids_sxK: np.ndarray
    prompt_n: np.ndarray | None = None
    prompt_s: np.ndarray | None = None
    groups: int = 0
    canvas: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def size(self) -> tuple[int, int, int]:
        """What the clip takes of a row: patches, text tokens, groups."""
        return len(self.x_nxP), len(self.ids_sxK), self.groups or int(self.group_n.max()) + 1


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where one clip lies in packed rows. shape: its grid in patches (T, Y, X); row, offset: its first patch."""

    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    row: int = 0
    offset: int = 0

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def patchify(latents_TxYxXxC, patch: tuple[int, int, int]):
    """Cuts a clip into patches, in raster order (t, y, x); a patch's values are ordered (pt, py, px, C).

    patch: (pt, py, px) in latents. An image is a clip of T = 1. Returns x_nxP and the Grid; `unpatchify` is the
    exact inverse. Raises ValueError where the patch does not divide the clip.
    """
    shape = latents_TxYxXxC.shape
    for name, length, step in zip(("frames", "height", "width"), shape, patch):
        if length % step or length == 0:
            raise ValueError(
                f"{name}={length} latents cannot be cut into patches of {step}. "
                f"Nearest: {max(length // step, 1) * step} or {(length // step + 1) * step}."
            )
    x_nxP = rearrange(
        latents_TxYxXxC,
        "(T pt) (Y py) (X px) C -> (T Y X) (pt py px C)",
        pt=patch[0],
        py=patch[1],
        px=patch[2],
    )
    return x_nxP, Grid(tuple(n // p for n, p in zip(shape, patch)), tuple(patch))


def unpatchify(x_nxP, grid: Grid):
    """The clip's latents_TxYxXxC from its patches: the exact inverse of `patchify`."""
    (T, Y, X), (pt, py, px) = grid.shape, grid.patch
    return rearrange(x_nxP, "(T Y X) (pt py px C) -> (T pt) (Y py) (X px) C", T=T, Y=Y, X=X, pt=pt, py=py, px=px)


def name(clip: int, index_n: np.ndarray) -> np.ndarray:
    """uint32 names of patches from their clip's name and their index in the full clip (murmur3's finaliser)."""
    h = np.uint32(clip & 0xFFFFFFFF) ^ (np.asarray(index_n, np.uint32) * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    return h ^ (h >> np.uint32(16))


def lay_out(latents_TxYxXxC, time_T, patch, stride_yx, ids_sxK, clip: int, groups: str | np.ndarray = "frame"):
    """One clip as a Piece: patches with real coordinates, frame indices, groups and names.

    time_T: seconds of the last video frame that each latent frame covers; stride_yx: codec pixels per latent.
    groups: 'frame' gives each latent frame of patches a level of its own, 'clip' one level to all; or group_n, the
    group of each patch in raster order, from 0.
    """
    x_nxP, grid = patchify(latents_TxYxXxC, patch)
    frame_n, pos_nx3 = _places(grid.shape, (patch[1] * stride_yx[0], patch[2] * stride_yx[1]))
    pos_nx3, time_T = pos_nx3.copy(), np.asarray(time_T, np.float32)
    pos_nx3[:, 0] = time_T[patch[0] - 1 :: patch[0]][frame_n]
    T, Y, X, _ = latents_TxYxXxC.shape
    if isinstance(groups, str):
        groups = frame_n if groups == "frame" else np.zeros_like(frame_n)
    piece = Piece(
        x_nxP=x_nxP,
        pos_nx3=pos_nx3,
        frame_n=frame_n,
        group_n=groups,
        uid_n=name(clip, np.arange(grid.size)),
        clip=clip,
        ids_sxK=ids_sxK,
        canvas=(float(time_T[-1] - time_T[0]) / max(T - 1, 1), Y * stride_yx[0], X * stride_yx[1]),
    )
    return piece, grid


def visible(noise_n, rate: float) -> np.ndarray:
    """Which of n patches stay where a share of them, `rate`, is left out: indices in ascending order.

    They are the int(n (1 - rate)) of least noise (random masking; He et al. 2022, sec. 3), but never none.
    """
    count = max(int(len(noise_n) * (1 - rate)), 1)
    return np.sort(np.argsort(noise_n, kind="stable")[:count])


def leave_out(piece: Piece, visible_k) -> Piece:
    """The piece with the patches visible_k alone; all else about them is as in the full clip: names, places, groups.

    A group of which no patch is left stays, so that the clip draws the levels that it would draw whole.
    """
    per_patch = ("x_nxP", "pos_nx3", "frame_n", "group_n", "uid_n", "prompt_n")
    fields = {name: getattr(piece, name) for name in per_patch}
    kept = {name: value[visible_k] for name, value in fields.items() if value is not None}
    return dataclasses.replace(piece, groups=piece.size[2], **kept)


@functools.lru_cache(maxsize=1024)
def _places(shape: tuple[int, int, int], side_yx: tuple[int, int]):
    """frame_n and pos_nx3, its times still 0, of a grid of patches of side_yx codec pixels; shared, so read-only."""
    t, y, x = np.indices(shape, np.int32).reshape(3, -1)
    pos_nx3 = np.stack([0 * t, (y + 0.5) * side_yx[0], (x + 0.5) * side_yx[1]], -1).astype(np.float32)
    t.flags.writeable = pos_nx3.flags.writeable = False
    return t, pos_nx3


def choose(sizes: Sequence[tuple[int, ...]], limits: tuple[int, ...], final: float = 0.5) -> list[int]:
    """Which of the waiting clips, oldest first, fill one row best.

    sizes: (patches, text tokens, groups) of each; limits: the row's. The oldest are taken as they come until
    one of the three is full but for its last `final` share; the rest is filled by a search over sums of patches
    (subset sum, of which a set that exceeds another limit is no part). The oldest always goes: none waits for ever.
    """
    totals, k = [(0,) * len(limits)], 0
    while k < len(sizes) and all(used < (1 - final) * limit for used, limit in zip(totals[-1], limits)):
        total = tuple(a + b for a, b in zip(totals[-1], sizes[k]))
        if any(a > b for a, b in zip(total, limits)):
            break
        totals.append(total)
        k += 1
    # For each sum of patches c, what the first set of clips found with that sum takes of the rest, and its last clip.
    room, *others = (limit - used for limit, used in zip(limits, totals[-1]))
    last_c, used_cxo = np.full(room + 1, -1), np.zeros((room + 1, len(others)), int)
    found_c = np.arange(room + 1) == 0
    for i in range(k, len(sizes)):
        n, *more = sizes[i]
        if n > room or found_c[room]:
            continue
        new_c = np.flatnonzero(found_c[: room + 1 - n] & ~found_c[n:]) + n
        new_c = new_c[(used_cxo[new_c - n] + more <= others).all(1)]
        found_c[new_c], last_c[new_c], used_cxo[new_c] = True, i, used_cxo[new_c - n] + more
    c, ending = int(np.flatnonzero(found_c)[-1]), []
    while c:
        ending.append(int(last_c[c]))
        c -= sizes[last_c[c]][0]
    return [*range(k), *reversed(ending)]


def pack(rows: Sequence[Sequence[Piece]], length: int, groups: int, text: int):
    """Packs pieces, given row by row, into one Batch of numpy arrays; returns it and where each piece lies.

    length, groups, text: N, G and S of a row. Returns (Batch, list of lists of (row, offset, patches)). Raises
    ValueError if a row's pieces exceed any of the three.
    """
    B, first = len(rows), next((p for row in rows for p in row), None)
    if first is None:
        raise ValueError(f"no piece in any of {B} rows: an empty batch has no shape.")
    P, K = first.x_nxP.shape[1], first.ids_sxK.shape[1]
    zeros = lambda *shape, dtype=np.int32: np.zeros((B, *shape), dtype)
    x_BxNxP, pos_BxNx3 = zeros(length, P, dtype=first.x_nxP.dtype), zeros(length, 3, dtype=np.float32)
    seg_BxN, frame_BxN, group_BxN, prompt_BxN = (zeros(length) for _ in range(4))
    uid_BxN = zeros(length, dtype=np.uint32)
    seg_BxG, clip_BxG, level_BxG = zeros(groups), zeros(groups, dtype=np.uint32), zeros(groups, dtype=np.float32)
    canvas_BxGx3 = zeros(groups, 3, dtype=np.float32)
    ids_BxSxK, prompt_BxS = zeros(text, K, dtype=first.ids_sxK.dtype), zeros(text)
    places = []
    for b, row in enumerate(rows):
        n0 = g0 = s0 = 0
        prompts = len(row)  # a clip's first prompt has its segment's number, any further ones follow after all of these
        places.append([])
        for seg, piece in enumerate(row, start=1):
            n, s, g = piece.size
            for what, end, limit in (
                ("patches", n0 + n, length),
                ("text tokens", s0 + s, text),
                ("groups", g0 + g, groups),
            ):
                if end > limit:
                    raise ValueError(f"row {b} would hold {end} {what}, and a row has {limit}.")
            at = slice(n0, n0 + n)
            x_BxNxP[b, at], pos_BxNx3[b, at], seg_BxN[b, at] = piece.x_nxP, piece.pos_nx3, seg
            frame_BxN[b, at], group_BxN[b, at], uid_BxN[b, at] = piece.frame_n, piece.group_n + g0, piece.uid_n
            of_clip = slice(g0, g0 + g)
            seg_BxG[b, of_clip], clip_BxG[b, of_clip] = seg, np.uint32(piece.clip & 0xFFFFFFFF)
            canvas_BxGx3[b, of_clip] = piece.canvas
            ids_BxSxK[b, s0 : s0 + s], prompt_BxS[b, s0 : s0 + s], prompt_BxN[b, at] = piece.ids_sxK, seg, seg
            if piece.prompt_n is not None:
                more = int(piece.prompt_s.max())
                number = np.array([seg, *range(prompts + 1, prompts + more + 1)])
                prompt_BxS[b, s0 : s0 + s], prompt_BxN[b, at] = number[piece.prompt_s], number[piece.prompt_n]
                prompts += more
            places[-1].append((b, n0, n))
            n0, g0, s0 = n0 + n, g0 + g, s0 + s
    patches = Patches(
        x_BxNxP,
        pos_BxNx3,
        seg_BxN,
        frame_BxN,
        group_BxN,
        prompt_BxN,
        uid_BxN,
        level_BxG,
        seg_BxG,
        clip_BxG,
        canvas_BxGx3,
    )
    return Batch(patches, ids_BxSxK, prompt_BxS), places


def unpack(x_BxNxP, grids: Sequence[Grid]) -> list:
    """Each clip's latents_TxYxXxC out of packed rows, by where its Grid says that it lies."""
    return [unpatchify(x_BxNxP[g.row, g.offset : g.offset + g.size], g) for g in grids]
