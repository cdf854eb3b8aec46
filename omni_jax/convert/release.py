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
    AUDIO_ENCODER,
    AUDIO_ENCODER_PREFIX,
    CONFIG,
    TOKENIZER_FILES,
    Release,
    is_release,
    open_release,
    save_release,
)
from omni_jax.checkpoint.release import FILES as RELEASE_FILES
from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors
from omni_jax.checkpoint.tensors import tensor_name
from omni_jax.config.model import AdapterConfig, AudioEncoderConfig, CodecConfig, ModelConfig, VocabConfig
from omni_jax.convert import files, language_model, mini_omni, peft, snac, tokenizer, whisper
from omni_jax.convert.sources import LANGUAGE_MODEL, SNAC, fetch_mini_omni, fetch_model, fetch_whisper
from omni_jax.convert.table import cast, first_rows
from omni_jax.errors import ConversionError
from omni_jax.model.omni import Adapter, TTSAdapter
from omni_jax.vocab import NUM_CODEBOOKS, Vocab

logger = logging.getLogger(__name__)

_KEPT = (*TOKENIZER_FILES, mini_omni.CONFIG)
"""Files of a Mini-Omni checkpoint that a release has as they are."""


def import_mini_omni(
    source: str, out: str | Path, *, whisper_source: str, snac_source: str, dtype: str | None = None
) -> None:
    """Make a release of a Mini-Omni checkpoint, a Whisper and a SNAC.

    Args:
        source: a Mini-Omni folder.
        out: new or empty folder.
        whisper_source: a Whisper folder of transformers, a file of OpenAI's, or a release whose audio encoder is taken.
        snac_source: a SNAC folder, or a release whose codec is taken.
        dtype: of all weights but those of the codec, see `table.cast`; None: as in the files.

    Raises:
        ConversionError: a source is not what it should be; lists everything that is wrong with it.
        CheckpointError: a folder or file is missing or damaged, or `out` is in use.
        MissingExtraError: torch is not installed.
    """
    require_free(out)
    folder = fetch_mini_omni(source)
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
    tensors = {**mini_omni.from_state(state, config, str(folder / mini_omni.WEIGHTS)), **encoder}
    save_release(out, config, cast(tensors, dtype, source), codec, [folder / name for name in _KEPT])


def export_mini_omni(release: Release, out: str | Path) -> None:
    """Write a folder that the published Mini-Omni code loads. Audio encoder and codec have formats of their own.

    Raises:
        ConversionError: the published code has no such model.
        CheckpointError: the release is damaged, or `out` is in use.
        MissingExtraError: torch is not installed.
    """
    state = mini_omni.to_state(release.model_tensors(), release.config, str(release.folder))
    with new_folder(out) as partial:
        mini_omni.write(partial, release.config, state, release.mini_omni_config())
        _copy(release.tokenizer_files(), partial)


def export_transformers(release: Release, out: str | Path) -> None:
    """Write the trunk alone, with its own vocabulary only, as a folder of transformers, of the trunk's family.

    Raises:
        ConversionError: the family has no such trunk.
        CheckpointError: the release is damaged, or `out` is in use.
    """
    rows = release.config.vocab.text
    with new_folder(out) as partial:
        language_model.write(partial, release.config.trunk, rows, text_tensors(release, rows))
        _copy(release.tokenizer_files(), partial)


def text_tensors(release: Release, rows: int) -> dict[str, LazyTensor]:
    """The tensors of a release's trunk, with the first `rows` rows of its text tables."""
    tables = ("embed.text", "head.text")
    return {
        name: first_rows(tensor, rows) if name in tables else tensor
        for name, tensor in release.model_tensors().items()
        if name.startswith(("trunk.", "norm.")) or name in tables
    }


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
    dtype: str | None = None,
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
        dtype: of all weights but those of the codec, see `table.cast`; None: as in the files, and float32 for new
            adapters.

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
    with tempfile.TemporaryDirectory() as made:
        tokenizer_files = tokenizer.tokenizer_files(folder, Path(made))
        text_rows = tokenizer.num_text_rows(tokenizer_files[0], rows)
        config = ModelConfig(
            audio_encoder=encoder_config,
            adapter=AdapterConfig(kind=adapter, intermediate_size=trunk.intermediate_size),
            trunk=trunk,
            vocab=replace(VocabConfig(), text=text_rows, audio=codec_config.codebook_size),
            codec=codec_config,
            tts_adapter_layers=tts_adapter_layers,
        )
        if lines := mini_omni.unsupported(config):
            logger.warning(
                "Mini-Omni's published code has no such model; it cannot be exported to it:\n%s", "\n".join(lines)
            )
        tensors = {**encoder, **_init_adapters(config, seed), **_with_new_rows(lm, config, seed)}
        save_release(out, config, cast(tensors, dtype, lm_source), codec, tokenizer_files)


def _with_new_rows(lm: Tensors, config: ModelConfig, seed: int) -> dict[str, LazyTensor]:
    """A language model's tensors, its tables extended."""
    vocab = Vocab(config.vocab)
    tensors = dict(lm)
    for name in ("embed",) if config.trunk.tie_word_embeddings else ("embed", "head"):
        table = tensors.pop(f"{name}.text")
        tensors |= language_model.extend(table, name, vocab.text_rows, (NUM_CODEBOOKS, vocab.audio_rows), seed)
    return tensors


def merge_lora(release: Release, lora: Path, out: str | Path) -> None:
    """Make a release with a LoRA adapter of PEFT in the weights of its trunk; those that it changes are float32.

    Raises:
        ConversionError: the adapter is not a plain LoRA of this trunk; lists what is wrong.
        CheckpointError: a file is missing or damaged, or `out` is in use.
    """
    require_free(out)
    adapter = peft.read(lora, release.config.trunk)
    tensors = peft.merge({**release.model_tensors(), **adapter.tensors}, adapter.alpha / adapter.rank)
    save_release(out, release.config, tensors, release.codec_tensors(), release.files_to_keep())


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
    wanted = (*RELEASE_FILES, AUDIO_ENCODER, mini_omni.WEIGHTS, mini_omni.CONFIG)
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
    else:
        config, tensors = whisper.read(fetch_whisper(source))
    return config, {AUDIO_ENCODER_PREFIX + name: tensor for name, tensor in tensors.items()}


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


def _copy(paths: list[Path], folder: Path) -> None:
    for path in paths:
        shutil.copyfile(path, folder / path.name)
