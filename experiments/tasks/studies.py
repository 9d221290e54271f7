"""The table of the tasks: what is asked, how often, what is read from the answers, and the goals beside it.

A measure takes how many answers to ask for and `make`, requests -> videos, and gives rows: a figure's name, its mean of
each kind of answer, how many there were, and its goal.
"""

import contextlib
import dataclasses
import functools
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from dit_video.canvas import Request
from dit_video.data import shapes
from dit_video.evaluation.following import followed
from dit_video.evaluation.scorer import score
from experiments.tasks import figures
from experiments.tasks.figures import FRAMES

UNSEEN = ((48, 40), (40, 48), (56, 32), (32, 56), (48, 48), (96, 32))  # width, height; 96 is 1.5 times the largest, 64
TIMES = 20  # of the longest trained clip, a roll-out
KINDS = "all", "one object", "two objects"


@dataclasses.dataclass(frozen=True)
class Goal:
    """How a figure is shown, and what it should at least, or at most, be."""

    form: str = "{:.1%}"
    least: float | None = None
    most: float | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """A task: what is asked, in words and for the i-th time; what is read from the answers; and the goals.

    A figure that `goals` does not name is not in the table.
    """

    asked: str
    case: Callable[[int], figures.Case]
    read: Sequence[Callable]
    goals: dict[str, Goal]


KEPT = {part: Goal(least=0.95) for part in ("colour", "shape", "motion")}
LOOPED = {"seamless": Goal(), "moving": Goal(), "seamless and moving": Goal(least=0.95), "no jump": Goal()}
CONNECTED = {"no jump": Goal(least=1), "no jump by its own steps": Goal()}
UNCHANGED = {"given pixels unchanged": Goal("{:.0%}", least=1)}


def near(limit):
    return {"path error": Goal("{:.2f} px", most=limit), f"path within {limit:g} px": Goal()}


def extension(direction, new, rates):
    at = " or ".join(map(str, rates))
    return Study(
        f"5 frames at {at} a second, {new} more {direction}",
        figures.extend(direction, new, rates),
        (figures.identity, figures.path(1.5)),
        KEPT | near(1.5),
    )


# Clips that are longer than those trained on are at 12 frames a second: no time is beyond what was trained on, 1.5 s.
STUDIES = {
    "animate": Study(
        "the first of 13 frames",
        figures.animate,
        (figures.identity,),
        KEPT | {"motion": Goal(least=0.9)},
    ),
    "extend": extension("forward", 5, (8, 12)),
    "extend twice": extension("forward", 10, (12,)),
    "extend backward": extension("backward", 5, (8, 12)),
    "extend backward twice": extension("backward", 10, (12,)),
    "loop": Study("9 frames of one period, 4 more", figures.loop(True), (figures.seam, figures.jump), LOOPED),
    "loop from a prompt": Study("9 frames and 4 more", figures.loop(False), (figures.seam, figures.jump), LOOPED),
    "connect": Study(
        "5 frames and 4 of one clip, 4 between",
        figures.connect(4, (8, 12)),
        (figures.jump,),
        UNCHANGED | CONNECTED,
    ),
    "connect far": Study(
        "5 frames and 4 of one clip, 8 between",
        figures.connect(8, (12,)),
        (figures.jump,),
        UNCHANGED | CONNECTED,
    ),
    "paint in": Study(
        "an object hidden in frames 5 to 8 of 13",
        figures.paint_in,
        (figures.path(2, objects=1), figures.background),
        near(2) | {"background error": Goal("{:.3f}", most=0.05)},
    ),
    "paint around": Study(
        "13 frames, 8 pixels more on every side",
        figures.paint_around,
        (figures.path(2), figures.background),
        near(2) | {"background error": Goal("{:.3f}", most=0.05)},
    ),
    "edit": Study(
        f"another colour, strength {figures.EDIT_STRENGTH}, guidance {figures.EDIT_GUIDANCE:g}",
        figures.edit,
        (figures.identity, figures.path(2)),
        {"colour": Goal(least=0.9)} | near(2),
    ),
    # Longer than what was trained on, in parts.
    "extend a long video": Study(
        "25 frames at 8 or 12 a second, 16 more forward",
        figures.extend("forward", 16, (8, 12), frames=25),
        (figures.identity, figures.path(1.5)),
        UNCHANGED | dict.fromkeys(("colour", "shape", "motion"), Goal()) | {"path error": Goal("{:.2f} px")},
    ),
    "paint in a long video": Study(
        "an object hidden in 8 frames of 49",
        functools.partial(figures.paint_in, frames=49, hidden=8),
        (figures.path(2, objects=1), figures.background),
        near(2) | {"background error": Goal("{:.3f}", most=0.05)},
    ),
    "interpolate to 49 frames": Study(
        "every fourth of them, at 32 or 48 a second",
        figures.interpolate_long,
        (figures.path(2), figures.background),
        {"path error": Goal("{:.2f} px"), "path within 2 px": Goal(), "background error": Goal("{:.3f}")},
    ),
    "interpolate": Study(
        "every second of 13 frames",
        figures.interpolate,
        (figures.path(2), figures.background),
        {"path error": Goal("{:.2f} px"), "path within 2 px": Goal(), "background error": Goal("{:.3f}")},
    ),
}


# The measures.

PICK = {
    "all": lambda objects, fps: True,
    "one object": lambda objects, fps: objects == 1,
    "two objects": lambda objects, fps: objects == 2,
    "8 fps": lambda objects, fps: fps == 8,
    "12 fps": lambda objects, fps: fps == 12,
}


def rows_of(read: Sequence[dict], told: Sequence[tuple[int, float]], goals: dict[str, Goal]) -> list[dict]:
    """Of each answer its figures, and its number of objects and frame rate."""
    rows = []
    for figure, goal in goals.items():
        values = {}
        for kind, pick in PICK.items():
            some = [r[figure] for r, t in zip(read, told, strict=True) if pick(*t)]
            values |= {kind: float(np.mean(some))} if some else {}
        rows.append({"figure": figure, "values": values, "n": len(read)} | dataclasses.asdict(goal))
    return rows


def measure_study(study: Study, count: int, make) -> list[dict]:
    """make: requests -> videos."""
    cases = [study.case(i) for i in range(count)]
    videos = make([case.request for case in cases])
    reads = (figures.unchanged, *study.read)
    read = [{k: v for f in reads for k, v in f(case, video).items()} for case, video in zip(cases, videos)]
    goals = (UNCHANGED if cases[0].known_TxYxX.any() else {}) | study.goals
    return rows_of(read, [(len(c.scene.objects), c.request.fps) for c in cases], goals)


def ask(prompts: Sequence[shapes.Prompt], make) -> tuple[list[dict], list[tuple]]:
    """What of the prompts their videos show, and what `rows_of` wants to be told."""
    videos = make([Request(p.caption, p.width, p.height, p.frames, p.fps, seed=i) for i, p in enumerate(prompts)])
    read = [
        dataclasses.asdict(followed(score(v, np.arange(len(v)) / p.fps), p.caption)) for p, v in zip(prompts, videos)
    ]
    return read, [(len(shapes.parse_caption(p.caption)), p.fps) for p in prompts]


def measure_text(main: dict, count: int, make) -> list[dict]:
    """As `python -m dit_video.evaluate --count=512 --seeds=1` does, where count is 64; main: what it wrote of another
    model, which this one should come near, or {}."""
    goals = {"colour": Goal(), "shape": Goal(), "motion": Goal(), "all": Goal()}
    *parts, whole = rows_of(*ask(shapes.prompts(8 * count, "train"), make), goals)
    near = [
        whole
        | {
            "figure": f"all at once, {kind}",
            "values": {"all": whole["values"][kind]},
            "least": found["all"]["mean"] - 0.03,
        }
        for kind, found in main.get("kinds", {}).items()
    ]
    return [*parts, whole | {"figure": "all at once"}, *near]


def measure_unseen(count: int, make) -> list[dict]:
    """The same prompts and seeds on canvases trained on, and on others."""
    seen = shapes.prompts(2 * count, "train", seed=1)
    other = [dataclasses.replace(p, **dict(zip(("width", "height"), UNSEEN[i // 2 % 6]))) for i, p in enumerate(seen)]
    answers_seen, answers_other = (list(zip(*ask(prompts, make))) for prompts in (seen, other))
    answers_largest = [a for a, p in zip(answers_other, other) if (p.width, p.height) == UNSEEN[-1]]
    of_all = lambda answers: rows_of(*zip(*answers), {"all": Goal()})[0]
    on_seen, on_other, on_largest = map(of_all, (answers_seen, answers_other, answers_largest))
    share = {k: v / max(on_seen["values"][k], 1e-9) for k, v in on_other["values"].items()}
    return [
        on_seen | {"figure": "all at once, sizes trained on"},
        on_other | {"figure": "all at once, other sizes"},
        on_largest | {"figure": "all at once, {}x{}".format(*UNSEEN[-1])},
        on_other | {"figure": "the second of the first", "values": share, "least": 0.9},
    ]


def measure_rollout(causal: bool, count: int, make) -> list[dict]:
    """Windows of the longest trained clip are scored each for itself, the first five of twenty and the last."""
    prompts = [p for p in shapes.prompts(12 * count, "train", seed=2) if (p.frames, p.fps) == (FRAMES, 8)][:count]
    at = lambda frames: [
        Request(p.caption, p.width, p.height, frames, p.fps, seed=i, task="rollout", causal=causal)
        for i, p in enumerate(prompts)
    ]
    short, long = TIMES // 4 * FRAMES, TIMES * FRAMES
    make(at(short))  # compiles
    with watched() as first:
        make(at(short))
    with watched() as whole:
        videos = make(at(long))
    time_T = np.arange(FRAMES) / 8
    read = []
    for p, video in zip(prompts, videos):
        windows = video.reshape(TIMES, FRAMES, *video.shape[1:])
        right = [followed(score(w, time_T), p.caption).all for w in windows]
        quarter = TIMES // 4
        read.append(
            {"first quarter": float(np.mean(right[:quarter])), "last quarter": float(np.mean(right[-quarter:]))}
        )
    told = [(len(shapes.parse_caption(p.caption)), p.fps) for p in prompts]
    rows = rows_of(read, told, {"first quarter": Goal(least=0.8), "last quarter": Goal()})
    share = {k: v / max(rows[0]["values"][k], 1e-9) for k, v in rows[1]["values"].items()}
    later = (whole["seconds"] - first["seconds"]) / (long - short)
    machine = lambda figure, value, goal: rows_of([{figure: value}], [(0, 0)], {figure: goal})
    return [
        *rows,
        rows[1] | {"figure": "the last quarter of the first", "values": share, "least": 0.9},
        *machine("seconds a frame and video", first["seconds"] / short / count, Goal("{:.3f} s")),
        *machine(
            "a later frame's cost of an early one's", later / (first["seconds"] / short), Goal("{:.2f}", most=1.1)
        ),
        *machine("memory", whole["bytes"] / 2**20, Goal("{:.0f} MiB")),
        *machine(
            "memory of that of a fourth of the length", whole["bytes"] / first["bytes"], Goal("{:.3f}", most=1.05)
        ),
    ]


def measures(count: int, causal: bool, main: dict) -> dict[str, tuple[str, Callable]]:
    """{task: (what is asked, make -> rows)}, in the table's order; causal: of a model that trained frame-causally;
    main: see `measure_text`."""
    long, rollouts = f"{TIMES * FRAMES} frames, {TIMES} times the longest trained clip", max(count // 4, 2)
    found = {"text": ("the evaluation's prompts", functools.partial(measure_text, main, count))}
    found |= {name: (study.asked, functools.partial(measure_study, study, count)) for name, study in STUDIES.items()}
    found["other sizes"] = ", ".join(f"{w}x{h}" for w, h in UNSEEN), functools.partial(measure_unseen, count)
    found["roll-out"] = long, functools.partial(measure_rollout, False, rollouts)
    if causal:
        found["causal roll-out"] = f"{long}, with the cache", functools.partial(measure_rollout, True, rollouts)
    return found


@contextlib.contextmanager
def watched() -> Iterator[dict]:
    """{'seconds': what passed, 'bytes': the most memory seen in use, by the device or else by the process}."""
    found, over = {"bytes": 0}, threading.Event()

    def watch():
        while not over.is_set():
            found["bytes"] = max(found["bytes"], memory())
            over.wait(0.05)

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        yield found
    finally:
        found["seconds"] = time.perf_counter() - start
        over.set()
        watcher.join()


def memory() -> int:
    """Bytes in use now."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats["bytes_in_use"]
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


# The table.


def shown(r: dict, kind: str) -> str:
    return r["form"].format(r["values"][kind]) if kind in r["values"] else ""


def goal_of(r: dict) -> str:
    if r["least"] is None and r["most"] is None:
        return ""
    word, limit = ("at least", r["least"]) if r["least"] is not None else ("at most", r["most"])
    return f"{word} {r['form'].format(limit)}"


def reached(r: dict) -> str:
    if not goal_of(r):
        return ""
    value = r["values"].get("all", float("nan"))
    holds = value >= r["least"] if r["least"] is not None else value <= r["most"]
    return "yes" if holds else "no"


def table(results: dict) -> str:
    """Markdown."""
    made_by = results["weights"]
    lines = [
        f"Config `{made_by['config']}`, step {made_by['step']}, weights {made_by['fingerprint']}; {made_by['device']}.",
        "",
        "| task | asked | figure | all | one object | two objects | n | goal | reached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, task in results["tasks"].items():
        for i, r in enumerate(task["rows"]):
            head = (name, task["asked"]) if i == 0 else ("", "")
            cells = *head, r["figure"], *(shown(r, kind) for kind in KINDS), str(r["n"]), goal_of(r), reached(r)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
