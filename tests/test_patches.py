"""Cutting, laying out, choosing and packing clips: inverses, names, positions, and rows that are full."""

import itertools

import numpy as np
import pytest

from dit_video.patches import Grid, choose, lay_out, name, pack, patchify, unpack, unpatchify


def draw_clip(rng):
    """A random clip of latents, and a patch size that divides it."""
    patch, count = tuple(rng.integers(1, 4, 3).tolist()), rng.integers(1, 5, 3).tolist()
    return rng.normal(size=(*(p * n for p, n in zip(patch, count)), rng.integers(1, 5))).astype(np.float32), patch


def draw_piece(rng, clip, groups="frame"):
    T, Y, X = rng.integers(1, 4, 3) * (1, 2, 2)
    latents_TxYxXxC = rng.normal(size=(T, Y, X, 3)).astype(np.float32)
    ids_sxK = rng.integers(1, 200, (rng.integers(1, 6), 4)).astype(np.int32)
    piece, grid = lay_out(latents_TxYxXxC, np.arange(T) / 8, (1, 2, 2), (1, 1), ids_sxK, clip, groups)
    return piece, grid, latents_TxYxXxC


@pytest.mark.parametrize("seed", range(20))
def test_unpatchify_is_the_inverse_of_patchify(seed):
    latents_TxYxXxC, patch = draw_clip(np.random.default_rng(seed))
    x_nxP, grid = patchify(latents_TxYxXxC, patch)
    assert x_nxP.shape == (grid.size, np.prod(patch) * latents_TxYxXxC.shape[-1])
    np.testing.assert_array_equal(unpatchify(x_nxP, grid), latents_TxYxXxC)


def test_a_patch_holds_its_box_in_raster_order():
    rng = np.random.default_rng(0)
    latents_TxYxXxC = rng.normal(size=(4, 6, 8, 5))
    x_nxP, grid = patchify(latents_TxYxXxC, (2, 3, 4))
    for n, (t, y, x) in enumerate(itertools.product(range(2), range(2), range(2))):
        box = latents_TxYxXxC[2 * t : 2 * t + 2, 3 * y : 3 * y + 3, 4 * x : 4 * x + 4]
        np.testing.assert_array_equal(x_nxP[n], box.reshape(-1))
    assert grid.shape == (2, 2, 2)


def test_a_clip_that_the_patch_does_not_divide_is_refused_with_the_nearest_sizes():
    with pytest.raises(ValueError, match=r"height=10 latents.* patches of 4\. Nearest: 8 or 12"):
        patchify(np.zeros((2, 10, 8, 3)), (1, 4, 4))
    with pytest.raises(ValueError, match=r"frames=3 latents.* patches of 2\. Nearest: 2 or 4"):
        patchify(np.zeros((3, 8, 8, 3)), (2, 4, 4))
    with pytest.raises(ValueError, match=r"width=2 latents.* patches of 4\. Nearest: 4"):
        patchify(np.zeros((2, 8, 2, 3)), (1, 4, 4))


def test_positions_are_the_last_frame_covered_and_the_centre_in_pixels():
    """A codec of stride 8 and patches of 2 x 3 x 1 latents: each patch covers 24 x 8 pixels and 2 latent frames."""
    time_T = np.array([0.0, 0.4, 0.9, 1.5])
    latents_TxYxXxC = np.zeros((4, 6, 2, 1), np.float32)
    piece, grid = lay_out(latents_TxYxXxC, time_T, (2, 3, 1), (8, 8), np.ones((1, 4), np.int32), 7)
    expected = [(t, y, x) for t in (0.4, 1.5) for y in (12, 36) for x in (4, 12)]
    np.testing.assert_allclose(piece.pos_nx3, expected, rtol=1e-7)
    np.testing.assert_array_equal(piece.frame_n, [0] * 4 + [1] * 4)
    np.testing.assert_array_equal(piece.group_n, piece.frame_n)
    assert piece.size == (8, 1, 2)
    np.testing.assert_allclose(piece.canvas, (0.5, 48, 16))  # seconds from latent to latent, height, width


def test_a_clip_can_be_one_group():
    piece, *_ = draw_piece(np.random.default_rng(3), 1, "clip")
    assert not piece.group_n.any() and piece.size[2] == 1


def test_names_are_unique_and_spread():
    """2^16 names of 512 clips collide about as rarely as random 32-bit numbers do (0.5 pairs are expected)."""
    clips = np.random.default_rng(0).integers(0, 2**32, 512)
    names = np.concatenate([name(int(clip), np.arange(128)) for clip in clips])
    assert names.dtype == np.uint32
    assert len(names) - len(np.unique(names)) <= 4
    assert all(len(np.unique(name(clip, np.arange(2**14)))) == 2**14 for clip in (0, 1, 2**32 - 1))  # a bijection
    bits_32 = (names[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(0)
    np.testing.assert_allclose(bits_32, 0.5, atol=0.02)


def test_a_name_is_murmur3s_finaliser():
    """In Python's integers. Training noise hangs on the names: a change would break the resuming of every run."""
    for clip, index in ((0, 0), (12345, 2), (2**32 - 1, 1023)):
        h = clip ^ (index * 0x9E3779B1 + 0x7F4A7C15) % 2**32
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        assert name(clip, np.array([index]))[0] == h ^ h >> 16


@pytest.mark.parametrize("seed", range(5))
def test_unpack_is_the_inverse_of_pack(seed):
    rng = np.random.default_rng(seed)
    rows = [[draw_piece(rng, int(rng.integers(2**32))) for _ in range(k)] for k in (3, 5, 1)]
    N, G, S = 140, 15, 25
    batch, places = pack([[piece for piece, *_ in row] for row in rows], N, G, S)
    grids = [
        Grid(grid.shape, grid.patch, b, n0)
        for row, found in zip(rows, places)
        for (_, grid, _), (b, n0, _) in zip(row, found)
    ]
    for out, (_, _, latents_TxYxXxC) in zip(unpack(batch.patches.x_BxNxP, grids), itertools.chain(*rows), strict=True):
        np.testing.assert_array_equal(out, latents_TxYxXxC)


def test_what_a_row_says_of_each_clip_is_what_its_piece_said():
    rng = np.random.default_rng(1)
    rows = [[draw_piece(rng, int(rng.integers(2**32)))[0] for _ in range(k)] for k in (4, 2)]
    batch, _ = pack(rows, 64, 16, 32)
    p = batch.patches
    for b, row in enumerate(rows):
        for seg, piece in enumerate(row, 1):
            at, tokens, groups = p.seg_BxN[b] == seg, batch.prompt_BxS[b] == seg, p.seg_BxG[b] == seg
            np.testing.assert_array_equal(p.pos_BxNx3[b, at], piece.pos_nx3)
            np.testing.assert_array_equal(p.frame_BxN[b, at], piece.frame_n)
            np.testing.assert_array_equal(p.uid_BxN[b, at], piece.uid_n)
            np.testing.assert_array_equal(p.prompt_BxN[b, at], seg)
            np.testing.assert_array_equal(batch.ids_BxSxK[b, tokens], piece.ids_sxK)
            # A patch's group is one of its clip's, which no other clip has.
            np.testing.assert_array_equal(np.flatnonzero(groups)[piece.group_n], p.group_BxN[b, at])
            np.testing.assert_array_equal(p.canvas_BxGx3[b, groups], [np.float32(piece.canvas)] * piece.size[2])
            assert (p.clip_BxG[b, groups] == piece.clip).all() and groups.sum() == piece.size[2]
    padding = p.seg_BxN == 0
    assert padding.any() and not any(v[padding].any() for v in (p.x_BxNxP, p.pos_BxNx3, p.uid_BxN, p.group_BxN))
    assert not batch.ids_BxSxK[batch.prompt_BxS == 0].any() and not p.level_BxG.any()


@pytest.mark.parametrize(("limits", "what"), [((9, 9, 99), "patches"), ((99, 1, 99), "groups"), ((99, 9, 2), "text")])
def test_a_row_that_is_too_full_is_refused(limits, what):
    latents_TxYxXxC, ids_sxK = np.zeros((2, 2, 6, 3), np.float32), np.ones((3, 4), np.int32)
    piece, _ = lay_out(latents_TxYxXxC, (0, 0.5), (1, 2, 1), (1, 1), ids_sxK, 1)
    with pytest.raises(ValueError, match=rf"row 0 would hold \d+ {what}.*, and a row has \d+"):
        pack([[piece]], *limits)


def test_rows_without_any_clip_are_refused():
    with pytest.raises(ValueError, match="no piece in any of 2 rows"):
        pack([[], []], 8, 8, 8)


def draw_sizes(rng, count):
    return [tuple(int(n) for n in rng.integers(1, high)) for high in [(40, 12, 5)] * count]


@pytest.mark.parametrize("seed", range(30))
def test_choose_respects_all_limits_and_takes_the_oldest(seed):
    rng = np.random.default_rng(seed)
    sizes = draw_sizes(rng, 40)
    limits = (200, int(rng.integers(12, 80)), int(rng.integers(5, 40)))
    chosen = choose(sizes, limits)
    assert chosen[0] == 0 and chosen == sorted(set(chosen))
    assert all(used <= limit for used, limit in zip(np.sum([sizes[i] for i in chosen], 0), limits))


@pytest.mark.parametrize("seed", range(30))
def test_the_end_of_a_row_is_filled_as_well_as_any_choice_would(seed):
    """Against all subsets of what is left once the oldest have been taken, where patches alone are scarce."""
    rng = np.random.default_rng(seed)
    sizes = [(int(2 * n), 1, 1) for n in rng.integers(8, 40, 12)]
    limit = 151
    chosen = choose(sizes, (limit, 99, 99))
    taken = 0
    for oldest in range(len(sizes)):
        if taken >= 0.5 * limit or taken + sizes[oldest][0] > limit:
            break
        taken += sizes[oldest][0]
    assert chosen[:oldest] == list(range(oldest))
    rest = [size[0] for size in sizes[oldest:]]
    sums = [taken + sum(subset) for k in range(len(rest) + 1) for subset in itertools.combinations(rest, k)]
    assert sum(sizes[i][0] for i in chosen) == max(total for total in sums if total <= limit)


def test_choose_from_nothing_is_nothing():
    assert choose([], (8, 8, 8)) == []
