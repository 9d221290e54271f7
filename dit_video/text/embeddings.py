"""Precomputed embeddings of any encoder as text tokens: what a caption's row of a file holds, and nothing trained but
the null token.

B rows, S tokens per row, E text width, s tokens of one prompt. On the way through the loader a token is E + 1 floats:
1 and its embedding, or zeros for the null token that opens each prompt.
"""

import functools
import hashlib

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open


def key(caption: str) -> str:
    """The caption's name in the file: SHA-256 of its UTF-8, in hex."""
    return hashlib.sha256(caption.encode()).hexdigest()


_open = functools.lru_cache(maxsize=1)(safe_open)


def tokenise(caption: str, file: str, width: int) -> np.ndarray:
    """ids_sx(E+1) of a caption, from a safetensors file whose tensors are named by `key` and are [s-1, E].

    Raises ValueError for a caption that the file does not hold, or holds with another width.
    """
    if not caption:
        return np.zeros((1, width + 1), np.float32)
    opened = _open(file, "np")
    try:
        embedding_sxE = np.asarray(opened.get_tensor(key(caption)), np.float32)
    except SafetensorError as error:
        raise ValueError(f"no embedding of the caption {caption!r} (tensor {key(caption)}) in {file}.") from error
    if embedding_sxE.ndim != 2 or embedding_sxE.shape[1] != width:
        raise ValueError(f"the embedding of {caption!r} is {embedding_sxE.shape}; text.width={width} was expected.")
    return np.pad(np.pad(embedding_sxE, ((0, 0), (1, 0)), constant_values=1), ((1, 0), (0, 0)))


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
