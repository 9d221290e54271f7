"""Text encoders: tokens and their limits, prompts that do not see each other, and what a dropped prompt leaves.

B rows, S text tokens per row, K values per token, E text width, s tokens of one prompt.
"""

import functools
import pickle

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import base
from dit_video.data import shapes
from dit_video.text import embeddings, labels, make_text, words

CAPTIONS = ["a red circle moves left and right", "", "ein großer Überfall", "a picture of two blue crosses"]


def text_of(kind, **changes):
    config = base.get_config().text
    config.update({"kind": kind, "width": 32, "depth": 2, **changes})
    return make_text(config)


def rows_of(text, rows, length=32, gap=0):
    """ids_BxSxK and prompt_BxS of captions, row by row, with `gap` places of padding before each."""
    blank = text.tokenise("")
    ids_BxSxK = np.zeros((len(rows), length, blank.shape[1]), blank.dtype)
    prompt_BxS = np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        at = 0
        for prompt, caption in enumerate(row, 1):
            ids_sxK = text.tokenise(caption)
            at += gap
            ids_BxSxK[b, at : at + len(ids_sxK)], prompt_BxS[b, at : at + len(ids_sxK)] = ids_sxK, prompt
            at += len(ids_sxK)
    return ids_BxSxK, prompt_BxS


@functools.cache
def encoder(text):
    """ids, prompt -> text_BxSxE with random weights: biases too, which start at zero."""
    ids, prompt = rows_of(text, [[""]])
    shapes = jax.eval_shape(text.module.init, jax.random.key(0), ids, prompt)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: (rng.normal(size=w.shape) / np.sqrt(w.shape[0])).astype(np.float32), shapes)
    apply = jax.jit(lambda ids, prompt: text.module.apply({"params": params}, ids, prompt))
    return lambda ids, prompt: np.asarray(apply(ids, prompt))


# Words


def spoken(ids_sxK):
    """The bytes that tokens hold."""
    return [bytes((row[row > 0] - 1).astype(np.uint8).tolist()) for row in ids_sxK]


@pytest.mark.parametrize("caption", [*CAPTIONS, "Ä\t\n ÖL  ", "日本語の動画", "emoji 🎬🎞️", "nul \x00 ÿ"])
def test_words_come_back_from_their_tokens(caption):
    """After a null token, each word's bytes, in lower case."""
    ids_sxK = words.tokenise(caption)
    assert ids_sxK.dtype == np.int32 and ids_sxK.shape[1] == words.BYTES and 0 <= ids_sxK.min() <= ids_sxK.max() <= 256
    null, *pieces = spoken(ids_sxK)
    assert null == b"" and all(pieces)
    assert b"".join(pieces).decode() == "".join(caption.lower().split())
    short = all(len(word.encode()) <= words.BYTES for word in caption.split())
    assert not short or [p.decode() for p in pieces] == caption.lower().split()


def test_long_words_are_cut_in_pieces_between_any_bytes():
    word = "donau" * 5 + "ü" * 7  # 25 + 14 bytes
    pieces = spoken(words.tokenise(word))[1:]
    assert [len(p) for p in pieces] == [12, 12, 12, 3] and b"".join(pieces).decode() == word
    assert [len(p) for p in spoken(words.tokenise("x" * 12))] == [0, 12]
    assert len(words.tokenise("")) == len(words.tokenise("  \n ")) == 1


def test_every_byte_has_a_token_of_its_own():
    """None is taken for the end of the word."""
    found = {tuple(words.tokenise(chr(i) + "x")[1]) for i in range(33, 127) if not chr(i).isupper()}
    assert len(found) == 94 - 26
    assert words.tokenise("\x00")[1, 0] == 1


# Prompts in packed rows


@pytest.mark.parametrize("gap", [0, 3])
def test_prompts_do_not_see_each_other(gap):
    """Embeddings in a shared row, at any place in it, are those of the prompt alone."""
    text = text_of("words")
    alone = encoder(text)(*rows_of(text, [[c] for c in CAPTIONS]))
    packed_ids, packed_prompt = rows_of(text, [CAPTIONS, CAPTIONS[::-1]], gap=gap)
    packed = encoder(text)(packed_ids, packed_prompt)
    for b, row in enumerate((CAPTIONS, CAPTIONS[::-1])):
        for prompt, caption in enumerate(row, 1):
            expected = alone[CAPTIONS.index(caption)][: len(text.tokenise(caption))]
            np.testing.assert_allclose(packed[b, packed_prompt[b] == prompt], expected, atol=1e-5)


def test_a_neighbours_words_change_nothing():
    """Bit for bit: a prompt of as many other words, and anything at all in padding."""
    text = text_of("words")
    ids, prompt = rows_of(text, [CAPTIONS])
    before, other = encoder(text)(ids, prompt), ids.copy()
    other[prompt == 1] = rows_of(text, [["the grey square stands still or not", *CAPTIONS[1:]]])[0][prompt == 1]
    other[prompt == 0] = 200
    after = encoder(text)(other, prompt)
    np.testing.assert_array_equal(after[prompt > 1], before[prompt > 1])
    assert (after[prompt == 1][1:] != before[prompt == 1][1:]).any(-1).all()


def test_words_of_a_prompt_see_each_other_and_their_order():
    text = text_of("words")
    one, other, turned = encoder(text)(*rows_of(text, [["red cat"], ["blue cat"], ["cat red"]]))
    assert np.abs(one[0] - other[0]).max() > 1e-3 and np.abs(one[2] - other[2]).max() > 1e-3
    assert np.abs(one[2] - turned[1]).max() > 1e-3


@pytest.mark.parametrize("grown", [1, 30])
def test_what_all_words_share_does_not_drown_them(grown):
    """However far the layers have grown, most of a token's norm is its own: training pulls all tokens one way."""
    text = text_of("words", width=128)
    ids, prompt = rows_of(text, [[x.caption] for x in shapes.prompts(24, "train", objects=1)])
    params = dict(text.module.init(jax.random.key(0), ids, prompt)["params"])
    params |= {n: jax.tree.map(lambda w: grown * w, w) for n, w in params.items() if n.startswith("mlp_out")}
    text_BxSxE = np.asarray(text.module.apply({"params": params}, ids, prompt))
    token_nxE = text_BxSxE[(prompt > 0) & (ids > 0).any(-1)]
    assert np.square(token_nxE.mean(0)).sum() < 0.4 * np.square(token_nxE).sum(-1).mean()


def test_places_are_counted_within_a_prompt():
    prompt_BxS = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [0, 0, 1, 1, 1, 1, 2, 2]])
    expected = np.array([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1]])
    np.testing.assert_array_equal(
        np.asarray(jax.jit(words.index_in_prompt)(prompt_BxS))[prompt_BxS > 0], expected.ravel()
    )


# What a dropped prompt leaves


def test_a_dropped_prompt_keeps_its_null_token_alone():
    """It is then encoded just as no prompt at all, and the others as before."""
    text = text_of("words")
    ids, prompt = rows_of(text, [CAPTIONS])
    kept_ids, kept = jax.tree.map(np.asarray, text.drop(ids, prompt, jnp.asarray((prompt == 1) | (prompt == 3))))
    np.testing.assert_array_equal(kept_ids, ids)
    for dropped in (1, 3):
        np.testing.assert_array_equal(np.flatnonzero(kept == dropped), np.flatnonzero(prompt == dropped)[:1])
    for other in (2, 4):
        np.testing.assert_array_equal(kept == other, prompt == other)
    nothing = encoder(text)(*rows_of(text, [[""]]))[0, 0]
    out = encoder(text)(kept_ids, kept)
    for prompt_number in (1, 2, 3):
        np.testing.assert_allclose(out[kept == prompt_number], nothing[None], atol=1e-5)


# Labels


def test_labels_are_rows_of_a_table_and_none_is_its_last():
    text = text_of("labels", classes=10)
    ids, prompt = rows_of(text, [["7", "", " 0 ", "9"]], length=6)
    np.testing.assert_array_equal(ids[0, :4, 0], [7, -1, 0, 9])
    params = text.module.init(jax.random.key(0), ids, prompt)["params"]
    encode = lambda ids, prompt: text.module.apply({"params": params}, ids, prompt)
    assert params["table"].shape == (11, 32)
    np.testing.assert_array_equal(encode(ids, prompt)[0, :4], params["table"][np.array([7, 10, 0, 9])])
    dropped = text.drop(ids, prompt, prompt == 4)
    np.testing.assert_array_equal(encode(*dropped)[0, :4], params["table"][np.array([7, 10, 0, 10])])
    np.testing.assert_array_equal(dropped[1], prompt)


@pytest.mark.parametrize("caption", ["10", "-1", "a dog", "1.5", "²", "3 4"])
def test_labels_that_are_none_are_refused(caption):
    with pytest.raises(ValueError, match="is no class: text.kind='labels' takes 0 to 9, or nothing"):
        labels.tokenise(caption, 10)


# Embeddings


@pytest.fixture
def file(tmp_path):
    """Embeddings of two captions, of 3 and 5 tokens, and one of another width."""
    rng = np.random.default_rng(0)
    sizes = {CAPTIONS[0]: (3, 32), CAPTIONS[2]: (5, 32), "narrow": (2, 31)}
    tensors = {caption: rng.normal(size=size).astype(np.float32) for caption, size in sizes.items()}
    save_file({embeddings.key(caption): tensor for caption, tensor in tensors.items()}, tmp_path / "text.safetensors")
    return str(tmp_path / "text.safetensors"), tensors


def test_embeddings_come_from_the_file_after_a_null_token(file):
    path, tensors = file
    text = text_of("embeddings", file=path)
    ids, prompt = rows_of(text, [[CAPTIONS[0], "", CAPTIONS[2]]], length=16)
    assert [int((prompt == p).sum()) for p in (1, 2, 3)] == [4, 1, 6]
    encode = encoder(text)
    out, nothing = encode(ids, prompt)[0], encode(*rows_of(text, [[""]]))[0, 0]
    assert np.abs(nothing).max() > 0
    for number, caption in ((1, CAPTIONS[0]), (3, CAPTIONS[2])):
        np.testing.assert_array_equal(out[prompt[0] == number], np.vstack([nothing, tensors[caption]]))
    np.testing.assert_array_equal(out[prompt[0] == 2], nothing[None])
    _, kept = text.drop(ids, prompt, prompt == 3)
    np.testing.assert_array_equal(np.asarray(kept)[0], np.where(np.arange(16) < 6, prompt[0], 0))


def test_captions_that_the_file_does_not_hold_are_refused(file, tmp_path):
    path, _ = file
    text = text_of("embeddings", file=path)
    with pytest.raises(ValueError, match=r"no embedding of the caption 'unheard' \(tensor [0-9a-f]{64}\) in .*text"):
        text.tokenise("unheard")
    with pytest.raises(ValueError, match=r"embedding of 'narrow' is \(2, 31\); text.width=32 was expected"):
        text.tokenise("narrow")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        text_of("embeddings", file=str(tmp_path / "none.safetensors")).tokenise("any")


@pytest.mark.parametrize("kind", ["words", "labels", "embeddings"])
def test_tokenisers_travel_to_worker_processes(kind, file):
    """Through pickle, also once the file is open."""
    tokenise = text_of(kind, file=file[0]).tokenise
    caption = "5" if kind == "labels" else CAPTIONS[0]
    expected = tokenise(caption)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenise))(caption), expected)


def test_an_encoder_that_is_none_is_refused():
    with pytest.raises(
        ValueError, match="text.kind='t5' is not known. Allowed: 'words', 'labels', 'embeddings', 'frozen'"
    ):
        make_text(ml_collections.ConfigDict({"kind": "t5"}))
