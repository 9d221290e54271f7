"""Stable Diffusion's image autoencoder and Wan's of video, 2.1 and 2.2, once more in numpy and float64, whole clips at
a time, from their published weights.

What the codecs are held against where no reference array is at hand. C channels first, T x Y x X the grid. Keywords are
what a wrong reading would take for something else; tests plant each.
"""

import functools

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def convolve(x_CxTxYxX, weight, bias, pads, stride=(1, 1, 1)):
    """out[o, t, y, x] = sum of weight[o, c, i, j, k] x[c, t st + i, y sy + j, x sx + k], zeros around."""
    weight = weight if weight.ndim == 5 else weight[:, :, None]
    x = np.pad(x_CxTxYxX, [(0, 0), *pads])
    size = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:], weight.shape[2:], stride)]
    out = np.zeros((len(weight), *size)) + bias[:, None, None, None]
    for window in np.ndindex(*weight.shape[2:]):
        at = tuple(slice(i, i + s * (n - 1) + 1, s) for i, n, s in zip(window, size, stride))
        out += np.einsum("oc,ctyx->otyx", weight[(..., *window)], x[(slice(None), *at)])
    return out


def attend(x_CxTxYxX, qkv, scale=None):
    """Of each frame's pixels to one another, one head."""
    C, T, Y, X = x_CxTxYxX.shape
    out = np.empty_like(x_CxTxYxX)
    for t in range(T):
        q, k, v = qkv(x_CxTxYxX[:, t].reshape(C, -1).T)
        logits = q @ k.T * (C**-0.5 if scale is None else scale)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[:, t] = (weights / weights.sum(-1, keepdims=True) @ v).T.reshape(C, Y, X)
    return out


class Weights:
    """A state dict in float64, and convolutions by their names."""

    def __init__(self, state):
        self.state = {name: w.astype(np.float64) for name, w in state.items()}

    def __call__(self, name, kind="weight"):
        return self.state[f"{name}.{kind}"]

    def conv(self, name, x, pads=((0, 0), (1, 1), (1, 1)), stride=(1, 1, 1)):
        return convolve(x, self(name), self(name, "bias"), pads, stride)

    def pixel(self, name, x):
        return self.conv(name, x, ((0, 0),) * 3)

    def dense(self, name, x):
        return x @ self(name).T + self(name, "bias")

    def residual(self, name, x, norm, conv):
        y = conv(f"{name}.conv1", silu(norm(f"{name}.norm1", x)))
        y = conv(f"{name}.conv2", silu(norm(f"{name}.norm2", y)))
        return y + (self.pixel(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in self.state else x)


def kl(state, config, x_CxTxYxX, part, *, eps=1e-6, halving_pads=(0, 1), scale=None):
    """moments_2CxTxYxX of images ('encoder'), or images of latents ('decoder'); T images, each alone."""
    w, groups = Weights(state), config["norm_num_groups"]

    def norm(name, x):
        C, *shape = x.shape
        x = np.moveaxis(x, 1, 0).reshape(shape[0], groups, -1)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        gain, bias = (w(name, kind)[:, None, None, None] for kind in ("weight", "bias"))
        return np.moveaxis(x.reshape(shape[0], C, *shape[1:]), 0, 1) * gain + bias

    residual = functools.partial(w.residual, norm=norm, conv=w.conv)

    def middle(x):
        at = f"{part}.mid_block.attentions.0"
        x = residual(f"{part}.mid_block.resnets.0", x)
        o = attend(norm(f"{at}.group_norm", x), lambda h: [w.dense(f"{at}.to_{a}", h) for a in "qkv"], scale)
        o = np.moveaxis(w.dense(f"{at}.to_out.0", np.moveaxis(o, 0, -1)), -1, 0)
        return residual(f"{part}.mid_block.resnets.1", x + o)

    x, levels = x_CxTxYxX.astype(np.float64), len(config["block_out_channels"])
    x = w.conv(f"{part}.conv_in", x if part == "encoder" else w.pixel("post_quant_conv", x))
    x = x if part == "encoder" else middle(x)
    blocks, more = ("down_blocks", 0) if part == "encoder" else ("up_blocks", 1)
    for i in range(levels):
        for j in range(config["layers_per_block"] + more):
            x = residual(f"{part}.{blocks}.{i}.resnets.{j}", x)
        if i < levels - 1 and part == "encoder":
            pads = ((0, 0), halving_pads, halving_pads)
            x = w.conv(f"{part}.{blocks}.{i}.downsamplers.0.conv", x, pads, (1, 2, 2))
        elif i < levels - 1:
            x = w.conv(f"{part}.{blocks}.{i}.upsamplers.0.conv", x.repeat(2, 2).repeat(2, 3))
    x = middle(x) if part == "encoder" else x
    x = w.conv(f"{part}.conv_out", silu(norm(f"{part}.conv_norm_out", x)))
    return w.pixel("quant_conv", x) if part == "encoder" else x


def wan(
    state, config, x_CxTxYxX, part, *, pair_outer=True, causal=True, halving_pads=(0, 1), first_in=False, scale=None
):
    """moments_2CxTxYxX of a video ('encoder'), or the video of latents ('decoder'), not clipped."""
    w, carried, p = Weights(state), config.get("is_residual", False), config.get("patch_size") or 1
    in_time, depth = config["temperal_downsample"], config["num_res_blocks"]
    in_space = ((0, 0), (1, 1), (1, 1))

    def norm(name, x):
        return x / np.maximum(np.sqrt((x**2).sum(0)), 1e-12) * np.sqrt(len(x)) * w(name, "gamma").reshape(-1, 1, 1, 1)

    def conv(name, x):
        return w.conv(name, x, ((2, 0) if causal else (1, 1), (1, 1), (1, 1)))

    residual = functools.partial(w.residual, norm=norm, conv=conv)

    def middle(x):
        at = f"{part}.mid_block.attentions.0"
        x = residual(f"{part}.mid_block.resnets.0", x)
        qkv, bias = w(f"{at}.to_qkv")[:, :, 0, 0], w(f"{at}.to_qkv", "bias")
        o = attend(norm(f"{at}.norm", x), lambda h: np.split(h @ qkv.T + bias, 3, -1), scale)
        return residual(f"{part}.mid_block.resnets.1", x + w.pixel(f"{at}.proj", o))

    def halve(name, x, time):
        x = w.conv(f"{name}.resample.1", x, ((0, 0), halving_pads, halving_pads), (1, 2, 2))
        if not time or x.shape[1] < 3:
            return x
        return np.concatenate([x[:, :1], w.conv(f"{name}.time_conv", x, ((0, 0),) * 3, (2, 1, 1))], 1)

    def double(name, x, time):
        if time and x.shape[1] > 1:
            y = w.conv(f"{name}.time_conv", x if first_in else x[:, 1:], ((2, 0), (0, 0), (0, 0)))[:, first_in:]
            y = y.reshape(2, -1, *y.shape[1:]) if pair_outer else y.reshape(-1, 2, *y.shape[1:]).swapaxes(0, 1)
            pairs = np.stack([y[0], y[1]], 2).reshape(y.shape[1], -1, *y.shape[3:])
            x = np.concatenate([x[:, :1], pairs], 1)
        return w.conv(f"{name}.resample.1", x.repeat(2, 2).repeat(2, 3), in_space)

    def averaged(x, st, s, width):  # zeros before frame 0 fill its block
        x = np.pad(x, [(0, 0), (-x.shape[1] % st, 0), (0, 0), (0, 0)])
        C, T, Y, X = x.shape
        x = x.reshape(C, T // st, st, Y // s, s, X // s, s).transpose(0, 2, 4, 6, 1, 3, 5)
        return x.reshape(width, -1, T // st, Y // s, X // s).mean(1)

    def repeated(x, st, s, width):  # of frame 0's copies the last is taken
        x = x.repeat(width * st * s * s // len(x), 0)
        x = x.reshape(width, st, s, s, *x.shape[1:]).transpose(0, 4, 1, 5, 2, 6, 3)
        return x.reshape(width, x.shape[1] * st, x.shape[3] * s, -1)[:, st - 1 :]

    x, levels = x_CxTxYxX.astype(np.float64), len(config["dim_mult"])
    if part == "encoder":
        C, T, Y, X = x.shape
        x = x.reshape(C, T, Y // p, p, X // p, p).transpose(0, 5, 3, 1, 2, 4).reshape(-1, T, Y // p, X // p)
        x = conv("encoder.conv_in", x)
        for i in range(levels):
            before, name = x, f"encoder.down_blocks.{i}"
            flat = [f"encoder.down_blocks.{i * (depth + 1) + j}" for j in range(depth + 1)]
            for j in range(depth):
                x = residual(f"{name}.resnets.{j}" if carried else flat[j], x)
            time = i < levels - 1 and in_time[i]
            if i < levels - 1:
                x = halve(f"{name}.downsampler" if carried else flat[depth], x, time)
            if carried:
                x = x + averaged(before, 1 + time, 1 + (i < levels - 1), len(x))
        x = conv("encoder.conv_out", silu(norm("encoder.norm_out", middle(x))))
        return w.pixel("quant_conv", x)

    x = middle(conv("decoder.conv_in", w.pixel("post_quant_conv", x)))
    for i in range(levels):
        before, name = x, f"decoder.up_blocks.{i}"
        for j in range(depth + 1):
            x = residual(f"{name}.resnets.{j}", x)
        if i < levels - 1:
            time = in_time[::-1][i]
            x = double(f"{name}.upsampler" if carried else f"{name}.upsamplers.0", x, time)
            if carried:
                x = x + repeated(before, 1 + time, 2, len(x))
    x = conv("decoder.conv_out", silu(norm("decoder.norm_out", x)))
    _, T, Y, X = x.shape
    return x.reshape(3, p, p, T, Y, X).transpose(0, 3, 4, 2, 5, 1).reshape(3, T, Y * p, X * p)
