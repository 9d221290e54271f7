"""A folder of your own videos and images, each at its own aspect ratio, duration and frame rate.

    python -m dit_video.train --config=configs/clips.py --config.data.root=FOLDER --workdir=runs/clips

Captions come from FOLDER/manifest.jsonl ({"file": ..., "caption": ...} a line), else from a .txt beside each file.
data.max_tokens, data.max_side and data.max_frames say how large a window is read; raise them with the machine.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "clips"
    config.data.kind = "clips"
    config.data.rows, config.data.shards = 2, 2
    config.data.text_length = 512  # true captions are longer than the embedded world's
    config.data.max_side = 96
    config.data.max_tokens = 192
    config.optimizer.kind = "muon"
    config.flow.mixture.update(base.EVERY_TASK)
    return config
