"""What a compiled program's text says that it sends between devices."""

import collections
import dataclasses
import re

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Between slices libtpu writes no collective: each device hands what it has to its host, and takes what comes back.
BETWEEN = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}

IOTA = r"\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
MESH = rf"replica_groups=mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\({IOTA}\))? \{{(?P<along>[^}}:]*)\}}"


@dataclasses.dataclass(frozen=True)
class Sent:
    """Collectives of one kind: how often they run in a step, the bytes that they leave on a device, and those that a
    device sends if they go round a ring (all-reduce twice round; Thakur et al. 2005)."""

    times: int = 0
    bytes: int = 0
    sent: float = 0.0

    def __add__(self, other):
        return Sent(self.times + other.times, self.bytes + other.bytes, self.sent + other.sent)

    def often(self, times: int):
        return Sent(self.times * times, self.bytes * times, self.sent * times)


def collectives(text: str, slice_of=None) -> dict[tuple[str, bool], Sent]:
    """(kind, between slices) -> Sent, of the optimised HLO text of a program for one device.

    slice_of: the slice of each device, in the mesh's order; None = all in one. What a loop holds counts as often as the
    loop runs: as XLA says, or else as the largest constant of its condition, from 0 by ones. Of a conditional's
    branches the one that sends most counts. Raises ValueError where a collective's groups, or what goes between slices,
    are written in a way that is not known here.
    """
    bodies, entry = _computations(text)
    slice_of = None if slice_of is None else np.asarray(slice_of)
    cache = {}

    def total(name):
        if name not in cache:
            cache[name] = out = collections.defaultdict(Sent)
            for line in bodies.get(name, ()):
                _line(line, name, out)
        return cache[name]

    def add(out, more, times=1):
        for key, sent in more.items():
            out[key] += sent.often(times)

    def _line(line, name, out):
        found = re.search(r"[\]})] ([a-z][a-z0-9-]*)\(", line)
        if not found:
            return
        opcode, shape = found[1], line[: found.start() + 1]
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            size, between, members = _size(shape, opcode), *_groups(line, kind, slice_of)
            if members == 1:
                return
            if name.startswith("all-reduce-scatter"):  # the rest of the fusion cuts this device's share out of it
                kind, size = "reduce-scatter", size // members
            out[kind, between] += _sent(kind, size, members)
        elif opcode == "recv" and "xla_megascale_runtime" in line:
            kind, members = _between(line)
            out[kind, True] += _sent(kind, _size(shape[: shape.index("]") + 1], opcode), members)
        elif opcode == "while":
            body, condition = (re.search(rf"{part}=%?([\w.\-]+)", line)[1] for part in ("body", "condition"))
            add(out, total(body), _trips(line, condition, bodies))
        elif opcode == "conditional":
            found = re.search(r"branch_computations=\{([^}]*)\}", line) or re.search(r"(true_computation=.*)", line)
            branches = re.findall(r"%([\w.\-]+)|_computation=([\w.\-]+)", found[1])
            add(out, max((total(a or b) for a, b in branches), key=lambda t: sum(s.sent for s in t.values())))
        else:
            for callee in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                add(out, total(callee))

    return dict(total(entry))


def _computations(text):
    """{name: lines}, and the name of the entry."""
    bodies, entry, name = {}, None, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head[2]
            bodies[name], entry = [], name if head[1] else entry
        elif line.startswith("}"):
            name = None
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _sent(kind: str, size: int, members: int) -> Sent:
    """One collective that leaves `size` bytes on each of its members."""
    around = {"all-reduce": 2 * (members - 1) / members, "reduce-scatter": members - 1, "collective-permute": 1}
    return Sent(1, size, size * around.get(kind, (members - 1) / members))


def _between(line: str) -> tuple[str, int]:
    """The kind of a transfer through the hosts, and how many slices take part: target="{slices}x{their devices}"."""
    how = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', line)
    if not how or how[1] not in BETWEEN or not (slices or how[1] == "ONE_TO_ONE"):
        raise ValueError(f"a transfer between slices is written in a way that is not known: {line.strip()[:500]}")
    ranges = [part.split(":") for part in slices[1].split(",")] if slices else [["1"]]
    return BETWEEN[how[1]], sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


def _size(shape: str, opcode: str) -> int:
    """Bytes of what a collective leaves; a started one's shape holds what it was given too."""
    sizes = []
    for dtype, dims in re.findall(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]", shape):
        width = BYTES.get(dtype) or max(int(re.search(r"\d+", dtype)[0]) // 8, 1)
        sizes.append(width * int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64)))
    if opcode == "collective-permute-start":
        return sizes[1]
    if opcode in ("all-gather-start", "all-to-all-start", "reduce-scatter-start"):
        return sum(sizes[len(sizes) // 2 :])
    return sum(sizes)


def _groups(line: str, kind: str, slice_of) -> tuple[bool, int]:
    """Whether some group of devices spans slices, and the groups' size."""
    if kind == "collective-permute":
        found = re.search(r"source_target_pairs=\{((?:\{[\d,]+\},?)*)\}", line)
        groups = np.array([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", found[1])])
    elif found := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", line):
        groups = np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])
    elif found := re.search(rf"replica_groups=\[(?P<shape>[\d,]+)\]<={IOTA}", line):
        groups = _iota(found["dims"], found["order"]).reshape([int(n) for n in found["shape"].split(",")])
    elif found := re.search(MESH, line):
        axes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", found["axes"])}
        along = [list(axes).index(axis) for axis in re.findall(r"'(\w+)'", found["along"])]
        ids = _iota(found["dims"], found["order"]) if found["dims"] else np.arange(np.prod(list(axes.values())))
        ids = np.moveaxis(ids.reshape(list(axes.values())), along, range(-len(along), 0))
        groups = ids.reshape(-1, int(np.prod(ids.shape[-len(along) :])))
    else:
        raise ValueError(f"a collective's groups are written in a way that is not known: {line.strip()[:300]}")
    between = slice_of is not None and bool((slice_of[groups] != slice_of[groups[:, :1]]).any())
    return between, groups.shape[1]


def _iota(dims: str, order: str | None):
    """Devices 0, 1, 2, ... as an array of `dims`, its axes in another order."""
    dims = [int(n) for n in dims.split(",")]
    return np.arange(np.prod(dims)).reshape(dims).transpose([int(n) for n in order.split(",")] if order else None)


def _trips(line: str, condition: str, bodies) -> int:
    known = re.search(r'known_trip_count\\*":\{\\*"n\\*":\\*"(\d+)', line)
    if known:
        return int(known[1])
    lines = list(bodies.get(condition, ()))
    for callee in re.findall(r"calls=%?([\w.\-]+)", "\n".join(lines)):
        lines += bodies.get(callee, ())
    return max((int(n) for n in re.findall(r"constant\((\d+)\)", "\n".join(lines))), default=1)
