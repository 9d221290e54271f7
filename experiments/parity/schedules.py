"""How far the schedules of levels are from their reference: the largest error, levels lying in [0, 1].

python -m experiments.parity.schedules GOLDEN_DIR
"""

import json
import pathlib
import sys

import numpy as np

from dit_video.sampling import flow_match_levels, unipc_levels

SCHEDULES = {"flowmatch_euler": flow_match_levels, "unipc": unipc_levels}


def errors(golden_dir) -> dict[str, float]:
    """Of each published schedule of levels and of the timesteps that it gives the network, in thousandths of a level.

    Every 'NAME/shiftS/.../sigmas' of the reference is compared, whatever its number of steps and order.
    """
    reference, found = np.load(pathlib.Path(golden_dir) / "diffusers" / "schedulers.npz"), {}
    for path in reference.files:
        name, shift, *_ = [*path.split("/"), ""]
        if name not in SCHEDULES or not shift.startswith("shift") or not path.endswith("/sigmas"):
            continue
        sigma_K, t_M = reference[path], reference[path.removesuffix("sigmas") + "timesteps"]
        level_K = SCHEDULES[name](len(t_M), float(shift.removeprefix("shift")))
        seen_M = np.floor(level_K * 1000)[:-1] if name == "unipc" else level_K[:-1] * 1000
        for what, far in (("levels", np.abs(level_K - sigma_K)), ("timesteps", np.abs(seen_M - t_M) / 1000)):
            found[f"{name} {what}"] = max(found.get(f"{name} {what}", 0.0), float(far.max()))
    return found


if __name__ == "__main__":
    print(json.dumps(errors(sys.argv[1]), indent=1))
