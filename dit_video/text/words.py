"""A small byte-level text encoder, trained with the model: a token is a word's bytes. No vocabulary, no download.

B rows, S tokens per row, K bytes per token, E text width, s tokens of one prompt.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from dit_video.attention import attend, layer_norm, sinusoids

BYTES = 12


def tokenise(caption: str) -> np.ndarray:
    """ids_sxK: a null token (all 0), then each word's UTF-8 bytes + 1, longer words cut into pieces of K bytes."""
    pieces = [b""]
    for word in caption.lower().split():
        word = word.encode()
        pieces += [word[i : i + BYTES] for i in range(0, len(word), BYTES)]
    ids_sxK = np.zeros((len(pieces), BYTES), np.int32)
    for row, piece in zip(ids_sxK, pieces):
        row[: len(piece)] = np.frombuffer(piece, np.uint8).astype(np.int32) + 1
    return ids_sxK


def drop(ids_BxSxK, prompt_BxS, drop_BxS):
    """A dropped prompt keeps its null token alone: what the model sees without guidance."""
    null_BxS = (ids_BxSxK == 0).all(-1)
    return ids_BxSxK, jnp.where(drop_BxS & ~null_BxS, 0, prompt_BxS)


class WordEncoder(nn.Module):
    """Embeds each word's bytes, then lets the words of a prompt see one another (pre-norm transformer layers).

    What all tokens share grows fastest in training and comes to drown what tells words apart. So there are no biases,
    the bytes that pad a word are zero, and of what the layers add, what a prompt's tokens have in common is taken away.
    """

    width: int = 128
    depth: int = 2
    heads: int = 4
    byte_width: int = 16

    @nn.compact
    def __call__(self, ids_BxSxK, prompt_BxS):
        """text_BxSxE; a prompt's embeddings do not depend on what else is in the row, nor on where it lies."""
        B, S, K = ids_BxSxK.shape
        flat = lambda x: x.reshape(-1, x.shape[-1])  # as in `matmul`

        def dense(width, name):
            layer = nn.Dense(width, use_bias=False, name=name)
            return lambda x: layer(flat(x)).reshape(*x.shape[:-1], width)

        bytes_BxSxKxe = nn.Embed(257, self.byte_width, embedding_init=nn.initializers.normal(1.0), name="bytes")(
            ids_BxSxK
        )
        bytes_BxSxKxe = jnp.where(ids_BxSxK[..., None] == 0, 0.0, bytes_BxSxKxe)
        word_BxSxE = dense(self.width, name="word")(bytes_BxSxKxe.reshape(B, S, -1))
        word_BxSxE = word_BxSxE + dense(self.width, name="place")(sinusoids(index_in_prompt(prompt_BxS), 32, 100.0))
        h_BxSxE = word_BxSxE
        tag = (prompt_BxS, jnp.zeros_like(prompt_BxS))
        for i in range(self.depth):
            x_BxSxE = layer_norm(h_BxSxE)
            q, k, v = (
                dense(self.width, name=f"{n}_{i}")(x_BxSxE).reshape(B, S, self.heads, -1) for n in ("q", "k", "v")
            )
            o, _ = attend(q, k, v, tag, tag)
            h_BxSxE = h_BxSxE + dense(self.width, name=f"o_{i}")(o.reshape(B, S, -1))
            x_BxSxE = nn.gelu(dense(4 * self.width, name=f"mlp_in_{i}")(layer_norm(h_BxSxE)))
            h_BxSxE = h_BxSxE + dense(self.width, name=f"mlp_out_{i}")(x_BxSxE)
        context_BxSx1xE = (h_BxSxE - word_BxSxE)[:, :, None]
        even = jnp.zeros_like(context_BxSx1xE)  # all tokens of a prompt weigh the same: their mean
        mean_BxSx1xE, _ = attend(even, even, context_BxSx1xE, tag, tag)
        context_BxSxE = (context_BxSx1xE - mean_BxSx1xE)[:, :, 0]
        return (layer_norm(word_BxSxE) + layer_norm(context_BxSxE, 1e-3)) * 0.5**0.5


def index_in_prompt(prompt_BxS):
    """Each token's place in its prompt, from 0."""
    place_S = jnp.arange(prompt_BxS.shape[1])
    starts_BxS = jnp.where(prompt_BxS != jnp.pad(prompt_BxS, ((0, 0), (1, 0)))[:, :-1], place_S, 0)
    return place_S - lax.cummax(starts_BxS, axis=1)
