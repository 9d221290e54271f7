"""One step does what its formulas say, clip by clip; a bad gradient moves nothing; runs begin from others' weights.

B rows, N patches per row, S text tokens per row, G groups per row, L layers.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, shapes
from dit_video import generate, trainer
from dit_video.checkpoint import Checkpoints, digest
from dit_video.codecs import to_float
from dit_video.data.loader import make_loader, make_source
from dit_video.flow import draw_levels, named_key
from dit_video.gallery import write_mp4, write_png
from dit_video.metrics import read_metrics
from dit_video.model import block_parameters, make_velocity
from dit_video.patches import Cond, lay_out, pack
from dit_video.sharding import HOST
from dit_video.step import drop_prompts, make_optimizer, make_run, make_schedule
from dit_video.trainer import MAX_BAD_STEPS, MAY_CHANGE, gallery_requests, train
from dit_video.weights import lora

# A model that compiles in seconds; other files' tests train it too.
TINY = {
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.mlp_width": 64,
    "model.remat": "none",
    "text.width": 32,
    "text.depth": 1,
    "text.heads": 2,
    "data.rows": 2,
    "data.shards": 2,
    "data.length": 128,
    "data.groups": 16,
    "data.text_length": 64,
    "data.waiting": 8,
    "eval_batches": 1,
    "sample_every": 0,
    "sample.steps": 2,
    "sample.prompts": ("16x16x1@8: a red circle",),
}


def tiny(overrides=()):
    config = shapes.get_config()
    config.update_from_flattened_dict(TINY | dict(overrides))
    return config


def awake(params):
    """Parameters none of which is 0: a new model's output, and most gradients, are 0."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + jnp.asarray(0.1 * rng.standard_normal(p.shape), p.dtype), params)


def first_batches(run, count):
    loader = make_loader(run.config, run.text.tokenise, run.codec)
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def first_pieces(run):
    """The embedded world's first clips as Pieces, small to large."""
    config, (st, *stride_yx) = run.config, run.codec.stride
    source = make_source(config)
    pieces = [
        lay_out(
            run.codec.encode(to_float(clip.video_TxYxXx3)),
            clip.time_T[::st],
            tuple(config.model.patch),
            stride_yx,
            run.text.tokenise(clip.caption),
            clip.uid,
            config.data.group_by,
        )[0]
        for clip in (source[i] for i in range(24))
    ]
    return sorted(pieces, key=lambda piece: piece.size)


def packed(config, rows):
    return pack(rows, config.data.length, config.data.groups, config.data.text_length)


def poison(batch, value, where):
    """The batch with `value` in the first patch of every row where `where`_BxN."""
    x_BxNxP = batch.patches.x_BxNxP.copy()
    for b, row in enumerate(where):
        x_BxNxP[b, np.flatnonzero(row)[0], 0] = value
    return dataclasses.replace(batch, patches=dataclasses.replace(batch.patches, x_BxNxP=x_BxNxP))


def assert_close(tree, wanted, tolerance):
    """Every leaf is `wanted`'s, up to `tolerance` times its norm, or a hundredth of the tree's if that is more.

    (The gradients of a key's bias are 0, but for rounding in sums of what is not.)
    """
    leaves = jax.tree_util.tree_leaves_with_path(wanted)
    total = np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for _, leaf in leaves))
    for (path, b), a in zip(leaves, jax.tree.leaves(tree), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        limit = tolerance * max(np.linalg.norm(b), 0.01 * total)
        assert np.linalg.norm(a - b) <= limit, f"{jax.tree_util.keystr(path)}: {a} is not {b}"


@dataclasses.dataclass(frozen=True)
class Tiny:
    run: object
    step: object
    state: object
    batches: list
    key: object


@pytest.fixture(scope="module")
def small():
    return tiny_run()


def tiny_run():
    """A tiny run on one device: its step compiled, its first state, awake, and its first batches."""
    run = make_run(tiny({"optimizer.kind": "adamw", "optimizer.warmup": 0, "optimizer.ema": 0.3}))
    key = jax.random.key(0)
    state = jax.jit(run.init)(named_key(key, "init"))
    params = awake(state.params)
    state = dataclasses.replace(state, params=params, ema=jax.tree.map(lambda p: p + 1, params))
    return Tiny(run, jax.jit(run.step), state, first_batches(run, 3), key)


# The step.


def test_a_bad_gradient_moves_the_step_alone(small):
    """NaN or inf in a real patch: step goes on and is counted; params, EMA and optimizer stay, bit for bit."""
    state, batch = small.state, small.batches[0]
    kept = lambda s: digest((s.params, s.ema, s.opt_state))
    for count, value in enumerate((np.nan, np.inf), start=1):
        bad = poison(batch, value, batch.patches.seg_BxN != 0)
        after, metrics = small.step(state, bad, small.key)
        assert kept(after) == kept(state)
        assert (int(after.step), int(after.bad_steps), int(after.bad_total)) == (count, count, count)
        assert not np.isfinite(metrics["gradient_norm"]) and int(metrics["bad_steps"]) == count
        state = after
    good, metrics = small.step(state, batch, small.key)
    assert kept(good) != kept(state)
    assert (int(good.step), int(good.bad_steps), int(good.bad_total)) == (3, 0, 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good))


def test_padding_is_never_read(small):
    """NaN where no clip lies changes nothing, bit for bit."""
    batch, _ = packed(small.run.config, [[piece] for piece in first_pieces(small.run)[:2]])
    after, metrics = small.step(small.state, batch, small.key)
    bad, bad_metrics = small.step(small.state, poison(batch, np.nan, batch.patches.seg_BxN == 0), small.key)
    assert digest((after, metrics)) == digest((bad, bad_metrics))


def test_average_of_the_weights(small):
    """ema <- d ema + (1 - d) params, with d = min(ema, (1 + step) / (10 + step)) (here 0.1, then 2/11, then 3/12)."""
    state, wanted = small.state, jax.tree.map(lambda a: np.asarray(a, np.float64), small.state.ema)
    averaged = lambda d, ema, params: jax.tree.map(
        lambda a, p: d * a + (1 - d) * np.asarray(p, np.float64), ema, params
    )
    for batch, decay in zip(small.batches, (1 / 10, 2 / 11, 3 / 12), strict=True):
        state, _ = small.step(state, batch, small.key)
        wanted = averaged(decay, wanted, state.params)
        assert_close(state.ema, wanted, 1e-6)
    late = dataclasses.replace(small.state, step=jnp.int32(1000))
    after, _ = small.step(late, small.batches[0], small.key)
    assert_close(after.ema, averaged(0.3, small.state.ema, after.params), 1e-6)


def test_noise_differs_from_step_to_step_and_comes_back_with_the_step(small):
    loss = lambda state: float(small.step(state, small.batches[0], small.key)[1]["loss"])
    later = dataclasses.replace(small.state, step=jnp.int32(7))
    assert loss(small.state) == loss(small.state) != loss(later)


def test_accumulation_changes_nothing(small):
    """Two parts, one after the other, give the sums, the gradient's norm and the weights of one (1e-5)."""
    config = tiny({"optimizer.accumulate": 2})
    parts = make_run(config)
    gradient, sums = jax.jit(parts.sums)(small.state.params, small.batches[0], small.key)
    wanted_gradient, wanted = jax.jit(small.run.sums)(small.state.params, small.batches[0], small.key)
    assert_close(gradient, wanted_gradient, 1e-5)
    assert_close(sums, wanted, 1e-5)
    assert wanted["weight"] > 64


def test_packed_equals_alone(small):
    """A clip packed with others has the velocity, the loss and the gradient that it has alone (1e-5)."""
    config, run = small.run.config, small.run
    pieces = first_pieces(run)
    video = next(i for i, piece in enumerate(pieces) if piece.size[2] > 1)
    pieces = [pieces.pop(video), *pieces]
    pieces = pieces[: int((np.cumsum([piece.size[0] for piece in pieces]) <= config.data.length).sum())]
    assert len(pieces) > 2
    together, places = packed(config, [pieces])
    velocity, params, key = make_velocity(run.model, config), small.state.params, small.key

    @jax.jit
    def look(batch):
        text_BxSxE = run.text.module.apply({"params": params["text"]}, batch.ids_BxSxK, batch.prompt_BxS)
        patches, _ = draw_levels(key, batch.patches, config.flow)
        v_BxNxP, _ = velocity(params["dit"], patches, Cond(text_BxSxE, batch.prompt_BxS))
        return v_BxNxP, run.sums(params, batch, key)

    v_1xNxP, (gradient, sums) = look(together)
    alone = []
    for piece, (_, offset, count) in zip(pieces, places[0], strict=True):
        own_1xNxP, own_sums = look(packed(config, [[piece]])[0])
        assert_close(v_1xNxP[0, offset : offset + count], own_1xNxP[0, :count], 1e-5)
        alone.append(own_sums)
    wanted_gradient, wanted = jax.tree.map(lambda *a: np.sum(a, 0), *alone)
    assert_close(gradient, wanted_gradient, 1e-5)
    assert_close(sums, wanted, 1e-5)
    assert len({float(own["loss"]) for _, own in alone}) == len(alone)


# What is drawn.


def test_the_last_share_of_the_steps_is_late():
    """Steps 3 and 4 of 4, exactly, have all prefixes known: less of each batch weighs. In two parts too."""
    keys = {
        "steps": 4,
        "late": 0.5,
        "flow.mixture.first": 0.0,
        "flow.late_mixture.prefix": 1.0,
        "flow.weight_floor": 0.0,
    }
    run = make_run(tiny(keys | {"data.still_share": 0.0, "optimizer.accumulate": 2}))
    key, batch = jax.random.key(1), first_batches(run, 1)[0]
    state, step, shares = run.init(key), jax.jit(run.step), []
    for _ in range(4):
        state, sums = step(state, batch, key)
        shares.append(float(sums["weight"] / sums["patches"]))
    assert shares[:2] == [1, 1] and max(shares[2:]) < 0.8, shares


def names_batch(batch, uid_BxG):
    """A batch whose every group is a clip of its own, of two text tokens."""
    B, G = uid_BxG.shape
    seg_BxG = np.tile(np.arange(1, G + 1, dtype=np.int32), (B, 1))
    patches = dataclasses.replace(batch.patches, seg_BxG=seg_BxG, clip_BxG=uid_BxG)
    return dataclasses.replace(batch, patches=patches, prompt_BxS=np.pad(np.repeat(seg_BxG, 2, 1), ((0, 0), (0, 3))))


def test_text_dropout(small):
    """The share of the clips asked for loses its prompt, whole prompts at a time, each by its clip's name alone."""
    uid_BxG = np.random.default_rng(0).integers(2**32, size=(250, 16), dtype=np.uint32)
    drop = functools.partial(jax.jit(drop_prompts), small.key)
    for share, low, high in ((0.0, 0, 0), (0.1, 0.08, 0.12), (0.7, 0.67, 0.73), (1.0, 1, 1)):
        drop_BxS = np.asarray(drop(names_batch(small.batches[0], uid_BxG), share))
        drop_BxGx2 = drop_BxS[:, :32].reshape(250, 16, 2)
        assert (drop_BxGx2[..., 0] == drop_BxGx2[..., 1]).all() and not drop_BxS[:, 32:].any()
        assert low <= drop_BxGx2.mean() <= high, share
        again_BxS = np.asarray(drop(names_batch(small.batches[0], uid_BxG[::-1, ::-1]), share))
        assert (again_BxS[:, :32].reshape(250, 16, 2) == drop_BxGx2[::-1, ::-1]).all()


# The optimizer.


def test_schedule():
    config = tiny({"steps": 1000, "optimizer.warmup": 100, "optimizer.decay": 0.3})
    rate = make_schedule(config, 2.0)
    wanted = {0: 2 / 101, 50: 2 / 101 + (2 - 2 / 101) / 2, 100: 2, 400: 2, 700: 2, 850: 1, 970: 0.2, 1000: 0, 1100: 0}
    np.testing.assert_allclose([rate(step) for step in wanted], list(wanted.values()), atol=1e-6)
    config.optimizer.decay = 0.0
    assert float(make_schedule(config, 2.0)(1000)) == 2


def test_a_restart_goes_on_from_a_whole_schedule():
    """The first steps' rates are those of a run without it; then they rise to a share of the peak, and fall to 0."""
    config = tiny({"steps": 1000, "optimizer.warmup": 100, "optimizer.decay": 0.3})
    longer = tiny({"steps": 1600, "optimizer.warmup": 100, "optimizer.decay": 0.3})
    longer.optimizer.restart, longer.optimizer.restart_lr = 0.375, 0.25
    rate, again = make_schedule(config, 2.0), make_schedule(longer, 2.0)
    assert [float(rate(step)) for step in range(0, 1000, 7)] == [float(again(step)) for step in range(0, 1000, 7)]
    wanted = {1000: 0.5 / 101, 1100: 0.5, 1350: 0.25, 1600: 0, 1700: 0}
    np.testing.assert_allclose([again(step) for step in wanted], list(wanted.values()), atol=1e-6)


def test_muon_takes_every_matrix_of_the_blocks(small):
    """Its momentum is there for the blocks' [L, in, out] weights and no others; adam has all the rest."""
    config = tiny({"optimizer.kind": "muon"})
    optimizer = make_optimizer(config, small.run.model)
    named = lambda tree: {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    momenta = {}
    is_moment = lambda node: hasattr(node, "mu")
    for node in jax.tree.leaves(jax.eval_shape(optimizer.init, small.state.params), is_leaf=is_moment):
        if is_moment(node):
            momenta.setdefault(type(node).__name__, set()).update(named(node.mu))
    blocks = block_parameters(small.run.model).items()
    matrices = {f"['dit']['block_{name}']" for name, (_, shape, _) in blocks if len(shape) == 3}
    muon, adam = momenta["MuonState"], momenta["ScaleByAdamState"]
    assert len(matrices) == 10 and matrices == muon
    assert not muon & adam and muon | adam == named(small.state.params)


def test_muon_orthogonalises_each_layer(small):
    """A matrix's update has singular values near lr, whatever the size of its layer's gradient."""
    config = tiny({"optimizer.kind": "muon", "optimizer.weight_decay": 0.0, "optimizer.warmup": 0})
    optimizer, params, rng = make_optimizer(config, small.run.model), small.state.params, np.random.default_rng(0)

    def gradient(path, p):
        if p.ndim < 3:
            return np.zeros(p.shape, np.float32)
        u, s, v = np.linalg.svd(rng.standard_normal(p.shape), full_matrices=False)
        return np.float32((u * rng.uniform(1, 5, s.shape)[:, None]) @ v * np.array([1.0, 1e-3])[:, None, None])

    gradients = jax.tree_util.tree_map_with_path(gradient, params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    for name, update_LxIxO in updates["dit"].items():
        if update_LxIxO.ndim == 3:
            L, n_in, n_out = update_LxIxO.shape
            s = np.linalg.svd(update_LxIxO, compute_uv=False) / config.optimizer.muon_lr / max(1, n_out / n_in) ** 0.5
            # Newton and Schulz in five steps, with the coefficients of Jordan 2024: within 0.7 to 1.2.
            assert ((0.6 < s) & (s < 1.3)).all(), (name, s.min(), s.max())


# Whole runs, on all devices.

WHOLE = {"optimizer.kind": "adamw", "data.rows": 8, "eval_every": 0, "checkpoint_every": 1, "log_every": 1}


def test_ten_bad_steps_stop_the_run(tmp_path):
    """The error says what to do; only the state from before the first bad step was saved."""
    config = tiny(WHOLE | {"optimizer.lr": 1e30, "optimizer.warmup": 0, "steps": 50, "keep": 20})
    with pytest.raises(FloatingPointError, match=rf"{MAX_BAD_STEPS} gradients .* up to step 11\. .* checkpoint 1;"):
        train(config, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [1]
        state = checkpoints.restore().state
    assert int(state["bad_total"]) == 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert [line["bad_total"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(10))


@pytest.mark.slow
def test_an_offloaded_run_resumes(tmp_path):
    """From the host's memory into it, and to the same weights as one that is not offloaded (1e-4, as of any mesh)."""
    config = lambda offload, steps: tiny(WHOLE | {"optimizer.lr": 1e-3, "optimizer.offload": offload, "steps": steps})
    train(config(True, 1), tmp_path / "away")
    away = train(config(True, 3), tmp_path / "away")
    assert {a.sharding.memory_kind for a in jax.tree.leaves(away.opt_state) if a.ndim} == {HOST}
    train(config(False, 1), tmp_path / "there")
    there = train(config(False, 3), tmp_path / "there")
    assert_close(away.params, there.params, 1e-4)
    assert digest(train(config(False, 3), tmp_path / "away").params) == digest(away.params)


class Poisoned:
    """A loader whose batches of some steps hold a NaN, or none where `steps` is empty."""

    def __init__(self, loader, steps):
        self.loader, self.step, self.steps = loader, 0, steps

    def __next__(self):
        batch, self.step = next(self.loader), self.step + 1
        return poison(batch, np.nan, batch.patches.seg_BxN != 0) if self.step in self.steps else batch

    def __getattr__(self, name):
        return getattr(self.loader, name)


def test_a_bad_step_is_saved_if_a_good_one_came_before(tmp_path, monkeypatch):
    """The state is as sound as before it; but where it is that of the last checkpoint, it pushes no older one out."""
    make = trainer.make_loader
    monkeypatch.setattr(trainer, "make_loader", lambda *args: Poisoned(make(*args), {2, 5, 6}))
    config = tiny(WHOLE | {"optimizer.lr": 1e-3, "steps": 7, "checkpoint_every": 2, "keep": 20})
    state = train(config, tmp_path)
    assert int(state.bad_total) == 3 and int(state.bad_steps) == 0
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2, 4, 7]
        saved = checkpoints.restore(step=2).state
    assert int(saved["step"]) == 2 and int(saved["bad_total"]) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))


def test_pictures_that_fail_do_not_end_a_run(tmp_path, monkeypatch, caplog, capsys):
    """The error and its reason are logged; state, weights and the rest are there. Typed again, it makes them.

    The weights that are sampled from lie along the mesh, cut.
    """
    config = tiny(WHOLE | {"steps": 1, "eval_every": 1, "mesh.fsdp": 8})
    (tmp_path / "gallery").write_text("in the way")
    with monkeypatch.context() as failing, caplog.at_level("ERROR"):
        failing.setattr(trainer, "_validate", lambda *_: [0][1])
        state = train(config, tmp_path)
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 2 and "validation at step 1 failed" in said[0] and "IndexError" in said[0]
    assert "the gallery of step 1 failed" in said[1] and "gallery" in said[1].split("without:")[1]
    assert generate.load(tmp_path / "weights.safetensors").step == 1
    assert [list(line)[1] for line in read_metrics(tmp_path / "metrics.jsonl")] == ["loss"]

    (tmp_path / "gallery").unlink()
    weights = (tmp_path / "weights.safetensors").stat().st_mtime_ns
    assert digest(train(config, tmp_path)) == digest(state)
    assert (tmp_path / "gallery" / "step_00000001" / "samples.json").exists()
    assert [trainer._due(tiny({"sample_every": n, "steps": 4}), 4)["sampling"] for n in (-1, 0, 3)] == [0, 1, 1]
    assert [trainer._due(tiny({"sample_every": n, "steps": 4}), 3)["sampling"] for n in (-1, 0, 3)] == [0, 0, 1]
    assert [list(line)[1] for line in read_metrics(tmp_path / "metrics.jsonl")] == ["loss", "validation"]
    assert (tmp_path / "weights.safetensors").stat().st_mtime_ns == weights, "what is there is not made again"
    capsys.readouterr()
    train(config, tmp_path)
    assert "is finished: 1 of 1 steps" in capsys.readouterr().out

    # What is sampled from weights as they lie on the mesh is what is sampled elsewhere.
    cut = jax.tree.map(lambda old, new: jax.device_put(new, old.sharding), state.ema, awake(state.ema))
    assert {a.sharding.is_fully_replicated for a in jax.tree.leaves(cut) if a.ndim == 3} == {False}
    videos = lambda params, mesh: generate.sample(
        gallery_requests(config), generate.Trained(params, config, 1, ""), mesh
    )
    (elsewhere,), (there,) = videos(jax.device_get(cut), None), videos(cut, trainer.make_mesh(config.mesh))
    assert np.abs(there.astype(int) - elsewhere).max() <= 1 and elsewhere.std() > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sample.interval": (0.8, 0.2)}, r"sample.interval=\(0.8, 0.2\) must be"),
        ({"sample.prompts": ("48x32: a red circle",)}, "is not of the form"),
        ({"sample.prompts": ("48x32x10@8: a red circle",)}, "frames=10 .* Nearest"),
        ({"sample.prompts": ("48x30x9@8: a red circle",)}, "30"),
    ],
)
def test_what_the_gallery_would_fail_of_is_refused_at_the_start(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(WHOLE | overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def changed(**keys):
    """What a run begun with the tiny config and one with these keys have: (saved config, config)."""
    return tiny().to_dict(), tiny({key.replace("__", "."): value for key, value in keys.items()})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"keep": 7, "eval_every": 1, "sample__solver": "euler", "data__workers": 2, "optimizer__offload": True}, ""),
        ({"steps": 7}, "steps: 12000 -> 7: what holds in a last share of the steps .* moves with it"),
        ({"data__root": "elsewhere"}, "data.root: '' -> 'elsewhere', taken to hold the same"),
        ({"codec__weights": "a", "text__file": "b", "text__encoder": "c"}, "text.file: '' -> 'b', taken to hold"),
        ({"model__remat": "full", "model__unroll": 2}, "model.unroll: 1 -> 2 orders sums otherwise"),
        ({"optimizer__accumulate": 2, "mesh__fsdp": 2}, "optimizer.accumulate: 1 -> 2 orders sums otherwise"),
    ],
)
def test_what_the_state_does_not_hang_on_may_change(caplog, keys, said):
    """On resume, with a word in the log where losses may then be the same up to rounding alone, or files' contents."""
    with caplog.at_level("WARNING"):
        trainer._require_same_config(*changed(**keys))
    assert re.search(said, caplog.text) and bool(said) == bool(caplog.text)


def test_what_the_state_hangs_on_may_change_where_a_flag_says_so(caplog):
    """Keys and sections; each is logged. Others stay refused, and a flag that names no key is a typo."""
    saved, config = changed(model__width=48, optimizer__lr=0.5, data__drop=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"(?s)--allow_changed=KEY.*data.drop.0: .*model.width: 32 -> 48.*lr: "):
        trainer._require_same_config(saved, config)
    with pytest.raises(ValueError, match=r"undo.*:\n  model.width: 32 -> 48$"), caplog.at_level("WARNING"):
        trainer._require_same_config(saved, config, ["optimizer.lr", "data"])
    assert "ALLOWED TO CHANGE" in caplog.text and "optimizer.lr: 0.002 -> 0.5" in caplog.text
    trainer._require_same_config(saved, config, ["optimizer.lr", "data", "model.width"])
    with pytest.raises(ValueError, match="allow_changed=optimizer.lrr,dat: no such keys"):
        trainer._require_same_config(saved, config, ["optimizer.lrr", "data", "model.width", "dat"])
    assert trainer._require_same_config(None, config) is None
    assert "data" not in MAY_CHANGE


def saved_weights(path, width=32):
    config = tiny({"model.width": width})
    run = make_run(config)
    shapes_of = jax.eval_shape(run.init, jax.random.key(1)).params
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: np.float32(0.1 * rng.standard_normal(a.shape)), shapes_of)
    generate.save_weights(path, params, config, 5)
    return path


def test_start_from_other_weights(tmp_path):
    """The first state has another run's averaged weights and a fresh optimizer; what is left beside it is complete."""
    given = generate.load(saved_weights(tmp_path / "given.safetensors")).params
    rest = {
        "optimizer.lr": 0.0,
        "optimizer.text_lr": 0.0,
        "steps": 1,
        "init_from": str(tmp_path / "given.safetensors"),
        "eval_every": 1,
    }
    state = train(tiny(WHOLE | rest), tmp_path / "run")
    assert digest(state.params) == digest(given)
    assert_close(state.ema, given, 1e-6)
    counts = {
        int(node.count)
        for node in jax.tree.leaves(state.opt_state, is_leaf=lambda n: hasattr(n, "mu"))
        if hasattr(node, "mu")
    }
    assert counts == {1}
    # A run's workdir is a start as good as a file: its newest checkpoint's average.
    again = generate.load(tmp_path / "run")
    assert again.step == 1 and digest(again.params) == digest(jax.device_get(state.ema))
    files = {path.relative_to(tmp_path / "run").parts[0] for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {
        "checkpoints",
        "config.json",
        "gallery",
        "metrics.jsonl",
        "tensorboard",
        "versions.json",
        "weights.safetensors",
    }


@pytest.mark.parametrize("rank", [0, 2])
def test_a_runs_weights_come_in_the_shares_of_their_devices(tmp_path, capfd, rank):
    """Of a workdir's checkpoint no matrix is ever in a host's hands as a whole; with low-rank factors neither."""

    def drawn(seed, **overrides):
        config = tiny({"data.rows": 8, "mesh.fsdp": 8} | overrides)
        mesh, rng = trainer.make_mesh(config.mesh), np.random.default_rng(seed)
        abstract = trainer.abstract_state(make_run(config, mesh), mesh)
        draw = lambda a: jax.device_put(np.asarray(rng.standard_normal(a.shape), a.dtype), a.sharding)
        return config, jax.tree.map(draw, abstract)

    config, given = drawn(1, **{"lora.rank": rank})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, given, {}, config.to_dict())
    config, state = drawn(2)
    shardings = jax.tree.map(lambda a: a.sharding, state)
    capfd.readouterr()
    with jax.transfer_guard_host_to_device("log_explicit"):
        begun = trainer.start_from(tmp_path, state, shardings, config.model)
    arrived = re.findall(r"aval=ShapedArray\(\w+\[([\d,]*)\]", capfd.readouterr().err)
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in arrived]
    assert sizes and max(sizes) == max(leaf.size for leaf in jax.tree.leaves(begun.params)) / 8
    wanted = given.ema
    if rank:
        wanted = given.frozen | {"dit": lora.merge(given.frozen["dit"], given.ema["lora"], 1.0)}
    for tree in (begun.params, begun.ema):
        assert_close(tree, wanted, 1e-6)
        assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s, tree, shardings.params))


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = saved_weights(tmp_path / "wide.safetensors", width=48)
    with pytest.raises(
        ValueError, match=r"init_from=.*other weights(.|\n)*block_q'\]: \(2, 48, 48\) there, \(2, 32, 32\) here"
    ):
        train(tiny(WHOLE | {"steps": 1, "init_from": str(path)}), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_folder_of_clips_trains(tmp_path):
    """Two videos, a picture and a broken file: the broken one is passed over, and the losses are finite."""
    rng, folder = np.random.default_rng(0), tmp_path / "clips"
    for i, (frames, height, width) in enumerate(((9, 32, 48), (14, 48, 32), (1, 32, 32))):
        video_TxYxXx3 = np.uint8(rng.integers(256, size=(frames, height // 8, width // 8, 3)).repeat(8, 1).repeat(8, 2))
        if frames > 1:
            write_mp4(folder / f"{i}.mp4", video_TxYxXx3, 8, scale=1)
        else:
            write_png(folder / f"{i}.png", video_TxYxXx3[0])
        (folder / f"{i}.txt").write_text(f"clip number {i}")
    (folder / "broken.mp4").write_bytes((folder / "0.mp4").read_bytes()[:100])
    config = tiny(WHOLE | {"data.kind": "clips", "data.root": str(folder), "steps": 3, "sample.prompts": ()})
    config.data.max_side, config.data.max_tokens = 48, 64
    state = train(config, tmp_path / "run")
    assert int(state.step) == 3 and int(state.bad_total) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3] and all(np.isfinite(line["loss"]) for line in lines)
    samples = list((tmp_path / "run" / "gallery" / "step_00000003").glob("*.png"))
    assert len(samples) == 3  # what it was shown: the folder's own captions and sizes


def test_a_gallery_shows_what_is_held_out(tmp_path):
    """Of a folder of 100 pictures, the captions of the five that no run trains on."""
    for i in range(100):
        write_png(tmp_path / f"{i:02}.png", np.zeros((16, 16, 3), np.uint8))
        (tmp_path / f"{i:02}.txt").write_text(f"picture {i}")
    config = tiny({"data.kind": "clips", "data.root": str(tmp_path), "sample.prompts": ()})
    assert [r.prompt for r in gallery_requests(config)] == [f"picture {i}" for i in (0, 20, 40, 60, 80)]


def test_a_config_saved_before_a_key_was_added_gets_its_default():
    """Of base.py, at any depth; what was saved stays, keys that base.py no longer has too."""
    config = shapes.get_config().to_dict()
    saved = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    del saved["keep"], saved["flow"]["weight_floor"]
    saved["model"] |= {"width": 8, "gone": 1}
    read = generate.with_newer_keys(saved)
    base_config = base.get_config()
    assert read["keep"] == base_config.keep and read["flow"]["weight_floor"] == base_config.flow.weight_floor
    assert read["model"] == config["model"] | {"width": 8, "gone": 1} and read["data"] == config["data"]
