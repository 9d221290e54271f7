"""DiT S, B, L and XL with patches of 2, 4 and 8 latents, class-conditional (Peebles and Xie 2023, table 1).

    --config=configs/dit.py:XL/2

The same class as every other config: `modulation='block'`, a sin-cos table for positions, labels pooled into the
level's embedding. Latents have 4 channels and a stride of 8 pixels, as the published models' autoencoder gives them.
"""

from configs import base

# Depth, width, heads.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def get_config(form="S/2"):
    size, patch = form.split("/")
    config = base.get_config()
    config.name = f"DiT-{form}"
    config.codec.kind, config.codec.stride, config.codec.channels = "latents", (1, 8, 8), 4
    config.text.kind, config.text.width = "labels", SIZES[size][1]
    config.model.depth, config.model.width, config.model.heads = SIZES[size]
    config.model.mlp_width = 4 * config.model.width
    config.model.patch = (1, int(patch), int(patch))
    config.model.out_channels, config.model.predict = 8, "e"
    config.model.modulation, config.model.position = "block", "table"
    config.model.qk_norm, config.model.text = "none", "pooled"
    config.model.pos_scale = (1.0, 1 / (8 * int(patch)), 1 / (8 * int(patch)))
    return config
