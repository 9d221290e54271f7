"""Text encoders: each gives tokens on the host (`tokenise`), and embeddings text_BxSxE under params.text."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import numpy as np
from safetensors import safe_open

from dit_video.text import embeddings, labels, words


@dataclasses.dataclass(frozen=True)
class Text:
    """tokenise(caption) -> ids_sxK, host only; module: (ids_BxSxK, prompt_BxS) -> text_BxSxE; drop(ids, prompt,
    drop_BxS) -> ids, prompt: what remains of the dropped prompts' tokens, for guidance."""

    tokenise: Callable[[str], np.ndarray]
    module: nn.Module
    drop: Callable


def make_text(config) -> Text:
    """The text encoder that `config.text` asks for."""
    if config.kind == "words":
        return Text(words.tokenise, words.WordEncoder(config.width, config.depth, config.heads), words.drop)
    if config.kind == "labels":
        return Text(labels.tokenise, labels.LabelEncoder(config.width, config.classes), labels.drop)
    if config.kind == "embeddings":
        read = functools.lru_cache(maxsize=None)(lambda: safe_open(config.file, "np"))
        return Text(
            lambda caption: embeddings.tokenise(caption, read(), config.width),
            embeddings.EmbeddingReader(config.width),
            embeddings.drop,
        )
    raise ValueError(f"text.kind={config.kind!r} is not known. Allowed: 'words', 'labels', 'embeddings'.")
