"""The loader: full rows, every clip once an epoch, the same order on any number of processes, exact resuming."""

import collections
import dataclasses
import gc
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory

import jax
import numpy as np
import pytest
from test_processes import ended, printed, start

from configs import base, clips, shapes
from dit_video.codecs import make_codec, to_float
from dit_video.data.clips import ClipsSource
from dit_video.data.decode import MediaError
from dit_video.data.loader import (
    LOW_PRIORITY,
    Loader,
    Plan,
    Shard,
    fill,
    make_loader,
    make_source,
    read,
    split_indices,
    take,
    wait,
)
from dit_video.gallery import write_mp4, write_png
from dit_video.patches import Clip, Grid, unpack
from dit_video.text import words

CODEC = make_codec(base.get_config().codec)


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A tiny folder of clips whose uid says which clip of which epoch it is. Those in `broken` cannot be read."""

    count: int
    broken: tuple[int, ...] = ()

    def __len__(self):
        return self.count

    def layout(self, index, epoch):
        rng = np.random.default_rng((index, epoch))
        T, Y, X = 1 + 4 * rng.integers(4), *(8 * rng.integers(1, 5, 2))
        return Layout(int(T), int(Y), int(X), "word " * int(rng.integers(12)))

    def clip(self, index, epoch):
        if index in self.broken:
            raise MediaError(f"clip{index}.mp4", "it is cut off")
        layout = self.layout(index, epoch)
        video_TxYxXx3 = np.full((layout.frames, layout.height, layout.width, 3), index % 256, np.uint8)
        return Clip(video_TxYxXx3, np.arange(layout.frames) / np.float32(8), layout.caption, epoch * self.count + index)


Layout = collections.namedtuple("Layout", "frames height width caption")


def plan(source, **changes):
    defaults = dict(
        source=source,
        indices=range(len(source)),
        tokenise=words.tokenise,
        codec=CODEC,
        patch=(1, 8, 8),
        group_by="frame",
        seed=0,
        shards=2,
        rows=1,
        limits=(256, 128, 64),
        longest=128,
        waiting=16,
    )
    return Plan(**{**defaults, **changes})


def small_config(**data):
    config = base.get_config()
    config.data.update(dict(length=256, text_length=128, waiting=24, **data))
    return config


@pytest.fixture
def open_loader():
    """Builds Loaders and closes them when the test ends."""
    loaders = []

    def build(*args, **kwargs):
        loaders.append(make_loader(*args, **kwargs) if not isinstance(args[0], Plan) else Loader(*args, **kwargs))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def draw(loader, count):
    return [next(loader) for _ in range(count)]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def uids(batch):
    """The clips of a batch, row by row."""
    clip_BxG, seg_BxG = batch.patches.clip_BxG, batch.patches.seg_BxG
    return [int(clip_BxG[b, g]) for b in range(len(seg_BxG)) for g in range(seg_BxG.shape[1]) if starts(seg_BxG[b], g)]


def starts(seg_G, g):
    return seg_G[g] > 0 and (g == 0 or seg_G[g - 1] != seg_G[g])


def planned_fill(plan, rows):
    """Shares of patches and text in the rows to come, without reading a clip."""
    shard = Shard(0, 0, [], 0)
    sizes = [np.sum([w.size for w in take(plan, shard)], 0) for _ in range(rows)]
    return np.mean(sizes, 0) / plan.limits


# What is in the rows


@pytest.mark.parametrize("form", ["long", "quick"])
def test_rows_of_the_shapes_world_are_full(open_loader, form):
    """At least 98% of the patches are real, over 1,000 rows of the config that is shipped; of the text about half."""
    config = shapes.get_config(form)
    loader = open_loader(config, words.tokenise, make_codec(config.codec))
    patches, text, _ = planned_fill(loader._plan, 1000)
    assert patches >= 0.98 and 0.3 < text < 0.6


def test_what_was_planned_is_what_is_packed(open_loader):
    config = small_config(shards=2, rows=4)
    batches = draw(open_loader(config, words.tokenise, CODEC), 4)
    assert np.mean([fill(batch)["patch_fill"] for batch in batches]) > 0.97
    for batch in batches:
        seg_BxN = batch.patches.seg_BxN
        assert fill(batch)["patches"] == sum((row > 0).sum() for row in seg_BxN)
        assert fill(batch)["clips"] == len(uids(batch)) == sum(len(set(row.tolist()) - {0}) for row in seg_BxN)
        assert fill(batch)["text"] == (batch.prompt_BxS > 0).sum()
        # Every clip has a prompt, and no prompt is without its clip.
        assert all(set(p.tolist()) - {0} == set(s.tolist()) - {0} for p, s in zip(batch.prompt_BxS, seg_BxN))


def test_late_steps_have_clips_of_the_late_source(open_loader):
    """Late from row 6 of a shard on: what is read from then on, and only that, has two objects; resumed too."""
    config = small_config(shards=2, rows=4)
    config.steps, config.late, config.data.pair_share, config.data.late_pair_share = 8, 0.625, 0.0, 1.0
    loader = open_loader(config, words.tokenise, CODEC)
    early, late = (dataclasses.replace(make_source(config), pair_share=share) for share in (0.0, 1.0))
    pairs = []
    for step in range(8):
        state = json.loads(json.dumps(loader.get_state()))
        batch = next(loader)
        again = open_loader(config, words.tokenise, CODEC)
        again.set_state(state)
        assert_same([next(again)], [batch])
        seen = set(uids(batch))
        for v, before in state.items():
            read = range(before["place"], loader.get_state()[v]["place"])
            numbers = {place: loader._plan.order[place * 2 + int(v)] for place in [*before["waiting"], *read]}
            for place, index in numbers.items():
                if early[index].uid in seen:  # the name, of the index alone, is the same in both
                    first = loader.get_state()[v]["late"]
                    source = late if first is not None and place >= first else early
                    captions = captions_of(batch, source[index].uid)
                    assert captions == [words.tokenise(source[index].caption).tolist()]
                    pairs.append((step, source is late))
    assert not any(is_late for step, is_late in pairs if step < 3)
    assert np.mean([is_late for step, is_late in pairs if step > 4]) > 0.5
    assert {s["late"] is not None for s in loader.get_state().values()} == {True}


def captions_of(batch, uid):
    """The ids of the prompts of the clips of this name in a batch."""
    found = []
    for b, g in zip(*np.nonzero((batch.patches.clip_BxG == uid) & (batch.patches.seg_BxG > 0))):
        if starts(batch.patches.seg_BxG[b], g):
            found.append(batch.ids_BxSxK[b, batch.prompt_BxS[b] == batch.patches.seg_BxG[b, g]].tolist())
    return found


def test_a_longer_run_is_late_later(open_loader):
    """The state of a run of 4 steps, the last of them late, in one of 400."""
    config = small_config(shards=1, rows=1)
    config.steps, config.late, config.data.pair_share, config.data.late_pair_share = 4, 0.25, 0.0, 1.0
    loader = open_loader(config, words.tokenise, CODEC)
    draw(loader, 4)
    state = loader.get_state()
    assert state["0"]["late"] is not None
    config.steps = 400
    longer = open_loader(config, words.tokenise, CODEC)
    longer.set_state(state)
    draw(longer, 1)
    assert longer.get_state()["0"]["late"] is None


def test_a_packed_clip_is_the_sources_own(open_loader):
    """Out of its row and through the codec comes the video, to the bit, with its caption and its times."""
    config = small_config(shards=1, rows=1)
    source = make_source(config)
    loader = open_loader(config, words.tokenise, CODEC)
    waiting = take(loader._plan, Shard(0, 0, [], 0))
    batch = next(loader)
    offset = 0
    for seg, w in enumerate(waiting, 1):
        clip = source[w.index]
        frames, height, width, _ = clip.video_TxYxXx3.shape
        grid = Grid((1 + (frames - 1) // 4, height // 8, width // 8), (1, 8, 8), 0, offset)
        at = slice(offset, offset + grid.size)
        (latents_TxYxXxC,) = unpack(batch.patches.x_BxNxP, [grid])
        np.testing.assert_array_equal(CODEC.decode(latents_TxYxXxC), to_float(clip.video_TxYxXx3))
        np.testing.assert_array_equal(batch.ids_BxSxK[0, batch.prompt_BxS[0] == seg], words.tokenise(clip.caption))
        assert set(batch.patches.pos_BxNx3[0, at, 0]) == set(clip.time_T[::4])
        offset += grid.size
    assert offset == fill(batch)["patches"]


# The order


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_threads_of_the_loader_give_way(open_loader):
    """What works ahead runs at a lower priority than the thread that asks for batches, whose own stays."""
    priority = lambda: {int(t): os.getpriority(os.PRIO_PROCESS, int(t)) for t in os.listdir("/proc/self/task")}
    before = priority()
    draw(open_loader(small_config(shards=2, rows=4), words.tokenise, CODEC), 1)
    after = priority()
    assert sum(after[t] == LOW_PRIORITY for t in set(after) - set(before)) == 2
    assert after[threading.get_native_id()] == before[threading.get_native_id()] < LOW_PRIORITY


def test_each_epoch_has_every_clip_once_and_a_resumed_run_too(open_loader):
    """Over four epochs; the state goes through JSON in the middle of a row of batches that are made ahead."""
    made, seen = plan(Numbered(101)), []
    loader = open_loader(made, (0, 1))
    for step in range(60):
        seen += uids(next(loader))
        if step in (7, 30):
            state = json.loads(json.dumps(loader.get_state()))
            loader = open_loader(made, (0, 1))
            loader.set_state(state)
    assert len(seen) == len(set(seen)) > 4.5 * 101
    for epoch in range(4):
        assert {uid % 101 for uid in seen if uid // 101 == epoch} == set(range(101))


def test_epochs_and_seeds_have_orders_of_their_own():
    order = plan(Numbered(101)).order
    first, second = [order[i] for i in range(101)], [order[i] for i in range(101, 202)]
    other = plan(Numbered(101), seed=1).order
    assert sorted(first) == sorted(second) == list(range(101))
    third = [other[i] for i in range(101)]
    orders = [first, second, third, sorted(first)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_restored_state_gives_the_same_batches_bit_for_bit(workers, open_loader):
    config = small_config(shards=2, rows=4, workers=workers)
    loader = open_loader(config, words.tokenise, CODEC)
    draw(loader, 3)
    state = json.dumps(loader.get_state())
    ahead = draw(loader, 4)
    again = open_loader(config, words.tokenise, CODEC)
    again.set_state(json.loads(state))
    assert_same(draw(again, 4), ahead)
    loader.set_state(json.loads(state))  # and in the same loader, its threads running
    assert_same(draw(loader, 2), ahead[:2])
    assert len(state) < 4000


def test_processes_split_the_rows_and_change_nothing(open_loader):
    config = small_config(shards=4, rows=8)
    whole = open_loader(config, words.tokenise, CODEC)
    parts = [open_loader(config, words.tokenise, CODEC, process_index=i, process_count=2) for i in range(2)]
    for _ in range(3):
        assert_same(next(whole), jax.tree.map(lambda *x: np.concatenate(x), *[next(part) for part in parts]))
    # The states of two processes are the state of one, and of four.
    state = {v: s for part in parts for v, s in part.get_state().items()}
    assert state == whole.get_state()
    quarters = [open_loader(config, words.tokenise, CODEC, process_index=i, process_count=4) for i in range(4)]
    for quarter in quarters:
        quarter.set_state(state)
    assert_same(next(whole), jax.tree.map(lambda *x: np.concatenate(x), *[next(quarter) for quarter in quarters]))


def test_validation_is_held_out_and_the_same_for_all_seeds(open_loader):
    config = small_config(shards=2, rows=2)
    train = draw(open_loader(config, words.tokenise, CODEC), 3)
    validation = draw(open_loader(config, words.tokenise, CODEC, split="validation"), 3)
    config.seed = 7
    assert_same(draw(open_loader(config, words.tokenise, CODEC, split="validation"), 3), validation)
    other = draw(open_loader(config, words.tokenise, CODEC), 3)
    seen = [{uid for batch in batches for uid in uids(batch)} for batches in (train, validation, other)]
    assert not seen[0] & seen[1] and not seen[2] & seen[1] and not seen[0] & seen[2]


def test_files_are_held_out_where_there_are_enough():
    train, validation = (split_indices(Numbered(200), split) for split in ("train", "validation"))
    assert sorted([*train, *validation]) == list(range(200)) and len(validation) == 10
    assert split_indices(Numbered(30), "train") == split_indices(Numbered(30), "validation") == range(30)


# Clips that do not fit or cannot be read


def test_clips_that_cannot_be_read_are_left_out_and_counted(open_loader):
    broken = tuple(range(0, 101, 5))
    made, sound = plan(Numbered(101, broken)), plan(Numbered(101))
    loader, whole = open_loader(made, (0, 1)), open_loader(sound, (0, 1))
    for _ in range(12):
        left, all_of_them = uids(next(loader)), uids(next(whole))
        assert left == [uid for uid in all_of_them if uid % 101 not in broken]
    assert whole.skipped == 0
    shards = loader.get_state()
    taken = [
        made.order[2 * p + v]
        for v in range(2)
        for p in set(range(shards[str(v)]["place"])) - {*shards[str(v)]["waiting"]}
    ]
    assert loader.skipped == sum(index in broken for index in taken) > 0


def test_a_folder_of_nothing_but_broken_clips_stops_the_run(open_loader):
    loader = open_loader(plan(Numbered(30, tuple(range(30)))), (0, 1))
    with pytest.raises(ValueError, match="no clip of 20 rows could be read"):
        next(loader)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(longest=3), r"clip \d+ \(.*\) fits no row: \d+ patches, and a row takes at most 3\."),
        (dict(limits=(2, 128, 64)), r"clip \d+ \(.*\) fits no row: \d+ patches, and a row takes at most 2\."),
        (dict(limits=(256, 128, 2)), r"fits no row: [34] groups, and a row takes at most 2\. Raise data\.groups"),
        (dict(patch=(1, 16, 8)), r"fits no row: height=\d+ is no multiple of a patch's 16 pixels\. Nearest: \d+"),
        (dict(patch=(2, 8, 8)), r"fits no row: its [13] latent frames are no multiple of a patch's 2"),
    ],
)
def test_a_clip_that_fits_no_row_is_refused_before_the_first_batch(changes, message):
    with pytest.raises(ValueError, match=message):
        Loader(plan(Numbered(50), **changes), (0, 1))


def test_captions_longer_than_a_row_are_cut_with_a_warning(open_loader, caplog):
    loader = open_loader(plan(Numbered(50), limits=(256, 6, 64)), (0, 1))
    batches = draw(loader, 3)
    assert all(0 < (batch.prompt_BxS > 0).sum(1).max() <= 6 for batch in batches)
    assert "cut to data.text_length=6: 'word word" in caplog.text


@pytest.mark.parametrize(
    ("data", "processes", "message"),
    [
        (dict(rows=6, shards=4), 1, "data.rows=6 must be a multiple of data.shards=4. Nearest: 8"),
        (dict(rows=4, shards=4), 3, "data.shards=4 must be a multiple of the number of processes=3. Nearest: 6"),
        (dict(rows=4, shards=4, workers=5), 1, "data.workers=5 is more than the 4 shards"),
        (dict(kind="clips"), 1, "data.kind='clips' needs data.root, a folder of videos and images"),
        (dict(kind="shape"), 1, "data.kind='shape' is not known. Allowed: 'shapes', 'clips'"),
    ],
)
def test_what_does_not_divide_is_refused(data, processes, message):
    with pytest.raises(ValueError, match=message):
        make_loader(small_config(**data), words.tokenise, CODEC, process_count=processes)


def test_the_state_of_another_number_of_shards_is_refused(open_loader):
    state = open_loader(plan(Numbered(50)), (0, 1)).get_state()
    with pytest.raises(ValueError, match=r"holds shards \['0', '1'\]; this run has data.shards=4"):
        open_loader(plan(Numbered(50), shards=4), (0, 1)).set_state(state)


# Workers


def test_workers_yield_the_same_and_never_initialise_a_jax_backend(open_loader, monkeypatch):
    """With a platform that does not exist, the first touch of a backend in a worker would be an error."""
    config = small_config(shards=2, rows=2)
    expected = draw(open_loader(config, words.tokenise, CODEC), 3)
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    config.data.workers = 2
    loader = open_loader(config, words.tokenise, CODEC)
    assert_same(draw(loader, 3), expected)
    assert set(loader.get_state()) == {"0", "1"}
    # Workers' memory is known by its name: what one leaves that is killed goes too, with or without a size.
    memory = lambda: list(pathlib.Path("/dev/shm").glob(f"{loader._memory}*"))
    assert memory()
    left = shared_memory.SharedMemory(f"{loader._memory}left", create=True, size=8)
    left.close()
    pathlib.Path(f"/dev/shm/{loader._memory}empty").touch()
    loader.close()
    assert not memory()


def tokenise_on_a_device(caption):
    return np.asarray(jax.numpy.ones((1, 4), int))


def test_a_worker_that_touches_jax_would_be_noticed(open_loader, monkeypatch):
    """The test above means something only if this fails."""
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    loader = open_loader(small_config(shards=1, rows=1, workers=1), tokenise_on_a_device, CODEC)
    with pytest.raises(RuntimeError, match="no_such_platform"):
        next(loader)


def test_a_worker_that_is_killed_is_told_and_leaves_nothing(open_loader):
    loader = open_loader(small_config(shards=1, rows=1, workers=1), words.tokenise, CODEC)
    next(loader)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(RuntimeError, match="terminated unexpectedly with exit code -9"):
        for _ in range(20):  # what it had made before may come first
            next(loader)
    loader.close()
    gc.collect()  # of what was read some hangs on the error
    deadline = time.monotonic() + 10  # and is removed by a thread
    while (left := list(pathlib.Path("/dev/shm").glob(f"{loader._memory}*"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_signals_that_stop_a_run_leave_its_workers(open_loader):
    """They reach a whole group of processes at once, and the run goes on to the step that it saves."""
    config = small_config(shards=1, rows=1)
    expected = draw(open_loader(config, words.tokenise, CODEC), 8)
    config.data.workers = 1
    loader = open_loader(config, words.tokenise, CODEC)
    found = draw(loader, 1)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert_same(found + draw(loader, 7), expected)
    assert worker.is_alive()


OPEN_AND_WAIT = """
import multiprocessing, time
from configs import shapes
from dit_video.codecs import make_codec
from dit_video.data.loader import make_loader
from dit_video.text import words
config = shapes.get_config("quick")
config.data.rows = config.data.shards = config.data.workers = 2
loader = make_loader(config, words.tokenise, make_codec(config.codec), "train", 0, 1)
next(loader)
print(loader._memory, *[worker.pid for worker in multiprocessing.active_children()], flush=True)
time.sleep(600)
"""


def test_workers_go_with_a_run_that_is_killed():
    """And leave no shared memory."""
    root = pathlib.Path(__file__).resolve().parent.parent
    run = subprocess.Popen([sys.executable, "-c", OPEN_AND_WAIT], cwd=root, stdout=subprocess.PIPE, text=True)
    memory, *workers = run.stdout.readline().split()
    assert len(workers) == 2 and any(pathlib.Path("/dev/shm").glob(f"{memory}*"))
    run.kill()
    run.wait()
    left = lambda: [*pathlib.Path("/dev/shm").glob(f"{memory}*"), *(pid for pid in workers if alive(pid))]
    deadline = time.monotonic() + 30
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left()


def alive(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# A folder of real clips


def open_clips(root):
    return ClipsSource(root, max_tokens=128, min_side=16, max_side=64, fps=(8.0, 12.0), max_frames=13)


@pytest.fixture(scope="module")
def few_clips(shared, tmp_path_factory):
    """The small files among the shared clips, which are soon scanned."""
    root = tmp_path_factory.mktemp("clips")
    lines = (shared / "clips" / "manifest.jsonl").read_text().splitlines()
    small = [line for line in lines if json.loads(line)["bytes"] < 60_000]
    (root / "manifest.jsonl").write_text("\n".join(small))
    for line in small:
        file = json.loads(line)["file"]
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).symlink_to(shared / "clips" / file)
    return open_clips(str(root))


def test_real_clips_load_and_resume(few_clips, open_loader):
    made = plan(few_clips)
    loader = open_loader(made, (0, 1))
    next(loader)
    state, ahead = json.loads(json.dumps(loader.get_state())), next(loader)
    again = open_loader(made, (0, 1))
    again.set_state(state)
    assert_same(next(again), ahead)
    assert fill(ahead)["patch_fill"] > 0.9


def test_a_small_folder_shows_validation_other_windows(few_clips):
    config = base.get_config()
    config.data.update(dict(kind="clips", root=os.path.dirname(few_clips.media[0][0].path).rsplit("/", 1)[0]))
    train, validation = (make_source(config, split) for split in ("train", "validation"))
    layouts = [[source.layout(i, 0) for i in range(len(source))] for source in (train, validation)]
    assert not {clip.uid for clip in layouts[0]} & {clip.uid for clip in layouts[1]}
    windows = [[(clip.start_s, clip.frames, clip.height) for clip in found if clip.frames > 1] for found in layouts]
    assert windows[0] and not set(windows[0]) & set(windows[1])
    with pytest.raises(ValueError, match="split='val' is not known"):
        make_source(config, "val")


def test_rows_of_some_real_clips_are_full(few_clips):
    patches, text, _ = planned_fill(plan(few_clips, limits=(1024, 768, 64), waiting=64), 40)
    assert patches >= 0.98 and text > 0.4


@pytest.mark.slow
@pytest.mark.parametrize(("text_length", "patches", "text"), [(512, 0.98, 0.8), (384, 0.88, 0.99)])
def test_rows_of_all_real_clips_are_full(text_length, patches, text, shared):
    """1,024 patches of them come with about 430 text tokens: in rows of 512 tokens patches are scarce, else text is."""
    made = plan(open_clips(str(shared / "clips")), limits=(1024, text_length, 64), waiting=64)
    assert (planned_fill(made, 1000)[:2] >= (patches, text)).all()


@pytest.mark.slow
def test_rows_of_the_clips_config_are_full(shared, tmp_path, open_loader):
    """At least 98% of the patches are real, over 1,000 rows of the config that is shipped; of the text about half."""
    config = clips.get_config()
    config.data.root = str(shared / "clips")
    loader = open_loader(config, words.tokenise, make_codec(config.codec), cache=tmp_path / "scan.jsonl")
    patches, text, _ = planned_fill(loader._plan, 1000)
    assert patches >= 0.98 and text > 0.4


def test_what_others_read_too_is_not_left_out():
    """A row that processes share would be another in the one that cannot read a clip of it."""
    broken = plan(Numbered(40, tuple(range(40))), shared=True)
    with pytest.raises(ValueError, match=r"clip \d+ cannot be read, and several processes .*clip\d+.mp4.*cut off"):
        read(broken, wait(broken, 0, 0), dropping=False)
    assert read(dataclasses.replace(broken, shared=False), wait(broken, 0, 0), dropping=False) is None


# A folder that several processes read


FOLDER = {"data.kind": "clips", "data.max_side": 48, "data.max_tokens": 64, "data.min_side": 8}


@pytest.fixture(scope="module")
def drawn_clips(tmp_path_factory):
    """Four videos and a picture of random squares, with captions."""
    folder, rng = tmp_path_factory.mktemp("drawn"), np.random.default_rng(0)
    for i, (frames, height, width) in enumerate(((9, 32, 48), (14, 48, 32), (9, 32, 32), (5, 16, 48), (1, 32, 32))):
        video_TxYxXx3 = np.uint8(rng.integers(256, size=(frames, height // 8, width // 8, 3)).repeat(8, 1).repeat(8, 2))
        if frames > 1:
            write_mp4(folder / f"{i}.mp4", video_TxYxXx3, 8, scale=1)
        else:
            write_png(folder / f"{i}.png", video_TxYxXx3[0])
        (folder / f"{i}.txt").write_text(f"clip number {i}")
    return folder


def start_on_two_folders(workdir, *folders):
    """Both are given data.root='.', where each finds its own."""
    rest = {"steps": 3, "log_every": 1, "eval_every": 0, "checkpoint_every": 3}
    return start(workdir, folders=dict(enumerate(folders)), **FOLDER, **rest, **{"data.root": "."})


@pytest.mark.slow
def test_one_process_scans_a_folder_for_all(tmp_path, drawn_clips):
    """A file that the second process alone cannot read stays in its list, and is left out where it is asked for."""
    theirs = shutil.copytree(drawn_clips, tmp_path / "theirs")
    for i in range(3):
        (theirs / f"{i}.mp4").write_bytes((theirs / f"{i}.mp4").read_bytes()[:100])
    codes = ended(start_on_two_folders(tmp_path / "run", drawn_clips, theirs))
    assert codes == [0, 0], printed(tmp_path / "run", 0) + printed(tmp_path / "run", 1)
    report = [json.loads(line) for line in (tmp_path / "run" / "media.jsonl").read_text().splitlines()]
    assert [row["status"] for row in report] == ["ok"] * 5
    cached = [json.loads(line)["report"] for line in (tmp_path / "run" / "media_cache.jsonl").read_text().splitlines()]
    assert cached == report and not list((tmp_path / "run").glob("*.partial"))
    assert "is left out" in printed(tmp_path / "run", 1) and "is left out" not in printed(tmp_path / "run", 0)


@pytest.mark.slow
def test_processes_that_see_other_clips_are_named(tmp_path, drawn_clips):
    """One caption is another on the second process: none trains, and both say which process differs."""
    theirs = shutil.copytree(drawn_clips, tmp_path / "theirs")
    (theirs / "3.txt").write_text("another clip")
    codes = ended(start_on_two_folders(tmp_path / "run", drawn_clips, theirs))
    assert 0 not in codes
    said = [printed(tmp_path / "run", i) for i in (0, 1)]
    # Both know; the one that ends first may take the other with it before that has spoken.
    assert any("process 1 would read other clips or captions than process 0 (5 clips here" in text for text in said)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
