"""The embedded world of moving shapes, drawn on the fly.

python -m dit_video.train --config=configs/shapes.py --workdir=runs/shapes
python -m dit_video.train --config=configs/shapes.py:quick --workdir=runs/quick
"""

from configs import base


def get_config(form="long"):
    config = base.get_config()
    config.name = f"shapes-{form}"
    config.data.rows, config.data.shards = 6, 2
    config.data.length, config.data.groups, config.data.text_length = 384, 24, 112
    config.data.still_share = 0.1
    config.model.width, config.model.depth, config.model.heads, config.model.mlp_width = 192, 4, 3, 768
    config.model.text_pool = True
    config.optimizer.kind, config.optimizer.muon_lr = "muon", 0.03
    config.optimizer.decay, config.optimizer.ema = 0.4, 0.995
    config.steps, config.eval_every, config.sample_every = 2000, 500, 500
    if form == "quick":
        config.steps, config.eval_every, config.sample_every = 680, 0, 0
        config.data.pair_share = 0.25
        config.optimizer.warmup, config.optimizer.ema = 40, 0.99
    return config
