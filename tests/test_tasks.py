"""What tasks lay out, and sampling as a whole: packed equals alone, an image stays as given, devices change nothing.

n patches of one request, g its groups, K = M + 1 levels, T x Y x X a clip's grid, P values per patch.
"""

import dataclasses

import jax
import numpy as np
import pytest

from configs import base
from dit_video import generate
from dit_video.codecs import make_codec, to_float
from dit_video.model import make_model
from dit_video.patches import Cond, lay_out, pack, unpatchify
from dit_video.sampling import uniform_levels
from dit_video.sharding import make_mesh
from dit_video.tasks import Layout, Request, animate, check_request, text_to_video
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


def test_a_scale_of_one_is_no_guidance(trained):
    """Whether no request of the batch is guided, or another is."""
    plain = [dataclasses.replace(r, guidance=1.0) for r in REQUESTS]
    without = generate.sample(plain, trained)
    beside = generate.sample([plain[0], dataclasses.replace(PICTURE, guidance=5.0), *plain[2:]], trained)
    assert levels_apart([beside[0], *beside[2:]], [without[0], *without[2:]]) <= 1
    assert levels_apart(beside[1:2], without[1:2]) > 20


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
