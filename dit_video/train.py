"""python -m dit_video.train --config=configs/shapes.py --workdir=runs/shapes [--config.optimizer.lr=3e-4 ...]

Trains, or goes on with, a run. Exit codes: 0 finished, 75 saved after SIGTERM or SIGINT (type the command again),
1 anything else.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's checkpoints, metrics and gallery go; may be remote.")


def parse(argv):
    """absl's parser, but an unknown key, or a config that cannot be read, is one line instead of a traceback."""
    try:
        left = app.parse_flags_with_usage(argv)
        _ = CONFIG.value.name  # a file that is not there is an error only once the config is used
    except (AttributeError, KeyError, OSError) as error:
        while isinstance(error.args[0], Exception):
            error = error.args[0]
        text = " ".join(str(error.args[0]).split())
        sys.exit(text if isinstance(error, OSError) else f"the config has no such key: {text}")
    if len(left) > 1:
        sys.exit(f"{left[1]!r} is no flag: flags begin with --, as in --config.steps=100.")
    return left


def main(_):
    from dit_video import launch, trainer
    from dit_video.checkpoint import CheckpointError

    launch.prepare()
    try:
        trainer.train(CONFIG.value, WORKDIR.value)
    except (ValueError, FloatingPointError, FileNotFoundError, CheckpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def run():
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
