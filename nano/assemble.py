"""Puts a release together from parts that were taught on their own.

python -m nano.assemble untaught build/nano/untaught        # random weights, the tokenizer: where the text stage starts
python -m nano.assemble trunk build/nano/text_run           # what the text stage has taught, in a file of its own
python -m nano.assemble taught build/nano/start             # the taught trunk, ear and codec: where stage 1 starts
python -m nano.assemble average RUN RUN --out FOLDER        # one run and what went on from it: the mean of both
python -m nano.assemble package build/nano/mean             # what is shipped: the same in eight bits
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx

from nano import text
from omni_jax.checkpoint import release as checkpoint
from omni_jax.checkpoint.safetensors_io import LazyTensor, SafetensorsFile, Tensors, write_safetensors
from omni_jax.codec.snac import Snac
from omni_jax.config.model import PRESETS
from omni_jax.errors import CheckpointError

PRESET = "nano"
TRUNK = Path("build/nano/trunk/trunk.safetensors")
PACKAGED = Path("build/nano/packaged")
FROM_TRUNK = ("embed.", "trunk.", "norm.")
"""What the text stage has taught."""
LARGEST = 16_000_000
"""Bytes that may be shipped."""

app = typer.Typer(help=__doc__.splitlines()[0], no_args_is_help=True)


def untaught(out: Path, tokenizer_files: list[Path], *, preset: str = PRESET, seed: int = 0) -> None:
    """Write a release with random weights.

    Args:
        out: new folder.
        tokenizer_files: copied.
        preset: the shape.
        seed: draws the weights.

    Raises:
        omni_jax.tensorfile.CheckpointError: `out` is in use, or a tokenizer file is missing.
    """
    config = PRESETS[preset]
    codec = {name: np.asarray(value) for name, value in Snac(config.codec, rngs=nnx.Rngs(seed)).params().items()}
    tensors = {name: LazyTensor.of(array) for name, array in codec.items()}
    checkpoint.save_release(out, config, _random(preset, seed), tensors, tokenizer_files)


def keep_trunk(run: checkpoint.Release, path: Path) -> None:
    """Write what the text stage has taught as a release's tensors, in float16; beside it the tokenizer it knows."""
    path.parent.mkdir(parents=True, exist_ok=True)

    tensors = run.model_tensors().items()
    write_safetensors(path, {name: tensor.cast(np.float16) for name, tensor in tensors if name.startswith(FROM_TRUNK)})
    for file in run.tokenizer_files():
        shutil.copyfile(file, path.parent / file.name)


def taught(
    out: Path,
    trunk: Path,
    ear: Path,
    codec: Path,
    *,
    preset: str = PRESET,
    seed: int = 0,
) -> None:
    """Write a release whose trunk, ear and codec are taught; its adapter, and TTS adapter if any, is random.

    Args:
        out: new folder.
        trunk: `trunk.safetensors`, as `keep_trunk` writes it; the tokenizer is beside it.
        ear: `ear.safetensors` of `nano.audio_encoder`.
        codec: `codec.safetensors` of `nano.codec`.
        preset: the shape.
        seed: draws what is random.

    Raises:
        omni_jax.tensorfile.CheckpointError: `out` is in use, a file is missing, or the parts do not fit the shape.
    """
    parts = {**_random(preset, seed), **SafetensorsFile(ear).tensors, **SafetensorsFile(trunk).tensors}
    # A part in float16 is trained in float32 from here on.
    tensors = {name: tensor.cast(np.float32) for name, tensor in parts.items()}
    files = [trunk.parent / name for name in checkpoint.TOKENIZER_FILES]
    checkpoint.save_release(out, PRESETS[preset], tensors, SafetensorsFile(codec).tensors, files)


def average(runs: Sequence[checkpoint.Release], out: Path) -> None:
    """Write a release whose weights are the mean of several, which went on one from the other: arXiv 2203.05482.

    Args:
        runs: of one shape; codec and tokenizer are those of the first.
        out: new folder.

    Raises:
        omni_jax.tensorfile.CheckpointError: `out` is in use, or the runs are of several shapes.
    """
    first = runs[0]
    for run in runs[1:]:
        if run.config != first.config:
            raise CheckpointError(f"{run.folder}: expected the shape of {first.folder}, found another")
    every = [run.model_tensors() for run in runs]
    mean = {
        name: LazyTensor.of(np.mean([tensors[name].read() for tensors in every], 0, np.float64).astype(np.float32))
        for name in every[0]
    }
    checkpoint.save_release(out, first.config, mean, first.codec_tensors(), first.tokenizer_files())


def package(run: checkpoint.Release, out: Path) -> int:
    """Write what is shipped: the model's matrices in eight bits, everything else as it is.

    Args:
        run: the last stage.
        out: folder; what is there is replaced.

    Returns:
        Bytes of all files together.

    Raises:
        SystemExit: they are more than `LARGEST`.
    """
    shutil.rmtree(out, ignore_errors=True)
    checkpoint.save_release(out, run.config, run.model_tensors(), run.codec_tensors(), run.tokenizer_files(), int8=True)
    size = sum(file.stat().st_size for file in out.iterdir())
    if size > LARGEST:
        raise SystemExit(f"{out}: expected at most {LARGEST} bytes, found {size}")
    return size


def _random(preset: str, seed: int) -> Tensors:
    model = checkpoint.init_model(PRESETS[preset], stacked=False, dtype=jnp.float32, seed=seed)
    return checkpoint.model_tensors(model)


@app.command("untaught")
def untaught_command(
    out: Annotated[Path, typer.Argument(help="Folder to write")],
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer")] = text.TOKENIZER,
    seed: Annotated[int, typer.Option(help="Draws the weights")] = 0,
) -> None:
    """Random weights and the tokenizer."""
    untaught(out, [tokenizer / name for name in checkpoint.TOKENIZER_FILES], seed=seed)


@app.command("trunk")
def trunk_command(
    run: Annotated[Path, typer.Argument(help="Run of the text stage")],
    out: Annotated[Path, typer.Option(help="File to write")] = TRUNK,
) -> None:
    """What the text stage has taught."""
    keep_trunk(checkpoint.open_release(run), out)


@app.command("taught")
def taught_command(
    out: Annotated[Path, typer.Argument(help="Folder to write")],
    trunk: Annotated[Path, typer.Option(help="As `trunk` writes it")] = TRUNK,
    ear: Annotated[Path, typer.Option(help="As nano.audio_encoder writes it")] = Path("build/nano/ear/ear.safetensors"),
    codec: Annotated[Path, typer.Option(help="As nano.codec writes it")] = Path("build/nano/codec/codec.safetensors"),
    preset: Annotated[str, typer.Option(help="nano or nano_tts_adapter")] = PRESET,
    seed: Annotated[int, typer.Option(help="Draws what is random")] = 0,
) -> None:
    """The taught trunk, ear and codec."""
    taught(out, trunk, ear, codec, preset=preset, seed=seed)


@app.command("average")
def average_command(
    runs: Annotated[list[Path], typer.Argument(help="Runs, or releases")],
    out: Annotated[Path, typer.Option(help="Folder to write")],
) -> None:
    """The mean of several runs."""
    average([checkpoint.open_release(run) for run in runs], out)


@app.command("package")
def package_command(
    run: Annotated[Path, typer.Argument(help="Run of the last stage")],
    out: Annotated[Path, typer.Option(help="Folder to replace")] = PACKAGED,
) -> None:
    """What is shipped."""
    typer.echo(f"{out}: {package(checkpoint.open_release(run), out) / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
