"""dit_video: train and sample Sora-style video diffusion transformers in JAX, on clips of any size and duration.

from dit_video import Request, load, sample, train

train(config, "runs/shapes")
videos = sample([Request("a red circle circles clockwise", width=48, height=32, frames=9)], load("runs/shapes"))
"""

_FACES = {"train": "trainer", "sample": "generate", "load": "generate", "Request": "tasks", "Clip": "patches"}

__all__ = sorted(_FACES)


def __getattr__(name):
    # Imported when asked for, so that a mistyped flag is refused before jax is even loaded.
    if name not in _FACES:
        raise AttributeError(f"module 'dit_video' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"dit_video.{_FACES[name]}"), name)


def __dir__():
    return sorted({*globals(), *_FACES})  # what a notebook completes
