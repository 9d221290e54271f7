"""Published text encoders: against their reference's arrays, against rebuilds in float64, and from disk to the model.

B prompts, S tokens of each, s of one prompt, E width, H heads, K head width, F width of the feed-forward.
"""

import dataclasses
import functools
import json
import math
import os

import jax
import ml_collections
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from dit_video import generate
from dit_video.canvas import Request
from dit_video.step import abstract_batch, make_run
from dit_video.text import embeddings, frozen, make_text
from dit_video.text.clip import CLIPText
from dit_video.text.t5 import T5Encoder, relative_buckets
from dit_video.weights import clip, t5
from dit_video.weights.encoders import complete, load_encoder, make_tokenise
from experiments.parity import text as parity
from experiments.parity.arrays import error, load

T5 = {
    "vocab_size": 24, "d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
CLIP = {
    "vocab_size": 24, "hidden_size": 12, "intermediate_size": 20, "projection_dim": 10, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 9, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "eos_token_id": 23, "model_type": "clip_text_model",
}  # fmt: skip
FAMILIES = ("t5", "umt5", "clip")


@functools.cache
def published(family: str):
    """(config, state dict) under the published names, random; embeddings are small, so that every epsilon counts."""
    config = CLIP if family == "clip" else T5 | {"model_type": family}
    rules = clip.rules(config, True) if family == "clip" else t5.rules(config)
    rng, state = np.random.default_rng(0), {}
    for name, shape in ((name, rule.shape) for rule in rules for name in rule.names(2)):
        scale = 0.02 if "embed" in name or name == "shared.weight" else 1.0
        scale = scale if len(shape) == 1 or scale < 1 or "bias" in name else shape[-1] ** -0.5
        state[name] = (rng.normal(size=shape) * scale + ("norm" in name and "weight" in name)).astype(np.float32)
    if family != "clip":
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    return config, state


def maps(family: str):
    return clip if family == "clip" else t5


# Rebuilds from the papers, in float64

TANH_GELU = np.vectorize(lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
EXACT_GELU = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))
QUICK_GELU = lambda x: x / (1 + np.exp(-1.702 * x))


def softmax_attention(q_SxHxK, k_SxHxK, v_SxHxK, bias_HxSxS):
    logits = np.einsum("nhk,mhk->hnm", q_SxHxK, k_SxHxK) + bias_HxSxS
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hnm,mhk->nhk", weights / weights.sum(-1, keepdims=True), v_SxHxK).reshape(len(q_SxHxK), -1)


def bucket_of(way: int) -> int:
    """Of 32, up to distance 128: 2 log2(way / 8) in whole numbers."""
    away = abs(way)
    near = away if away < 8 else min(8 + (away * away).bit_length() - 7, 15)
    return near + 16 * (way > 0)


def t5_rebuild(state, config, ids_S, real_S, eps=1e-6, gelu=TANH_GELU, bucket_of=bucket_of, scale=1.0, bias_of=None):
    """text_SxE of one prompt (Raffel et al. 2020, sec. 2.1; v1.1's gated GELU; UMT5's biases in every layer)."""
    w = {name: np.asarray(array, np.float64) for name, array in state.items()}
    S, H = len(ids_S), config["num_heads"]
    norm = lambda x, gain: x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain
    bucket_SxS = np.array([[bucket_of(m - n) for m in range(S)] for n in range(S)])
    h = w["shared.weight"][ids_S]
    for i in range(config["num_layers"]):
        layer = f"encoder.block.{i}.layer"
        attention, mlp = f"{layer}.0.SelfAttention", f"{layer}.1.DenseReluDense"
        own = i if config["model_type"] == "umt5" else 0
        own = own if bias_of is None else bias_of
        table = w[f"encoder.block.{own}.layer.0.SelfAttention.relative_attention_bias.weight"]
        bias = np.moveaxis(table[bucket_SxS], -1, 0) + np.where(real_S, 0, -np.inf)
        x = norm(h, w[f"{layer}.0.layer_norm.weight"])
        q, k, v = ((x @ w[f"{attention}.{name}.weight"].T).reshape(S, H, -1) for name in "qkv")
        h = h + softmax_attention(scale * q, k, v, bias) @ w[f"{attention}.o.weight"].T
        x = norm(h, w[f"{layer}.1.layer_norm.weight"])
        x = gelu(x @ w[f"{mlp}.wi_0.weight"].T) * (x @ w[f"{mlp}.wi_1.weight"].T)
        h = h + x @ w[f"{mlp}.wo.weight"].T
    return norm(h, w["encoder.final_layer_norm.weight"])


def clip_rebuild(state, config, ids_S, real_S, eps=1e-5, gelu=QUICK_GELU, pick=np.argmax, causal=True):
    """text_SxE, pooled_E and projected_J of one prompt (Radford et al. 2021, sec. 2.4)."""
    w = {name.removeprefix("text_model."): np.asarray(array, np.float64) for name, array in state.items()}
    S, H = len(ids_S), config["num_attention_heads"]
    dense = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]

    hidden = np.where(real_S, 0, -np.inf) + (np.where(np.tri(S) > 0, 0, -np.inf) if causal else 0)
    h = w["embeddings.token_embedding.weight"][ids_S] + w["embeddings.position_embedding.weight"][:S]
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        x = norm(h, f"{layer}.layer_norm1")
        q, k, v = (dense(x, f"{layer}.self_attn.{name}_proj").reshape(S, H, -1) for name in "qkv")
        o = softmax_attention(q / math.sqrt(q.shape[-1]), k, v, hidden)
        h = h + dense(o, f"{layer}.self_attn.out_proj")
        h = h + dense(gelu(dense(norm(h, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
    text = norm(h, "final_layer_norm")
    pooled = text[pick(np.asarray(ids_S) == config["eos_token_id"])]
    return text, pooled, pooled @ w["text_projection.weight"].T


def prompts(family: str):
    """ids_BxS and real_BxS: a prompt that fills its places, and a short one; CLIP's are padded with end-of-text."""
    S, rng = (9 if family == "clip" else 40), np.random.default_rng(1)
    ids, real = rng.integers(2, 22, (2, S)), np.ones((2, S), bool)
    ids[0, -1], ids[1, 5:], real[1, 6:] = 23, 23, False
    return ids, real


@functools.cache
def encoder_of(family: str):
    """ids_BxS, real_BxS -> what the flax model gives with imported weights: text, and for CLIP pooled and projected."""
    config, state = published(family)
    (params,) = maps(family).to_ours(state, config).values()
    model = CLIPText(**clip.arguments(config, True)) if family == "clip" else T5Encoder(**t5.arguments(config))
    apply = jax.jit(model.apply)
    return lambda ids, real: jax.tree.leaves(apply({"params": params}, ids, real))


@functools.cache
def ours(family: str):
    return encoder_of(family)(*prompts(family))


def rebuilt(family: str, **wrong):
    config, state = published(family)
    rows = [
        (clip_rebuild if family == "clip" else t5_rebuild)(state, config, *row, **wrong)
        for row in zip(*prompts(family))
    ]
    return [np.stack(part) for part in zip(*rows)] if family == "clip" else [np.stack(rows)]


def errors(family: str, **wrong):
    return [error(a, b) for a, b in zip(ours(family), rebuilt(family, **wrong))]


@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_are_what_the_papers_say(family):
    found = errors(family)
    assert len(found) == (3 if family == "clip" else 1) and max(found) < 1e-5, found


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("t5", {"eps": 1e-5}),
        ("t5", {"gelu": EXACT_GELU}),
        ("t5", {"scale": 0.5}),
        ("t5", {"bucket_of": lambda way: bucket_of(-way)}),
        ("t5", {"bucket_of": lambda way: bucket_of(way + (way == 31))}),
        ("umt5", {"bias_of": 0}),
        ("umt5", {"bucket_of": lambda way: bucket_of(way - (way == -31))}),
        ("clip", {"eps": 1e-6}),
        ("clip", {"gelu": EXACT_GELU}),
        ("clip", {"gelu": TANH_GELU}),
        ("clip", {"causal": False}),
    ],
)
def test_a_wrong_detail_would_be_seen(family, wrong):
    """Each is far outside of what the comparison allows, in every output."""
    assert min(errors(family, **wrong)) > 1e-4


def test_the_first_end_of_text_is_the_pooled_one():
    """The last differs where prompts are padded with end-of-text."""
    last = lambda is_end: len(is_end) - 1 - np.argmax(is_end[::-1])
    text, pooled, projected = errors("clip", pick=last)
    assert text < 1e-5 < 1e-2 < min(pooled, projected)


@pytest.mark.parametrize("length", [1, 40, 300])
def test_buckets_of_relative_positions(length):
    expected = [[bucket_of(m - n) for m in range(length)] for n in range(length)]
    np.testing.assert_array_equal(relative_buckets(length), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_masked_is_not_seen(family):
    """Whatever ids lie past a prompt's end, its own tokens' embeddings are the same."""
    ids, real = prompts(family)
    other = encoder_of(family)(np.where(real, ids, 3), real)[0]
    np.testing.assert_allclose(other[1, :6], ours(family)[0][1, :6], atol=1e-6)
    assert np.abs(other[1, 6:] - ours(family)[0][1, 6:]).max() > 0.1


# Against the reference's arrays


def test_encoders_give_what_their_reference_gave(golden):
    """Largest error relative to the largest value, float32 on CPU; the buckets to the last one."""
    found = parity.errors(golden)
    assert len(found) == 12 and max(found.values()) < 1e-5, found
    assert found["t5_v1_1 buckets"] == found["umt5 buckets"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rebuilds_give_what_the_reference_gave(family, golden):
    """So that they can stand for it where its arrays are not."""
    name = {"t5": "t5_v1_1", "umt5": "umt5", "clip": "clip_text_quickgelu"}[family]
    state, config, io = load(golden, f"transformers/{name}")
    if family == "clip":
        rows = [clip_rebuild(state, config, ids, np.ones(16, bool)) for ids in io["input_ids"]]
        for mine, theirs in zip(zip(*rows), ("last_hidden_state", "pooler_output", "text_embeds")):
            assert error(np.stack(mine), io[theirs]) < 2e-6
    else:
        config["model_type"] = family
        rows = [t5_rebuild(state, config, *row) for row in zip(io["input_ids"], io["attention_mask"] != 0)]
        assert error(np.stack(rows), io["last_hidden_state"]) < 2e-6
        long = t5_rebuild(state, config, io["long_ids"][0], np.ones(200, bool))
        assert error(long[None], io["long_last_hidden_state"]) < 2e-6


# Weights both ways


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_as_they_were(family):
    config, state = published(family)
    params = maps(family).to_ours(state, config)
    back = maps(family).to_theirs(params, config)
    assert set(back) == set(state)
    for name in state:
        np.testing.assert_array_equal(back[name], state[name], err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, maps(family).to_ours(back, config), params)


def test_weights_in_the_forms_that_files_have():
    """One name for the embeddings, a decoder or an image half beside the encoder, no projection."""
    config, state = published("umt5")
    expected = t5.to_ours(state, config)
    for name in t5.EMBED:
        less = {k: w for k, w in state.items() if k != name} | {"decoder.x": state[name], "lm_head.weight": state[name]}
        jax.tree.map(np.testing.assert_array_equal, t5.to_ours(less, config), expected)
    with pytest.raises(ValueError, match="'shared.weight' and 'encoder.embed_tokens.weight' differ"):
        t5.to_ours(state | {"shared.weight": state["shared.weight"] + 1}, config)
    with pytest.raises(ValueError, match="lack 'shared.weight'"):
        t5.to_ours({k: w for k, w in state.items() if k not in t5.EMBED}, config)
    config, state = published("clip")
    less = {k: w for k, w in state.items() if k != clip.PROJECTION} | {"vision_model.x": 0, "logit_scale": 1}
    params = clip.to_ours(less, config)
    assert set(clip.to_ours(state, config)["clip"]) - set(params["clip"]) == {"projection"}
    assert clip.PROJECTION not in clip.to_theirs(params, config)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (t5.arguments, T5 | {"model_type": "mt5"}),
        (t5.arguments, T5 | {"model_type": "t5", "feed_forward_proj": "relu"}),
        (functools.partial(clip.arguments, projection=True), CLIP | {"hidden_act": "relu"}),
        (functools.partial(clip.arguments, projection=True), CLIP | {"layer_norm_eps": 1e-6}),
    ],
)
def test_models_that_are_others_are_refused(arguments, wrong):
    with pytest.raises(ValueError, match="cannot be imported. Allowed: "):
        arguments(wrong)


def test_the_end_that_old_configs_misname_is_the_last_id():
    assert clip.arguments(CLIP | {"eos_token_id": 2}, True)["end"] == 23
    with pytest.raises(ValueError, match="10 tokens, and the model has positions for 9"):
        CLIPText(**clip.arguments(CLIP, True)).init(jax.random.key(0), np.zeros((1, 10), int))


# Tokenisers

WORDS = "a red blue circle square moves left right cat dog".split()


@pytest.fixture(scope="module")
def json_tokeniser(tmp_path_factory):
    """A tokenizer.json: a word is an id from 2, unknown 0, and </s>, 1, ends a prompt."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "</s>": 1} | {word: i for i, word in enumerate(WORDS, 2)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    made.enable_padding(length=50)  # as some files ask for
    path = tmp_path_factory.mktemp("tokeniser") / "tokenizer.json"
    made.save(str(path))
    return path


def test_tokenizer_json(json_tokeniser):
    tokenise = make_tokenise(json_tokeniser, 5)
    assert tokenise("a  red\n cat ").tolist() == [2, 3, 10, 1] and tokenise("").tolist() == [1]
    assert tokenise("a red cat moves right").tolist() == [2, 3, 10, 7, 1]  # cut, and still ended


def test_sentencepiece_model(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    with open(tmp_path / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS)] * 20), model_writer=file, vocab_size=40, model_type="unigram",
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    tokenise = make_tokenise(tmp_path / "spiece.model", 6)
    whole = processor.encode("red cat")
    assert make_tokenise(tmp_path / "spiece.model", 99)(" red \t cat").tolist() == [*whole, 1]
    assert tokenise("").tolist() == [1]
    cut = tokenise("a red circle moves right " * 5)
    assert len(cut) == 6 and cut[-1] == 1 and cut[:5].tolist() == processor.encode("a red circle moves right " * 5)[:5]


# From a folder to the cache, and from there to the model


@pytest.fixture
def folder(tmp_path, json_tokeniser):
    """A published folder: UMT5's configuration, weights in two files, tokeniser beside it."""
    config, state = published("umt5")
    folder, beside = tmp_path / "text_encoder", tmp_path / "tokenizer"
    folder.mkdir(), beside.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (beside / "tokenizer.json").write_bytes(json_tokeniser.read_bytes())
    names = sorted(set(state) - {"encoder.embed_tokens.weight"})
    for i in range(2):
        save_file({name: state[name] for name in names[i::2]}, folder / f"model-{i}.safetensors")
    return folder


def text_of(kind, file, **changes):
    config = base.get_config().text
    config.update({"kind": kind, "width": 12, "file": str(file), **changes})
    return make_text(config)


def test_prompts_are_encoded_once_and_come_back(folder, tmp_path):
    """Through both kinds that read the cache: the encoder's own embedding of the prompt alone, to the bit."""
    encoder, calls = load_encoder(folder), []
    counting = dataclasses.replace(encoder, encode=lambda ids: calls.append(ids) or encoder.encode(ids))
    captions = ["a red cat", "a blue dog moves left", "a red cat"]
    file = frozen.fill(counting, captions, tmp_path / "cache")
    assert os.path.basename(file) == encoder.digest[:16] and len(calls) == 3 == len(os.listdir(file))
    assert frozen.fill(counting, captions, tmp_path / "cache") == file and len(calls) == 3
    config, state = published("umt5")
    expected = t5_rebuild(state, config, [2, 3, 10, 1], np.ones(4, bool))
    name = embeddings.key("a red cat")
    stored = load_file(f"{file}/{name}.safetensors")[name]
    assert error(stored, expected) < 1e-5
    np.testing.assert_array_equal(text_of("frozen", file).tokenise("a red cat"), stored)
    ids = text_of("embeddings", file).tokenise("a red cat")
    np.testing.assert_array_equal(ids[:, 1:], np.vstack([np.zeros(12), stored]))
    np.testing.assert_array_equal(ids[:, 0], [0, 1, 1, 1, 1])
    for kind in ("frozen", "embeddings"):
        with pytest.raises(ValueError, match="no embedding of the caption 'a dog'"):
            text_of(kind, file).tokenise("a dog")
    with pytest.raises(ValueError, match=r"is \(4, 12\); text.width=13 was expected"):
        frozen.tokenise("a red cat", file, 13, 0)


def test_the_digest_tells_encoders_apart(folder, tmp_path):
    """By weights, tokeniser and length; a copy of the same folder is the same encoder."""
    seen = {load_encoder(folder).digest, load_encoder(folder, length=64).digest}
    assert len(seen) == 2 and load_encoder(folder).digest in seen
    path = folder.parent / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    seen.add(load_encoder(folder).digest)
    weights = load_file(folder / "model-0.safetensors")
    save_file({name: w + 1e-3 for name, w in weights.items()}, folder / "model-0.safetensors")
    seen.add(load_encoder(folder).digest)
    assert len(seen) == 4


def test_folders_that_hold_no_encoder_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none holds no \*.safetensors"):
        load_encoder(tmp_path / "none")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type='bert' is not known. Allowed: 't5', 'umt5', 'clip_text_model'"):
        load_encoder(folder)
    (folder.parent / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds one of .*tokenizer.json"):
        load_encoder(folder)


def test_a_clip_folder_gives_its_text_up_to_the_end(tmp_path, json_tokeniser):
    config, state = published("clip")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": config}))
    (tmp_path / "tokenizer.json").write_bytes(json_tokeniser.read_bytes())
    save_file(state | {"logit_scale": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    encoder = load_encoder(tmp_path)
    long, short = encoder.tokenise("a red cat " * 9), encoder.tokenise("a red cat")
    assert len(long) == 9  # its positions
    for ids_s in (long, short):
        expected, *_ = clip_rebuild(state, config, ids_s, np.ones(len(ids_s), bool))
        assert error(encoder.encode(ids_s[None])[0], expected) < 1e-5


def test_wans_zeros_are_ordinary_tokens():
    """A prompt is followed by zeros, which are its own; one that is too long is cut."""
    text_sxE = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    padded = frozen.zero_padded(text_sxE)
    assert padded.shape == (512, 12) and padded.dtype == np.float32 and not padded[5:].any()
    np.testing.assert_array_equal(padded[:5], text_sxE)
    np.testing.assert_array_equal(frozen.zero_padded(text_sxE, 3), text_sxE[:3])


@pytest.mark.parametrize("tokens", [0, 6])
def test_a_dropped_prompt_is_that_of_no_words(tokens, folder, tmp_path):
    """It is then just what an empty prompt lays out, and the others stay."""
    file = frozen.fill(load_encoder(folder), ["a red cat", "a dog"], tmp_path)
    text = text_of("frozen", file, tokens=tokens)
    ids = [text.tokenise(caption) for caption in ("a red cat", "a dog", "")]
    assert [len(i) for i in ids] == ([6] * 3 if tokens else [4, 3, 1])
    prompt = np.array([[0, *np.repeat([1, 2, 3], [len(i) for i in ids]), 0]])
    row = np.pad(np.concatenate(ids), ((1, 1), (0, 0)))[None]
    out, kept = jax.tree.map(np.asarray, jax.jit(text.drop)(row, prompt, (prompt == 1) | (prompt == 3)))
    for number, expected in ((1, ids[2]), (2, ids[1]), (3, ids[2])):
        np.testing.assert_array_equal(out[kept == number], expected)
    np.testing.assert_array_equal(text.module.apply({"params": {}}, out, kept), out)


def test_requests_are_encoded_as_they_come(folder, tmp_path):
    """A run that learns on frozen prompts has no text weights, and is sampled with words it never saw."""
    file = frozen.fill(load_encoder(folder, length=8), [], tmp_path)
    config = base.get_config()
    config.text.update({"kind": "frozen", "width": 12, "file": file, "encoder": str(folder), "tokens": 8})
    config.model.update({"width": 16, "depth": 1, "heads": 2, "mlp_width": 16})
    config.sample.steps = 1
    run = make_run(config)
    state = jax.eval_shape(run.init, jax.random.key(0))
    batch = abstract_batch(config, run.model, run.text)
    assert jax.eval_shape(run.step, state, batch, jax.random.key(0))[0].params == state.params
    shapes = state.params
    assert shapes["text"] == {}
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32) * 0.3, shapes)
    generate.save_weights(tmp_path / "weights.safetensors", params, config, 1)
    requests = [Request(prompt, 16, 16, 1, 8.0, seed=0) for prompt in ("a red cat", "a blue dog", "a red cat")]
    one, other, again = generate.sample(requests, tmp_path / "weights.safetensors")
    assert (one != other).any() and (one == again).all()
    assert len(os.listdir(file)) == 3
    config.text.file = str(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="elsewhere was not made by text.encoder=.* lie in a folder [0-9a-f]{16}"):
        complete(ml_collections.FrozenConfigDict(config.text), ["a cat"])
