"""Reading the reference arrays: a state dict, the arguments of its class, and what it took and gave."""

import json
import pathlib

import numpy as np
import safetensors


def load(golden_dir, path: str) -> tuple[dict, dict, dict]:
    """(state dict, arguments of the class, inputs and outputs) of a reference model, such as 'transformers/umt5'."""
    golden_dir = pathlib.Path(golden_dir)
    with safetensors.safe_open(golden_dir / f"{path}.safetensors", "np") as file:
        state, config = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])
    return state, config, dict(np.load(golden_dir / f"{path}_io.npz"))


def error(ours, theirs) -> float:
    """The largest difference, relative to the reference's largest value. Raises ValueError for another shape."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{ours.shape} cannot be compared with the reference's {theirs.shape}.")
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def limit(what: str) -> float:
    """What an error, by the name that it has in the tables, must be below."""
    name = what.split(": ")[-1]
    if name.startswith("block "):
        return 2e-6
    if name.startswith("tables"):
        return 1e-13
    if name.startswith(("flowmatch_euler", "unipc")):
        return 1e-6
    # See `diffusion.training_errors`: the reference's own float32.
    return 2e-5 if name == "gradient of the frequency that is an ulp off" else 1e-5
