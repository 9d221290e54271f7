#!/bin/sh
# GKE through xpk (pip install xpk), which writes the JobSet itself.
#
#   CLUSTER=mine IMAGE=... experiments/launch/gke-xpk.sh --config=configs/clips.py --workdir=gs://BUCKET/runs/clips
#
# TYPE=v5p-512 is the 256 chips of `--topology=v5p:4x8x8`; SLICES=2 takes two of them.
# Not run: there was no cluster at hand. Checked with sh -n.
set -eu
: "${CLUSTER:?}" "${IMAGE:?}"
exec xpk workload create --cluster="$CLUSTER" --workload="${NAME:-dit-video}" --docker-image="$IMAGE" \
    --tpu-type="${TYPE:-v5p-512}" --num-slices="${SLICES:-1}" --max-restarts=100 \
    --command="python -m dit_video.train $*"
