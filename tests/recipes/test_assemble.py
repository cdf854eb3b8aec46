"""Releases made of modules that were trained separately."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from omni_jax import Omni
from omni_jax.checkpoint.release import AUDIO_ENCODER, FILES, MODEL, Release, open_release, parameter_shapes
from omni_jax.checkpoint.safetensors_io import LazyTensor, SafetensorsFile, write_safetensors
from omni_jax.codec.snac import Snac
from omni_jax.config.model import PRESETS
from omni_jax.errors import CheckpointError
from recipes.nano import assemble, training
from tests.models import tokenizer_files

pytestmark = pytest.mark.slow

TINY = PRESETS["tiny"]


@pytest.fixture
def audio_encoder(tmp_path: Path) -> Path:
    """As recipes.nano.audio_encoder writes it, in float16."""
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape in parameter_shapes(TINY).items() if name.startswith("audio_encoder.")}
    tensors = {name: LazyTensor.of(rng.normal(size=shape).astype(np.float16)) for name, shape in shapes.items()}
    path = tmp_path / "audio_encoder.safetensors"
    write_safetensors(path, tensors)
    return path


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    """As recipes.nano.codec writes it."""
    _, variables = nnx.split(Snac(TINY.codec, rngs=nnx.Rngs(7)))
    training.export(tmp_path / "codec.safetensors", nnx.to_pure_dict(variables))
    return tmp_path / "codec.safetensors"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return tokenizer_files(tmp_path / "tokenizer")[0].parent


def test_assemble_start_takes_each_tensor_from_its_module(
    audio_encoder: Path, codec: Path, tokenizer: Path, tmp_path: Path
) -> None:
    untrained = tmp_path / "untrained"
    assemble.assemble_untrained(untrained, codec=codec, tokenizer=tokenizer, preset="tiny", seed=1)
    run = open_release(untrained)
    assemble.assemble_start(run, tmp_path / "start", audio_encoder, preset="tiny", seed=2)
    start = open_release(tmp_path / "start")
    assert start.config == replace(TINY, audio=assemble.AUDIO, text=assemble.text_config())
    before, after = (
        {name: tensor.read() for name, tensor in release.model_tensors().items()} for release in (run, start)
    )
    encoder = SafetensorsFile(audio_encoder)
    for name, tensor in after.items():
        assert tensor.dtype == np.float32, name
        if name.startswith("audio_encoder."):
            np.testing.assert_array_equal(tensor, encoder.read(name))
        else:
            # Norms and biases are the same for every seed.
            assert np.array_equal(tensor, before[name]) == (name.startswith(assemble.TRUNK) or tensor.ndim == 1), name
    expected = SafetensorsFile(codec)
    for name, of_codec in start.codec_tensors().items():
        np.testing.assert_array_equal(of_codec.read(), expected.read(name))
    assert start.tokenizer().get_vocab_size() == run.tokenizer().get_vocab_size()


def test_assemble_defaults_are_modules_of_the_shipped_release(tmp_path: Path) -> None:
    assemble.assemble_untrained(tmp_path / "untrained")
    untrained, shipped = open_release(tmp_path / "untrained"), open_release("nano")
    assert untrained.config == replace(PRESETS["nano"], audio=assemble.AUDIO, text=assemble.text_config())
    codec = shipped.codec_tensors()
    for name, tensor in untrained.codec_tensors().items():
        np.testing.assert_array_equal(tensor.read(), codec[name].read())
    for ours, theirs in zip(untrained.tokenizer_files(), shipped.tokenizer_files(), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_assemble_start_rejects_another_shape(
    audio_encoder: Path, codec: Path, tokenizer: Path, tmp_path: Path
) -> None:
    assemble.assemble_untrained(tmp_path / "untrained", codec=codec, tokenizer=tokenizer, preset="tiny")
    wrong = {"audio_encoder.conv1.weight": LazyTensor.of(np.zeros((3, 3), np.float16))}
    write_safetensors(audio_encoder, wrong)
    run = open_release(tmp_path / "untrained")
    with pytest.raises(CheckpointError, match=r"audio_encoder\.conv1\.weight: expected .* found \(3, 3\)"):
        assemble.assemble_start(run, tmp_path / "start", audio_encoder, preset="tiny")
    assert not (tmp_path / "start").exists()


def untrained_releases(folder: Path, codec: Path, tokenizer: Path, count: int) -> list[Release]:
    for seed in range(count):
        assemble.assemble_untrained(folder / str(seed), codec=codec, tokenizer=tokenizer, preset="tiny", seed=seed)
    return [open_release(folder / str(seed)) for seed in range(count)]


def test_package_writes_eight_bits(
    codec: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained, other = untrained_releases(tmp_path, codec, tokenizer, 2)
    Omni.from_pretrained(untrained.folder).save_pretrained(tmp_path / "int8", int8=True)
    encoder = tmp_path / "int8" / AUDIO_ENCODER
    assemble.assemble_start(untrained, tmp_path / "run", encoder, preset="tiny")
    run = open_release(tmp_path / "run")
    size = assemble.package(run.folder, tmp_path / "packaged", encoder)
    assert (tmp_path / "packaged" / AUDIO_ENCODER).read_bytes() == encoder.read_bytes()
    files = list((tmp_path / "packaged").iterdir())
    assert size == sum(file.stat().st_size for file in files)
    assert {file.name for file in files} == {*FILES, AUDIO_ENCODER}
    packaged = open_release(tmp_path / "packaged")
    assert packaged.fingerprint() != run.fingerprint()
    matrix = SafetensorsFile(packaged.folder / MODEL).read("embed.text")
    assert max(len(np.unique(row)) for row in matrix) <= 255
    with pytest.raises(CheckpointError, match=r"audio_encoder\..*: expected the values of .*, found others"):
        assemble.package(other.folder, tmp_path / "other", encoder)
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr(assemble, "MAX_BYTES", size - 1)
    with pytest.raises(CheckpointError, match="expected at most"):
        assemble.package(run.folder, tmp_path / "large", encoder)
