"""The encoder of T5 v1.1 and of UMT5 (Raffel et al. 2020; Shazeer 2020; Chung et al. 2023), as they were published.

B prompts, S tokens of each, E width, H heads, K head width, F width of the feed-forward, L layers, R buckets.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_video.attention import rms_norm


class T5Encoder(nn.Module):
    """Pre-norm layers whose attention is not scaled and knows positions by a bias on the logits alone.

    shared_bias: one table of biases for all layers (T5), or one in each (UMT5). buckets, distance: see
    `relative_buckets`. Weights are stacked, [L, in, out], and scanned.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    head_width: int
    mlp_width: int
    shared_bias: bool
    buckets: int = 32
    distance: int = 128

    @nn.compact
    def __call__(self, ids_BxS, real_BxS):
        """text_BxSxE of int ids. real_BxS: which tokens are the prompt's; the others are seen by none."""
        (B, S), L, E, H, F = ids_BxS.shape, self.depth, self.width, self.heads, self.mlp_width
        inner, R = H * self.head_width, self.buckets
        matrix, ones = nn.initializers.lecun_normal(batch_axis=(0,)), nn.initializers.ones
        table = nn.initializers.normal(1.0)
        shapes = {
            "norm": (ones, (L, E)),
            "q": (matrix, (L, E, inner)),
            "k": (matrix, (L, E, inner)),
            "v": (matrix, (L, E, inner)),
            "o": (matrix, (L, inner, E)),
            "mlp_norm": (ones, (L, E)),
            "mlp_gate": (matrix, (L, E, F)),
            "mlp_in": (matrix, (L, E, F)),
            "mlp_out": (matrix, (L, F, E)),
        }
        if self.shared_bias:
            shared_RxH = self.param("bias", table, (R, H))
        else:
            shapes["bias"] = (table, (L, R, H))
        weights = {name: self.param(f"block_{name}", *spec) for name, spec in shapes.items()}
        bucket_SxS = relative_buckets(S, R, self.distance)

        def layer(h_BxSxE, w):
            x_BxSxE = rms_norm(h_BxSxE, w["norm"])
            q, k, v = ((x_BxSxE @ w[name]).reshape(B, S, H, self.head_width) for name in ("q", "k", "v"))
            bias_SxSxH = (shared_RxH if self.shared_bias else w["bias"])[bucket_SxS]
            logits_BxHxSxS = jnp.einsum("bnhk,bmhk->bhnm", q, k) + jnp.moveaxis(bias_SxSxH, -1, 0)
            logits_BxHxSxS = jnp.where(real_BxS[:, None, None], logits_BxHxSxS, jnp.finfo(logits_BxHxSxS.dtype).min)
            o_BxSxHxK = jnp.einsum("bhnm,bmhk->bnhk", jax.nn.softmax(logits_BxHxSxS), v)
            h_BxSxE = h_BxSxE + o_BxSxHxK.reshape(B, S, inner) @ w["o"]
            x_BxSxE = rms_norm(h_BxSxE, w["mlp_norm"])
            x_BxSxF = nn.gelu(x_BxSxE @ w["mlp_gate"], approximate=True) * (x_BxSxE @ w["mlp_in"])
            return h_BxSxE + x_BxSxF @ w["mlp_out"], None

        h_BxSxE = self.param("embed", table, (self.vocabulary, E))[ids_BxS]
        h_BxSxE, _ = jax.lax.scan(layer, h_BxSxE, weights)
        return rms_norm(h_BxSxE, self.param("norm", ones, (E,)))


def relative_buckets(length: int, buckets: int = 32, distance: int = 128) -> np.ndarray:
    """bucket_SxS of the way from each query (row) to each key (Raffel et al. 2020, sec. 2.1).

    Half of the buckets are for keys ahead. Of each half, half are for one distance each and the rest grow with its
    logarithm up to `distance`, beyond which all share the last. In float32, as the published tables are.
    """
    way_SxS = np.arange(length)[None, :] - np.arange(length)[:, None]
    away_SxS, half, exact = np.abs(way_SxS), buckets // 2, buckets // 4
    ratio_SxS = np.maximum(away_SxS, exact).astype(np.float32) / np.float32(exact)
    far_SxS = exact + (np.log(ratio_SxS) / np.float32(math.log(distance / exact)) * (half - exact)).astype(np.int32)
    return np.where(away_SxS < exact, away_SxS, np.minimum(far_SxS, half - 1)) + half * (way_SxS > 0)
