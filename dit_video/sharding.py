"""The mesh, and which axis of which array lies along it. One page for every axis.

Rows of a batch lie along 'data' and 'fsdp' together; weights along 'fsdp'.
"""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def make_mesh(config) -> jax.sharding.Mesh:
    """The mesh of `config.mesh` over all devices. Raises ValueError where the axes do not multiply to them."""
    devices = jax.device_count()
    fsdp = config.fsdp
    data = devices // max(fsdp, 1) if config.data == -1 else config.data
    if fsdp < 1 or data * fsdp != devices:
        raise ValueError(f"mesh.data={config.data} x mesh.fsdp={fsdp} do not make the {devices} devices there are.")
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh, axis: int = 0) -> NamedSharding:
    """Rows, at the given axis, over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def state_shardings(abstract, mesh):
    """A sharding per leaf: a matrix's largest axis that fsdp divides lies along it (never the stacked layers')."""
    fsdp = mesh.shape["fsdp"]

    def rule(leaf):
        spec = [None] * leaf.ndim
        if leaf.ndim >= 2 and fsdp > 1:
            axes = [a for a in range(leaf.ndim - 2, leaf.ndim) if leaf.shape[a] % fsdp == 0]
            if axes:
                spec[max(axes, key=lambda a: leaf.shape[a])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(rule, abstract)


def global_batch(local, mesh):
    """Global arrays from each process's own rows of a batch (a pytree of numpy arrays)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), local)
