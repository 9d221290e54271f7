"""DiT, SiT, Latte and Wan, and the diffusion they are trained with, once more in numpy and float64, from their papers.

What the model is held against where no reference array is at hand. F frames, C channels, N tokens of a frame, D model
width, T timesteps. Keywords are what a wrong reading would take for something else; tests plant each.
"""

import numpy as np


def exact_gelu(x):
    t = 1 / (1 + 0.3275911 * np.abs(x) / np.sqrt(2))  # Abramowitz and Stegun, 7.1.26: erf to 1.5e-7
    series = np.polyval([1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0], t)
    return x / 2 * (1 + np.sign(x) * (1 - series * np.exp(-x * x / 2)))


def tanh_gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def sines(index, width: int):
    angles = np.outer(index, 10_000.0 ** (-np.arange(width // 2) / (width // 2)))
    return np.sin(angles), np.cos(angles)


def place_table(side: int, D: int, column_first: bool = True):
    """N x D: half of the dims for the column, half for the row, each [sin | cos]."""
    y, x = np.indices((side, side)).reshape(2, -1)
    return np.hstack([*sines(x if column_first else y, D // 2), *sines(y if column_first else x, D // 2)])


def time_table(frames: int, D: int):
    return np.hstack(sines(np.arange(frames), D))


def norm(h, eps):
    return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + eps)


def attention(x_BxNxD, qkv, proj, heads: int):
    B, N, D = x_BxNxD.shape
    q, k, v = (x_BxNxD @ qkv[0].T + qkv[1]).reshape(B, N, 3, heads, D // heads).transpose(2, 0, 3, 1, 4)
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(D // heads)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    o = weights / weights.sum(-1, keepdims=True) @ v
    return o.swapaxes(1, 2).reshape(B, N, D) @ proj[0].T + proj[1]


def forward(
    state, config, x_FxCxYxX, t, y, *, eps=1e-6, gelu=tanh_gelu, shift_first=True, column_first=True,
    space_first=True, times_before=1,
):  # fmt: skip
    """The raw output of one clip, F x O x Y x X, from the published weights; y = None has no label.

    Frames are apart where the configuration has no num_frames; else blocks attend over space and over time in turn, and
    the table of times is added before block `times_before`.
    """
    w = lambda name: (state[f"{name}.weight"].astype(np.float64), state[f"{name}.bias"].astype(np.float64))
    dense = lambda name, x: x @ w(name)[0].T + w(name)[1]
    silu = lambda x: x / (1 + np.exp(-x))
    D, p, heads = config["hidden_size"], config["patch_size"], config["num_heads"]
    F, C, Y, X = x_FxCxYxX.shape

    kernel, bias = w("x_embedder.proj")
    cells = x_FxCxYxX.astype(np.float64).reshape(F, C, Y // p, p, X // p, p)
    h = np.einsum("fcyaxb,dcab->fyxd", cells, kernel).reshape(F, -1, D) + bias + place_table(Y // p, D, column_first)
    sin, cos = sines([t], 256)
    c = dense("t_embedder.mlp.2", silu(dense("t_embedder.mlp.0", np.hstack([cos, sin]))))[0]
    if y is not None:
        c = c + state["y_embedder.embedding_table.weight"][y]

    def modulate(h, shift, scale):
        if not shift_first:
            shift, scale = scale, shift
        return norm(h, eps) * (1 + scale) + shift

    for i in range(config["depth"]):
        over_time = "num_frames" in config and i % 2 == int(space_first)
        if "num_frames" in config and i == times_before:
            h = h + time_table(F, D)[:, None]
        name = f"blocks.{i}"
        parts = np.split(dense(f"{name}.adaLN_modulation.1", silu(c)), 6)
        x = modulate(h, *parts[:2])
        x = x.swapaxes(0, 1) if over_time else x
        o = attention(x, w(f"{name}.attn.qkv"), w(f"{name}.attn.proj"), heads)
        h = h + parts[2] * (o.swapaxes(0, 1) if over_time else o)
        h = h + parts[5] * dense(f"{name}.mlp.fc2", gelu(dense(f"{name}.mlp.fc1", modulate(h, *parts[3:5]))))
    out = dense("final_layer.linear", modulate(h, *np.split(dense("final_layer.adaLN_modulation.1", silu(c)), 2)))
    return out.reshape(F, Y // p, X // p, p, p, -1).transpose(0, 5, 1, 3, 2, 4).reshape(F, -1, Y, X)


# Wan


def rotated(x_NxHxK, index_Nx3, interleaved=True, dims=None):
    """RoPE over (t, y, x): a head's pairs (2i, 2i + 1), or (i, i + K/2), turned; dims: of each axis."""
    K = x_NxHxK.shape[-1]
    dims = dims or (K - 4 * (K // 6), 2 * (K // 6), 2 * (K // 6))
    angles = np.hstack([np.outer(i, 10_000.0 ** (-np.arange(0, d, 2) / d)) for i, d in zip(index_Nx3.T, dims)])
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = (x_NxHxK[..., ::2], x_NxHxK[..., 1::2]) if interleaved else np.split(x_NxHxK, 2, -1)
    pair = a * cos - b * sin, a * sin + b * cos
    return np.stack(pair, -1).reshape(x_NxHxK.shape) if interleaved else np.concatenate(pair, -1)


def wan_forward(
    state, config, x_CxTxYxX, t, text_SxE, image_IxE=None, *, eps=1e-6, gelu=tanh_gelu, shift_first=True,
    interleaved=True, dims=None, per_head=False, last_silu=False, image_gelu=exact_gelu, gate_text=False,
):  # fmt: skip
    """The output of one clip, C x T x Y x X, from the published weights (Wan 2.1, 2025, sec. 4.2, fig. 10)."""
    w = lambda name: state[name].astype(np.float64)
    dense = lambda name, x: x @ w(f"{name}.weight").T + w(f"{name}.bias")
    affine = lambda name, x, eps: norm(x, eps) * w(f"{name}.weight") + w(f"{name}.bias")
    silu = lambda x: x / (1 + np.exp(-x))
    H, K, patch = config["num_attention_heads"], config["attention_head_dim"], config["patch_size"]
    C, *shape = x_CxTxYxX.shape
    grid = [n // p for n, p in zip(shape, patch)]
    heads = lambda x: x.reshape(len(x), H, K)

    def rms(name, x):
        x, gain = (heads(x), w(name).reshape(H, K)) if per_head else (x, w(name))
        return heads(x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain)

    def softmax(q, k, v):
        logits = np.einsum("nhk,mhk->hnm", q, k) / np.sqrt(K)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("hnm,mhk->nhk", weights / weights.sum(-1, keepdims=True), v).reshape(len(q), -1)

    cells = x_CxTxYxX.astype(np.float64).reshape(C, grid[0], patch[0], grid[1], patch[1], grid[2], patch[2])
    kernel = w("patch_embedding.weight")
    h = np.einsum("ctaubvd,ecabd->tuve", cells, kernel).reshape(-1, len(kernel))
    h = h + w("patch_embedding.bias")
    index_Nx3 = np.indices(grid).reshape(3, -1).T
    sin, cos = sines([t], config["freq_dim"])
    embed = "condition_embedder"
    temb = dense(
        f"{embed}.time_embedder.linear_2", silu(dense(f"{embed}.time_embedder.linear_1", np.hstack([cos, sin])))
    )
    mod = dense(f"{embed}.time_proj", silu(temb)).reshape(6, -1)
    text = dense(
        f"{embed}.text_embedder.linear_2", gelu(dense(f"{embed}.text_embedder.linear_1", text_SxE.astype(float)))
    )
    if image_IxE is not None:
        image = affine(f"{embed}.image_embedder.norm1", image_IxE.astype(np.float64), 1e-5)
        image = dense(
            f"{embed}.image_embedder.ff.net.2", image_gelu(dense(f"{embed}.image_embedder.ff.net.0.proj", image))
        )
        image = affine(f"{embed}.image_embedder.norm2", image, 1e-5)

    def modulate(h, shift, scale):
        if not shift_first:
            shift, scale = scale, shift
        return norm(h, eps) * (1 + scale) + shift

    for i in range(config["num_layers"]):
        name = f"blocks.{i}"
        parts = w(f"{name}.scale_shift_table")[0] + mod
        x = modulate(h, *parts[:2])
        q, k = (rms(f"{name}.attn1.norm_{a}.weight", dense(f"{name}.attn1.to_{a}", x)) for a in "qk")
        q, k = (rotated(a, index_Nx3, interleaved, dims) for a in (q, k))
        h = h + parts[2] * dense(f"{name}.attn1.to_out.0", softmax(q, k, heads(dense(f"{name}.attn1.to_v", x))))
        x = affine(f"{name}.norm2", h, eps)
        q = rms(f"{name}.attn2.norm_q.weight", dense(f"{name}.attn2.to_q", x))
        k = rms(f"{name}.attn2.norm_k.weight", dense(f"{name}.attn2.to_k", text))
        o = softmax(q, k, heads(dense(f"{name}.attn2.to_v", text)))
        if image_IxE is not None:
            k = rms(f"{name}.attn2.norm_added_k.weight", dense(f"{name}.attn2.add_k_proj", image))
            o = o + softmax(q, k, heads(dense(f"{name}.attn2.add_v_proj", image)))
        h = h + (parts[2] if gate_text else 1) * dense(f"{name}.attn2.to_out.0", o)
        x = modulate(h, *parts[3:5])
        h = h + parts[5] * dense(f"{name}.ffn.net.2", gelu(dense(f"{name}.ffn.net.0.proj", x)))
    out = dense("proj_out", modulate(h, *(w("scale_shift_table")[0] + (silu(temb) if last_silu else temb))))
    out = out.reshape(*grid, *patch, -1)
    return np.einsum("tuvabdc->ctaubvd", out).reshape(-1, *shape)


# Diffusion


def ddpm(x_t, e, t: int, kept, x=None, f=None):
    """What Ho et al. 2020 say of one step of a linear schedule whose timesteps `kept` are left, by Bayes' rule.

    The precision of x_{t-1} given x_t and x is the sum of what each says of it. Returns the mean and variance of the
    posterior, with x from e where x is not given, and with f the variance between the two bounds.
    """
    abar = np.cumprod([1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(1000)])[kept]
    previous = abar[t - 1] if t else 1.0
    alpha = abar[t] / previous
    x = (x_t - np.sqrt(1 - abar[t]) * e) / np.sqrt(abar[t]) if x is None else x
    if t == 0:
        return x, 0.0
    precision = alpha / (1 - alpha) + 1 / (1 - previous)
    mean = (np.sqrt(alpha) / (1 - alpha) * x_t + np.sqrt(previous) / (1 - previous) * x) / precision
    variance = 1 / precision
    return mean, variance if f is None else variance * ((1 - alpha) / variance) ** ((f + 1) / 2)
