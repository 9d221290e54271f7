"""What tasks lay out, and sampling as a whole: packed equals alone, an image stays as given, devices change nothing.

n patches of one request, g its groups, K = M + 1 levels, T x Y x X a clip's grid, P values per patch.
"""

import collections
import dataclasses
import re

import jax
import numpy as np
import pytest

from configs import base
from dit_video import generate
from dit_video.canvas import Layout, Request, check_request, finish, seen, told
from dit_video.codecs import Pixels, make_codec, to_float
from dit_video.model import make_model
from dit_video.patches import Cond, lay_out, pack, unpatchify
from dit_video.sampling import sample, uniform_levels
from dit_video.sharding import make_mesh
from dit_video.tasks import TASKS, animate, start_rollout, text_to_video
from dit_video.text import make_text

LEVEL_K = uniform_levels(3)
IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8)
VIDEO = Request("a red circle circles clockwise", width=32, height=16, frames=9, fps=12.0, seed=4)
PICTURE = Request("a picture of a blue cross", width=24, height=24, seed=2)
ANIMATION = Request("a cross moves", width=40, height=24, frames=5, seed=3, image_YxXx3=IMAGE)
STILL = dataclasses.replace(ANIMATION, frames=1)
REQUESTS = [VIDEO, PICTURE, ANIMATION, STILL]


def tiny_config():
    config = base.get_config()
    config.model.update({"width": 32, "depth": 1, "heads": 2, "mlp_width": 64})
    config.text.update({"width": 32, "depth": 1, "heads": 2})
    config.sample.update({"steps": 2, "guidance": 2.0})
    return config


def layout_of(config):
    return Layout(
        make_codec(config.codec), tuple(config.model.patch), make_text(config.text).tokenise, config.data.group_by
    )


@pytest.fixture(scope="module")
def trained():
    """A model with every weight random, those that start at zero too; text weighs much, and outputs stay in range."""
    config = tiny_config()
    text, layout = make_text(config.text), layout_of(config)
    batch, _ = pack([[text_to_video(PICTURE, layout, LEVEL_K).piece]], 64, 8, 64)

    def init(key):
        params = text.module.init(key, batch.ids_BxSxK, batch.prompt_BxS)["params"]
        cond = Cond(text.module.apply({"params": params}, batch.ids_BxSxK, batch.prompt_BxS), batch.prompt_BxS)
        model = make_model(config, layout.codec.channels)
        return {"text": params, "dit": model.init(key, batch.patches, cond)["params"]}

    rng = np.random.default_rng(0)

    def draw(path, w):
        name = path[-1].key
        small = name.endswith(("bias", "table", "norm", "gain"))
        scale = 0.1 if small else 1.0 if name == "embedding" else w.shape[-2] ** -0.5
        return (name.endswith(("norm", "gain")) + scale * rng.normal(size=w.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))
    params["dit"]["block_text_o"] *= 4
    params["dit"]["last"] *= 0.4
    return generate.Trained(params, config, step=0, source="random")


# Layouts


@pytest.mark.parametrize("group_by", ["frame", "clip"])
@pytest.mark.parametrize("request_", [VIDEO, PICTURE], ids=["video", "picture"])
def test_a_request_is_laid_out_as_such_a_clip_is_for_training(request_, group_by):
    """Same coordinates, frames, groups and tokens; its values are noise, which comes down in all groups together."""
    layout, r = dataclasses.replace(layout_of(tiny_config()), group_by=group_by), request_
    task = text_to_video(r, layout, LEVEL_K)
    video = np.zeros((r.frames, r.height, r.width, 3), np.float32)
    time_T, ids_sxK = np.arange(r.frames) / r.fps, layout.tokenise(r.prompt)
    piece, grid = lay_out(layout.codec.encode(video), time_T[::4], (1, 8, 8), (1, 1), ids_sxK, r.seed, group_by)
    assert task.grid == grid
    for field in dataclasses.fields(piece):
        if field.name != "x_nxP":
            np.testing.assert_array_equal(getattr(task.piece, field.name), getattr(piece, field.name), field.name)
    np.testing.assert_array_equal(task.level_Kxg, np.stack([LEVEL_K] * piece.size[2], 1))
    assert task.piece.x_nxP.shape == piece.x_nxP.shape and task.piece.x_nxP.dtype == np.float32
    assert abs(task.piece.x_nxP.mean()) < 0.03 and abs(task.piece.x_nxP.std() - 1) < 0.03


def test_a_requests_noise_hangs_on_its_seed_alone():
    layout = layout_of(tiny_config())
    noise = lambda **changes: text_to_video(dataclasses.replace(VIDEO, **changes), layout, LEVEL_K).piece.x_nxP
    np.testing.assert_array_equal(noise(), noise(prompt="other", fps=8.0, guidance=1.0))
    assert np.abs(noise() - noise(seed=5)).min(1).max() > 0 and not np.isclose(noise(), noise(seed=5)).all(1).any()
    assert len(np.unique(noise(), axis=0)) == len(noise())


def test_an_animation_knows_its_first_frame():
    """At level 0 throughout, the image's very values; the rest is the noise that the request would have without it."""
    layout = layout_of(tiny_config())
    task = animate(ANIMATION, layout, LEVEL_K)
    plain = text_to_video(dataclasses.replace(ANIMATION, image_YxXx3=None), layout, LEVEL_K)
    first = task.piece.frame_n == 0
    np.testing.assert_array_equal(task.piece.x_nxP[~first], plain.piece.x_nxP[~first])
    np.testing.assert_array_equal(task.level_Kxg, np.stack([0 * LEVEL_K, LEVEL_K], 1))
    video = layout.codec.decode(unpatchify(task.piece.x_nxP, task.grid))
    np.testing.assert_array_equal(video[0], to_float(IMAGE))
    assert first.sum() == 3 * 5 and (task.piece.group_n[first] == 0).all() and (task.piece.group_n[~first] == 1).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": 10}, r"frames=10 .* 1 \+ 4k frames .*Nearest: 9 or 13"),
        ({"frames": 0}, "frames=0 .*Nearest: 1"),
        ({"width": 20}, "width=20 .* patches of 8 pixels. Nearest: 16 or 24"),
        ({"height": 4}, "height=4 .* patches of 8 pixels. Nearest: 8"),
        ({"height": -8}, "height=-8 .*Nearest: 8"),
        ({"fps": 0.0}, "fps=0.0 is not a frame rate"),
        ({"fps": float("nan")}, "fps=nan is not a frame rate"),
        ({"image_YxXx3": IMAGE}, r"the image is 40x24 and the clip 32x16 \(WIDTHxHEIGHT\)"),
        ({"image_YxXx3": IMAGE / 255}, r"the image is float64 \(24, 40, 3\); give uint8"),
        ({"image_YxXx3": np.zeros((16, 32, 4), np.uint8)}, r"the image is uint8 \(16, 32, 4\).* x 3 \(RGB\)"),
    ],
)
def test_requests_that_cannot_be_laid_out_are_refused(changes, says):
    """Naming the value, and the nearest that can."""
    with pytest.raises(ValueError, match=says):
        check_request(dataclasses.replace(VIDEO, **changes), layout_of(tiny_config()))


def test_layouts_that_cannot_serve_a_request_are_refused():
    layout = layout_of(tiny_config())
    with pytest.raises(ValueError, match="frames=9 cannot be cut into patches of 2 latents. Nearest: 5 or 13"):
        check_request(VIDEO, dataclasses.replace(layout, patch=(2, 8, 8)))
    with pytest.raises(ValueError, match="frames=1 cannot be cut into patches of 2 latents. Nearest: 5"):
        check_request(PICTURE, dataclasses.replace(layout, patch=(2, 8, 8)))
    for change in ({"group_by": "clip"}, {"patch": (2, 8, 8)}):
        with pytest.raises(
            ValueError, match=r"animating needs a level for each latent frame: .*they are '(clip|frame)'"
        ):
            animate(ANIMATION, dataclasses.replace(layout, **change), LEVEL_K)


# What videos give

NEW = 7  # no pixel of a given video has this value: it marks what a task makes


def video_of(frames, width=24, height=16, seed=0):
    """Random pixels, none of them NEW."""
    return np.random.default_rng(seed).integers(8, 256, (frames, height, width, 3)).astype(np.uint8)


V, W = video_of(10), video_of(9, seed=1)
MASK = np.zeros((1, 16, 24), bool)
MASK[:, 5:13, 9:20] = True
ALL_TASKS = {
    "text": Request("a", 24, 16, 9),
    "animate": Request("a", 24, 16, 9, image_YxXx3=V[0]),
    "forward": Request("a", 24, 16, task="extend", videos=(V,), new_frames=6),
    "forward, in sight of 3": Request("a", 24, 16, task="extend", videos=(V,), new_frames=1, context=3),
    "backward": Request("a", 24, 16, task="extend", videos=(V,), new_frames=6, direction="backward"),
    "connect": Request("a", 24, 16, task="connect", videos=(V, W), new_frames=6),
    "connect, in sight of 5": Request("a", 24, 16, task="connect", videos=(V, W), new_frames=8, context=5),
    "loop": Request("a", 24, 16, task="loop", videos=(V,), new_frames=6),
    "in-painting": Request("a", 24, 16, task="paint", videos=(V,), mask_TxYxX=MASK),
    "out-painting": Request("a", 40, 24, task="paint", videos=(V,)),
    "both": Request("a", 48, 16, task="paint", videos=(V,), mask_TxYxX=MASK),
    "edit": Request("a", 24, 16, task="edit", videos=(V,)),
    "masked edit": Request("a", 24, 16, task="edit", videos=(V,), mask_TxYxX=np.repeat(MASK, 10, 0)),
    "interpolate": Request("a", 24, 16, task="interpolate", videos=(W,), factor=4, fps=32.0),
    "frame rate": Request("a", 24, 16, task="interpolate", videos=(W,), factor=1.5, fps=12.0),
    "timeline": Request("", 24, 16, 9, task="timeline", timeline=((0, "a b"), (0.5, "c d e"))),
}


def laid(request, **changes):
    return TASKS[request.task or "text"](request, dataclasses.replace(layout_of(tiny_config()), **changes), LEVEL_K)


def expected(name):
    """The answer's frames as floats: what each task must give back, NaN where it makes them."""
    r, outside = ALL_TASKS[name], ~MASK[0]
    frames = {"text": 9, "animate": 9, "timeline": 9, "forward, in sight of 3": 11, "connect": 25, "interpolate": 33}
    frames |= {"forward": 16, "backward": 16, "loop": 16, "connect, in sight of 5": 27, "frame rate": 13}
    made = np.full((frames.get(name, 10), r.height, r.width, 3), np.nan)
    if name == "animate":
        made[0] = V[0]
    elif name == "backward":
        made[-10:] = V
    elif r.task in ("extend", "connect", "loop"):
        made[:10] = V
        made[len(made) - 9 :] = W if r.task == "connect" else made[len(made) - 9 :]
    elif name == "out-painting":
        made[:, 0:16, 8:32] = V
    elif name == "both":
        made[:, :, 16:40][:, outside] = V[:, outside]  # from 12, to a whole patch
    elif r.mask_TxYxX is not None:
        made[:, outside] = V[:, outside]
    elif r.task == "interpolate":
        made[:: 4 if name == "interpolate" else 3] = W[:: 1 if name == "interpolate" else 2]
    return made


def made_by(name, answer):
    """The values of an answer that its task made, after all that it was given was found to be there bit for bit."""
    wanted = expected(name)
    assert answer.shape == wanted.shape and answer.dtype == np.uint8
    known = ~np.isnan(wanted)
    np.testing.assert_array_equal(answer[known], wanted[known], err_msg=name)
    return answer[~known]


@pytest.mark.parametrize("name", ALL_TASKS)
def test_what_is_given_is_put_back_and_only_that(name):
    """Whatever is decoded: a clip of one value comes back with that value wherever nothing was given."""
    request = ALL_TASKS[name]
    task = animate(request, layout_of(tiny_config()), LEVEL_K) if name == "animate" else laid(request)
    T, Y, X = task.grid.shape
    answer = finish(task, np.full((1 + 4 * (T - 1), 8 * Y, 8 * X, 3), NEW, np.uint8))
    assert (made_by(name, answer) == NEW).all()


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_known_patches_never_move(solver):
    """All tasks in one row, and a velocity that is no number there: their bits stay, every other patch moves."""
    layout = layout_of(tiny_config())
    tasks = [animate(r, layout, LEVEL_K) if r.image_YxXx3 is not None else laid(r) for r in ALL_TASKS.values()]
    sizes = np.array([task.piece.size for task in tasks]).sum(0)
    batch, _ = pack([[task.piece for task in tasks]], sizes[0], sizes[2], sizes[1])
    level_KxBxG = np.concatenate([task.level_Kxg for task in tasks], 1)[:, None]
    rng = np.random.default_rng(0)
    known_n = np.concatenate([task.level_Kxg[0, task.piece.group_n] == 0 for task in tasks])
    velocity_BxNxP = np.where(known_n[:, None], np.nan, 1 + rng.uniform(size=batch.patches.x_BxNxP.shape))
    moved = sample(lambda p: velocity_BxNxP.astype(np.float32), batch.patches, level_KxBxG, solver)
    x_nxP = np.concatenate([task.piece.x_nxP for task in tasks])
    assert 0.2 < known_n.mean() < 0.8
    np.testing.assert_array_equal(np.asarray(moved.x_BxNxP)[0][known_n], x_nxP[known_n])
    assert (np.asarray(moved.x_BxNxP)[0][~known_n] != x_nxP[~known_n]).all()


@pytest.mark.parametrize("name", [name for name in ALL_TASKS if name not in ("text", "timeline")])
def test_the_model_sees_the_given_pixels_and_no_others(name):
    """A patch is known iff all of its pixels are given; it then holds them, and stays at level 0."""
    request, layout = ALL_TASKS[name], layout_of(tiny_config())
    task = animate(request, layout, LEVEL_K) if name == "animate" else laid(request)
    known_n = task.level_Kxg[:, task.piece.group_n].max(0) == 0
    clean, _ = lay_out(layout.codec.encode(to_float(task.given_TxYxXx3)), range(99), layout.patch, (1, 1), [[0]], 0)
    np.testing.assert_array_equal(task.piece.x_nxP[known_n], clean.x_nxP[known_n])
    assert (task.piece.x_nxP[~known_n] != clean.x_nxP[~known_n]).any(1).all()
    for n, (t, y, x) in enumerate(np.ndindex(task.grid.shape)):
        frames = slice(max(4 * t - 3, 0), 4 * t + 1)
        pixels = task.known_TxYxX[frames, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        assert pixels.all() == known_n[n]
    assert (known_n.any() and not known_n.all()) or name == "edit"


def test_what_the_model_does_not_know_of_the_given_is_counted():
    """By hand: frames apart from pixels; nothing is said where all is known."""
    layout = layout_of(tiny_config())
    tell = lambda task, context=None: told([seen(task, layout)], layout, context)
    for name in ("text", "animate", "forward", "backward", "out-painting", "edit", "connect, in sight of 5"):
        request = ALL_TASKS[name]
        assert tell(animate(request, layout, LEVEL_K) if name == "animate" else laid(request)) == "", name
    # After 9 known frames and 6 new ones, frame 15 starts within the group of 13 ... 16.
    assert "knows 24 of 36 patches" in tell(laid(ALL_TASKS["connect"]))
    assert ": 2 given frames in groups of 4" in tell(laid(ALL_TASKS["connect"]))
    # Patches are 3 by 2 in a frame; the mask, 8 by 11 pixels, touches the right 2 by 2 of them, 16 by 16 pixels.
    painted, interpolated = tell(laid(ALL_TASKS["in-painting"])), tell(laid(ALL_TASKS["interpolate"]))
    assert "knows 8 of 24 patches" in painted and " 0 given frames in groups of 4 that are given in part" in painted
    assert f" {10 * (256 - 88)} given pixels in patches of 8x8 that the mask touches" in painted
    assert ": 8 given frames in groups of 4 that are given in part, 0 given pixels" in interpolated
    # Of 5 known frames, 6 new ones and the first again, frames 11 and 12 lie in the group of 9 ... 12.
    assert ": 2 given frames in groups of 4" in tell(laid(ALL_TASKS["loop"]))
    assert tell(laid(dataclasses.replace(ALL_TASKS["loop"], new_frames=8))) == ""
    # Whole groups of a context: 1 + 4k frames before the new ones, 4k after.
    for name, context, words in (
        ("forward", 6, "5"), ("forward", 5, ""), ("backward", 5, "4"), ("backward", 4, ""), ("loop", 6, "5 and 4"),
    ):  # fmt: skip
        request = dataclasses.replace(ALL_TASKS[name], context=context, new_frames=8)
        words = f"of context={context} frames the model sees {words}, in whole groups of 4" if words else ""
        assert tell(laid(request), context) == words
    # Of several parts: the sum.
    both = told([seen(laid(ALL_TASKS[name]), layout) for name in ("in-painting", "interpolate")], layout)
    counts = lambda text: np.array([int(n) for n in re.findall(r"(\d+) (?:of|patches|given)", text)])
    np.testing.assert_array_equal(counts(both), counts(painted) + counts(interpolated))


@pytest.mark.parametrize("name", ALL_TASKS)
def test_what_is_given_in_part_is_led_to_what_it_is(name):
    """Each given value of a patch that is not known wholly: from where it starts to what is given, in its level."""
    request, layout = ALL_TASKS[name], layout_of(tiny_config())
    task = animate(request, layout, LEVEL_K) if name == "animate" else laid(request)
    values = lambda video: lay_out(layout.codec.encode(video), range(99), layout.patch, (1, 1), [[0]], 0)[0].x_nxP
    given_nxP = values(np.repeat(task.known_TxYxX[..., None], 3, -1).astype(np.float32)) > 0
    level_nx1 = task.level_Kxg[0][task.piece.group_n][:, None]
    led_nxP = given_nxP & (level_nx1 > 0)
    if name not in ("connect", "loop", "in-painting", "both", "masked edit", "interpolate", "frame rate"):
        assert task.course_nxP is None and not led_nxP.any()
        return
    assert led_nxP.any()
    np.testing.assert_array_equal(~np.isnan(task.course_nxP), led_nxP)
    there_nxP = task.piece.x_nxP - level_nx1 * task.course_nxP
    np.testing.assert_allclose(there_nxP[led_nxP], values(to_float(task.given_TxYxXx3))[led_nxP], atol=1e-6)


class Learned:
    stride, channels, encode = (4, 1, 1), 12, Pixels((4, 1, 1)).encode


def test_a_learned_codecs_latents_are_not_led():
    """No pixel has one of them to itself."""
    assert laid(ALL_TASKS["connect"], codec=Learned()).course_nxP is None


def test_a_mask_may_touch_every_patch_where_its_given_pixels_are_led():
    """What is edited is seen in its own noise as well; but a learned codec would show a painter nothing."""
    touching = {"mask_TxYxX": np.indices((1, 16, 24)).sum(0) % 5 == 0}
    painted, edited = (dataclasses.replace(ALL_TASKS[name], **touching) for name in ("in-painting", "masked edit"))
    for task in (laid(painted), laid(edited)):
        np.testing.assert_array_equal(
            finish(task, np.full((13, 16, 24, 3), NEW, np.uint8))[:, ~touching["mask_TxYxX"][0]],
            V[:, ~touching["mask_TxYxX"][0]],
        )
        assert (task.level_Kxg[0] > 0).all() and not np.isnan(task.course_nxP).all()
    laid(edited, codec=Learned())
    with pytest.raises(ValueError, match="would see nothing of what is given"):
        laid(painted, codec=Learned())


def test_a_timeline_needs_a_level_for_each_frame():
    """A group of a whole clip would show the model's modulation one prompt of several."""
    with pytest.raises(ValueError, match="a timeline needs a level for each latent frame: data.group_by='frame'"):
        laid(ALL_TASKS["timeline"], group_by="clip")


@pytest.mark.parametrize("name", ["animate", "forward", "backward", "connect", "loop"])
def test_frames_that_are_not_given_repeat_the_nearest_that_is(name):
    """A learned codec encodes a frame by those around it: none of them is black."""
    request = ALL_TASKS[name]
    task = animate(request, layout_of(tiny_config()), LEVEL_K) if name == "animate" else laid(request)
    given = np.flatnonzero(task.known_TxYxX.all((1, 2)))
    for t, frame in enumerate(task.given_TxYxXx3):
        apart = np.abs(given - t)
        assert any((frame == task.given_TxYxXx3[g]).all() for g in given[apart == apart.min()])


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("new", range(1, 10))
def test_extending_by_any_number(direction, new):
    """The next legal length is laid out, no more; the new frames touch known ones; their times are one clip's."""
    for F in (4, 5, 7, 9):
        request = Request("a", 24, 16, task="extend", videos=(V[:F],), new_frames=new, direction=direction, fps=4.0)
        task = laid(request)
        T = 1 + 4 * (task.grid.shape[0] - 1)
        seen = (1 + (F - 1) // 4 * 4) if direction == "forward" else F // 4 * 4
        assert seen + new <= T < seen + new + 4
        np.testing.assert_array_equal(np.unique(task.piece.pos_nx3[:, 0]), np.arange(0, T, 4) / 4)
        known_T = task.known_TxYxX.all((1, 2))
        np.testing.assert_array_equal(
            np.flatnonzero(known_T), np.arange(T)[:seen] if direction == "forward" else np.arange(T)[-seen:]
        )
        assert len(finish(task, np.zeros((T, 16, 24, 3), np.uint8))) == F + new


def test_a_loop_leads_from_the_end_to_the_beginning():
    """Its canvas: the video's last frames, then new ones, then the video's first, at one frame rate."""
    for new in (4, 6, 8):
        task = laid(dataclasses.replace(ALL_TASKS["loop"], new_frames=new, fps=4.0))
        known_T = task.known_TxYxX.all((1, 2))
        head, tail = np.flatnonzero(known_T)[:5], np.flatnonzero(known_T)[5:]
        np.testing.assert_array_equal(head, range(5))
        np.testing.assert_array_equal(tail, range(5 + new, len(known_T)))
        np.testing.assert_array_equal(task.given_TxYxXx3[head], V[-5:])
        np.testing.assert_array_equal(task.given_TxYxXx3[tail], V[: len(tail)])
        np.testing.assert_array_equal(np.unique(task.piece.pos_nx3[:, 0]), np.arange(0, len(known_T), 4) / 4)
        assert task.level_Kxg[0, task.piece.group_n][task.piece.frame_n == task.piece.frame_n.max()].max() == 0


def test_what_closes_a_loop_is_not_the_noise_of_what_it_closes():
    """A loop from a prompt makes both from one seed: patches of the same place would start alike."""
    closing = laid(ALL_TASKS["loop"]).piece.x_nxP
    first = laid(dataclasses.replace(ALL_TASKS["connect"], videos=(V, V), context=5)).piece.x_nxP
    new_n = laid(ALL_TASKS["loop"]).piece.frame_n == 2  # of 5 known frames and 6 new ones
    assert closing.shape == first.shape and abs(closing[new_n] - first[new_n]).max(1).min() > 0.1


def test_an_edit_starts_between_the_video_and_noise():
    """z = (1 - s) x + s e with the request's own noise; all levels fall from s to 0; strength 1 is text to video."""
    edit = lambda s: laid(dataclasses.replace(ALL_TASKS["edit"], strength=s)).piece.x_nxP
    layout = layout_of(tiny_config())
    video = layout.codec.encode(to_float(np.concatenate([V, np.repeat(V[-1:], 3, 0)])))
    x_nxP = lay_out(video, range(4), layout.patch, (1, 1), [[0]], 0)[0].x_nxP
    e_nxP = text_to_video(Request("a", 24, 16, 13), layout, LEVEL_K).piece.x_nxP
    np.testing.assert_array_equal(edit(1.0), e_nxP)
    np.testing.assert_allclose(edit(0.25), 0.75 * x_nxP + 0.25 * e_nxP, atol=1e-6)
    levels = laid(dataclasses.replace(ALL_TASKS["edit"], strength=0.25)).level_Kxg
    np.testing.assert_allclose(levels, 0.25 * np.repeat(LEVEL_K[:, None], 4, 1))


def test_interpolation_lies_at_the_finer_rate():
    """At 1.5 times 8 frames a second, 24 a second are laid out and every other is taken."""
    task = laid(ALL_TASKS["frame rate"])
    np.testing.assert_allclose(np.unique(task.piece.pos_nx3[:, 0]), np.arange(0, 25, 4) / 24, atol=1e-6)
    assert task.take == slice(0, 25, 2)
    np.testing.assert_array_equal(task.given_TxYxXx3[:25:3], W)
    # Where a group holds no known frame, it comes from noise; where one or two, from the blend at `strength`.
    apart = laid(dataclasses.replace(ALL_TASKS["interpolate"], factor=8))
    start_g = apart.level_Kxg[0]
    np.testing.assert_array_equal(start_g, [0, *[1, np.float32(0.6)] * 8])


def test_patches_of_a_timeline_see_the_prompt_of_their_time():
    """Packed among others: by the tokens that bear their prompt's number."""
    layout = layout_of(tiny_config())
    three = Request("", 24, 16, 17, 8.0, task="timeline", timeline=((0, "a"), (0.5, "b c"), (1.9, "d e f")))
    tasks = [laid(ALL_TASKS["timeline"]), laid(ALL_TASKS["text"]), laid(three)]
    batch, places = pack([[task.piece for task in tasks]], 128, 32, 32)
    expected = [{0: "a b", 0.5: "c d e", 1.0: "c d e"}, dict.fromkeys((0, 0.5, 1.0), "a")]
    expected += [{0: "a", 0.5: "b c", 1.0: "b c", 1.5: "b c", 2.0: "d e f"}]
    p, numbers = batch.patches, set()
    for (_, offset, count), prompts in zip(places[0], expected, strict=True):
        for n in range(offset, offset + count):
            tokens = batch.ids_BxSxK[0, batch.prompt_BxS[0] == p.prompt_BxN[0, n]]
            np.testing.assert_array_equal(tokens, layout.tokenise(prompts[float(p.pos_BxNx3[0, n, 0])]))
        numbers |= set(p.prompt_BxN[0, offset : offset + count])
    assert len(numbers) == 6 and 0 not in numbers


def test_the_nearest_timeline_can_be_laid_out():
    """What the error suggests: other times, or as many frames as there are prompts for."""
    rng, refused = np.random.default_rng(0), collections.Counter()
    for _ in range(60):
        times = np.cumsum([0, *rng.uniform(0.05, 0.7, rng.integers(5))])
        request = Request("", 24, 16, 1 + 4 * rng.integers(1, 5), task="timeline")
        for attempt in range(3):
            try:
                laid(dataclasses.replace(request, timeline=tuple((t, "a") for t in times)))
                break
            except ValueError as error:
                nearest = str(error).split("Nearest: ")[1]
            refused[attempt, nearest.split("=")[0] == "frames"] += 1
            if nearest.startswith("frames="):
                request = dataclasses.replace(request, frames=int(nearest[7:-1]))
            else:
                times = np.array([float(t) for t in nearest.split(" s")[0].split(",")])
        else:
            pytest.fail(f"{request.frames} frames: {times}")
    assert refused[0, True] > 5 and refused[0, False] > 5 and refused[2, True] + refused[2, False] == 0


# Roll-outs


def test_a_roll_out_is_a_staircase_that_moves_along():
    """With a solver that writes each frame's index where its latent frame's level reaches 0.

    The frames come out in order, once each; every latent frame comes down over as many chunks as are active, from its
    own noise; what is clean stays; a window's first frame is a picture of the last frame before; no shape changes.
    """
    layout = layout_of(tiny_config())
    requests = {
        0: Request("a", 24, 16, 42, task="rollout", seed=3),
        1: Request("b", 16, 16, 7, task="rollout", window=17),
    }
    rolled = {i: start_rollout(r, layout) for i, r in requests.items()}
    seen, chunks = [], collections.Counter()

    def solve(tasks):
        out = {}
        for i, task in tasks.items():
            chunk = chunks[i]
            first, levels = max(0, chunk - (3 if i == 0 else 4)), task.level_Kxg
            latents = unpatchify(task.piece.x_nxP, task.grid).copy()
            T, Y, X = task.grid.shape
            frames = np.arange(4 * first, 4 * (first + T) - 3, dtype=np.uint8)
            clean = layout.codec.encode(
                to_float(np.broadcast_to(frames[:, None, None, None], (*frames.shape, 8 * Y, 8 * X, 3)))
            )
            assert (np.diff(levels, axis=0) <= 0).all() and (np.diff(levels, axis=1) >= 0).all()
            seen.append((i, levels.shape, task.piece.x_nxP.shape))
            for w, (begin, end) in enumerate(zip(levels[0], levels[-1])):
                active = 2 if i == 0 else 3
                assert begin == pytest.approx(np.clip(1 - (chunk - first - w) / active, 0, 1), abs=1e-6)
                assert end == pytest.approx(np.clip(1 - (chunk + 1 - first - w) / active, 0, 1), abs=1e-6)
                if begin == 0:
                    np.testing.assert_array_equal(latents[w], clean[w])
                elif begin == 1:
                    noise = np.random.default_rng((requests[i].seed, first + w)).standard_normal(
                        latents[w].shape, np.float32
                    )
                    np.testing.assert_array_equal(latents[w], noise)
                    fresh.add((i, first + w))
                if end == 0:
                    latents[w] = clean[w]
            out[i] = latents
            chunks[i] += 1
        return out

    fresh = set()
    videos = generate._roll_out(requests, rolled, layout, uniform_levels(7), 7, solve)
    assert [len(videos[i]) for i in (0, 1)] == [42, 7]
    for video in videos.values():
        np.testing.assert_array_equal(video[:, 0, 0, 0], np.arange(len(video)))
        assert (video == video[:, :1, :1, :1]).all()
    assert len({found for found in seen if found[0] == 0}) == len({found for found in seen if found[0] == 1}) == 1
    assert {t for i, t in fresh if i == 0} >= set(range(12))


# What is refused


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("forward", {"new_frames": 0}, "new_frames=0: give 1 frame at least"),
        ("forward", {"context": 0}, "context=0: give 1 frame at least"),
        ("forward", {"direction": "up"}, "direction='up' is not known. Allowed: 'forward', 'backward'"),
        ("forward", {"videos": ()}, "task='extend' takes 1 videos; 0 are given"),
        ("forward", {"videos": (V / 255,)}, r"a video is float64 \(10, 16, 24, 3\); give uint8"),
        ("forward", {"width": 32}, r"the video is 24x16 and the clip 32x16 \(WIDTHxHEIGHT\)"),
        ("forward", {"width": 20}, "width=20 .*Nearest: 16 or 24"),
        ("backward", {"videos": (V[:3],)}, r"backward needs 4 known frames .*; the video has 3. Nearest: 4"),
        ("connect", {"videos": (V, video_of(9, 32))}, "the videos are 24x16 and 32x16 .*: resize one"),
        ("connect", {"videos": (V, W[:5])}, "new_frames=6, the 5 frames .* Give 6 of them at least, or new_frames=8"),
        ("connect", {"videos": (V, W[:1]), "new_frames": 8}, r"the 1 frames .* Give 4 of them at least\.$"),
        ("loop", {"videos": (V[:2],)}, "new_frames=6 needs a video of 6 frames, .*, and this has 2. Nearest: 6"),
        ("in-painting", {"mask_TxYxX": None}, "painting needs a mask, or a size larger than the video's 24x16"),
        ("in-painting", {"mask_TxYxX": MASK[:, :8]}, "the mask is 24x8 and the video 24x16 .*: give a mask of 24x16"),
        ("in-painting", {"mask_TxYxX": np.repeat(MASK, 9, 0)}, "the mask has 9 frames and the video 10: give 10, or 1"),
        ("in-painting", {"mask_TxYxX": MASK.astype(float)}, "the mask is float64 .*; give bool"),
        ("in-painting", {"mask_TxYxX": 0 * MASK > 0}, "white.* nowhere, so that nothing is made anew. Give"),
        ("masked edit", {"mask_TxYxX": MASK >= 0}, "white.* everywhere, so that nothing of the video is known. Give"),
        ("both", {"mask_TxYxX": MASK >= 0}, "white.* everywhere, so that nothing of the video is known. Give"),
        ("out-painting", {"height": 8}, "the video is 24x16 and the clip 40x8 .*or a larger one"),
        ("edit", {"strength": 0.0}, "strength=0.0 is no level to start from. Choose above 0, and 1 at most"),
        ("interpolate", {"factor": 2**0.5 * 10}, "factor=14.1421 is no fraction p/q .*up to 16. Nearest: 14."),
        ("interpolate", {"videos": (V[:1],)}, "the video has 1 frames .*2 frames at least"),
        ("timeline", {"timeline": ((1, "a"),)}, r"times are \[1.0\] s: they must start at 0 and ascend"),
        ("timeline", {"timeline": ((0, "a"), (3, "b"))}, "at 3 s is seen by nothing: frames=9 .*Nearest: 0, 1 s, or"),
        ("timeline", {"timeline": ((0, "a"), (0.1, "b"), (0.2, "c"))}, "at 0.1 s is seen .*Nearest: 0, 0.5, 1 s, or"),
        ("timeline", {"timeline": ((0, "a"), (0.4, "b"), (1, "c"), (2, "d"))}, "at 2 s is seen .*Nearest: frames=17"),
        ("timeline", {"frames": 10}, "frames=10 .*Nearest: 9 or 13"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_laid_out_are_refused(name, changes, says):
    """Naming the value, the limit and the nearest that can be."""
    with pytest.raises(ValueError, match=says):
        laid(dataclasses.replace(ALL_TASKS[name], **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": 12}, r"window=12 must be 1 \+ 4k frames .*, 9 or more. Nearest: 13"),
        ({"window": 5}, "window=5 must be .*, 9 or more. Nearest: 9"),
        ({"window": 9, "context": 9}, "window=9 must be more than context=9. Nearest: 13"),
        ({"context": -5}, "context=-5: give 1 frame at least"),
        ({"context": 8}, r"context=8 must be 1 \+ 4k frames \(the codec's stride\). Nearest: 5 or 9"),
        ({"frames": 0}, "frames=0: a roll-out makes 1 frame at least"),
        ({"task": "dream"}, "task='dream' is not known. Allowed: 'text', .*'rollout'"),
    ],
)
def test_roll_outs_that_cannot_be_laid_out_are_refused(changes, says, trained):
    with pytest.raises(ValueError, match=says):
        generate.sample([Request("a", 24, 16, **{"task": "rollout", "frames": 40} | changes)], trained)


# Samples


@pytest.fixture(scope="module")
def packed(trained):
    """All four requests in one row."""
    return generate.sample(REQUESTS, trained)


def levels_apart(videos, others):
    """The greatest difference of two lists of videos, in levels of 255."""
    return max(np.abs(a.astype(int) - b).max() for a, b in zip(videos, others, strict=True))


def test_samples_have_the_sizes_asked_for(packed):
    for request, video in zip(REQUESTS, packed, strict=True):
        assert video.shape == (request.frames, request.height, request.width, 3) and video.dtype == np.uint8
        assert video.std() > 20  # random weights give no constant, and not all is clipped
        assert ((video > 0) & (video < 255)).mean() > 0.5


@pytest.fixture(scope="module")
def answers(trained):
    """Every task's answer, from one row of all of them; a loop from a prompt, and two roll-outs."""
    more = [Request("a", 24, 16, 9, task="loop", seed=1), Request("a", 24, 16, 22, task="rollout")]
    found = generate.sample([*ALL_TASKS.values(), *more], trained)
    return dict(zip([*ALL_TASKS, "loop from a prompt", "rollout"], found, strict=True))


@pytest.mark.parametrize("name", ALL_TASKS)
def test_known_pixels_come_back_bit_for_bit(name, answers):
    """And the rest is made by the model, not left as it was laid out."""
    assert made_by(name, answers[name]).std() > 20


def test_a_prompt_alone_is_looped(trained, answers):
    """As the video of that prompt and seed is."""
    request = Request("a", 24, 16, 9, seed=1)
    assert answers["loop from a prompt"].shape == (17, 16, 24, 3)
    (video,) = generate.sample([request], trained)
    assert levels_apart([answers["loop from a prompt"][:9]], [video]) <= 1
    assert answers["rollout"].shape == (22, 16, 24, 3) and answers["rollout"].std((1, 2, 3)).min() > 10


def test_a_roll_out_is_the_same_beside_one_of_another_window(trained, answers):
    """As fine a staircase alone as packed."""
    wide = Request("b", 16, 16, 22, task="rollout", window=17)
    found = generate.sample([wide, Request("a", 24, 16, 22, task="rollout")], trained)
    assert levels_apart([found[1]], [answers["rollout"]]) <= 1
    assert levels_apart([found[0]], generate.sample([wide], trained)) <= 1


def test_guidance_by_what_is_known_leaves_it_as_it_is(trained, answers):
    """And moves what is made beside it."""
    (found,) = generate.sample([ALL_TASKS["forward"]], trained, history=3.0)
    moved = np.abs(made_by("forward", found).astype(int) - made_by("forward", answers["forward"]))
    assert moved.max() > 5  # where rounding moves by one
    # At a scale of 0 nothing of it is seen.
    others = [dataclasses.replace(ALL_TASKS["forward"], videos=(v,)) for v in (V, video_of(10, seed=5))]
    unseen = [generate.sample([dataclasses.replace(r, history=0.0)], trained, history=2.0)[0][10:] for r in others]
    assert levels_apart(unseen[:1], unseen[1:]) <= 1
    assert levels_apart([found[10:]], [generate.sample(others[1:], trained, history=3.0)[0][10:]]) > 20
    # By the config of what is given alone, a roll-out not; --history of all.
    config = trained.config.copy_and_resolve_references()
    config.sample.history_given = 3.0
    rolled = Request("a", 24, 16, 22, task="rollout")
    other = dataclasses.replace(trained, config=config)
    by_config = generate.sample([ALL_TASKS["forward"], VIDEO, rolled], other)
    plain = generate.sample([VIDEO], trained)[0]
    assert levels_apart(by_config, [found, plain, answers["rollout"]]) <= 1
    (asked,) = generate.sample([ALL_TASKS["forward"]], other, history=1.0)
    assert levels_apart([asked], [answers["forward"]]) <= 1
    (all_of_it,) = generate.sample([rolled], trained, history=3.0)
    assert levels_apart([all_of_it], [answers["rollout"]]) > 20


def test_a_timeline_of_one_prompt_is_that_prompt(trained, answers):
    """And a change of what comes later changes what comes later most."""
    at = lambda *prompts: Request("", 24, 16, 9, task="timeline", timeline=tuple(zip((0.0, 0.5), prompts)))
    text = Request("a red circle", 24, 16, 9)
    same, other, plain = generate.sample([at("a red circle", "a red circle"), at("a red circle", "b"), text], trained)
    assert levels_apart([same], [plain]) <= 1
    assert levels_apart([other[1:]], [plain[1:]]) > 20


def test_an_animated_image_comes_back_bit_for_bit(packed):
    """And of one frame, it is all there is."""
    np.testing.assert_array_equal(packed[2][0], IMAGE)
    assert levels_apart([packed[2][1:]], [np.repeat(IMAGE[None], 4, 0)]) > 50
    np.testing.assert_array_equal(packed[3], IMAGE[None])


def test_a_sample_is_the_same_alone_as_packed(trained, packed):
    """Up to the rounding of floats where shapes differ, which is less than a level."""
    alone = [generate.sample([request], trained)[0] for request in REQUESTS[:3]]
    assert levels_apart(packed[:3], alone) <= 1
    assert np.mean([np.mean(a != b) for a, b in zip(packed, alone)]) < 1e-3


def test_order_and_rows_change_nothing(trained, packed):
    """The other way round, after as many rows of others as are sampled at once."""
    others = [dataclasses.replace(PICTURE, width=64, height=64, seed=i) for i in range(trained.config.data.rows)]
    found = generate.sample([*others, *REQUESTS[::-1]], trained, row=64)
    assert levels_apart(found[: -len(REQUESTS) - 1 : -1], packed) <= 1


def test_neighbours_change_nothing_bit_for_bit(trained, packed):
    """Within one layout: another seed, other words and another scale of guidance of the clip between them."""
    other = dataclasses.replace(PICTURE, prompt="a picture of a red square", seed=9, guidance=5.0)
    found = generate.sample([VIDEO, other, ANIMATION, STILL], trained)
    np.testing.assert_array_equal(found[0], packed[0])
    np.testing.assert_array_equal(found[2], packed[2])
    assert levels_apart(found[1:2], packed[1:2]) > 50


def test_prompts_seeds_and_guidance_reach_the_sample(trained, packed):
    """Each by itself, in the same layout."""
    for change in ({"prompt": "a picture of a red square"}, {"seed": 9}, {"guidance": 5.0}):
        found = generate.sample([VIDEO, dataclasses.replace(PICTURE, **change), ANIMATION, STILL], trained)
        assert levels_apart(found[1:2], packed[1:2]) > 20, change


def test_what_is_given_has_a_guidance_of_its_own(trained, packed, answers):
    """By the config, where the request has none and the caller asks for none; also where a made loop is closed."""
    config = trained.config.copy_and_resolve_references()
    config.sample.guidance_given = 5.0
    other = dataclasses.replace(trained, config=config)
    loop = Request("a", 24, 16, 9, task="loop", seed=1)
    found = generate.sample([VIDEO, PICTURE, ANIMATION, dataclasses.replace(ANIMATION, guidance=2.0), loop], other)
    (guided,) = generate.sample([dataclasses.replace(ANIMATION, guidance=5.0)], trained)
    assert levels_apart([*found[:2], found[2], found[3]], [*packed[:2], guided, packed[2]]) <= 1
    assert levels_apart([found[2]], [packed[2]]) > 20
    assert levels_apart([found[4][:9]], [answers["loop from a prompt"][:9]]) <= 1
    assert levels_apart([found[4]], [answers["loop from a prompt"]]) > 20
    (asked,) = generate.sample([ANIMATION], other, guidance=2.0)
    assert levels_apart([asked], [packed[2]]) <= 1


def test_a_scale_of_one_is_no_guidance(trained):
    """Whether no request of the batch is guided, or another is."""
    plain = [dataclasses.replace(r, guidance=1.0) for r in REQUESTS]
    without = generate.sample(plain, trained)
    beside = generate.sample([plain[0], dataclasses.replace(PICTURE, guidance=5.0), *plain[2:]], trained)
    assert levels_apart([beside[0], *beside[2:]], [without[0], *without[2:]]) <= 1
    assert levels_apart(beside[1:2], without[1:2]) > 20


def test_long_videos_in_parts_are_made_alone_as_beside_others(trained, packed):
    """Each part after what it sees is made; requests with more parts than others go on alone."""
    long = video_of(21)
    requests = [
        Request("a", 24, 16, task="extend", videos=(long,), new_frames=7, window=9),
        Request("b", 24, 16, task="edit", videos=(long,), window=9),
        Request("c", 24, 16, task="interpolate", videos=(long[:7],), factor=2, fps=16.0, window=9),
    ]
    found = generate.sample([VIDEO, *requests], trained)
    assert [len(video) for video in found] == [9, 28, 21, 13]
    assert levels_apart(found[:1], packed[:1]) <= 1
    for request, video in zip(requests, found[1:]):
        assert levels_apart(generate.sample([request], trained), [video]) <= 1
    np.testing.assert_array_equal(found[1][:21], long)
    np.testing.assert_array_equal(found[3][::2], long[:7])


def test_devices_change_nothing(trained, packed):
    """Eight, each with rows of its own, and more rows than fit at once."""
    mesh = make_mesh(trained.config.mesh)
    assert mesh.size == 8
    many = [dataclasses.replace(VIDEO, seed=seed) for seed in range(40)]
    found = generate.sample([*many, *REQUESTS], trained, mesh, row=64)
    assert levels_apart([*found[40:], found[VIDEO.seed]], [*packed, packed[0]]) <= 1
    assert len({video.tobytes() for video in found[:40]}) == 40


def test_what_cannot_be_sampled_is_refused(trained):
    with pytest.raises(ValueError, match=r"settings \['stepz'\] are not known. Allowed: .*'steps'"):
        generate.sample([VIDEO], trained, stepz=3)
    with pytest.raises(ValueError, match="width=20 .*Nearest: 16 or 24"):
        generate.sample([VIDEO, dataclasses.replace(PICTURE, width=20)], trained)
    with pytest.raises(ValueError, match="solver='rk4'"):
        generate.sample([VIDEO], trained, solver="rk4")
    with pytest.raises(ValueError, match="steps=0"):
        generate.sample([VIDEO], trained, steps=0)
    assert generate.sample([], trained) == []
