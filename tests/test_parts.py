"""Videos longer than what a model was trained on, in parts: whatever these make, what is given stays bit for bit."""

import dataclasses

import numpy as np
import pytest

from dit_video.canvas import Layout, Request, finish
from dit_video.codecs import Pixels
from dit_video.parts import in_parts
from dit_video.sampling import uniform_levels
from dit_video.tasks import TASKS, task_of

LAYOUT = Layout(Pixels((4, 1, 1)), (1, 8, 8), lambda text: np.zeros((1, 1), np.int32), longest=13)
NEW = 7  # of no given pixel


def video_of(frames, seed=0):
    return np.random.default_rng(seed).integers(8, 256, (frames, 16, 24, 3)).astype(np.uint8)


def mask_of(start, end, frames=30):
    """A mask of a corner in the frames from start to end."""
    mask_TxYxX = np.zeros((frames, 16, 24), bool)
    mask_TxYxX[start:end, 3:9, 9:20] = True
    return mask_TxYxX


def answer(request, made=NEW):
    """(answer, parts as they were laid out): part k decodes to a clip of one value, `made` + k % 2."""
    parts, tasks, videos = in_parts(request, LAYOUT), [], None
    while True:
        try:
            asked, videos = parts.send(videos), []
        except StopIteration as stop:
            return stop.value, tasks
        for part in asked:
            task = TASKS[task_of(part)](part, LAYOUT, uniform_levels(2))
            videos.append(finish(task, np.full(task.given_TxYxXx3.shape, made + len(tasks) % 2, np.uint8)))
            tasks.append(task)


V = video_of(30)
GIVEN = Request("a", 24, 16, videos=(V,))
LONG = {
    "forward": {"task": "extend", "new_frames": 20},
    "forward in sight of 9": {"task": "extend", "new_frames": 9, "context": 9},
    "backward": {"task": "extend", "new_frames": 21, "direction": "backward"},
    "connect": {"task": "connect", "videos": (V, video_of(11, 1)), "new_frames": 4},
    "paint the middle": {"task": "paint", "mask_TxYxX": mask_of(11, 17)},
    "paint the beginning": {"task": "paint", "mask_TxYxX": mask_of(0, 19)},
    "paint the end": {"task": "paint", "mask_TxYxX": mask_of(14, 30)},
    "paint here and there": {"task": "paint", "mask_TxYxX": mask_of(2, 3) | mask_of(9, 10) | mask_of(21, 29)},
    "paint all along": {"task": "paint", "mask_TxYxX": mask_of(0, 1, 1)},
    "paint around": {"task": "paint", "width": 40},
    "edit": {"task": "edit"},
    "edit in a mask": {"task": "edit", "mask_TxYxX": mask_of(6, 28)},
    "interpolate": {"task": "interpolate", "factor": 4, "fps": 32.0},
    "frame rate": {"task": "interpolate", "factor": 1.5, "fps": 12.0},
}


def expected(r):
    """The answer's frames, NaN where they are made."""
    if r.task == "extend":
        new = np.full((r.new_frames, 16, 24, 3), np.nan)
        return np.concatenate([V, new] if r.direction == "forward" else [new, V])
    if r.task == "connect":
        return np.concatenate([V, np.full((r.new_frames, 16, 24, 3), np.nan), r.videos[1]])
    if r.task == "interpolate":
        p, q = (4, 1) if r.factor == 4 else (3, 2)
        fine = np.full((29 * p + 1, 16, 24, 3), np.nan)
        fine[::p] = V
        return fine[::q]
    made = np.full((30, r.height, r.width, 3), np.nan)
    x = (r.width - 24) // 2
    known = ~np.broadcast_to(r.mask_TxYxX, (30, 16, 24)) if r.mask_TxYxX is not None else np.full((30, 16, 24), x > 0)
    made[:, :, x : x + 24][known] = V[known]
    return made


@pytest.mark.parametrize("name", LONG)
def test_what_is_given_is_put_back_and_only_that(name):
    request = dataclasses.replace(GIVEN, **LONG[name])
    found, tasks = answer(request)
    wanted = expected(request)
    assert found.shape == wanted.shape and found.dtype == np.uint8
    known = ~np.isnan(wanted)
    np.testing.assert_array_equal(found[known], wanted[known])
    assert np.isin(found[~known], [NEW, NEW + 1]).all()
    # Nothing is laid out at once that is much longer than what the model knows.
    lengths = [len(task.known_TxYxX) for task in tasks]
    assert max(lengths) <= (17 if request.task in ("paint", "edit") or request.context else 13)
    assert (len(tasks) > 1) == (name not in ("connect", "paint the middle"))
    fps = {"interpolate": 32, "frame rate": 24}.get(name, 8)  # at which frames are laid out
    for task in tasks:
        np.testing.assert_allclose(np.diff(np.unique(task.piece.pos_nx3[:, 0])), 4 / fps)


@pytest.mark.parametrize("name", [name for name in LONG if name not in ("connect", "interpolate", "frame rate")])
def test_each_part_sees_what_those_before_it_made(name):
    """But for what lies too far away to see; and each has noise of its own."""
    request = dataclasses.replace(GIVEN, **LONG[name])
    _, tasks = answer(request)
    for k, task in enumerate(tasks[1:], start=1):
        seen = task.given_TxYxXx3[task.known_TxYxX]
        made = np.isin(seen, [NEW, NEW + 1])
        assert made.any() or name == "paint here and there", k
        new_n, first_n = (t.level_Kxg[0, t.piece.group_n] > 0 for t in (task, tasks[k - 1]))
        alike = new_n[-18:] & first_n[-18:] if len(new_n) != len(first_n) else new_n & first_n
        x, before = (t.piece.x_nxP[-len(alike) :][alike] for t in (task, tasks[k - 1]))
        assert alike.any() and not (x == before).all(1).any()


def test_what_is_hidden_between_is_seen_from_both_sides():
    """Whole groups of the codec's stride before the hidden frames and after them are known, wherever they lie."""
    for start in range(5, 20):
        for hidden in range(1, 9):
            request = dataclasses.replace(GIVEN, task="paint", mask_TxYxX=mask_of(start, start + hidden, 40))
            request = dataclasses.replace(request, videos=(video_of(40),))
            _, (task,) = answer(request)
            known_t = (task.level_Kxg[0, task.piece.group_n] == 0).reshape(task.grid.shape).all((1, 2))
            assert known_t[:2].all() and known_t[-1] and not known_t.all()
            assert (~known_t).sum() == -(-hidden // 4)


@pytest.mark.parametrize("seed", range(20))
def test_any_mask_is_painted(seed):
    """Whatever frames it touches: each is made once, and the rest is the video's."""
    rng = np.random.default_rng(seed)
    frames = int(rng.integers(14, 60))
    touched_F = np.repeat(rng.random(frames) < rng.choice([0.1, 0.5, 0.9]), rng.integers(1, 12))[:frames]
    if not touched_F.any():
        touched_F[int(rng.integers(frames))] = True
    mask_TxYxX = touched_F[:, None, None] & mask_of(0, 1, 1)
    video = video_of(frames, seed)
    task = rng.choice(["paint", "edit"])
    found, tasks = answer(Request("a", 24, 16, task=str(task), videos=(video,), mask_TxYxX=mask_TxYxX))
    np.testing.assert_array_equal(found[~mask_TxYxX], video[~mask_TxYxX])
    assert np.isin(found[mask_TxYxX], [NEW, NEW + 1]).all()
    assert len(tasks) <= touched_F.sum()


def test_what_fits_is_one_part_and_as_it_was_asked_for():
    """Up to the window; one that is asked for holds in place of the model's own."""
    short = {"extend": {"new_frames": 4}, "paint": {"mask_TxYxX": mask_of(0, 1, 1)}, "edit": {}}
    short["interpolate"] = {"videos": (video_of(4),), "factor": 4, "fps": 32.0}
    for task, changes in short.items():
        request = dataclasses.replace(GIVEN, **({"videos": (video_of(9),), "task": task} | changes))
        assert next(in_parts(request, LAYOUT)) == [request]
    whole = dataclasses.replace(GIVEN, task="edit", window=33)
    assert next(in_parts(whole, LAYOUT)) == [whole]
    for window, nearest in ((12, 13), (5, 9), (14, 17)):
        with pytest.raises(
            ValueError, match=rf"window={window} must be 1 \+ 4k frames .*, 9 or more. Nearest: {nearest}"
        ):
            next(in_parts(dataclasses.replace(whole, window=window), LAYOUT))


def test_as_much_is_seen_as_fits():
    """Of a long video the model sees no more than it was trained on; `context` says otherwise."""
    for new, direction, wanted in ((4, "forward", 9), (8, "forward", 5), (4, "backward", 8), (2, "backward", 8)):
        request = dataclasses.replace(GIVEN, task="extend", new_frames=new, direction=direction)
        assert answer(request)[1][0].known_TxYxX.any((1, 2)).sum() == wanted
    _, (task,) = answer(dataclasses.replace(GIVEN, task="extend", new_frames=4, context=29))
    assert task.known_TxYxX.any((1, 2)).sum() == 29
    both = dataclasses.replace(GIVEN, task="connect", videos=(V, V), new_frames=4)
    _, (task,) = answer(both)
    assert task.known_TxYxX.any((1, 2)).sum() == 5 + 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "paint", "mask_TxYxX": mask_of(0, 0)}, "white.* nowhere, so that nothing is made anew"),
        ({"task": "paint"}, "white.* nowhere, so that nothing is made anew"),
        ({"task": "edit", "mask_TxYxX": mask_of(0, 0)}, "white.* nowhere, so that nothing is made anew"),
        ({"task": "edit", "mask_TxYxX": np.ones((30, 16, 24), bool)}, "white.* everywhere, so that nothing"),
        ({"task": "interpolate", "factor": 2.7, "fps": 8.0}, "factor=2.7 is no fraction .*Nearest: 2.667"),
    ],
)
def test_what_cannot_be_asked_of_a_long_video(fields, message):
    """Is refused in the words that a short one is, of what was given."""
    with pytest.raises(ValueError, match=message):
        answer(dataclasses.replace(GIVEN, **fields))


def test_a_loop_from_a_prompt_is_closed_after_it_was_made():
    found, tasks = answer(Request("a", 24, 16, 9, task="loop", new_frames=4))
    assert len(tasks) == 2 and (found[:9] == NEW).all() and (found[9:] == NEW + 1).all()
