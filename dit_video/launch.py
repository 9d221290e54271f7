"""What every command does before it touches a device."""

import os

import jax
from absl import logging


def prepare() -> None:
    """Sets up the log and the cache of compiled programs (JAX_COMPILATION_CACHE_DIR, by default in ~/.cache)."""
    logging.set_verbosity(logging.WARNING)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/dit_video/xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
