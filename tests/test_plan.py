"""The plan: what is worked out agrees with the traced and the compiled step, and what is read of a program is right.

B rows, N patches per row, D model width.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_sharding import pod

from configs import base, clips, dit, latte, scale, shapes, wan
from dit_video import estimate, planning
from dit_video.chips import CHIPS
from dit_video.program import Sent, collectives
from dit_video.sharding import AXES, check_layout, make_mesh
from dit_video.step import make_run
from dit_video.trainer import trace_step

SMALL = {
    "model.width": 64,
    "model.depth": 3,
    "model.heads": 4,
    "model.mlp_width": 96,
    "data.rows": 8,
    "data.length": 128,
}
SMALL |= {"data.text_length": 24, "data.groups": 5, "text.width": 48, "data.max_tokens": 128, "optimizer.kind": "adamw"}


def config_of(config=None, **changes):
    config = config or base.get_config()
    config.update_from_flattened_dict(SMALL | {k.replace("__", "."): v for k, v in changes.items()})
    return config


def make(config):
    mesh = make_mesh(config.mesh)
    return make_run(config, mesh), mesh


CASES = {
    "words, pooled too, Muon, banded": dict(optimizer__kind="muon", model__text_pool=True, data__length=512),
    "everything again": dict(model__remat="full", mesh__fsdp=4),
    "nothing again, embeddings": dict(model__remat="none", text__kind="embeddings", model__position="rope"),
    "a ring within its reach": dict(mesh__fsdp=1, mesh__sequence=8, data__max_tokens=16, data__length=256),
    "whole rows, heads apart": dict(mesh__fsdp=2, mesh__tensor=2, mesh__sequence=2, mesh__exchange="all_to_all"),
    "pooled twice": dict(model__text="pooled", model__text_pool=True, text__width=64, model__depth=1),
    "a ring in parts": dict(mesh__fsdp=2, mesh__sequence=4, optimizer__accumulate=2, model__remat="full"),
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_products_are_the_steps_dot_generals(changes):
    """The FLOPs worked out from the model are those of a walk over the traced step, to the last one."""
    run, mesh = make(config_of(**changes))
    worked_out = sum(p.flops for p in estimate.products(run, mesh))
    assert worked_out == estimate.walk(trace_step(run, mesh).jaxpr.jaxpr)


def test_products_of_dit():
    run, mesh = make(config_of(dit.get_config("S/8"), text__width=64))
    assert sum(p.flops for p in estimate.products(run, mesh)) == estimate.walk(trace_step(run, mesh).jaxpr.jaxpr)


def test_a_walk_counts_loops_branches_and_devices():
    """[4, 3] by [3, 4], 96 FLOPs: five times in a loop, once in the dearer branch, on each of eight devices."""
    a, mesh = jnp.ones((4, 3)), jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    looped = lambda a: jax.lax.scan(lambda c, _: (c + a @ a.T, None), jnp.zeros((4, 4)), length=5)[0]
    branched = lambda a: jax.lax.cond(a.sum() > 0, lambda: a @ a.T, lambda: jnp.zeros((4, 4)))
    spec = PartitionSpec()
    mapped = jax.shard_map(lambda a: a @ a.T, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    for f, times in ((looped, 5), (branched, 1), (mapped, 8)):
        assert estimate.walk(jax.make_jaxpr(f)(a).jaxpr) == times * 96


def test_collectives_of_a_compiled_program():
    """A product whose inner axis is cut: one all-reduce of [16, 16] float32 in each of seven rounds."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    put = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    f = lambda a, b: jax.lax.scan(lambda c, _: ((a * c.sum()) @ b, None), jnp.zeros((16, 16)), length=7)[0]
    shape = jax.ShapeDtypeStruct
    args = shape((16, 32), jnp.float32, sharding=put(None, "y")), shape((32, 16), jnp.float32, sharding=put("y"))
    text = jax.jit(f, out_shardings=put()).lower(*args).compile().as_text()
    assert collectives(text) == {("all-reduce", False): Sent(7, 7 * 1024, 7 * 1024 * 2 * 3 / 4)}
    # Groups of y are 0-3 and 4-7: between slices only if a slice ends within them.
    assert {far for _, far in collectives(text, [0] * 4 + [1] * 4)} == {False}
    assert {far for _, far in collectives(text, [0, 0, 1, 1, 2, 2, 3, 3])} == {True}


PROGRAM = """
%body (p: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %start = (bf16[2,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)}) all-gather-start(%a), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %p = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%b), source_target_pairs={{0,1},{1,0}}
}
%all-reduce-scatter.1 (input: f32[8,4]) -> f32[2,4] {
  %r = f32[8,4]{1,0} all-reduce(%input), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add
}
%cond (p: (u32[], bf16[4,8])) -> pred[] {
  %n = u32[]{:T(128)} constant(6)
}
ENTRY %main (a: f32[8,4]) -> f32[2,4] {
  %w = (u32[], bf16[4,8]{1,0}, /*index=2*/f32[3]{0}) while(%t), condition=%cond, body=%body
  %send = (f32[5,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%g, %after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[5,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (f32[5,8,128]{2,1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %one = (f32[8]{0}, u32[], token[]) recv(%after), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ONE_TO_ONE"}
  %f = f32[2,4]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_collectives_as_tpus_write_them():
    """Started, in loops without a count, within fusions, groups by the mesh, and through the hosts of four slices."""
    assert collectives(PROGRAM, [0] * 4 + [1] * 4) == {
        ("all-gather", True): Sent(6, 6 * 64, 6 * 32.0),
        ("collective-permute", False): Sent(6, 6 * 64, 6 * 64.0),
        ("reduce-scatter", False): Sent(1, 32, 96.0),
        ("all-reduce", True): Sent(1, 5 * 4096, 5 * 4096 * 2 * 3 / 4),
        ("collective-permute", True): Sent(1, 32, 32.0),
    }
    with pytest.raises(ValueError, match="a transfer between slices is written in a way that is not known: %recv"):
        collectives(PROGRAM.replace("ALL_REDUCE", "GOSSIP"))


@pytest.fixture(scope="module")
def planned():
    config = config_of(mesh__fsdp=4, mesh__sequence=2, model__remat="full", data__length=1024)
    return planning.plan(config, "cpu:8")


def test_a_plan_for_devices_of_the_host(planned):
    assert planned.fits and planned.step_flops == planned.walked_flops and planned.times is None
    assert {kind for kind, _ in planned.sent} >= {"all-gather", "collective-permute"}
    # The state and the batch are counted array by array.
    arguments = sum(planned.memory[kind] for kind in ("parameters", "average", "optimizer", "batch"))
    assert abs(arguments / planned.compiled["arguments"] - 1) < 0.01
    # The state is donated: the step leaves its metrics beside it, and no second state.
    assert planned.compiled["results"] < 0.01 * planned.compiled["arguments"]
    text = planning.text(planned, 1e12)
    assert "devices of the host" in text and "no times are predicted" in text
    assert "<table>" in planning.page(planned, 1e12)


def test_a_mesh_that_does_not_fit_gets_others(planned):
    """On chips of less memory than one copy of the state, weights must be cut: that is what is suggested."""
    config = config_of(mesh__data=8, model__width=256, model__mlp_width=1024, model__depth=8, data__length=64)
    run, mesh = make(config)
    state = jax.eval_shape(run.init, jax.random.key(0))
    limit = sum(estimate.memory(run, mesh, state).values()) / 2
    found = planning.suggest(config, jax.devices(), limit, CHIPS["v5e"])
    assert found and all(needed <= limit for _, _, needed, _ in found)
    assert all(sizes["data"] < 8 for sizes, *_ in found)
    assert [seconds for *_, seconds in found] == sorted(seconds for *_, seconds in found)
    assert planning.suggest(config, jax.devices(), 1e3, CHIPS["v5e"]) == ()


def pasted(text):
    """The flags of each line that has some, as {key: value}."""
    value = lambda text: int(text) if text.isdecimal() else text
    lines = [re.findall(r"--config\.([\w.]+)=(\S+)", line) for line in text.splitlines()]
    return [{key: value(given) for key, given in line} for line in lines if line]


@pytest.mark.parametrize(
    ("devices", "rows"),
    [
        (pod("TPU v5", 4, 8, 8), 512),
        (pod("TPU v5", 4, 4, 28), 448),
        (pod("TPU v5 lite", 4, 4, 1, slices=2), 32),
        (pod("TPU v5 lite", 4, 4, 1, slices=2), 8),
        (pod("TPU7x", 2, 2, 4, cores=2), 64),
    ],
    ids=lambda value: value if isinstance(value, int) else f"{value[0].device_kind} {len(value)}",
)
def test_suggestions_can_be_pasted(planned, devices, rows):
    """Each one's flags, beside a config with other axes and shards, give a mesh of the devices that `train` takes."""
    config = config_of(data__rows=rows, data__shards=4, mesh__fsdp=2, mesh__sequence=4, mesh__tensor=2)
    run = make_run(config)
    state, alone = jax.eval_shape(run.init, jax.random.key(0)), jax.sharding.AbstractMesh((1, 1, 1, 1), AXES)
    limit = sum(estimate.memory(run, alone, state).values()) / 8
    found = planning.suggest(config, devices, limit, CHIPS["v5e"], len({device.slice_index for device in devices}))
    shown = pasted(planning.text(dataclasses.replace(planned, failure="too large", suggestions=found), 1e12))
    assert found and len(shown) == len(found)
    for flags, (sizes, _, needed, _) in zip(shown, found, strict=True):
        assert {f"mesh.{axis}" for axis in AXES} <= set(flags)
        given = config.copy_and_resolve_references()
        given.update_from_flattened_dict(flags)
        mesh = make_mesh(given.mesh, devices)
        check_layout(given, mesh)
        planning.check_shares(given, mesh)
        memory = sum(estimate.memory(make_run(given), mesh, state).values())
        assert dict(mesh.shape) == sizes and memory == needed <= planning.ROOM * limit


def test_suggestions_count_all_devices_of_a_chip():
    """Two on a chip share its FLOPs, its memory's bandwidth and its links: what they do takes twice as long."""
    config, devices = config_of(), pod("TPU7x", 2, 2, 1, cores=2)
    one, two = (planning.suggest(config, devices, 1e12, CHIPS["tpu7x"], 1, per_chip) for per_chip in (1, 2))
    assert [2 * seconds for *_, seconds in one] == [seconds for *_, seconds in two]


def test_slices_share_a_network():
    """Of data alone, within a slice each device reduces the whole gradient; between slices its part of it."""
    run = make_run(config_of())
    state, mesh = jax.eval_shape(run.init, jax.random.key(0)), jax.sharding.AbstractMesh((8, 1, 1, 1), AXES)
    size = 4 * sum(a.size for a in jax.tree.leaves(state.params))
    for slices, within, between in ((1, 7 / 8, 0), (2, 3 / 4, 1 / 2 / 4), (8, 0, 7 / 8)):
        sent = estimate.exchange(run, mesh, state, slices)
        assert sent["all-reduce"] == pytest.approx(2 * size * within)
        assert sent["between slices"] == pytest.approx(2 * size * between)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.shards": 3}, "data.rows=8 must be a multiple of data.shards=3"),
        ({"data.shards": 8, "data.workers": 9}, "data.workers=9 is more than the 8 shards"),
        ({"steps": 0}, "steps=0 must lie in"),
    ],
)
def test_what_train_refuses_is_not_planned(changes, message):
    with pytest.raises(ValueError, match=message):
        planning.plan(config_of(**changes), "cpu:8")


def test_gpus_lie_in_machines():
    """Each is a slice, as for `train`; what goes between them goes over their network."""
    assert planning.parse_topology("h100:32") == planning.Topology("h100", "8", 4, 32)
    assert planning.parse_topology("h100:4", 2) == planning.Topology("h100", "4", 2, 8)
    with pytest.raises(ValueError, match="--topology=a100:12: a machine has 8. Nearest: a100:16"):
        planning.parse_topology("a100:12")
    with pytest.raises(ValueError, match="mesh.data=1 must be a multiple of the 2 slices"):
        planning.plan(config_of(mesh__fsdp=8), "h100:4", slices=2)
    planned = planning.plan(config_of(mesh__data=2, mesh__fsdp=4), "h100:4", slices=2)
    assert {far for _, far in planned.sent} == {False, True} and planned.times["network"] > 0
    between = sum(sent.sent for (_, far), sent in planned.sent.items() if far)
    assert between > 0.5 * planned.memory["gradients"]  # a device's part of the gradient, or more: XLA's to choose


def test_slices_divide_data():
    """With libtpu, and on devices of the host, which have no slices."""
    with pytest.raises(ValueError, match="mesh.data=1 must be a multiple of the 2 slices"):
        planning.plan(config_of(mesh__fsdp=8), "v5e:2x2", slices=2)


def test_a_pods_processes_divide_the_shards():
    """Of the two plans' own configs they do; of fewer shards than processes that read rows of their own, not."""
    for form, shape, processes in (("wan-14B", (4, 8, 8), 16), ("30B", (8, 8, 16), 16)):
        config = scale.get_config(form)
        mesh = make_mesh(config.mesh, pod("TPU v5", *shape))
        planning.check_shares(config, mesh)
        config.data.shards = 4
        with pytest.raises(
            ValueError, match=f"data.shards=4 must be a multiple of the number of processes={processes}"
        ):
            planning.check_shares(config, mesh)


def test_wan_is_planned_without_embeddings():
    """Its text encoder's files need not be here."""
    config = config_of(wan.get_config("TI2V-5B"), model__depth=1, data__rows=1, data__shards=1)
    planned = planning.plan(config, "cpu:1")
    assert planned.fits and planned.step_flops == planned.walked_flops


def test_a_chip_is_not_judged_by_the_hosts_program(planned):
    """The compiled figures stand there, and the estimate decides, both ways."""
    needed = sum(planned.memory.values())
    for memory, verdict in ((1.2, "Fits, by the estimate: 83%"), (1.05, "DOES NOT FIT, by the estimate: 95%")):
        chip = dataclasses.replace(CHIPS["h100"], memory=memory * needed / 0.75)  # of which jax takes three quarters
        shown = planning.text(dataclasses.replace(planned, chip=chip), 1e12)
        assert f"{verdict} of the memory, of which it may fill 90%." in shown and "jax takes 75% of a GPU's" in shown
        assert "compiled for the host: total" in shown and "its figures do not count, the estimate does" in shown


def test_a_chip_of_two_devices_is_planned_as_two():
    devices, _ = planning._devices(planning.parse_topology("tpu7x:2x2x1", 1), [])
    assert len(devices) == 8


OF_FOUR = {"model.width": 1024, "model.depth": 24, "model.heads": 16, "model.mlp_width": 4096, "text.width": 1024}
OF_FOUR |= {"data.text_length": 512, "data.groups": 32, "data.rows": 8, "data.length": 4096, "data.max_tokens": 4096}
OF_FOUR |= {"mesh.fsdp": 4, "mesh.sequence": 1}
ONE_ROW = {"mesh.fsdp": 1, "mesh.sequence": 4, "data.rows": 1, "data.length": 32768, "data.max_tokens": 32768}
WIDE = {"model.width": 3072, "model.heads": 24, "model.mlp_width": 12288, "model.depth": 12}
NOT_FITTED = {"model.width": 2048, "model.mlp_width": 8192, "model.depth": 16, "data.rows": 4, "data.length": 8192}
NOT_FITTED |= {"data.max_tokens": 8192, "mesh.fsdp": 2, "mesh.sequence": 2}
LONGER = {"model.width": 4096, "model.heads": 32, "model.mlp_width": 11008, "model.depth": 20, "data.groups": 48}
LONGER |= {"data.rows": 4, "data.length": 24576, "data.max_tokens": 24576, "mesh.fsdp": 2, "mesh.sequence": 8}
DEEPER = {"model.width": 1536, "model.heads": 12, "model.mlp_width": 6144, "model.depth": 30}
DEEPER |= {"data.length": 6144, "data.max_tokens": 6144}
SIZES = scale.SIZES["30B"]
OF_30B = dict(zip("model.depth model.width model.heads model.mlp_width data.max_tokens data.length".split(), SIZES))
OF_30B |= {"data.rows": 16, "mesh.fsdp": 16, "mesh.sequence": 64}
APART = {"mesh.sequence": 4, "mesh.exchange": "all_to_all"}
COMPILED = {  # changes of configs/scale.py, and the bytes of a chip that libtpu 0.0.42.1 needs for v5p, least effort
    "of four": (OF_FOUR, 3_853_334_272),
    "a row in four": (OF_FOUR | ONE_ROW, 3_988_409_600),
    "tensor": (OF_FOUR | {"mesh.fsdp": 2, "mesh.tensor": 2}, 4_348_812_544),
    "wide": (OF_FOUR | WIDE, 14_047_808_768),
    "accumulated": (OF_FOUR | {"optimizer.accumulate": 2}, 4_019_305_728),
    "short rows": (OF_FOUR | {"data.length": 512, "data.max_tokens": 512, "data.rows": 64}, 3_743_878_912),
    "products kept": (OF_FOUR | {"model.remat": "dots"}, 9_742_146_816),
    "products kept, wide": (OF_FOUR | WIDE | {"model.remat": "dots"}, 21_529_044_224),
    "all kept": (OF_FOUR | {"model.remat": "none", "data.rows": 4}, 19_053_961_472),
    "all kept, wide": (OF_FOUR | WIDE | {"model.remat": "none", "data.rows": 4}, 37_262_520_576),
    "not fitted to": (OF_FOUR | NOT_FITTED, 9_486_965_504),
    "deeper, not fitted to": (OF_FOUR | DEEPER, 9_285_804_800),
    "a longer ring, not fitted to": (OF_FOUR | LONGER, 9_981_085_952),
    "Wan-14B of 256": ({}, 10_587_691_776),
    "30B of 1,024": (OF_30B, 25_171_368_704),
    "30B, fewer layers, of 64": (OF_30B | {"model.depth": 2, "data.rows": 1, "mesh.fsdp": 1}, 10_696_290_048),
    "30B, fewer layers, of 256": (OF_30B | {"model.depth": 24, "data.rows": 4, "mesh.fsdp": 4}, 15_457_786_624),
    "whole rows, heads apart": ({"model.depth": 4, "data.rows": 1, "mesh.fsdp": 1} | APART, 16_907_201_312),
}
OF_CLIPS = {"data.rows": 16, "data.shards": 4, "mesh.fsdp": 4}
LONG = {"data.rows": 8, "data.length": 8192, "data.max_tokens": 8192, "model.remat": "full"}
TENSOR = {"data.rows": 32, "mesh.fsdp": 2, "mesh.tensor": 2, "model.remat": "none"}
OF_DIT = {"data.rows": 32, "data.shards": 4, "mesh.fsdp": 4}
LARGE = {"data.rows": 512, "data.shards": 4, "mesh.sequence": 4, "model.remat": "full"}
XL = functools.partial(dit.get_config, "XL/2")
SHIPPED = {  # the same of configs that train, and of v5e for the last two: float32, and spans that bound attention
    "clips": (clips.get_config, OF_CLIPS, 957_851_616),
    "clips, heads apart": (clips.get_config, OF_CLIPS | {"mesh.fsdp": 1} | APART, 1_250_774_496),
    "clips, tensor, nothing again": (clips.get_config, OF_CLIPS | TENSOR, 5_878_186_464),
    "clips, long ones": (clips.get_config, OF_CLIPS | LONG, 1_600_648_160),
    "DiT-XL/2, Muon": (XL, OF_DIT | {"data.rows": 8, "model.remat": "full", "optimizer.kind": "muon"}, 4_392_418_784),
    "Latte-XL/2": (latte.get_config, OF_CLIPS, 30_903_798_784),
    "shapes": (shapes.get_config, OF_CLIPS | {"data.rows": 8}, 71_388_672),
    "DiT-B/2": (functools.partial(dit.get_config, "B/2"), OF_DIT, 6_012_944_896),
    "DiT-XL/2, nothing again": (XL, OF_CLIPS | {"model.remat": "none"}, 40_344_350_208),
    "DiT-XL/2": (XL, OF_DIT | {"model.remat": "full"}, 6_853_398_016),
    "DiT-XL/2, bfloat16": (XL, OF_DIT | {"model.dtype": "bfloat16"}, 11_097_833_472),
    "DiT-XL/2, copies": (XL, OF_DIT | {"model.remat": "full", "mesh.data": 4, "mesh.fsdp": 1}, 16_967_384_064),
    "DiT-XL/2, a ring": (XL, LARGE | {"mesh.fsdp": 4}, 10_562_489_856),
    "DiT-XL/2, a ring of copies": (XL, LARGE | {"mesh.data": 4}, 13_226_102_784),
}


def estimated(config) -> int:
    sizes = {axis: max(config.mesh[axis], 1) for axis in AXES}
    run = make_run(config)
    state = jax.eval_shape(run.init, jax.random.key(0))
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return sum(estimate.memory(run, mesh, state).values())


@pytest.mark.parametrize(
    ("of", "changes", "needed"),
    [(scale.get_config, *case) for case in COMPILED.values()] + list(SHIPPED.values()),
    ids=[*COMPILED, *SHIPPED],
)
def test_memory_is_that_of_compiled_programs(of, changes, needed):
    """Within 10% of the peak that the compiler for TPUs gives a step of `train`; remat='full' unless said otherwise."""
    config = of()
    config.update_from_flattened_dict(changes)
    assert estimated(config) == pytest.approx(needed, rel=0.1)


def test_an_offloaded_optimizer_is_no_burden_while_gradients_are_computed():
    """It counts as far as it is more than what is gone when it comes; the memory's traffic stays what it was."""

    def estimated(offload, rows):
        run, mesh = make(config_of(optimizer__offload=offload, data__rows=rows, mesh__fsdp=8))
        state = jax.eval_shape(run.init, jax.random.key(0))
        return estimate.memory(run, mesh, state), estimate.traffic(run, mesh, state)

    for rows in (8, 512):
        (there, traffic), (away, same) = estimated(False, rows), estimated(True, rows)
        passing = sum(there[kind] for kind in ("activations", "gathered weights", "working set"))
        assert away == there | {"optimizer": max(there["optimizer"] - passing, 0)} and same == traffic
    assert away["optimizer"] == 0 < there["optimizer"]


def test_roofline():
    """A chip at its published figures for a second each; the step is the longest, at the share that is counted on."""
    chip = CHIPS["v5p"]
    times = estimate.roofline(chip, chip.flops, 2 * chip.bandwidth, 3 * chip.links, chip.network)
    assert times == {"compute": 1, "memory": 2, "interconnect": 3, "network": 1}
    assert estimate.step_seconds(times) == pytest.approx(3 / estimate.REACHED["interconnect"])


def test_low_rank_runs_are_not_planned():
    with pytest.raises(ValueError, match="lora.rank=2: plans are of runs that train all weights"):
        planning.plan(config_of(lora__rank=2), "cpu:8")


@pytest.mark.parametrize("topology", ["v5p", "v9:2x2", "v5p:4xx8", "cpu:0"])
def test_a_topology_that_is_none_is_refused(topology):
    with pytest.raises(ValueError, match="--topology="):
        planning.parse_topology(topology)


def test_the_command_needs_no_libtpu(tmp_path):
    """On a machine without it the same topology is compiled for devices of the host, and the plan says so."""
    hide = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'libtpu' else f(n, *a)"
    )
    overrides = [f"--config.{k}={v}" for k, v in SMALL.items()]
    command = ["--config=configs/base.py", "--topology=v5e:2x2", f"--html={tmp_path / 'new' / 'p.html'}", *overrides]
    code = f"{hide}; import sys; sys.argv = ['plan', *{command!r}]; from dit_video import plan; plan.run()"
    env = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "libtpu is not installed" in done.stdout and "model FLOP utilisation" in done.stdout
    assert "The host's compiler is not that of v5e" in done.stdout and "Fits, by the estimate" in done.stdout
    assert "<table>" in (tmp_path / "new" / "p.html").read_text()


@pytest.mark.parametrize("page", ["file/p.html", ""])
def test_a_page_that_cannot_be_written_is_refused_at_once(tmp_path, page):
    (tmp_path / "file").touch()
    command = ["--config=configs/base.py", "--topology=cpu:4", f"--html={tmp_path / page}"]
    done = subprocess.run([sys.executable, "-m", "dit_video.plan", *command], capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(r"\w+Error: .*\n", done.stderr) and not done.stdout


needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: pip install '.[plan]'"
)


@needs_libtpu
@pytest.mark.parametrize("slices", [1, 2])
def test_a_plan_for_tpus(slices):
    config = config_of(mesh__data=slices, mesh__fsdp=4, model__remat="full")
    planned = planning.plan(config, "v5e:2x2", slices, quick=True)
    assert planned.compiled_for == "tpu" and planned.fits and planned.topology.chips == 4 * slices
    assert {far for _, far in planned.sent} == ({False} if slices == 1 else {False, True})
    assert planned.times["network"] == 0 if slices == 1 else planned.times["network"] > 0
    # Between slices goes each device's part of the gradient, once, in tiles that are a little larger.
    between = sum(sent.bytes for (_, far), sent in planned.sent.items() if far)
    assert between == pytest.approx(planned.memory["gradients"] * (slices - 1), rel=0.1)


@needs_libtpu
def test_loops_within_loops_are_held_once():
    """Of 8 layers of 4 steps, recomputed: the layers' inputs, three arrays of the steps, and four at work; no more."""
    device = planning._devices(planning.parse_topology("v5p:2x2x1"), [])[0][0]
    whole = NamedSharding(jax.sharding.Mesh([device], ("x",)), PartitionSpec())
    w, h = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=whole) for s in ((8, 1024, 1024), (16384, 1024)))

    def layer(h, w):
        return h + jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), jnp.tanh(h @ w), length=4)[0], None

    loss = lambda w, h: jnp.square(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), h, w)[0].astype(float)).sum()
    held = planning._compile(jax.jit(jax.grad(loss)).trace(w, h), "tpu", True, [0])[0]
    assert held["temporaries"] == pytest.approx((8 + 3 * 4 + 4) * h.size * 2, rel=0.03)
    assert held["total"] == held["arguments"] + held["temporaries"] + held["results"]


@needs_libtpu
@pytest.mark.slow
def test_memory_is_that_of_a_program_compiled_now():
    """Within 10%, of a ring of two layers, with blocks of queries and everything recomputed."""
    config = scale.get_config()
    config.update_from_flattened_dict(OF_FOUR | ONE_ROW | {"model.depth": 2, "data.shards": 1})
    planned = planning.plan(config, "v5p:2x2x1", quick=True)
    assert sum(planned.memory.values()) == pytest.approx(planned.compiled["total"], rel=0.1)
