"""The embedded world of moving shapes, drawn on the fly.

python -m dit_video.train --config=configs/shapes.py --workdir=runs/shapes
python -m dit_video.train --config=configs/shapes.py:quick --workdir=runs/quick
python -m dit_video.train --config=configs/shapes.py:tasks --workdir=runs/tasks

On 2 CPU cores the first takes under two hours, and its model follows 99% of prompts with one object, 95% with two
(experiments/shapes/README.md); the second takes 10 minutes and follows 56% of those with one;
the third, for every task, takes two hours. experiments/tasks has how well a model does each task.
"""

from configs import base


def get_config(form="long"):
    base.check_form(form, ("long", "quick", "tasks"))
    config = base.get_config()
    config.name = f"shapes-{form}"
    config.data.rows, config.data.shards = 9, 3
    config.data.length, config.data.groups, config.data.text_length = 256, 16, 80
    config.data.waiting, config.data.still_share = 128, 0.1
    config.model.width, config.model.depth, config.model.heads, config.model.mlp_width = 192, 4, 3, 768
    config.model.text_pool = True
    config.flow.mean, config.flow.weight_floor = 1.5, 0.5
    config.optimizer.kind, config.optimizer.muon_lr = "muon", 0.03
    config.optimizer.decay, config.optimizer.ema = 0.6, 0.998
    config.sample.shift = 3.0
    config.steps, config.eval_every, config.sample_every = 12_000, 1000, 4000
    if form == "quick":
        config.steps, config.eval_every, config.sample_every = 1080, 0, 0
        config.data.pair_share, config.data.still_share, config.data.large = 0.0, 0.05, True
        config.flow.mixture.first = 0.0
        config.optimizer.warmup, config.optimizer.ema = 40, 0.99
    if form == "tasks":
        config.steps = 13_100
        # Text bears a share of the clips this small here.
        known = {"prefix": 0.10, "suffix": 0.10, "ends": 0.08, "light": 0.02, "box": 0.10}
        config.flow.mixture.update(base.EVERY_TASK | known)
        config.flow.causal_share, config.model.window = 0.1, 3
        config.model.canvas_most = 64.0
        config.sample.guidance_given, config.sample.history_given = 1.5, 1.5
        # The last 1,100 steps, at rates that rise once more: two objects, both ends known and what comes next.
        config.late, config.optimizer.restart, config.data.late_pair_share = 0.084, 0.084, 0.85
        known = {"first": 0.05, "prefix": 0.15, "suffix": 0.12, "ends": 0.28, "every": 0.02, "light": 0.02}
        config.flow.late_mixture.update(known | {"box": 0.10, "forcing": 0.06})
    return config
