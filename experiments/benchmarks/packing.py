"""What does packing cost against clips of exactly equal length, and what does it save against padding?

    python experiments/benchmarks/packing.py

Times the same train step, in turn, on (a) packed rows of the embedded world's clips, (b) rows that each hold clips of
one length only, filled exactly, attention confined to each clip's own place by the same promise (span), and (c) one
clip per row, every row as long as the longest clip. Prints time per real patch and the ratios.
"""

import statistics
import time

import jax
import numpy as np
from absl import app, flags

from configs import shapes
from dit_video import step as training
from dit_video.data.loader import make_loader
from dit_video.patches import Batch, Patches

RUNS = flags.DEFINE_integer("runs", 7, "Counted rounds.")


def rows_of(batch: Batch, length: int, keep) -> Batch:
    """Clips of packed rows, one to a row of `length` places; keep: the numbers of patches that are wanted."""
    p, out = batch.patches, []
    for b in range(p.seg_BxN.shape[0]):
        for seg in range(1, p.seg_BxN[b].max() + 1):
            at, groups, words = p.seg_BxN[b] == seg, p.seg_BxG[b] == seg, batch.prompt_BxS[b] == seg
            if at.sum() in keep:
                out.append((b, at, groups, words))
    G = max(groups.sum() for _, _, groups, _ in out)
    S = 32
    fit = lambda a, n: np.concatenate([a, np.zeros((n - len(a), *a.shape[1:]), a.dtype)])
    fields = {}
    for name in Patches.__dataclass_fields__:
        values, by_group = getattr(p, name), "BxG" in name
        if values is None:
            continue
        size = G if by_group else length
        fields[name] = np.stack([fit(values[b][groups if by_group else at], size) for b, at, groups, _ in out])
    fields["group_BxN"] = np.maximum(fields["group_BxN"] - fields["group_BxN"][:, :1], 0)
    for name in ("seg_BxN", "prompt_BxN", "seg_BxG"):
        fields[name] = (fields[name] > 0).astype(np.int32)
    ids = np.stack([fit(batch.ids_BxSxK[b][words], S) for b, _, _, words in out])
    prompts = np.stack([fit((batch.prompt_BxS[b][words] > 0).astype(np.int32), S) for b, _, _, words in out])
    return Batch(Patches(**fields), ids, prompts)


def main(_):
    config = shapes.get_config()
    packed_run = training.make_run(config)
    loader = make_loader(config, packed_run.text.tokenise, packed_run.codec)
    packed = next(loader)
    more = [packed] + [next(loader) for _ in range(3)]
    loader.close()

    lengths = [np.bincount(row)[1:] for batch in more for row in batch.patches.seg_BxN]
    sizes = sorted(set(np.concatenate(lengths).tolist()))
    key, longest = jax.random.key(0), max(sizes)

    def program(batches, length):
        """A function that runs one step on each batch, and how many real patches that is."""
        c = shapes.get_config()
        c.data.max_tokens = min(length, c.data.max_tokens)
        run = training.make_run(c)
        state, step = jax.jit(run.init)(key), jax.jit(run.step)
        batches = [jax.device_put(b) for b in batches]
        patches = sum(int((b.patches.seg_BxN > 0).sum()) for b in batches)

        def once():
            began = time.perf_counter()
            for b in batches:
                jax.block_until_ready(step(state, b, key)[1])
            return (time.perf_counter() - began) / patches

        once()
        return once

    whole = jax.tree.map(lambda *a: np.concatenate(a), *more)
    budget = packed.patches.seg_BxN.size
    # As many patches a step as a packed batch has, length by length.
    buckets = []
    for size in sizes:
        rows = rows_of(whole, size, {size})
        count = max(budget // size, 1)
        have = rows.patches.seg_BxN.shape[0]
        buckets.append((jax.tree.map(lambda a, n=count, h=have: a[np.arange(n) % h], rows), size, have * size))
    padded = rows_of(whole, longest, set(sizes))
    padded = jax.tree.map(lambda a: a[: budget // longest], padded)

    ways = {"packed": program([packed], config.data.max_tokens), "padded": program([padded], longest)}
    bucketed = [(program([batch], size), share) for batch, size, share in buckets]
    times = {name: [] for name in (*ways, "buckets")}
    for _ in range(RUNS.value):
        for name, once in ways.items():
            times[name].append(once())
        total = sum(share for _, share in bucketed)
        times["buckets"].append(sum(once() * share for once, share in bucketed) / total)
    median = {name: statistics.median(t) for name, t in times.items()}
    for name, seconds in median.items():
        print(f"{name:<8} {1e6 * seconds:8.1f} us per real patch")
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(times[a], times[b]))
    print(f"packed / equal-length buckets: {ratio('packed', 'buckets'):.2f}")
    print(f"padded / packed: {ratio('padded', 'packed'):.2f}")


if __name__ == "__main__":
    app.run(main)
