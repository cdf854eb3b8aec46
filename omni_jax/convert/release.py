"""Whole folders: releases made from published weights, and published weights made from releases.

Sources are folders or hub ids. Tensors go from file to file one by one.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax.checkpoint.folders import new_folder, require_files, require_free
from omni_jax.checkpoint.hub import fetch
from omni_jax.checkpoint.release import (
    AUDIO_ENCODER_PREFIX,
    CONFIG,
    TOKENIZER_FILES,
    Release,
    is_release,
    open_release,
    save_release,
)
from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors
from omni_jax.checkpoint.tensors import tensor_name
from omni_jax.config.model import AdapterConfig, AudioEncoderConfig, CodecConfig, ModelConfig, VocabConfig
from omni_jax.convert import files, language_model, mini_omni, peft, snac, tokenizer, whisper
from omni_jax.convert.sources import LANGUAGE_MODEL, MINI_OMNI, SNAC, WHISPER, expect, fetch_model
from omni_jax.errors import ConversionError
from omni_jax.model.omni import Adapter, TTSAdapter
from omni_jax.vocab import NUM_CODEBOOKS, Vocab

logger = logging.getLogger(__name__)

_MINI_OMNI_FILES = (mini_omni.WEIGHTS, mini_omni.CONFIG, *TOKENIZER_FILES)


def import_mini_omni(source: str, out: str | Path, *, whisper_source: str, snac_source: str) -> None:
    """Make a release of a Mini-Omni checkpoint, a Whisper and a SNAC, each tensor of its own type.

    Args:
        source: a Mini-Omni folder.
        out: new or empty folder.
        whisper_source: a Whisper folder of transformers, a file of OpenAI's, or a release whose audio encoder is taken.
        snac_source: a SNAC folder, or a release whose codec is taken.

    Raises:
        ConversionError: a source is not what it should be; lists everything that is wrong with it.
        CheckpointError: a folder or file is missing or damaged, or `out` is in use.
        MissingExtraError: torch is not installed.
    """
    require_free(out)
    folder = fetch(source, _MINI_OMNI_FILES, "a Mini-Omni checkpoint")
    expect(folder, MINI_OMNI)
    require_files(folder, _MINI_OMNI_FILES, "a Mini-Omni checkpoint")
    state = mini_omni.read_state(folder)
    encoder_config, encoder = _read_audio_encoder(whisper_source)
    codec_config, codec = _read_codec(snac_source)
    config = mini_omni.config_from_yaml(
        mini_omni.read_config(folder),
        encoder_config,
        codec_config,
        tts_adapter=mini_omni.has_tts_adapter(state),
        source=str(folder / mini_omni.CONFIG),
    )
    tensors = mini_omni.from_state(state, config, str(folder / mini_omni.WEIGHTS))
    save_release(out, config, {**tensors, **encoder}, codec, _tokenizer_files(folder))


def export_mini_omni(release: Release, out: str | Path) -> None:
    """Write a folder that the published Mini-Omni code loads. Audio encoder and codec have formats of their own.

    Raises:
        ConversionError: the published code has no such model.
        CheckpointError: the release is damaged, or `out` is in use.
        MissingExtraError: torch is not installed.
    """
    state = mini_omni.to_state(release.model_tensors(), release.config, str(release.folder))
    with new_folder(out) as partial:
        mini_omni.write(partial, release.config, state)
        _copy(release.tokenizer_files(), partial)


def export_transformers(release: Release, out: str | Path) -> None:
    """Write the trunk alone, with its own vocabulary only, as a folder of transformers, of the trunk's family.

    Raises:
        ConversionError: the family has no such trunk.
        CheckpointError: the release is damaged, or `out` is in use.
    """
    rows = release.config.vocab.text
    tables = ("embed.text", "head.text")

    def first_rows(table: LazyTensor) -> LazyTensor:
        return LazyTensor((rows, *table.shape[1:]), table.dtype, lambda: table.read()[:rows])

    tensors = {
        name: first_rows(tensor) if name in tables else tensor
        for name, tensor in release.model_tensors().items()
        if name.startswith(("trunk.", "norm.")) or name in tables
    }
    with new_folder(out) as partial:
        language_model.write(partial, release.config.trunk, rows, tensors)
        _copy(release.tokenizer_files(), partial)


def export_whisper(release: Release, out: str | Path) -> None:
    """Write the audio encoder alone, as a Whisper folder of transformers; see `whisper.write`.

    Raises:
        CheckpointError: the release is damaged, or `out` is in use.
    """
    with new_folder(out) as partial:
        whisper.write(partial, release.config.audio_encoder, release.audio_encoder_tensors())


def export_openai_whisper(release: Release, out: str | Path) -> None:
    """Write the audio encoder alone, as a file of OpenAI's whisper; see `whisper.write_openai`.

    Raises:
        ConversionError: OpenAI's whisper has no such encoder.
        CheckpointError: the release is damaged, or `out` is in use.
        MissingExtraError: torch is not installed.
    """
    with new_folder(out) as partial:
        whisper.write_openai(
            partial / whisper.OPENAI_FILE, release.config.audio_encoder, release.audio_encoder_tensors()
        )


def export_snac(release: Release, out: str | Path) -> None:
    """Write the codec alone, as a SNAC folder; see `snac.write`.

    Raises:
        CheckpointError: the release is damaged, or `out` is in use.
        MissingExtraError: torch is not installed.
    """
    with new_folder(out) as partial:
        snac.write(partial, release.config.codec, release.codec_tensors())


def init_release(
    out: str | Path,
    *,
    lm_source: str,
    whisper_source: str,
    snac_source: str,
    adapter: Literal["llamamlp", "mlp"] = "llamamlp",
    tts_adapter_layers: int = 0,
    seed: int = 0,
    tied: bool | None = None,
) -> None:
    """Make a release ready for training of a language model, a Whisper and a SNAC.

    Rows of the new tokens are drawn by `language_model.extend`, adapters by their own initializers.

    Args:
        out: new or empty folder.
        lm_source: folder of transformers with a language model of one of `families.FAMILIES`.
        whisper_source: a Whisper folder of transformers, a file of OpenAI's, or a release whose audio encoder is taken.
        snac_source: a SNAC folder, or a release whose codec is taken.
        adapter: kind of the module between audio encoder and trunk.
        tts_adapter_layers: blocks that serve the audio heads only.
        seed: the same seed gives the same release.
        tied: see `language_model.read`.

    Raises:
        ConversionError: a source is not what it should be; lists everything that is wrong with it.
        CheckpointError: a folder or file is missing or damaged, or `out` is in use.
        MissingExtraError: a file needs torch, which is not installed.
    """
    require_free(out)
    folder = fetch_model(lm_source, LANGUAGE_MODEL, (*TOKENIZER_FILES, *tokenizer.OLD_FILES))
    require_files(folder, (files.CONFIG,), LANGUAGE_MODEL)
    trunk, rows, lm = language_model.read(folder, tied=tied)
    encoder_config, encoder = _read_audio_encoder(whisper_source)
    codec_config, codec = _read_codec(snac_source)
    config = ModelConfig(
        audio_encoder=encoder_config,
        adapter=AdapterConfig(kind=adapter, intermediate_size=trunk.intermediate_size),
        trunk=trunk,
        vocab=replace(VocabConfig(), text=rows, audio=codec_config.codebook_size),
        codec=codec_config,
        tts_adapter_layers=tts_adapter_layers,
    )
    if lines := mini_omni.unsupported(config):
        logger.warning(
            "Mini-Omni's published code has no such model; it cannot be exported to it:\n%s", "\n".join(lines)
        )
    vocab = Vocab(config.vocab)
    tables: dict[str, LazyTensor] = {}
    for name in ("embed",) if trunk.tie_word_embeddings else ("embed", "head"):
        table = lm.pop(f"{name}.text")
        tables.update(language_model.extend(table, name, vocab.text_rows, (NUM_CODEBOOKS, vocab.audio_rows), seed))
    tensors = {**encoder, **_init_adapters(config, seed), **lm, **tables}
    with tempfile.TemporaryDirectory() as made:
        save_release(out, config, tensors, codec, tokenizer.tokenizer_files(folder, Path(made), rows))


def merge_lora(release: Release, lora: Path, out: str | Path) -> None:
    """Make a release with a LoRA adapter of PEFT in the weights of its trunk; those that it changes are float32.

    Raises:
        ConversionError: the adapter is not a plain LoRA of this trunk; lists what is wrong.
        CheckpointError: a file is missing or damaged, or `out` is in use.
    """
    require_free(out)
    adapter = peft.read(lora, release.config.trunk)
    tensors = peft.merge({**release.model_tensors(), **adapter.tensors}, adapter.alpha / adapter.rank)
    save_release(out, release.config, tensors, release.codec_tensors(), release.tokenizer_files())


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ in nothing but the number of their layer."""

    module: str
    name: str
    """Layer numbers are `*`."""
    count: int
    shape: tuple[int, ...]
    dtype: str
    """As stored."""

    @property
    def num_parameters(self) -> int:
        """Of all of them together."""
        return self.count * int(np.prod(self.shape, dtype=np.int64))


def inspect(source: str) -> list[TensorGroup]:
    """The tensors of a release, a finished training run or a Mini-Omni checkpoint, sorted by name.

    Weights are not read, and a tied head counts once.

    Raises:
        ConversionError: it is none of these.
        CheckpointError: it is not there, or damaged.
        MissingExtraError: a Mini-Omni checkpoint needs torch, which is not installed.
    """
    wanted = (CONFIG, *_MINI_OMNI_FILES, "*.safetensors")
    folder = Path(source) if is_release(source) else fetch(source, wanted, "a release or a Mini-Omni checkpoint")
    if is_release(folder):
        tensors = open_release(folder).inspect()
    elif (folder / mini_omni.WEIGHTS).is_file():
        tensors = mini_omni.read_state(folder)
        if mini_omni.read_config(folder).get("tie_word_embeddings"):
            tensors.pop(mini_omni.HEAD, None)
    else:
        raise ConversionError(
            f"{folder}: expected a release with {CONFIG} or a Mini-Omni checkpoint with {mini_omni.WEIGHTS}, "
            "found neither"
        )
    return _group(tensors)


def _group(tensors: Tensors) -> list[TensorGroup]:
    counts: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name, tensor in tensors.items():
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), tensor.shape, str(tensor.stored_dtype or tensor.dtype))
        counts[key] = counts.get(key, 0) + 1
    return [
        TensorGroup(name.removeprefix("transformer.").split(".")[0], name, count, shape, dtype)
        for (name, shape, dtype), count in sorted(counts.items())
    ]


def _read_audio_encoder(source: str) -> tuple[AudioEncoderConfig, dict[str, LazyTensor]]:
    """The audio encoder of a Whisper or of a release; tensors as a release names them."""
    if is_release(source):
        release = open_release(source)
        config, tensors = release.config.audio_encoder, release.audio_encoder_tensors()
    elif (file := _openai_file(Path(source))) is not None:
        config, tensors = whisper.read_openai(file)
    else:
        config, tensors = whisper.read(fetch_model(source, WHISPER))
    return config, {AUDIO_ENCODER_PREFIX + name: tensor for name, tensor in tensors.items()}


def _openai_file(path: Path) -> Path | None:
    """A Whisper file of OpenAI: the path itself, or in a folder such as Mini-Omni's."""
    if path.suffix == ".pt" and path.is_file():
        return path
    return path / whisper.OPENAI_FILE if (path / whisper.OPENAI_FILE).is_file() else None


def _read_codec(source: str) -> tuple[CodecConfig, dict[str, LazyTensor]]:
    """The codec of a SNAC folder or of a release."""
    if is_release(source):
        release = open_release(source)
        return release.config.codec, release.codec_tensors()
    return snac.read(fetch_model(source, SNAC))


def _init_adapters(config: ModelConfig, seed: int) -> dict[str, LazyTensor]:
    """Adapters with random weights."""
    rngs = nnx.Rngs(seed)
    modules: dict[str, Any] = {"adapter": Adapter(config, rngs)}
    if config.tts_adapter_layers:
        modules["tts_adapter"] = TTSAdapter(config, stacked=False, dtype=jnp.float32, rngs=rngs)
    return {
        f"{name}.{tensor_name(path)}": LazyTensor.of(np.asarray(variable[...]))
        for name, module in modules.items()
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES]


def _copy(paths: list[Path], folder: Path) -> None:
    for path in paths:
        shutil.copyfile(path, folder / path.name)
