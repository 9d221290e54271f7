"""python -m dit_video.convert --from=PATH_OR_HUB_ID --to=OUT.safetensors

Brings published weights here: --from is a .safetensors, .pt or .pth file, the index of several, a directory with one
of these, or the name of a repository on the Hugging Face hub (its autoencoder: owner/name/vae); --to is a .safetensors
file, or a directory that gets weights.safetensors, which `sample --weights=` and `--config.init_from=` take, or, of an
autoencoder, `codec.weights`.

    python -m dit_video.convert --export --from=RUN_OR_FILE --to=DIRECTORY

Takes ours back to the published names, and writes config.json beside them. Nothing in a file is ever run. Weights that
are missing, left over or of another shape are named, and are an error unless --partial.
"""

import ast
import dataclasses
import functools
import json
import pathlib
import re
import sys

from absl import app, flags

FROM = flags.DEFINE_string("from", None, "What to convert: a file, a directory or a hub id; with --export a run.")
TO = flags.DEFINE_string("to", None, "A .safetensors file, or a directory.")
FAMILY = flags.DEFINE_string(
    "family", None, "Whose they are: 'dit', 'sit', 'latte', 'wan', 'wan-original', 'kl', 'wan-vae'; else found out."
)
EXPORT = flags.DEFINE_bool("export", False, "From our names to the published ones.")
PARTIAL = flags.DEFINE_bool("partial", False, "Leave out what fits nowhere; what is missing begins as in a new model.")
PUBLISHED = flags.DEFINE_string("published", "{}", "JSON: fields of the published configuration, over its config.json.")
SET = flags.DEFINE_multi_string(
    "set", [], "A key of our config, as in codec.kind=wan: what converted files come to use."
)
ENTRY = flags.DEFINE_string("entry", None, "The state dict to take from a PyTorch file of several.")
REVISION = flags.DEFINE_string("revision", None, "The hub repository's commit, tag or branch.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "By default bfloat16 where all weights are.")

# What of a hub repository is fetched: weights and their description, never code.
HUB_FILES = ("*.safetensors", "*.pt", "*.pth", "*.safetensors.index.json", "config.json", "transformer/*")
WEIGHTS = (".safetensors", ".pt", ".pth")
HUB_NEVER = ("*.py", "*.pkl")
HUB_PARTS = ("text_encoder/*", "vae/*", "image_encoder/*", "tokenizer/*")


def fetch(source: str, revision: str | None = None):
    """The path of what --from names: itself if it exists, else the hub repository's files in the local cache, or, of
    owner/name/vae, those of its autoencoder.

    A repository that is in the cache is found there without a network. Raises FileNotFoundError where it is neither.
    """
    from etils import epath

    path = epath.Path(source)
    if path.exists():
        return path
    parts = source.split("/")
    folder = parts.pop() if len(parts) == 3 and parts[-1] == "vae" else ""
    if len(parts) != 2 or not all(part and part.strip(".") for part in parts) or path.suffix in WEIGHTS:
        raise FileNotFoundError(f"{source} does not exist, and is no hub id (of the form owner/name).")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ValueError(f"{source} does not exist; for hub ids: pip install 'dit_video[hub]'.") from error
    try:
        # Without a network, or with HF_HUB_OFFLINE=1, this is what the cache holds.
        allowed, ignored = ("vae/*", HUB_NEVER) if folder else (HUB_FILES, HUB_NEVER + HUB_PARTS)
        get = functools.partial(hub.snapshot_download, "/".join(parts), revision=revision, allow_patterns=allowed)
        path = pathlib.Path(get(ignore_patterns=ignored + ("*.bin",)))
        if not any(found.suffix in WEIGHTS for found in path.rglob("*")):
            path = get(ignore_patterns=ignored)  # PyTorch's, where there is nothing else
    except OSError as error:  # of which all that the hub raises is a kind
        raise FileNotFoundError(f"{source} is not on this machine, and not to be had from the hub: {error}") from error
    return epath.Path(path) / folder


def import_file(source, to, given=None, family=None, entry=None, dtype=None, partial=False, settings=None) -> str:
    """Writes published weights as a native file; returns what was found, in words.

    given: fields of the published configuration; settings: keys of our config, flat, over the family's. Raises
    ValueError where weights do not fit, unless `partial`.
    """
    import jax
    import ml_dtypes
    import numpy as np

    from configs import base
    from dit_video.weights import dit, families, native, stream
    from dit_video.weights.files import open_weights

    opened = open_weights(source, entry)
    tensors, config_json = dit.from_diffusers(opened.tensors, opened.config)
    opened = dataclasses.replace(opened, tensors=tensors, config=config_json)
    shapes = {name: stored.shape for name, stored in opened.tensors.items()}
    known = opened.config | dict(given or {})
    if autoencoder := families.find_autoencoder(shapes, known, family):
        if settings or dtype:
            raise ValueError("an autoencoder's file holds no config to --set, and its weights are float32.")
        return import_autoencoder(opened, to, known, autoencoder, partial)
    family, prefix, published = families.find(shapes, known, family)
    rules = families.FAMILIES[family].rules(published)
    config = base.get_config()
    config.update_from_flattened_dict(families.FAMILIES[family].overrides(published))
    set_keys(config, settings or {})

    # A name without the prefix that the others have stays as it is: it fits nowhere, and is said to.
    dead = re.compile(families.FAMILIES[family].dead)
    theirs = {n.removeprefix(prefix): stored for n, stored in opened.tensors.items() if not dead.search(n)}
    found = stream.examine(theirs, rules, config.model.depth)
    if found and not partial:
        raise ValueError(
            f"{opened.path} is not the {family} that its configuration says (--partial takes it):\n{found}"
        )

    init = functools.partial(init_params, config)
    made = jax.eval_shape(init)
    abstract = {f"{tree}/{name}": leaf for tree in made for name, leaf in made[tree].items()}
    held = {ours for rule in rules for ours in rule.ours}
    if strange := sorted(held - abstract.keys()):
        raise ValueError(f"{family}'s rules name {strange}, which the model of its configuration does not have.")

    def fresh(name):
        tree, leaf = name.split("/")
        return jax.jit(lambda: init()[tree][leaf])()

    if dtype is None:
        whole = all(stored.dtype == np.dtype(ml_dtypes.bfloat16) for stored in theirs.values())
        dtype = "bfloat16" if whole else "float32"
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    tensors = stream.to_ours(theirs, rules, config.model.depth, abstract, dtype, fresh)
    native.write_weights(to, tensors, config.to_dict(), 0, published={"family": family, "config": published})
    count = sum(int(np.prod(leaf.shape)) for leaf in abstract.values())
    new = sorted(abstract.keys() - held)
    lines = [f"{opened.path}: {family}, {len(opened.tensors)} tensors -> {count:,} parameters in {to}"]
    lines += [f"begun anew: {', '.join(new)}"] if new else []
    return "\n".join(lines + [str(found)] * bool(found))


def import_autoencoder(opened, to, published, name, partial=False) -> str:
    """Writes a published autoencoder as the file that codec.weights takes; returns what it is, in words.

    Raises ValueError where weights are missing or of another shape; where some are left over, unless `partial`.
    """
    import numpy as np

    from dit_video.codecs import autoencoder
    from dit_video.weights import families, stream

    family = families.AUTOENCODERS[name]
    try:
        settings, rules = family.module.settings(published), family.module.rules(published)
    except KeyError as error:
        raise ValueError(
            f"the configuration of {opened.path} lacks {error}: give its config.json beside it, or --published."
        ) from error
    theirs = {family.module.new_name(n): stored for n, stored in opened.tensors.items()}
    found = stream.examine(theirs, rules, 0)
    if found.missing or found.misshapen or (found.unused and not partial):
        raise ValueError(f"{opened.path} is not the {name} that its configuration says:\n{found}")
    state = {n: np.asarray(theirs[n], np.float32) for rule in rules for n in rule.names(0)}
    params = family.module.to_ours(state, published)
    autoencoder.save(to, family.kind, settings | {"published": {"family": name, "config": published}}, params)
    count = sum(w.size for part in params.values() for w in part.values())
    lines = [f"{opened.path}: {name}, {len(opened.tensors)} tensors -> {count:,} parameters in {to}"]
    lines.append(f"for a model of its latents: --set=codec.kind={family.kind} --set=codec.weights={to}")
    return "\n".join(lines + [str(found)] * bool(found))


def init_params(config) -> dict:
    """A new model's parameters {'text', 'dit'} for a config whose text encoder and autoencoder need not be here."""
    import jax
    import jax.numpy as jnp

    from dit_video.flow import named_key
    from dit_video.model import make_model
    from dit_video.patches import Cond, Patches
    from dit_video.text import make_text

    model, key = make_model(config, config.codec.channels), jax.random.key(config.seed)
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    floats = jnp.zeros((1, 1, model.patch_values)), jnp.zeros((1, 1, 3)), jnp.zeros((1, 1))
    x_BxNxP, pos_BxNx3, level_BxG = floats
    one = zeros(1, 1)
    patches = Patches(x_BxNxP, pos_BxNx3, one, one, one, one, one, level_BxG, one, one, jnp.zeros((1, 1, 3)))
    image = (jnp.zeros((1, 1, model.image_width)), one) if model.image_width else ()
    cond = Cond(jnp.zeros((1, 1, model.text_width)), one, *image)
    params = {"text": {}, "dit": model.init(named_key(key, "dit"), patches, cond)["params"]}
    if config.text.kind != "frozen":
        text = make_text(config.text)
        ids = jnp.zeros((1, *text.tokenise("").shape), text.tokenise("").dtype)
        params["text"] = text.module.init(named_key(key, "text"), ids, zeros(*ids.shape[:2]))["params"]
    return params


def set_keys(config, settings) -> None:
    """Sets keys of a config, {'codec.kind': 'wan'}. Raises ValueError for one that there is not, or of another type."""
    for key, value in settings.items():
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"--set={key}={value} does not fit configs/base.py: {error}") from error


def parse_settings(given) -> dict:
    """{'codec.kind': 'wan', 'codec.stride': (4, 8, 8)} of ['codec.kind=wan', 'codec.stride=(4, 8, 8)']."""
    settings = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set={text!r} is not of the form KEY=VALUE, as in codec.kind=wan.")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return settings


def export_file(source, to, given=None, family=None, dtype=None) -> str:
    """Writes a run's averaged weights, or a native file's, under the published names; returns what was done, in words.

    to: a .safetensors file (its metadata holds the configuration), or a directory, which gets config.json too. Raises
    ValueError where no published family is this model.
    """
    import ml_dtypes
    import numpy as np
    from etils import epath

    from dit_video import generate
    from dit_video.codecs import autoencoder
    from dit_video.weights import families, files, native, stream

    source, to = epath.Path(source), epath.Path(to)
    remembered = {}
    if file := generate.weights_file(source):
        import ml_collections

        if autoencoder.METADATA in files.open_safetensors(file)[1]:
            return export_autoencoder(file, to)
        ours, metadata = native.read_weights(file)
        config = ml_collections.ConfigDict(generate.with_newer_keys(metadata["config"]))
        remembered = metadata.get("published", {})
    else:
        trained = generate.load(source)
        config = trained.config
        leaf = lambda w: files.Stored(w.shape, np.dtype(np.float32), lambda: np.asarray(w))
        ours = {f"{tree}/{name}": leaf(w) for tree in trained.params for name, w in trained.params[tree].items()}
    if remembered:
        name, published = remembered["family"], remembered["config"]
    elif (known := families.family_of(config)) is not None:
        name, published = known
    else:
        raise ValueError(f"{source} ({config.name}) is no model of a published family: {list(families.FAMILIES)}.")
    name, published = family or name, published | dict(given or {})
    chosen = families.FAMILIES[name]
    rules = chosen.rules(published)
    # Our own learned empty prompt has no place in a file of the transformer alone.
    held = {o for rule in rules for o in rule.ours}
    left = sorted(n for n in ours if n not in held and n.startswith("text/"))
    ours = {n: stored for n, stored in ours.items() if n not in left}
    if dtype is None:
        whole = all(stored.dtype == np.dtype(ml_dtypes.bfloat16) for stored in ours.values())
        dtype = "bfloat16" if whole else "float32"
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    theirs = stream.to_theirs(ours, rules, config.model.depth, dtype)
    path = write_published(to, theirs, {"_class_name": chosen.class_name, **chosen.config_json(published)})
    lines = [f"{source}: {len(theirs)} tensors under the names of {name} -> {path}"]
    return "\n".join(lines + [f"left out: {', '.join(left)}"] * bool(left))


def export_autoencoder(file, to) -> str:
    """Writes a converted autoencoder, float32, under the published names; returns what was done, in words."""
    import jax
    import numpy as np

    from dit_video.codecs import autoencoder
    from dit_video.weights import families, files

    _, settings, params = autoencoder.load(str(file))
    name, published = settings["published"]["family"], settings["published"]["config"]
    chosen = families.AUTOENCODERS[name]
    state = chosen.module.to_theirs(jax.device_get(params), published)
    theirs = {n: files.Stored(w.shape, np.dtype(np.float32), lambda w=w: w) for n, w in state.items()}
    path = write_published(to, theirs, {"_class_name": chosen.class_name, **published})
    return f"{file}: {len(theirs)} tensors under the names of {name} -> {path}"


def write_published(to, theirs, config_json):
    """Writes tensors with their config.json, in a file's metadata or beside it in a directory; returns the file."""
    from dit_video.weights import files

    path = to if to.suffix == ".safetensors" else to / "diffusion_pytorch_model.safetensors"
    files.write_safetensors(path, theirs, {"format": "pt", "config": json.dumps(config_json)})
    if path != to:
        (to / "config.json").write_text(json.dumps(config_json, indent=1))
    return path


def main(argv):
    from dit_video import launch
    from dit_video.checkpoint import CheckpointError

    launch.prepare()
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r} is no flag: flags begin with --, as in --from=PATH.")
        try:
            given = json.loads(PUBLISHED.value)
        except ValueError as error:
            raise ValueError(f"--published={PUBLISHED.value!r} is no JSON: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"--published={PUBLISHED.value!r} is no JSON of fields, such as '{{\"num_heads\": 6}}'.")
        from dit_video.weights.families import AUTOENCODERS, FAMILIES

        if FAMILY.value is not None and FAMILY.value not in (known := [*FAMILIES, *AUTOENCODERS]):
            raise ValueError(f"--family={FAMILY.value} is not known. Allowed: {known}.")
        if EXPORT.value:
            print(export_file(FROM.value, TO.value, given, FAMILY.value, DTYPE.value))
            return
        to = TO.value if TO.value.endswith(".safetensors") else f"{TO.value.rstrip('/')}/weights.safetensors"
        source = fetch(FROM.value, REVISION.value)
        settings = parse_settings(SET.value)
        print(import_file(source, to, given, FAMILY.value, ENTRY.value, DTYPE.value, PARTIAL.value, settings))
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def run():
    flags.mark_flags_as_required(["from", "to"])
    app.run(main)


if __name__ == "__main__":
    run()
