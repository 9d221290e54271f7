"""Published weights to ours and back, one tensor at a time: what a whole model need not fit in memory for.

L blocks. The rules are those of `dit_video.weights`; here both sides stay in their files until they are written.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np

from dit_video.weights import Rule
from dit_video.weights.files import Stored


@dataclasses.dataclass(frozen=True)
class Findings:
    """How a file's weights differ from what its configuration says they are: lines that each name one."""

    missing: list[str]
    unused: list[str]
    misshapen: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unused or self.misshapen)

    def __str__(self) -> str:
        parts = {"missing": self.missing, "unused": self.unused, "of another shape": self.misshapen}
        return "\n".join(
            f"{len(names)} {what}:\n  " + "\n  ".join(names[:20] + ["..."] * (len(names) > 20))
            for what, names in parts.items()
            if names
        )


def examine(theirs: Mapping[str, Stored], rules: Sequence[Rule], depth: int) -> Findings:
    """What of the published weights is missing, left over, or of another shape."""
    wanted = {name: rule.shape for rule in rules for name in rule.names(depth)}
    shape = lambda name: tuple(theirs[name].shape)
    return Findings(
        [f"{name} {wanted[name]}" for name in wanted if name not in theirs],
        [f"{name} {shape(name)}" for name in theirs if name not in wanted],
        [f"{n} {shape(n)}, not {wanted[n]}" for n in wanted if n in theirs and shape(n) != tuple(wanted[n])],
    )


def to_ours(
    theirs: Mapping[str, Stored],
    rules: Sequence[Rule],
    depth: int,
    abstract: Mapping[str, object],
    dtype,
    fresh: Callable[[str], np.ndarray],
) -> dict[str, Stored]:
    """Our parameters 'tree/name' from published ones, each made when it is read.

    abstract: our parameters' shapes, by name; fresh(name): a new model's, for what is missing there or of another
    shape (see `examine`), whole or in the blocks that lack it.
    """
    sound = {
        name
        for rule in rules
        for name in rule.names(depth)
        if name in theirs and tuple(theirs[name].shape) == tuple(rule.shape)
    }
    makers = {}
    for rule in rules:
        for j, ours in enumerate(rule.ours):
            names = rule.names(depth)

            def make(rule=rule, j=j, ours=ours, names=names):
                new = None if sound.issuperset(names) else np.array(fresh(ours))
                stacked = "{}" in rule.theirs
                out = np.empty(abstract[ours].shape, np.float32) if new is None else new
                for i, name in enumerate(names):
                    if name in sound:
                        part = rule.there(np.asarray(theirs[name], np.float32))[j]
                        (out[i] if stacked else out)[...] = part
                return out

            makers[ours] = make
        if not rule.ours and sound.issuperset(rule.names(depth)):  # computed here: only checked
            for name in rule.names(depth):
                rule.there(_unrounded(theirs[name], rule.back()))
    makers |= {name: lambda name=name: np.asarray(fresh(name)) for name in abstract if name not in makers}
    return {name: Stored(tuple(abstract[name].shape), np.dtype(dtype), makers[name]) for name in abstract}


def to_theirs(ours: Mapping[str, Stored], rules: Sequence[Rule], depth: int, dtype) -> dict[str, Stored]:
    """The published weights from our parameters 'tree/name', each made when it is read.

    Raises ValueError where a parameter is missing, is left over, or cannot become what it should.
    """
    wanted = {name for rule in rules for name in rule.ours}
    lost, unused = sorted(wanted - ours.keys()), sorted(ours.keys() - wanted)
    if lost or unused:
        raise ValueError(f"the parameters lack {lost} and hold {unused}, as the published weights see it.")
    theirs = {}
    for rule in rules:
        for i, name in enumerate(rule.names(depth)):

            def make(rule=rule, i=i, name=name):
                read = [np.asarray(_part(ours[o], i if "{}" in rule.theirs else None), np.float32) for o in rule.ours]
                array = rule.back(*read)
                if tuple(array.shape) != tuple(rule.shape):
                    raise ValueError(f"{rule.ours} would give {name!r} {array.shape}, and it is {rule.shape}.")
                return array

            theirs[name] = Stored(tuple(rule.shape), np.dtype(dtype), make)
    return theirs


def _unrounded(stored: Stored, wanted):
    """A tensor in float32; values, of 1 at most, that are `wanted` but for the file's dtype's rounding are `wanted`."""
    array = np.asarray(stored, np.float32)
    return np.where(np.abs(array - wanted) <= float(ml_dtypes.finfo(stored.dtype).eps) / 4, wanted, array)


def _part(stored, i: int | None):
    return np.asarray(stored) if i is None else np.asarray(stored)[i]
