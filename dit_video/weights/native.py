"""Our own weights as one safetensors file: what is needed to sample, in bfloat16, with the config beside it."""

import json

import jax
import ml_dtypes
import numpy as np
from etils import epath
from safetensors import deserialize
from safetensors.numpy import save as serialise


def save_weights(path, params, config, step: int) -> None:
    """Writes params {'text', 'dit'} to a .safetensors file: bfloat16, names joined by '/', the config as metadata."""
    named = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tensors = {name: np.asarray(leaf).astype(ml_dtypes.bfloat16) for name, leaf in named.items()}
    # One entry: safetensors writes several in an order of the moment, and the same weights are to give the same file.
    metadata = {"dit_video": json.dumps({"config": config.to_dict(), "step": step})}
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serialise(tensors, metadata))


def load_weights(path):
    """(params as float32 numpy arrays, config dict, step) of a file that `save_weights` wrote.

    Raises ValueError where the file carries no config: it is not ours.
    """
    data = epath.Path(path).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {})
    if "dit_video" not in metadata:
        raise ValueError(f"{path} carries no dit_video config: convert published weights first.")
    params = {"text": {}, "dit": {}}  # either may be without any of its own
    # safetensors.numpy writes bfloat16 and does not read it.
    for name, tensor in deserialize(data):
        *parents, leaf = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        dtype = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}[tensor["dtype"]]
        node[leaf] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"]).astype(np.float32)
    ours = json.loads(metadata["dit_video"])
    return params, ours["config"], ours["step"]
