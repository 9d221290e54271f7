"""Text encoders: each gives tokens on the host (`tokenise`), and embeddings text_BxSxE under params.text."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import numpy as np

from dit_video.text import embeddings, frozen, labels, words


@dataclasses.dataclass(frozen=True)
class Text:
    """tokenise(caption) -> ids_sxK, host only, can be pickled; module: (ids_BxSxK, prompt_BxS) -> text_BxSxE;
    drop(ids, prompt, drop_BxS) -> ids, prompt: what remains of the dropped prompts' tokens, for guidance."""

    tokenise: Callable[[str], np.ndarray]
    module: nn.Module
    drop: Callable


def make_text(config) -> Text:
    """The text encoder that `config.text` asks for."""
    if config.kind == "words":
        return Text(words.tokenise, words.WordEncoder(config.width, config.depth, config.heads), words.drop)
    if config.kind == "labels":
        tokenise = functools.partial(labels.tokenise, classes=config.classes)
        return Text(tokenise, labels.LabelEncoder(config.width, config.classes), labels.drop)
    if config.kind == "embeddings":
        tokenise = functools.partial(embeddings.tokenise, file=config.file, width=config.width)
        return Text(tokenise, embeddings.EmbeddingReader(config.width), embeddings.drop)
    if config.kind == "frozen":
        tokenise = functools.partial(frozen.tokenise, file=config.file, width=config.width, tokens=config.tokens)
        return Text(tokenise, frozen.FrozenReader(), functools.partial(frozen.drop, empty_sxE=tokenise("")))
    raise ValueError(f"text.kind={config.kind!r} is not known. Allowed: 'words', 'labels', 'embeddings', 'frozen'.")
