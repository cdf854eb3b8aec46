"""Comparisons of a conversion with the original, right ones and wrong ones."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from omni_jax.checkpoint.release import open_release
from omni_jax.config.model import AdapterConfig, AudioEncoderConfig
from omni_jax.convert import mini_omni, verify
from omni_jax.convert.commands import app
from omni_jax.convert.release import init_release
from omni_jax.errors import ConversionError
from tests import models
from tests.lazy import to_lazy

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--verify")])
    assert done.exit_code == code, done.output
    return done.stdout.splitlines()[1:]


def errors(lines):
    """What was compared, and the error: 0 where it is equal."""
    split = [line.split(": ") for line in lines]
    return {": ".join(what): 0 if found == "equal" else float(found.split()[2]) for *what, found in split}


def test_verified_import(tiny_parts, tmp_path):
    sources = ("--whisper", tiny_parts / "whisper", "--snac", tiny_parts / "snac")
    found = errors(run("import", tiny_parts / "mini_omni", tmp_path / "release", *sources))
    assert list(found) == [
        "adapter, trunk and heads, 30 tensors",
        "logits of all heads, 32 positions, 8 of them speech: PyTorch and JAX",
        "audio encoder, 37 tensors",
        "features of 100 positions: PyTorch and JAX",
        "codec, 112 tensors",
        "sound of 4 frames: PyTorch and JAX",
    ]
    for what, error in found.items():
        assert (0 < error < 1e-5) if "PyTorch" in what else error == 0, what


def test_verified_init_with_another_type(tiny_parts, tiny_release, tmp_path):
    """Of a type that rounds, the outputs are those of the rounded original; parts of a release are compared with it."""
    models.language_model_folder(tmp_path / "lm", "qwen3", tied=False)
    sources = ("--whisper", tiny_parts / "whisper", "--snac", tiny_release, "--dtype", "bfloat16")
    found = errors(run("init", tmp_path / "release", "--lm", tmp_path / "lm", *sources))
    logits, features = "logits of a text of 32 tokens", "features of 100 positions"
    rounded = "weights in bfloat16 and as they were"
    assert list(found) == [
        "trunk, 36 tensors",
        f"{logits}: {rounded}",
        f"{logits}: PyTorch and JAX",
        "audio encoder, 37 tensors",
        f"{features}: {rounded}",
        f"{features}: PyTorch and JAX",
        "codec, 112 tensors",
    ]
    for what, error in found.items():
        assert (1e-3 < error < 1e-1) if rounded in what else error < 1e-5, what


@pytest.mark.parametrize("to", ["mini-omni", "transformers", "whisper", "snac"])
def test_verified_export(to, tmp_path):
    """Of an adapter that the published code sees as another one."""
    config = replace(models.tiny_config(tts_adapter_layers=1), adapter=AdapterConfig(intermediate_size=40, stack=3))
    models.release_folder(tmp_path / "release", config)
    tensors, outputs = errors(run("export", tmp_path / "release", tmp_path / "out", "--to", to)).values()
    assert tensors <= (1e-6 if to == "snac" else 0)
    assert 0 < outputs < 1e-5


def test_verified_export_of_a_whisper_of_openai(tmp_path):
    encoder = AudioEncoderConfig(hidden_size=32, num_layers=1, num_heads=4, intermediate_size=128, max_position=50)
    models.release_folder(tmp_path / "release", replace(models.tiny_config(), audio_encoder=encoder))
    found = run("export", tmp_path / "release", tmp_path / "out", "--to", "openai-whisper")
    tensors, outputs = errors(found).values()
    assert tensors == 0 < outputs < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_comparison_with_a_folder_as_people_have_them(tied, tiny_release, tmp_path):
    """Files of PyTorch, names without a prefix, a head that its config ties and that has other values."""
    theirs = models.language_model_folder(tmp_path / "lm", "qwen2", tied=True)
    state = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    (tmp_path / "lm" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "lm" / "pytorch_model.bin")
    source = str(tiny_release)
    init_release(tmp_path / "new", lm_source=str(tmp_path / "lm"), whisper_source=source, snac_source=source, tied=tied)
    tensors, outputs = verify.compare_language_model(tmp_path / "lm", open_release(tmp_path / "new"))
    assert tensors.error == 0 < outputs.error < 1e-5


def test_wrong_conversion_ends_with_exit_code_1(tiny_release, tmp_path, monkeypatch):
    """Of tensors that are converted wrongly there and back, only the outputs tell."""
    real = mini_omni._fused

    def swapped(*arguments):
        entry = real(*arguments)

        def split(fused):
            query, key, value = entry.to_ours(fused)
            return query, value, key

        return replace(entry, to_ours=split, to_theirs=lambda query, key, value: entry.to_theirs(query, value, key))

    monkeypatch.setattr(mini_omni, "_fused", swapped)
    done = CliRunner().invoke(app, ["export", str(tiny_release), str(tmp_path / "out"), "--verify"])
    assert done.exit_code == 1
    first, second = done.stderr.splitlines()
    assert first == f"error: {tmp_path / 'out'} is not what it was made of:"
    assert second.startswith("logits of all heads, 32 positions, 8 of them speech: PyTorch and JAX: largest error ")
    assert second.endswith(" of the largest value, at most 1e-04 expected")


def test_compare_tensors_finds_what_differs():
    arrays = {"a": np.array([1.0, -4.0], np.float32), "b": np.zeros(3, np.float32)}

    def compare(limit=0.0, **changes):
        return verify.compare_tensors("x", to_lazy(arrays), to_lazy({**arrays, **changes}), limit)

    assert str(compare()) == "x, 2 tensors: equal"
    found = compare(a=np.array([1.0, -3.0], np.float32))
    assert (found.error, found.is_within_limit) == (0.25, False)
    assert str(found) == "x, 2 tensors: largest error 2.5e-01 of the largest value, at most 0e+00 expected"
    assert compare(0.3, a=np.array([1.0, -3.0], np.float32)).is_within_limit
    for wrong in (np.nan, np.inf):
        assert not compare(0.3, a=np.array([1.0, wrong], np.float32)).is_within_limit
    assert not compare(0.3, b=np.ones(3, np.float32)).is_within_limit
    with pytest.raises(ConversionError, match=r"the converted x: a: expected float32, found float16"):
        compare(a=arrays["a"].astype(np.float16))
    with pytest.raises(ConversionError, match=r"the converted x:\na: expected \(2,\), found \(1,\)"):
        compare(a=arrays["a"][:1])


def test_verification_needs_torch_before_anything_is_written(tiny_release, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    done = CliRunner().invoke(app, ["export", str(tiny_release), str(tmp_path / "out"), "--to", "whisper", "--verify"])
    assert done.exit_code == 2
    assert "verification needs PyTorch and transformers" in done.stderr
    assert "pip install 'omni-jax[torch]'" in done.stderr
    assert not (tmp_path / "out").exists()
