"""Published weights: a table says which of our parameters each of theirs is, and the way there and back. Numpy alone.

D model width, L blocks. Linear layers are published as [out, in], ours are [in, out]; blocks are published one by
one, ours are stacked [L, ...].
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """One published weight, or one in every block.

    theirs: its name, with {} for the block's number; shape: its shape; ours: 'tree/name' of the parameters that it
    holds, in order; there: their array to ours, as a sequence; back: ours to theirs.
    """

    theirs: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    there: Callable
    back: Callable

    def names(self, depth: int) -> list[str]:
        return [self.theirs.format(i) for i in range(depth)] if "{}" in self.theirs else [self.theirs]


def same(ours: str, theirs: str, shape: tuple[int, ...], mine: tuple[int, ...] | None = None) -> Rule:
    """A weight that is ours as it stands, or in the shape `mine`."""
    return Rule(theirs, shape, (ours,), lambda w: [w.reshape(mine or shape)], lambda w: w.reshape(shape))


def dense(ours: str, theirs: str, n_in: int, n_out: int) -> list[Rule]:
    """A linear layer: its weight and its bias."""
    weight = Rule(f"{theirs}.weight", (n_out, n_in), (ours,), lambda w: [w.T], lambda w: w.T)
    return [weight, same(f"{ours}_bias", f"{theirs}.bias", (n_out,))]


def patch_dense(ours: str, theirs: str, channels: int, patch: Sequence[int], n_out: int) -> list[Rule]:
    """A convolution that cuts patches, (D, C, *patch), as a dense layer on values ordered (*patch, C)."""
    values = channels * int(np.prod(patch))

    def there(w):
        return [np.moveaxis(w, (1, 0), (-2, -1)).reshape(values, n_out)]

    def back(w):
        return np.moveaxis(w.reshape(*patch, channels, n_out), (-2, -1), (1, 0))

    weight = Rule(f"{theirs}.weight", (n_out, channels, *patch), (ours,), there, back)
    return [weight, same(f"{ours}_bias", f"{theirs}.bias", (n_out,))]


def convolution(ours: str, theirs: str, kernel: Sequence[int], n_in: int, n_out: int) -> list[Rule]:
    """A convolution, (out, in, *kernel), as ours [*kernel, in, out]; of one pixel, as a dense layer [in, out]."""
    window = tuple(kernel) if max(kernel) > 1 else ()

    def there(w):
        return [np.moveaxis(w, (1, 0), (-2, -1)).reshape(*window, n_in, n_out)]

    def back(w):
        return np.moveaxis(w.reshape(*kernel, n_in, n_out), (-2, -1), (1, 0))

    weight = Rule(f"{theirs}.weight", (n_out, n_in, *kernel), (ours,), there, back)
    return [weight, same(f"{ours}_bias", f"{theirs}.bias", (n_out,))]


def affine(ours: str, theirs: str, width: int) -> list[Rule]:
    """A norm's gain and bias."""
    return [same(f"{ours}_gain", f"{theirs}.weight", (width,)), same(f"{ours}_bias", f"{theirs}.bias", (width,))]


def import_weights(state: Mapping[str, np.ndarray], rules: Sequence[Rule], depth: int) -> dict:
    """Our parameters {tree: {name: float32 array}} from a published state dict.

    Raises ValueError where a weight is missing, has another shape, or is left over, and names it.
    """
    unused, params = set(state), {}
    for rule in rules:
        parts = []
        for name in rule.names(depth):
            if name not in state:
                raise ValueError(f"the published weights lack {name!r}, {rule.shape}.")
            if tuple(state[name].shape) != rule.shape:
                raise ValueError(f"{name!r} is {tuple(state[name].shape)}; by its configuration it is {rule.shape}.")
            parts.append(rule.there(np.asarray(state[name], np.float32)))
            unused.discard(name)
        for ours, arrays in zip(rule.ours, zip(*parts)):
            tree, name = ours.split("/")
            params.setdefault(tree, {})[name] = np.stack(arrays) if "{}" in rule.theirs else np.array(arrays[0])
    if unused:
        raise ValueError(f"the published weights hold {sorted(unused)}, which this model has no place for.")
    return params


def export_weights(params: Mapping, rules: Sequence[Rule], depth: int) -> dict[str, np.ndarray]:
    """The published state dict from our parameters: the inverse of `import_weights`, with the same errors."""
    unused, state = {f"{tree}/{name}" for tree in params for name in params[tree]}, {}
    for rule in rules:
        mine = []
        for ours in rule.ours:
            tree, name = ours.split("/")
            if name not in params.get(tree, {}):
                raise ValueError(f"the parameters lack {ours!r}, which {rule.theirs!r} is made of.")
            mine.append(np.asarray(params[tree][name], np.float32))
            unused.discard(ours)
        for i, name in enumerate(rule.names(depth)):
            try:
                w = rule.back(*(w[i] if "{}" in rule.theirs else w for w in mine))
            except (ValueError, IndexError) as error:
                raise ValueError(f"{rule.ours}, {[w.shape for w in mine]}, cannot become {name!r}: {error}") from error
            if w.shape != rule.shape:
                raise ValueError(f"{rule.ours} would give {name!r} {w.shape}; by its configuration it is {rule.shape}.")
            state[name] = np.ascontiguousarray(w)
    if unused:
        raise ValueError(f"the parameters hold {sorted(unused)}, which the published weights have no place for.")
    return state
