"""CLIP's text model (Radford et al. 2021, sec. 2.4), as it was published.

B prompts, S tokens of each, E width, J width of the space shared with images, H heads, F width of the feed-forward,
L layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_video.attention import attend, layer_norm


class CLIPText(nn.Module):
    """Pre-norm layers in which a token sees those before it. Weights are stacked, [L, in, out], and scanned.

    length: the most tokens that have a position. end: the id of end-of-text, whose first place is the prompt's pooled
    embedding. quick_gelu: x sigmoid(1.702 x) in place of the exact GELU. projection: J, or 0 where there is none.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    length: int
    end: int
    quick_gelu: bool
    projection: int = 0

    @nn.compact
    def __call__(self, ids_BxS, real_BxS=None):
        """text_BxSxE after the last norm, pooled_BxE, and projected_BxJ (None without a projection), of int ids.

        real_BxS: tokens that may be seen; by default all, as the published models were trained.
        Raises ValueError for more tokens than there are positions.
        """
        (B, S), L, E, F = ids_BxS.shape, self.depth, self.width, self.mlp_width
        if S > self.length:
            raise ValueError(f"{S} tokens, and the model has positions for {self.length}: cut the prompt.")
        matrix, normal = nn.initializers.lecun_normal(batch_axis=(0,)), nn.initializers.normal(0.02)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        weights = {}
        for name, n_in, n_out in (*((x, E, E) for x in "qkvo"), ("mlp_in", E, F), ("mlp_out", F, E)):
            weights[name] = self.param(f"block_{name}", matrix, (L, n_in, n_out))
            weights[f"{name}_bias"] = self.param(f"block_{name}_bias", zeros, (L, n_out))
        for name in ("norm", "mlp_norm"):
            weights[f"{name}_gain"] = self.param(f"block_{name}_gain", ones, (L, E))
            weights[f"{name}_bias"] = self.param(f"block_{name}_bias", zeros, (L, E))

        place_BxS = jnp.broadcast_to(jnp.arange(S), (B, S))
        seen_BxS = jnp.ones((B, S), jnp.int32) if real_BxS is None else (real_BxS != 0).astype(jnp.int32)
        q_tag, k_tag = (jnp.ones((B, S), jnp.int32), place_BxS), (seen_BxS, place_BxS)
        gelu = (lambda x: x * nn.sigmoid(1.702 * x)) if self.quick_gelu else (lambda x: nn.gelu(x, approximate=False))

        def layer(h_BxSxE, w):
            dense = lambda x, name: x @ w[name] + w[f"{name}_bias"]
            norm = lambda x, name: layer_norm(x, 1e-5) * w[f"{name}_gain"] + w[f"{name}_bias"]
            x_BxSxE = norm(h_BxSxE, "norm")
            q, k, v = (dense(x_BxSxE, name).reshape(B, S, self.heads, -1) for name in "qkv")
            o_BxSxHxK, _ = attend(q, k, v, q_tag, k_tag)
            h_BxSxE = h_BxSxE + dense(o_BxSxHxK.reshape(B, S, E), "o")
            return h_BxSxE + dense(gelu(dense(norm(h_BxSxE, "mlp_norm"), "mlp_in")), "mlp_out"), None

        h_BxSxE = self.param("embed", normal, (self.vocabulary, E))[ids_BxS]
        h_BxSxE = h_BxSxE + self.param("position", normal, (self.length, E))[:S]
        h_BxSxE, _ = jax.lax.scan(layer, h_BxSxE, weights)
        gain_E, bias_E = self.param("norm_gain", ones, (E,)), self.param("norm_bias", zeros, (E,))
        text_BxSxE = layer_norm(h_BxSxE, 1e-5) * gain_E + bias_E
        pooled_BxE = text_BxSxE[jnp.arange(B), jnp.argmax(ids_BxS == self.end, axis=1)]
        if not self.projection:
            return text_BxSxE, pooled_BxE, None
        return text_BxSxE, pooled_BxE, pooled_BxE @ self.param("projection", normal, (E, self.projection))
