"""Published files become ours and go back unchanged, in every form they come in; hostile ones are refused unrun.

D model width, L blocks.
"""

import dataclasses
import importlib
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import rebuild
import safetensors.numpy
from absl import flags
from absl.testing import flagsaver

from configs import base
from configs import wan as wan_config
from dit_video import generate
from dit_video.codecs import make_codec
from dit_video.model import make_model
from dit_video.patches import Cond
from dit_video.sharding import make_mesh, state_shardings
from dit_video.step import make_run
from dit_video.text import embeddings
from dit_video.trainer import start_from
from dit_video.weights import diffusion, dit, families, files, kl, latte, native, sit, stream, wan
from dit_video.weights.files import open_safetensors, open_torch, open_weights, read_pickle
from experiments.parity import diffusion as parity
from experiments.parity.arrays import error
from experiments.parity.arrays import load as load_arrays
from experiments.parity.autoencoders import chunked, last
from experiments.parity.rows import frames, levels, per_clip, rows_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONVERT = importlib.import_module("dit_video.convert")
DIT = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "num_classes": 5,
    "learn_sigma": True,
}
WAN = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 256,
    "ffn_dim": 48,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
}
LATTE = DIT | {"num_frames": 3, "extras": 2}
PUBLISHED = {"dit": DIT, "sit": DIT, "latte": LATTE, "wan": WAN, "wan-original": WAN}
MODULES = {"dit": dit, "sit": sit, "latte": latte, "wan": wan}
TABLES = ("pos_embed", "temp_embed")  # computed, not kept: equal up to rounding


def random_weights(family, published=None, dtype=np.float32):
    """A state dict of the family's names, at random; tables as they must be."""
    published, rng = published or PUBLISHED[family], np.random.default_rng(0)
    depth = published.get("depth", published.get("num_layers"))
    state = {}
    for rule in families.FAMILIES[family].rules(published):
        for name in rule.names(depth):
            state[name] = (0.1 * rng.standard_normal(rule.shape) if rule.ours else rule.back()).astype(dtype)
    return state


def save(path, state, **metadata):
    safetensors.numpy.save_file(state, path, {k: json.dumps(v) for k, v in metadata.items()} or None)
    return path


def read(path):
    tensors, _ = open_safetensors(path)
    return {name: np.asarray(stored) for name, stored in tensors.items()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and found[name].shape == wanted[name].shape, name
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


# PyTorch's pickles, by hand: no torch, and words that it would never write.


def text(s):
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def number(n):
    return b"J" + struct.pack("<i", n) if abs(n) < 2**31 else pickle.dumps(n, 2)[2:-1]


def tup(*items):
    return b"(" + b"".join(items) + b"t"


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def storage(key, length, kind="FloatStorage"):
    return tup(text("storage"), name("torch", kind), text(key), text("cpu"), number(length)) + b"Q"


def tensor(key, shape, strides=None, offset=0, length=None, kind="FloatStorage"):
    strides = strides or tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    length = int(np.prod(shape)) if length is None else length
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = storage(key, length, kind), number(offset), tup(*map(number, shape)), tup(*map(number, strides))
    return name("torch._utils", "_rebuild_tensor_v2") + tup(*arguments, b"\x89", hooks) + b"R"


def dictionary(items):
    return b"}(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def pickled(body):
    return b"\x80\x02" + body + b"."


def write_pt(path, data, storages=(), compression=zipfile.ZIP_STORED, more=()):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for member, content in [*((f"archive/data/{k}", v) for k, v in dict(storages).items()), *more]:
            archive.writestr(member, content)
    return path


def state_pickle(state):
    """(the pickle's body, its storages) of a state dict, as torch.save lays it out."""
    kinds = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}
    parts = {n: tensor(str(i), a.shape, kind=kinds[str(a.dtype)]) for i, (n, a) in enumerate(state.items())}
    return dictionary(parts), {str(i): a.tobytes() for i, a in enumerate(state.values())}


def test_pytorch_file(tmp_path):
    """Views, shared storages, empty tensors, parameters and other dtypes are read as they were."""
    w = np.arange(30, dtype=np.float32).reshape(6, 5)
    half = w.astype(ml_dtypes.bfloat16)
    items = {
        "w": tensor("0", (6, 5)),
        "transposed": tensor("0", (5, 6), (1, 5), length=30),
        "part": tensor("0", (2, 2), (5, 1), offset=7, length=30),
        "empty": tensor("0", (0, 3), (3, 1), length=30),
        "scalar": tensor("0", (), offset=4, length=30),
        "half": tensor("1", (6, 5), kind="BFloat16Storage"),
        "parameter": name("torch._utils", "_rebuild_parameter") + tup(tensor("0", (6, 5)), b"\x88", b"}") + b"R",
        "number": number(3),
    }
    storages = {"0": w.tobytes(), "1": half.tobytes()}
    found = open_torch(write_pt(tmp_path / "a.pt", pickled(dictionary(items)), storages))
    wanted = {"w": w, "transposed": w.T, "part": w[1:3, 2:4], "empty": w[:0, :3], "scalar": w[0, 4]}
    assert_equal({n: np.asarray(s) for n, s in found.items()}, wanted | {"half": half, "parameter": w})


def test_pytorch_file_of_several_state_dicts(tmp_path):
    """Averaged weights before others, unless told otherwise; what is not told apart is asked for."""
    one = lambda offset: dictionary({"w": tensor("0", (2,), offset=offset, length=4)})
    first = lambda path, entry=None: float(np.asarray(open_torch(path, entry)["w"])[0])
    storages = {"0": np.arange(4, dtype=np.float32).tobytes()}
    usual = write_pt(tmp_path / "a.pt", pickled(dictionary({"model": one(0), "ema": one(2)})), storages)
    assert (first(usual), first(usual, "model")) == (2, 0)
    other = write_pt(tmp_path / "b.pt", pickled(dictionary({"x": one(0), "y": one(2)})), storages)
    assert first(other, "y") == 2
    with pytest.raises(ValueError, match=r"several state dicts, \['x', 'y'\]: say which \(--entry\)"):
        first(other)
    with pytest.raises(ValueError, match=r"no state dict 'z'. It holds \['x', 'y'\]"):
        first(other, "z")


class Runs:
    """A pickle of this one runs a command when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Looks(Runs):
    """And one of this looks something up, which is how others get at what they run."""

    def __reduce__(self):
        return getattr, (pathlib.Path, "home")


def nested(n):
    """A tuple of two of the tuple of two of ...: 2**n of them once written out."""
    return b")q\x00" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(n))


GOOD = pickled(dictionary({"w": tensor("0", (2, 3))}))
HOSTILE = {
    "getattr": (pickled(name("builtins", "getattr") + tup(name("os", "x"), text("system")) + b"R"), "builtins.getattr"),
    "eval": (pickled(name("builtins", "eval") + tup(text("1")) + b"R"), "builtins.eval"),
    "a module within": (
        pickled(name("torch.nn.modules.linear", "Linear") + b")\x81"),
        "torch.nn.modules.linear.Linear",
    ),
    "a loader of pickles": (pickled(name("torch.storage", "_load_from_bytes")), "torch.storage._load_from_bytes"),
    "stack global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    "instance": (pickled(b"(ios\nsystem\n"), "INST"),
    "object": (pickled(b"(" + name("collections", "OrderedDict") + b"o"), "OBJ"),
    "new object": (pickled(name("collections", "OrderedDict") + b")\x81"), "NEWOBJ"),
    "extension": (pickled(b"\x82\x01"), "EXT1"),
    "persistent text": (pickled(b"Pos.system\n"), "PERSID"),
    "state of a tensor": (pickled(tensor("0", (2, 3)) + b"}b"), "fills a tensor as if it were a dict"),
    "call of a text": (pickled(text("os.system") + b")R"), "calls a str"),
    "call of a storage": (pickled(name("torch", "FloatStorage") + b")R"), "calls a torch FloatStorage"),
    "nested": (pickled(nested(100) + b")R"), "calls a tuple"),
    "a nested key": (pickled(b"}" + nested(100) + text("x") + b"s"), "a tuple as the key"),
    "beyond its storage": (pickled(dictionary({"w": tensor("0", (2, 4), length=6)})), r"\(2, 4\).*beyond the 6 items"),
    "strides beyond": (pickled(dictionary({"w": tensor("0", (2, 3), (4, 1), length=6)})), "beyond the 6 items"),
    "offset beyond": (pickled(dictionary({"w": tensor("0", (2, 3), offset=1, length=6)})), "beyond the 6 items"),
    "negative stride": (pickled(dictionary({"w": tensor("0", (2, 3), (-3, 1), length=6)})), "no counts"),
    "negative offset": (pickled(dictionary({"w": tensor("0", (2, 3), offset=-1, length=6)})), "no counts"),
    "huge": (pickled(dictionary({"w": tensor("0", (2**40, 2**40), (0, 0), length=6)})), "beyond the 6 items"),
    "more than it lies": (pickled(dictionary({"w": tensor("0", (9, 9), length=81)})), "wants 81 x float32; 24 bytes"),
    "no such storage": (pickled(dictionary({"w": tensor("7", (2, 3))})), "nothing lie"),
    "a path as storage": (pickled(dictionary({"w": tensor("../../x", (2, 3))})), "names a tuple as a storage"),
    "no state dict": (pickled(b"]"), "no state dict"),
    "holds itself": (pickled(b"]q\x00h\x00a"), "no state dict"),
    "cut": (GOOD[:40], "damaged|ends|expected|exhausted|no newline"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickle(tmp_path, kind):
    data, words = HOSTILE[kind]
    with pytest.raises(ValueError, match=words) as error:
        open_torch(write_pt(tmp_path / "a.pt", data, {"0": np.zeros(6, np.float32).tobytes()}))
    assert "a.pt" in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", [Runs, Looks])
def test_nothing_in_a_pickle_is_run(tmp_path, kind, protocol):
    """Python's own pickles of a command, which run it when they are loaded: here they are refused, and it is not."""
    data = pickle.dumps({"w": kind(tmp_path / "ran")}, protocol)
    pickle.loads(data)
    assert (tmp_path / "ran").exists() == (kind is Runs)
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="refused"):
        open_torch(write_pt(tmp_path / "a.pt", data))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_endless_words_is_refused(monkeypatch):
    """Minutes of reading would be asked for by a file of a few megabytes."""
    monkeypatch.setattr(files, "MAX_WORDS", 1000)
    assert read_pickle(b"\x80\x02(" + b"N" * 990 + b"t.") == (None,) * 990
    with pytest.raises(ValueError, match="longer than 1,000 words"):
        read_pickle(b"\x80\x02(" + b"N" * 1000 + b"t.")


def test_damaged_pickles_are_refused_whatever_is_damaged():
    """Cut anywhere, or with any byte another: a plain value comes out, or a ValueError."""
    rng = np.random.default_rng(0)
    for end in range(len(GOOD)):
        with pytest.raises(ValueError):
            read_pickle(GOOD[:end])
    for _ in range(3000):
        data = bytearray(GOOD)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] = rng.integers(256)
        try:
            read_pickle(bytes(data))
        except ValueError:
            pass


def test_hostile_zips(tmp_path):
    zeros = np.zeros(6, np.float32).tobytes()
    good = lambda path, **how: write_pt(tmp_path / path, GOOD, {"0": zeros}, **how)
    assert set(open_torch(good("good.pt"))) == {"w"}
    bomb = good("bomb.pt", compression=zipfile.ZIP_DEFLATED, more=[("archive/data/1", bytes(10**7))])
    assert bomb.stat().st_size < 10**5
    with pytest.raises(ValueError, match="is compressed or encrypted"):
        open_torch(bomb)
    for member in ("../../evil", "/evil", "archive/../../evil", "archive\\..\\evil"):
        with pytest.raises(ValueError, match="is no name of a file inside"):
            open_torch(good("path.pt", more=[(member, b"x")]))
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = good("twice.pt", more=[("archive/data/0", zeros)])
    with pytest.raises(ValueError, match="is there twice"):
        open_torch(twice)
    with pytest.raises(ValueError, match="no one data.pkl"):
        open_torch(good("two.pt", more=[("other/data.pkl", GOOD)]))
    with pytest.raises(ValueError, match="big-endian"):
        open_torch(good("big.pt", more=[("archive/byteorder", b"big")]))
    whole = (tmp_path / "good.pt").read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.pt").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut.pt"):
            open_torch(tmp_path / "cut.pt")
    # A member that says it is larger than it is, in the directory at the zip's end.
    lie = bytearray(whole)
    at = lie.rindex(b"archive/data/0") - 46
    lie[at + 20 : at + 28] = struct.pack("<II", 24000, 24000)
    (tmp_path / "lie.pt").write_bytes(lie)
    with pytest.raises(ValueError, match="larger than the file"):
        open_torch(tmp_path / "lie.pt")
    torn = bytearray(whole)
    torn[whole.index(zeros) + 3] ^= 1
    (tmp_path / "torn.pt").write_bytes(torn)
    with pytest.raises(ValueError, match="torn.pt is damaged"):
        np.asarray(open_torch(tmp_path / "torn.pt")["w"])


def test_forms_that_are_not_read(tmp_path):
    """Old forms of PyTorch's files are named, with the mend; so is what is no weights at all."""
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        info = tarfile.TarInfo("../../pickle")
        archive.addfile(info, io.BytesIO(b""))
    (tmp_path / "older.pth").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    for file in ("old.pt", "older.pth"):
        with pytest.raises(ValueError, match=rf"{file} is no zip of PyTorch.*save it again: torch\.save"):
            open_weights(tmp_path / file)
    (tmp_path / "a.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"a\.safetensors is no safetensors file"):
        open_weights(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="missing.pt does not exist"):
        open_weights(tmp_path / "missing.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no \.safetensors"):
        open_weights(tmp_path / "empty")


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\xff" * 8 + b"{}", "a header of"),
        (header()[:8] + b"[]", "header cannot be read"),
        (header(w=3), "header cannot be read"),
        (header(w={"dtype": "F32", "shape": [2]}), "header cannot be read"),
        (header(w={"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}), "dtype 'F99'"),
        (header(w={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}), "outside the file"),
        (header(w={"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}) + bytes(8), "outside the file"),
        (header(w={"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}) + bytes(8), "outside the file"),
        (header(w={"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}) + bytes(8), "outside the file"),
        (header(w={"dtype": "F32", "shape": [2**62 - 1], "data_offsets": [0, 8]}) + bytes(8), "but takes 8 bytes"),
        (header(w={"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}) + bytes(8), "but takes 8 bytes"),
        ((10**5).to_bytes(8, "little") + b'{"a":' * 20000, "header cannot be read"),
    ],
)
def test_hostile_safetensors(tmp_path, data, words):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        open_safetensors(tmp_path / "a.safetensors")


def test_safetensors_are_written_as_the_library_writes_them(tmp_path):
    """Byte for byte, so that others read them; and what it wrote is read back."""
    rng, mixed = np.random.default_rng(0), (np.float32, np.float16, np.int64, np.uint8, ml_dtypes.bfloat16)
    state = {f"w{i}": (9 * rng.standard_normal((i, 3))).astype(d) for i, d in enumerate(mixed)}
    (tmp_path / "theirs.safetensors").write_bytes(safetensors.numpy.save(state, {"a": "b"}))
    found, metadata = open_safetensors(tmp_path / "theirs.safetensors")
    assert metadata == {"a": "b"}
    assert_equal({n: np.asarray(s) for n, s in found.items()}, state)
    CONVERT_FILES.write_safetensors(tmp_path / "ours.safetensors", found, metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_header_whose_length_begins_as_a_pickle(tmp_path):
    """One in 32 of the lengths that the library writes: it is told from a pickle all the same."""
    entry = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    for length in (0x180, 0x280, 0x480):
        text = json.dumps(entry).encode().ljust(length)
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + text + np.float32(3).tobytes())
        assert float(np.asarray(open_weights(tmp_path / "a.safetensors").tensors["w"])[0]) == 3


def test_index_of_several_files(tmp_path):
    state = random_weights("dit")
    names = sorted(state)
    where = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
    for part in set(where.values()):
        save(tmp_path / part, {n: state[n] for n in names if where[n] == part})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_equal({n: np.asarray(s) for n, s in open_weights(tmp_path).tensors.items()}, state)
    index.write_text(json.dumps({"weight_map": where | {"lost": "part-0.safetensors"}}))
    with pytest.raises(ValueError, match=r"names \['lost'\] \(1 in all\), which its files do not hold"):
        open_weights(index)
    index.write_text(json.dumps({"weight_map": where | {"lost": "part-9.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"part-9\.safetensors is missing"):
        open_weights(index)
    for outside in ("../part-0.safetensors", "/etc/passwd", "..", ""):
        index.write_text(json.dumps({"weight_map": {"w": outside}}))
        with pytest.raises(ValueError, match="outside its own directory"):
            open_weights(index)
    index.write_text('{"weight_map": [1]}')
    with pytest.raises(ValueError, match="no index of weights"):
        open_weights(index)


# Names, both ways.


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("form", ["safetensors", "index", "pt"])
def test_import_and_export_are_inverse(tmp_path, family, form):
    """In whatever form the file comes, bfloat16 or not: the family is found, and export gives the same file back."""
    state = random_weights(family, dtype=ml_dtypes.bfloat16 if form == "index" else np.float32)
    if form == "pt":
        body, storages = state_pickle({f"module.{n}": a for n, a in state.items()})
        source = write_pt(tmp_path / "in.pt", pickled(dictionary({"ema": body})), storages)
    else:
        source = save(tmp_path / "in.safetensors", state)
    heads = {"num_attention_heads": 2} if family.startswith("wan") else {"num_heads": 2}
    told = family if family in ("dit", "sit") else None
    said = CONVERT.import_file(source, tmp_path / "ours.safetensors", heads, told)
    assert f": {family}, {len(state)} tensors" in said
    CONVERT.export_file(tmp_path / "ours.safetensors", tmp_path / "back.safetensors")
    again = read(tmp_path / "back.safetensors")
    for table in set(TABLES) & state.keys():
        np.testing.assert_allclose(again.pop(table).astype(np.float32), state.pop(table).astype(np.float32), atol=8e-3)
    assert_equal(again, state)
    # What was written says whose it is.
    CONVERT.import_file(tmp_path / "back.safetensors", tmp_path / "again.safetensors")
    assert_equal(read(tmp_path / "again.safetensors"), read(tmp_path / "ours.safetensors"))


@pytest.mark.parametrize(
    "name, path",
    [(name, path) for name, (_, path) in parity.MODELS.items()]
    + [("wan", "diffusers/wan_transformer"), ("wan", "diffusers/wan_transformer_i2v")],
    ids=lambda p: p.split("/")[-1],
)
def test_streaming_gives_what_importing_gives(golden, name, path):
    """One tensor at a time or all at once: the same, for the reference's own weights, under both of Wan's namings."""
    opened = open_weights(golden / f"{path}.safetensors")
    shapes = {n: s.shape for n, s in opened.tensors.items()}
    family, _, published = families.find(shapes, opened.config, name if name in ("dit", "sit") else None)
    assert family == name
    module = MODULES[family]
    assert {k: published[k] for k in opened.config if k in published} == {
        k: v for k, v in opened.config.items() if k in published
    }
    wanted = module.to_ours({n: np.asarray(s) for n, s in opened.tensors.items()}, published)
    wanted = {f"{tree}/{n}": a for tree in wanted for n, a in wanted[tree].items()}
    depth = published.get("depth", published.get("num_layers"))
    forms = {family: opened.tensors}
    if family == "wan":
        forms["wan-original"] = {families.original_name(n): s for n, s in opened.tensors.items()}
        assert not forms["wan-original"].keys() & opened.tensors.keys() - {
            "patch_embedding.weight",
            "patch_embedding.bias",
        }
    for name, theirs in forms.items():
        told = name if name in ("dit", "sit") else None
        found, _, again = families.find({n: s.shape for n, s in theirs.items()}, opened.config, told)
        assert (found, again) == (name, published)
        rules = families.FAMILIES[name].rules(published)
        assert not stream.examine(theirs, rules, depth)
        ours = stream.to_ours(theirs, rules, depth, wanted, np.float32, None)
        assert_equal({n: np.asarray(s) for n, s in ours.items()}, wanted)


def test_wans_own_names():
    """As listings of the published checkpoints have them: 40 blocks of these, and these once."""
    linear = lambda *names: {f"{n}.{part}" for n in names for part in ("weight", "bias")}
    attention = [f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"]
    block = linear(*attention, "cross_attn.k_img", "cross_attn.v_img", "norm3", "ffn.0", "ffn.2") | {"modulation"}
    block |= {f"{n}.weight" for n in ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k")}
    once = linear("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
    once |= linear("time_projection.1", "head.head", *(f"img_emb.proj.{i}" for i in (0, 1, 3, 4))) | {"head.modulation"}
    image = WAN | {"image_dim": 10, "added_kv_proj_dim": 32}
    found = {rule.theirs for rule in families.wan_original_rules(image)}
    assert found == once | {f"blocks.{{}}.{n}" for n in block | {"cross_attn.norm_k_img.weight"}}
    pairs = {
        "blocks.3.norm2.weight": "blocks.3.norm3.weight",
        "blocks.3.scale_shift_table": "blocks.3.modulation",
        "scale_shift_table": "head.modulation",
        "blocks.3.attn1.to_q.weight": "blocks.3.self_attn.q.weight",
        "blocks.3.attn2.to_out.0.bias": "blocks.3.cross_attn.o.bias",
        "blocks.3.attn2.add_v_proj.bias": "blocks.3.cross_attn.v_img.bias",
        "condition_embedder.image_embedder.norm2.weight": "img_emb.proj.4.weight",
        "condition_embedder.time_embedder.linear_2.weight": "time_embedding.2.weight",
    }
    assert {n: families.original_name(n) for n in pairs} == pairs


def test_what_does_not_fit_is_named_and_refused(tmp_path):
    """Missing, left over and misshapen weights; --partial takes the rest, and begins what is missing anew."""
    state = random_weights("wan")
    lost, bent = "blocks.1.attn1.to_v.weight", "blocks.0.ffn.net.2.bias"
    del state[lost]
    state[bent] = np.zeros(7, np.float32)
    state["blocks.0.extra"] = np.zeros(3, np.float32)
    state["blocks.0.attn2.norm_added_q.weight"] = np.zeros(32, np.float32)  # published, and read by nobody
    source = save(tmp_path / "in.safetensors", state)
    given = {"num_attention_heads": 2}
    with pytest.raises(ValueError, match="--partial") as error:
        CONVERT.import_file(source, tmp_path / "ours.safetensors", given)
    said = str(error.value)
    assert f"1 missing:\n  {lost} (32, 32)" in said and "1 unused:\n  blocks.0.extra (3,)" in said
    assert f"1 of another shape:\n  {bent} (7,), not (32,)" in said and not (tmp_path / "ours.safetensors").exists()
    said = CONVERT.import_file(source, tmp_path / "ours.safetensors", given, partial=True)
    assert lost in said and "blocks.0.extra" in said
    params, _, _ = native.load_weights(tmp_path / "ours.safetensors")
    value_LxDxD, bias_LxD = params["dit"]["block_v"], params["dit"]["block_mlp_out_bias"]
    np.testing.assert_array_equal(value_LxDxD[0], state["blocks.0.attn1.to_v.weight"].T)
    assert 0 < np.abs(value_LxDxD[1]).max() < 1 and not bias_LxD[0].any() and bias_LxD[1].any()


def test_a_family_that_cannot_be_known_is_asked_for(tmp_path):
    source = save(tmp_path / "in.safetensors", {"decoder.weight": np.zeros(3, np.float32)})
    known = ", ".join(map(repr, ("dit", "sit", "latte", "wan", "wan-original", "kl", "wan-vae")))
    with pytest.raises(ValueError, match=rf"'decoder.weight'.* are none of \[{known}\]"):
        CONVERT.import_file(source, tmp_path / "ours.safetensors")
    source = save(tmp_path / "dit.safetensors", random_weights("dit"))
    with pytest.raises(ValueError, match="width 32 is no published size: give --published"):
        CONVERT.import_file(source, tmp_path / "ours.safetensors")
    heads = {"num_heads": 2}
    with pytest.raises(ValueError, match=r"are those of \['dit', 'sit'\]: say which --family it is"):
        CONVERT.import_file(source, tmp_path / "ours.safetensors", heads)
    said = CONVERT.import_file(source, tmp_path / "ours.safetensors", heads | {"_class_name": "SiT"})
    assert ": sit, " in said and generate.load(tmp_path / "ours.safetensors").config.model.predict == "v"
    with pytest.raises(ValueError, match="are none of .*'latte'"):
        CONVERT.import_file(source, tmp_path / "ours.safetensors", heads | {"_class_name": "Latte"})


def test_a_run_is_exported_under_the_published_names(tmp_path):
    """What a config of ours trains: to the names, and the config.json, that the family's own loader reads."""
    config = base.get_config()
    config.update_from_flattened_dict(families.wan_overrides(WAN) | {"text.kind": "embeddings"})
    run = make_run(config)
    params = jax.jit(lambda: run.init(jax.random.key(0)).params)()
    generate.save_weights(tmp_path / "run.safetensors", params, config, 7)
    said = CONVERT.export_file(tmp_path / "run.safetensors", tmp_path / "out")
    assert "left out: text/null" in said
    assert json.loads((tmp_path / "out" / "config.json").read_text()).items() >= WAN.items()
    assert read(tmp_path / "out" / "diffusion_pytorch_model.safetensors").keys() == random_weights("wan").keys()
    CONVERT.export_file(tmp_path / "run.safetensors", tmp_path / "own", family="wan-original")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["dim"] == 32
    CONVERT.import_file(tmp_path / "own", tmp_path / "again.safetensors")
    wanted = read(tmp_path / "run.safetensors")
    assert wanted.pop("text/null").shape == (12,)
    assert_equal(read(tmp_path / "again.safetensors"), wanted)
    config.model.qk_norm = "head"
    generate.save_weights(tmp_path / "other.safetensors", params, config, 7)
    with pytest.raises(ValueError, match="is no model of a published family"):
        CONVERT.export_file(tmp_path / "other.safetensors", tmp_path / "out")


CONVERT_FILES = importlib.import_module("dit_video.weights.files")


# The published sizes.

# Parameters and tensors of the published checkpoints' transformers.
SIZES = {
    "T2V-1.3B": (1_418_996_800, 825),
    "T2V-14B": (14_288_491_584, 1095),
    "I2V-14B": (16_394_878_784, 1303),
    "TI2V-5B": (4_999_787_712, 825),
}


@pytest.mark.parametrize("form", SIZES)
def test_wan_of_the_published_sizes(form):
    """Counted by shape, nothing allocated; what the config says is what its checkpoint's conversion would say."""
    config = wan_config.get_config(form)
    params = jax.eval_shape(lambda: CONVERT.init_params(config))
    family, published = families.family_of(config)
    names = {n: r.shape for r in families.FAMILIES[family].rules(published) for n in r.names(config.model.depth)}
    parameters, tensors = SIZES[form]
    assert sum(leaf.size for leaf in jax.tree.leaves(params["dit"])) == parameters
    assert (sum(int(np.prod(s)) for s in names.values()), len(names)) == (parameters, tensors)
    assert params["text"] == {}
    flat = {".".join(map(str, k)): v for k, v in _flat(config.to_dict())}
    for key, value in families.FAMILIES[family].overrides(published).items():
        assert key == "name" or flat[key] == value, key


def _flat(tree, at=()):
    for key, value in tree.items():
        yield from _flat(value, (*at, key)) if isinstance(value, dict) else [((*at, key), value)]


# What is converted runs.


@pytest.mark.parametrize("name", parity.MODELS)
def test_a_converted_model_gives_its_references_output(golden, tmp_path, name):
    """From the reference's file by the command's own way to the velocity that `sample` and `train` use."""
    file = tmp_path / "ours.safetensors"
    CONVERT.import_file(golden / f"{parity.MODELS[name][1]}.safetensors", file, family=name)
    trained = generate.load(file)
    p = dataclasses.replace(parity.published(golden, name), params=trained.params)
    io, C = p.io, p.config["in_channels"]
    if name == "sit":
        level_B, scale_B = 1 - io["t"], np.ones(len(io["t"]))
    else:  # theirs are x_t at timesteps, ours z = x_t / (alpha + sigma) at levels
        s = diffusion.linear_schedule()
        t = io["t"].astype(int)
        level_B, scale_B = s.level_T[t], (np.sqrt(s.abar_T) + np.sqrt(1 - s.abar_T))[t]
    wide = lambda a: np.asarray(a).reshape(-1, 1, 1, 1, 1)
    theirs, x = (io[key] if name == "latte" else io[key][:, None] for key in ("out", "x"))
    z = (x / wide(scale_B)).astype(np.float32)
    batch, cond, _, grids = p.lay(z, io["y"])
    level_BxG = per_clip(level_B, batch.patches.level_BxG.shape)
    velocity = jax.jit(diffusion.make_velocity(make_model(trained.config, C), trained.config))
    v_BxNxP, _ = velocity(p.params["dit"], dataclasses.replace(batch.patches, level_BxG=level_BxG), cond)
    v = frames(v_BxNxP, grids)
    ours = -v if name == "sit" else z + wide(1 - level_B) * v
    assert error(ours, theirs[:, :, :C]) < 1e-5


def test_a_converted_wan_gives_its_rebuilds_velocity(tmp_path):
    """Shown z at level s as its x_t at timestep 1000 s, what it gives is noise less clip: our velocity, as it is."""
    state, rng, file = random_weights("wan"), np.random.default_rng(1), tmp_path / "ours.safetensors"
    CONVERT.import_file(save(tmp_path / "theirs.safetensors", state, config=WAN), file)
    trained = generate.load(file)
    x_CxTxYxX, text_SxE = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3, 4, 6), (7, 12)))
    batch, grids = rows_of(np.moveaxis(x_CxTxYxX, 0, -1)[None], lambda b: text_SxE, np.arange(3) / 4, per_row=1)
    patches = dataclasses.replace(batch.patches, level_BxG=levels([250.0], batch.patches.level_BxG.shape))
    trained.config.model.dtype = "float32"
    velocity = jax.jit(diffusion.make_velocity(make_model(trained.config, 4), trained.config))
    v_BxNxP, _ = velocity(trained.params["dit"], patches, Cond(batch.ids_BxSxK, batch.prompt_BxS))
    ours_CxTxYxX = np.moveaxis(frames(v_BxNxP, grids)[0], 0, 1)
    assert error(ours_CxTxYxX, rebuild.wan_forward(state, WAN, x_CxTxYxX, 250.0, text_SxE)) < 1e-5


AUTOENCODERS = ("autoencoder_kl_sd", "autoencoder_kl_wan", "autoencoder_kl_wan22")


@pytest.mark.parametrize("path", AUTOENCODERS)
def test_a_converted_autoencoder_goes_back_unchanged(golden, tmp_path, path):
    source = golden / "diffusers" / f"{path}.safetensors"
    said = CONVERT.import_file(source, tmp_path / "ours.safetensors")
    assert (": kl, " if path.endswith("sd") else ": wan-vae, ") in said
    CONVERT.export_file(tmp_path / "ours.safetensors", tmp_path / "out")
    back = tmp_path / "out/diffusion_pytorch_model.safetensors"
    assert_equal(read(back), read(source))
    published = json.loads((tmp_path / "out/config.json").read_text())
    assert published.items() >= open_weights(source).config.items() and "_class_name" in published
    CONVERT.import_file(tmp_path / "out", tmp_path / "again.safetensors")
    assert_equal(read(tmp_path / "again.safetensors"), read(tmp_path / "ours.safetensors"))


@pytest.mark.parametrize("path", AUTOENCODERS[:2])
def test_a_converted_autoencoder_gives_its_references_output(golden, tmp_path, path):
    """Of images, by the codec that a config of its file asks for."""
    said = CONVERT.import_file(golden / "diffusers" / f"{path}.safetensors", tmp_path / "ours.safetensors")
    config = base.get_config()
    flags_ = [line.removeprefix("--set=") for line in said.split() if line.startswith("--set=")]
    CONVERT.set_keys(config, CONVERT.parse_settings(flags_))
    config.codec.stride = (1, 8, 8) if path.endswith("sd") else (4, 8, 8)
    codec = make_codec(config.codec)
    _, _, io = load_arrays(golden, f"diffusers/{path}")
    if path.endswith("sd"):
        video, mean, decoded = (np.moveaxis(io[key][:1], 1, -1) for key in ("x", "mean", "decoded_from_mean"))
    else:
        video, mean, decoded = (last(io[f"image_{key}"]) for key in ("x", "mean", "decoded_unclamped"))
    latents = (mean - np.float32(codec.mean)) / np.float32(codec.std)
    assert error(codec.encode(video), latents) < 1e-5
    assert error(chunked(codec, "decoder", mean), decoded) < 1e-5


def test_what_of_an_autoencoder_does_not_fit_is_named(golden, tmp_path):
    source = golden / "diffusers/autoencoder_kl_sd.safetensors"
    config, state = open_weights(source).config, read(source)
    convert = lambda state, config, **how: CONVERT.import_file(
        save(tmp_path / "in.safetensors", state, config=config), tmp_path / "ours.safetensors", **how
    )
    with pytest.raises(ValueError, match="1 unused:\n  extra"):
        convert(state | {"extra": np.zeros(3, np.float32)}, config)
    assert "extra" in convert(state | {"extra": np.zeros(3, np.float32)}, config, partial=True)
    wanted = read(tmp_path / "ours.safetensors")
    lost = {n: w for n, w in state.items() if n != "decoder.conv_in.bias"}
    with pytest.raises(ValueError, match="1 missing:\n  decoder.conv_in.bias"):
        convert(lost, config, partial=True)
    with pytest.raises(ValueError, match="lacks 'latent_channels': give its config.json"):
        convert(state, {k: v for k, v in config.items() if k != "latent_channels"})
    with pytest.raises(ValueError, match="are not those of --family=wan-vae"):
        convert(state, config, family="wan-vae")
    with pytest.raises(ValueError, match="holds no config to --set"):
        convert(state, config, settings={"codec.kind": "kl"})
    old = {new: name for name, new in kl.OLD_NAMES.items()}
    aged = {n: next((n.replace(f".{k}.", f".{o}.") for k, o in old.items() if f".{k}." in n), n) for n in state}
    assert sum(n != a for n, a in aged.items()) == 16
    convert({aged[n]: w for n, w in state.items()}, config)
    assert_equal(read(tmp_path / "ours.safetensors"), wanted)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A directory with a tiny Wan, as the command leaves it."""
    folder = tmp_path_factory.mktemp("converted")
    source = save(folder / "in.safetensors", random_weights("wan"), config=WAN)
    prompts = {embeddings.key(p): np.full((3, 12), 0.1 * i, np.float32) for i, p in enumerate(("", "a cat"))}
    safetensors.numpy.save_file(prompts, folder / "text.safetensors")
    how = [f"--set=text.file={folder / 'text.safetensors'}", "--set=text.tokens=8", "--set=sample.interval=(0.0,0.9)"]
    run_here(CONVERT, f"--from={source}", f"--to={folder / 'wan'}", *how)
    return folder / "wan"


def run_here(module, *given):
    with flagsaver.flagsaver():
        module.main(flags.FLAGS(["command", *map(str, given)]))


def test_a_converted_model_makes_latents(converted, tmp_path):
    """Without an autoencoder it says so before anything is sampled, or writes what it made."""
    sample = importlib.import_module("test_cli").SAMPLE
    flags_ = ["--prompt=a cat", "--size=32x16", "--frames=5", "--steps=2", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match=r"Wan makes latents, and has no autoencoder.*--save=latents"):
        run_here(sample, f"--weights={converted}", *flags_)
    assert not (tmp_path / "out").exists()
    run_here(sample, f"--weights={converted / 'weights.safetensors'}", *flags_, "--save=latents", "--seed=3")
    config = generate.load(converted).config
    assert (config.text.tokens, tuple(config.sample.interval)) == (8, (0.0, 0.9))
    made = np.load(tmp_path / "out" / "latents.npz")
    assert made["latents_000"].shape == (2, 2, 4, 4) and np.isfinite(made["latents_000"]).all()
    assert (made["seeds"].tolist(), made["prompts"].tolist()) == ([3], ["a cat"])


def test_a_run_begins_from_a_converted_model(tmp_path):
    """A DiT over the pixel codec's values: its weights become the state's, each in its sharding."""
    published = DIT | {"in_channels": 12, "learn_sigma": False}
    state = random_weights("dit", published)
    source = save(tmp_path / "in.safetensors", state, config=published)
    CONVERT.import_file(source, tmp_path / "run/weights.safetensors", family="dit")
    config = generate.load(tmp_path / "run").config
    config.codec.kind, config.codec.stride = "pixels", (4, 1, 1)
    config.mesh.fsdp = jax.device_count()
    run, mesh = make_run(config), make_mesh(config.mesh)
    shardings = state_shardings(jax.eval_shape(run.init, jax.random.key(0)), mesh)
    fresh = lambda: jax.jit(run.init, out_shardings=shardings)(jax.random.key(0))
    begun = start_from(tmp_path / "run", fresh(), shardings)
    wanted = dit.to_ours(state, published)
    for tree in (begun.params, begun.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, wanted)
        assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s, tree, shardings.params))
    source = save(tmp_path / "in.safetensors", random_weights("dit"), config=DIT)
    CONVERT.import_file(source, tmp_path / "other.safetensors", family="dit")
    with pytest.raises(ValueError, match=r"other weights than this config:\n.*\['dit'\]\['last'\]"):
        start_from(tmp_path / "other.safetensors", fresh(), shardings)


def test_weights_are_laid_out_as_they_are_read(converted):
    """Each tensor comes in the sharding it is asked for, the same on eight devices as on the host."""
    plain = generate.load(converted)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), plain.params)
    config = base.get_config()
    config.mesh.fsdp = jax.device_count()
    shardings = state_shardings(abstract, make_mesh(config.mesh))
    sharded = generate.load(converted, shardings).params
    jax.tree.map(np.testing.assert_array_equal, sharded, plain.params)
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s, sharded, shardings))
    assert sharded["dit"]["block_q"].addressable_shards[0].data.size * jax.device_count() == 2 * 32 * 32


def test_from_a_hub_id_without_a_network(tmp_path):
    """What the hub's cache on this machine holds is found by its name; what it does not hold is said plainly."""
    pytest.importorskip("huggingface_hub")
    repo = tmp_path / "hub" / "models--some--wan"
    snapshot = repo / "snapshots" / ("0" * 40)
    (snapshot / "transformer").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    body, storages = state_pickle(random_weights("wan"))  # as the oldest repositories have them, and nothing else
    write_pt(snapshot / "transformer" / "diffusion_pytorch_model.bin", pickled(body), storages)
    (snapshot / "transformer" / "config.json").write_text(json.dumps(WAN))
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "dit_video.convert", f"--to={tmp_path / 'out.safetensors'}"]
    call = lambda source: subprocess.run(
        [*command, f"--from={source}"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    done = call("some/wan")
    assert done.returncode == 0 and ": wan, " in done.stdout, done.stderr
    assert native.load_weights(tmp_path / "out.safetensors")[1]["model"]["width"] == 32
    (snapshot / "vae").mkdir()
    save(snapshot / "vae" / "diffusion_pytorch_model.safetensors", {"of the vae": np.zeros(3, np.float32)})
    done = call("some/wan/vae")
    assert done.returncode == 1 and "the file's names (['of the vae'], ...) are none of" in done.stderr, done.stderr
    done = call("some/other")
    assert done.returncode == 1 and "FileNotFoundError: some/other is not on this machine" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--from=missing.safetensors"], r"missing\.safetensors does not exist, and is no hub id"),
        (["--from=a/b/c"], r"a/b/c does not exist, and is no hub id"),
        (["--from=..", "--published=x"], r"--published='x' is no JSON"),
        (["--from=..", "--published=[1]"], r"is no JSON of fields"),
        (["--from=..", "--family=gan"], r"--family=gan is not known. Allowed: \['dit'"),
        (["--from=..", "more"], r"'more' is no flag"),
        (["--from=..", "--set=codec.kind"], r"--set='codec.kind' is not of the form KEY=VALUE"),
        (["--from=missing", "--export"], r"missing holds no checkpoint"),
    ],
)
def test_wrong_flags(tmp_path, given, words):
    with pytest.raises(SystemExit, match=words) as error:
        run_here(CONVERT, f"--to={tmp_path / 'out'}", *given)
    assert "\n" not in error.value.code and not (tmp_path / "out").exists()


def test_a_writer_that_is_killed_leaves_no_file(tmp_path):
    stored, _ = open_safetensors(save(tmp_path / "a.safetensors", {"w": np.ones(3, np.float32)}))
    broken = {"w": dataclasses.replace(stored["w"], read=lambda: 1 / 0)}
    with pytest.raises(ZeroDivisionError):
        CONVERT_FILES.write_safetensors(tmp_path / "b.safetensors", broken, {})
    assert not (tmp_path / "b.safetensors").exists()
