"""Makes releases of modules that were trained separately.

python -m recipes.nano.assemble untrained build/nano/untrained      random weights, a codec and a tokenizer
python -m recipes.nano.assemble start build/nano/text_run build/nano/start      a trained trunk and audio encoder
python -m recipes.nano.assemble average RUN RUN --out build/nano/mean   mean of the weights of several runs
python -m recipes.nano.assemble package build/nano/mean build/nano/packaged     in eight bits, as it ships
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import typer

from omni_jax import Omni
from omni_jax.checkpoint.release import (
    TOKENIZER_FILES,
    Release,
    open_release,
    save_release,
)
from omni_jax.checkpoint.safetensors_io import LazyTensor, SafetensorsFile, Tensors
from omni_jax.checkpoint.tensors import init_model, model_tensors
from omni_jax.config.model import PRESETS, AudioConfig, ModelConfig, TextConfig
from omni_jax.errors import CheckpointError
from recipes.nano.questions import TABLES
from recipes.nano.sentences import MAX_FREE_WORDS

PRESET = "nano"
SHIPPED = "nano"
"""The release whose codec, tokenizer and audio encoder are used where none is given."""
TRUNK = ("embed.", "trunk.", "norm.")
"""Prefixes of the tensors that the text stage trains."""
MAX_BYTES = 16_000_000
"""Of a packaged release."""

app = typer.Typer(help="Make releases of modules that were trained separately.", no_args_is_help=True)


def assemble_untrained(
    out: Path, *, codec: Path | None = None, tokenizer: Path | None = None, preset: str = PRESET, seed: int = 0
) -> None:
    """Write a release with random weights.

    Args:
        out: new folder.
        codec: `codec.safetensors`; None: that of `SHIPPED`.
        tokenizer: folder of the tokenizer's files; None: that of `SHIPPED`.
        preset: the shape.
        seed: of the weights.

    Raises:
        CheckpointError: `out` is in use, or a file is missing.
    """
    shipped = open_release(SHIPPED)
    codec_tensors = shipped.codec_tensors() if codec is None else SafetensorsFile(codec).tensors
    files = shipped.tokenizer_files() if tokenizer is None else [tokenizer / name for name in TOKENIZER_FILES]
    save_release(out, _config(preset), _random_tensors(preset, seed), codec_tensors, files)


def assemble_start(
    text_run: Release, out: Path, *, audio_encoder: Path | None = None, preset: str = PRESET, seed: int = 0
) -> None:
    """Write the release that stage 1 starts from; its adapter, and TTS adapter if any, is random.

    Args:
        text_run: has the trunk, the codec and the tokenizer.
        out: new folder.
        audio_encoder: `audio_encoder.safetensors`; None: that of `SHIPPED`.
        preset: the shape.
        seed: of what is random.

    Raises:
        CheckpointError: `out` is in use, a file is missing, or the tensors do not fit the shape.
    """
    encoder = open_release(SHIPPED).model_tensors() if audio_encoder is None else SafetensorsFile(audio_encoder).tensors
    tensors = dict(_random_tensors(preset, seed))
    tensors |= {name: tensor for name, tensor in encoder.items() if name.startswith("audio_encoder.")}
    tensors |= {name: tensor for name, tensor in text_run.model_tensors().items() if name.startswith(TRUNK)}
    tensors = {name: tensor.cast(np.float32) for name, tensor in tensors.items()}
    save_release(out, _config(preset), tensors, text_run.codec_tensors(), text_run.tokenizer_files())


def average_releases(releases: Sequence[Release], out: Path) -> None:
    """Write a release with the mean of the weights of several, one of which was trained from the other.

    See arXiv 2203.05482.

    Args:
        releases: of one shape; codec and tokenizer are those of the first.
        out: new folder.

    Raises:
        CheckpointError: `out` is in use, or the releases differ in shape.
    """
    first = releases[0]
    for release in releases[1:]:
        if release.config != first.config:
            raise CheckpointError(f"{release.folder}: expected the shape of {first.folder}, found another")
    every = [release.model_tensors() for release in releases]
    mean = {
        name: LazyTensor.of(np.asarray(np.mean([tensors[name].read() for tensors in every], 0, np.float64), np.float32))
        for name in every[0]
    }
    save_release(out, first.config, mean, first.codec_tensors(), first.tokenizer_files())


def package(model: str | Path, out: Path) -> int:
    """Write a model in eight bits.

    Args:
        model: a release, or a finished run.
        out: new folder.

    Returns:
        Bytes of all its files.

    Raises:
        CheckpointError: `out` is in use, or the files have more than `MAX_BYTES`.
    """
    Omni.from_pretrained(model, dtype=jnp.float32).save_pretrained(out, int8=True)
    size = sum(file.stat().st_size for file in out.iterdir())
    if size > MAX_BYTES:
        raise CheckpointError(f"{out}: expected at most {MAX_BYTES} bytes, found {size}")
    return size


AUDIO = AudioConfig(find_speech=True, level=-20.0)
"""How the model needs recordings: it was trained on questions without silence around them."""


def text_config() -> TextConfig:
    """How the model needs the text of requests: it is trained on words, names in capitals, and single sentences."""
    capitals = TABLES["capitals"]
    names = {name.removeprefix("the ") for name in (*capitals, *capitals.values(), "Nano")}
    # In lower case it is the bird.
    names.discard("Turkey")
    return TextConfig(spoken_english=True, names=tuple(sorted(names)), max_words=MAX_FREE_WORDS)


def _config(preset: str) -> ModelConfig:
    return replace(PRESETS[preset], audio=AUDIO, text=text_config())


def _random_tensors(preset: str, seed: int) -> Tensors:
    return model_tensors(init_model(PRESETS[preset], stacked=False, dtype=jnp.float32, seed=seed))


@app.command("untrained")
def untrained_command(
    out: Annotated[Path, typer.Argument(help="New folder.")],
    codec: Annotated[Path | None, typer.Option(help="What recipes.nano.codec wrote; default: the shipped one.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="What recipes.nano.tokenizer wrote; default: the shipped one.")
    ] = None,
    preset: Annotated[str, typer.Option(help="nano or nano_tts_adapter.")] = PRESET,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Random weights, a codec and a tokenizer: where the text stage starts."""
    assemble_untrained(out, codec=codec, tokenizer=tokenizer, preset=preset, seed=seed)


@app.command("start")
def start_command(
    text_run: Annotated[Path, typer.Argument(help="Run of the text stage.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    audio_encoder: Annotated[
        Path | None, typer.Option(help="What recipes.nano.audio_encoder wrote; default: the shipped one.")
    ] = None,
    preset: Annotated[str, typer.Option(help="nano or nano_tts_adapter.")] = PRESET,
    seed: Annotated[int, typer.Option(help="Of what is random.")] = 0,
) -> None:
    """A trained trunk and audio encoder, a random adapter: where stage 1 starts."""
    assemble_start(open_release(text_run), out, audio_encoder=audio_encoder, preset=preset, seed=seed)


@app.command("average")
def average_command(
    runs: Annotated[list[Path], typer.Argument(help="Runs or releases.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
) -> None:
    """The mean of the weights of several runs."""
    average_releases([open_release(run) for run in runs], out)


@app.command("package")
def package_command(
    model: Annotated[Path, typer.Argument(help="A release, or a finished run.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """The model in eight bits."""
    typer.echo(f"{out}: {package(model, out) / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
