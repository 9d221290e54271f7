"""DiT S, B, L and XL with patches of 2, 4 and 8 latents, class-conditional (Peebles and Xie 2023, table 1).

    python -m dit_video.convert --from=DiT-XL-2-256x256.pt --family=dit --to=dit.safetensors
    python -m dit_video.train --config=configs/dit.py:XL/2 --config.init_from=dit.safetensors --workdir=runs/dit \
        --config.codec.kind=kl --config.codec.weights=kl.safetensors --config.data.root=FOLDER

The folder's pictures have the numbers of their classes as captions. The same class as every other config:
`modulation='block'`, a sin-cos table for positions, labels pooled into the level's embedding. Latents have 4 channels
and a stride of 8 pixels, as the published models' autoencoder gives them. The network gives DDPM's noise, and learns
as it was trained: on the error of the noise, at levels that lie as DDPM's timesteps do, lr 1e-4 and no decay
(sec. 4). Of the variances, the second half of its output, training and our samplers know nothing.
"""

from configs import base

# Depth, width, heads.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def get_config(form="S/2"):
    base.check_form(form, [f"{size}/{patch}" for size in SIZES for patch in (2, 4, 8)])
    size, patch = form.split("/")
    config = base.get_config()
    config.name = f"DiT-{form}"
    config.codec.kind, config.codec.stride, config.codec.channels = "latents", (1, 8, 8), 4
    config.text.kind, config.text.width = "labels", SIZES[size][1]
    config.model.depth, config.model.width, config.model.heads = SIZES[size]
    config.model.mlp_width = 4 * config.model.width
    config.model.patch = (1, int(patch), int(patch))
    config.model.out_channels, config.model.predict = 8, "ddpm"
    config.model.modulation, config.model.position = "block", "table"
    config.model.qk_norm, config.model.text = "none", "pooled"
    config.model.pos_scale = (0.0, 1 / (8 * int(patch)), 1 / (8 * int(patch)))
    config.data.kind, config.data.max_frames, config.data.max_side, config.data.min_side = "clips", 1, 256, 128
    config.data.max_tokens = (32 // int(patch)) ** 2
    # The logit of the level, log(sigma / alpha), over DDPM's thousand timesteps: its mean and its deviation.
    config.flow.distribution, config.flow.mean, config.flow.deviation = "logit_normal", 1.35, 1.94
    config.optimizer.lr, config.optimizer.decay, config.optimizer.weight_decay = 1e-4, 0.0, 0.0
    config.optimizer.b2, config.optimizer.ema = 0.999, 0.9999
    return config
