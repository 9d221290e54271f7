"""python -m dit_video.evaluate --workdir=runs/shapes [--count=512 --seeds=3 --split=train --out=FILE.json]

Samples prompts of the embedded world, all sizes and durations equally, half with two objects, and reads colour, shape
and motion back from the pixels. Prints a table, and writes it as JSON.
"""

import json
import sys

from absl import app, flags

WORKDIR = flags.DEFINE_string("workdir", None, "A run, whose newest checkpoint's averaged weights are taken.")
WEIGHTS = flags.DEFINE_string("weights", None, "Or a .safetensors file of weights.")
COUNT = flags.DEFINE_integer("count", 512, "Prompts per seed.", lower_bound=2)
SEEDS = flags.DEFINE_integer("seeds", 3, "Sampling seeds.", lower_bound=1)
SPLIT = flags.DEFINE_enum("split", "train", ["train", "heldout"], "Combinations trained on, or never seen together.")
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; by default the config's.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; by default the config's.")
SOLVER = flags.DEFINE_string("solver", None, "Solver; by default the config's.")
OUT = flags.DEFINE_string("out", None, "Where to write the figures as JSON.")


def main(_):
    import numpy as np
    from etils import epath

    from dit_video import generate, launch
    from dit_video.canvas import Request
    from dit_video.data import shapes
    from dit_video.evaluation.following import PARTS, follow

    launch.prepare()
    if (WORKDIR.value is None) == (WEIGHTS.value is None):
        sys.exit("Give one of --workdir and --weights.")
    trained = generate.load(WORKDIR.value or WEIGHTS.value)
    flags_given = {"steps": STEPS.value, "guidance": GUIDANCE.value, "solver": SOLVER.value}
    settings = {k: v for k, v in flags_given.items() if v is not None}
    prompts, tables = shapes.prompts(COUNT.value, SPLIT.value), []
    for seed in range(SEEDS.value):
        requests = [
            Request(p.caption, p.width, p.height, p.frames, p.fps, seed=seed * COUNT.value + i)
            for i, p in enumerate(prompts)
        ]
        tables.append(follow(prompts, generate.sample(requests, trained, **settings)))
        print(f"seed {seed}: " + json.dumps(tables[-1]), file=sys.stderr)
    print(f"{trained.source}, step {trained.step}; {SPLIT.value} prompts; mean of {len(tables)} seeds (deviation)")
    figures = {"source": trained.source, "step": trained.step, "split": SPLIT.value, "settings": settings, "kinds": {}}
    for kind in tables[0]:
        values = {part: [table[kind][part] for table in tables] for part in PARTS}
        figures["kinds"][kind] = {
            part: {"mean": float(np.mean(v)), "deviation": float(np.std(v))} for part, v in values.items()
        } | {"chance": tables[0][kind]["chance"], "prompts": tables[0][kind]["prompts"]}
        shown = "  ".join(f"{part} {np.mean(v):6.1%} ({np.std(v):.1%})" for part, v in values.items())
        print(f"  {kind}: {shown}  chance {tables[0][kind]['chance']:.2%}  ({tables[0][kind]['prompts']} prompts)")
    if OUT.value:
        epath.Path(OUT.value).write_text(json.dumps(figures, indent=1))


def run():
    app.run(main)


if __name__ == "__main__":
    run()
