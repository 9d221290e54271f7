"""Class labels as prompts of one token (DiT, SiT, Latte): a table of labels, its last row for "no class".

B rows, S tokens per row, E text width, s = 1 tokens of one prompt.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np


def tokenise(caption: str, classes: int) -> np.ndarray:
    """ids_sx1 of a caption that is a class number, or of an empty one: -1, no class.

    Raises ValueError for what is neither, or not below `classes`.
    """
    number = caption.strip()
    if number and not (number.isdecimal() and int(number) < classes):
        raise ValueError(f"caption {caption!r} is no class: text.kind='labels' takes 0 to {classes - 1}, or nothing.")
    return np.array([[int(number) if number else -1]], np.int32)


def drop(ids_BxSxK, prompt_BxS, drop_BxS):
    """A dropped label becomes "no class"."""
    return jnp.where(drop_BxS[..., None], -1, ids_BxSxK), prompt_BxS


class LabelEncoder(nn.Module):
    width: int
    classes: int

    @nn.compact
    def __call__(self, ids_BxSxK, prompt_BxS):
        """text_BxSxE: each label's row of the table."""
        table = self.param("table", nn.initializers.normal(0.02), (self.classes + 1, self.width), jnp.float32)
        ids_BxS = ids_BxSxK[..., 0]
        return table[jnp.where(ids_BxS < 0, self.classes, ids_BxS)]
