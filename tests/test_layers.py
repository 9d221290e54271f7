"""Who may import whom: a module imports only from layers below its own, and the core knows nothing of what uses it."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "dit_video"
# From the bottom up; a new module takes its place here.
LAYERS = (
    {"patches", "attention", "sharding", "checkpoint", "gallery", "launch", "allowed", "watchdog", "chips", "program"},
    {"arguments", "flow", "codecs", "text", "metrics", "sequence"},
    {"sampling", "canvas"},
    {"model", "tasks", "data"},
    {"weights", "evaluation", "parts"},
    {"generate", "step", "requests"},
    {"meter", "estimate"},
    {"trainer"},
    {"planning"},
    {"train", "sample", "evaluate", "convert", "plan"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
# Which keys there are, and what runs did before one was added; and what a converted model's config begins with.
DEFAULTS = {("generate", "configs.base"), ("convert", "configs.base")}
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
        elif top in {"", "experiments", "tests", "configs"} and (module, name) not in DEFAULTS:
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


# One diffusion block.

# Where other transformers live, none of which is told a level: text encoders, autoencoders, networks of metrics.
OTHERS = {"text", "codecs", "evaluation"}
ITSELF = {"attention", "sequence"}  # where attention is computed, on one device and across several
BLOCK = "model.block"
ATTENTION = {"attend", "softmax", "dot_product_attention", "MultiHeadDotProductAttention", "SelfAttention"}


def identifiers(node) -> set[str]:
    """Every name, attribute and argument under a node, but not what its docstrings say."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return names | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg | ast.keyword) and n.arg}


def diffusion_blocks(module: str, source: str) -> list[str]:
    """Functions and classes that attend, and might be a diffusion transformer's block: outside of other transformers'
    places all that do, and inside of them those that modulate too."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ATTENTION & (names := identifiers(node)):
            has = lambda part, names=names: any(part in name.lower() for name in names)
            modulates = has("modulat") or has("adaln") or (has("shift") and has("gate"))
            if module not in ITSELF and (module not in OTHERS or modulates):
                found.append(f"{module}.{node.name}")
    return found


def test_there_is_one_diffusion_transformer_block():
    """DiT, SiT, Latte, Wan and our own are knobs of one block; a second would be a second place for every mistake."""
    blocks = [name for path in sources(PACKAGE) for name in diffusion_blocks(module_of(path), path.read_text())]
    assert blocks == [BLOCK]
    classes = [name for name in modules_of_parameters() if name.split(".")[0] not in OTHERS]
    assert classes == ["model.DiT"]


def modules_of_parameters() -> list[str]:
    """The flax modules of the package, by the module they lie in."""
    found = []
    for path in sources(PACKAGE):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Module") for base in node.bases):
                found.append(f"{module_of(path)}.{node.name}")
    return found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model", "def wan_block(w, h, mod):\n    shift, gate = mod\n    return h + gate * attend(h + shift, h, h)"),
        ("model", "class Block(nn.Module):\n    def __call__(self, x):\n        return attend(x, x, x, None, None)[0]"),
        ("generate", "def layer(q, k, v):\n    return jax.nn.softmax(q @ k.T) @ v"),
        ("weights", "def layer(q, k, v):\n    return jax.nn.dot_product_attention(q, k, v)"),
        ("text", "def layer(x, adaln):\n    return x + adaln * attend(x, x, x, None, None)[0]"),
    ],
)
def test_a_second_block_is_seen(module, source):
    assert diffusion_blocks(module, source)
