"""Class labels as prompts of one token (DiT, SiT, Latte): a table of labels, its last row for "no class".

B rows, S tokens per row, E text width, s = 1 tokens of one prompt.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np


def tokenise(caption: str) -> np.ndarray:
    """ids_sx1 of a caption that is a class number, or of an empty one: -1, no class."""
    if caption and not caption.strip().isdigit():
        raise ValueError(f"caption {caption!r} is not a class number; text.kind='labels' takes digits or nothing.")
    return np.array([[int(caption) if caption.strip() else -1]], np.int32)


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
