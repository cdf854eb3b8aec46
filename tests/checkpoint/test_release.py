import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, traverse_util

from omni_jax import sharding
from omni_jax.checkpoint import release as checkpoint
from omni_jax.checkpoint.release import open_release
from omni_jax.checkpoint.safetensors_io import LazyTensor, SafetensorsFile, write_safetensors
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.model.omni import OmniModel
from tests import models


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def arrays(model):
    """Every parameter by path, on the host."""
    return {checkpoint.dotted_name(path): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture
def damaged(tiny_release, tmp_path):
    """A copy of the release to break."""
    return shutil.copytree(tiny_release, tmp_path / "damaged")


def test_eight_devices():
    assert jax.device_count() == 8


# The file format.


def test_file_round_trip_and_the_library_agrees(tmp_path):
    generator = np.random.default_rng(0)
    tensors = {
        # An odd number of narrow items first: wide ones must still be aligned.
        "half": generator.normal(size=(3,)).astype(np.float16),
        "bf16": generator.normal(size=(5, 3)).astype(ml_dtypes.bfloat16),
        "wide": generator.normal(size=(2, 3, 4)).astype(np.float32),
        "scalar": np.array(7.0, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "turned": np.asfortranarray(generator.normal(size=(4, 5)).astype(np.float32)),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: LazyTensor.of(array) for name, array in tensors.items()})
    library = safetensors.numpy.load_file(path)
    ours = SafetensorsFile(path).tensors
    assert set(library) == set(ours) == set(tensors)
    for name, array in tensors.items():
        for found in (library[name], ours[name].read()):
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
    assert names(tmp_path) == ["x.safetensors"]


def test_file_of_the_library_is_read_in_slices_and_cast(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(4, 6).astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file({"a": array}, tmp_path / "x.safetensors", metadata={"made": "by the library"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    index = (slice(1, 3), slice(2, 6))
    np.testing.assert_array_equal(file.read("a", index), array[index])
    out = np.empty((2, 6), np.float32)
    file.read_into("a", out, (slice(2, 4),))
    np.testing.assert_array_equal(out, array[2:4].astype(np.float32))


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": LazyTensor.of(np.ones(3, np.float32))})

    def fail():
        raise RuntimeError("no more")

    tensors = {"a": LazyTensor.of(np.zeros(3, np.float32)), "b": LazyTensor((1,), np.dtype(np.float32), fail)}
    with pytest.raises(RuntimeError, match="no more"):
        write_safetensors(path, tensors)
    np.testing.assert_array_equal(SafetensorsFile(path).read("a"), np.ones(3))
    assert names(tmp_path) == ["x.safetensors"]


def test_a_tensor_that_is_not_as_announced_is_an_error(tmp_path):
    wrong = LazyTensor((2,), np.dtype(np.float32), lambda: np.zeros(3, np.float32))
    with pytest.raises(CheckpointError, match=r"x: announced as float32 \(2,\), produced as float32 \(3,\)"):
        write_safetensors(tmp_path / "x.safetensors", {"x": wrong})


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40, (9).to_bytes(8, "little") + b"[1, 2, 3]"])
def test_a_file_that_is_no_safetensors(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: expected safetensors"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_file_that_was_cut_off(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": LazyTensor.of(np.ones(3, np.float32))})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="the file was cut off"):
        SafetensorsFile(path)


# Loading.


@pytest.mark.parametrize("stacked", [False, True])
def test_every_parameter_arrives(tiny_release, stacked):
    release = open_release(tiny_release)
    found = arrays(release.load_model(stacked=stacked, dtype=jnp.float32))
    expected = safetensors.numpy.load_file(tiny_release / "model.safetensors")
    if stacked:
        found = {
            name.replace(".layers.", f".layers.{layer}."): part
            for name, array in found.items()
            for layer, part in (enumerate(array) if ".layers." in name else [(0, array)])
        }
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_it_is_a_model_like_any_other(tiny_release):
    release = open_release(tiny_release)
    model = release.load_model(stacked=True, dtype=jnp.float32)
    graph, state = nnx.split(model)
    made = nnx.eval_shape(lambda: OmniModel(release.config, stacked=True, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    assert graph == nnx.split(made)[0]
    tokens = jnp.zeros((1, 8, 5), jnp.int32)
    positions = jnp.arange(5)[None]
    run = partial(jax.jit, compiler_options=models.QUICK)
    text, _, _ = run(lambda state: nnx.merge(graph, state)(tokens, positions))(state)
    single = release.load_model(stacked=False, dtype=jnp.float32)
    np.testing.assert_allclose(text, run(lambda model: model(tokens, positions))(single)[0], atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_shards_are_read_where_they_live(tiny_release, stacked):
    release = open_release(tiny_release)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model = release.load_model(stacked=stacked, dtype=jnp.float32, mesh=mesh)
    check_sharding(model, mesh)
    alone = arrays(release.load_model(stacked=stacked, dtype=jnp.float32))
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, alone[name])


def check_sharding(model, mesh):
    state = nnx.state(model)
    places = traverse_util.flatten_dict(sharding.of_state(state, mesh))
    smaller = 0
    for path, variable in nnx.to_flat_state(state):
        value = variable[...]
        assert value.sharding.is_equivalent_to(places[path], value.ndim), path
        smaller += value.addressable_shards[0].data.size < value.size
    # Norms and biases stay whole.
    assert smaller > 0.3 * len(places)
    rows, width = model.embed.text.shape
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert model.embed.text[...].addressable_shards[0].data.size == rows * width // parts


def test_a_shard_held_by_several_devices_is_read_once(tiny_release, monkeypatch):
    release = open_release(tiny_release)
    read = []
    real = SafetensorsFile.read_into
    monkeypatch.setattr(
        SafetensorsFile,
        "read_into",
        lambda self, name, out, index=(): (read.append((name, out.size)), real(self, name, out, index))[1],
    )
    model = release.load_model(stacked=False, dtype=jnp.float32, mesh=sharding.make_mesh(data=2, fsdp=2, tensor=2))
    rows, width = model.embed.text[...].shape
    assert [size for name, size in read if name == "embed.text"] == [rows * width // 4] * 4


@pytest.mark.parametrize("kept", [ml_dtypes.bfloat16, np.float16])
def test_narrow_files(tiny_release, damaged, kept):
    whole = safetensors.numpy.load_file(tiny_release / "model.safetensors")
    narrow = {name: array.astype(kept) for name, array in whole.items()}
    safetensors.numpy.save_file(narrow, damaged / "model.safetensors")
    release = open_release(damaged)
    for name, array in arrays(release.load_model(stacked=False, dtype=jnp.float32)).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, narrow[name].astype(np.float32))
    model = release.load_model(stacked=True, dtype=jnp.bfloat16)
    assert {array.dtype for array in arrays(model).values()} == {np.dtype(ml_dtypes.bfloat16)}
    model = release.load_model(stacked=True, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert {array.dtype for array in arrays(model).values()} == {np.dtype(np.float32)}
    assert model.dtype == jnp.bfloat16


def test_codec_and_tokenizer(tiny_release, tiny_config):
    release = open_release(tiny_release)
    assert release.config == tiny_config
    codec = release.load_codec()
    expected = safetensors.numpy.load_file(tiny_release / "codec.safetensors")
    assert set(codec.params()) == set(expected)
    np.testing.assert_array_equal(codec.params()["quantizers.0.codebook"], expected["quantizers.0.codebook"])
    tokenizer = release.tokenizer()
    assert tokenizer.decode(tokenizer.encode("What is your name?").ids) == "What is your name?"


def test_inspect_names_everything(tiny_release):
    tensors = open_release(tiny_release).inspect()
    assert tensors["embed.text"].shape == (312, 48)
    assert tensors["codec.quantizers.0.codebook"].shape == (64, 8)


# Making and saving.


@pytest.mark.parametrize("stacked", [False, True])
def test_init_on_a_mesh_save_and_load_again(tiny_release, tmp_path, stacked):
    config = models.tiny_config(tts_adapter_layers=2)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    model = checkpoint.init_model(config, stacked=stacked, dtype=jnp.float32, seed=3, mesh=mesh)
    check_sharding(model, mesh)
    old = open_release(tiny_release)
    tensors = checkpoint.model_tensors(model)
    assert {name: tensor.shape for name, tensor in tensors.items()} == checkpoint.parameter_shapes(config)
    checkpoint.save_release(tmp_path / "new", config, tensors, old.codec_tensors(), old.tokenizer_files())
    again = open_release(tmp_path / "new")
    assert again.config == config
    found = arrays(again.load_model(stacked=stacked, dtype=jnp.float32))
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(found[name], array)
    assert names(tmp_path / "new") == sorted(checkpoint.FILES)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_release_in_eight_bits_is_small_and_loads_on_any_mesh(tiny_release, tmp_path, stacked):
    old = open_release(tiny_release)
    tensors = {name: LazyTensor.of(tensor.read().astype(np.float32)) for name, tensor in old.model_tensors().items()}
    files = (old.codec_tensors(), old.tokenizer_files())
    checkpoint.save_release(tmp_path / "whole", old.config, tensors, *files)
    checkpoint.save_release(tmp_path / "eight", old.config, tensors, *files, int8=True)
    whole, eight = open_release(tmp_path / "whole"), open_release(tmp_path / "eight")
    sizes = [(release.folder / checkpoint.MODEL).stat().st_size for release in (whole, eight)]
    assert sizes[1] < 0.45 * sizes[0]  # the header is a large part of one so small
    assert whole.fingerprint() != eight.fingerprint()
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    model = eight.load_model(stacked=stacked, dtype=jnp.float32, mesh=mesh)
    check_sharding(model, mesh)
    rounded = {name: tensor.read() for name, tensor in eight.model_tensors().items()}
    for name, tensor in checkpoint.model_tensors(model).items():
        np.testing.assert_array_equal(tensor.read(), rounded[name])
        exact = tensors[name].read()
        assert np.abs(rounded[name] - exact).max() <= np.abs(exact).max() / 250, name


def test_the_seed_gives_the_same_weights_on_any_mesh():
    config = models.tiny_config()
    config = replace(
        config, trunk=replace(config.trunk, num_layers=1), audio_encoder=replace(config.audio_encoder, num_layers=1)
    )
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    spread = arrays(checkpoint.init_model(config, stacked=True, dtype=jnp.float32, seed=3, mesh=mesh))
    alone = arrays(checkpoint.init_model(config, stacked=True, dtype=jnp.float32, seed=3))
    other = arrays(checkpoint.init_model(config, stacked=True, dtype=jnp.float32, seed=4))
    for name, array in spread.items():
        np.testing.assert_allclose(array, alone[name], atol=1e-6, err_msg=name)
    assert not np.array_equal(alone["embed.text"], other["embed.text"])


def test_save_overwrites_nothing(tiny_release, damaged):
    release = open_release(tiny_release)
    with pytest.raises(CheckpointError, match="expected a new or an empty folder"):
        checkpoint.save_release(
            damaged, release.config, release.model_tensors(), release.codec_tensors(), release.tokenizer_files()
        )


def test_save_of_other_tensors_lists_them_all(tiny_release, tmp_path):
    release = open_release(tiny_release)
    tensors = release.model_tensors()
    tensors["strange"] = tensors.pop("norm.scale")
    tensors["embed.text"] = LazyTensor.of(np.zeros((3, 48), np.float32))
    with pytest.raises(CheckpointError) as error:
        checkpoint.save_release(
            tmp_path / "new", release.config, tensors, release.codec_tensors(), release.tokenizer_files()
        )
    assert str(error.value).splitlines()[1:] == [
        "norm.scale: missing, expected (48,)",
        "embed.text: expected (312, 48), found (3, 48)",
        "strange: unknown, found (48,)",
    ]
    assert not (tmp_path / "new").exists()


def test_a_killed_save_leaves_no_folder(tiny_release, tmp_path):
    script = f"""
import os, signal
from omni_jax import checkpoint
from omni_jax.tensorfile import LazyTensor
release = checkpoint.open_release({str(tiny_release)!r})
tensors = release.model_tensors()
last = list(tensors)[-1]
tensors[last] = LazyTensor(
    tensors[last].shape, tensors[last].dtype, lambda: os.kill(os.getpid(), signal.SIGKILL)
)
checkpoint.save_release(
    {str(tmp_path / "new")!r}, release.config, tensors, release.codec_tensors(), release.tokenizer_files()
)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()
    left = names(tmp_path)
    assert "new" not in left
    for name in left:
        with pytest.raises(CheckpointError, match=r"found no config\.yaml"):
            open_release(tmp_path / name)


# Errors.


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: expected a release.*found no such folder"):
        open_release(tmp_path / "nowhere")


def test_hub_out_of_reach():
    with pytest.raises(CheckpointError, match=r"owner/name: expected a release.*the hub says: ") as error:
        open_release("owner/name")
    assert "\n" not in str(error.value)


def test_hub_within_reach(tiny_release, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, files=allow_patterns)
        return str(tiny_release)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_release("owner/name").folder == tiny_release
    assert asked == {"name": "owner/name", "files": list(checkpoint.FILES)}


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_each_file_is_needed(damaged, name):
    (damaged / name).unlink()
    with pytest.raises(CheckpointError, match=f"found no {name}"):
        open_release(damaged)


def test_wrong_config_names_the_field(damaged):
    text = (damaged / "config.yaml").read_text()
    (damaged / "config.yaml").write_text(text.replace("heads: 4", "heads: four"))
    with pytest.raises(ConfigError, match=r"config\.yaml: trunk\.heads"):
        open_release(damaged)


def test_all_wrong_tensors_at_once(damaged):
    state = safetensors.numpy.load_file(damaged / "model.safetensors")
    state["strange"] = state.pop("norm.scale")
    state["embed.text"] = state["embed.text"][:5]
    safetensors.numpy.save_file(state, damaged / "model.safetensors")
    for stacked in (False, True):
        with pytest.raises(CheckpointError) as error:
            open_release(damaged).load_model(stacked=stacked, dtype=jnp.float32)
        assert str(error.value).splitlines() == [
            f"{damaged / 'model.safetensors'} does not fit config.yaml:",
            "norm.scale: missing, expected (48,)",
            "embed.text: expected (312, 48), found (5, 48)",
            "strange: unknown, found (48,)",
        ]


def test_wrong_codec(damaged):
    state = safetensors.numpy.load_file(damaged / "codec.safetensors")
    state["strange"] = state.pop("quantizers.0.codebook")
    safetensors.numpy.save_file(state, damaged / "codec.safetensors")
    with pytest.raises(
        CheckpointError, match=r"codec\.safetensors.*\n.*quantizers\.0\.codebook: missing, expected \(64, 8\)\nstrange"
    ):
        open_release(damaged).load_codec()


def test_tokenizer_that_does_not_fit(damaged):
    values = json.loads((damaged / "tokenizer.json").read_text())
    values["added_tokens"][0]["id"] = 279
    for number in range(280, 302):
        token = {**values["added_tokens"][0], "id": number, "content": f"<{number}>"}
        values["added_tokens"].append(token)
    (damaged / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected at most 300 tokens"):
        open_release(damaged).tokenizer()
    (damaged / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a tokenizer"):
        open_release(damaged).tokenizer()
