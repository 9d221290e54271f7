"""The diffusion transformer: one class, few knobs, for DiT (Peebles and Xie 2023), SiT, Latte, Wan 2.x and our own.

B rows, N patches per row, P values per patch, G groups per row, S text tokens per row, E text width, I image tokens,
D model width, H heads, K head width, F width of the feed-forward, L layers, M cached patches per row.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_video.attention import attend, layer_norm, matmul, rms_norm, rope_angles, rotate, sinusoids, spread
from dit_video.patches import Cond, Patches
from dit_video.sequence import attend_across, attend_to_all
from dit_video.sharding import ROWS, along, gathered

POSITION_FEATURES, POSITION_PERIOD = 32, 100.0  # of each axis in position='both'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What the next latent frames of frame-causal clips see of the ones before: their keys and values, oldest first.

    k_LxBxMxHxK, v_LxBxMxHxK: of every layer. Keys are rotated by real coordinates, so they stay as they are.
    tags: of each kind of attention, (segment_BxM, block_BxM) as `attend` takes them; segment 0 = nothing there yet.
    """

    k_LxBxMxHxK: jax.Array
    v_LxBxMxHxK: jax.Array
    tags: dict[str, tuple[jax.Array, jax.Array]]


def empty_cache(m: "DiT", rows: int, length: int, frames: int = 1) -> Cache:
    """The cache before a video's first latent frame, for calls of `rows` rows of `length` patches.

    frames: latent frames of each clip in one call. It holds as many calls as the window reaches back. Raises
    ValueError for a model without a window.
    """
    if not m.window:
        raise ValueError(f"model.window={m.window} has no end: a cache needs one of 1 latent frame or more.")
    M = -(-(m.window - 1) // frames) * length
    kv = lambda: jnp.zeros((m.depth, rows, M, m.heads, m.width // m.heads), m.dtype)
    zeros = lambda: jnp.zeros((rows, M), jnp.int32)
    return Cache(kv(), kv(), {attended: (zeros(), zeros()) for attended in {"all", *m.attention_pattern}})


def _append(cache: Cache, k_LxBxNxHxK, v_LxBxNxHxK, tags: dict) -> Cache:
    """The cache with a call's patches at its end, and its oldest call's dropped."""
    N = k_LxBxNxHxK.shape[2]
    last = lambda old, new, axis: jax.lax.slice_in_dim(jnp.concatenate([old, new], axis), N, None, axis=axis)
    # Attention within a frame has no use for the past, whose numbers of (clip, frame) might be another frame's now.
    tags = tags | {"space": jax.tree.map(jnp.zeros_like, tags["space"])} if "space" in tags else tags
    return Cache(
        last(cache.k_LxBxMxHxK, k_LxBxNxHxK, 2),
        last(cache.v_LxBxMxHxK, v_LxBxNxHxK, 2),
        jax.tree.map(lambda old, new: last(old, new, 1), cache.tags, tags),
    )


class DiT(nn.Module):
    """Pre-norm transformer blocks, modulated by (level, condition). Weights are stacked, [L, in, out], and scanned.

    modulation: 'block', Dense(SiLU(c)) in every block and in the last layer; or 'shared', one Dense(SiLU(c)) plus a
        table per block, and for the last layer a table plus c itself.
    position: 'rope' (t, y, x); 'table' (sin-cos over y and x, added once; where layers attend over time, sin-cos over
        t too, added before the first of them: Latte); or 'both', rope and a projection of sinusoids, added once: of t,
        of (y, x) from the middle of the canvas, and of what the clip spans (canvas_BxGx3). Where a patch is then
        travels with what it holds, so that attention can average places, which the relative angles of rope alone only
        compare; and one orbit about the middle is one pattern, whatever the canvas.
    qk_norm: 'none', 'head' (RMS over a head), 'width' (RMS over all heads jointly).
    text: 'none', 'pooled' (mean of the prompt's tokens, of width D, added to the level's embedding), 'cross'
        (cross-attention by prompt; text_norm: LayerNorm with affine before it; text_pool: the mean of the prompt's
        tokens, projected, is added to the level's embedding too).
    image: a second cross-attention with its own k, v and norm, outputs added (Wan's image to video).
    level_scale, level_direction: the embedding's input is scale * s for 'noise' (s = 1 is noise), scale * (1 - s)
        for 'data'.
    attention_pattern: what each layer of a period attends to: 'all', 'space' (its frame), 'time' (its place).
    pos_scale, pos_offset: index = pos * scale + offset, per axis (t, y, x).
    canvas_most: with 'both', longer sides of a canvas (codec pixels) are told as this, 0 = as they are. A canvas larger
        than any in training is then no number that the model never saw, while its places stay apart as they are.
    span: the longest clip's patches, if the caller promises one (see `attend`).
    window: latent frames, its own among them, that a frame of a causal clip sees (patches.block_BxN); None = all
        before it. With rope it alone tells a causal clip's times: it looks the same at any time of a long video.
    mesh, exchange: the devices that the arrays lie along, and how attention crosses the cuts of a row (`sequence.py`).
    """

    patch_values: int
    out_values: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    modulation: str = "shared"
    position: str = "rope"
    qk_norm: str = "head"
    text: str = "cross"
    text_width: int = 0
    text_norm: bool = True
    text_pool: bool = False
    image_width: int = 0
    level_scale: float = 1.0
    level_direction: str = "noise"
    level_features: int = 256
    attention_pattern: tuple[str, ...] = ("all",)
    pos_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    pos_offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    canvas_most: float = 0.0
    rope_theta: float = 10_000.0
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    span: int | None = None
    window: int | None = None
    mesh: jax.sharding.Mesh | None = None
    exchange: str = "ring"

    @nn.compact
    def __call__(self, patches: Patches, cond: Cond | None, cache: Cache | None = None):
        """The network's raw output, out_BxNx(out_values); padding is zeroed on entry.

        cache: the clean frames before those of `patches`. Returns then (out, the cache with the keys and values of
        `patches` appended), which is for the frames after them, if `patches` are clean. Raises ValueError for one on a
        mesh.
        """
        if cache is not None and self.mesh is not None:
            raise ValueError("a cache of the frames before goes with no mesh: its rows are whole. Leave out either.")
        D, dtype = self.width, self.dtype
        real_BxN = patches.seg_BxN != 0
        index_BxNx3 = patches.pos_BxNx3 * jnp.array(self.pos_scale) + jnp.array(self.pos_offset)
        index_BxNx3 = jnp.where(real_BxN[..., None], index_BxNx3, 0)
        x_BxNxP = jnp.where(real_BxN[..., None], patches.x_BxNxP, 0).astype(dtype)
        if self.text != "none":
            text_BxSxE = jnp.where((cond.prompt_BxS != 0)[..., None], cond.text_BxSxE, 0)

        h_BxNxD = _dense(self, "patch", self.patch_values, D)(x_BxNxP)
        rope = None
        if self.position == "table":
            h_BxNxD = h_BxNxD + sincos_table(index_BxNx3, D).astype(dtype)
        else:
            angles = rope_angles(index_BxNx3, D // self.heads, self.rope_theta)
            rope = jnp.cos(angles), jnp.sin(angles)
        if self.position == "both":
            if patches.block_BxN is not None:
                t_BxN = jnp.where(patches.block_BxN > 0, self.pos_offset[0], index_BxNx3[..., 0])
                index_BxNx3 = index_BxNx3.at[..., 0].set(t_BxN)
            canvas_BxNx3 = spread(patches.canvas_BxGx3, patches.group_BxN)
            middle_BxNx2 = (patches.pos_BxNx3 - canvas_BxNx3 / 2)[..., 1:] * jnp.array(self.pos_scale[1:])
            if self.canvas_most:
                canvas_BxNx3 = jnp.concatenate(
                    [canvas_BxNx3[..., :1], jnp.minimum(canvas_BxNx3[..., 1:], self.canvas_most)], -1
                )
            place_BxNx6 = [index_BxNx3[..., :1], middle_BxNx2, canvas_BxNx3 * jnp.array(self.pos_scale)]
            place_BxNx6 = jnp.concatenate(place_BxNx6, -1)
            place_BxNx6 = jnp.where(real_BxN[..., None], place_BxNx6, 0)
            waves_BxNxW = sinusoids(place_BxNx6, POSITION_FEATURES, POSITION_PERIOD).reshape(*real_BxN.shape, -1)
            h_BxNxD = h_BxNxD + _dense(self, "position", waves_BxNxW.shape[-1], D)(waves_BxNxW.astype(dtype))

        level = patches.level_BxG if self.level_direction == "noise" else 1 - patches.level_BxG
        c_BxGxD = sinusoids(level * self.level_scale, self.level_features).astype(dtype)
        c_BxGxD = _dense(self, "level_in", self.level_features, D, normal=0.02)(c_BxGxD)
        c_BxGxD = _dense(self, "level_out", D, D, normal=0.02)(nn.silu(c_BxGxD))
        if self.text == "pooled":
            c_BxGxD = c_BxGxD + pool(text_BxSxE, cond.prompt_BxS, group_prompts(patches)).astype(dtype)
        if self.text_pool:
            pooled_BxGxE = pool(text_BxSxE, cond.prompt_BxS, group_prompts(patches)).astype(dtype)
            c_BxGxD = c_BxGxD + _dense(self, "text_pool", self.text_width, D)(pooled_BxGxE)

        context = {"tags": self._tags(patches), "rope": rope, "group_BxN": patches.group_BxN}
        if self.position == "table" and "time" in self.attention_pattern:
            context["time_BxNxD"] = sincos(index_BxNx3[..., 0], D).astype(dtype)
        context["prompt_tag"] = (patches.prompt_BxN, jnp.zeros_like(patches.prompt_BxN))
        if self.text == "cross":
            text = _dense(self, "text_in", self.text_width, D)(text_BxSxE.astype(dtype))
            context["text_BxSxD"] = _dense(self, "text_out", D, D)(nn.gelu(text))
            context["text_tag"] = (cond.prompt_BxS, jnp.zeros_like(cond.prompt_BxS))
        if self.image_width:
            image_BxIxE = jnp.where((cond.image_prompt_BxI != 0)[..., None], cond.image_BxIxE, 0)
            context["image_BxIxD"] = self._image(image_BxIxE.astype(dtype)).astype(dtype)
            context["image_tag"] = (cond.image_prompt_BxI, jnp.zeros_like(cond.image_prompt_BxI))

        if self.modulation == "shared":
            context["mod_BxGx6D"] = _dense(self, "mod", D, 6 * D, zero=True)(nn.silu(c_BxGxD))
        else:
            context["c_BxGxD"] = nn.silu(c_BxGxD)
        past = None
        if cache is not None:
            past, context["past_tags"] = (cache.k_LxBxMxHxK, cache.v_LxBxMxHxK), cache.tags
        h_BxNxD, new = self._blocks(h_BxNxD, context, past)

        if self.modulation == "shared":
            table = self.param("last_table", nn.initializers.zeros, (2 * D,), jnp.float32)
            last_BxGx2D = jnp.concatenate([c_BxGxD, c_BxGxD], -1) + table.astype(dtype)
        else:
            last_BxGx2D = _dense(self, "last_mod", D, 2 * D, zero=True)(nn.silu(c_BxGxD))
        shift, scale = jnp.split(spread(last_BxGx2D, patches.group_BxN), 2, -1)
        h_BxNxD = layer_norm(h_BxNxD) * (1 + scale) + shift
        out_BxNxO = _dense(self, "last", D, self.out_values, zero=True)(h_BxNxD)
        return out_BxNxO if cache is None else (out_BxNxO, _append(cache, *new, context["tags"]))

    def _blocks(self, h_BxNxD, context, past):
        period = len(self.attention_pattern)
        if self.depth % period:
            raise ValueError(f"depth={self.depth} is not a multiple of the attention pattern's {period} layers.")
        weights = {name: self.param(f"block_{name}", *spec) for name, spec in block_parameters(self).items()}
        by_period = lambda w: w.reshape(self.depth // period, period, *w.shape[1:])
        weights, past = jax.tree.map(by_period, (weights, past))
        first = jnp.arange(self.depth // period) == 0

        def layers(h, xs):
            w, first, past = xs
            new = []
            for i, attended in enumerate(self.attention_pattern):
                if "time_BxNxD" in context and i == self.attention_pattern.index("time"):
                    h = h + jnp.where(first, context["time_BxNxD"], 0)
                used = {k: gathered(self.mesh, f"block_{k}", v[i].astype(self.dtype)) for k, v in w.items()}
                if past is None:
                    h = along(self.mesh, block(self, used, h, context, attended), ROWS, "sequence")
                else:
                    h, kv = block(self, used, h, context, attended, jax.tree.map(lambda a, i=i: a[i], past))
                    new.append(kv)
            return h, jax.tree.map(lambda *a: jnp.stack(a), *new) if new else None

        if self.remat != "none":
            keep = jax.checkpoint_policies
            dots = keep.save_from_both_policies(
                keep.dots_with_no_batch_dims_saveable, keep.save_only_these_names("attended")
            )
            policies = {"full": None, "dots": dots}
            layers = jax.checkpoint(layers, policy=policies[self.remat], prevent_cse=False)
        unroll = min(self.unroll, self.depth // period)
        h_BxNxD, new = jax.lax.scan(layers, h_BxNxD, (weights, first, past), unroll=unroll)
        return h_BxNxD, jax.tree.map(lambda a: a.reshape(self.depth, *a.shape[2:]), new)

    def _tags(self, patches):
        seg, frame = patches.seg_BxN, patches.frame_BxN
        causal = jnp.zeros_like(seg) if patches.block_BxN is None else patches.block_BxN
        # A clip's frame, or a clip's place, becomes a segment of its own by numbering the pairs within the row.
        tags = {"all": (seg, causal)}
        if "space" in self.attention_pattern:
            tags["space"] = (jnp.where(seg > 0, seg * (frame.max() + 1) + frame, 0), jnp.zeros_like(seg))
        if "time" in self.attention_pattern:
            # Twice the centre, as patches of odd size have their centres at half pixels.
            y, x = jnp.round(2 * patches.pos_BxNx3[..., 1:]).astype(jnp.int32).transpose(2, 0, 1)
            place = (seg * (y.max() + 1) + y) * (x.max() + 1) + x
            tags["time"] = (jnp.where(seg > 0, place, 0), causal)
        return tags

    def _image(self, image_BxIxE):
        """Wan's projection of an image encoder's tokens: norm, two dense layers with exact GELU, norm."""
        affine = lambda x, name, width: (
            layer_norm(x, 1e-5) * self.param(f"{name}_gain", nn.initializers.ones, (width,))
            + self.param(f"{name}_bias", nn.initializers.zeros, (width,))
        )
        h = affine(image_BxIxE, "image_norm_in", self.image_width)
        h = nn.gelu(_dense(self, "image_in", self.image_width, self.image_width)(h), approximate=False)
        return affine(_dense(self, "image_out", self.image_width, self.width)(h), "image_norm_out", self.width)


def block_parameters(m: DiT) -> dict[str, tuple]:
    """name -> (initializer, shape, dtype) of a block's weights, stacked over the L layers."""
    D, F, L, K = m.width, m.mlp_width, m.depth, m.width // m.heads
    xavier = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", batch_axis=(0,))
    zeros, ones, out = nn.initializers.zeros, nn.initializers.ones, {}

    def dense(name, n_in, n_out, init=xavier):
        out[name] = (init, (L, n_in, n_out), jnp.float32)
        out[f"{name}_bias"] = (zeros, (L, n_out), jnp.float32)

    def norm_gain(*names):
        for name in names:
            if m.qk_norm != "none":
                out[name] = (ones, (L, K if m.qk_norm == "head" else D), jnp.float32)

    for name in ("q", "k", "v", "o"):
        dense(name, D, D)
    norm_gain("q_norm", "k_norm")
    if m.text == "cross":
        for name in ("text_q", "text_k", "text_v", "text_o"):
            dense(name, D, D)
        norm_gain("text_q_norm", "text_k_norm")
        if m.text_norm:
            out["text_norm_gain"], out["text_norm_bias"] = (ones, (L, D), jnp.float32), (zeros, (L, D), jnp.float32)
    if m.image_width:
        dense("image_k", D, D)
        dense("image_v", D, D)
        norm_gain("image_k_norm")
    dense("mlp_in", D, F)
    dense("mlp_out", F, D)
    if m.modulation == "shared":
        out["mod_table"] = (zeros, (L, 6 * D), jnp.float32)
    else:
        dense("mod", D, 6 * D, zeros)
    return out


def block(m: DiT, w: dict, h_BxNxD, context: dict, attended: str, past=None):
    """One block: modulated self-attention, cross-attention, modulated feed-forward (DiT, fig. 3; Wan 2.1, fig. 10).

    past: this layer's cached keys and values, seen beside the patches' own. Returns h_BxNxD; given past, (h_BxNxD, the
    patches' own keys and values).
    """
    B, N, D = h_BxNxD.shape
    dense = lambda x, name: _product(m, x, w[name]) + w[f"{name}_bias"]
    heads = lambda x: x.reshape(B, -1, m.heads, D // m.heads)

    def normed(x_BxNxD, name):
        if m.qk_norm == "none":
            return heads(x_BxNxD)
        return heads(rms_norm(x_BxNxD, w[name])) if m.qk_norm == "width" else rms_norm(heads(x_BxNxD), w[name])

    if m.modulation == "shared":
        mod_BxGx6D = context["mod_BxGx6D"] + w["mod_table"]
    else:
        mod_BxGx6D = along(m.mesh, dense(context["c_BxGxD"], "mod"), ROWS)
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        spread(part, context["group_BxN"]) for part in jnp.split(mod_BxGx6D, 6, -1)
    )

    x_BxNxD = layer_norm(h_BxNxD) * (1 + scale1) + shift1
    q, k, v = normed(dense(x_BxNxD, "q"), "q_norm"), normed(dense(x_BxNxD, "k"), "k_norm"), heads(dense(x_BxNxD, "v"))
    if context["rope"] is not None:
        q, k = rotate(q, *context["rope"]), rotate(k, *context["rope"])
    tag, new = context["tags"][attended], (k, v)
    if m.mesh is None:
        attend_row, attend_text = attend, attend
    else:
        attend_row = functools.partial(attend_across, m.mesh, m.exchange)
        attend_text = functools.partial(attend_to_all, m.mesh)
    if past is None:
        o, _ = attend_row(q, k, v, tag, tag, window=m.window, span=m.span)
    else:
        join = lambda old, new: jnp.concatenate([old, new], 1)
        k_tag = jax.tree.map(join, context["past_tags"][attended], tag)
        o, _ = attend(q, *map(join, past, new), tag, k_tag, window=m.window)
    h_BxNxD = h_BxNxD + gate1 * dense(o.reshape(B, N, D), "o")

    if m.text == "cross":
        x_BxNxD = layer_norm(h_BxNxD) * w["text_norm_gain"] + w["text_norm_bias"] if m.text_norm else h_BxNxD
        q = normed(dense(x_BxNxD, "text_q"), "text_q_norm")
        text = context["text_BxSxD"]
        k, v = normed(dense(text, "text_k"), "text_k_norm"), heads(dense(text, "text_v"))
        o, _ = attend_text(q, k, v, context["prompt_tag"], context["text_tag"])
        if m.image_width:
            image = context["image_BxIxD"]
            k, v = normed(dense(image, "image_k"), "image_k_norm"), heads(dense(image, "image_v"))
            o = o + attend_text(q, k, v, context["prompt_tag"], context["image_tag"])[0]
        h_BxNxD = h_BxNxD + dense(o.reshape(B, N, D), "text_o")

    x_BxNxD = layer_norm(h_BxNxD) * (1 + scale2) + shift2
    h_BxNxD = h_BxNxD + gate2 * dense(nn.gelu(dense(x_BxNxD, "mlp_in")), "mlp_out")
    return h_BxNxD if past is None else (h_BxNxD, new)


def _dense(module, name, n_in, n_out, zero=False, normal=None):
    """A dense layer on `module`'s own parameters: name [in, out] and name_bias [out]; xavier unless told otherwise."""
    init = nn.initializers.zeros if zero else nn.initializers.xavier_uniform()
    weight = module.param(name, nn.initializers.normal(normal) if normal else init, (n_in, n_out), jnp.float32)
    bias = module.param(f"{name}_bias", nn.initializers.zeros, (n_out,), jnp.float32)
    return lambda x: _product(module, x, along(module.mesh, weight.astype(x.dtype))) + bias.astype(x.dtype)


def _product(m: DiT, x_, w):
    """x @ w; where N is cut, without the flattening of `matmul`, for which devices would have to gather rows."""
    return x_ @ w if m.mesh is not None and m.mesh.shape["sequence"] > 1 else matmul(x_, w)


def sincos(index_, width: int):
    """One axis of a position table at any real index: [sin | cos]."""
    cos, sin = jnp.split(sinusoids(index_, width), 2, -1)
    return jnp.concatenate([sin, cos], -1)


def sincos_table(index_BxNx3, width: int):
    """DiT's position table at any real (y, x): the first half of the dims is the column's."""
    return jnp.concatenate([sincos(index_BxNx3[..., axis], width // 2) for axis in (2, 1)], -1)


def group_prompts(patches: Patches):
    """prompt_BxG: which prompt the patches of each group see; 0 for a group without patches."""
    mine_BxGxN = patches.group_BxN[:, None, :] == jnp.arange(patches.seg_BxG.shape[1])[:, None]
    mine_BxGxN &= patches.seg_BxN[:, None, :] != 0
    return jnp.where(mine_BxGxN, patches.prompt_BxN[:, None, :], 0).max(-1)


def pool(text_BxSxE, prompt_BxS, prompt_BxG):
    """The mean of each group's prompt's tokens, pooled_BxGxE; 0 for a group without tokens."""
    mine_BxGxS = (prompt_BxG[:, :, None] == prompt_BxS[:, None, :]) & (prompt_BxS[:, None, :] != 0)
    count_BxGx1 = jnp.maximum(mine_BxGxS.sum(-1, keepdims=True), 1)
    return jnp.einsum("bgs,bse->bge", mine_BxGxS.astype(text_BxSxE.dtype), text_BxSxE) / count_BxGx1


def split_output(out_BxNxO, values: int, cells: int):
    """The prediction out_BxNxP, P = values, and what stands beside it in each cell's channels (learned variances)."""
    parts = jnp.split(out_BxNxO.reshape(*out_BxNxO.shape[:2], cells, -1), [values // cells], -1)
    return [part.reshape(*out_BxNxO.shape[:2], -1) for part in parts]


def to_velocity(out_BxNxP, z_BxNxP, level_BxN, predict: str, s_min: float = 0.05):
    """The velocity v = e - x from what the network gives at z = (1 - s) x + s e: 'v', 'x' or 'e'.

    Below s_min an output of x has its optimum at x + (s - s_min) v, not at x: a sampler must divide as training did.
    """
    s = level_BxN[..., None]
    if predict == "x":
        return (z_BxNxP - out_BxNxP) / jnp.maximum(s, s_min)
    if predict == "e":
        return (out_BxNxP - z_BxNxP) / jnp.maximum(1 - s, s_min)
    if predict == "v":
        return out_BxNxP
    raise ValueError(f"model.predict={predict!r} is not known. Allowed: 'x', 'v', 'e', 'ddpm'.")


def macs(m: DiT, clip_lengths, text_lengths=(), groups: int = 1) -> int:
    """Multiply-accumulates of one forward pass over clips of the given numbers of patches and text tokens.

    Only the pairs that segments allow are counted, so the figure is the model's work, not the kernel's. For DiT it
    is L(12ND^2 + 2N^2D + 6D^2) + N*C*p^2*D + 256D + D^2 + 2D^2 + 2N*D*p^2*C.
    """
    D, L, N, S = m.width, m.depth, sum(clip_lengths), sum(text_lengths)
    pairs = sum(n * n for n in clip_lengths)
    layer = 4 * N * D * D + 2 * pairs * D + 2 * N * D * m.mlp_width
    total = N * (m.patch_values + m.out_values) * D + groups * (m.level_features * D + D * D)
    if m.position == "both":
        total += N * 6 * POSITION_FEATURES * D
    if m.modulation == "shared":
        total += groups * 6 * D * D
    else:
        layer += groups * 6 * D * D
        total += groups * 2 * D * D
    if m.text == "cross":
        layer += 2 * N * D * D + 2 * S * D * D + 2 * D * sum(n * s for n, s in zip(clip_lengths, text_lengths))
        total += S * (m.text_width * D + D * D)
    return L * layer + total


def make_model(config, channels: int, span: int | None = None, mesh=None) -> DiT:
    """The DiT of `config.model` over a codec's channels; span: the longest clip's patches, promised by the packer.

    mesh: the devices that the rows' arrays lie along; None = attention needs no word of where they lie.
    """
    m = config.model
    if m.width % m.heads or (m.position != "table" and (m.width // m.heads) % 2):
        raise ValueError(f"model.width={m.width} does not split into model.heads={m.heads} heads of even width.")
    if m.position not in ("rope", "table", "both"):
        raise ValueError(f"model.position={m.position!r} is not known. Allowed: 'rope', 'table', 'both'.")
    if m.window < 0 or (config.flow.causal_share and not m.window):
        raise ValueError(
            f"model.window={m.window} with flow.causal_share={config.flow.causal_share}: a causal clip's frames need a "
            "window. Give 1 latent frame or more; 0 only where no clip is causal."
        )
    if config.flow.causal_share and config.data.group_by != "frame":
        raise ValueError(
            f"flow.causal_share={config.flow.causal_share} needs a level for each latent frame, and data.group_by="
            f"{config.data.group_by!r}. Give 'frame'."
        )
    if m.text == "pooled" and config.text.width != m.width:
        raise ValueError(f"text.width={config.text.width} must equal model.width={m.width} where text is pooled.")
    cells = int(np.prod(m.patch))
    return DiT(
        patch_values=cells * channels,
        out_values=cells * (m.out_channels or channels),
        text_width=config.text.width,
        pos_scale=tuple(m.pos_scale),
        pos_offset=tuple(m.pos_offset),
        attention_pattern=tuple(m.attention_pattern),
        dtype=jnp.dtype(m.dtype),
        span=span,
        window=m.window or None,
        mesh=mesh,
        exchange=config.mesh.exchange,
        **{
            key: m[key]
            for key in "width depth heads mlp_width modulation position qk_norm text text_norm text_pool image_width "
            "level_scale level_direction rope_theta canvas_most remat unroll".split()
        },
    )


def make_velocity(model: DiT, config):
    """velocity(params_dit, patches, cond, cache=None) -> v_BxNxP, cache: the model's only face, whatever it predicts.

    v is float32. cache: see `empty_cache`; without one, None comes back.
    """

    def velocity(params, patches: Patches, cond: Cond | None, cache: Cache | None = None):
        out = model.apply({"params": params}, patches, cond, cache)
        out, cache = (out, None) if cache is None else out
        out = split_output(out.astype(jnp.float32), patches.x_BxNxP.shape[-1], int(np.prod(config.model.patch)))[0]
        level_BxN = spread(patches.level_BxG[..., None], patches.group_BxN)[..., 0]
        return to_velocity(out, patches.x_BxNxP, level_BxN, config.model.predict, config.model.s_min), cache

    return velocity
