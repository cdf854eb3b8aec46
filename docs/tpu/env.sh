# Settings of the scripts in this folder. Edit, then `source`.
export PROJECT=my-project
export ZONE=us-west4-a
export NAME=omni
# Chips and software: https://cloud.google.com/tpu/docs/runtimes
export ACCELERATOR=v5litepod-256
export RUNTIME=v2-alpha-tpuv5-lite
# --spot: cheaper, can be preempted; empty: on demand.
export SPOT=--spot
# Slices of one run.
export SLICES=1
# The bucket for runs, and the folder of the records.
export BUCKET=my-bucket
export RECORDS=gs://my-bucket/records
