"""python -m dit_video.train --config=configs/shapes.py --workdir=runs/shapes [--config.optimizer.lr=3e-4 ...]

Trains, or goes on with, a run. Exit codes: 0 finished, 75 saved after SIGTERM or SIGINT (type the command again),
1 anything else. On several hosts it is the same command on each: a TPU pod, SLURM and Open MPI say who is who; where
nothing does, --coordinator=HOST:PORT --num_processes=N --process_id=I do. All must be given the same, and see one
workdir. One that no longer gets on ends the run. It goes on with the config that it was begun with;
--allow_changed=optimizer.lr,data.fps takes these keys as they are now.
"""

import functools

from absl import app, flags
from ml_collections import config_flags

from dit_video import arguments

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder: checkpoints, metrics, gallery; may be on gs://.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where nothing else says it.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has; with --coordinator.")
ALLOWED = flags.DEFINE_list("allow_changed", [], "Keys, or whole sections, that a resumed run may have otherwise.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0; with --coordinator.")
JOIN = flags.DEFINE_float(
    "join_timeout", 600.0, "Seconds that a process waits for all others to come, before it ends with the reason.", 1.0
)
PATIENCE = flags.DEFINE_float(
    "patience",
    1800.0,
    "Seconds without getting on after which a process ends, with the reason; three times as many where it waits for "
    "others too. Up to the end of the second step, with all that is compiled there, less than 1800 count as 1800.",
    1.0,
)


def main(_):
    from dit_video import launch, trainer, watchdog
    from dit_video.checkpoint import CheckpointError

    try:
        launch.join(COORDINATOR.value, PROCESSES.value, PROCESS.value, JOIN.value)
        launch.prepare()
        with watchdog.watch(PATIENCE.value, functools.partial(launch.tell, workdir=WORKDIR.value)):
            trainer.train(CONFIG.value, WORKDIR.value, ALLOWED.value)
    except (ValueError, FloatingPointError, FileNotFoundError, CheckpointError) as error:
        launch.fail(error, True, WORKDIR.value)
    except Exception as error:
        launch.fail(error, False, WORKDIR.value)


def run():
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=functools.partial(arguments.parse, CONFIG))


if __name__ == "__main__":
    run()
