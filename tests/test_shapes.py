"""The embedded world: what its clips promise, and that the scorer reads them back."""

import collections
import itertools
import pickle

import numpy as np
import pytest

from dit_video.data import shapes
from dit_video.data.shapes import Background, Label, Object, Scene, ShapesSource
from dit_video.evaluation.following import Followed, chance, followed
from dit_video.evaluation.scorer import Reading, score

LABELS = [Label(*x) for x in itertools.product(shapes.SHAPES, shapes.COLOURS, shapes.MOTIONS)]
# Radius and amplitude by number of objects, in short sides: the rule that makes an orbit follow from its caption.
RADIUS, AMPLITUDE = {1: 0.20, 2: 0.14, "large": 0.26}, {1: 0.26, 2: 0.17, "large": 0.20}
BLACK = Background(0.0, (0.0, 0.0, 0.0), 0.0, 0.0, "waves", 0.0, 1.0, 0.0, (0.0, 0.0))


def offset(motion, angle):
    """(y, x) of an orbit of amplitude 1, y down, written out from the words."""
    s, c = np.sin(angle), np.cos(angle)
    return {
        "left-right": (0 * s, s),
        "up-down": (s, 0 * s),
        "rising": (-s / 2**0.5, s / 2**0.5),
        "falling": (s / 2**0.5, s / 2**0.5),
        "clockwise": (s, c),  # y down: from the right towards the bottom
        "counterclockwise": (-s, c),
    }[motion]


def any_scene(seed, size=None, pool=LABELS):
    rng, large = np.random.default_rng(seed), size == "large"
    return shapes.draw_scene(rng, shapes.draw_labels(rng, 1 if large else size or 1 + seed % 2, pool), large)


def blurred(video_TxYxXx3, sigma):
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    video = video_TxYxXx3.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(video, [(4, 4) if a == axis else (0, 0) for a in range(4)], mode="edge")
        size = video.shape[axis]
        video = sum(w * np.take(padded, np.arange(i, i + size), axis) for i, w in enumerate(kernel))
    return video


def to_pixels(video):
    return np.clip(np.rint(video), 0, 255).astype(np.uint8)


# The world


@pytest.mark.parametrize("size", [1, 2, "large"])
@pytest.mark.parametrize("motion", shapes.MOTIONS)
def test_orbits_are_what_the_caption_says(motion, size):
    """Any path is its centre plus its motion of the stated amplitude and period 1.6 s, for all real times."""
    scene = any_scene(5, size, [x for x in LABELS if x.motion == motion])
    time_T = np.linspace(-7.0, 50.0, 400)
    path_TxKx2 = shapes.centres(scene, time_T, 40, 64)
    np.testing.assert_allclose(path_TxKx2, shapes.centres(scene, time_T + 1.6, 40, 64), atol=1e-9)
    for k, o in enumerate(scene.objects):
        moved_Tx2 = AMPLITUDE[size] * 40 * np.stack(offset(motion, 2 * np.pi * time_T / 1.6 + o.phase), -1)
        centre_Tx2 = path_TxKx2[:, k] - moved_Tx2
        np.testing.assert_allclose(centre_Tx2, np.broadcast_to(centre_Tx2[:1], centre_Tx2.shape), atol=1e-9)


def test_nothing_jumps():
    """No pixel changes much within a millisecond, also across the end of a period."""
    for seed in range(20):
        scene = any_scene(seed)
        time_T = np.linspace(1.59, 1.61, 21)
        video = shapes.render(scene, time_T, 32, 48).astype(int)
        assert np.abs(np.diff(video, axis=0)).max() <= 16


@pytest.mark.parametrize("size", [1, "large"])
def test_objects_stay_inside_every_canvas(size):
    """A shape shows its whole area at every time and on every canvas: nothing is cut off or covered."""
    area = collections.defaultdict(list)
    time_T = np.linspace(0, 1.6, 24)
    for seed, (width, height) in itertools.product(range(60), [*shapes.CANVASES, (50, 90)]):
        scene = any_scene(seed, size)
        label = scene.objects[0]
        # An edge position is the worst case of a centre.
        corner = tuple(np.round(label.centre_yx))
        for centre_yx in (label.centre_yx, corner):
            o = Object(label.shape, "red", label.motion, centre_yx, label.phase)
            red_TxYxX = shapes.render(Scene((o,), BLACK, scene.large), time_T, height, width)[..., 0]
            area[label.shape].extend(red_TxYxX.sum((1, 2)) / min(height, width) ** 2)
    for values in area.values():
        assert len(values) > 1000
        assert np.ptp(values) / np.mean(values) < 0.03


def test_pairs_never_overlap():
    time_T = np.linspace(0, 1.6, 32)
    for seed in range(1, 81, 2):
        scene = any_scene(seed, 2)
        assert scene.objects[0].colour != scene.objects[1].colour
        for width, height in shapes.CANVASES:
            assert shapes.visibility(scene, time_T, height, width).min() > 0.999


def test_visibility_and_painters_order():
    """The last object is in front; the share of the one behind is what is left of its pixels."""
    square = Object("square", "red", "left-right", (0.5, 0.5), 0.0)
    front = Object("square", "blue", "left-right", (0.5, 0.5), np.pi)
    scene = Scene((square, front), BLACK)
    # At a quarter period they are two amplitudes apart; their side is 1.76 radii.
    side, apart = 1.76 * RADIUS[2], 2 * AMPLITUDE[2]
    time_T = np.array([0.0, 0.4, 0.02])
    visible_TxK = shapes.visibility(scene, time_T, 100, 100)
    away_T = apart * np.sin(2 * np.pi * time_T / 1.6)
    np.testing.assert_allclose(visible_TxK[:, 0], np.clip(away_T / side, 0, 1), atol=0.05)  # soft edges
    np.testing.assert_array_equal(visible_TxK[:, 1], 1)
    assert tuple(shapes.render(scene, [0.0], 100, 100)[0, 50, 50]) == shapes.COLOURS["blue"]


def test_backgrounds_are_grey_and_still():
    for seed in range(60):
        background = any_scene(seed).background
        scene = Scene((Object("circle", "red", "up-down", (0.5, 0.0), 0.0),), background)
        video = shapes.render(scene, [0.0, 0.3, 0.9], 64, 32).astype(int)
        right_TxYx3 = video[:, :, -4:]  # where the circle never is
        assert np.array_equal(right_TxYx3[0], right_TxYx3[2])
        assert np.ptp(right_TxYx3, axis=-1).max() < 40
    assert min(np.ptp(rgb) for rgb in shapes.COLOURS.values()) > 120


def test_source_is_deterministic():
    """A clip hangs on (seed, split, index) alone; layout() and scene() tell of the same clip."""
    source = ShapesSource(3)
    late_first = [source[i] for i in (17, 4, 0)][::-1]
    copy = pickle.loads(pickle.dumps(source))
    for i, clip in zip((0, 4, 17), late_first, strict=True):
        again = copy[i]
        assert np.array_equal(clip.video_TxYxXx3, again.video_TxYxXx3) and np.array_equal(clip.time_T, again.time_T)
        assert (clip.caption, clip.uid) == (again.caption, again.uid)
        assert clip.video_TxYxXx3.dtype == np.uint8 and clip.time_T.dtype == np.float32 and clip.time_T[0] == 0
        frames, height, width, text = source.layout(i)
        assert clip.video_TxYxXx3.shape == (frames, height, width, 3) and clip.caption == text
        redrawn = shapes.render(source.scene(i), clip.time_T, height, width)
        assert np.array_equal(redrawn, clip.video_TxYxXx3)
    streams = [ShapesSource(3), ShapesSource(4), ShapesSource(3, split="validation")]
    scenes = [s.scene(i) for s in streams for i in range(200)]
    assert len(set(scenes)) == len(scenes)
    uids = [s[i].uid for s in streams for i in range(20)]
    assert len(set(uids)) == 60 and max(uids) < 2**32 and max(uids) > 2**31


def test_source_mixture():
    """Shares, canvases and lengths are as stated, and independent of the number of objects."""
    layouts = [ShapesSource(0).layout(i) for i in range(6000)]
    objects = np.array([len(shapes.parse_caption(text)) for *_, text in layouts])
    frames = np.array([x[0] for x in layouts])
    assert abs((objects == 2).mean() - 0.5) < 0.03 and abs((frames == 1).mean() - 0.2) < 0.03
    for count in (1, 2):
        some = [x for x, k in zip(layouts, objects, strict=True) if k == count]
        canvases = collections.Counter((x[2], x[1]) for x in some)
        assert set(canvases) == set(shapes.CANVASES)
        assert max(abs(n / len(some) - 1 / 6) for n in canvases.values()) < 0.03
        for length in (5, 9, 13):
            assert abs(np.mean([x[0] == length for x in some]) - 0.8 / 3) < 0.03
    rates = collections.Counter(
        (len(c.time_T), round(1 / c.time_T[1])) for c in (ShapesSource(0)[i] for i in range(300)) if len(c.time_T) > 1
    )
    assert set(rates) == {(5, 8), (9, 8), (9, 12), (13, 8), (13, 12)}
    easy = [ShapesSource(0, pair_share=0, still_share=1).layout(i) for i in range(50)]
    assert all(x[0] == 1 and " and " not in x[3] for x in easy)


def test_held_out_pairs_are_never_drawn():
    assert len(shapes.HELD_OUT_SHAPES) == 4 and len(shapes.HELD_OUT_MOTIONS) == 6
    drawn = collections.Counter()
    for split in shapes.SPLITS:
        for i in range(3000):
            drawn.update(shapes.parse_caption(ShapesSource(1, split, still_share=0).layout(i)[3]))
            stills = shapes.parse_caption(ShapesSource(1, split, still_share=1).layout(i)[3])
            assert not any((x.shape, x.colour) in shapes.HELD_OUT_SHAPES for x in stills)
    assert not any((x.shape, x.colour) in shapes.HELD_OUT_SHAPES for x in drawn)
    assert not any((x.colour, x.motion) in shapes.HELD_OUT_MOTIONS for x in drawn)
    assert len(drawn) == 4 * 8 * 6 - 4 * 6 - 4 * 6 + 2  # every other combination is drawn (two are held out twice)
    for part, values in (("shape", shapes.SHAPES), ("colour", shapes.COLOURS), ("motion", shapes.MOTIONS)):
        share = collections.Counter(x for label, n in drawn.items() for x in [getattr(label, part)] * n)
        assert min(share[v] for v in values) / drawn.total() > 0.7 / len(values)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_prompts(split):
    listed = shapes.prompts(144, split, seed=2)
    assert listed == shapes.prompts(144, split, seed=2) != shapes.prompts(144, split, seed=3)
    labels = [shapes.parse_caption(p.caption) for p in listed]
    assert all(shapes.held_out(x) == (split == "heldout") and x.motion for two in labels for x in two)
    assert [len(x) for x in labels].count(2) == 72
    for count in (1, 2):
        some = [p for p, x in zip(listed, labels, strict=True) if len(x) == count]
        assert set(collections.Counter((p.width, p.height) for p in some).values()) == {12}
        assert collections.Counter(p.frames for p in some) == {5: 24, 9: 24, 13: 24}
        assert set(collections.Counter((p.width, p.height, p.frames) for p in some).values()) == {4}
        assert len(shapes.parse_caption(shapes.prompts(1, split, objects=count)[0].caption)) == count
    assert {(p.frames, p.fps) for p in listed} == {(5, 8), (9, 8), (9, 12), (13, 8), (13, 12)}


def test_captions_round_trip():
    rng = np.random.default_rng(0)
    pairs = [shapes.draw_labels(rng, 2, LABELS) for _ in range(200)]
    for labels in [*((x,) for x in LABELS), *pairs]:
        assert shapes.parse_caption(shapes.describe(labels, moving=True)) == labels
        still = tuple(x._replace(motion=None) for x in labels)
        assert shapes.parse_caption(shapes.describe(labels, moving=False)) == still
    scene = Scene((Object("cross", "orange", "left-right", (0.5, 0.5), 0.0),), BLACK)
    assert shapes.caption(scene, moving=True) == "an orange cross moves left and right"
    assert shapes.caption(scene, moving=False) == "a picture of an orange cross"


@pytest.mark.parametrize(
    "text", ["", "a red circle", "a red dog circles clockwise", "so a red circle circles clockwise"]
)
def test_other_captions_are_refused(text):
    with pytest.raises(ValueError, match="is not of the shapes world"):
        shapes.parse_caption(text)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="split='test'"):
        ShapesSource(split="test")
    with pytest.raises(ValueError, match="pair_share=1.5"):
        ShapesSource(pair_share=1.5)
    with pytest.raises(ValueError, match="seed=-1"):
        ShapesSource(-1)
    with pytest.raises(IndexError, match="index=-1"):
        ShapesSource()[-1]
    with pytest.raises(ValueError, match="split='validation'"):
        shapes.prompts(1, "validation")
    with pytest.raises(ValueError, match="objects=3"):
        shapes.prompts(1, "train", objects=3)


# The scorer


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_scorer_reads_every_clip(count, large):
    """At least 99% of rendered clips, in all labels of all their objects, on every canvas and for every length."""
    wrong = collections.Counter()
    drawn = collections.Counter()
    for i in range(count):
        clip = ShapesSource(11, large=large)[i]
        found = followed(score(clip.video_TxYxXx3, clip.time_T), clip.caption)
        for kind in (clip.video_TxYxXx3.shape[1:3], len(clip.time_T), "all"):
            drawn[kind] += 1
            wrong[kind] += not found.all
    assert len(drawn) == 6 + 4 + 1
    assert all(wrong[kind] <= 0.01 * n for kind, n in drawn.items()), wrong


@pytest.mark.parametrize("count", [120, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("blur", "noise", "least"), [(0.8, 8, 0.97), (1.2, 16, 0.9)])
def test_scorer_bears_blur_noise_and_ghosts(count, blur, noise, least):
    right = 0
    for i in range(count):
        clip, rng = ShapesSource(12)[i], np.random.default_rng(i)
        ghost = np.roll(clip.video_TxYxXx3, rng.integers(-8, 9, 2), (1, 2))
        video = blurred(0.88 * clip.video_TxYxXx3 + 0.12 * ghost, blur)
        readings = score(to_pixels(video + rng.normal(0, noise, video.shape)), clip.time_T)
        right += followed(readings, clip.caption).all
    assert right >= least * count


def test_labels_can_be_read_from_any_half_second():
    """Five frames at 8 fps from anywhere in the period; the centres read are the true ones."""
    rng = np.random.default_rng(0)
    for seed in range(120):
        scene = any_scene(seed)
        time_T = rng.uniform(0, 1.6) + np.arange(5) / 8
        width, height = shapes.CANVASES[seed // 2 % 6]
        readings = score(shapes.render(scene, time_T, height, width), time_T)
        assert followed(readings, shapes.caption(scene, moving=True)).all
        true_TxKx2 = shapes.centres(scene, time_T, height, width)
        for r in readings:
            k = [o.colour for o in scene.objects].index(r.label.colour)
            assert np.abs(r.centre_Tx2 - true_TxKx2[:, k]).max() < 0.4


@pytest.mark.parametrize("fps", [8, 12])
def test_five_frames_tell_the_whole_orbit(fps):
    """Centre and phase, fitted to what is seen in 5 frames with the amplitude that the rule gives, predict the rest."""
    phase_F = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    worst = []
    for seed in range(60):
        scene = any_scene(seed)
        start, (width, height) = seed % 9, shapes.CANVASES[seed // 2 % 6]
        time_T = np.arange(13) / fps
        seen = slice(start, start + 5)
        readings = score(shapes.render(scene, time_T[seen], height, width), np.arange(5) / fps)
        true_TxKx2 = shapes.centres(scene, time_T, height, width)
        for r in readings:
            (k,) = [k for k, o in enumerate(scene.objects) if o.colour == r.label.colour]
            angle_FxT = phase_F[:, None] + 2 * np.pi * time_T / 1.6
            amplitude = AMPLITUDE[len(readings)] * min(height, width)
            orbit_FxTx2 = amplitude * np.stack(offset(scene.objects[k].motion, angle_FxT), -1)
            centre_Fx1x2 = (r.centre_Tx2 - orbit_FxTx2[:, seen]).mean(1, keepdims=True)
            error_F = ((orbit_FxTx2[:, seen] + centre_Fx1x2 - r.centre_Tx2) ** 2).sum((1, 2))
            best = error_F.argmin()
            worst.append(np.abs(orbit_FxTx2[best] + centre_Fx1x2[best] - true_TxKx2[:, k]).max())
    assert len(worst) == 90
    assert np.quantile(worst, 0.95) < 1.0 and np.median(worst) < 0.3


def test_scorer_sees_nothing_in_noise_and_backgrounds():
    time_T = np.arange(9) / 8
    for seed in range(40):
        rng = np.random.default_rng(seed)
        width, height = shapes.CANVASES[seed % 6]
        white = rng.integers(0, 256, (9, height, width, 3))
        smooth = blurred(rng.normal(size=white.shape), 2)
        circle = Scene((Object("circle", "red", "up-down", (0.5, 0.0), 0.0),), any_scene(seed).background)
        ground = np.tile(shapes.render(circle, time_T, 32, 64)[:, :, -26:], (1, 1, 2, 1))
        for video in (white, 128 + 60 * smooth / smooth.std(), ground, ground + rng.normal(0, 8, ground.shape)):
            assert score(to_pixels(video), time_T) == ()


def test_scorer_asks_for_shape_and_motion():
    """A frozen clip has no motion, frames out of order none either, and two copies of one object are not one object."""
    for seed in range(0, 40, 2):
        scene = any_scene(seed, 1)
        time_T = np.arange(13) / 12
        video = shapes.render(scene, time_T, 32, 64)
        frozen = score(np.repeat(video[:1], 13, 0), time_T)
        shuffled = score(video[np.random.default_rng(seed).permutation(13)], time_T)
        assert [r.label.motion for r in frozen] == ["none"] and [r.label.motion for r in shuffled] == ["none"]
        twice = np.concatenate([video, video], 2)
        for r in score(twice, time_T):
            assert np.isnan(r.centre_Tx2).all() and r.label.motion == "none" and r.label.shape == "none"


@pytest.mark.parametrize(
    ("turn", "swaps"),
    [
        (lambda v: v[::-1], {"clockwise": "counterclockwise"}),
        (lambda v: v[:, :, ::-1], {"clockwise": "counterclockwise", "rising": "falling"}),
        (lambda v: v.swapaxes(1, 2), {"clockwise": "counterclockwise", "left-right": "up-down"}),
    ],
    ids=["backwards", "mirrored", "transposed"],
)
def test_motion_turns_with_the_clip(turn, swaps):
    swaps = swaps | {b: a for a, b in swaps.items()}
    for seed in range(48):
        scene = any_scene(seed, pool=[x for x in LABELS if x.shape != "triangle"])
        time_T = np.arange(9) / 8
        readings = score(turn(shapes.render(scene, time_T, 32, 48)), time_T)
        asked = [Label(o.shape, o.colour, swaps.get(o.motion, o.motion)) for o in scene.objects]
        assert sorted(r.label for r in readings) == sorted(asked)


def test_followed_tells_the_parts_apart():
    def reading(*label):
        return Reading(Label(*label), np.zeros((5, 2)))

    text = "a red square circles clockwise and a blue cross moves up and down"
    square, cross = reading("square", "red", "clockwise"), reading("cross", "blue", "up-down")
    assert followed((cross, square), text) == Followed(True, True, True, True)
    assert followed((square,), text) == Followed(False, False, False, False)
    assert followed((), text) == Followed(False, False, False, False)
    swapped = (reading("cross", "red", "clockwise"), reading("square", "blue", "up-down"))
    assert followed(swapped, text) == Followed(True, True, True, False)
    unsure = (square, reading("none", "blue", "none"))
    assert followed(unsure, text) == Followed(True, False, False, False)
    assert followed((square,), "a picture of a red square").all
    assert not followed((reading("square", "red", None),), "a red square circles clockwise").motion


@pytest.mark.parametrize(
    "text",
    [
        "a red square circles clockwise",
        "a picture of a red square",
        "a red square circles clockwise and a blue square moves up and down",
        "a red square circles clockwise and a blue cross circles clockwise",
    ],
)
def test_chance_is_that_of_random_labels(text):
    """The stated chance is the share of captions' own labels, drawn at random, that follow the caption."""
    nowhere = np.zeros((5, 2))
    count = len(shapes.parse_caption(text))
    guesses = [x for x in itertools.product(LABELS, repeat=count) if len({y.colour for y in x}) == count]
    hits = [followed([Reading(x, nowhere) for x in guess], text) for guess in guesses]
    for part, share in chance(text).items():
        assert np.mean([getattr(hit, part) for hit in hits]) == pytest.approx(share)
