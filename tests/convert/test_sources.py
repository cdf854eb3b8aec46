"""What a folder holds, and what is downloaded of a repository."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch

from omni_jax.checkpoint.release import open_release
from omni_jax.convert.release import import_mini_omni, init_release, inspect
from omni_jax.convert.sources import expect, fetch_model, fetch_whisper, kind_of
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


# Downloads.


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that makes a repository `owner/name` of a folder, and returns the list of what is downloaded of it."""

    def serve(repository):
        snapshot, downloads = tmp_path / "snapshot", []

        def download(source, *, revision, cache_dir, allow_patterns):
            assert source == "owner/name"
            for file in repository.iterdir():
                if any(file.match(pattern) for pattern in allow_patterns) and file.name not in downloads:
                    snapshot.mkdir(exist_ok=True)
                    shutil.copyfile(file, snapshot / file.name)
                    downloads.append(file.name)
            return str(snapshot)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return downloads

    return serve


def repository_of(folder, names):
    """Small files of these names; an index names the shard 1."""
    folder.mkdir()
    for name in names:
        shard = "1.safetensors" if "model.safetensors" in name else "1.bin"
        content = {"weight_map": {"a": shard}} if name.endswith("index.json") else {}
        (folder / name).write_text(json.dumps(content))
    return folder


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
def test_fetch_model_downloads_what_the_index_names(repository, downloads, hub, tmp_path):
    found = hub(repository_of(tmp_path / "repository", repository))
    assert fetch_model("owner/name", "a language model") == tmp_path / "snapshot"
    assert sorted(found) == sorted(downloads)


def test_fetch_whisper_downloads_a_file_of_openai_only_where_there_is_no_other(hub, tmp_path):
    mini_omni = ["lit_model.pth", "model_config.yaml", "tokenizer.json", "small.pt", "README.md"]
    downloads = hub(repository_of(tmp_path / "mini-omni", mini_omni))
    assert fetch_whisper("owner/name") == tmp_path / "snapshot" / "small.pt"
    assert downloads == ["small.pt"]


def test_fetch_whisper_prefers_the_format_of_transformers(hub, tmp_path):
    downloads = hub(repository_of(tmp_path / "whisper", ["config.json", "model.safetensors", "small.pt"]))
    assert fetch_whisper("owner/name") == tmp_path / "snapshot"
    assert sorted(downloads) == ["config.json", "model.safetensors"]


def test_fetch_whisper_says_what_it_expects(hub, tmp_path):
    hub(repository_of(tmp_path / "other", ["large-v3.pt"]))
    message = r"expected a Whisper: config\.json with weights, or small\.pt, found neither; a file .* its path"
    for source in ("owner/name", str(tmp_path / "other")):
        with pytest.raises(ConversionError, match=message):
            fetch_whisper(source)
    assert fetch_whisper(str(tmp_path / "other" / "large-v3.pt")) == tmp_path / "other" / "large-v3.pt"


def test_import_from_the_hub_downloads_four_files(hub, tiny_parts, tiny_release, tmp_path):
    """Also where the repository has a Whisper and other weights, as the published one."""
    repository = shutil.copytree(tiny_parts / "mini_omni", tmp_path / "repository")
    for name in ("small.pt", "model.safetensors", "demo.wav"):
        (repository / name).touch()
    downloads = hub(repository)
    source = str(tiny_release)
    import_mini_omni("owner/name", tmp_path / "out", whisper_source=source, snac_source=source)
    wanted = ["lit_model.pth", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(downloads) == wanted
    assert inspect(str(tmp_path / "out"))


def test_init_from_the_hub_with_weights_of_pytorch(hub, tiny_release, tmp_path):
    """A repository with shards of PyTorch only, and what else people leave there."""
    repository = tmp_path / "repository"
    models.language_model_folder(repository, "llama", tied=True)
    state = safetensors.torch.load_file(repository / "model.safetensors")
    (repository / "model.safetensors").unlink()
    half = len(state) // 2
    index = {}
    for number, names in enumerate((list(state)[:half], list(state)[half:])):
        shard = f"pytorch_model-0000{number}.bin"
        torch.save({name: state[name] for name in names}, repository / shard)
        index |= dict.fromkeys(names, shard)
    (repository / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    for name in ("pytorch_model-old.bin", "consolidated.pth", "ggml.gguf", "training_args.bin"):
        (repository / name).touch()
    downloads = hub(repository)
    source = str(tiny_release)
    init_release(tmp_path / "out", lm_source="owner/name", whisper_source=source, snac_source=source)
    assert sorted(downloads) == [
        "config.json",
        "pytorch_model-00000.bin",
        "pytorch_model-00001.bin",
        "pytorch_model.bin.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    found = open_release(tmp_path / "out").model_tensors()["norm.scale"].read()
    np.testing.assert_array_equal(found, state["model.norm.weight"].numpy())
