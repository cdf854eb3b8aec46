#!/usr/bin/env bash
# Starts or resumes a run on every host and waits for its end: docs/tpu/train.sh CONFIG [field=value ...]
set -euo pipefail
: "${PROJECT:?source docs/tpu/env.sh first}" "${1:?expected a configuration}"

"$(dirname "${BASH_SOURCE[0]}")/each.sh" "cd omni_jax && .venv/bin/python train.py $(printf '%q ' "$@") 2>&1 | tee -a train.log; exit \${PIPESTATUS[0]}"
