"""Patches left out before packing: MAE's own choice, else the same clip, whole clips at the end, exact resuming.

n patches of a clip, k of them visible, B rows, N patches per row, G groups per row.
"""

import json

import jax
import numpy as np
import pytest
from test_loader import Numbered, assert_same, draw, open_loader, plan, small_config  # noqa: F401 (a fixture)
from test_trainer import tiny

from configs import base
from dit_video.codecs import make_codec, to_float
from dit_video.data.loader import Shard, fill, make_loader, next_row, take, wait
from dit_video.data.shapes import ShapesSource
from dit_video.flow import draw_levels, patch_noise, per_patch
from dit_video.patches import lay_out, leave_out, pack, visible
from dit_video.step import make_run
from dit_video.text import words

CODEC = make_codec(base.get_config().codec)
EVER = 10**9  # rows: no phase of whole clips is reached


def pieces_of(plan, rows, shard=0):
    """The pieces of a shard's first rows."""
    state = Shard(shard, 0, [], 0)
    return [next_row(plan, state) for _ in range(rows)]


def whole_pieces(plan, shard, clips):
    """{name: the piece of the whole clip} of the first clips of a shard's order."""
    found = {}
    for place in range(clips):
        w = wait(plan, shard, place)
        clip = plan.source[w.index]
        latents_TxYxXxC = plan.codec.encode(to_float(clip.video_TxYxXx3))
        found[clip.uid], _ = lay_out(latents_TxYxXxC, clip.time_T[::4], (1, 8, 8), (1, 1), w.ids_sxK, clip.uid)
    return found


# Which patches


@pytest.mark.parametrize("name", ["rawpix", "normpix"])
def test_the_same_noise_keeps_what_the_reference_of_mae_keeps(name, golden):
    with np.load(golden / "mae" / f"mae_tiny_{name}_io.npz") as io:
        rate = float(io["mask_ratio"])
        for noise_n, keep_k, removed_n in zip(io["noise"], io["ids_keep"], io["mask"]):
            np.testing.assert_array_equal(visible(noise_n, rate), np.sort(keep_k))
            np.testing.assert_array_equal(visible(noise_n, rate), np.flatnonzero(removed_n == 0))


@pytest.mark.parametrize(("n", "rate", "count"), [(64, 0.75, 16), (9, 0.5, 4), (10, 0.9, 1), (7, 0.0, 7), (3, 0.99, 1)])
def test_how_many_patches_stay(n, rate, count):
    """int(n (1 - rate)), as MAE counts (He et al. 2022), but never none."""
    noise_n = np.random.default_rng(n).random(n)
    found_k = visible(noise_n, rate)
    assert len(found_k) == count and (np.diff(found_k) > 0).all()
    assert set(noise_n[found_k]) == set(np.sort(noise_n)[:count])


@pytest.mark.parametrize("drop", [(0.5, 0.5), (0.25, 0.75)])
def test_rates_are_constant_or_drawn_for_each_clip_and_epoch(drop):
    made = plan(Numbered(60), drop=drop, dropping=EVER)
    first, second = ([wait(made, 0, place) for place in range(epoch * 30, epoch * 30 + 30)] for epoch in (0, 1))
    left = [len(w.visible_k) / w.size[0] for w in first if w.size[0] >= 16]
    if drop[0] == drop[1]:
        assert all(len(w.visible_k) == max(int(w.size[0] / 2), 1) for w in first)
    else:
        assert min(left) >= 0.25 - 1 / 16 and max(left) <= 0.75 and np.std(left) > 0.08
    # The same clip in another epoch shows other patches.
    both = [(a, b) for a in first for b in second if a.index == b.index and a.size == b.size and a.size[0] > 16]
    assert all(not np.array_equal(a.visible_k, b.visible_k) for a, b in both)
    again = wait(made, 0, 0)
    np.testing.assert_array_equal(again.visible_k, first[0].visible_k)


# What stays is as in the whole clip


def test_visible_patches_are_those_of_the_whole_clip():
    """Contents, coordinates, frames, groups and names, so that their noise is the same; and the prompt is whole."""
    made = plan(ShapesSource(), shards=1, drop=(0.5, 0.5), dropping=EVER)
    whole = whole_pieces(made, 0, 64)
    rows = pieces_of(made, 2)
    for piece in (piece for row in rows for piece in row):
        full = whole[piece.clip]
        at_k = np.flatnonzero(np.isin(full.uid_n, piece.uid_n))
        assert len(piece.x_nxP) == len(at_k) == int(len(full.x_nxP) / 2)
        for field in ("x_nxP", "pos_nx3", "frame_n", "group_n", "uid_n"):
            np.testing.assert_array_equal(getattr(piece, field), getattr(full, field)[at_k], field)
        np.testing.assert_array_equal(piece.ids_sxK, full.ids_sxK)
        assert piece.size[2] == full.size[2]


def test_levels_and_noise_of_what_stays_are_those_of_the_whole_clip():
    """Frames of which nothing is left count as before, so a clip draws the same levels, and each patch the same noise.

    Not for a box, whose place is drawn within the patches that are there.
    """
    made = plan(ShapesSource(), shards=1)
    whole = list(whole_pieces(made, 0, 24).values())
    noise = lambda piece: np.random.default_rng(piece.clip).random(len(piece.x_nxP))
    some = [leave_out(piece, visible(noise(piece), 0.97)) for piece in whole]
    without_their_last_frame = sum(int(piece.group_n.max()) + 1 < piece.size[2] for piece in some)
    assert without_their_last_frame > 3
    config = base.get_config()
    config.flow.mixture.update(base.EVERY_TASK | {"box": 0.0, "suffix": 0.4, "forcing": 0.3})
    found = []
    for pieces in (whole, some):
        batch, _ = pack([pieces], 2048, 96, 512)
        patches, weight_BxG = draw_levels(jax.random.key(3), batch.patches, config.flow)
        noise_BxNxP = patch_noise(jax.random.key(4), patches.uid_BxN, 2)
        values = per_patch(patches.level_BxG, patches), per_patch(weight_BxG, patches), noise_BxNxP
        values = zip(*(np.asarray(a[0]) for a in values))
        real = np.asarray(patches.seg_BxN[0]) > 0
        found.append({int(u): v for u, v, r in zip(np.asarray(patches.uid_BxN[0]), values, real) if r})
    assert 24 <= len(found[1]) < 0.1 * len(found[0])
    for uid, values in found[1].items():
        for a, b in zip(values, found[0][uid]):
            np.testing.assert_array_equal(a, b)


def test_rows_of_what_is_visible_train():
    """Clips of which frames are gone, in every mixture: loss and gradient are finite, and all parameters learn."""
    config = tiny({"model.depth": 1, "data.drop": (0.9, 0.95), "data.groups": 48})
    config.data.text_length, config.data.waiting = 256, 32
    config.flow.mixture.update(base.EVERY_TASK)
    run = make_run(config)
    loader = make_loader(config, run.text.tokenise, run.codec)
    batch = next(loader)
    loader.close()
    assert fill(batch)["clips"] >= 20
    rng, shapes = np.random.default_rng(0), jax.eval_shape(run.init, jax.random.key(0)).params
    params = jax.tree.map(lambda a: 0.1 * rng.standard_normal(a.shape, np.float32), shapes)
    gradient, sums = jax.jit(run.sums)(params, batch, jax.random.key(1))
    assert np.isfinite(sums["loss"]) and 0 < sums["weight"] <= fill(batch)["patches"]
    assert all(np.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(gradient))


# Rows


def test_only_what_is_visible_is_packed():
    """At half dropped, the same rows hold twice the clips: over 300 rows at least 1.9 times, filled as before."""
    limits = {0.0: (256, 80, 32), 0.5: (256, 160, 64)}
    clips, filled = {}, {}
    for rate, limit in limits.items():
        made = plan(ShapesSource(), shards=1, waiting=128, limits=limit, drop=(rate, rate), dropping=EVER)
        state, rows = Shard(0, 0, [], 0), []
        for _ in range(300):
            rows.append(take(made, state))
        clips[rate] = sum(map(len, rows))
        filled[rate] = sum(w.visible_size[0] for row in rows for w in row) / (300 * 256)
    assert clips[0.5] >= 1.9 * clips[0.0]
    assert filled[0.5] >= 0.97


def test_the_default_leaves_nothing_out(open_loader):  # noqa: F811
    assert tuple(base.get_config().data.drop) == (0.0, 0.0)
    loader = open_loader(small_config(shards=1, rows=1), words.tokenise, CODEC)
    assert loader._plan.dropping == 0
    none, never = (open_loader(plan(Numbered(50), **changes), (0, 1)) for changes in ({}, {"dropping": EVER}))
    assert_same(draw(none, 3), draw(never, 3))


# The last share of the steps


def drop_config(**changes):
    config = small_config(shards=2, rows=4, drop=(0.5, 0.75), whole=0.25)
    config.update(dict(steps=8))
    config.data.update(changes)
    config.data.text_length, config.data.groups = 512, 64
    return config


def test_the_last_share_of_the_steps_keeps_all_patches(open_loader):  # noqa: F811
    """Steps 7 and 8 of 8, exactly, in every row of every shard; no clip is lost or met twice on the way."""
    loader = open_loader(drop_config(), words.tokenise, CODEC)
    sizes = {}
    for v in range(2):
        for place in range(200):
            w = wait(loader._plan, v, place)
            sizes[loader._plan.source[w.index].uid] = w
    seen = []
    for step in range(1, 9):
        p = next(loader).patches
        for b in range(len(p.seg_BxN)):
            for seg in range(1, p.seg_BxN[b].max() + 1):
                uid = int(p.clip_BxG[b][p.seg_BxG[b] == seg][0])
                w, count = sizes[uid], int((p.seg_BxN[b] == seg).sum())
                assert count == (w.size[0] if step > 6 else len(w.visible_k)), (step, uid)
                seen.append(uid)
    assert len(seen) == len(set(seen)) > 60
    assert all(s["row"] == 16 for s in loader.get_state().values())


def test_validation_shows_whole_clips(open_loader):  # noqa: F811
    loader = open_loader(drop_config(), words.tokenise, CODEC, split="validation")
    assert loader._plan.dropping == 0


@pytest.mark.parametrize("taken", [3, 5, 7])
def test_a_restored_state_goes_on_bit_for_bit_over_the_end_of_dropping(taken, open_loader):  # noqa: F811
    config = drop_config()
    loader = open_loader(config, words.tokenise, CODEC)
    draw(loader, taken)
    state, ahead = json.dumps(loader.get_state()), draw(loader, 8 - taken)
    again = open_loader(config, words.tokenise, CODEC)
    again.set_state(json.loads(state))
    assert_same(draw(again, 8 - taken), ahead)
    parts = [open_loader(config, words.tokenise, CODEC, process_index=i, process_count=2) for i in range(2)]
    for part in parts:
        part.set_state(json.loads(state))
    for batch in ahead:
        assert_same(batch, jax.tree.map(lambda *x: np.concatenate(x), *[next(part) for part in parts]))


def test_a_state_from_before_rows_were_counted_goes_on(open_loader):  # noqa: F811
    made = plan(Numbered(50))
    loader = open_loader(made, (0, 1))
    draw(loader, 2)
    state = {v: {k: x for k, x in s.items() if k != "row"} for v, s in loader.get_state().items()}
    again = open_loader(made, (0, 1))
    again.set_state(state)
    assert_same(next(again), next(loader))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            dict(drop=(0.5, 1.0)),
            r"data.drop=\(0.5, 1.0\): give the least and the most share, in order, from 0 to below",
        ),
        (dict(drop=(0.6, 0.5)), r"data.drop=\(0.6, 0.5\): .* in order"),
        (dict(whole=1.5), "data.whole=1.5 is a share: give 0 to 1"),
    ],
)
def test_what_is_no_share_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        make_loader(small_config(**data), words.tokenise, CODEC)
