#!/usr/bin/env bash
# Installs the project, the bucket and the records on every host. Run it in the project's folder.
set -euo pipefail
: "${PROJECT:?source docs/tpu/env.sh first}"
for program in git gcloud; do
    command -v "$program" > /dev/null || { echo "needs $program" >&2; exit 1; }
done

here=$(dirname "${BASH_SOURCE[0]}")
git archive --format=tar.gz --prefix=omni_jax/ HEAD > "/tmp/$NAME-code.tar.gz"
gcloud storage cp "/tmp/$NAME-code.tar.gz" "gs://$BUCKET/code.tar.gz"

"$here/each.sh" "set -e
    export DEBIAN_FRONTEND=noninteractive
    # https://cloud.google.com/storage/docs/cloud-storage-fuse/install
    echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -c -s) main\" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list
    curl -s https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null
    sudo apt-get update -q && sudo apt-get install -y -q gcsfuse python3-venv
    sudo mkdir -p /bucket /records && sudo chown \"\$USER\" /bucket /records
    # Checkpoints and releases are renamed once they are complete: allow renames of folders with files.
    mountpoint -q /bucket || gcsfuse --implicit-dirs --rename-dir-limit 200000 $BUCKET /bucket
    gcloud storage rsync --recursive $RECORDS /records
    tar xzf /bucket/code.tar.gz
    cd omni_jax && ln -sfn /records data && python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'"
