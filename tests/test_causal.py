"""The frame-causal mode: a cache of the clean past gives what one full forward under the windowed mask gives.

B rows, N patches per row, G groups per row, P values per patch, T latent frames of a clip, n patches of one clip.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from dit_video import Request, generate
from dit_video import patches as pt
from dit_video.flow import draw_levels
from dit_video.model import empty_cache, make_model, make_velocity
from dit_video.sampling import guided, uniform_levels
from dit_video.sampling import sample as integrate
from dit_video.step import make_run

P, E, PATCH, STRIDE, W, T = 8, 10, (1, 2, 2), (8, 8), 3, 8
SIZES = {0: (2, 2), 1: (1, 3), 2: (3, 2)}  # of the clips' frames, in patches; all have T of them
ROWS = [[0, 1], [2]]
LEVEL_T = np.random.default_rng(9).uniform(0.3, 1, T).astype(np.float32)
CLEAN_T = np.zeros(T, np.float32)


def config_of(kind="default", window=W):
    config = base.get_config()
    config.model.update({"width": 48, "depth": 2, "heads": 2, "mlp_width": 96, "window": window, "patch": PATCH})
    config.model.text_pool, config.text.width = True, E
    if kind == "latte":  # every knob turned the other way
        config.model.update({"attention_pattern": ("space", "time"), "modulation": "block", "position": "table"})
        config.model.update({"text": "pooled", "qk_norm": "none", "text_pool": False})
        config.text.width = 48
    return config


@functools.cache
def face(kind, window):
    """(model, random params, jitted velocity) of a kind."""
    config = config_of(kind, window)
    model = make_model(config, P // 4)
    patches, cond = lay(range(T), LEVEL_T, config.text.width)
    params = random_params(jax.eval_shape(model.init, jax.random.key(0), patches, cond)["params"])
    return model, params, jax.jit(make_velocity(model, config))


def random_params(shapes):
    """Every parameter random, those that start at zero too: closed gates would hide what the layers do."""
    rng = np.random.default_rng(0)

    def draw(path, w):
        name = path[-1].key
        if len(w.shape) > 1 and not name.endswith(("_bias", "_norm", "_gain", "_table")):
            return rng.normal(size=w.shape).astype(np.float32) * (
                1 if name == "embedding" else 1 / math.sqrt(w.shape[-2])
            )
        return (name.endswith(("norm", "gain")) + 0.1 * rng.normal(size=w.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def piece(clip, level_T, text_width):
    """Clip `clip` at a level for each frame, its values, noise and prompt drawn from its number."""
    rng, (Y, X) = np.random.default_rng(clip), SIZES[clip]
    clean, noise = rng.normal(size=(2, T, 2 * Y, 2 * X, P // 4)).astype(np.float32)
    text = rng.normal(size=(1 + clip, text_width)).astype(np.float32)
    s = level_T[:, None, None, None]
    return pt.lay_out((1 - s) * clean + s * noise, np.arange(T) / 4, PATCH, STRIDE, text, clip)[0]


def lay(frames, level_T, text_width, causal=(0, 1, 2)):
    """Patches and Cond of ROWS, of each clip these frames alone; padding follows."""
    first = frames[0]

    def cut(whole):
        mine_n = (whole.frame_n >= first) & (whole.frame_n <= frames[-1])
        of = lambda name: getattr(whole, name)[mine_n]
        values = {name: of(name) for name in ("x_nxP", "pos_nx3", "frame_n", "uid_n")}
        return dataclasses.replace(whole, **values, group_n=of("group_n") - first)

    rows = [[cut(piece(clip, level_T, text_width)) for clip in row] for row in ROWS]
    batch, _ = pt.pack(rows, 8 * len(frames), 3 * len(frames), 8)
    p, level_BxG = batch.patches, np.zeros(batch.patches.seg_BxG.shape, np.float32)
    for b in range(len(ROWS)):
        real_N = p.seg_BxN[b] > 0
        level_BxG[b, p.group_BxN[b, real_N]] = level_T[p.frame_BxN[b, real_N]]
    clip_BxN = np.array([[*row, -1, -1][:2] for row in ROWS])[np.arange(len(ROWS))[:, None], p.seg_BxN - 1]
    block_BxN = np.where((p.seg_BxN > 0) & np.isin(clip_BxN, causal), p.frame_BxN + 1, 0)
    patches = dataclasses.replace(p, level_BxG=level_BxG, block_BxN=block_BxN)
    return patches, pt.Cond(batch.ids_BxSxK, batch.prompt_BxS)


def real(v_BxNxP, patches, frames):
    """The values of the real patches of these frames, in the order that they are packed in."""
    return np.asarray(v_BxNxP)[(patches.seg_BxN > 0) & np.isin(patches.frame_BxN, frames)]


def greatest_difference(kind, chunk, full_window=W, cached_window=W):
    """Of the velocities of each `chunk` new frames, by the cache, from those of one full forward over all frames.

    In the full forward the frames before the new ones are at level 0, the new ones and all after them are not.
    """
    _, params, full = face(kind, full_window)
    model, _, cached = face(kind, cached_window)
    text_width = config_of(kind).text.width
    cache, found = empty_cache(model, len(ROWS), 8 * chunk, chunk), []
    shapes = jax.tree.map(jnp.shape, cache)
    for t in range(0, T, chunk):
        frames = list(range(t, t + chunk))
        now_T = np.where(np.arange(T) < t, CLEAN_T, LEVEL_T)
        whole, cond = lay(range(T), now_T, text_width)
        wanted = real(full(params, whole, cond)[0], whole, frames)
        new, _ = lay(frames, LEVEL_T, text_width)
        v_BxNxP, _ = cached(params, new, cond, cache)
        found.append(np.abs(real(v_BxNxP, new, frames) - wanted).max())
        assert np.abs(wanted).max() > 1
        clean, _ = lay(frames, CLEAN_T, text_width)
        _, cache = cached(params, clean, cond, cache)
        assert jax.tree.map(jnp.shape, cache) == shapes
    return max(found)


@pytest.mark.parametrize(("kind", "chunk"), [("default", 1), ("default", 2), ("latte", 1)])
def test_the_cache_gives_what_a_full_forward_gives(kind, chunk):
    """Rows of several clips, over more frames than all layers' windows reach back: to 1e-5."""
    assert T > 1 + 2 * (W - 1)
    assert greatest_difference(kind, chunk) < 1e-5


@pytest.mark.parametrize("wrong", [W - 1, W + 1])
def test_a_window_off_by_one_is_seen(wrong):
    """So the agreement above is no accident of a past that weighs nothing."""
    assert greatest_difference("default", 1, cached_window=wrong) > 1e-2


def test_a_cache_needs_a_window():
    with pytest.raises(ValueError, match="model.window=None has no end"):
        empty_cache(dataclasses.replace(face("default", W)[0], window=None), 1, 8)


def test_a_changed_frame_changes_what_may_see_it_and_nothing_else():
    """Bit for bit: no earlier frame, and of a causal clip those alone that the layers' windows reach."""
    _, params, velocity = face("default", W)
    at, reach = 2, 2 * (W - 1)
    patches, cond = lay(range(T), LEVEL_T, E, causal=(0, 2))
    row_0_clip_1 = np.array([[1], [0]]) * (patches.seg_BxN == 2)  # bidirectional
    changed_BxN = (patches.frame_BxN == at) & (patches.seg_BxN > 0)
    other = dataclasses.replace(patches, x_BxNxP=np.where(changed_BxN[..., None], 2.0, patches.x_BxNxP))
    before, after = (np.asarray(velocity(params, p, cond)[0]) for p in (patches, other))
    differs_BxN = (before != after).any(-1)
    seen_BxN = (patches.frame_BxN >= at) & (patches.frame_BxN <= at + reach) | (row_0_clip_1 == 1)
    np.testing.assert_array_equal(differs_BxN, seen_BxN & (patches.seg_BxN > 0))


def test_without_a_causal_clip_nothing_changes():
    """Blocks of 0 under a window are, bit for bit, no blocks and no window."""
    _, params, windowed = face("default", W)
    model, _, plain = face("default", 0)
    assert model.window is None
    patches, cond = lay(range(T), LEVEL_T, E, causal=())
    assert not patches.block_BxN.any()
    wanted, none = plain(params, dataclasses.replace(patches, block_BxN=None), cond)
    assert none is None
    np.testing.assert_array_equal(windowed(params, patches, cond)[0], wanted)


def test_a_causal_clip_looks_the_same_at_any_time():
    """A long video's frames lie at times that no clip trained at; bidirectional clips are told their times."""
    _, params, velocity = face("default", W)
    for causal, same in (((0, 1, 2), True), ((), False)):
        patches, cond = lay(range(T), LEVEL_T, E, causal)
        later = dataclasses.replace(patches, pos_BxNx3=patches.pos_BxNx3 + np.float32([16, 0, 0]))
        apart = np.abs(velocity(params, later, cond)[0] - velocity(params, patches, cond)[0])
        assert (apart[patches.seg_BxN > 0].max() < 1e-3) == same


# Training


def draw(share, rows, lengths, **mixture):
    """Patches drawn for clips of the given numbers of frames, packed in rows of clip numbers, and weight_BxG."""
    config = base.get_config().flow
    config.causal_share = share
    config.mixture.update(mixture)
    clip = lambda c: pt.lay_out(
        np.zeros((lengths[c], 1, 1, 4), np.float32), np.arange(lengths[c]), (1, 1, 1), (1, 1), np.zeros((1, 1), int), c
    )[0]
    batch, _ = pt.pack([[clip(c) for c in row] for row in rows], 64, 64, 64)
    patches, weight_BxG = jax.jit(lambda p: draw_levels(jax.random.key(3), p, config))(batch.patches)
    return jax.tree.map(np.asarray, (patches, weight_BxG))


def by_clip(patches, weight_BxG, rows):
    """{clip: (level_T, weight_T, block_T)}; a clip's frames are of one patch."""
    found = {}
    for b, row in enumerate(rows):
        for seg, clip in enumerate(row, 1):
            n, g = patches.seg_BxN[b] == seg, patches.seg_BxG[b] == seg
            found[clip] = patches.level_BxG[b, g], weight_BxG[b, g], patches.block_BxN[b, n]
    return found


def test_clips_draw_their_tags_by_name():
    """The share asked for; the other clips train as without it, bit for bit; packed as alone; pictures never."""
    lengths = [1 if c % 8 == 0 else 2 + c % 5 for c in range(240)]
    rows = [list(range(c, c + 10)) for c in range(0, 240, 10)]
    patches, weight_BxG = draw(0.4, rows, lengths, forcing=0.2, suffix=0.3, box=0.2)
    plain, plain_weight_BxG = draw(0.0, rows, lengths, forcing=0.2, suffix=0.3, box=0.2)
    assert plain.block_BxN is None
    drawn = by_clip(patches, weight_BxG, rows)
    causal = [c for c, (_, _, block_T) in drawn.items() if block_T.any()]
    videos = sum(length > 1 for length in lengths)
    assert abs(len(causal) / videos - 0.4) < 4 * math.sqrt(0.4 * 0.6 / videos)
    assert all(lengths[c] > 1 for c in causal)
    known = np.zeros(7, int)
    for c in causal:
        level_T, weight_T, block_T = drawn[c]
        np.testing.assert_array_equal(block_T, 1 + np.arange(lengths[c]))
        k = int((weight_T == 0).sum())
        known[k] += 1
        assert (level_T[:k] == 0).all() and (weight_T[k:] > 0).all() and len({*level_T[k:]}) == lengths[c] - k > 0
    assert known[:3].min() > 5
    others_BxG = ~np.isin(patches.clip_BxG, causal) & (patches.seg_BxG > 0)
    np.testing.assert_array_equal(patches.level_BxG[others_BxG], plain.level_BxG[others_BxG])
    np.testing.assert_array_equal(weight_BxG[others_BxG], plain_weight_BxG[others_BxG])
    alone = [[c] for c in rows[0]] + [[]] * 14
    for c, values in by_clip(*draw(0.4, alone, lengths, forcing=0.2, suffix=0.3, box=0.2), alone).items():
        for a, b in zip(values, drawn[c], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.window": 0}, "model.window=0 with flow.causal_share=0.5: a causal clip's frames need a window"),
        ({"data.group_by": "clip"}, "flow.causal_share=0.5 needs a level for each latent frame.*Give 'frame'"),
    ],
)
def test_configs_that_cannot_be_causal_are_refused(changes, says):
    config = config_of()
    config.flow.causal_share = 0.5
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=says):
        make_model(config, 2)


# Roll-outs


@pytest.fixture(scope="module")
def trained():
    """A tiny model with every weight random, whose outputs stay in range."""
    config = base.get_config()
    config.model.update({"width": 32, "depth": 2, "heads": 2, "mlp_width": 64, "window": 2})
    config.text.update({"width": 32, "depth": 1, "heads": 2})
    config.sample.update({"steps": 2, "guidance": 3.0})
    config.flow.causal_share = 0.5
    params = random_params(jax.eval_shape(make_run(config).init, jax.random.key(0)).params)
    params["dit"]["last"] *= 0.3
    return generate.Trained(params, config, step=0, source="random")


REQUESTS = [
    Request("a red circle", 24, 16, 14, seed=3, task="rollout", causal=True),
    Request("b", 16, 16, 9, seed=4, task="rollout", causal=True, guidance=1.0),
]


def test_a_roll_out_is_the_full_forward_frame_by_frame(trained):
    """Each new latent frame of a video is sampled again, with guidance, beside all that were made, without a cache."""
    config, run, frames = trained.config, make_run(trained.config), 5
    (video,) = generate.sample(REQUESTS[:1], trained)
    assert video.shape == (14, 16, 24, 3) and video.std((1, 2, 3)).min() > 10
    velocity = make_velocity(run.model, config)
    layout = generate.Layout(run.codec, tuple(config.model.patch), run.text.tokenise)
    request, level_K = REQUESTS[0], uniform_levels(config.sample.steps, config.sample.shift)
    start = generate.start_causal(request, layout, level_K)
    new = [generate.latent_frame(request, layout, start, t).piece for t in range(frames)]
    join = lambda name: np.concatenate([getattr(p, name) for p in new])
    n = len(new[0].x_nxP)
    names = ("x_nxP", "pos_nx3", "frame_n", "uid_n")
    whole = dataclasses.replace(new[0], **{name: join(name) for name in names}, group_n=join("frame_n"))
    batch, _ = pt.pack([[whole]], 64, frames, 64)
    p = batch.patches
    p = dataclasses.replace(p, block_BxN=np.where(p.seg_BxN > 0, p.frame_BxN + 1, 0))

    @jax.jit
    def resample(patches, level_KxBxG):
        cond = []
        for drop in (False, True):
            ids, prompt = run.text.drop(batch.ids_BxSxK, batch.prompt_BxS, jnp.full(batch.prompt_BxS.shape, drop))
            text = run.text.module.apply({"params": trained.params["text"]}, ids, prompt)
            cond.append(pt.Cond(text, prompt))
        one = lambda patches, cond: velocity(trained.params["dit"], patches, cond)[0]
        scale_BxG = jnp.full(patches.level_BxG.shape, 3.0)
        return integrate(guided(one, *cond, scale_BxG), patches, level_KxBxG, config.sample.solver).x_BxNxP

    x_BxNxP = p.x_BxNxP
    for t in range(frames):
        level_KxBxG = np.where(np.arange(frames) < t, 0, level_K[:, None, None]).astype(np.float32)
        made = resample(dataclasses.replace(p, x_BxNxP=x_BxNxP), level_KxBxG)
        x_BxNxP = x_BxNxP.copy()
        x_BxNxP[:, t * n : (t + 1) * n] = made[:, t * n : (t + 1) * n]
    grid = dataclasses.replace(start.grid, shape=(frames, *start.grid.shape[1:]))
    wanted = generate.to_uint8(run.codec.decode(pt.unpatchify(x_BxNxP[0, : frames * n], grid)))[:14]
    assert np.abs(video.astype(int) - wanted).max() <= 1


def test_roll_outs_of_any_length_are_one_program(trained, monkeypatch):
    """Twenty times the longest clip trained on, packed with another: one program for all frames, the same as alone."""
    traced = []
    monkeypatch.setattr(generate, "integrate", lambda *args: traced.append(args) or integrate(*args))
    generate._sampler.cache_clear()
    frames = 20 * trained.config.data.max_frames
    long, other = generate.sample([dataclasses.replace(REQUESTS[0], frames=frames), REQUESTS[1]], trained)
    assert len(traced) == 1
    assert long.shape == (frames, 16, 24, 3) and other.shape == (9, 16, 16, 3)
    assert long[-60:].std((1, 2, 3)).min() > 10 and len(np.unique(long, axis=0)) == frames
    alone = generate.sample(REQUESTS[:1], trained)[0]
    assert np.abs(alone.astype(int) - long[:14]).max() <= 1


@pytest.mark.parametrize(
    ("window", "settings", "says"),
    [
        (0, {}, "needs a model that trained with a window.*model.window=0"),
        (2, {"history": 2.0}, "history=2.0 goes with no causal roll-out.*Give 1"),
    ],
)
def test_roll_outs_without_a_cache_are_refused(trained, window, settings, says):
    config = trained.config.copy_and_resolve_references()
    config.model.window = window
    config.flow.causal_share = 0.5 if window else 0.0
    with pytest.raises(ValueError, match=says):
        generate.sample(REQUESTS[:1], dataclasses.replace(trained, config=config), **settings)
