#!/bin/sh
# A slice of TPU VMs: the same command on every host, which the VMs' metadata joins.
#
#   NAME=run ZONE=us-east5-a TYPE=v5p-512 experiments/launch/tpu-vm.sh --config=configs/clips.py \
#       --config.data.root=gs://BUCKET/clips --config.data.rows=256 --config.data.shards=64 \
#       --config.mesh.data=64 --config.mesh.fsdp=4 --workdir=gs://BUCKET/runs/clips
#
# v5p types count TensorCores: v5p-512 is 256 chips, the 4x8x8 of `--topology=v5p:4x8x8`, and 64 hosts.
# The hosts get this checkout, with what is changed and not committed, and a Python of their own, by uv: the runtime's
# images have 3.10, and 3.11 or 3.12 is needed. The workdir must be one that all of them reach. Ends with the command's
# exit code; if it is 75 (saved after SIGTERM) or the slice was preempted, run the same line again.
# Not run on a TPU: there was none at hand. tests/test_launch_files.py runs it with a stand-in for gcloud, and what
# reaches the hosts are the flags as they were given. What it installs there was installed, but for libtpu, on a machine
# whose python3 is 3.10; a 3.12 was there, as uv could not fetch one without a network.
set -eu
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}"
cd "$(dirname "$0")/../.."
packed=$(mktemp -d)
trap 'rm -r "$packed"' EXIT
# The flags for one more shell, as they are: each in quotes of its own.
flags=$(for flag; do printf " '%s'" "$(printf %s "$flag" | sed "s/'/'\\\\''/g")"; done)
on_all() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}
# A slice that was preempted is still listed, without machines.
state=$(gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null || true)
case $state in PREEMPTED | TERMINATED)
    gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet
    state=
    ;;
esac
[ -n "$state" ] ||
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
        --version="${RUNTIME:-v2-alpha-tpuv5}"
new=$(git ls-files --others --exclude-standard)
[ -z "$new" ] || echo "not sent, as git does not know them: $new" >&2
tree=$(git stash create)  # with what is changed and not committed; empty: nothing is
git archive --format=tar.gz -o "$packed/dit_video.tar.gz" "${tree:-HEAD}"
gcloud compute tpus tpu-vm scp "$packed/dit_video.tar.gz" "$NAME": --zone="$ZONE" --worker=all
on_all "mkdir -p dit_video && tar -xzf dit_video.tar.gz -C dit_video && cd dit_video &&
    python3 -m pip install -q --user uv && { [ -x .venv/bin/python ] || python3 -m uv venv -q --python 3.12 .venv; } &&
    python3 -m uv pip install -q --python .venv/bin/python 'jax[tpu]>=0.10' 'etils[epath-gcs]' -e ."
on_all "cd dit_video && .venv/bin/python -m dit_video.train$flags"
