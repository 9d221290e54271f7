#!/bin/sh
# Several processes on this machine, joined over the loopback: what a cluster does, to try it without one.
#
#   experiments/launch/local.sh 2 --config=configs/shapes.py:quick --config.data.rows=8 --config.data.shards=4 \
#       --config.mesh.data=2 --workdir=runs/two
#
# The first argument is the number of processes, each with one device of the CPU; the rest goes to each. If one fails,
# all end. Run by tests/test_launch_files.py, with a smaller model.
set -eu
count=$1
shift
port=$((20000 + $$ % 20000))
pids=
trap 'kill $pids 2>/dev/null || true' EXIT INT TERM
for i in $(seq 0 $((count - 1))); do
    python -m dit_video.train --coordinator="127.0.0.1:$port" --num_processes="$count" --process_id="$i" "$@" &
    pids="$pids $!"
done
code=0
for pid in $pids; do
    wait "$pid" || { code=$?; kill $pids 2>/dev/null || true; }
done
exit "$code"
