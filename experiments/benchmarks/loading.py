"""What does it take to convert and to load a model of 1.4 billion parameters?

    python experiments/benchmarks/loading.py --folder=/somewhere/with/6/GB

Makes a bfloat16 file of Wan 2.1 T2V 1.3B's names and shapes with random numbers, converts it, and loads the outcome on
the devices, each in a process of its own whose largest resident memory it prints beside the weights' own size. The
files are deleted at the end.
"""

import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from absl import app, flags

FOLDER = flags.DEFINE_string("folder", None, "Where the files are made; by default the system's temporary folder.")
FORM = flags.DEFINE_string("form", "T2V-1.3B", "The size, as in configs/wan.py.")
PART = flags.DEFINE_enum("part", None, ["make", "convert", "load"], "One part alone, on the files in --folder.")


def make(folder):
    from configs import wan
    from dit_video.weights import families, files

    config, rng = wan.get_config(FORM.value), np.random.default_rng(0)
    _, published = families.family_of(config)
    bf16 = np.dtype(ml_dtypes.bfloat16)
    draw = lambda shape: lambda: (rng.random(shape, np.float32) - np.float32(0.5)).astype(bf16)
    shapes = {n: r.shape for r in families.FAMILIES["wan"].rules(published) for n in r.names(config.model.depth)}
    tensors = {name: files.Stored(shape, bf16, draw(shape)) for name, shape in shapes.items()}
    files.write_safetensors(folder / "published.safetensors", tensors, {"format": "pt"})


def convert(folder):
    from dit_video.convert import import_file

    print(import_file(folder / "published.safetensors", folder / "ours.safetensors"))


def load(folder):
    import jax

    from dit_video import generate

    before = resident()
    params = generate.load(folder / "ours.safetensors", jax.sharding.SingleDeviceSharding(jax.devices()[0])).params
    leaves = jax.tree.leaves(params)
    sizes = [leaf.nbytes / 1e9 for leaf in leaves]
    print(f"before: {before:.2f} GB. Weights in float32: {sum(sizes):.2f} GB, the largest of them {max(sizes):.2f} GB")


def resident() -> float:
    """The largest resident memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(_):
    if PART.value:
        began = time.monotonic()
        {"make": make, "convert": convert, "load": load}[PART.value](pathlib.Path(FOLDER.value))
        print(f"{PART.value}: {time.monotonic() - began:.0f} s, at most {resident():.2f} GB resident", flush=True)
        return
    with tempfile.TemporaryDirectory(dir=FOLDER.value) as folder:
        for part in ("make", "convert", "load"):
            command = [sys.executable, __file__, f"--folder={folder}", f"--form={FORM.value}", f"--part={part}"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    app.run(main)
