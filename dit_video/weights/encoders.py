"""A published text encoder from the folder that it was downloaded to: configuration, weights and tokeniser.

B prompts, S tokens of each, s of one prompt, E text width. The tokenisers' libraries come with the extra 'published'.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable

import jax
import numpy as np
import safetensors

from dit_video.text.clip import CLIPText
from dit_video.text.frozen import Encoder, fill, lacking
from dit_video.text.t5 import T5Encoder
from dit_video.weights import clip, t5

TOKENISERS = ("tokenizer.json", "spiece.model", "spm.model")


def load_encoder(folder, tokeniser=None, length: int = 512) -> Encoder:
    """T5 v1.1's encoder, UMT5's, or CLIP's text model, from config.json and *.safetensors in `folder`.

    tokeniser: the model's own file, tokenizer.json or a sentencepiece *.model; by default the one in `folder`, or in
    a folder 'tokenizer' beside it. length: tokens that a prompt is cut to, with its end; CLIP's 77 at most.
    Raises FileNotFoundError for what is not there, and ValueError for a model that is none of the three.
    """
    folder = pathlib.Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors. Give the folder of a published text encoder.")
    tokeniser = pathlib.Path(tokeniser) if tokeniser else _own_tokeniser(folder)
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)  # one config may describe both halves of CLIP
    kind = config.get("model_type")
    if kind not in ("t5", "umt5", "clip_text_model"):
        raise ValueError(f"{folder}: model_type={kind!r} is not known. Allowed: 't5', 'umt5', 'clip_text_model'.")
    state = {}
    for file in files:
        with safetensors.safe_open(file, "np") as opened:
            state |= {name: opened.get_tensor(name) for name in opened.keys()}
    if kind == "clip_text_model":
        model, params = CLIPText(**clip.arguments(config, clip.PROJECTION in state)), clip.to_ours(state, config)
        params, length = params["clip"], min(length, model.length)
        apply = jax.jit(lambda params, ids_BxS, real_BxS: model.apply({"params": params}, ids_BxS, real_BxS)[0])
    else:
        model, params = T5Encoder(**t5.arguments(config)), t5.to_ours(state, config)["t5"]
        apply = jax.jit(lambda params, ids_BxS, real_BxS: model.apply({"params": params}, ids_BxS, real_BxS))
    del state
    params = jax.device_put(params)

    def encode(ids_BxS):
        """Padded to a power of two, so that a few programs serve prompts of every length."""
        B, S = ids_BxS.shape
        size = min(max(16, 1 << (S - 1).bit_length()), length)
        real_BxS = np.broadcast_to(np.arange(size) < S, (B, size))
        return np.asarray(apply(params, np.pad(ids_BxS, ((0, 0), (0, size - S))), real_BxS))[:, :S]

    digest = _digest([folder / "config.json", *files, tokeniser], length)
    return Encoder(digest, make_tokenise(tokeniser, length), encode)


def make_tokenise(file, length: int) -> Callable[[str], np.ndarray]:
    """caption -> ids_s, by the model's own tokenizer.json or sentencepiece model, cut to `length` with its end.

    Runs of white space count as one space, as in the published pipelines.
    """
    if pathlib.Path(file).suffix == ".json":
        import tokenizers

        tokeniser = tokenizers.Tokenizer.from_file(str(file))
        tokeniser.no_padding()
        tokeniser.enable_truncation(length)
        ids = lambda caption: tokeniser.encode(caption).ids
    else:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        # The model's file knows its end-of-text and leaves it to the caller.
        ids = lambda caption: [*processor.encode(caption)[: length - 1], processor.eos_id()]
    return lambda caption: np.array(ids(" ".join(caption.split())), np.int32)


def complete(config, captions: Iterable[str]) -> None:
    """Encodes what config.file lacks of the captions by the encoder in config.encoder (config: a run's config.text).

    Prompts are cut to config.tokens, unless that is 0. Raises ValueError where another encoder made config.file, or
    prompts were cut elsewhere.
    """
    if not lacking(config.file, captions):
        return
    encoder, file = _loaded(config.encoder, config.tokens or 512), pathlib.Path(config.file)
    if encoder.digest[:16] != file.name:
        raise ValueError(
            f"text.file={config.file} was not made by text.encoder={config.encoder} at text.tokens={config.tokens}, "
            f"whose embeddings lie in a folder {encoder.digest[:16]}. Give the encoder that the file was made by."
        )
    fill(encoder, captions, file.parent)


@functools.lru_cache(maxsize=1)
def _loaded(folder: str, length: int) -> Encoder:
    return load_encoder(folder, length=length)


def _own_tokeniser(folder: pathlib.Path) -> pathlib.Path:
    for place in (folder, folder.parent / "tokenizer"):
        for name in TOKENISERS:
            if (place / name).exists():
                return place / name
    raise FileNotFoundError(f"neither {folder} nor a folder 'tokenizer' beside it holds one of {TOKENISERS}.")


def _digest(files, length: int) -> str:
    """Of the files' bytes, in order, and of the most tokens."""
    digest = hashlib.sha256(str(length).encode())
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
