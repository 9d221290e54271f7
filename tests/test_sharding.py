"""The same step on any layout of devices, and the same sums whoever adds them up: jit, pmap, shard_map.

B rows of the global batch, one for each of eight devices.
"""

import dataclasses
import itertools
import re
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_trainer import Tiny, assert_close, awake, first_batches, tiny

from configs import dit
from dit_video.flow import named_key
from dit_video.patches import Cond
from dit_video.sharding import (
    AXES,
    HOST,
    ROWS,
    gathered,
    global_batch,
    left_whole,
    make_mesh,
    require_host_memory,
    state_shardings,
)
from dit_video.step import abstract_batch, make_run
from dit_video.trainer import abstract_state, trace_step


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a device that is not there."""

    id: int
    device_kind: str
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int
    core_on_chip: int = 0
    platform: str = "tpu"


def pod(kind, *shape, slices=1, cores=1):
    """The devices of slices of chips x, y, z, with a host for every 2x2 of them."""
    x, y, z = shape
    hosts = (x // 2) * (y // 2) * z
    places = itertools.product(range(slices), range(z), range(y), range(x), range(cores))
    host = lambda s, k, j, i: s * hosts + (k * (y // 2) + j // 2) * (x // 2) + i // 2
    return [Chip(n, kind, (i, j, k), s, host(s, k, j, i), core) for n, (s, k, j, i, core) in enumerate(places)]


FOUR_HEADS = {"data.rows": 8, "model.heads": 4, "optimizer.kind": "adamw", "optimizer.warmup": 0}
FOUR_HEADS |= {"flow.causal_share": 0.4, "model.window": 2}  # causal clips beside others, across the cuts of a row too


def mesh_config(data, fsdp=1, tensor=1, sequence=1, exchange="ring"):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
    return ml_collections.ConfigDict(sizes | {"exchange": exchange})


def mesh_of(*sizes):
    return make_mesh(mesh_config(*sizes))


@pytest.fixture(scope="module")
def alone():
    """A run of eight rows on one device, and two steps of it."""
    run = make_run(tiny(FOUR_HEADS))
    key = jax.random.key(0)
    state = jax.jit(run.init)(named_key(key, "init"))
    state = dataclasses.replace(state, params=awake(state.params), ema=awake(state.ema))
    return Tiny(run, jax.jit(run.step), state, first_batches(run, 2), key)


@pytest.fixture(scope="module")
def two_steps(alone):
    """(state, metrics) after each."""
    state, after = alone.state, []
    for batch in alone.batches:
        state, metrics = alone.step(state, batch, alone.key)
        after.append((state, metrics))
    return after


def gradients(state):
    """Adam's first moments: after the first step the gradient, clipped, times 1 - b1."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)}


slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)  # each is a program of eight devices to compile


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        slow((8,), {}),
        slow((1, 8), {}),
        slow((4, 2), {}),
        ((2, 2, 2), {}),
        ((2, 1, 1, 4, "ring"), {}),
        slow((2, 1, 1, 4, "all_to_all"), {}),
        slow((1, 2, 2, 2, "ring"), {}),
        slow((2, 1, 1, 4, "ring"), {"model.remat": "dots", "optimizer.accumulate": 2}),
        slow((1, 2, 2, 2, "all_to_all"), {"model.remat": "full"}),
    ],
)
def test_any_mesh_gives_the_same_steps(alone, two_steps, layout, changes):
    """Losses, by level too, gradients and the weights after two steps (1e-5); rows of several clips with their text.

    Also of rows in parts, and of what the backward pass computes again.
    """
    config = tiny(FOUR_HEADS | changes)
    config.mesh = mesh_config(*layout)
    mesh = make_mesh(config.mesh)
    run, (data, fsdp, tensor, sequence) = make_run(config, mesh), mesh.devices.shape
    shardings = state_shardings(jax.eval_shape(lambda: alone.state), mesh)
    state = jax.device_put(alone.state, shardings)
    step = jax.jit(run.step, out_shardings=(shardings, None))
    for batch, (wanted_state, wanted) in zip(alone.batches, two_steps, strict=True):
        batch = global_batch(batch, mesh)
        own = batch.patches.x_BxNxP.addressable_shards[0].data
        assert own.shape[:2] == (8 // (data * fsdp), config.data.length // sequence)
        state, metrics = step(state, batch, alone.key)
        assert_close(metrics, wanted, 1e-5)
        assert_close(gradients(state), gradients(wanted_state), 1e-5)
    assert_close(state.ema, wanted_state.ema, 1e-5)
    # Adam divides by the root of a gradient's square: where that is next to nothing, rounding decides.
    assert_close(state.params, wanted_state.params, 1e-4)
    # A device holds its share of the matrices: not all of them, as it would if the rules were idle.
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params))
    total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert held <= total / (fsdp * tensor * sequence) + 0.05 * total


def summed(alone):
    """Run.sums of this device's rows, added up over the axes 'data' and 'fsdp'."""
    return lambda params, batch, key, axes=ROWS: jax.lax.psum(alone.run.sums(params, batch, key), axes)


@pytest.mark.parametrize("how", ["pmap", slow("shard_map")])
def test_pmap_and_shard_map_give_the_sums_of_jit(alone, how):
    """Gradient and sums of eight rows on one device are the psum of those of a row on each of eight (1e-5)."""
    params, batch = alone.state.params, alone.batches[0]
    wanted = jax.jit(alone.run.sums)(params, batch, alone.key)
    if how == "pmap":
        each = jax.tree.map(lambda a: a[:, None], batch)
        mapped = jax.pmap(lambda p, b, k: summed(alone)(p, b, k, "rows"), axis_name="rows", in_axes=(None, 0, None))
        sums = jax.tree.map(lambda a: a[3], mapped(params, each, alone.key))
    else:
        mesh, everywhere, rows = mesh_of(4, 2), PartitionSpec(), PartitionSpec(ROWS)
        mapped = jax.shard_map(
            summed(alone), mesh=mesh, in_specs=(everywhere, rows, everywhere), out_specs=everywhere, check_vma=False
        )
        put = lambda tree: jax.device_put(tree, NamedSharding(mesh, everywhere))
        sums = jax.jit(mapped)(put(params), global_batch(batch, mesh), put(alone.key))
    for part in (0, 1):
        assert_close(sums[part], wanted[part], 1e-5)
    # And `update` takes them from there.
    after, _ = jax.jit(alone.run.update)(alone.state, *wanted)
    assert int(after.step) == 1 and jnp.isfinite(after.params["dit"]["patch"]).all()


@pytest.mark.parametrize("kind", [slow("adamw"), "muon"])
def test_a_state_is_made_in_its_shardings(kind):
    """The program that makes it leaves a device's share, and on the way holds less than the largest matrix beside it.

    No device, and no host, ever has the whole model: an eighth of the matrices, and vectors, which are copied.
    """
    config = tiny(FOUR_HEADS | {"optimizer.kind": kind, "optimizer.offload": True, "model.width": 128})
    config.mesh = mesh_config(1, 2, 2, 2)
    mesh = make_mesh(config.mesh)
    run, key = make_run(config, mesh), jax.random.key(0)
    abstract = jax.eval_shape(run.init, key)
    shardings = state_shardings(abstract, mesh, config.optimizer.offload)
    made = jax.jit(run.init, out_shardings=shardings).lower(key).compile().memory_analysis()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    assert whole / 8 < made.output_size_in_bytes < 1.1 * whole / 8
    assert made.temp_size_in_bytes < largest / 2


def test_each_layer_is_gathered_as_it_is_used():
    """One layer's matrices by themselves: whole along fsdp and sequence, while what tensor cuts stays cut."""
    config = tiny(FOUR_HEADS)
    config.mesh = mesh_config(1, 2, 2, 2)
    run, key = make_run(config, make_mesh(config.mesh)), jax.random.key(0)
    batch, params = abstract_batch(config, run.model, run.text), jax.eval_shape(run.init, key).params
    traced = str(jax.make_jaxpr(run.evaluate)(params, batch, key))
    found = set(re.findall(r"f32\[(\d+,\d+)\] = sharding_constraint\[.*?spec=P\((.*?)\)", traced, re.DOTALL))
    D, F = run.model.width, run.model.mlp_width
    assert {(shape, spec) for shape, spec in found if "tensor" in spec} == {
        (f"{D},{D}", "None, 'tensor'"),
        (f"{D},{D}", "'tensor', None"),
        (f"{D},{F}", "None, 'tensor'"),
        (f"{F},{D}", "'tensor', None"),
    }


def test_every_parameter_has_a_rule():
    """Of the image knob and of text encoders too; one without a rule is refused by name."""
    mesh, key = mesh_of(1, 2, 2, 2), jax.random.key(0)
    for config in (tiny(), tiny({"lora.rank": 2}), dit.get_config("S/8")):
        state_shardings(jax.eval_shape(make_run(config).init, key), mesh)
    run = make_run(tiny({"model.image_width": 16, "model.qk_norm": "width"}))
    batch = abstract_batch(run.config, run.model, run.text)
    tokens = lambda width: jax.ShapeDtypeStruct((*batch.prompt_BxS.shape, width), jnp.float32)
    cond = Cond(tokens(run.model.text_width), batch.prompt_BxS, tokens(16), batch.prompt_BxS)
    state_shardings({"dit": jax.eval_shape(run.model.init, key, batch.patches, cond)["params"]}, mesh)
    with pytest.raises(ValueError, match="parameter 'adapter' .* has no rule"):
        state_shardings({"dit": {"adapter": jnp.zeros((2, 2))}}, mesh)


XL = {
    "block_q": (28, 1152, 1152),
    "block_mlp_in": (28, 1152, 4608),
    "block_mlp_out": (28, 4608, 1152),
    "level_in": (256, 1152),
    "last": (1152, 32),
}


def test_what_one_side_does_not_divide_is_cut_along_the_other():
    """256 divide no side of 1,152, but the other side of most matrices; a layer of the stack is never cut off.

    What is whole then is told, with its share, and a size that divides.
    """
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in XL.items()}
    mesh_of_chips = lambda *sizes: jax.sharding.AbstractMesh(sizes, AXES)
    held = lambda mesh: {n: s.shard_shape(XL[n]) for n, s in state_shardings(tree, mesh).items()}
    assert held(mesh_of_chips(1, 256, 1, 1)) == {
        "block_q": (28, 1152, 1152),
        "block_mlp_in": (28, 1152, 18),
        "block_mlp_out": (28, 18, 1152),
        "level_in": (1, 1152),
        "last": (1152, 32),
    }
    assert held(mesh_of_chips(1, 256, 2, 9))["block_mlp_in"] == (28, 128, 9)
    deep = {"block_q": jax.ShapeDtypeStruct((256, 18, 18), jnp.float32)}
    assert state_shardings(deep, mesh_of_chips(1, 256, 1, 1))["block_q"].is_fully_replicated
    # The share that is whole: block_q and last, of all five.
    share = r"holds 11\.\d% of the weights, .* mesh.fsdp=256 x mesh.sequence=1 would leave it 0\.4%, .* no side of "
    said = share + r"block_q \[28, 1152, 1152\], last \[1152, 32\]\. mesh\.fsdp=128, with mesh\.data=4, cuts them\."
    assert re.search(said, left_whole(tree, mesh_of_chips(2, 256, 1, 1)))
    assert left_whole(tree, mesh_of_chips(4, 128, 1, 1)) == ""


def test_a_weight_is_used_as_if_it_had_been_cut_where_it_should():
    """Gathered, but for what tensor cuts, where fsdp cuts the side beside it too, and where it cuts its own."""
    mesh = mesh_of(1, 4, 2)
    for shape in ((6, 16), (8, 16)):
        w = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
        placed = jax.device_put(w[None], state_shardings({"block_q": w[None]}, mesh)["block_q"])
        assert placed.addressable_shards[0].data.size == w.size / 8
        used = jax.jit(lambda placed: gathered(mesh, "block_q", placed[0]))(placed)
        assert used.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "tensor")), 2)
        np.testing.assert_array_equal(used, w)


@pytest.mark.slow
def test_a_mesh_that_divides_no_width_gives_the_same_step(caplog):
    """Weights cut along their other side, or whole, train as on one device (1e-5), and what is whole is told."""
    config = tiny(FOUR_HEADS | {"model.heads": 2, "model.width": 36})
    run, key = make_run(config), jax.random.key(0)
    state = jax.jit(run.init)(named_key(key, "init"))
    state = dataclasses.replace(state, params=awake(state.params), ema=awake(state.ema))
    batch = first_batches(run, 1)[0]
    wanted_state, wanted = jax.jit(run.step)(state, batch, key)
    config.mesh = mesh_config(1, 8)
    mesh = make_mesh(config.mesh)
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(make_run(config, mesh), mesh))
    assert "would leave it 12.5%, as they divide no side of block_" in caplog.text
    step = jax.jit(make_run(config, mesh).step, out_shardings=(shardings, None))
    after, metrics = step(jax.device_put(state, shardings), global_batch(batch, mesh), key)
    assert_close(metrics, wanted, 1e-5)
    assert_close(gradients(after), gradients(wanted_state), 1e-5)


@pytest.mark.parametrize(
    ("devices", "layout"),
    [
        (pod("TPU v5", 4, 8, 8), (1, 16, 1, 16)),
        (pod("TPU v5", 4, 8, 8), (2, 128, 1, 1)),
        (pod("TPU v5", 4, 8, 8), (1, 128, 2, 1)),
        (pod("TPU v5", 4, 4, 4), (8, 8, 1, 1)),
        (pod("TPU v5", 4, 4, 4), (2, 32, 1, 1)),
        (pod("TPU v6 lite", 8, 8, 1), (2, 4, 4, 2)),
        (pod("TPU v5 lite", 4, 4, 1, slices=2), (2, 8, 1, 2)),
        (pod("TPU v5", 4, 4, 8, slices=4), (8, 8, 1, 8)),
        (pod("TPU7x", 2, 4, 4, cores=2), (2, 2, 2, 8)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else value[0].device_kind,
)
def test_meshes_split_the_sides_of_a_torus(devices, layout):
    """Every device has one place; a slice has whole places along data, and along an axis lies no more than a box."""
    mesh = make_mesh(mesh_config(*layout), devices)
    assert mesh.devices.shape == layout and set(mesh.devices.flat) == set(devices)
    slices = len({device.slice_index for device in devices})
    for s, part in enumerate(np.split(mesh.devices, slices)):
        assert {device.slice_index for device in part.flat} == {s}
    for axis, size in enumerate(layout):
        line = np.moveaxis(mesh.devices, axis, 0)[:, 0, 0, 0]
        places = [{(d.slice_index, *d.coords, d.core_on_chip)[i] for d in line} for i in range(5)]
        assert np.prod([len(along) for along in places]) == size


def test_a_torus_with_a_hole_is_refused():
    with pytest.raises(ValueError, match=r"mesh.fsdp=3 .*: jax cannot lay it out on 1 slice\(s\) of TPU v5 2x2x1 "):
        make_mesh(mesh_config(1, 3), pod("TPU v5", 2, 2, 1)[:3])
    with pytest.raises(ValueError, match="mesh.data=1 must be a multiple of the 2 slices"):
        make_mesh(mesh_config(1, 8), pod("TPU v5", 2, 2, 1, slices=2))


@pytest.mark.parametrize(("data", "fsdp"), [(8, 2), (3, 1), (-1, 3), (-1, 0)])
def test_a_mesh_that_does_not_fit_is_refused(data, fsdp):
    with pytest.raises(ValueError, match=rf"mesh.data={data} x mesh.fsdp={fsdp} x .* do not make the 8 devices"):
        mesh_of(data, fsdp)


@pytest.mark.parametrize(
    ("layout", "overrides", "message"),
    [
        (
            (8,),
            {"data.rows": 4},
            "data.rows=4 do not split into .*=1 parts over mesh.data=8 x mesh.fsdp=1",
        ),
        ((1, 1, 1, 8), {"data.length": 100}, "data.length=100 must be a multiple of mesh.sequence=8"),
        ((1, 1, 8), {}, "model.heads=4 must be a multiple of mesh.tensor=8"),
        ((1, 1, 1, 8, "all_to_all"), {}, "model.heads=4 over mesh.tensor=1 do not divide by it. Use 'ring'"),
        ((8, 1, 1, 1, "gossip"), {}, "mesh.exchange='gossip' is not known"),
    ],
)
def test_what_does_not_divide_is_refused(layout, overrides, message):
    config = tiny(FOUR_HEADS | overrides)
    config.mesh = mesh_config(*layout)
    with pytest.raises(ValueError, match=message):
        make_run(config, make_mesh(config.mesh))


def test_offload_is_what_the_step_is_made_for():
    """Of the state that is restored and trained, the optimizer's arrays, and no others, lie in the host's memory."""
    kinds = lambda tree: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}
    for offload, kind in ((True, HOST), (False, "device")):
        config = tiny(FOUR_HEADS | {"optimizer.offload": offload})
        config.mesh = mesh_config(1, 8)
        mesh = make_mesh(config.mesh)
        run = make_run(config, mesh)
        state = abstract_state(run, mesh)
        assert kinds(state.opt_state) == {kind} and kinds((state.params, state.ema)) == {"device"}
        placed = jax.tree.leaves(trace_step(run, mesh).lower().out_info[0].opt_state)
        assert {a.sharding.memory_kind for a in placed if a.ndim} == {kind}


@pytest.mark.slow
def test_the_optimizer_offloaded_gives_the_same_step(alone, two_steps):
    """Its arrays come from the host's memory and return there."""
    config = tiny(FOUR_HEADS | {"optimizer.offload": True})
    config.mesh = mesh_config(1, 8)
    mesh = make_mesh(config.mesh)
    shardings = state_shardings(jax.eval_shape(lambda: alone.state), mesh, offload=True)
    step = jax.jit(make_run(config, mesh).step, out_shardings=(shardings, None), donate_argnums=0)
    copied = jax.device_put(jax.tree.map(jnp.copy, alone.state), shardings)
    state, metrics = step(copied, global_batch(alone.batches[0], mesh), alone.key)
    assert_close(metrics, two_steps[0][1], 1e-5)
    assert_close(gradients(state), gradients(two_steps[0][0]), 1e-5)
    kinds = lambda tree: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}
    assert kinds(state.opt_state) == {HOST} and kinds(state.params) == {"device"}


def test_offload_without_host_memory_is_refused():
    device = types.SimpleNamespace(platform="toaster", addressable_memories=lambda: [])
    with pytest.raises(ValueError, match="optimizer.offload=True needs pinned_host memory; toaster devices have"):
        require_host_memory(device)
