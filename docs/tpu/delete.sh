#!/usr/bin/env bash
# Deletes the slice.
set -euo pipefail
: "${PROJECT:?source docs/tpu/env.sh first}"
command -v gcloud > /dev/null || { echo "needs gcloud: https://cloud.google.com/sdk" >&2; exit 1; }

gcloud compute tpus queued-resources delete "$NAME-request" --project="$PROJECT" --zone="$ZONE" --force --quiet
