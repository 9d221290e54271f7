"""Low-rank adaptation of a DiT's block matrices (Hu et al. 2021): W' = W + scale * A B, with W left as it is.

L blocks, I inputs, O outputs, r rank. Factors are {matrix: {'a': [L, I, r], 'b': [L, r, O]}}, matrices named as in
`block_parameters`. Files hold them block by block and transposed: lora_A or lora_down [r, I], lora_B or lora_up [O, r],
and alpha, so that W' = W + alpha / r * up down; without an alpha it is r.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dit_video.model import DiT, block_parameters
from dit_video.weights import Rule
from dit_video.weights.families import FAMILIES, family_of, own_rules
from dit_video.weights.files import Stored, open_safetensors, write_safetensors

# Ends of the names in files, and what they are; each layout by the trainers that write it.
ENDINGS = {
    ".lora_A.weight": "down",  # diffusers, PEFT
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", "model.", "lora_unet__", "lora_unet_", "")


def scale(config) -> float:
    """What the product of the factors is multiplied with; config.lora.alpha = 0 stands for the rank."""
    return (config.lora.alpha or config.lora.rank) / config.lora.rank


def init(key, model: DiT, config) -> dict:
    """New factors of config.lora's matrices: a normal with deviation 1 / sqrt(I), b zero, so that W' begins as W.

    Raises ValueError for a matrix that the model's blocks do not have.
    """
    matrices = {name: spec[1] for name, spec in block_parameters(model).items() if len(spec[1]) == 3}
    targets = [name for name in config.lora.targets if name in matrices]
    if config.lora.rank < 1 or not targets:
        raise ValueError(
            f"lora.rank={config.lora.rank}, lora.targets={tuple(config.lora.targets)} adapt nothing. "
            f"Matrices of this model: {sorted(matrices)}."
        )
    factors = {}
    for i, name in enumerate(targets):
        L, n_in, n_out = matrices[name]
        a = jax.random.normal(jax.random.fold_in(key, i), (L, n_in, config.lora.rank), jnp.float32) / n_in**0.5
        factors[f"block_{name}"] = {"a": a, "b": jnp.zeros((L, config.lora.rank, n_out), jnp.float32)}
    return factors


def merge(dit: Mapping, factors: Mapping, scale: float) -> dict:
    """DiT's parameters with the factors' products added, in float32; the rest of them as they are."""
    product = lambda f: jnp.einsum("lir,lro->lio", f["a"], f["b"], precision=jax.lax.Precision.HIGHEST)
    return dict(dit) | {name: dit[name] + scale * product(f) for name, f in factors.items()}


def read(path, config) -> dict:
    """The factors in a .safetensors file, for the model of `config`, with each file's alpha / r in b: scale is 1.

    Takes diffusers' and PEFT's lora_A, lora_B, and kohya's lora_down, lora_up, alpha; under the names of the model's
    family (Wan's own or diffusers'), with dots or, as kohya writes, underscores, and the usual prefixes. Where blocks
    differ in rank, the lower are filled with zeros. Raises ValueError, and names it, for what fits nowhere.
    """
    tensors, _ = open_safetensors(epath.Path(path))
    depth, places = config.model.depth, {}
    for rules in _all_rules(config):
        for rule in rules:
            for i, name in enumerate(rule.names(depth)):
                if name.endswith(".weight"):
                    places[name.removesuffix(".weight").replace(".", "_")] = (rule, i)
    found = {}
    for name, stored in tensors.items():
        ending = next((e for e in ENDINGS if name.endswith(e)), None)
        module = _module(name.removesuffix(ending), places) if ending else None
        if module is None:
            raise ValueError(f"{path} holds {name!r} {stored.shape}, which is no low-rank factor of this model.")
        found.setdefault(module, {})[ENDINGS[ending]] = (name, stored)
    blocks = {}
    for module, parts in found.items():
        rule, i = places[module]
        if not {"up", "down"} <= parts.keys():
            raise ValueError(f"{path} holds {[n for n, _ in parts.values()]} without the other factor.")
        down, up = (np.asarray(parts[kind][1], np.float32) for kind in ("down", "up"))
        if down.ndim != 2 or up.ndim != 2 or (up.shape[0], down.shape[1]) != rule.shape or up.shape[1] != len(down):
            name, what = parts["up"][0], f"{up.shape} x {down.shape}"
            raise ValueError(f"{name!r} in {path} is a product of {what}, and the weight is {rule.shape}.")
        alpha = float(np.asarray(parts["alpha"][1], np.float32)) if "alpha" in parts else len(down)
        # The rules permute, split or transpose a weight's outputs: on its left factor they do the same.
        for ours, b in zip(rule.ours, rule.there(up * np.float32(alpha / len(down)))):
            # Where one of theirs holds several of ours, the ranks that are another's add nothing here.
            mine = b.any(1) if len(rule.ours) > 1 and b.any() else slice(None)
            blocks.setdefault(ours.removeprefix("dit/"), {})[i] = (down.T[:, mine], b[mine])
    return {name: _stack(some, depth) for name, some in blocks.items()}


def write(path, factors: Mapping, scale: float, config, layout: str = "diffusers") -> None:
    """Writes the factors alone, float32, under the names of the model's family, or our own where it has none.

    layout: 'diffusers' (transformer.NAME.lora_A.weight; the scale is in lora_B) or 'kohya' (lora_unet_NAME.lora_down,
    with its alpha; for Wan under its own repository's names, as those who read kohya's expect).
    """
    kohya, depth, tensors = layout == "kohya", config.model.depth, {}
    for rule in _all_rules(config)[-1 if kohya else 0]:
        ours = [name.removeprefix("dit/") for name in rule.ours]
        if not any(name in factors for name in ours):
            continue
        for i, name in enumerate(rule.names(depth)):
            # Several of ours in one of theirs: their factors lie side by side, each up factor in its own outputs.
            ups, downs = [], []
            for one in ours:
                if one not in factors:
                    continue
                b = np.asarray(factors[one]["b"][i], np.float32)
                parts = [
                    b if other == one else np.zeros((len(b), rule.shape[0] // len(ours)), b.dtype) for other in ours
                ]
                ups.append(rule.back(*parts))
                downs.append(np.asarray(factors[one]["a"][i], np.float32).T)
            up, down = np.concatenate(ups, 1), np.concatenate(downs, 0)
            stem = name.removesuffix(".weight")
            if kohya:
                stem = f"lora_unet_{stem.replace('.', '_')}"
                tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
                tensors[f"{stem}.alpha"] = np.asarray(scale * len(down), np.float32)
            else:
                stem = f"transformer.{stem}"
                tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up * np.float32(scale)}
    stored = {n: Stored(a.shape, np.dtype(np.float32), lambda a=a: a) for n, a in tensors.items()}
    write_safetensors(path, stored, {"format": "pt"})


def _all_rules(config) -> list[list[Rule]]:
    """The rules of the block matrices of the config's model, under each of the names that its files may have."""
    known = family_of(config)
    if known is None:
        return [own_rules(config)]
    name, published = known
    named = [FAMILIES[n].rules(published) for n in FAMILIES if n == name or n.startswith(f"{name}-")]
    matrices = lambda rules: [r for r in rules if "{}" in r.theirs and len(r.shape) == 2]
    return [matrices(rules) for rules in named]


def _module(stem: str, places: Mapping) -> str | None:
    for prefix in PREFIXES:
        if stem.startswith(prefix) and (module := stem.removeprefix(prefix).replace(".", "_")) in places:
            return module
    return None


def _stack(blocks: Mapping[int, tuple], depth: int) -> dict:
    """One matrix's factors in all blocks, as arrays; zeros where a block has none, or less rank than another."""
    rank = max(a.shape[1] for a, _ in blocks.values())
    some_a, some_b = next(iter(blocks.values()))
    a = np.zeros((depth, some_a.shape[0], rank), np.float32)
    b = np.zeros((depth, rank, some_b.shape[1]), np.float32)
    for i, (a_ixr, b_rxo) in blocks.items():
        a[i, :, : a_ixr.shape[1]], b[i, : b_rxo.shape[0]] = a_ixr, b_rxo
    return {"a": a, "b": b}
