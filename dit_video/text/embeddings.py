"""Precomputed embeddings of any encoder as text tokens: what a caption's row of a file holds, and nothing trained but
the null token.

B rows, S tokens per row, E text width, s tokens of one prompt. On the way through the loader a token is E + 1 floats:
1 and its embedding, or zeros for the null token that opens each prompt.
"""

import functools
import hashlib
import os

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open


def key(caption: str) -> str:
    """The caption's name in the file: SHA-256 of its UTF-8, in hex."""
    return hashlib.sha256(caption.encode()).hexdigest()


_open = functools.lru_cache(maxsize=1)(safe_open)


def tokenise(caption: str, file: str, width: int) -> np.ndarray:
    """ids_sx(E+1) of a caption: a null token, then the s-1 that the file holds; see `read`."""
    if not caption:
        return np.zeros((1, width + 1), np.float32)
    return np.pad(np.pad(read(caption, file, width), ((0, 0), (1, 0)), constant_values=1), ((1, 0), (0, 0)))


def read(caption: str, file: str, width: int) -> np.ndarray:
    """embedding_sxE of a caption: the tensor named by `key` in a safetensors file.

    file: one for all captions, or a folder with one for each, `key`.safetensors. Raises ValueError for a caption that
    is not there, or is there with another width.
    """
    if not file:
        raise ValueError(f"text.file is empty: name where the embedding of {caption!r} lies, or give the prompt ''.")
    name = key(caption)
    try:
        if os.path.isdir(file):
            with safe_open(os.path.join(file, f"{name}.safetensors"), "np") as opened:
                embedding_sxE = np.asarray(opened.get_tensor(name), np.float32)
        else:
            embedding_sxE = np.asarray(_open(file, "np").get_tensor(name), np.float32)
    except (SafetensorError, FileNotFoundError) as error:
        if not os.path.exists(file):
            raise
        raise ValueError(f"no embedding of the caption {caption!r} (tensor {name}) in {file}.") from error
    if embedding_sxE.ndim != 2 or embedding_sxE.shape[1] != width:
        raise ValueError(f"the embedding of {caption!r} is {embedding_sxE.shape}; text.width={width} was expected.")
    return embedding_sxE


def drop(ids_BxSxK, prompt_BxS, drop_BxS):
    """A dropped prompt keeps its null token alone."""
    return ids_BxSxK, jnp.where(drop_BxS & (ids_BxSxK[..., 0] != 0), 0, prompt_BxS)


class EmbeddingReader(nn.Module):
    width: int

    @nn.compact
    def __call__(self, ids_BxSxK, prompt_BxS):
        """text_BxSxE: the embeddings as they came, the null token's learned."""
        null_E = self.param("null", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        return jnp.where(ids_BxSxK[..., :1] != 0, ids_BxSxK[..., 1:], null_E)
