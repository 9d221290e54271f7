"""python -m experiments.parity [GOLDEN_DIR]

Compares every published model with its reference's arrays (by default those of DIT_VIDEO_SHARED, ../shared) and writes
the table of README.md. Exits with 1 where an error is beyond its limit. Minutes on a laptop.
"""

import importlib.metadata
import os
import pathlib
import platform
import sys
import time

import jax

from experiments.parity import autoencoders, diffusion, navit, schedules, text, wan
from experiments.parity.arrays import limit

HERE = pathlib.Path(__file__).resolve().parent
PARTS = {
    "DiT, DDPM, SiT, Latte": diffusion,
    "Wan's transformer": wan,
    "Autoencoders: Stable Diffusion's (sd), Wan's 2.1 and 2.2": autoencoders,
    "Text encoders: T5 v1.1, UMT5, CLIP": text,
    "Schedules of levels": schedules,
    "NaViT's packing": navit,
}
HEAD = """# Published models against their references

Our definitions with the references' weights, all random, those that are published as zeros included, on the references'
inputs. An error is the largest difference, relative to the reference's largest value; of schedules it is the difference
itself, of masks, rows and buckets the number of entries that differ. Limits: 1e-5 for a whole model, 2e-6 for one block
of a transformer, 1e-6 for schedules, 1e-13 for DDPM's float64 tables. Two of DiT's 256 features of the timestep have
2e-5 for their weights' gradient: the reference's float32 frequency (number 12 of 128) is an ulp off what its exponent
rounds to, which is 3e-5 radians at timestep 999. The references' own float32 is 3e-7 to 8e-7 from their float64.
After three steps of AdamW, entries whose gradient is below 1e-4 of their array's largest are left out as the key's bias
is: Adam divides by it, and rounding decides where they go.

    {command}

{where}
"""


def machine() -> str:
    cpu = pathlib.Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in cpu.read_text().splitlines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "numpy"))
    kind = names[0] if names and jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    return f"{os.cpu_count()} cores, {kind}; Python {platform.python_version()}, {versions}; float32"


def table(found: dict[str, float]) -> list[str]:
    lines = ["| compared | largest error | limit |", "|---|---|---|"]
    return lines + [f"| {what} | {e:.1e} | {limit(what):.0e} |" for what, e in found.items()]


def main(golden_dir: pathlib.Path) -> list[str]:
    """Writes README.md; returns a line for each error beyond its limit."""
    lines, beyond, total = [], [], 0
    for name, part in PARTS.items():
        start = time.monotonic()
        found = part.errors(golden_dir)
        print(f"{name}: {len(found)} in {time.monotonic() - start:.0f} s", flush=True)
        beyond += [f"{what}: {e:.1e}, limit {limit(what):.0e}" for what, e in found.items() if not e < limit(what)]
        total += len(found)
        lines += ["", f"## {name}", "", *table(found)]
    where = f"{machine()}. {total} comparisons, {len(beyond)} beyond their limits."
    head = HEAD.format(command="python -m experiments.parity", where=where)
    (HERE / "README.md").write_text(head + "\n".join(lines) + "\n")
    return beyond


if __name__ == "__main__":
    shared = pathlib.Path(os.environ.get("DIT_VIDEO_SHARED", HERE.parents[1].parent / "shared"))
    golden = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else shared / "golden"
    if not golden.is_dir():
        sys.exit(f"{golden} does not exist: give the directory of reference arrays.")
    if beyond := main(golden):
        sys.exit("\n".join(beyond))
