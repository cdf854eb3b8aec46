"""What a folder holds, and what is downloaded of a repository."""

import json

import pytest

from omni_jax.convert import sources
from omni_jax.convert.release import import_mini_omni, init_release
from omni_jax.convert.sources import expect, fetch_model, kind_of
from omni_jax.errors import ConversionError
from tests import models


def test_kind_of(tiny_parts, tiny_release, tmp_path):
    models.language_model_config("llama", tied=True).save_pretrained(tmp_path / "lm")
    assert kind_of(tmp_path / "lm") == "a language model"
    assert kind_of(tiny_parts / "whisper") == "a Whisper"
    assert kind_of(tiny_parts / "snac") == "a SNAC"
    assert kind_of(tiny_parts / "mini_omni") == "a Mini-Omni checkpoint"
    assert kind_of(tiny_release) == "a release of omni_jax"
    assert kind_of(tmp_path) is None
    expect(tmp_path, "a SNAC")


def test_folders_in_the_wrong_place_are_named(tiny_parts, tiny_release, tmp_path):
    parts = {name: str(tiny_parts / name) for name in ("whisper", "snac", "mini_omni")}
    with pytest.raises(ConversionError, match=r"whisper: expected a language model, found a Whisper$"):
        init_release(
            tmp_path / "out", lm_source=parts["whisper"], whisper_source=parts["whisper"], snac_source=parts["snac"]
        )
    with pytest.raises(ConversionError, match=r"tiny: expected a Mini-Omni checkpoint, found a release of omni_jax$"):
        import_mini_omni(
            str(tiny_release), tmp_path / "out", whisper_source=parts["whisper"], snac_source=parts["snac"]
        )
    with pytest.raises(ConversionError, match=r"whisper: expected a SNAC, found a Whisper$"):
        import_mini_omni(
            parts["mini_omni"], tmp_path / "out", whisper_source=parts["whisper"], snac_source=parts["whisper"]
        )


@pytest.mark.parametrize(
    ("repository", "downloads"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "a.gguf"], ["config.json", "model.safetensors"]),
        (
            ["config.json", "model.safetensors.index.json", "1.safetensors", "original.safetensors"],
            ["config.json", "model.safetensors.index.json", "1.safetensors"],
        ),
        (["config.json", "pytorch_model.bin", "flax.msgpack"], ["config.json", "pytorch_model.bin"]),
        (
            ["config.json", "pytorch_model.bin.index.json", "1.bin", "other.bin"],
            ["config.json", "pytorch_model.bin.index.json", "1.bin"],
        ),
    ],
)
def test_fetch_model_downloads_what_the_index_names(repository, downloads, tmp_path, monkeypatch):
    def fetch(source, wanted, what):
        for name in set(repository) & set(wanted):
            shard = "1.safetensors" if "model.safetensors" in name else "1.bin"
            content = {"weight_map": {"a": shard}} if name.endswith("index.json") else {}
            (tmp_path / name).write_text(json.dumps(content))
        return tmp_path

    monkeypatch.setattr(sources, "fetch", fetch)
    assert fetch_model("owner/name", "a language model") == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(downloads)
