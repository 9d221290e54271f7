"""The mesh's four axes, and what lies along each. One page for every axis.

B rows, N patches per row, D model width, H heads, F width of the feed-forward, L layers.

    axis      of activations   of parameters, their averages and the optimizer's state
    data      B                copies; slices, and hosts, of a job lie along it
    fsdp      B                cut, and gathered layer by layer where they are used (ZeRO-3; Rajbhandari et al. 2020)
    tensor    H, F             cut so that each device computes its own heads and its own part of F, with no gathering
    sequence  N                cut, as along fsdp; attention crosses the cuts (`sequence.py`)
"""

import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")
SHARE = ("fsdp", "sequence")  # what cuts weights that are gathered for use
ALL = ("fsdp", "sequence", "tensor")
EXCHANGES = ("ring", "all_to_all")
HOST = "pinned_host"

SMALL = 0.05  # share of the weights that may stay whole without a word

# A parameter's name -> what its axes lie along. The first that matches holds. Where an axis of the mesh does not
# divide an axis of an array, it cuts another one if it is 'fsdp' or 'sequence'; else the array is left whole along it.
# Vectors and scalars are copied.
RULES = {
    # The blocks, [L, in, out] (Shoeybi et al. 2019, sec. 3): into heads and F, out of them, and their biases [L, out].
    r"block_((text_|image_)?[qkv]|mlp_in|mod)": PartitionSpec(None, SHARE, "tensor"),
    r"block_((text_)?o|mlp_out)": PartitionSpec(None, "tensor", SHARE),
    r"block_((text_|image_)?[qkv]|mlp_in)_bias": PartitionSpec(None, "tensor"),
    # Embeddings, the last layer and text encoders, [in, out].
    r"last": PartitionSpec(ALL, None),
    r"(patch|position|mod|last_mod)|(level|image|text)_(in|out)|text_pool": PartitionSpec(None, ALL),
    r"kernel|embedding|table": PartitionSpec(None, ALL),
    # Low-rank factors of the blocks' matrices, [L, in, r] and [L, r, out].
    r"a": PartitionSpec(None, SHARE, None),
    r"b": PartitionSpec(None, None, SHARE),
    # The blocks' other vectors, [L, out].
    r"block_\w+_(bias|gain|norm|table)": PartitionSpec(),
}


def make_mesh(config, devices=None) -> Mesh:
    """The mesh of `config.mesh` over `devices` (by default all there are), several slices along 'data'.

    Raises ValueError where the axes do not multiply to the devices, the slices do not divide 'data', or jax finds no
    place for the axes on the devices' torus.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: config[axis] for axis in AXES}
    given = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if sizes["data"] == -1:
        sizes["data"] = len(devices) // max(config.fsdp * config.tensor * config.sequence, 1)
    shape = tuple(sizes.values())
    if min(shape) < 1 or np.prod(shape) != len(devices):
        raise ValueError(f"{given} do not make the {len(devices)} devices there are.")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % slices:
        raise ValueError(f"mesh.data={sizes['data']} must be a multiple of the {slices} slices there are.")
    within, across = (sizes["data"] // slices, *shape[1:]), (slices, 1, 1, 1)
    try:
        if slices == 1:
            laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        else:
            laid_out = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    # jax says in each of these ways that it finds no place for an axis: of 4x4x28 chips, none for one of 2 (0.10.2).
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        torus = "x".join(str(len(set(along))) for along in zip(*(getattr(d, "coords", ()) for d in devices)))
        raise ValueError(
            f"{given}: jax cannot lay it out on {slices} slice(s) of {devices[0].device_kind} {torus} ({error}). "
            "Give axes that are products of the topology's sides, or take another topology."
        ) from error
    return Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_layout(config, mesh: Mesh) -> None:
    """Raises ValueError where the mesh's axes do not divide what lies along them."""
    data, fsdp, tensor, sequence = (mesh.shape[axis] for axis in AXES)
    rows, parts, m = config.data.rows, config.optimizer.accumulate, config.model
    if parts < 1 or rows % parts or (rows // parts) % (data * fsdp):
        raise ValueError(
            f"data.rows={rows} do not split into optimizer.accumulate={parts} parts over mesh.data={data} x "
            f"mesh.fsdp={fsdp} devices. Give a multiple of {max(parts, 1) * data * fsdp}."
        )
    for name, whole, axis in (
        ("data.length", config.data.length, "sequence"),
        ("model.heads", m.heads, "tensor"),
        ("model.mlp_width", m.mlp_width, "tensor"),
    ):
        if whole % mesh.shape[axis]:
            raise ValueError(f"{name}={whole} must be a multiple of mesh.{axis}={mesh.shape[axis]}.")
    if config.mesh.exchange not in EXCHANGES:
        raise ValueError(f"mesh.exchange={config.mesh.exchange!r} is not known. Allowed: 'ring', 'all_to_all'.")
    if config.mesh.exchange == "all_to_all" and (m.heads // tensor) % sequence:
        raise ValueError(
            f"mesh.exchange='all_to_all' gives each of mesh.sequence={sequence} devices whole heads, and "
            f"model.heads={m.heads} over mesh.tensor={tensor} do not divide by it. Use 'ring', or more heads."
        )


def along(mesh: Mesh | None, array, *axes):
    """The array, laid along the given axes of the mesh (None: copied); without a mesh, as it is."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*axes)))


def gathered(mesh: Mesh | None, name: str, w):
    """One layer of a block's weight as it is used: whole along fsdp and sequence, cut along tensor. name: see RULES."""
    if mesh is None:
        return w
    used = ["tensor" if "tensor" in axes else None for axes in _placed(name, (1, *w.shape), mesh.shape)[1:]]
    return along(mesh, w, *used)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows, at the given axis, over all devices that take rows."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))


def batch_shardings(batch, mesh: Mesh):
    """A sharding per array of a Batch: rows, and N of those whose name says that they have it (..._BxN...)."""

    def rule(path, _):
        return NamedSharding(mesh, PartitionSpec(ROWS, "sequence" if "_BxN" in path[-1].name else None))

    return jax.tree_util.tree_map_with_path(rule, batch)


def state_shardings(abstract, mesh: Mesh, offload: bool = False):
    """A sharding per leaf of a State (or of its parameters), by RULES on its name.

    offload: the optimizer's arrays lie in the host's memory. Raises ValueError for a parameter without a rule, and
    where the backend cannot offload.
    """
    if offload:
        require_host_memory(mesh.devices.flat[0])

    def rule(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        host = offload and leaf.ndim and getattr(path[0], "name", "") == "opt_state"
        spec = _spec(names[-1], leaf.shape, mesh) if leaf.ndim > 1 else PartitionSpec()
        return NamedSharding(mesh, spec, memory_kind=HOST if host else None)

    return jax.tree_util.tree_map_with_path(rule, abstract)


def _spec(name: str, shape, mesh: Mesh) -> PartitionSpec:
    return PartitionSpec(*(tuple(axes) or None for axes in _placed(name, shape, mesh.shape)))


def _wanted(name: str, shape) -> list[tuple[str, ...]]:
    """What RULES lay along each axis of a parameter."""
    rule = next((spec for pattern, spec in RULES.items() if re.fullmatch(pattern, name)), None)
    if rule is None:
        raise ValueError(f"parameter {name!r} {shape} has no rule: give it one in sharding.RULES.")
    return [axes if isinstance(axes, tuple) else (axes,) if axes else () for axes in rule]


def _placed(name: str, shape, sizes) -> list[list[str]]:
    """The axes, of a mesh of these sizes, that do lie along each axis of a parameter."""
    wanted = _wanted(name, shape)
    placed = [[] for _ in wanted]

    def place(axis, i):
        fits = shape[i] % int(np.prod([sizes[other] for other in (*placed[i], axis)])) == 0
        placed[i] += [axis] if fits else []
        return fits

    left = [axis for i, axes in enumerate(wanted) for axis in axes if not place(axis, i)]
    # What is gathered for use may be cut elsewhere; but not along L, the first axis of three, which is scanned.
    for axis in left:
        if axis in SHARE:
            any(place(axis, i) for i in range(len(shape) == 3, len(wanted)))
    return placed


def left_whole(weights, mesh: Mesh) -> str:
    """What the mesh's axes leave whole of the weights, if it is more than a small share, and which would not.

    weights: a tree of arrays, or of their shapes. Vectors are small, and copied: of them nothing is said.
    """
    held, least, uncut = _held(weights, mesh.shape)
    if held - least <= SMALL:
        return ""
    data, fsdp, sequence = mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["sequence"]
    excess = lambda f: np.subtract(*_held(weights, mesh.shape | {"fsdp": f})[:2])
    better = next((f for f in range(fsdp // 2, 0, -1) if fsdp % f == 0 and excess(f) <= SMALL), None)
    mend = f" mesh.fsdp={better}, with mesh.data={data * fsdp // better}, cuts them." if better else ""
    more = f" and {len(uncut) - 6} more" if len(uncut) > 6 else ""
    return (
        f"each device holds {held:.1%} of the weights, and of their optimizer, where mesh.fsdp={fsdp} x mesh.sequence="
        f"{sequence} would leave it {least:.1%}, as they divide no side of {', '.join(uncut[:6])}{more}.{mend}"
    )


def _held(weights, sizes) -> tuple[float, float, list[str]]:
    """(share of what is to be cut that a device holds, what it would be if all were, what is not, by size)."""
    everything, held, least, uncut = 0, 0.0, 0.0, {}
    count = lambda axes: int(np.prod([sizes[axis] for axis in axes]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        name = path[-1].key
        if leaf.ndim < 2 or not any(axis in SHARE for axes in _wanted(name, leaf.shape) for axis in axes):
            continue
        axes = [axis for placed in _placed(name, leaf.shape, sizes) for axis in placed]
        lacking = count(SHARE) // count([axis for axis in axes if axis in SHARE])
        everything += leaf.size
        held += leaf.size / count(axes)
        least += leaf.size / count(axes) / lacking
        if lacking > 1:
            uncut[f"{name} {list(leaf.shape)}"] = -leaf.size
    return held / everything, least / everything, sorted(uncut, key=uncut.get)


def require_host_memory(device) -> None:
    """Raises ValueError where a device's program cannot keep arrays in the memory of its host."""
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if HOST not in kinds:
        raise ValueError(f"optimizer.offload=True needs {HOST} memory; {device.platform} devices have {kinds} alone.")


def row_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which share of the global batch's rows this process reads, of how many.

    Processes among which a row is cut (sequence, tensor) read the same rows. Raises ValueError for a mesh that gives
    processes overlapping rows that are not the same.
    """
    place = np.arange(mesh.shape["data"] * mesh.shape["fsdp"]).reshape(mesh.shape["data"], mesh.shape["fsdp"], 1, 1)
    rows_of = {}
    for device, row in zip(mesh.devices.flat, np.broadcast_to(place, mesh.devices.shape).flat):
        rows_of.setdefault(device.process_index, set()).add(int(row))
    shares = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != place.size:
        raise ValueError(f"the mesh {dict(mesh.shape)} cuts rows unevenly among processes: {shares}.")
    return shares.index(tuple(sorted(rows_of[jax.process_index()]))), len(shares)


def global_batch(local, mesh: Mesh):
    """Global arrays from the rows that each process reads (a Batch of numpy arrays, whole along N)."""
    count = row_share(mesh)[1]

    def whole(array, sharding):
        array = np.asarray(array)
        shape = (array.shape[0] * count, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return jax.tree.map(whole, local, batch_shardings(local, mesh))
