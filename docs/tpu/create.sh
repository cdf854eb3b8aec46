#!/usr/bin/env bash
# Requests the slice (or slices) of env.sh and waits until it is ready.
set -euo pipefail
: "${PROJECT:?source docs/tpu/env.sh first}"
command -v gcloud > /dev/null || { echo "needs gcloud: https://cloud.google.com/sdk" >&2; exit 1; }

nodes=(--node-id="$NAME")
if ((SLICES > 1)); then
    nodes=(--node-count="$SLICES" --node-prefix="$NAME")
fi
# Again after an interruption: the request is there, and only its state is waited for.
gcloud compute tpus queued-resources describe "$NAME-request" --project="$PROJECT" --zone="$ZONE" > /dev/null 2>&1 ||
    gcloud compute tpus queued-resources create "$NAME-request" --project="$PROJECT" --zone="$ZONE" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${nodes[@]}" ${SPOT:+"$SPOT"}

while true; do
    state=$(gcloud compute tpus queued-resources describe "$NAME-request" --project="$PROJECT" --zone="$ZONE" \
        --format='value(state.state)')
    echo "$(date +%T) $state"
    case "$state" in
        ACTIVE) exit 0 ;;
        FAILED | SUSPENDED) exit 1 ;;
    esac
    sleep 30
done
