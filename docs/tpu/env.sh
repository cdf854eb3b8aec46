# What the scripts here read; change it, then `source` it.
export PROJECT=my-project
export ZONE=us-west4-a
export NAME=omni
# Chips and software, see https://cloud.google.com/tpu/docs/runtimes
export ACCELERATOR=v5litepod-256
export RUNTIME=v2-alpha-tpuv5-lite
# --spot costs less and may be taken away; empty: on demand.
export SPOT=--spot
# More than 1: so many slices in one run.
export SLICES=1
# A bucket, and the records in it.
export BUCKET=my-bucket
export RECORDS=gs://my-bucket/records
