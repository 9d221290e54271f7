#!/bin/sh
# GKE through xpk (pip install xpk), which writes the JobSet itself.
#
#   CLUSTER=mine IMAGE=... experiments/launch/gke-xpk.sh --config=configs/clips.py \
#       --config.data.root=gs://BUCKET/clips --config.data.rows=256 --config.data.shards=64 \
#       --config.mesh.data=64 --config.mesh.fsdp=4 --workdir=gs://BUCKET/runs/clips
#
# TYPE=v5p-512 is the 256 chips of `--topology=v5p:4x8x8`; SLICES=2 takes two of them, with rows, shards and mesh.data
# twice as many.
# What ends with 75 (saved after SIGTERM) or 1 is started again, up to 100 times. A workload of the same NAME must be gone
# before the line is typed again: xpk workload delete --cluster=mine --workload=NAME.
# Not run: there was no cluster at hand. tests/test_launch_files.py runs it with a stand-in for xpk: the command that it
# is given has the flags as they were given.
set -eu
: "${CLUSTER:?}" "${IMAGE:?}"
# The flags for one more shell, as they are: each in quotes of its own.
flags=$(for flag; do printf " '%s'" "$(printf %s "$flag" | sed "s/'/'\\\\''/g")"; done)
exec xpk workload create --cluster="$CLUSTER" --workload="${NAME:-dit-video}" --docker-image="$IMAGE" \
    --tpu-type="${TYPE:-v5p-512}" --num-slices="${SLICES:-1}" --max-restarts=100 \
    --restart-on-exit-codes=1,75 --termination-grace-period-seconds=300 \
    --command="python -m dit_video.train$flags"
