"""Weights in the files that others publish: safetensors and PyTorch's, in one file or in several with an index.

Nothing in a file is run, and no tensor is read before it is asked for. A PyTorch file is a zip with a pickle in it,
which says what each tensor is; the pickle is not loaded but read here, word by word, by a reader that knows the
twenty-odd words such a pickle needs, calls nothing and imports nothing. All else is refused, and named.
"""

import dataclasses
import io
import json
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
from etils import epath

# In the order of the format's own: a file's tensors come in the reverse of it, each aligned to its items.
DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
}
STORAGES = {
    "torch DoubleStorage": np.float64,
    "torch FloatStorage": np.float32,
    "torch HalfStorage": np.float16,
    "torch BFloat16Storage": ml_dtypes.bfloat16,
    "torch LongStorage": np.int64,
    "torch IntStorage": np.int32,
    "torch ShortStorage": np.int16,
    "torch CharStorage": np.int8,
    "torch ByteStorage": np.uint8,
    "torch BoolStorage": np.bool_,
}
# What a pickle may ask for beside storages. Their names alone are compared: the functions are never looked up.
TENSORS = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2")
CONTAINERS = ("collections OrderedDict", "torch._utils _rebuild_parameter", "torch Size")
# Which of a PyTorch file's state dicts is taken, the first of these that is there: averaged weights before others.
USUAL = ("ema", "state_dict", "model", "module")
MAX_HEADER = 100_000_000  # bytes of a safetensors header; the format's own limit
MAX_PICKLE = 256_000_000  # bytes of a PyTorch file's pickle, which holds names and shapes alone
MAX_WORDS = 2_000_000  # of its language: some 40 are a tensor


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file; np.asarray(stored) reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None):
        return self.read().astype(dtype or self.dtype, copy=bool(copy))


@dataclasses.dataclass(frozen=True)
class Opened:
    """tensors: by name; config: the model's own config.json, from beside the file or from its metadata, or {}."""

    tensors: Mapping[str, Stored]
    config: dict
    path: epath.Path


def open_weights(path, entry: str | None = None) -> Opened:
    """The tensors of a .safetensors, .pt, .pth or .bin file, of an index of several, or of a directory with one such.

    entry: which state dict of a PyTorch file that holds several ('ema', 'model'). Raises FileNotFoundError where
    nothing is there, and ValueError for what cannot be read safely, naming the file and what is wrong in it.
    """
    path = find_file(epath.Path(path))
    if path.name.endswith(".json"):
        tensors, metadata = _open_index(path, entry)
    else:
        tensors, metadata = _open_one(path, entry)
    beside = path.parent / "config.json"
    text = beside.read_text() if beside.exists() else metadata.get("config", "{}")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the config.json of {path} is no JSON: {error}") from error
    return Opened(tensors, config if isinstance(config, dict) else {}, path)


def find_file(path):
    """The file itself, or the one index or file of weights in a directory (or in its 'transformer')."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.is_dir():
        return path
    if (path / "transformer").is_dir():
        path = path / "transformer"
    names = sorted(p.name for p in path.iterdir())
    for endings in ((".safetensors.index.json", ".bin.index.json"), (".safetensors",), (".pt", ".pth", ".bin")):
        found = [name for name in names if name.endswith(endings)]
        if len(found) == 1:
            return path / found[0]
        if found:
            raise ValueError(f"{path} holds several weights, {found}: give the path of one.")
    raise FileNotFoundError(f"{path} holds no .safetensors, .pt, .pth or .bin file.")


def _open_one(path, entry=None) -> tuple[dict[str, Stored], dict]:
    with path.open("rb") as file:
        head = file.read(512)
    if head[:4] == b"PK\x03\x04":
        return open_torch(path, entry), {}
    # The length of a safetensors header may begin with a pickle's first byte; its ninth byte is a brace.
    old = head[8:9] != b"{" and (head[257:262] == b"ustar" or head[:1] == b"\x80")
    if old or path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar"):
        kind = "tar" if head[257:262] == b"ustar" else "pickle" if head[:1] == b"\x80" else "unknown"
        raise ValueError(
            f"{path} is no zip of PyTorch 1.6 or later (it is of kind {kind!r}). Where it was made, save it again: "
            "torch.save(torch.load(path, weights_only=True), new_path), or as safetensors."
        )
    return open_safetensors(path)


def _open_index(path, entry=None) -> tuple[dict[str, Stored], dict]:
    try:
        where = json.loads(path.read_text())["weight_map"]
        files = sorted(set(where.values()))
        sound = all(isinstance(f, str) and f and not set(f) & set("/\\\0") and f not in (".", "..") for f in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of weights: {error!r}") from error
    if not sound:
        raise ValueError(f"{path} names files outside its own directory: {files}.")
    tensors, metadata = {}, {}
    for name in files:
        if not (path.parent / name).exists():
            raise FileNotFoundError(f"{path.parent / name} is missing, which {path.name} names.")
        some, metadata = _open_one(path.parent / name, entry)
        if twice := sorted(tensors.keys() & some.keys()):
            raise ValueError(f"{path.parent / name} holds {twice[:5]} once more: another file has them already.")
        tensors |= some
    if lost := sorted(where.keys() - tensors.keys()):
        raise ValueError(f"{path} names {lost[:5]} ({len(lost)} in all), which its files do not hold.")
    return tensors, metadata


# safetensors


def open_safetensors(path) -> tuple[dict[str, Stored], dict]:
    """(tensors, metadata) of one safetensors file. Raises ValueError where its header does not fit the file."""
    path = epath.Path(path)
    size = path.stat().length
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"{path} is no safetensors file: a header of {length} bytes in a file of {size}.")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        tensors = {name: _entry(path, 8 + length, size, name, **entry) for name, entry in header.items()}
    except (TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file: its header cannot be read ({error}).") from error
    return tensors, metadata


def _entry(path, start: int, size: int, name: str, dtype: str, shape, data_offsets) -> Stored:
    if dtype not in DTYPES:
        raise ValueError(f"{name!r} in {path} has dtype {dtype!r}. Allowed: {sorted(DTYPES)}.")
    dtype, (begin, end) = np.dtype(DTYPES[dtype]), data_offsets
    if not _counts(*shape, begin, end) or not begin <= end <= size - start:
        raise ValueError(
            f"{name!r} in {path} lies outside the file: {shape} at bytes {data_offsets} of {size - start}."
        )
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name!r} in {path} is {dtype}{shape}, but takes {end - begin} bytes.")

    def read():
        with path.open("rb") as file:
            file.seek(start + begin)
            return np.frombuffer(file.read(end - begin), dtype).reshape(shape)

    return Stored(tuple(shape), dtype, read)


def _counts(*values) -> bool:
    return all(type(v) is int and 0 <= v < 2**62 for v in values)


def write_safetensors(path, tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """Writes tensors one after the other, so that no more than one of them is in memory; sorted, so that the same
    tensors give the same file."""
    names, header, end = {np.dtype(d): n for n, d in DTYPES.items()}, {}, 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    rank = {name: i for i, name in enumerate(DTYPES)}
    order = sorted(tensors, key=lambda name: (-rank[names[tensors[name].dtype]], name))
    for name in order:
        stored = tensors[name]
        begin, end = end, end + math.prod(stored.shape) * stored.dtype.itemsize
        header[name] = {"dtype": names[stored.dtype], "shape": list(stored.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file of that name is a whole one: a writer that is killed leaves a partial one beside it.
    partial = path.parent / f"{path.name}.partial"
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = np.asarray(np.asarray(tensors[name], tensors[name].dtype), order="C")
            if array.shape != tensors[name].shape:
                raise ValueError(f"{name!r} was said to be {tensors[name].shape} and is {array.shape}.")
            file.write(array.reshape(-1).view(np.uint8).data)
    partial.replace(path)


# PyTorch


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    length: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
    """A function or class that the pickle asks for, by name alone."""

    name: str


def open_torch(path, entry: str | None = None) -> dict[str, Stored]:
    """The tensors of a file that torch.save wrote (PyTorch 1.6 and later: an uncompressed zip), by name.

    Raises ValueError for a file that is damaged, or asks for anything but tensors in plain containers.
    """
    path = epath.Path(path)
    size = path.stat().length
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = _members(path, archive, size)
            top = next(name for name in members if name.endswith("/data.pkl")).removesuffix("data.pkl")
            order = members.get(f"{top}byteorder")
            if order is not None and archive.read(order) != b"little":
                raise ValueError(f"{path} was written on a big-endian machine: save it again on another.")
            tree = read_pickle(archive.read(members[f"{top}data.pkl"]))
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, struct.error) as error:
        raise ValueError(f"{path} is a damaged zip: {error}") from error
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error
    tensors = {}
    for name, tensor in _state_dict(path, tree, entry).items():
        storage = tensor.storage
        member = members.get(f"{top}data/{storage.key}")
        if member is None or member.file_size != storage.length * storage.dtype.itemsize:
            has = "nothing" if member is None else f"{member.file_size} bytes"
            raise ValueError(f"{name!r} in {path} wants {storage.length} x {storage.dtype}; {has} lie there.")
        tensors[name] = Stored(tensor.shape, storage.dtype, _reader(path, member, tensor))
    return tensors


def _members(path, archive, size: int) -> dict[str, zipfile.ZipInfo]:
    """The zip's members by name. Raises ValueError for what torch.save does not write and bombs consist of."""
    members = {}
    for info in archive.infolist():
        parts = info.filename.split("/")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ValueError(f"{path}: {info.filename!r} is compressed or encrypted, which torch.save does not do.")
        if "\\" in info.filename or not parts[0] or ".." in parts or info.filename in members:
            raise ValueError(f"{path}: {info.filename!r} is no name of a file inside, or is there twice.")
        members[info.filename] = info
    if sum(info.file_size for info in members.values()) > size:
        raise ValueError(f"{path}: its members say they are larger than the file of {size} bytes.")
    pickles = [info for name, info in members.items() if name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].filename.count("/") != 1:
        raise ValueError(f"{path} is a zip, but none that torch.save wrote: it has no one data.pkl.")
    if pickles[0].file_size > MAX_PICKLE:
        raise ValueError(f"{path}: a pickle of {pickles[0].file_size} bytes holds more than names and shapes.")
    return members


def _reader(path, member: zipfile.ZipInfo, tensor: _Tensor):
    def read():
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                data = archive.read(member)  # the zip's checksum is compared on the way
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        flat = np.frombuffer(data, tensor.storage.dtype)[tensor.offset :]
        strides = [stride * tensor.storage.dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    return read


def _state_dict(path, tree, entry: str | None) -> dict[str, _Tensor]:
    """The dict of tensors in what the pickle holds: itself, or the entry asked for, or the averaged weights."""
    holds = lambda d: isinstance(d, dict) and any(isinstance(v, _Tensor) for v in d.values())
    if entry is not None:
        if not (isinstance(tree, dict) and holds(tree.get(entry))):
            has = sorted(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
            raise ValueError(f"{path} has no state dict {entry!r}. It holds {has}.")
        tree = tree[entry]
    elif not holds(tree):
        found = [k for k, v in tree.items() if holds(v)] if isinstance(tree, dict) else []
        if not found:
            raise ValueError(f"{path} holds no state dict.")
        best = [k for k in USUAL if k in found] or found
        if len(best) > 1 and best[0] not in USUAL:
            raise ValueError(f"{path} holds several state dicts, {found}: say which (--entry).")
        tree = tree[best[0]]
    return {str(name): value for name, value in tree.items() if isinstance(value, _Tensor)}


def read_pickle(data: bytes):
    """The dicts, lists, tuples, numbers, texts and tensors (as _Tensor) that a PyTorch pickle describes.

    Raises ValueError at the first word that is not needed for those, and names it.
    """
    stack, below, memo = [], [], {}
    try:
        for count, (word, value, _) in enumerate(pickletools.genops(io.BytesIO(data))):
            if count == MAX_WORDS:
                raise ValueError(f"its pickle is longer than {MAX_WORDS:,} words, which no model's weights need.")
            match word.name:
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    below.append(stack)
                    stack = []
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[word.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                    stack.append(value)
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    stack.append({"D": dict, "L": list, "T": tuple}[word.name[6]]())
                case "TUPLE":
                    stack, items = below.pop(), stack
                    stack.append(tuple(items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    n = int(word.name[-1])
                    stack[len(stack) - n :] = [tuple(_last(stack, n))]
                case "BINPUT" | "LONG_BINPUT":
                    memo[value] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[value])
                case "SETITEM":
                    k, v = _last(stack, 2)
                    del stack[-2:]
                    _set(stack[-1], [k, v])
                case "SETITEMS":
                    stack, items = below.pop(), stack
                    _set(stack[-1], items)
                case "APPEND":
                    item = stack.pop()
                    _list(stack[-1]).append(item)
                case "APPENDS":
                    stack, items = below.pop(), stack
                    _list(stack[-1]).extend(items)
                case "GLOBAL":
                    stack.append(_name(value))
                case "STACK_GLOBAL":
                    module, name = _last(stack, 2)
                    stack[-2:] = [_name(f"{module} {name}")]
                case "BINPERSID":
                    stack.append(_storage(stack.pop()))
                case "REDUCE":
                    function, arguments = _last(stack, 2)
                    stack[-2:] = [_made(function, arguments)]
                case "BUILD":  # the attributes of an OrderedDict, which state dicts have and nobody needs
                    stack.pop()
                    _dict(stack[-1])
                case "STOP":
                    return _last(stack, 1)[0]
                case other:
                    raise ValueError(
                        f"its pickle uses {other}, which tensors in plain containers do not need: refused."
                    )
    except (IndexError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"its pickle is damaged: {error!r}") from error
    raise ValueError("its pickle is damaged: it has no end.")


def _kind(value) -> str:
    """What an error calls a value from the pickle: its repr could be as deep, or as long, as the pickle likes."""
    return value.name if isinstance(value, _Name) else type(value).__name__.strip("_").lower()


def _last(stack: list, n: int) -> list:
    if len(stack) < n:
        raise IndexError("nothing is left on its stack")
    return stack[-n:]


def _dict(value) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"its pickle fills a {_kind(value)} as if it were a dict: refused.")
    return value


def _list(value) -> list:
    if not isinstance(value, list):
        raise ValueError(f"its pickle fills a {_kind(value)} as if it were a list: refused.")
    return value


def _set(target, items: list) -> None:
    for k, v in zip(items[::2], items[1::2], strict=True):
        if not isinstance(k, str | int):
            raise ValueError(f"its pickle has a {_kind(k)} as the key of a dict: names are texts or numbers.")
        _dict(target)[k] = v


def _name(name: str) -> _Name:
    if name not in (*STORAGES, *TENSORS, *CONTAINERS):
        raise ValueError(f"its pickle asks for {name.replace(' ', '.')}, which no tensor needs: refused.")
    return _Name(name)


def _storage(value) -> _Storage:
    match value:
        case ("storage", _Name(name), str(key), str(), int(length)) if name in STORAGES and key.isdecimal():
            if _counts(length):
                return _Storage(key, np.dtype(STORAGES[name]), length)
    raise ValueError(f"its pickle names a {_kind(value)} as a storage, which is none.")


def _made(function, arguments):
    match function, arguments:
        case _Name("collections OrderedDict"), ():
            return {}
        case _Name("torch Size"), (tuple(sizes),):
            return sizes
        case _Name("torch._utils _rebuild_parameter"), (_Tensor() as tensor, *_):
            return tensor
        case _Name(name), (_Storage() as storage, offset, tuple(shape), tuple(strides), *_) if name in TENSORS:
            return _tensor(storage, offset, shape, strides)
    raise ValueError(f"its pickle calls a {_kind(function)} on a {_kind(arguments)} that it does not take: refused.")


def _tensor(storage: _Storage, offset, shape: tuple, strides: tuple) -> _Tensor:
    if not _counts(offset, *shape, *strides) or len(shape) != len(strides) or len(shape) > 16:
        raise ValueError("its pickle has a tensor whose shape, strides and offset are no counts, or too many.")
    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
    if count and (last >= storage.length or count > storage.length):
        where = f"of shape {shape}, strides {strides} at {offset}"
        raise ValueError(f"its pickle has a tensor {where}, beyond the {storage.length} items of its storage.")
    return _Tensor(storage, offset, shape, strides)
