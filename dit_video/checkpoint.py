"""Training state on disk: saved in the background, hashed, verified, and restored on any layout of devices.

A checkpoint is a directory named by its step. Orbax writes the arrays, we write the rest:

    00000300/state/...      the state's arrays (OCDBT; any sharding, any number of processes)
             extra.json     the loader's position, and whatever else the trainer hands over
             config.json    the run's config
             SHA256SUMS     the SHA-256 of every file above, read back from the disk (`sha256sum -c` takes it too)

SHA256SUMS comes last and in one piece, so it is the commit. A checkpoint is deleted in the opposite order, SHA256SUMS
first. While it is written or deleted a file INCOMPLETE lies beside: with that, and without SHA256SUMS, a directory is
what a killed run left, which no reader sees and the next save removes. Without both it has lost its sums, and is
damaged like one that has lost another file.

With several processes all of them make every call, on a directory that all can see; the first one verifies, hashes,
and writes everything but the others' shards (`extra` is the first one's). A save is complete on none of them before
the first one has committed it.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import re
import typing

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

SUMS = "SHA256SUMS"
INCOMPLETE = "INCOMPLETE"
PATIENCE = 4 * 3600  # seconds for writing, and for hashing while the others wait; a dead one is noticed long before
_BARRIERS = itertools.count()  # a barrier's name serves once; all processes save in the same order


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none that was written can be trusted."""


class Restored(typing.NamedTuple):
    step: int
    state: typing.Any
    extra: dict
    config: dict


def check_place(directory) -> None:
    """Raises ValueError for a store that orbax keeps no arrays in: for all but disks and gs://."""
    scheme = re.match(r"(\w+)://", os.fspath(directory))
    if scheme and scheme[1] != "gs":
        raise ValueError(
            f"{os.fspath(directory)} is on {scheme[0]}, and checkpoints lie on a disk or on gs://. Give one of these, "
            "or mount the other as a folder."
        )


class Checkpoints:
    """The checkpoints of one run, in a directory of their own: on a disk, or on gs://."""

    def __init__(self, directory, keep=3):
        """keep: how many complete checkpoints stay; older ones go once a newer one is complete."""
        check_place(directory)
        if keep < 1:
            raise ValueError(f"keep={keep} would delete the checkpoint just written. Use 1 or more, better 2.")
        directory = os.fspath(directory)
        self.directory = epath.Path(directory if "://" in directory else os.path.abspath(directory))  # as orbax asks
        self._keep = keep
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), timeout_secs=PATIENCE)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = None  # the save under way
        self._step = None  # the step last saved or restored: saving it once more would add nothing
        self._damaged = frozenset()  # steps that `restore` passed over: the next complete save removes them

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not None and self._pending is not None and jax.process_count() > 1:
            # The others wait for this process in some collective until it has ended (`launch.fail`), not for the disk.
            logging.error("the save under way is given up: another failure ends the run")
            self._thread.shutdown(wait=False)
        else:
            self.close()

    def steps(self):
        """The steps of all complete checkpoints, oldest first. Complete, not yet verified."""
        return sorted(int(path.name) for path in self._step_paths() if (path / SUMS).exists())

    def latest(self):
        """The newest complete checkpoint's step, or None."""
        return max(self.steps(), default=None)

    def config(self):
        """The newest intact config, to compare before a whole `restore`. None if there is no checkpoint."""
        for step in reversed(self.steps()):
            path = self._path(step)
            if not find_damage(path, only="config.json"):
                return json.loads((path / "config.json").read_text())
        return None

    def save(self, step, state, extra, config, wait=False):
        """Saves `state` (a pytree of arrays), `extra` and `config` (JSON-able dicts) in the background.

        Returns once the state is copied, so that it may be donated or overwritten; wait=True: once the checkpoint is
        complete. Does nothing for the step that this object saved or restored last.

        Raises:
          CheckpointError: the previous save failed (this one has then not begun, and may be called again), or there
            is a checkpoint of this step, or of a later one, that this run did not go through.
          TypeError: a leaf is not a plain array, or `extra` or `config` is not JSON-able.
        """
        self.wait()
        texts = {"extra.json": json.dumps(extra, indent=1), "config.json": json.dumps(config, indent=1)}
        _require_plain_arrays(state)
        if step == self._step:
            return
        # The first process alone looks, as it alone changes what is there; where it refuses, it ends the others too.
        written = self._written() if jax.process_index() == 0 else []
        if ahead := [other for other in written if other >= step and other not in self._damaged]:
            raise CheckpointError(
                f"step {step} cannot be saved: {self.directory} has checkpoints of steps {ahead} already. Resume from "
                "the newest, use another directory, or move them away."
            )
        path = self._path(step)
        self._damaged -= {step}
        try:
            if jax.process_index() == 0:
                self._remove_incomplete()
                _remove(path)
                path.mkdir(parents=True)
                (path / INCOMPLETE).touch()
            self._orbax.save(path / "state", args=ocp.args.PyTreeSave(state))  # begins with a barrier
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} could not be begun: {error}") from error
        self._pending = self._thread.submit(self._finish, step, texts, next(_BARRIERS))
        if wait:
            self.wait()

    def reserve(self, state, memory=None):
        """Begins to take the host memory that saves of `state` are copied through, and returns the Future of its bytes.

        GPUs copy through pinned memory, which takes about a second per GB to pin, once: taken here, while something
        else is waited for, it does not hold up the first save. Elsewhere nothing is taken, unless `memory` names a kind
        of memory that the devices have. `state` must not be donated before the Future is done. Memory that cannot be
        had is logged as a warning: then the first save takes it, or fails.
        """
        if memory is None and jax.default_backend() == "gpu":
            memory = "pinned_host"  # what orbax copies to
        arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array) and memory]
        elsewhere = [array for array in arrays if array.sharding.memory_kind != memory]
        shards = [shard for array in elsewhere for shard in array.addressable_shards if shard.replica_id == 0]
        return self._thread.submit(_take, shards, memory)

    def check(self):
        """Raises CheckpointError if the last save has failed by now. Never blocks: fit for every training step."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self):
        """Waits until the save under way is complete; raises CheckpointError, once, if it failed."""
        if self._pending is not None:
            concurrent.futures.wait([self._pending])  # an interrupt here leaves it pending
            pending, self._pending = self._pending, None
            pending.result()

    def close(self):
        """Waits like `wait`, then frees the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def restore(self, abstract_state=None, step=None, part=None):
        """Verifies and restores the newest sound checkpoint, or that of `step`.

        abstract_state: the state's pytree. A leaf with a sharding (ShapeDtypeStruct, jax.Array) comes back as a
        jax.Array laid out that way, whatever the layout when saved; a leaf without one as a numpy array. If None, the
        state comes as nested dicts of numpy arrays; a function makes it of these, without their values, and the config.
        part: restore this entry of the state alone (`params`, `ema`); abstract_state and Restored.state are then the
        entry's.

        Each damaged file is logged as an error; then the next older checkpoint is tried (not if `step` is given).
        Returns Restored(step, state, extra, config), or None if no checkpoint was ever completed here.

        Raises:
          CheckpointError: there are checkpoints, all of them damaged; or the one asked for is damaged or missing.
          ValueError: the checkpoint is sound, but its leaves are not those of `abstract_state`.
        """
        self.wait()
        sound = _agree(lambda: self._newest_sound(step))
        if sound is None:
            return None
        if step is None:
            self._step, self._damaged = sound, frozenset(other for other in self._written() if other > sound)
        return _read(self._path(sound), abstract_state, part)

    def _path(self, step):
        return self.directory / f"{step:08d}"

    def _step_paths(self):
        try:
            return [path for path in self.directory.iterdir() if path.name.isdigit()]
        except FileNotFoundError:
            if os.path.islink(self.directory):  # to a disk that is not mounted, and not a run without checkpoints
                raise CheckpointError(
                    f"{self.directory} is a link to {os.readlink(self.directory)}, which is not there. Bring that "
                    "back, or remove the link to begin anew."
                ) from None
            return []

    def _written(self):
        """The steps of what was complete once, oldest first: `steps`, and those that have lost their sums."""
        return sorted(int(path.name) for path in self._step_paths() if (path / SUMS).exists() or not _torn(path))

    def _remove_incomplete(self):
        for path in self._step_paths():
            if (path / SUMS).exists():
                (path / INCOMPLETE).unlink(missing_ok=True)  # the run was killed just after the commit
            elif _torn(path):
                logging.warning("removing %s, which was never completed", path)
                _remove(path)

    def _finish(self, step, texts, barrier):
        """The rest of a save, in the background: waits for orbax, adds our files, commits, removes what is old."""
        path, wait_for_all = self._path(step), ocp.multihost.get_barrier_sync_fn()
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                for name, text in texts.items():
                    (path / name).write_text(text)
                _write_sums(path)
                (path / INCOMPLETE).unlink()
                outdated = [other for other in self.steps() if other not in self._damaged][: -self._keep]
                for other in (*outdated, *self._damaged):
                    _remove(self._path(other))
                self._damaged = frozenset()
            wait_for_all(key=f"{path} {barrier}", timeout_ms=1000 * PATIENCE)
            self._step = step
        except Exception as error:
            if jax.process_index() == 0:
                with contextlib.suppress(OSError):  # a full disk gets its space back now, not at the next save
                    self._remove_incomplete()
            raise CheckpointError(f"checkpoint {path} could not be written: {error}") from error

    def _newest_sound(self, step):
        steps = self._written() if step is None else [step]
        for candidate in reversed(steps):
            damage = find_damage(self._path(candidate))
            if not damage:
                return candidate
            logging.error("checkpoint %s is damaged, passed over:\n  %s", self._path(candidate), "\n  ".join(damage))
        if steps:
            raise CheckpointError(
                f"no sound checkpoint in {self.directory}: steps {steps} are all damaged or missing (the log names "
                "each file). Bring back a copy, or move them away to begin anew."
            )
        return None


def _take(shards, memory) -> int:
    """Copies the shards to the kind of memory, all of them at once, and lets them go: the allocator keeps the room."""
    place = lambda shard: jax.sharding.SingleDeviceSharding(shard.device, memory_kind=memory)
    try:
        copies = jax.block_until_ready([jax.device_put(shard.data, place(shard)) for shard in shards])
    except jax.errors.JaxRuntimeError as error:
        logging.warning("no %s memory is taken for checkpoints ahead of the first: %s", memory, error)
        return 0
    return sum(copy.nbytes for copy in copies)


def load(path, part, abstract_part=None):
    """One entry of a saved state (`params`, `ema`), to sample or to start from: Restored(step, part, extra, config).

    path: a run's directory of checkpoints (its newest sound one is taken), or one checkpoint in it.
    abstract_part: as in `Checkpoints.restore`; None gives numpy arrays. Raises CheckpointError if none is sound.
    """
    path = epath.Path(path)
    single = (path / SUMS).exists()
    with Checkpoints(path.parent if single else path) as checkpoints:
        restored = checkpoints.restore(abstract_part, int(path.name) if single else None, part)
    if restored is None:
        raise CheckpointError(f"no complete checkpoint in {path}.")
    return restored


def digest(tree):
    """SHA-256, in hex, over the names, dtypes, shapes and bytes of a pytree's leaves, wherever these lie."""
    total = hashlib.sha256()
    for name, leaf in sorted(_named_leaves(tree).items()):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.asarray(leaf)
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def find_damage(path, only=None):
    """What is wrong with a checkpoint's files, by its SHA256SUMS: a list of lines that each name a file.

    only: look at this one file, named as in SHA256SUMS.
    """
    try:
        head, _, body = (path / SUMS).read_bytes().partition(b"\n")
    except OSError as error:
        return [f"{path / SUMS} cannot be read: {error}"]
    if head != _head(body):
        return [f"{path / SUMS} does not match the hash in its own first line"]
    wanted = {name: sha256 for sha256, name in (line.split("  ", 1) for line in body.decode().splitlines())}

    def examine(name):
        if name not in wanted:
            return f"{path / name} is not in {SUMS}"
        try:
            found = _sha256(path / name)
        except OSError as error:
            return f"{path / name} cannot be read: {error}"
        return None if found == wanted[name] else f"{path / name} has SHA-256 {found}, was {wanted[name]}"

    return [line for line in _in_threads(examine, [only] if only else {*_files(path), *wanted}) if line]


def _write_sums(path):
    """Hashes what lies on the disk and commits: from here on the checkpoint is complete."""
    names = sorted(_files(path))
    sums = _in_threads(lambda name: _sha256(path / name), names)
    body = "".join(f"{sha256}  {name}\n" for sha256, name in zip(sums, names, strict=True)).encode()
    partial = path / f"{SUMS}.partial"
    partial.write_bytes(_head(body) + b"\n" + body)
    partial.replace(path / SUMS)


def _head(body):
    return f"# {hashlib.sha256(body).hexdigest()}".encode()  # sha256sum takes the line for a comment


def _files(path, prefix=""):
    """Names, relative to path, of all files at any depth but the sums (epath has no recursive glob)."""
    for child in path.iterdir():
        if child.is_dir():
            yield from _files(child, f"{prefix}{child.name}/")
        elif prefix + child.name not in (SUMS, INCOMPLETE):
            yield prefix + child.name


def _in_threads(function, names):
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing a large block frees the interpreter
        return list(pool.map(function, sorted(names)))


def _sha256(path):
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def _torn(path) -> bool:
    """Of a directory without SHA256SUMS: whether a run was killed while it wrote or removed it."""
    return (path / INCOMPLETE).exists() or not any(path.iterdir())


def _remove(path):
    if path.exists():
        with contextlib.suppress(OSError):  # the disk is full
            (path / INCOMPLETE).touch()
        (path / SUMS).unlink(missing_ok=True)
        for child in path.iterdir():
            if child.name != INCOMPLETE:
                child.rmtree() if child.is_dir() else child.unlink()
        path.rmtree()


def _agree(find_step):
    """find_step() of the first process, on all of them; None and CheckpointError too."""
    if jax.process_count() == 1:
        return find_step()
    none, bad = -1, -2
    answer, reason = bad, CheckpointError("the first process found no sound checkpoint: see its log.")
    if jax.process_index() == 0:
        try:
            answer = find_step()
        except CheckpointError as error:
            reason = error
    answer = int(multihost_utils.broadcast_one_to_all(np.int32(none if answer is None else answer)))
    if answer == bad:
        raise reason
    return None if answer == none else answer


def _read(path, abstract, part):
    extra, config = (json.loads((path / name).read_text()) for name in ("extra.json", "config.json"))
    with ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(path / "state").item_metadata.tree
        if part is not None and part not in saved:
            raise ValueError(f"{part!r} is not in checkpoint {path}, which has {sorted(saved)}.")
        saved = jax.tree.map(_host_leaf, saved if part is None else saved[part])
        if callable(abstract):
            abstract = abstract(saved, config)
        abstract = saved if abstract is None else abstract
        if part is not None:
            saved, abstract = {part: saved}, {part: abstract}
        _require_same_leaves(path, saved, abstract)
        args = ocp.args.PyTreeRestore(abstract, jax.tree.map(_restore_args, abstract), partial_restore=part is not None)
        state = reader.restore(path / "state", args=args)
    return Restored(int(path.name), state if part is None else state[part], extra, config)


def _host_leaf(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # without the sharding it was saved with


def _restore_args(leaf):
    if getattr(leaf, "sharding", None) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape)


def _named_leaves(tree):
    """{name: leaf}; a dict's key and a dataclass's field of the same name are named alike."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def _require_plain_arrays(state):
    for name, leaf in _named_leaves(state).items():
        plain = isinstance(leaf, (jax.Array, np.ndarray, np.generic))
        if not plain or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(
                f"{name} is no plain array: {leaf!r}. Use np.asarray (numbers), jax.random.key_data (keys)."
            )


def _require_same_leaves(path, saved, abstract):
    def describe(tree):
        return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named_leaves(tree).items()}

    saved, wanted = describe(saved), describe(abstract)
    lines = [
        f"{name}: {saved.get(name, 'nothing')} saved, {wanted.get(name, 'nothing')} wanted"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if lines:
        raise ValueError(
            f"checkpoint {path} holds another state ({len(lines)} leaves differ):\n  "
            + "\n  ".join(lines[:8])
            + "\nUse the config that it was saved with: its config.json."
        )
