#!/bin/sh
# One machine with any number of NVIDIA GPUs: one process drives them all, nothing needs to be joined.
#
#   experiments/launch/gpu.sh --config=configs/clips.py --config.data.root=FOLDER --config.data.rows=16 \
#       --config.data.shards=8 --workdir=runs/clips
#
# That is for 8 GPUs, which cut weights and rows: rows are a multiple of the GPUs. Type the command again to go on after
# a stop.
# Not run as it stands. tests/test_launch_files.py runs it with stand-ins for pip and for Python, which is asked what it
# was given; the command itself runs on CPUs, and its step on one H200 (experiments/benchmarks).
set -eu
cd "$(dirname "$0")/../.."
[ -d .venv ] || python3 -m venv .venv
. .venv/bin/activate
pip install -q -e '.[gpu]'
gpus=$(python -c 'import jax; print(jax.device_count())')
exec python -m dit_video.train "$@" --config.mesh.fsdp="$gpus"
