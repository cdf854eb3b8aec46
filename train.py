"""Trains a stage: `python train.py configs/STAGE.yaml [field=value ...]`. The same as `omni-jax train`."""

import typer

from omni_jax.training.command import train_command

if __name__ == "__main__":
    typer.run(train_command)
