#!/usr/bin/env bash
# Runs a command on every host of every slice: docs/tpu/each.sh 'COMMAND'
set -euo pipefail
: "${PROJECT:?source docs/tpu/env.sh first}" "${1:?expected a command}"
command -v gcloud > /dev/null || { echo "needs gcloud: https://cloud.google.com/sdk" >&2; exit 1; }

names=("$NAME")
if ((SLICES > 1)); then
    names=()
    for ((slice = 0; slice < SLICES; slice++)); do
        names+=("$NAME-$slice")
    done
fi
# Start all slices at once: the processes of a run wait for each other.
jobs=()
for name in "${names[@]}"; do
    gcloud compute tpus tpu-vm ssh "$name" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1" &
    jobs+=($!)
done
status=0
for job in "${jobs[@]}"; do
    wait "$job" || status=$?
done
exit "$status"
