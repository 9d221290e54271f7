"""A checkpoint comes back bit for bit, on any layout; what is torn or rotten is seen, named and passed over."""

import logging
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dit_video.checkpoint import INCOMPLETE, SUMS, CheckpointError, Checkpoints, digest, find_damage, load

CONFIG = {"model": {"width": 8}, "name": "é"}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    ema: dict
    opt_state: tuple
    bad_steps: jax.Array


def sharding(*axes, shape=(8,), names=("data",)):
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    return NamedSharding(mesh, PartitionSpec(*axes))


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    weights = jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)
    params = {
        "dit": {"w": jax.device_put(weights, sharding("data")), "b": jnp.asarray(rng.normal(size=5), jnp.bfloat16)},
        "text": [jnp.asarray(rng.normal(size=(3, 2)), jnp.float16)],
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.ema(0.9))
    return State(
        step=jnp.int32(seed),
        params=params,
        ema=jax.tree.map(lambda x: x + 1, params),
        opt_state=(tx.init(params), jax.random.key_data(jax.random.key(seed)), jnp.array(True), np.arange(4)),
        bad_steps=jnp.uint32(2**32 - 1),
    )


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), state)


def steps_on_disk(directory):
    return sorted(int(path.name) for path in directory.iterdir())


def write(directory, *steps, keep=9):
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"at": step}, CONFIG)


def files_of(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_round_trip_is_exact(tmp_path, monkeypatch):
    """State (all dtypes, sharded or not), extra and config are what they were; the SHA-256s are sha256sum's."""
    monkeypatch.chdir(tmp_path)
    directory = pathlib.Path("runs/one")  # relative, as people type it
    state = make_state(3)
    extra = {"shards": {"0": [1, 2]}, "third": 1 / 3}
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.restore(abstract(state)) is None and checkpoints.latest() is None
        checkpoints.save(3, state, extra, CONFIG)
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.config() == CONFIG
        restored = checkpoints.restore(abstract(state))
    assert (restored.step, restored.extra, restored.config) == (3, extra, CONFIG)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(restored.state), strict=True):
        assert type(old) is type(new) and old.dtype == new.dtype and old.shape == new.shape
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
        assert getattr(old, "sharding", None) == getattr(new, "sharding", None)
    assert digest(restored.state) == digest(state) != digest(make_state(4))
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=directory / "00000003", check=True)


@pytest.mark.parametrize(
    "layout",
    [
        sharding(None, "data"),
        sharding("data", "model", shape=(2, 4), names=("data", "model")),
        jax.sharding.SingleDeviceSharding(jax.devices()[5]),
        None,
    ],
    ids=["columns", "2x4", "one device", "host"],
)
def test_restores_onto_another_sharding(tmp_path, layout):
    state = {"w": jax.device_put(np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32), sharding("data"))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, {})
        restored = checkpoints.restore({"w": jax.ShapeDtypeStruct((16, 24), np.float32, sharding=layout)}).state
    assert digest(restored) == digest(state)
    assert isinstance(restored["w"], np.ndarray) if layout is None else restored["w"].sharding == layout


def test_memory_for_saves_is_taken_ahead(tmp_path):
    """As much as one copy of what is on devices takes, by no matter how many of them; by default on GPUs alone."""
    state = make_state()
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    state.params["dit"]["b"] = jax.device_put(state.params["dit"]["b"], sharding())  # a copy on each device
    before = digest(state)
    with Checkpoints(tmp_path) as checkpoints:
        if jax.default_backend() != "gpu":
            assert checkpoints.reserve(state).result() == 0
        taken = checkpoints.reserve(state, "pinned_host").result()
        assert taken == sum(array.nbytes for array in arrays)
        there = jax.tree.map(lambda array: array.sharding.with_memory_kind("pinned_host"), arrays)
        assert checkpoints.reserve(jax.device_put(arrays, there), "pinned_host").result() == 0
        checkpoints.save(1, state, {}, {}, wait=True)
        assert digest(checkpoints.restore().state) == digest(state) == before


def test_part_alone(tmp_path):
    """The EMA comes out of a checkpoint without a word about the optimizer, onto the host or onto devices."""
    write(tmp_path, 1, 2)
    ema = make_state(2).ema
    restored = load(tmp_path, "ema")
    assert restored.step == 2 and restored.config == CONFIG and digest(restored.state) == digest(ema)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored.state))
    placed = load(tmp_path, "ema", abstract(ema)).state
    assert digest(placed) == digest(ema) and placed["dit"]["w"].sharding == ema["dit"]["w"].sharding
    assert digest(load(tmp_path / "00000001", "params").state) == digest(make_state(1).params)
    with Checkpoints(tmp_path) as checkpoints:
        assert digest(checkpoints.restore().state) == digest(make_state(2))
    with pytest.raises(ValueError, match="'emu' is not in checkpoint .* 'ema'"):
        load(tmp_path, "emu")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load(tmp_path / "elsewhere", "ema")


def test_another_state_is_refused(tmp_path):
    """A changed shape, dtype or name is an error that names the leaf, not damage, and nothing is cast or padded."""
    write(tmp_path, 1)
    state = abstract(make_state(1))
    with Checkpoints(tmp_path) as checkpoints:
        for changed in (jax.ShapeDtypeStruct((16, 25), np.float32), jax.ShapeDtypeStruct((16, 24), jnp.bfloat16)):
            state.ema["dit"]["w"] = changed
            with pytest.raises(ValueError, match=r"ema/dit/w: float32\[16, 24\] saved, .* wanted"):
                checkpoints.restore(state)
        del state.ema["dit"]["w"]
        with pytest.raises(ValueError, match=r"ema/dit/w: float32\[16, 24\] saved, nothing wanted"):
            checkpoints.restore(state)
        for leaf in (jax.random.key(0), 3):
            with pytest.raises(TypeError, match="rng is no plain array"):
                checkpoints.save(2, {"rng": leaf}, {}, {})


def test_donated_and_overwritten_buffers(tmp_path):
    """What save() returned from may be donated, and host arrays overwritten, at once: the copy is already made."""
    cut = sharding("data")
    off = {"a": None, "b": None, "c": cut.with_memory_kind("pinned_host")}  # as an optimizer that is offloaded
    move = lambda state: jax.tree.map(lambda x: x * 1.5 + 1, jax.device_put(state, jax.memory.Space.Device))
    update = jax.jit(move, donate_argnums=0, out_shardings=off)
    device = {"a": jnp.ones((512, 1024)), "b": jax.device_put(jnp.ones((1024, 512)), cut)}
    device["c"] = jax.device_put(jnp.ones((1024, 256)), off["c"])
    before, device = device, update(device)
    assert before["a"].is_deleted(), "donation does nothing here: the test tests nothing"
    with Checkpoints(tmp_path, keep=20) as checkpoints:
        digests = {}
        for step in range(1, 6):
            host = np.full((512, 512), step)
            digests[step] = digest({**device, "host": host})
            checkpoints.save(step, {**device, "host": host}, {}, {})
            host[:] = -1
            for _ in range(5):
                device = update(device)
            jax.block_until_ready(device)
        checkpoints.wait()
        for step, expected in digests.items():
            restored = checkpoints.restore(abstract({**device, "host": host}), step).state
            assert digest(restored) == expected, step
            assert restored["c"].sharding.memory_kind == "pinned_host"


def test_keeps_the_newest(tmp_path):
    write(tmp_path, 1, 2, 3, 4, 5, keep=2)
    assert steps_on_disk(tmp_path) == [4, 5]


def test_steps_are_never_overwritten(tmp_path):
    """Saving behind or on a checkpoint that this run did not come from is refused; its own last step is a no-op."""
    write(tmp_path, 1, 2)
    sums = (tmp_path / "00000002" / SUMS).read_bytes()
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            with pytest.raises(CheckpointError, match=rf"step {step} cannot be saved: .* steps \[.*2\] already"):
                checkpoints.save(step, make_state(9), {}, {})
        checkpoints.restore(abstract(make_state()))
        checkpoints.save(2, make_state(9), {}, {}, wait=True)
    assert (tmp_path / "00000002" / SUMS).read_bytes() == sums and steps_on_disk(tmp_path) == [1, 2]


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_flipped_bit_is_found_and_named(tmp_path):
    """Every file (the sums too), 300 single bits: each is seen, and its file named."""
    write(tmp_path, 1)
    files = files_of(tmp_path)
    rng = random.Random(0)
    assert find_damage(tmp_path / "00000001") == []
    for path in [*files, *rng.choices(files, k=300 - len(files))]:
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        damage = find_damage(tmp_path / "00000001")
        assert len(damage) == 1 and damage[0].startswith(f"{path} "), (path, bit, damage)
        flip(path, bit)


def test_missing_cut_and_added_files_are_named(tmp_path):
    write(tmp_path, 1)
    for path in files_of(tmp_path):
        content = path.read_bytes()
        for bad in (None, b"", content[:-1], content + b"\0"):
            path.unlink() if bad is None else path.write_bytes(bad)
            damage = find_damage(tmp_path / "00000001")
            assert len(damage) == 1 and damage[0].startswith(f"{path} "), (path, bad, damage)
            path.write_bytes(content)
    (tmp_path / "00000001" / "state" / "checkpoint").write_bytes(b"")
    assert find_damage(tmp_path / "00000001")[0].endswith(f"state/checkpoint is not in {SUMS}")


def spoil(checkpoint):
    path = next(path for path in files_of(checkpoint) if path.parent.name == "d")
    flip(path, 80)
    return path


def test_falls_back_loudly_and_goes_on(tmp_path, caplog):
    """Newest, then the two newest bad: the next older one, the bad file in the log. The run goes on from there, over
    the same step numbers; the bad ones stay until a newer one is complete, and take no sound one's place."""
    state = abstract(make_state())
    write(tmp_path, 1, 2, 3)
    for bad, good in ((3, 2), (2, 1)):
        spoilt = spoil(tmp_path / f"{bad:08d}")
        with caplog.at_level(logging.ERROR), Checkpoints(tmp_path, keep=2) as checkpoints:
            restored = checkpoints.restore(state)
        assert restored.step == good and digest(restored.state) == digest(make_state(good))
        assert any(record.levelname == "ERROR" and str(spoilt) in record.getMessage() for record in caplog.records)
        assert load(tmp_path, "ema").step == good
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match=r"steps \[3\]"):
            checkpoints.restore(state, step=3)
        assert checkpoints.restore(state).step == 1
        checkpoints.save(2, make_state(20), {}, {}, wait=True)
        assert steps_on_disk(tmp_path) == [1, 2]
        assert digest(checkpoints.restore(state).state) == digest(make_state(20))
        checkpoints.save(3, make_state(30), {}, {}, wait=True)
        assert steps_on_disk(tmp_path) == [2, 3]
        assert digest(checkpoints.restore(state).state) == digest(make_state(30))


def test_lost_sums_are_damage(tmp_path, caplog):
    """Of the newest: the next older one, and the file in the log. Of all: an error, and nothing is deleted; but what a
    killed save or removal has left is no checkpoint, and is not spoken of."""
    state = abstract(make_state())
    write(tmp_path, 1, 2, 3)
    (tmp_path / "00000003" / SUMS).unlink()
    with caplog.at_level(logging.ERROR), Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(state).step == 2
        assert str(tmp_path / "00000003" / SUMS) in caplog.text
        checkpoints.save(3, make_state(30), {}, {}, wait=True)
        assert digest(checkpoints.restore(state).state) == digest(make_state(30))
    for step in (2, 3):
        (tmp_path / f"{step:08d}" / SUMS).unlink()
    left = files_of(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=r"steps \[2, 3\] are all damaged"):
            checkpoints.restore(state)
        with pytest.raises(CheckpointError, match=r"step 1 cannot be saved: .* of steps \[2, 3\] already"):
            checkpoints.save(1, make_state(), {}, {})
    assert files_of(tmp_path) == left

    caplog.clear()
    (tmp_path / "00000002" / INCOMPLETE).touch()
    shutil.rmtree(tmp_path / "00000003")
    (tmp_path / "00000003").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state) is None and not caplog.text
        checkpoints.save(1, make_state(), {}, {}, wait=True)
    assert steps_on_disk(tmp_path) == [1]


def test_all_bad_is_an_error(tmp_path):
    """Never silently from step 0."""
    write(tmp_path, 1, 2)
    for step in (1, 2):
        spoil(tmp_path / f"{step:08d}")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=r"steps \[1, 2\] are all damaged"):
            checkpoints.restore(abstract(make_state()))
        with pytest.raises(CheckpointError, match="step 1 cannot be saved"):
            checkpoints.save(1, make_state(), {}, {})
    with pytest.raises(CheckpointError, match="all damaged"):
        load(tmp_path, "ema")


def test_a_link_to_nothing_is_not_a_new_run(tmp_path):
    """As where checkpoints lie on a disk that is not mounted yet."""
    write(tmp_path / "disk", 1)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / "away")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for look in (checkpoints.config, checkpoints.steps, lambda: checkpoints.restore(abstract(make_state()))):
            with pytest.raises(CheckpointError, match=r"is a link to \S+/disk, which is not there"):
                look()


RUN_UNTIL_KILLED = """
import sys
import numpy as np
from dit_video.checkpoint import Checkpoints, digest

state = lambda step: {"w": np.random.default_rng(step).normal(size=200_000), "step": np.int64(step)}
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    restored = checkpoints.restore(state(0))
    step = restored.step if restored else 0
    assert restored is None or digest(restored.state) == digest(state(step)) and restored.extra == {"at": step}
    while True:
        print("from", step, flush=True)
        step += 1
        checkpoints.save(step, state(step), {"at": step}, {})
"""


def test_kill_at_any_moment(tmp_path):
    """kill -9 of a run that does nothing but save, three times, by the same command: it goes on from a complete
    checkpoint, its state right, at most one save behind; the next save leaves nothing but complete checkpoints."""
    rng = random.Random(time.time_ns())
    begun, torn = 0, 0
    for saves in (2, 5, 4):
        command = [sys.executable, "-c", RUN_UNTIL_KILLED, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            first = int(run.stdout.readline().split()[1])
            # "from k" is printed when k - 1 is complete and k is under way.
            assert first >= max(begun - 1, 0), (first, begun)
            for _ in range(saves):
                begun = int(run.stdout.readline().split()[1])
            time.sleep(rng.uniform(0, 0.05))
            run.send_signal(signal.SIGKILL)
            begun = max([begun, *(int(line.split()[1]) for line in run.stdout)])
        torn += sum(not (path / SUMS).exists() for path in tmp_path.iterdir())
    assert torn > 0, "no kill came in the middle of a write: the test tests nothing"
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore({"w": np.zeros(200_000), "step": np.int64(0)})
        assert restored.step >= begun - 1
        checkpoints.save(restored.step + 1, restored.state, {}, {})
    assert steps_on_disk(tmp_path) == [restored.step, restored.step + 1]
    for path in tmp_path.iterdir():
        assert find_damage(path) == []
        assert sorted(child.name for child in path.iterdir()) == [SUMS, "config.json", "extra.json", "state"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_disk_full(small_disk):
    """The error comes without a further save; what was saved stays; once there is space the run goes on."""
    state = lambda step: {"w": np.random.default_rng(step).integers(0, 256, 1_500_000).astype(np.uint8)}
    ballast = small_disk / "ballast"
    runs = small_disk / "checkpoints"
    with Checkpoints(runs, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {}, {}, wait=True)
        ballast.write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * 4096 - 500_000))
        for step in (3, 4):
            checkpoints.save(step, state(step), {}, {})
            deadline = time.monotonic() + 20
            with pytest.raises(CheckpointError, match=f"{step:08d} could not be written.*(?i:no space|exhausted)"):
                while time.monotonic() < deadline:
                    checkpoints.check()
                    time.sleep(0.01)
            checkpoints.check()  # raised once
            assert steps_on_disk(runs) == [1, 2], "the torn save gives its space back"
        assert digest(checkpoints.restore(state(0)).state) == digest(state(2))
        ballast.unlink()
        checkpoints.save(5, state(5), {}, {}, wait=True)
        assert digest(checkpoints.restore(state(0)).state) == digest(state(5))
    assert steps_on_disk(runs) == [2, 5]


ONE_OF_TWO = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 2)
process = int(sys.argv[1])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=process)
from dit_video.checkpoint import CheckpointError, Checkpoints, digest

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
layout = {"w": NamedSharding(mesh, PartitionSpec("data")), "step": NamedSharding(mesh, PartitionSpec())}
whole = lambda step: {"w": np.random.default_rng(step).normal(size=(16, 8)).astype(np.float32), "step": np.int32(step)}
place = lambda state: jax.tree.map(
    lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), state, layout)
with Checkpoints(sys.argv[3], keep=2) as checkpoints:
    restored = checkpoints.restore(place(whole(0)))
    print("restored", restored and restored.step)
    first = restored.step if restored else 0
    assert restored is None or digest(restored.state) == digest(place(whole(first))) == digest(whole(first))
    for step in range(first + 1, first + 4):
        checkpoints.save(step, place(whole(step)), {"process": process}, {})
    checkpoints.wait()
    if "spoil" in sys.argv:
        jax.experimental.multihost_utils.sync_global_devices("saved")
        if process == 0:
            for step in checkpoints.steps():
                (checkpoints.directory / f"{step:08d}" / "extra.json").write_text("{}")
        jax.experimental.multihost_utils.sync_global_devices("spoilt")
        try:
            checkpoints.restore(place(whole(0)))
        except CheckpointError as error:
            print("refused", error)
"""


def run_two(*arguments, program=ONE_OF_TWO):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(process), port, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(2)
    ]
    try:
        results = [run.communicate(timeout=120) for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, (_, errors) in zip(runs, results):
        assert run.returncode == 0, errors[-3000:]
    return [output for output, _ in results]


SLOW_TO_COMMIT = """
import os
import sys
import time
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

process = int(sys.argv[1])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=process)
from dit_video import checkpoint

write_sums = checkpoint._write_sums
def slowly(path):
    time.sleep(4)
    write_sums(path)
checkpoint._write_sums = slowly  # as where there is much to hash

mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
state = {"w": jax.make_array_from_callback((4,), sharding, lambda index: np.arange(4.0)[index])}
try:
    with checkpoint.Checkpoints(sys.argv[3]) as checkpoints:
        checkpoints.save(1, state, {}, {}, wait=True)
        assert (checkpoints.directory / "00000001" / checkpoint.SUMS).exists()
        checkpoints.save(2, state, {}, {})
        multihost_utils.sync_global_devices("under way")
        began = time.monotonic()
        raise KeyError("another failure")
except KeyError:
    print("seconds", time.monotonic() - began)
multihost_utils.sync_global_devices("left")
print("complete", checkpoints.steps(), flush=True)
time.sleep(2 * (process == 0))  # without it the other would be ended too
os._exit(0)  # as a process that fails does
"""


def test_all_processes_wait_for_the_commit_and_none_where_one_fails(tmp_path):
    """With wait=True every process finds the checkpoint complete; a failure leaves at once, whatever is under way."""
    for output in run_two(tmp_path, program=SLOW_TO_COMMIT):
        assert float(output.split("seconds ")[1].split()[0]) < 3 and "complete [1]" in output


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Two processes of two devices save; one of eight restores, and the other way round; both pass over the same
    damaged checkpoint, and both refuse when all are."""
    whole = {"w": np.random.default_rng(3).normal(size=(16, 8)).astype(np.float32), "step": np.int32(3)}
    assert all("restored None" in output for output in run_two(tmp_path))
    layout = sharding(None, "data")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(
            {"w": jax.ShapeDtypeStruct((16, 8), np.float32, sharding=layout), "step": whole["step"]}
        )
        assert digest(restored.state) == digest(whole) and restored.extra == {"process": 0}
        checkpoints.save(4, restored.state, {}, {})
    spoil(tmp_path / "00000004")
    outputs = run_two(tmp_path, "spoil")
    assert all("restored 3" in output and "refused" in output for output in outputs), outputs
    assert steps_on_disk(tmp_path) == [5, 6]
