"""The loader: a source's clips in shuffled order, packed in rows and yielded as Batches of numpy arrays.

V virtual shards (data.shards) divide the rows of the global batch; processes divide the shards. Shard v sees every V-th
clip of one global order, and has a buffer of waiting clips and a state of its own. So neither the number of processes
nor that of workers changes what a row holds, and the states of all V shards are all that a checkpoint needs.

B rows in this process's batch, N patches per row, S text tokens per row, G groups per row; s text tokens of a clip.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from multiprocessing import shared_memory

import grain
import jax
import numpy as np
from absl import flags, logging
from etils import epath
from jax.experimental import multihost_utils

from dit_video import watchdog
from dit_video.codecs import Pixels, check_frames, to_float
from dit_video.data.clips import ClipsSource
from dit_video.data.decode import MediaError
from dit_video.data.shapes import ShapesSource
from dit_video.flow import first_late_step
from dit_video.patches import Batch, Clip, Piece, choose, lay_out, leave_out, pack, visible

AHEAD = 2  # batches that a thread or worker holds ready
LONGEST_SAVE = 120  # seconds that a worker goes on after SIGTERM
LOW_PRIORITY = 10  # niceness of the loader's threads
VALIDATION_SEED = 2**31 - 1  # draws validation's clips and their order, whatever the run's seed
HELD_OUT = 20  # one file in so many of a folder is for validation
DROPPED = 0x64726F70  # the stream that what is left out is drawn from
LAG = 60  # seconds after which a file system must show what another host has written
FIRST_CLIPS = 256  # of the order, which processes compare
EMPTY_ROWS = 20  # rows one after the other without a readable clip, before the run stops


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that decides what the rows hold. Worker processes get a pickle of it.

    indices: the source's clips that an epoch goes through; rows: of one shard. drop: least and most share of a clip's
    patches that is left out, in a shard's first `dropping` rows. late_source: where clips come from once a shard has
    made `late_from` rows; None: from `source` always. shared: whether other processes read the same rows.
    """

    source: ShapesSource | ClipsSource
    indices: range | tuple[int, ...]
    tokenise: Callable[[str], np.ndarray]
    codec: Pixels
    patch: tuple[int, int, int]
    group_by: str
    seed: int
    shards: int
    rows: int
    limits: tuple[int, int, int]  # N, S, G
    longest: int  # patches of one clip
    waiting: int
    drop: tuple[float, float] = (0.0, 0.0)
    dropping: int = 0
    late_source: ShapesSource | None = None
    late_from: int = 0
    shared: bool = False

    def is_late(self, row: int) -> bool:
        """Whether what is read for a shard's row of this number comes from the late source."""
        return self.late_source is not None and row >= self.late_from

    @functools.cached_property
    def order(self) -> grain.MapDataset:
        """Indices of clips, epoch after epoch, each epoch in an order of its own."""
        # grain shuffles epoch e by seed + e: hashed, so that one seed's first epoch is not another's second.
        seed = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
        return grain.MapDataset.source(self.indices).shuffle(seed=seed).repeat()


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A clip that waits for its row. place: in its shard's order; size: patches, text tokens and groups.

    visible_k: which patches are not left out, and visible_size: it with these alone, while patches are left out.
    source: what it is read from.
    """

    place: int
    index: int
    epoch: int
    ids_sxK: np.ndarray
    size: tuple[int, int, int]
    visible_k: np.ndarray
    visible_size: tuple[int, int, int]
    source: ShapesSource | ClipsSource


def make_source(config, split: str = "train", cache=None, scanned: bool = False):
    """The clips that `config.data` asks for; those of 'validation' are the same whatever the seed.

    cache: a path where a folder's scan is kept, so that it is decoded whole only once. scanned: another process has
    just been through the folder, and its cache is taken as it is.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split={split!r} is not known. Allowed: 'train', 'validation'.")
    data, seed = config.data, seed_of(config, split)
    if data.kind == "shapes":
        return ShapesSource(seed, split, data.pair_share, data.still_share, data.large)
    if data.kind == "clips":
        if not data.root:
            raise ValueError("data.kind='clips' needs data.root, a folder of videos and images.")
        (st, sy, sx), (_, py, px) = config.codec.stride, config.model.patch
        return ClipsSource(
            data.root,
            max_tokens=min(data.max_tokens, data.length),
            seed=seed,
            patch=(sy * py, sx * px),
            time_stride=st,
            min_side=data.min_side,
            max_side=data.max_side,
            fps=tuple(data.fps) or None,
            max_frames=data.max_frames,
            cache=cache,
            name=f"clips/{split}",
            scanned=scanned,
        )
    raise ValueError(f"data.kind={data.kind!r} is not known. Allowed: 'shapes', 'clips'.")


def make_source_together(config, split: str, cache):
    """`make_source` in all of a run's processes, each of which calls it: the first scans a folder, for all.

    Raises ValueError where another does not get to see the cache that the first has written.
    """
    if not jax.distributed.is_initialized() or config.data.kind != "clips" or cache is None:
        return make_source(config, split, cache)
    cache, first = epath.Path(cache), jax.process_index() == 0
    with watchdog.phase("scan", times=1 if first else math.inf), futures.ThreadPoolExecutor(1) as pool:
        jobs = [pool.submit(make_source, config, split, cache)] if first else []
        # All ask again and again: a scan may take hours, and collectives of some backends wait for minutes at most.
        while not multihost_utils.process_allgather(np.int32(bool(jobs and futures.wait(jobs, 5).done))).any():
            pass
    if first:
        source = jobs[0].result()
        multihost_utils.process_allgather(_digest(cache.read_bytes()))
        return source
    wanted = multihost_utils.process_allgather(_digest(b""))[0]
    deadline = time.monotonic() + LAG
    while not cache.exists() or (_digest(cache.read_bytes()) != wanted).any():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{cache} is not what process 0 wrote there, but process {jax.process_index()} must read it. Give all "
                "processes one workdir, on a disk that all can see."
            )
        time.sleep(1)
    return make_source(config, split, cache, scanned=True)


def require_same_clips(plan: Plan) -> None:
    """Raises ValueError, and names them, where processes have other clips, captions or another order than the first."""
    if not jax.distributed.is_initialized():
        return
    clips, root = getattr(plan.source, "media", []), getattr(plan.source, "root", "")
    described = [[m.path.removeprefix(root), m.height, m.width, len(m.stamps), caption] for m, caption in clips]
    described += [plan.order[i] for i in range(FIRST_CLIPS)]
    found = multihost_utils.process_allgather(_digest(json.dumps(described).encode()))
    others = [str(i) for i, digest in enumerate(found) if (digest != found[0]).any()]
    if others:
        raise ValueError(
            f"process {', '.join(others)} would read other clips or captions than process 0 ({len(clips)} clips here, "
            f"in process {jax.process_index()}), or in another order. Give all the same flags, files and packages."
        )


def _digest(content: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), np.uint32)


def make_loader(config, tokenise, codec, split="train", process_index=0, process_count=1, cache=None) -> "Loader":
    """An endless iterator over one process's Batches; those of all processes, in order, are the global batch.

    tokenise: caption -> ids_sxK. cache: see `make_source`. split: 'train', or 'validation', whose order is the same
    for all seeds, and whose clips are whole. Raises ValueError where rows, shards, processes and workers do not divide,
    where data.drop or data.whole are no shares, a clip fits no row, or a run's processes would read other clips.
    """
    data = config.data
    for name, whole, by, part in (
        ("data.rows", data.rows, "data.shards", data.shards),
        ("data.shards", data.shards, "the number of processes", process_count),
    ):
        if whole % part:
            raise ValueError(f"{name}={whole} must be a multiple of {by}={part}. Nearest: {-(-whole // part) * part}.")
    low, high = data.drop
    if not 0 <= low <= high < 1:
        raise ValueError(
            f"data.drop={tuple(data.drop)}: give the least and the most share, in order, from 0 to below 1."
        )
    if not 0 <= data.whole <= 1:
        raise ValueError(f"data.whole={data.whole} is a share: give 0 to 1.")
    steps = config.steps - int(data.whole * config.steps) if high and split == "train" else 0
    source = make_source_together(config, split, cache)
    plan = Plan(
        source=source,
        indices=split_indices(source, split),
        tokenise=tokenise,
        codec=codec,
        patch=tuple(config.model.patch),
        group_by=data.group_by,
        seed=seed_of(config, split),
        shards=data.shards,
        rows=data.rows // data.shards,
        limits=(data.length, data.text_length, data.groups),
        longest=data.max_tokens,
        waiting=data.waiting,
        drop=(low, high),
        dropping=steps * (data.rows // data.shards),
        shared=process_count < jax.process_count(),
        late_from=first_late_step(config) * (data.rows // data.shards),
    )
    if data.kind == "shapes" and split == "train" and config.late:
        share = data.pair_share if data.late_pair_share < 0 else data.late_pair_share
        plan = dataclasses.replace(plan, late_source=dataclasses.replace(source, pair_share=share))
    require_same_clips(plan)
    own = data.shards // process_count
    return Loader(plan, range(process_index * own, (process_index + 1) * own), data.workers)


def seed_of(config, split: str) -> int:
    """What a split's clips and their order are drawn from."""
    return config.seed if split == "train" else VALIDATION_SEED


def split_indices(source, split: str) -> range | tuple[int, ...]:
    """The source's clips that are in a split.

    Of a folder, every `HELD_OUT`-th file is for validation; a folder of fewer than five such shows validation the
    same files through other windows.
    """
    everything = range(len(source))
    if isinstance(source, ShapesSource) or len(source) < 5 * HELD_OUT:
        return everything
    held_out = everything[::HELD_OUT]
    return held_out if split == "validation" else tuple(i for i in everything if i % HELD_OUT)


def fill(batch: Batch) -> dict[str, float]:
    """How much of a batch is real: counts of clips, patches and text tokens, and the shares of their places."""
    seg_BxN, prompt_BxS = np.asarray(batch.patches.seg_BxN), np.asarray(batch.prompt_BxS)
    patches, text = np.count_nonzero(seg_BxN), np.count_nonzero(prompt_BxS)
    return {
        "clips": int(seg_BxN.max(1).sum()),
        "patches": int(patches),
        "text": int(text),
        "patch_fill": patches / seg_BxN.size,
        "text_fill": text / prompt_BxS.size,
    }


class Loader:
    """Yields Batches, with `AHEAD` of them made in the background. The state is that of what was yielded."""

    def __init__(self, plan: Plan, shards: Sequence[int], workers: int = 0):
        if workers > len(shards):
            raise ValueError(
                f"data.workers={workers} is more than the {len(shards)} shards of this process. "
                f"Choose at most {len(shards)}, or more data.shards."
            )
        self._plan, self._shards, self._workers = plan, tuple(shards), workers
        self._states = {str(v): {"place": 0, "waiting": [], "skipped": 0, "row": 0, "late": None} for v in shards}
        self._parts = []  # (shards, iterator)
        self._memory = f"dv{secrets.token_hex(2)}_"  # what its workers' shared memory is named after
        # Clips that fit nowhere are found now, not hours later, as far as the start of the order can tell.
        for v in shards:
            for place in range(plan.waiting):
                wait(plan, v, place)

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        if not self._parts:
            self._parts = self._start()
        batches, states = [], {}
        for shards, part in self._parts:
            with watchdog.phase(f"batch, shards {', '.join(shards)}", times=1):
                batch, after = next(part)
            batches.append(batch)
            states |= after
        self._states = states
        return batches[0] if len(batches) == 1 else jax.tree.map(lambda *x: np.concatenate(x), *batches)

    def _start(self):
        if self._workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain asks absl for its flags, which only a main under absl.app has parsed
        count = self._workers or len(self._shards)
        parts = []
        for i in range(count):
            own = self._shards[i * len(self._shards) // count : (i + 1) * len(self._shards) // count]
            rows = Rows(self._plan, {v: self._states[v] for v in map(str, own)})
            if self._workers:
                options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=AHEAD)
                part = iter(rows.mp_prefetch(options, functools.partial(_start_worker, self._memory)))
            else:
                part = iter(grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=AHEAD))
            parts.append((tuple(map(str, own)), part))
        for _, part in parts:
            part.start_prefetch()
        return parts

    @property
    def report(self) -> list[dict]:
        """What the scan of a folder said of every file in it; empty for drawn clips."""
        return getattr(self._plan.source, "report", [])

    @property
    def skipped(self) -> int:
        """How many clips of this process's shards could not be read so far."""
        return sum(state["skipped"] for state in self._states.values())

    def get_state(self) -> dict[str, dict]:
        """{shard: state} of this process's shards after the last Batch, fit for JSON."""
        return self._states

    def set_state(self, states: dict[str, dict]) -> None:
        """Goes on where `states`, those of the shards of all processes, were taken: bit for bit the same Batches."""
        if set(states) != set(map(str, range(self._plan.shards))):
            raise ValueError(
                f"the loader's state holds shards {sorted(states, key=int)}; this run has data.shards="
                f"{self._plan.shards}. Give the states of all shards, from a run with as many."
            )
        self.close()
        self._states = {str(v): states[str(v)] for v in self._shards}

    def close(self) -> None:
        """Ends the threads and worker processes."""
        for _, part in self._parts:
            part.close()
        self._parts = []
        _free_memory(self._memory)


def _start_worker(prefix: str, index: int, count: int) -> None:
    """Runs first in a worker process: it stays as long as the run does, and no longer.

    What stops a run often reaches all of its processes (Ctrl-C; SLURM's signals): the run needs its workers up to the
    step that it saves. A run that is killed can end none of them: each sees that by itself.
    """
    # There is no public way to name shared memory (Python 3.11 to 3.13 have this one); without, names are what they
    # are. By the prefix is found what a worker leaves that is killed between making and passing on.
    if hasattr(shared_memory, "_SHM_NAME_PREFIX"):
        shared_memory._SHM_NAME_PREFIX = f"/{prefix}"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _daemon(_leave, LONGEST_SAVE, prefix))
    # A few seconds later all that is made ahead has been made, and no more comes to be while it is removed.
    _daemon(lambda: (multiprocessing.parent_process().join(), _leave(3, prefix)))


def _daemon(function: Callable, *given) -> None:
    threading.Thread(target=function, args=given, daemon=True).start()


def _leave(after: float, prefix: str) -> None:
    """Ends a worker, and its run's shared memory where the run is no more."""
    time.sleep(after)
    if not multiprocessing.parent_process().is_alive():
        _free_memory(prefix, ending=True)
    os._exit(1)


def _free_memory(prefix: str, ending: bool = False) -> None:
    """Removes what ended workers have left in shared memory, but for what this process, unless it ends, still reads."""
    if left := [*pathlib.Path("/dev/shm").glob(f"{prefix}*")]:
        read = "" if ending else pathlib.Path("/proc/self/maps").read_text()
        for path in left:
            if path.name in read:
                continue
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                try:
                    memory = shared_memory.SharedMemory(path.name)
                except ValueError:  # killed before it had a size
                    path.unlink()
                else:
                    memory.close()
                    memory.unlink()


class Rows(grain.IterDataset):
    """Endless (Batch, {shard: state after it}) of some shards. The state travels with the Batch, however far ahead."""

    def __init__(self, plan: Plan, states: dict[str, dict]):
        super().__init__()
        self._plan, self._states = plan, states

    def __iter__(self):
        return RowsIterator(self._plan, self._states)


class RowsIterator(grain.DatasetIterator):
    def __init__(self, plan: Plan, states: dict[str, dict]):
        super().__init__()
        self._plan = plan
        self.set_state(states)

    def __next__(self):
        _give_way()
        rows = [next_row(self._plan, shard) for shard in self._shards for _ in range(self._plan.rows)]
        N, S, G = self._plan.limits
        return pack(rows, N, G, S)[0], self.get_state()

    def get_state(self):
        return {
            str(s.number): {
                "place": s.place,
                "waiting": [w.place for w in s.waiting],
                "skipped": s.skipped,
                "row": s.row,
                "late": s.late,
            }
            for s in self._shards
        }

    def set_state(self, states):
        self._shards = [self._shard(int(v), state) for v, state in states.items()]

    def _shard(self, number: int, state: dict) -> "Shard":
        # A state from before rows were counted is of a run where the count is not read: it leaves nothing out.
        row, late = state.get("row", 0), state.get("late")
        if not self._plan.is_late(row):  # the run is to be longer now, and has not come to its late steps yet
            late = None
        waiting = [wait(self._plan, number, p, late is not None and p >= late) for p in state["waiting"]]
        return Shard(number, state["place"], waiting, state["skipped"], row, late)


def _give_way():
    """Lets the step's threads go first where they share the processor with this one, which works ahead (Linux)."""
    if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)


@dataclasses.dataclass
class Shard:
    """Where a shard stands.

    place: the next of its order; waiting: the clips before it that are in no row yet; row: how many rows it has made.
    late: the first place whose clip is of the late source; None: there is none yet.
    """

    number: int
    place: int
    waiting: list[Waiting]
    skipped: int
    row: int = 0
    late: int | None = None


def wait(plan: Plan, shard: int, place: int, late: bool = False) -> Waiting:
    """The clip at a place of a shard's order, and its size. Raises ValueError if it fits no row."""
    number = place * plan.shards + shard
    index, epoch = plan.order[number], number // len(plan.indices)
    source = plan.late_source if late else plan.source
    frames, height, width, caption = layout(source, index, epoch)
    ids_sxK, (N, S, G) = plan.tokenise(caption), plan.limits
    st, sy, sx = plan.codec.stride
    pt, py, px = plan.patch
    try:
        check_frames(frames, st)
        for name, length, step in (("height", height, sy * py), ("width", width, sx * px)):
            if length % step:
                nearest = " or ".join(str(n * step) for n in (length // step, length // step + 1) if n)
                raise ValueError(f"{name}={length} is no multiple of a patch's {step} pixels. Nearest: {nearest}.")
        T = 1 + (frames - 1) // st
        if T % pt:
            raise ValueError(f"its {T} latent frames are no multiple of a patch's {pt} (model.patch).")
        n, g = (T // pt) * (height // (sy * py)) * (width // (sx * px)), T // pt if plan.group_by == "frame" else 1
        for name, count, limit, key in (
            ("patches", n, min(N, plan.longest), "data.length and data.max_tokens"),
            ("groups", g, G, "data.groups"),
        ):
            if count > limit:
                raise ValueError(f"{count} {name}, and a row takes at most {limit}. Raise {key}, or make it smaller.")
    except ValueError as error:
        what = f"clip {index} ({width}x{height}, {frames} frames, {caption!r})"
        raise ValueError(f"{what} fits no row: {error}") from error
    ids_size = min(len(ids_sxK), S)
    visible_k = draw_visible(plan, index, epoch, n)
    size, visible_size = (n, ids_size, g), (len(visible_k), ids_size, g)
    return Waiting(place, index, epoch, ids_sxK, size, visible_k, visible_size, source)


def take(plan: Plan, shard: Shard) -> list[Waiting]:
    """The clips of a shard's next row; moves the shard on."""
    if shard.late is None and plan.is_late(shard.row):
        shard.late = shard.place
    while len(shard.waiting) < plan.waiting:
        shard.waiting.append(wait(plan, shard.number, shard.place, shard.late is not None))
        shard.place += 1
    sizes = [w.visible_size if shard.row < plan.dropping else w.size for w in shard.waiting]
    chosen = choose(sizes, plan.limits)
    row = [shard.waiting[i] for i in chosen]
    left = set(range(len(shard.waiting))) - set(chosen)
    shard.waiting = [shard.waiting[i] for i in sorted(left)]
    return row


def next_row(plan: Plan, shard: Shard) -> list[Piece]:
    """The pieces of a shard's next row; a clip that cannot be read leaves its places empty."""
    for _ in range(EMPTY_ROWS):
        pieces = [read(plan, waiting, shard.row < plan.dropping) for waiting in take(plan, shard)]
        row = [piece for piece in pieces if piece is not None]
        shard.skipped += len(pieces) - len(row)
        if row:
            shard.row += 1
            return row
    raise ValueError(
        f"no clip of {EMPTY_ROWS} rows could be read; shard {shard.number} left out {shard.skipped} so far."
    )


def read(plan: Plan, waiting: Waiting, dropping: bool) -> Piece | None:
    """The clip as a Piece, some patches left out while `dropping`; None, with a warning, where it cannot be read.

    Where rows are `plan.shared` that raises ValueError: without the clip the row would be another than the others have.
    """
    try:
        clip = clip_of(waiting.source, waiting.index, waiting.epoch)
    except MediaError as error:
        if plan.shared:
            raise ValueError(
                f"clip {waiting.index} cannot be read, and several processes read its row, which must be one for all: "
                f"{error}. Where it is not for this host alone, take the file out, or give a mesh that cuts no row."
            ) from error
        logging.warning("clip %d is left out: %s", waiting.index, error)
        return None
    ids_sxK, S = waiting.ids_sxK, plan.limits[1]
    if len(ids_sxK) > S:
        text = "the %d text tokens of clip %d are cut to data.text_length=%d: %r"
        logging.warning(text, len(ids_sxK), waiting.index, S, clip.caption)
    st, *stride_yx = plan.codec.stride
    latents_TxYxXxC = plan.codec.encode(to_float(clip.video_TxYxXx3))
    # The last frame that a latent frame covers gives its time.
    piece, _ = lay_out(latents_TxYxXxC, clip.time_T[::st], plan.patch, stride_yx, ids_sxK[:S], clip.uid, plan.group_by)
    return leave_out(piece, waiting.visible_k) if dropping else piece


def draw_visible(plan: Plan, index: int, epoch: int, patches: int) -> np.ndarray:
    """Which patches of a clip stay while some are left out, by (seed, epoch, index): ascending indices."""
    low, high = plan.drop
    if not high:
        return np.arange(patches)
    rng = np.random.default_rng((plan.seed, epoch, index, DROPPED))
    rate = low + (high - low) * rng.random()
    return visible(rng.random(patches), rate)


def layout(source, index: int, epoch: int) -> tuple[int, int, int, str]:
    """Frames, height, width and caption of a clip, without reading it."""
    if isinstance(source, ShapesSource):
        return source.layout(index)  # without epochs: nobody sees its two thousand million clips twice
    found = source.layout(index, epoch)
    return found.frames, found.height, found.width, found.caption


def clip_of(source, index: int, epoch: int) -> Clip:
    """A clip. Raises MediaError where it cannot be read."""
    return source[index] if isinstance(source, ShapesSource) else source.clip(index, epoch)
