"""Parts into a release."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from nano import assemble, run
from nano import codec as codecs
from omni_jax.checkpoint import release as checkpoint
from omni_jax.checkpoint.release import open_release, parameter_shapes
from omni_jax.checkpoint.safetensors_io import LazyTensor, SafetensorsFile, write_safetensors
from omni_jax.codec.snac import Snac
from omni_jax.config.model import PRESETS
from omni_jax.errors import CheckpointError
from tests.models import tokenizer_files

TINY = PRESETS["tiny"]


@pytest.fixture
def ear(tmp_path: Path) -> Path:
    """As nano.audio_encoder writes it: float16."""
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape in parameter_shapes(TINY).items() if name.startswith("audio_encoder.")}
    path = tmp_path / "audio_encoder.safetensors"
    write_safetensors(
        path, {name: LazyTensor.of(rng.normal(size=shape).astype(np.float16)) for name, shape in shapes.items()}
    )
    return path


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    path = tmp_path / "codec.safetensors"
    _, variables = nnx.split(Snac(TINY.codec, rngs=nnx.Rngs(7)))
    run.export(path, nnx.to_pure_dict(variables))
    return path


def test_every_part_comes_from_where_it_was_taught(ear: Path, codec: Path, tmp_path: Path):
    files = tokenizer_files(tmp_path)
    assemble.untaught(tmp_path / "untaught", files, preset="tiny", seed=1)
    trunk = open_release(tmp_path / "untaught")
    assemble.keep_trunk(trunk, tmp_path / "trunk" / "trunk.safetensors")
    assemble.taught(tmp_path / "start", tmp_path / "trunk" / "trunk.safetensors", ear, codec, preset="tiny", seed=2)
    start = open_release(tmp_path / "start")
    assert start.config == TINY
    before, after = (
        {name: tensor.read() for name, tensor in release.model_tensors().items()} for release in (trunk, start)
    )
    for name, tensor in after.items():
        assert tensor.dtype == np.float32, name
        same = np.array_equal(tensor, before[name].astype(np.float16))
        # Norms and biases are drawn alike by every seed.
        assert same == (
            name.startswith(("embed.", "trunk.", "norm.")) or (tensor.ndim == 1 and "audio_encoder." not in name)
        ), name
    heard = open_release(tmp_path / "start").load_codec()
    expected = codecs.read(codec, TINY.codec)
    jax.tree.map(np.testing.assert_array_equal, heard.params(), expected.params())
    assert start.tokenizer().get_vocab_size() == trunk.tokenizer().get_vocab_size()


def test_a_part_of_another_shape_is_refused(ear: Path, codec: Path, tmp_path: Path):
    files = tokenizer_files(tmp_path)
    assemble.untaught(tmp_path / "untaught", files, preset="tiny")
    write_safetensors(ear, {"audio_encoder.conv1.kernel": LazyTensor.of(np.zeros((3, 3), np.float16))})
    trunk = tmp_path / "trunk.safetensors"
    assemble.keep_trunk(open_release(tmp_path / "untaught"), trunk)
    with pytest.raises(CheckpointError, match=r"ear\.conv1\.kernel: expected .* found \(3, 3\)"):
        assemble.taught(tmp_path / "start", trunk, ear, codec, preset="tiny")
    assert not (tmp_path / "start").exists()


def test_an_average_is_the_mean_of_every_tensor(tmp_path: Path):
    files = tokenizer_files(tmp_path)
    for seed in (1, 2, 3):
        assemble.untaught(tmp_path / str(seed), files, preset="tiny", seed=seed)
    runs = [open_release(tmp_path / str(seed)) for seed in (1, 2, 3)]
    assemble.average(runs, tmp_path / "mean")
    mean = open_release(tmp_path / "mean")
    assert mean.config == TINY
    tensors = [run.model_tensors() for run in runs]
    assert mean.model_tensors().keys() == tensors[0].keys()
    for name, tensor in mean.model_tensors().items():
        expected = sum(each[name].read() for each in tensors) / 3
        assert tensor.dtype == np.float32
        np.testing.assert_allclose(tensor.read(), expected, rtol=1e-5, atol=1e-7)
    for name, tensor in mean.codec_tensors().items():
        np.testing.assert_array_equal(tensor.read(), runs[0].codec_tensors()[name].read())
    with pytest.raises(CheckpointError, match="mean"):
        assemble.average(runs, tmp_path / "mean")
    other = open_release("nano")
    with pytest.raises(CheckpointError, match=r"expected the shape of .*, found another"):
        assemble.average([runs[0], other], tmp_path / "never")


def test_what_is_shipped_is_in_eight_bits_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assemble.untaught(tmp_path / "run", tokenizer_files(tmp_path), preset="tiny")
    taught = open_release(tmp_path / "run")
    size = assemble.package(taught, tmp_path / "packaged")
    files = list((tmp_path / "packaged").iterdir())
    assert size == sum(file.stat().st_size for file in files)
    assert {file.name for file in files} == set(checkpoint.FILES)
    shipped = open_release(tmp_path / "packaged")
    assert shipped.fingerprint() != taught.fingerprint()
    matrix = SafetensorsFile(shipped.folder / checkpoint.MODEL).read("embed.text")
    assert max(len(np.unique(row)) for row in matrix) <= 255
    # Again, over what is there.
    assert assemble.package(taught, tmp_path / "packaged") == size
    monkeypatch.setattr(assemble, "LARGEST", size - 1)
    with pytest.raises(SystemExit, match="expected at most"):
        assemble.package(taught, tmp_path / "packaged")
