"""The pixel codec: exact both ways, causal in time, and clear about what it cannot encode.

T x Y x X a clip's grid, C latent channels.
"""

import ml_collections
import numpy as np
import pytest

from dit_video.codecs import Pixels, check_frames, make_codec, to_float, to_uint8

STRIDES = [(4, 1, 1), (1, 1, 1), (2, 2, 3), (4, 8, 8), (3, 4, 1)]


def draw_video(stride, latent_frames, seed=0, dtype=np.uint8):
    st, sy, sx = stride
    shape = (1 + st * (latent_frames - 1), 3 * sy, 2 * sx, 3)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def test_every_value_of_a_byte_survives_as_a_float():
    values = np.arange(256, dtype=np.uint8)
    as_float = to_float(values)
    assert as_float.dtype == np.float32 and as_float[0] == -1 and as_float[-1] == 1 and (np.diff(as_float) > 0).all()
    np.testing.assert_array_equal(to_uint8(as_float), values)
    np.testing.assert_array_equal(values, np.arange(256))  # and is not written over


def test_floats_are_rounded_and_clipped_to_bytes():
    np.testing.assert_array_equal(to_uint8(np.array([-9.0, -1.003, 1.003, 9.0])), [0, 0, 255, 255])
    between = to_float(np.array([10, 10, 11], np.uint8)) + np.float32([0.4, 0.6, -0.4]) / np.float32(127.5)
    np.testing.assert_array_equal(to_uint8(between), [10, 11, 11])


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("latent_frames", [1, 2, 4])
def test_decoding_gives_the_very_video_that_was_encoded(stride, latent_frames):
    """An image is one latent frame, 1 + st k frames are 1 + k of them."""
    codec, video = Pixels(stride), draw_video(stride, latent_frames)
    latents_TxYxXxC = codec.encode(to_float(video))
    assert latents_TxYxXxC.shape == (latent_frames, 3, 2, codec.channels) and latents_TxYxXxC.dtype == np.float32
    np.testing.assert_array_equal(to_uint8(codec.decode(latents_TxYxXxC)), video)
    colours_first = np.ascontiguousarray(np.moveaxis(to_float(video), -1, 0))
    np.testing.assert_array_equal(codec.encode(np.moveaxis(colours_first, 0, -1)), latents_TxYxXxC)
    assert codec.encode(video).dtype == np.uint8


@pytest.mark.parametrize("stride", STRIDES)
def test_a_latent_holds_its_own_frames_and_pixels(stride):
    """In the order (t, y, x, colour); the first latent frame holds st copies of the first frame."""
    (st, sy, sx), video = stride, draw_video(stride, 3)
    latents_TxYxXxC = Pixels(stride).encode(video)
    for t, y, x in np.ndindex(*latents_TxYxXxC.shape[:3]):
        frames = [0] * st if t == 0 else range(1 + (t - 1) * st, 1 + t * st)
        box = [video[f, y * sy : (y + 1) * sy, x * sx : (x + 1) * sx] for f in frames]
        np.testing.assert_array_equal(latents_TxYxXxC[t, y, x], np.ravel(box))


@pytest.mark.parametrize("stride", STRIDES)
def test_no_frame_reaches_back_in_time(stride):
    """A change in frame t changes the latent frame that covers it, and none other; decoding likewise."""
    codec, video, st = Pixels(stride), draw_video(stride, 4), stride[0]
    before = codec.encode(video)
    for t in range(len(video)):
        changed = video.copy()
        changed[t] ^= 255
        different = (codec.encode(changed) != before).any((1, 2, 3))
        np.testing.assert_array_equal(np.flatnonzero(different), [-(-t // st)])
    for t in range(len(before)):
        changed = before.copy()
        changed[t] ^= 255
        first = np.flatnonzero((codec.decode(changed) != video).any((1, 2, 3)))[0]
        assert first == max(1 + (t - 1) * st, 0)


@pytest.mark.parametrize(
    ("frames", "stride", "nearest"),
    [(10, 4, "9 or 13"), (2, 4, "1 or 5"), (0, 4, "1"), (-3, 4, "1"), (4, 2, "3 or 5")],
)
def test_frames_that_fit_no_latents_are_refused_with_the_nearest(frames, stride, nearest):
    says = rf"frames={frames} cannot be encoded: the codec covers 1 \+ {stride}k frames .*Nearest: {nearest}\.$"
    with pytest.raises(ValueError, match=says):
        check_frames(frames, stride)
    if frames >= 0:
        with pytest.raises(ValueError, match=says):
            Pixels((stride, 1, 1)).encode(np.zeros((frames, 2, 2, 3), np.float32))


def test_sizes_that_the_stride_does_not_divide_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="height=20 cannot be encoded.* multiples of 8. Nearest: 16 or 24"):
        Pixels((4, 8, 8)).encode(np.zeros((1, 20, 16, 3), np.float32))
    with pytest.raises(ValueError, match="width=3 cannot be encoded.* multiples of 8. Nearest: 8"):
        Pixels((4, 8, 8)).encode(np.zeros((1, 16, 3, 3), np.float32))


def test_every_whole_number_of_latents_is_accepted():
    for stride in (1, 2, 4, 8):
        for k in range(4):
            check_frames(1 + stride * k, stride)


def test_a_codec_that_is_none_is_refused():
    with pytest.raises(ValueError, match="codec.kind='vae' is not known. Allowed: 'pixels', 'latents'"):
        make_codec(ml_collections.ConfigDict({"kind": "vae"}))
    assert make_codec(ml_collections.ConfigDict({"kind": "pixels", "stride": [4, 2, 2]})) == Pixels((4, 2, 2))
