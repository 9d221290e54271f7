"""How well does one model do every task? One table of all figures, from one checkpoint.

    python -m experiments.tasks.measure --weights=runs/tasks [--count=64] [--only=animate,loop]

Prints a line per figure, writes them to OUT/results.json after each task, and the table between the marks of
OUT/README.md. With --only, the other tasks' figures stay if they are of the same weights and count.
"""

import hashlib
import json
import pathlib
import time

import jax
import numpy as np
from absl import app, flags

from dit_video import generate, launch
from experiments.tasks import studies

WEIGHTS = flags.DEFINE_string("weights", None, "A run's workdir, or a .safetensors file.", required=True)
COUNT = flags.DEFINE_integer("count", 64, "Answers per task.", lower_bound=2)
ONLY = flags.DEFINE_list("only", [], "Tasks to measure, by the table's names; by default all.")
MAIN = flags.DEFINE_string(
    "main", None, "What `python -m dit_video.evaluate --out=FILE` wrote of the main job: text may be 3 points below it."
)
OUT = flags.DEFINE_string("out", str(pathlib.Path(__file__).parent), "The folder of results.json and README.md.")

MARKS = "<!-- The table, written by measure.py -->", "<!-- The table's end -->"


def fingerprint(trained) -> str:
    """A name for these weights, by their contents."""
    digest = hashlib.blake2b(digest_size=6)
    for leaf in jax.tree.leaves(trained.params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def write(folder: pathlib.Path, results: dict) -> None:
    """results.json, and the table in README.md where it has the marks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    readme = folder / "README.md"
    text = readme.read_text() if readme.exists() else ""
    if all(mark in text for mark in MARKS):
        before, rest = text.split(MARKS[0])
        readme.write_text(f"{before}{MARKS[0]}\n\n{studies.table(results)}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main(_):
    launch.prepare()
    trained, count, folder = generate.load(WEIGHTS.value), COUNT.value, pathlib.Path(OUT.value)
    make = lambda requests: generate.sample(requests, trained)
    main_job = json.loads(pathlib.Path(MAIN.value).read_text()) if MAIN.value else {}
    measures = studies.measures(count, bool(trained.config.model.window), main_job)
    if unknown := set(ONLY.value) - set(measures):
        raise app.UsageError(f"--only names {sorted(unknown)}. Allowed: {', '.join(measures)}.")

    weights = {
        "config": trained.config.name,
        "step": trained.step,
        "fingerprint": fingerprint(trained),
        "count": count,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}",
    }
    results, file = {"weights": weights, "tasks": {}}, folder / "results.json"
    if ONLY.value and file.exists() and (before := json.loads(file.read_text()))["weights"] == weights:
        results = before
    for name, (asked, measure) in measures.items():
        if ONLY.value and name not in ONLY.value:
            continue
        start = time.perf_counter()
        rows = measure(make)
        found = results["tasks"] | {name: {"asked": asked, "rows": rows}}
        results["tasks"] = {name: found[name] for name in measures if name in found}
        write(folder, results)
        print(f"{name} ({asked}), {time.perf_counter() - start:.0f} s", flush=True)
        for r in rows:
            words = studies.shown(r, "all"), studies.goal_of(r), studies.reached(r)
            print(f"  {r['figure']}: {'  '.join(words)}".rstrip(), flush=True)


if __name__ == "__main__":
    app.run(main)
