"""Shapes for a pod, to plan with: latents and text embeddings are taken to be made beforehand.

    python -m dit_video.plan --config=configs/scale.py:wan-14B --topology=v5p:4x8x8
    python -m dit_video.plan --config=configs/scale.py:30B --topology=v5p:8x8x16

wan-14B is Wan 2.1's 14B transformer at 1280x720x81: 21x45x80 = 75,600 patches a clip. 30B has rows of 2^20 patches.
What the plans say: experiments/scale/README.md.
"""

from configs import base

# Depth, width, heads, width of the feed-forward; patches of the longest clip and of a row; rows, sequence.
SIZES = {
    # Rows are a little longer than a clip: attention halves its blocks of queries as long as the length divides.
    "wan-14B": (40, 5120, 40, 13824, 75_600, 75_776, 32, 8),
    "30B": (60, 6144, 48, 16384, 2**20, 2**20, 16, 64),
}


def get_config(form="wan-14B"):
    base.check_form(form, SIZES)
    config = base.get_config()
    config.name, d, m = f"scale-{form}", config.data, config.model
    m.depth, m.width, m.heads, m.mlp_width, d.max_tokens, d.length, d.rows, sequence = SIZES[form]
    d.kind, d.text_length, d.groups = "clips", 512, 96
    d.shards = d.rows  # any number of processes that shares the rows out divides it
    config.codec.kind, config.codec.stride, config.codec.channels = "latents", (4, 8, 8), 16
    config.text.kind, config.text.width = "embeddings", 4096
    m.patch, m.pos_scale = (1, 2, 2), (4.0, 1 / 16, 1 / 16)
    m.position, m.qk_norm, m.predict = "rope", "width", "v"
    m.dtype, m.remat = "bfloat16", "full"
    config.optimizer.lr, config.optimizer.weight_decay = 1e-4, 0.1
    config.sample_every = -1  # it is sampled from elsewhere: the first process may hold no whole model
    config.mesh.fsdp, config.mesh.sequence = d.rows, sequence
    return config
