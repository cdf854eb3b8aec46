#!/usr/bin/env bash
# Deletes the slice.
set -euo pipefail
: "${PROJECT:?source docs/tpu/env.sh first}"

gcloud compute tpus queued-resources delete "$NAME-request" --project="$PROJECT" --zone="$ZONE" --force --quiet
