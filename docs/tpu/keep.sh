#!/usr/bin/env bash
# Trains to the end on slices that can be preempted: docs/tpu/keep.sh CONFIG [field=value ...]
set -uo pipefail
: "${PROJECT:?source docs/tpu/env.sh first}" "${1:?expected a configuration}"

here=$(dirname "${BASH_SOURCE[0]}")
while true; do
    status=0
    "$here/train.sh" "$@" || status=$?
    # 0: finished. 2: the configuration is refused, which another slice does not change.
    if [[ $status == 0 || $status == 2 ]]; then
        exit "$status"
    fi
    state=$(gcloud compute tpus queued-resources describe "$NAME-request" --project="$PROJECT" --zone="$ZONE" \
        --format='value(state.state)' 2> /dev/null)
    if [[ "$state" != ACTIVE ]]; then
        echo "the slice is gone ($state); requesting another"
        "$here/delete.sh" || true
        until "$here/create.sh" && "$here/install.sh"; do
            # A request that failed stays until it is deleted.
            "$here/delete.sh" || true
            sleep 60
        done
    fi
    sleep 10
done
