#!/bin/sh
# A slice of TPU VMs: the same command on every host, which the VMs' metadata joins.
#
#   NAME=run ZONE=us-east5-a TYPE=v5p-512 experiments/launch/tpu-vm.sh --config=configs/clips.py \
#       --config.data.root=gs://BUCKET/clips --config.data.rows=256 --config.data.shards=64 \
#       --config.mesh.data=64 --config.mesh.fsdp=4 --workdir=gs://BUCKET/runs/clips
#
# v5p types count TensorCores: v5p-512 is 256 chips, the 4x8x8 of `--topology=v5p:4x8x8`, and 64 hosts.
# The hosts get this checkout; the workdir must be one that all of them reach. Ends with the command's exit code; if it
# is 75 (saved after SIGTERM) or the slice was preempted, run the same line again.
# Not run: there was no TPU at hand. Checked with sh -n.
set -eu
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}"
cd "$(dirname "$0")/../.."
ssh="gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=all"
gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" >/dev/null 2>&1 ||
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
        --version="${RUNTIME:-v2-alpha-tpuv5}"
git archive --format=tar.gz -o dit_video.tar.gz HEAD
gcloud compute tpus tpu-vm scp dit_video.tar.gz "$NAME": --zone="$ZONE" --worker=all
$ssh --command="mkdir -p dit_video && tar -xzf dit_video.tar.gz -C dit_video && cd dit_video &&
    pip install -q 'jax[tpu]>=0.10' 'etils[epath-gcs]' -e ."
$ssh --command="cd dit_video && python3 -m dit_video.train $*"
