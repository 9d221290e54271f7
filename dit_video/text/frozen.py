"""Prompts as a published, frozen encoder gave them: encoded once, kept on disk, and given to the model as they are.

B rows, S tokens per row, E text width, s tokens of one prompt. On the way through the loader a token is its E floats.

Nothing here is trained. Without its prompt a clip gets the encoder's own embedding of no words. Past the prompt Wan
keeps zeroed tokens that its patches see like any other: see `zero_padded`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dit_video.text import embeddings
from dit_video.text.words import index_in_prompt


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A published encoder. Host only.

    digest: SHA-256, in hex, of all that its embeddings hang on (weights, configuration, tokeniser, most tokens).
    tokenise(caption) -> ids_s, at least 1; encode(ids_1xs) -> text_1xsxE, for any s.
    """

    digest: str
    tokenise: Callable[[str], np.ndarray]
    encode: Callable


def fill(encoder: Encoder, captions: Iterable[str], cache) -> str:
    """Encodes what the cache lacks of the captions, and of no words; returns the encoder's folder, text.file.

    The folder is named by the encoder's digest and holds one safetensors file for each caption, as
    `embeddings.read` finds it. A file is there whole or not at all, so that several processes may fill one cache.
    """
    folder = os.path.join(cache, encoder.digest[:16])
    os.makedirs(folder, exist_ok=True)
    for caption in lacking(folder, captions):
        text_sxE = np.asarray(encoder.encode(encoder.tokenise(caption)[None])[0], np.float32)
        name = embeddings.key(caption)
        part, path = (os.path.join(folder, f"{name}{end}") for end in (f".{os.getpid()}.part", ".safetensors"))
        save_file({name: np.ascontiguousarray(text_sxE)}, part)
        os.replace(part, path)
    return folder


def lacking(folder, captions: Iterable[str]) -> list[str]:
    """The captions that a folder of embeddings lacks, and '' where it lacks that: each once, in their order."""
    exists = lambda caption: os.path.exists(os.path.join(folder, f"{embeddings.key(caption)}.safetensors"))
    return [caption for caption in dict.fromkeys(["", *captions]) if not exists(caption)]


def tokenise(caption: str, file: str, width: int, tokens: int) -> np.ndarray:
    """text_sxE of a caption; tokens: with zeroed ones up to this number, 0 = as many as the encoder gave.

    Raises ValueError for a caption that was not encoded, or with another width.
    """
    text_sxE = embeddings.read(caption, file, width)
    return zero_padded(text_sxE, tokens) if tokens else text_sxE


def zero_padded(text_sxE, tokens: int = 512):
    """text_tokensxE: a prompt's embeddings, cut or followed by zeros, all of which are ordinary keys.

    So Wan was trained (Wan 2.1, 2025): it encodes 512 places, zeroes those past the prompt, and masks none.
    """
    return np.pad(text_sxE[:tokens], ((0, max(tokens - len(text_sxE), 0)), (0, 0)))


def drop(text_BxSxE, prompt_BxS, drop_BxS, empty_sxE):
    """A dropped prompt becomes that of no words, empty_sxE; it keeps no more tokens than that has, nor than it had."""
    place_BxS, s = index_in_prompt(prompt_BxS), len(empty_sxE)
    empty_BxSxE = jnp.asarray(empty_sxE)[jnp.minimum(place_BxS, s - 1)]
    text_BxSxE = jnp.where(drop_BxS[..., None] & (place_BxS < s)[..., None], empty_BxSxE, text_BxSxE)
    return text_BxSxE, jnp.where(drop_BxS & (place_BxS >= s), 0, prompt_BxS)


class FrozenReader(nn.Module):
    """No parameters: the tokens are embeddings already."""

    @nn.compact
    def __call__(self, text_BxSxE, prompt_BxS):
        return text_BxSxE
