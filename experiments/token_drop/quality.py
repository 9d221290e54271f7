"""Is a model that leaves patches out in training better, or worse, than one that does not, at equal compute?

    python -m experiments.token_drop.quality --workdir=runs/token_drop --steps=2000

Trains the embedded world's config with nothing left out for --steps steps, then with --drop left out but for the last
--whole share of the steps, for as many steps as cost the same multiply-accumulates of the model (counted in packed
batches; text, groups and padding that the rows have room for cost time beside it). Prints for both: steps, clips seen,
seconds of training, validation loss on whole clips, and the shares of prompts that samples follow. Typed again, it goes
on where it was stopped.
"""

import json

import jax
import numpy as np
from absl import app, flags
from etils import epath

from dit_video import Request, load, sample, train
from dit_video.data import shapes
from dit_video.evaluation.following import PARTS, follow
from dit_video.metrics import read_metrics
from dit_video.step import make_run
from experiments.token_drop.cost import config_of, packed

WORKDIR = flags.DEFINE_string("workdir", "runs/token_drop", "Where the runs go.")
STEPS = flags.DEFINE_integer("steps", 2000, "Steps of the run that leaves nothing out.", lower_bound=1)
DROP = flags.DEFINE_float("drop", 0.5, "Share left out.", lower_bound=0, upper_bound=0.95)
WHOLE = flags.DEFINE_float("whole", 0.2, "Share of the steps, at the end, that leave nothing out.")
SEED = flags.DEFINE_integer("seed", 0, "Of both runs.")
COUNT = flags.DEFINE_integer("count", 144, "Prompts that samples are asked for.", lower_bound=2)


def work(config) -> float:
    """The model's multiply-accumulates of a step, by 20 packed batches."""
    return packed(config, make_run(config), 20)[3]


def equal_steps(config, plain) -> int:
    """Steps of `config` that cost what the steps of `plain` do; its last ones, of whole clips, cost what plain's do."""
    each = (1 - config.data.whole) * work(config) + config.data.whole * work(plain)
    return round(plain.steps * work(plain) / each)


def measure(config, workdir, prompts) -> dict:
    """Trains `config`, and says what it cost and gives."""
    train(config, workdir)
    lines = read_metrics(workdir / "metrics.jsonl")
    logged = [line for line in lines if "clips" in line]
    patches = config.data.rows * config.data.length * config.log_every
    requests = [Request(p.caption, p.width, p.height, p.frames, p.fps, seed=i) for i, p in enumerate(prompts)]
    return {
        "steps": config.steps,
        "clips": sum(line["clips"] for line in logged) * config.log_every,
        "seconds": sum(patches * line["patch_fill"] / line["tokens_per_second"] for line in logged),
        "validation": [line["validation"] for line in lines if "validation" in line][-1],
        "followed": follow(prompts, sample(requests, load(workdir))),
    }


def main(_):
    plain, dropped = config_of(0.0), config_of(DROP.value)
    dropped.data.whole = WHOLE.value
    for config in (plain, dropped):
        config.seed, config.steps, config.sample_every = SEED.value, STEPS.value, 0
        config.eval_every = max(STEPS.value // 4, 1)
    dropped.steps = equal_steps(dropped, plain)
    workdir, prompts, found = epath.Path(WORKDIR.value), shapes.prompts(COUNT.value, "train"), {}
    for name, config in (("nothing", plain), (f"{DROP.value:.0%}", dropped)):
        found[name] = measure(config, workdir / f"left_out_{name.rstrip('%')}_seed{SEED.value}", prompts)
        print(json.dumps({name: found[name]}), flush=True)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"| left out | steps | clips seen | seconds | validation | {' | '.join(PARTS)} |")
    print("|---|---|---|---|---|" + "---|" * len(PARTS))
    for name, f in found.items():
        shares = [np.mean([kind[part] for kind in f["followed"].values()]) for part in PARTS]
        shares = " | ".join(f"{share:.1%}" for share in shares)
        print(f"| {name} | {f['steps']} | {f['clips']:.0f} | {f['seconds']:.0f} | {f['validation']:.4f} | {shares} |")


if __name__ == "__main__":
    app.run(main)
