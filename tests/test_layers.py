"""Who may import whom: a module imports only from layers below its own, and the core knows nothing of what uses it."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "dit_video"
# From the bottom up; a new module takes its place here.
LAYERS = (
    {"patches", "attention", "sharding", "checkpoint", "gallery", "launch", "arguments", "chips", "program"},
    {"flow", "codecs", "text", "metrics", "sequence"},
    {"sampling"},
    {"model", "tasks", "data"},
    {"weights", "evaluation"},
    {"generate", "step", "requests"},
    {"meter", "estimate"},
    {"trainer"},
    {"planning"},
    {"train", "sample", "evaluate", "plan"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FOREIGN = {"torch", "torchvision", "tensorflow", "keras", "tf_keras"}


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(source: str) -> set[str]:
    """Dotted names of all that a module imports, at whatever depth; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {"." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def part(name: str) -> str:
    """The module or subpackage of dit_video that a dotted name lies in."""
    return name.split(".")[1]


def violations(module: str, source: str) -> list[str]:
    """What the core's `module` ('flow', 'data', ...) must not import."""
    wrong = []
    for name in sorted(imports(source)):
        top = name.split(".")[0]
        if top == PACKAGE and part(name) != module and not LAYER[part(name)] < LAYER[module]:
            wrong.append(f"{module} imports {name}: not from a layer below")
        elif name.startswith("configs") and module == "generate":
            continue  # which keys there are, and what runs did before one was added
        elif top in {"", "experiments", "tests", "configs"}:
            wrong.append(f"{module} imports {name}: not the core's business")
    return wrong


def module_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_one_layer():
    modules = {module_of(path) for path in sources(PACKAGE)} - {"__init__"}
    assert modules == set(LAYER)
    assert sum(map(len, LAYERS)) == len(LAYER)


def test_modules_import_from_the_layers_below_alone():
    wrong = [
        line for p in sources(PACKAGE) if module_of(p) != "__init__" for line in violations(module_of(p), p.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("flow", "from dit_video.model import DiT"),
        ("model", "def f():\n    from dit_video import tasks"),
        ("attention", "import dit_video.patches"),
        ("data", "from dit_video import evaluation"),
        ("trainer", "import experiments.speed"),
        ("generate", "from . import patches"),
    ],
)
def test_a_forbidden_import_is_seen(module, line):
    assert violations(module, line)


def test_the_package_itself_imports_nothing():
    """A mistyped flag is refused before jax is loaded."""
    assert imports((ROOT / PACKAGE / "__init__.py").read_text()) <= {"importlib"}


def test_configs_import_configs_and_ml_collections():
    tops = {name.split(".")[0] for path in sources("configs") for name in imports(path.read_text())}
    assert tops <= {"ml_collections", "configs"}


def test_nothing_needs_another_framework():
    for path in sources(PACKAGE, "configs", "tests"):
        found = {name.split(".")[0] for name in imports(path.read_text())} & FOREIGN
        assert not found, f"{path} imports {sorted(found)}"
