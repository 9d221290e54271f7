"""Our own weights as one safetensors file: what is needed to sample, with the config beside it."""

import json
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np
from etils import epath

from dit_video.weights.files import Stored, open_safetensors, write_safetensors


def save_weights(path, params, config, step: int) -> None:
    """Writes params {'text', 'dit'} to a .safetensors file: bfloat16, names joined by '/', the config as metadata."""
    bf16 = np.dtype(ml_dtypes.bfloat16)
    named = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tensors = {name: Stored(leaf.shape, bf16, lambda leaf=leaf: np.asarray(leaf)) for name, leaf in named.items()}
    write_weights(path, tensors, config.to_dict(), step)


def write_weights(path, tensors: Mapping[str, Stored], config: dict, step: int, **more) -> None:
    """Writes tensors, by names joined by '/', one at a time. more: JSON-able, kept beside the config."""
    # One entry: safetensors writes several in an order of the moment, and the same weights are to give the same file.
    write_safetensors(path, tensors, {"dit_video": json.dumps({"config": config, "step": step} | more)})


def read_weights(path) -> tuple[dict[str, Stored], dict]:
    """(tensors by name, none of them read yet; the metadata: config, step and more) of a file of our own.

    Raises ValueError where the file carries no config: it is not ours.
    """
    tensors, metadata = open_safetensors(epath.Path(path))
    if "dit_video" not in metadata:
        raise ValueError(f"{path} carries no dit_video config: convert published weights first (dit_video.convert).")
    return tensors, json.loads(metadata["dit_video"])


def load_weights(path, sharding=None):
    """(params in float32, config dict, step) of a file that `save_weights` wrote.

    sharding: None gives numpy arrays; a Sharding, or a tree of one for each parameter, gives jax arrays laid out that
    way, and each tensor leaves the host before the next is read: the host never holds a second copy of the weights.
    Raises ValueError where the file carries no config: it is not ours.
    """
    tensors, ours = read_weights(path)
    tree = nest(tensors)
    read = lambda stored: np.asarray(stored, np.float32)
    if sharding is None:
        return jax.tree.map(read, tree), ours["config"], ours["step"]

    def place(stored, sharding):
        array = read(stored)
        return jax.block_until_ready(jax.make_array_from_callback(array.shape, sharding, array.__getitem__))

    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(place, tree, sharding), ours["config"], ours["step"]


def nest(named: Mapping[str, object]) -> dict:
    """The tree whose leaves are named 'a/b/c'; 'text' and 'dit' are there, though either may have none of its own."""
    tree = {"text": {}, "dit": {}}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
