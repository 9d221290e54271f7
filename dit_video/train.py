"""python -m dit_video.train --config=configs/shapes.py --workdir=runs/shapes [--config.optimizer.lr=3e-4 ...]

Trains, or goes on with, a run. Exit codes: 0 finished, 75 saved after SIGTERM or SIGINT (type the command again),
1 anything else.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's checkpoints, metrics and gallery go; may be remote.")


def main(_):
    from dit_video import launch, trainer

    launch.prepare()
    try:
        trainer.train(CONFIG.value, WORKDIR.value)
    except (ValueError, FloatingPointError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def run():
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)


if __name__ == "__main__":
    run()
