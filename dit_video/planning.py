"""A run's plan for a pod that is not there: see `plan`, and the command `python -m dit_video.plan`."""

import contextlib
import dataclasses
import html
import importlib.util
import itertools
import math
import os
import tempfile

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies
from safetensors.numpy import save_file

from dit_video import estimate
from dit_video.chips import CHIPS, Chip
from dit_video.data.loader import make_loader
from dit_video.program import Sent, collectives
from dit_video.sharding import AXES, check_layout, make_mesh, row_share
from dit_video.step import make_run
from dit_video.text import embeddings
from dit_video.trainer import check_config, trace_step

GIB = 2**30
TPUS = ("v5e", "v5p", "v6e", "tpu7x")
ROOM = 0.9  # share of a device's memory that may be filled by the estimate, which is within 10% of what is compiled


@dataclasses.dataclass(frozen=True)
class Topology:
    """kind: a key of CHIPS, or 'cpu'; shape: of a slice; chips: in all slices."""

    kind: str
    shape: str
    slices: int
    chips: int


def parse_topology(text: str, slices: int = 1) -> Topology:
    """A Topology from 'v5p:4x8x8'. Raises ValueError for another form or an unknown chip.

    GPUs lie in machines, each of which is a slice, as jax has it: 'h100:32' is four of them.
    """
    kind, _, shape = text.partition(":")
    if kind not in CHIPS and kind != "cpu":
        raise ValueError(f"--topology={text}: {kind!r} is not known. Allowed: {', '.join(CHIPS)}, cpu.")
    if not shape or not all(n.isdecimal() and int(n) for n in shape.split("x")) or slices < 1:
        raise ValueError(f"--topology={text}, --slices={slices}: give CHIP:SHAPE, as v5p:4x8x8, and 1 slice or more.")
    chips = math.prod(int(n) for n in shape.split("x"))
    machine = CHIPS[kind].machine if kind in CHIPS else 0
    if machine and chips > machine:
        if chips % machine:
            raise ValueError(
                f"--topology={text}: a machine has {machine}. Nearest: {kind}:{-(-chips // machine) * machine}."
            )
        shape, slices = str(machine), slices * chips // machine
        chips = machine
    return Topology(kind, shape, slices, slices * chips)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that `text` and `page` show. Bytes and FLOPs are of one device, except step_flops and model_flops.

    compiled: the compiled step's own figures, or None where it did not compile (`failure` says why). Where it was
    compiled for devices of the host in a chip's place they are not that chip's, and the estimate says whether it fits.
    suggestions: (mesh axes, what else to change, bytes, seconds) of what would fit, soonest first.
    """

    name: str
    topology: Topology
    mesh: dict[str, int]
    chip: Chip | None
    devices_per_chip: int
    compiled_for: str
    notes: tuple[str, ...]
    tokens: int
    memory: dict[str, int]
    compiled: dict[str, int] | None
    failure: str
    sent: dict[tuple[str, bool], Sent]
    step_flops: int
    walked_flops: int
    model_flops: int
    times: dict[str, float] | None
    suggestions: tuple

    @property
    def limit(self) -> float | None:
        """Bytes of memory of one device that jax takes."""
        return self.chip and self.chip.memory * self.chip.usable / self.devices_per_chip

    @property
    def of_chip(self) -> bool:
        """Whether the program is that of the chip's own compiler."""
        return self.compiled_for == "tpu" or self.chip is None

    @property
    def needed(self) -> int:
        return self.compiled["total"] if self.compiled and self.of_chip else sum(self.memory.values())

    @property
    def fits(self) -> bool:
        share = 1 if self.compiled and self.of_chip else ROOM
        return not self.failure and (self.limit is None or self.needed <= share * self.limit)


def plan(config, topology: str, slices: int = 1, quick: bool = False) -> Plan:
    """Compiles the step of `train` for a topology and works out what it costs there; nothing is allocated.

    Raises ValueError for a topology that is none, for a config that cannot run on so many devices, and for one that
    trains low-rank factors alone.
    """
    if config.lora.rank:
        raise ValueError(f"lora.rank={config.lora.rank}: plans are of runs that train all weights. Give 0.")
    check_config(config)
    asked, notes = parse_topology(topology, slices), []
    slices = asked.slices
    devices, compiled_for = _devices(asked, notes)
    if config.codec.kind == "latents":
        notes.append("Latents are taken to be there: what encodes clips, its time and its memory, is not counted.")
    elif config.codec.kind != "pixels":
        notes.append("The autoencoder that encodes clips, on each process's first device, is not counted.")
    mesh = make_mesh(config.mesh, devices)
    if mesh.shape["data"] % slices:  # devices of the host have none, and make_mesh does not ask
        raise ValueError(f"mesh.data={mesh.shape['data']} must be a multiple of the {slices} slices there are.")
    check_shares(config, mesh)
    with _without_embeddings(config) as config:
        run = make_run(config, mesh)
        traced = trace_step(run, mesh)
        state = jax.eval_shape(run.init, jax.eval_shape(lambda: jax.random.key(0)))
        # Devices of the host have no slices: they are told apart as make_mesh lays slices out, along 'data'.
        slice_of = np.arange(mesh.size) // (mesh.size // slices)
        if compiled_for == "tpu":
            slice_of = np.array([getattr(device, "slice_index", 0) for device in mesh.devices.flat])
        compiled, failure, sent = _compile(traced, compiled_for, quick, slice_of)

        chip, per_chip = CHIPS.get(asked.kind), len(devices) // asked.chips
        flops = sum(p.flops for p in estimate.products(run, mesh))
        times = None
        if chip:
            if failure:
                notes.append("The step did not compile: what it sends is the estimate's.")
                within, between = _sent(run, mesh, state, asked.slices)
            else:
                within, between = (sum(s.sent for (_, far), s in sent.items() if far == w) for w in (False, True))
            traffic = estimate.traffic(run, mesh, state)
            times = estimate.roofline(chip, *(per_chip * n for n in (flops / len(devices), traffic, within, between)))
        planned = Plan(
            name=config.name,
            topology=asked,
            mesh=dict(mesh.shape),
            chip=chip,
            devices_per_chip=per_chip,
            compiled_for=compiled_for,
            notes=tuple(notes),
            tokens=config.data.rows * config.data.length,
            memory=estimate.memory(run, mesh, state),
            compiled=compiled,
            failure=failure,
            sent=sent,
            step_flops=flops,
            walked_flops=estimate.walk(traced.jaxpr.jaxpr),
            model_flops=estimate.model_flops(run),
            times=times,
            suggestions=(),
        )
        if planned.fits:
            return planned
        found = suggest(config, devices, planned.limit, chip, slices, per_chip)
        return dataclasses.replace(planned, suggestions=found)


def check_shares(config, mesh) -> None:
    """Raises ValueError where `train` would: where rows, shards, the mesh's processes and workers do not divide."""
    drawn = ml_collections.ConfigDict(config.to_dict())
    drawn.data.kind, drawn.data.waiting = "shapes", 0  # no folder need be here, and no clip is looked at
    make_loader(drawn, None, None, "train", *row_share(mesh))


@contextlib.contextmanager
def _without_embeddings(config):
    """The config, with an embedding of no words in place of text.file, which need not be here."""
    config = ml_collections.ConfigDict(config.to_dict())
    with tempfile.TemporaryDirectory() as folder:
        if config.text.kind == "frozen":
            name = embeddings.key("")
            save_file({name: np.zeros((1, config.text.width), np.float32)}, f"{folder}/{name}.safetensors")
            config.text.file = folder
        yield config


def _sent(run, mesh, state, slices: int) -> tuple[float, float]:
    """Bytes that each device sends a step by the estimate, within a slice and between slices."""
    sent = estimate.exchange(run, mesh, state, slices)
    between = sent.pop("between slices")
    return sum(sent.values()), between


def _devices(asked: Topology, notes: list[str]):
    """The topology's devices, or as many of the host's with a note of why; and what they are."""
    if asked.kind in TPUS and importlib.util.find_spec("libtpu"):
        # No metadata server is there to be asked, and no device to be kept for one process.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        more = {"num_slices": asked.slices} if asked.slices > 1 else {}
        try:
            found = topologies.get_topology_desc(f"{asked.kind}:{asked.shape}", "tpu", **more)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"--topology={asked.kind}:{asked.shape}: libtpu gives no such slice: {error}") from error
        return list(found.devices), "tpu"
    if asked.kind in TPUS:
        notes.append("libtpu is not installed (pip install 'dit_video[plan]'): compiled for devices of the host.")
    elif asked.kind != "cpu":
        notes.append(f"There is no compiler for {asked.kind} here: compiled for devices of the host.")
    if asked.kind != "cpu":
        notes.append("They are of one process: that the pod's processes divide data.shards is not checked.")
    devices, count = jax.devices("cpu"), asked.chips * (CHIPS[asked.kind].devices if asked.kind in CHIPS else 1)
    if len(devices) < count:
        raise ValueError(f"{count} devices of the host are needed and there are {len(devices)}.")
    return devices[:count], "cpu"


def _compile(traced, platform: str, quick: bool, slice_of):
    """(memory by kind, why it failed, what is sent) of the compiled step."""
    options = {"exec_time_optimization_effort": -1.0} if quick and platform == "tpu" else None
    try:
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return None, "\n".join(str(error).strip().splitlines()[:4]), {}
    m = compiled.memory_analysis()
    given, left = m.argument_size_in_bytes, m.output_size_in_bytes - m.alias_size_in_bytes
    held = m.temp_size_in_bytes
    if platform == "tpu":
        # libtpu holds the peak against a chip's memory. Its temp_size_in_bytes says more where loops lie within loops:
        # a program of which it says 132 GiB, with a peak of 94.6, compiles for a chip of 95.7.
        held = m.peak_memory_in_bytes - given - left
    parts = {"arguments": given, "temporaries": held, "results": left}
    return parts | {"total": sum(parts.values())}, "", collectives(compiled.as_text(), slice_of)


def suggest(config, devices: list, limit: float | None, chip: Chip | None, slices: int = 1, per_chip: int = 1) -> tuple:
    """The five soonest meshes that fit by the estimate; if none does, also with remat='full', then with fewer rows.

    limit: bytes of a device; per_chip: devices of a chip. Each can be laid out on the devices, and `train` takes it.
    """
    changes = [{}]
    if config.model.remat != "full":
        changes.append({"model.remat": "full"})
    rows = config.data.rows
    while rows % 2 == 0 and len(changes) < 5:
        rows //= 2
        changes.append({"model.remat": "full", "data.rows": rows})
    state = None
    for change in changes:
        changed = ml_collections.ConfigDict(config.to_dict())
        changed.update_from_flattened_dict(change)
        run = make_run(changed)
        state = state or jax.eval_shape(run.init, jax.eval_shape(lambda: jax.random.key(0)))
        fit = [
            one
            for sizes in _meshes(len(devices))
            if (one := _consider(run, state, sizes, limit, chip, per_chip, slices))
        ]
        made = (
            (sizes, change | shards, needed, seconds)
            for sizes, needed, seconds in sorted(fit, key=lambda one: one[2])
            if (shards := _shards(changed, sizes, devices)) is not None
        )
        if found := tuple(itertools.islice(made, 5)):
            return found
    return ()


def _meshes(devices: int):
    """Every way to share the devices out among the axes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for fsdp in divisors:
        for tensor in (n for n in divisors if devices // fsdp % n == 0):
            for sequence in (n for n in divisors if devices // fsdp // tensor % n == 0):
                yield dict(zip(AXES, (devices // fsdp // tensor // sequence, fsdp, tensor, sequence)))


def _consider(run, state, sizes, limit, chip, per_chip, slices):
    """(mesh, bytes of a device, seconds), or None where the mesh cannot be or does not fit."""
    config = ml_collections.ConfigDict(run.config.to_dict())
    config.mesh.update(sizes)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    try:
        check_layout(config, mesh)
    except ValueError:
        return None
    needed = sum(estimate.memory(run, mesh, state).values())
    if sizes["data"] % slices or limit is not None and needed > ROOM * limit:
        return None
    if chip is None:
        return sizes, needed, math.nan
    flops = sum(p.flops for p in estimate.products(run, mesh)) / math.prod(sizes.values())
    work = (flops, estimate.traffic(run, mesh, state), *_sent(run, mesh, state, slices))
    return sizes, needed, estimate.step_seconds(estimate.roofline(chip, *(per_chip * n for n in work)))


def _shards(config, sizes, devices) -> dict | None:
    """What to set data.shards to on a mesh of these sizes, if anything; None where it cannot be made of the devices."""
    config = ml_collections.ConfigDict(config.to_dict())
    config.mesh.update(sizes)
    data, given = config.data, config.data.shards
    try:
        mesh = make_mesh(config.mesh, devices)
        data.shards = math.lcm(math.gcd(data.rows, data.shards), row_share(mesh)[1])
        check_shares(config, mesh)
    except ValueError:
        return None
    return {} if data.shards == given else {"data.shards": data.shards}


# The report: sections of (title, rows of cells, remarks), once as text and once as a page.


def report(p: Plan, tokens: float) -> list[tuple[str, list, list[str]]]:
    """Sections (title, rows, remarks); tokens: how many patches to train on."""
    t = p.topology
    slices = f"{t.slices} x " if t.slices > 1 else ""
    head = [
        ("config", p.name),
        ("topology", f"{slices}{t.kind}:{t.shape}, {t.chips} chips"),
        ("mesh", " x ".join(f"{axis}={size}" for axis, size in p.mesh.items())),
        ("compiled for", {"tpu": f"{t.kind}, ahead of time", "cpu": "devices of the host"}[p.compiled_for]),
        ("patches a step", f"{p.tokens:,}"),
    ]
    sections = [("Plan", head, list(p.notes))]

    rows = [(kind, _amount(n)) for kind, n in p.memory.items()]
    rows.append(("estimate", _amount(sum(p.memory.values()))))
    remarks = []
    if p.compiled:
        whose = "compiled" if p.of_chip else "compiled for the host"
        rows += [(f"{whose}: {kind}", _amount(n)) for kind, n in p.compiled.items()]
        if p.of_chip:
            off = sum(p.memory.values()) / p.compiled["total"] - 1
            remarks.append(f"The estimate is {off:+.1%} off the compiled step.")
        else:
            remarks.append(f"The host's compiler is not that of {t.kind}: its figures do not count, the estimate does.")
    if p.limit:
        rows.append(("of a device", _amount(p.limit)))
        by = "" if p.compiled and p.of_chip else ", by the estimate"
        room = f", of which it may fill {ROOM:.0%}" if by else ""
        remarks.append(f"{'Fits' if p.fits else 'DOES NOT FIT'}{by}: {p.needed / p.limit:.0%} of the memory{room}.")
        if p.chip.usable < 1:
            remarks.append(
                f"jax takes {p.chip.usable:.0%} of a GPU's memory, if XLA_PYTHON_CLIENT_MEM_FRACTION does not say more."
            )
    if p.failure:
        remarks.append(f"The compiler refused: {p.failure}")
    sections.append(("Memory per device", rows, remarks))

    rows = [("kind", "where", "times", "bytes left", "bytes sent")]
    for (kind, far), sent in sorted(p.sent.items()):
        where = "between slices" if far else "within a slice"
        rows.append((kind, where, f"{sent.times:,}", _amount(sent.bytes), _amount(sent.sent)))
    remarks = [] if p.of_chip else [f"Of the host's program: the compiler of {t.kind} may send otherwise."]
    sections.append(("Collectives per device and step, from the compiled program", rows, remarks))

    rows = [
        ("products of the step", f"{p.step_flops:.4g} FLOP"),
        ("the same, by a walk over its dot_generals", f"{p.walked_flops:.4g} FLOP"),
        ("model: three forward passes over full rows", f"{p.model_flops:.4g} FLOP"),
    ]
    sections.append(("Matrix products of a step, all devices", rows, []))

    if p.times:
        step = estimate.step_seconds(p.times)
        utilisation = p.model_flops / (step * p.chip.flops * t.chips)
        daily = p.tokens * 86400 / step
        rows = [(f"{kind}, at the published figure", f"{n:.3f} s") for kind, n in p.times.items()]
        rows += [
            ("predicted step", f"{step:.3f} s"),
            ("if nothing overlapped", f"{sum(n / estimate.REACHED[k] for k, n in p.times.items()):.3f} s"),
            ("model FLOP utilisation", f"{utilisation:.1%}"),
            ("patches a day", f"{daily:.4g}"),
            (f"days to {tokens:.3g} patches", f"{tokens / daily:.1f}"),
        ]
        bound = max(p.times, key=lambda k: p.times[k] / estimate.REACHED[k])
        shares = ", ".join(f"{share:.0%} of {kind}" for kind, share in estimate.REACHED.items())
        remarks = [
            f"Bound by {bound}.",
            f"Assumed: {shares} of what is published; the longest of them is the step, as if the others hid behind "
            "it; collectives use all links of a chip; elementwise work is fused with the products, whose factors and "
            "results (attention's logits too) pass through memory once.",
        ]
        sections.append(("Time", rows, remarks))
    else:
        sections.append(("Time", [], ["There are no published figures of the host's devices: no times are predicted."]))

    if not p.fits:
        rows = [("flags", "estimate", "predicted step")]
        for sizes, change, needed, seconds in p.suggestions:
            flags = {f"mesh.{axis}": size for axis, size in sizes.items()} | change
            given = " ".join(f"--config.{key}={value}" for key, value in flags.items())
            rows.append((given, _amount(needed), f"{seconds:.3f} s"))
        largest = max(p.memory, key=p.memory.get)
        none = (
            f"None of {t.chips} chips, with fewer rows and remat='full' too: {largest} are the most. Take more chips."
        )
        sections.append(("Meshes that fit, by the estimate", rows, [] if p.suggestions else [none]))
    return sections


def _amount(n: float) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2**20:.3f} MiB"


def text(p: Plan, tokens: float) -> str:
    lines = []
    for title, rows, remarks in report(p, tokens):
        lines += ["", title]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
        lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        lines += [f"  {remark}" for remark in remarks]
    return "\n".join(lines[1:])


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td{padding:.15rem 1.2rem .15rem 0;border-bottom:1px solid #ddd}
.bar{display:flex;height:1.5rem;background:#eee;margin:.6rem 0}.bar i{display:block}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}td{border-color:#333}.bar{background:#333}}"""
COLOURS = ("#4878cf", "#6acc65", "#d65f5f", "#b47cc7", "#c4ad66", "#77bedb", "#e59445", "#888888")


def page(p: Plan, tokens: float) -> str:
    """The report as an HTML page, with a bar of the memory by kind."""
    whole = max(p.limit or 0, sum(p.memory.values()))
    bar = "".join(
        f'<i style="width:{100 * n / whole:.2f}%;background:{colour}" title="{kind}: {_amount(n)}"></i>'
        for (kind, n), colour in zip(p.memory.items(), COLOURS, strict=True)
    )
    out = [f"<!doctype html><meta charset=utf-8><title>{html.escape(p.name)}</title><style>{STYLE}</style>"]
    for title, rows, remarks in report(p, tokens):
        out.append(f"<h2>{html.escape(title)}</h2>")
        if title.startswith("Memory"):
            out.append(f'<div class="bar">{bar}</div>')
        cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
        out.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")
        out += [f"<p>{html.escape(remark)}</p>" for remark in remarks]
    return "\n".join(out)
