"""python -m dit_video.plan --config=configs/scale.py:wan-14B --topology=v5p:4x8x8 [--slices=2 --tokens=1e12]

What a run will need and do on a pod, before it is rented: memory by kind, what is sent, step time and how many days.
Compiles the very step of `train` for it ahead of time, with nothing allocated; needs libtpu for TPUs (pip install
'.[plan]'). Without it, and for GPUs, the step is compiled for as many devices of the host instead; cpu:8 asks for that.
The estimate then says whether it fits. Writes an HTML page too. Exit code 1 if the step does not fit.
"""

import functools
import os
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from dit_video import arguments

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config file.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "CHIP:SHAPE of a slice, as v5p:4x8x8, v6e:16x16, h100:64 or cpu:8.")
SLICES = flags.DEFINE_integer("slices", 1, "How many such slices, joined by the data centre's network.")
TOKENS = flags.DEFINE_float("tokens", 1e12, "How many patches to train on, for the days it takes.")
flags.register_validator("tokens", lambda tokens: 0 < tokens < float("inf"), "must be a number above 0.")
QUICK = flags.DEFINE_bool("quick", False, "Compile with XLA's least effort: sooner, memory may differ a little.")
HTML = flags.DEFINE_string("html", "plan.html", "Where the page goes; empty = nowhere.")


def main(_):
    # Before jax is loaded: what is planned for need not be there, and what is there is not touched.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from dit_video import launch, planning

    launch.prepare()
    page = HTML.value and pathlib.Path(HTML.value)
    try:
        if page:
            page.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of compiling
            if page.is_dir():
                raise ValueError(f"--html={page} is a folder: name a file.")
        jax.config.update("jax_num_cpu_devices", planning.parse_topology(TOPOLOGY.value, SLICES.value).chips)
        planned = planning.plan(CONFIG.value, TOPOLOGY.value, SLICES.value, QUICK.value)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(planning.text(planned, TOKENS.value))
    if page:
        page.write_text(planning.page(planned, TOKENS.value))
        print(f"\n{page}")
    sys.exit(0 if planned.fits else 1)


def run():
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=functools.partial(arguments.parse, CONFIG))


if __name__ == "__main__":
    run()
