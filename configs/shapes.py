"""The embedded world of moving shapes.

python -m dit_video.train --config=configs/shapes.py --workdir=runs/shapes
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "shapes"
    return config
