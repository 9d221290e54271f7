"""The notebooks run as they stand, from first cell to last, by IPython itself: small, or (slow) at full size."""

import base64
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import types
from importlib.metadata import version

import pytest
from PIL import Image

from dit_video.metrics import read_metrics
from dit_video.tasks import TASKS

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "experiments" / "colab"
NAMES = ("packing", "tour", "train")
SMALL = {
    "tour": {"STEPS": 2, "ROLLOUT_FRAMES": 17},
    "train": {
        "STEPS": 3,
        "ROW": 256,
        "WINDOW": 64,
        "MODEL": {"width": 32, "depth": 1, "heads": 2, "mlp_width": 64},
        "SAMPLING_STEPS": 2,
        "EXAMPLES": 8,
    },
    "packing": {"LENGTH": 128},
}
# Runs the code cells in one shell, sets what the settings cell set anew, and writes down what each cell printed and
# showed. One of {path, settings, names to tell the JSON of, where to write}.
RUNNER = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

path, settings, told, report = sys.argv[1:]
shell, cells = InteractiveShell.instance(), []
for cell in json.load(open(path))["cells"]:
    if cell["cell_type"] == "code":
        with capture_output() as out:
            done = shell.run_cell("".join(cell["source"]))
        if not done.success:
            print("".join(cell["source"]), out.stdout, out.stderr)
            done.raise_error()
        if "settings" in cell["metadata"].get("tags", []):
            shell.user_ns.update(json.loads(settings))
        cells.append({"stdout": out.stdout, "shown": [o.data for o in out.outputs]})
    else:
        cells.append(None)
found = {name: shell.user_ns.get(name) for name in told.split(",")}
json.dump({"cells": cells, "found": found}, open(report, "w"), default=str)
"""


def read(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def source(cell):
    return "".join(cell["source"])


def execute(name, tmp_path, settings, told="lines"):
    """Runs a notebook where it lies, as Jupyter does; what its cells printed and showed, in the cells' order."""
    report = tmp_path / "report.json"
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    command = [sys.executable, "-c", RUNNER, FOLDER / f"{name}.ipynb", json.dumps(settings), told, report]
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    told = json.loads(report.read_text())
    assert re.search(r"jax \d+\.\S+ on cpu: ", told["cells"][1]["stdout"])
    return types.SimpleNamespace(cells=told["cells"], **told["found"])


def gifs(cell):
    """The frames of each moving picture that a cell showed."""
    pages = [page for data in cell["shown"] for kind, page in data.items() if kind == "text/html"]
    found = re.findall(r"data:image/gif;base64,([^\"]+)", "".join(pages))
    return [Image.open(io.BytesIO(base64.b64decode(gif))).n_frames for gif in found]


def figures(cells):
    return sum("image/png" in data for cell in cells if cell for data in cell["shown"])


# As files


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_plain_and_open_anywhere(name):
    book = read(name)
    assert book["nbformat"] == 4 and book["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids) and book["cells"][0]["cell_type"] == "markdown"
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("settings" in cell["metadata"].get("tags", []) for cell in code) == 1
    assert source(code[0]) == source([cell for cell in read("tour")["cells"] if cell["cell_type"] == "code"][0])
    # The first thing in it is what a user has to set.
    assert source(code[0]).startswith("REPOSITORY = ")


@pytest.mark.slow
def test_the_first_cell_clones_and_installs_and_leaves_jax_alone(tmp_path):
    """Outside the repository. pip resolves and reports, but installs nothing into the environment that tests run in."""
    setup = source(read("tour")["cells"][1])
    cell = re.sub(r"REPOSITORY = .*", f"REPOSITORY = {str(ROOT)!r}", setup).replace('"-q", ', "")
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": "", "PIP_DRY_RUN": "1", "PIP_REPORT": "report.json"}
    cell += "\nimport dit_video, configs\nprint(dit_video.__file__)"
    for _ in range(2):  # typed again, it finds what it cloned
        done = subprocess.run(
            [sys.executable, "-c", cell], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert str(tmp_path / "dit_video" / "dit_video") in done.stdout and " on cpu: " in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    installed = {item["metadata"]["name"].lower() for item in report["install"]}
    assert installed & {"dit_video", "dit-video"} and not installed & {"jax", "jaxlib"}


def test_the_first_cell_says_what_to_do_about_an_older_jax(tmp_path):
    """Before pip, whose words on it name no jax: here of a clone that asks for one that is not made yet."""
    for path, text in (("configs/base.py", ""), ("setup.py", 'install_requires=["jax>=99.1"]')):
        (tmp_path / "dit_video" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dit_video" / path).write_text(text)
    cell = source(read("tour")["cells"][1])
    done = subprocess.run([sys.executable, "-c", cell], cwd=tmp_path, capture_output=True, text=True)
    said = rf"RuntimeError: jax {version('jax')} is installed here, and dit_video needs jax 99.1 or newer. .* restart"
    assert done.returncode == 1 and re.search(said, done.stderr) and not (tmp_path / "own_jax.txt").exists()


# From the first cell to the last


@pytest.mark.parametrize("settings", [SMALL["tour"], pytest.param({}, marks=pytest.mark.slow)])
def test_the_tour_shows_every_task_moving(settings, tmp_path):
    ran = execute("tour", tmp_path, settings)
    assert {line["task"] for line in ran.lines.values()} == {*TASKS, "rollout"} - {"text"}
    assert any(line.get("causal") for line in ran.lines.values())
    sections = [i for i, cell in enumerate(read("tour")["cells"]) if source(cell).startswith("### ")]
    assert len(sections) == 9  # paint in and around share one, as do the loops and the directions
    for i in sections:
        assert max(gifs(ran.cells[i + 1])) > 4, source(read("tour")["cells"][i])
    (text,) = [cell for cell in ran.cells if cell and cell["shown"]][:1]
    assert sorted(gifs(text))[0] == 1 and len(gifs(text)) == 4


@pytest.mark.parametrize(
    "settings", [SMALL["train"], pytest.param(SMALL["train"] | {"WORKERS": 1}, marks=pytest.mark.slow),
                 pytest.param({}, marks=pytest.mark.slow)]
)  # fmt: skip
def test_training_on_a_folder(settings, tmp_path):
    ran = execute("train", tmp_path, settings | {"WORKDIR": str(tmp_path / "run")}, "STEPS")
    assert (tmp_path / "run" / "weights.safetensors").exists() and any((tmp_path / "run_example").glob("*.mp4"))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert max(line["step"] for line in lines) == ran.STEPS and any("validation" in line for line in lines)
    assert figures(ran.cells) == 1
    shown = [gifs(cell) for cell in ran.cells if cell and cell["shown"]]
    assert len(shown[-1]) == 3


@pytest.mark.parametrize("settings", [SMALL["packing"], pytest.param({}, marks=pytest.mark.slow)])
def test_packing_is_drawn(settings, tmp_path):
    ran = execute("packing", tmp_path, settings, "lengths,LENGTH")
    assert figures(ran.cells) == 5
    (difference,) = re.findall(r"largest difference (\S+),", "".join(cell["stdout"] for cell in ran.cells if cell))
    assert float(difference) < 1e-4
    (counts,) = re.findall(r"'clips': \((\d+), (\d+)\)", "".join(cell["stdout"] for cell in ran.cells if cell))
    assert int(counts[1]) > 1.5 * int(counts[0])
