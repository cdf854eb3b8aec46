"""Trains a stage: `python train.py configs/STAGE.yaml [field=value ...]`. The same as `omni-jax train`."""

from omni_jax.cli import main

if __name__ == "__main__":
    main("train")
