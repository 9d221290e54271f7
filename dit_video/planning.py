"""A run's plan for a pod that is not there: see `plan`, and the command `python -m dit_video.plan`."""

import dataclasses
import html
import importlib.util
import math
import os

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies

from dit_video import estimate
from dit_video.chips import CHIPS, Chip
from dit_video.program import Sent, collectives
from dit_video.sharding import AXES, check_layout, make_mesh
from dit_video.step import make_run
from dit_video.trainer import trace_step

GIB = 2**30
TPUS = ("v5e", "v5p", "v6e", "tpu7x")
ROOM = 0.9  # share of a chip's memory that a suggested mesh may fill by the estimate


@dataclasses.dataclass(frozen=True)
class Topology:
    """kind: a key of CHIPS, or 'cpu'; shape: of a slice; chips: in all slices."""

    kind: str
    shape: str
    slices: int
    chips: int


def parse_topology(text: str, slices: int = 1) -> Topology:
    """A Topology from 'v5p:4x8x8'. Raises ValueError for another form or an unknown chip."""
    kind, _, shape = text.partition(":")
    if kind not in CHIPS and kind != "cpu":
        raise ValueError(f"--topology={text}: {kind!r} is not known. Allowed: {', '.join(CHIPS)}, cpu.")
    if not shape or not all(n.isdecimal() and int(n) for n in shape.split("x")) or slices < 1:
        raise ValueError(f"--topology={text}, --slices={slices}: give CHIP:SHAPE, as v5p:4x8x8, and 1 slice or more.")
    return Topology(kind, shape, slices, slices * math.prod(int(n) for n in shape.split("x")))


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that `text` and `page` show. Bytes and FLOPs are of one device, except step_flops and model_flops.

    compiled: the compiled step's own figures, or None where it did not compile (`failure` says why).
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
        """Bytes of memory of one device."""
        return self.chip and self.chip.memory / self.devices_per_chip

    @property
    def needed(self) -> int:
        return self.compiled["total"] if self.compiled else sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return not self.failure and (self.limit is None or self.needed <= self.limit)


def plan(config, topology: str, slices: int = 1, quick: bool = False) -> Plan:
    """Compiles the step of `train` for a topology and works out what it costs there; nothing is allocated.

    Raises ValueError for a topology that is none, for a config that cannot run on so many devices, and for one that
    trains low-rank factors alone.
    """
    if config.lora.rank:
        raise ValueError(f"lora.rank={config.lora.rank}: plans are of runs that train all weights. Give 0.")
    asked, notes = parse_topology(topology, slices), []
    devices, compiled_for = _devices(asked, notes)
    mesh = make_mesh(config.mesh, devices)
    run = make_run(config, mesh)
    traced = trace_step(run, mesh)
    state = jax.eval_shape(run.init, jax.eval_shape(lambda: jax.random.key(0)))
    slice_of = [getattr(d, "slice_index", 0) for d in mesh.devices.flat]
    compiled, failure, sent = _compile(traced, compiled_for, quick, np.array(slice_of))

    chip, per_chip = CHIPS.get(asked.kind), len(devices) // asked.chips
    flops = sum(p.flops for p in estimate.products(run, mesh))
    times = None
    if chip:
        if failure:
            notes.append("The step did not compile: what it sends is the estimate's.")
            within, between = sum(estimate.exchange(run, mesh, state).values()), 0.0
        else:
            within, between = (sum(s.sent for (_, far), s in sent.items() if far == which) for which in (False, True))
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
    return dataclasses.replace(planned, suggestions=suggest(config, len(devices), planned.limit, chip))


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
    if asked.slices > 1:
        notes.append("Devices of the host have no slices: what goes between slices is not told apart.")
    devices = jax.devices("cpu")
    if len(devices) < asked.chips:
        raise ValueError(f"{asked.chips} devices of the host are needed and there are {len(devices)}.")
    return devices[: asked.chips], "cpu"


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


def suggest(config, devices: int, limit: float, chip: Chip | None, most: int = 5) -> tuple:
    """Meshes that fit by the estimate, soonest first; if none does, also with remat='full', then with fewer rows."""
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
        found = [one for sizes in _meshes(devices) if (one := _consider(run, state, sizes, change, limit, chip))]
        if found:
            return tuple(sorted(found, key=lambda one: one[3])[:most])
    return ()


def _meshes(devices: int):
    """Every way to share the devices out among the axes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for fsdp in divisors:
        for tensor in (n for n in divisors if devices // fsdp % n == 0):
            for sequence in (n for n in divisors if devices // fsdp // tensor % n == 0):
                yield dict(zip(AXES, (devices // fsdp // tensor // sequence, fsdp, tensor, sequence)))


def _consider(run, state, sizes, change, limit, chip):
    """(mesh, change, bytes, seconds), or None where the mesh cannot be or does not fit."""
    config = ml_collections.ConfigDict(run.config.to_dict())
    config.mesh.update(sizes)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    try:
        check_layout(config, mesh)
    except ValueError:
        return None
    needed = sum(estimate.memory(run, mesh, state).values())
    if limit is not None and needed > ROOM * limit:
        return None
    if chip is None:
        return sizes, change, needed, math.nan
    flops = sum(p.flops for p in estimate.products(run, mesh)) / math.prod(sizes.values())
    sent = sum(estimate.exchange(run, mesh, state).values())
    times = estimate.roofline(chip, flops, estimate.traffic(run, mesh, state), sent)
    return sizes, change, needed, estimate.step_seconds(times)


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
        rows += [(f"compiled: {kind}", _amount(n)) for kind, n in p.compiled.items()]
        remarks.append(
            f"The estimate is {sum(p.memory.values()) / p.compiled['total'] - 1:+.1%} off the compiled step."
        )
    if p.limit:
        rows.append(("of a device", _amount(p.limit)))
        remarks.append(f"{'Fits' if p.fits else 'DOES NOT FIT'}: {p.needed / p.limit:.0%} of the memory.")
    if p.failure:
        remarks.append(f"The compiler refused: {p.failure}")
    sections.append(("Memory per device", rows, remarks))

    rows = [("kind", "where", "times", "bytes left", "bytes sent")]
    for (kind, far), sent in sorted(p.sent.items()):
        where = "between slices" if far else "within a slice"
        rows.append((kind, where, f"{sent.times:,}", _amount(sent.bytes), _amount(sent.sent)))
    sections.append(("Collectives per device and step, from the compiled program", rows, []))

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
        rows = [("mesh", "change", "estimate", "predicted step")]
        for sizes, change, needed, seconds in p.suggestions:
            mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
            rows.append(
                (mesh, " ".join(f"--config.{k}={v}" for k, v in change.items()), _amount(needed), f"{seconds:.3f} s")
            )
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
