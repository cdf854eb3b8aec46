"""Release folders: loading, saving, and what is said of damaged ones."""

import json
import os
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
from omni_jax.checkpoint.release import is_release, open_release
from omni_jax.checkpoint.safetensors_io import LazyTensor, SafetensorsFile, write_safetensors
from omni_jax.checkpoint.tensors import init_model, model_tensors, parameter_shapes, tensor_name
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.model.omni import OmniModel
from omni_jax.model.whisper_encoder import sinusoids
from tests import models

WEIGHTS = (checkpoint.MODEL, checkpoint.AUDIO_ENCODER)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def arrays(model):
    """Every parameter by path, on the host."""
    return {tensor_name(path): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture
def damaged(tiny_release, tmp_path):
    """A copy of the release to break."""
    return shutil.copytree(tiny_release, tmp_path / "damaged")


def test_eight_devices():
    assert jax.device_count() == 8


# Loading.


@pytest.mark.parametrize("stacked", [False, True])
def test_load_model_reads_every_parameter(tiny_release, stacked):
    release = open_release(tiny_release)
    found = arrays(release.load_model(stacked=stacked, dtype=jnp.float32))
    expected = {
        name: array for file in WEIGHTS for name, array in safetensors.numpy.load_file(tiny_release / file).items()
    }
    if stacked:
        found = {
            name.replace(".layers.", f".layers.{layer}."): part
            for name, array in found.items()
            for layer, part in (enumerate(array) if ".layers." in name else [(0, array)])
        }
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_load_model_gives_an_ordinary_module(tiny_release):
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
def test_load_model_reads_shards_on_a_mesh(tiny_release, stacked):
    release = open_release(tiny_release)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model = release.load_model(stacked=stacked, dtype=jnp.float32, mesh=mesh)
    check_sharding(model, mesh)
    alone = arrays(release.load_model(stacked=stacked, dtype=jnp.float32))
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, alone[name])


def check_sharding(model, mesh):
    state = nnx.state(model)
    shardings = traverse_util.flatten_dict(sharding.of_state(state, mesh))
    smaller = 0
    for path, variable in nnx.to_flat_state(state):
        value = variable[...]
        assert value.sharding.is_equivalent_to(shardings[path], value.ndim), path
        smaller += value.addressable_shards[0].data.size < value.size
    # Norms and biases are not sharded.
    assert smaller > 0.3 * len(shardings)
    rows, hidden_size = model.embed.text.shape
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert model.embed.text[...].addressable_shards[0].data.size == rows * hidden_size // shards


def test_load_model_reads_a_shard_of_several_devices_once(tiny_release, monkeypatch):
    release = open_release(tiny_release)
    read = []
    real = SafetensorsFile.read_into
    monkeypatch.setattr(
        SafetensorsFile,
        "read_into",
        lambda self, name, out, index=(): (read.append((name, out.size)), real(self, name, out, index))[1],
    )
    model = release.load_model(stacked=False, dtype=jnp.float32, mesh=sharding.make_mesh(data=2, fsdp=2, tensor=2))
    rows, hidden_size = model.embed.text[...].shape
    assert [size for name, size in read if name == "embed.text"] == [rows * hidden_size // 4] * 4


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_load_model_casts_half_precision(tiny_release, damaged, stored):
    narrow = {}
    for file in WEIGHTS:
        whole = safetensors.numpy.load_file(tiny_release / file)
        part = {name: array.astype(stored) for name, array in whole.items()}
        safetensors.numpy.save_file(part, damaged / file)
        narrow |= part
    release = open_release(damaged)
    for name, array in arrays(release.load_model(stacked=False, dtype=jnp.float32)).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, narrow[name].astype(np.float32))
    model = release.load_model(stacked=True, dtype=jnp.bfloat16)
    assert {array.dtype for array in arrays(model).values()} == {np.dtype(ml_dtypes.bfloat16)}
    model = release.load_model(stacked=True, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert {array.dtype for array in arrays(model).values()} == {np.dtype(np.float32)}
    assert model.dtype == jnp.bfloat16


def test_load_codec_and_tokenizer(tiny_release, tiny_config):
    release = open_release(tiny_release)
    assert release.config == tiny_config
    codec = release.load_codec()
    expected = safetensors.numpy.load_file(tiny_release / "codec.safetensors")
    assert set(codec.params()) == set(expected)
    np.testing.assert_array_equal(codec.params()["quantizers.0.codebook"], expected["quantizers.0.codebook"])
    tokenizer = release.tokenizer()
    assert tokenizer.decode(tokenizer.encode("What is your name?").ids) == "What is your name?"


def test_inspect_lists_model_and_codec(tiny_release):
    tensors = open_release(tiny_release).inspect()
    assert tensors["embed.text"].shape == (312, 48)
    assert tensors["codec.quantizers.0.codebook"].shape == (64, 8)


# Making and saving.


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_init_model_on_a_mesh_save_and_load(tiny_release, tmp_path, stacked):
    config = models.tiny_config(tts_adapter_layers=1)
    config = replace(config, audio_encoder=replace(config.audio_encoder, num_layers=1))
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    model = init_model(config, stacked=stacked, dtype=jnp.float32, seed=3, mesh=mesh)
    check_sharding(model, mesh)
    old = open_release(tiny_release)
    tensors = model_tensors(model)
    assert {name: tensor.shape for name, tensor in tensors.items()} == parameter_shapes(config)
    checkpoint.save_release(tmp_path / "new", config, tensors, old.codec_tensors(), old.tokenizer_files())
    again = open_release(tmp_path / "new")
    assert again.config == config
    found = arrays(again.load_model(stacked=stacked, dtype=jnp.float32))
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(found[name], array)
    assert names(tmp_path / "new") == sorted({*checkpoint.FILES, *WEIGHTS})


@pytest.mark.parametrize("stacked", [False, True])
def test_int8_release_is_small_and_loads_on_any_mesh(tiny_release, tmp_path, stacked):
    old = open_release(tiny_release)
    tensors = {name: LazyTensor.of(tensor.read().astype(np.float32)) for name, tensor in old.model_tensors().items()}
    files = (old.codec_tensors(), old.tokenizer_files())
    checkpoint.save_release(tmp_path / "float32", old.config, tensors, *files)
    checkpoint.save_release(tmp_path / "int8", old.config, tensors, *files, int8=True)
    exact, int8 = open_release(tmp_path / "float32"), open_release(tmp_path / "int8")
    sizes = [(release.folder / checkpoint.MODEL).stat().st_size for release in (exact, int8)]
    assert sizes[1] < 0.45 * sizes[0]  # the header is a large part of such a small file
    assert exact.fingerprint() != int8.fingerprint()
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    model = int8.load_model(stacked=stacked, dtype=jnp.float32, mesh=mesh)
    check_sharding(model, mesh)
    rounded = {name: tensor.read() for name, tensor in int8.model_tensors().items()}
    for name, tensor in model_tensors(model).items():
        np.testing.assert_array_equal(tensor.read(), rounded[name])
        unrounded = tensors[name].read()
        assert np.abs(rounded[name] - unrounded).max() <= np.abs(unrounded).max() / 250, name


def test_save_release_overwrites_nothing(tiny_release, damaged):
    release = open_release(tiny_release)
    with pytest.raises(CheckpointError, match="expected a new or an empty folder"):
        checkpoint.save_release(
            damaged, release.config, release.model_tensors(), release.codec_tensors(), release.tokenizer_files()
        )


def test_save_release_lists_all_wrong_tensors(tiny_release, tmp_path):
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


def test_release_of_version_0_2_loads(damaged):
    """One file, without positions."""
    files = [SafetensorsFile(damaged / name) for name in (checkpoint.MODEL, checkpoint.AUDIO_ENCODER)]
    tensors = {name: LazyTensor.of(tensor.read()) for file in files for name, tensor in file.tensors.items()}
    expected = {name: tensor.read() for name, tensor in tensors.items()}
    del tensors["audio_encoder.positions"]
    (damaged / checkpoint.AUDIO_ENCODER).unlink()
    write_safetensors(damaged / checkpoint.MODEL, tensors)
    release = open_release(damaged)
    found = {name: tensor.read() for name, tensor in release.model_tensors().items()}
    encoder = release.config.audio_encoder
    expected["audio_encoder.positions"] = sinusoids(encoder.max_position, encoder.hidden_size)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)
    model = release.load_model(stacked=False, dtype=jnp.float32)
    np.testing.assert_array_equal(model.audio_encoder.positions[...], expected["audio_encoder.positions"])
    assert len(release.fingerprint()) == 64


@pytest.mark.slow
def test_killed_save_release_leaves_no_folder(tiny_release, tmp_path):
    script = f"""
import os, signal
from omni_jax.checkpoint import release as checkpoint
from omni_jax.checkpoint.safetensors_io import LazyTensor
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
        with pytest.raises(CheckpointError, match=r"found no config\.json"):
            open_release(tmp_path / name)


# Errors.


def test_open_release_of_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: expected a release.*found no such folder"):
        open_release(tmp_path / "nowhere")


def test_open_release_without_network():
    with pytest.raises(CheckpointError, match=r"owner/name: expected a release.*the hub says: ") as error:
        open_release("owner/name")
    assert "\n" not in str(error.value)


def test_open_release_downloads_from_the_hub(tiny_release, monkeypatch):
    asked = {}

    def download(name, *, allow_patterns, revision, cache_dir):
        asked.update(name=name, files=allow_patterns, revision=revision, cache_dir=cache_dir)
        return str(tiny_release)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_release("owner/name").folder == tiny_release
    files = [*checkpoint.FILES, checkpoint.AUDIO_ENCODER, checkpoint.MINI_OMNI_CONFIG]
    assert asked == {"name": "owner/name", "files": files, "revision": None, "cache_dir": None}
    assert open_release("owner/name", revision="v2", cache_dir="cache").folder == tiny_release
    assert asked == {"name": "owner/name", "files": files, "revision": "v2", "cache_dir": "cache"}


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_open_release_names_the_missing_file(damaged, name):
    (damaged / name).unlink()
    with pytest.raises(CheckpointError, match=f"found no {name}"):
        open_release(damaged)


def test_wrong_config_names_the_field(damaged):
    values = json.loads((damaged / "config.json").read_text())
    values["trunk"]["num_heads"] = "four"
    (damaged / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"config\.json: trunk\.num_heads"):
        open_release(damaged)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "whisper"}'])
def test_config_of_something_else(damaged, content):
    """Folders of other libraries have a config.json, too."""
    assert is_release(damaged)
    (damaged / "config.json").write_text(content)
    assert not is_release(damaged)
    with pytest.raises(ConfigError, match=r"config\.json: expected (JSON|the config of an omni_jax release)"):
        open_release(damaged)


def test_config_round_trip_keeps_small_floats(tiny_config, tmp_path):
    trunk = replace(tiny_config.trunk, norm_eps=1e-6)
    checkpoint.save_model_config(replace(tiny_config, trunk=trunk), tmp_path / "config.json")
    assert '"model_type": "omni_jax"' in (tmp_path / "config.json").read_text()
    assert checkpoint.load_model_config(tmp_path / "config.json").trunk == trunk


def test_load_model_lists_all_wrong_tensors(damaged):
    state = safetensors.numpy.load_file(damaged / "model.safetensors")
    state["strange"] = state.pop("norm.scale")
    state["embed.text"] = state["embed.text"][:5]
    safetensors.numpy.save_file(state, damaged / "model.safetensors")
    for stacked in (False, True):
        with pytest.raises(CheckpointError) as error:
            open_release(damaged).load_model(stacked=stacked, dtype=jnp.float32)
        assert str(error.value).splitlines() == [
            f"{damaged / 'model.safetensors'} does not fit config.json:",
            "norm.scale: missing, expected (48,)",
            "embed.text: expected (312, 48), found (5, 48)",
            "strange: unknown, found (48,)",
        ]


def test_load_codec_lists_all_wrong_tensors(damaged):
    state = safetensors.numpy.load_file(damaged / "codec.safetensors")
    state["strange"] = state.pop("quantizers.0.codebook")
    safetensors.numpy.save_file(state, damaged / "codec.safetensors")
    with pytest.raises(
        CheckpointError, match=r"codec\.safetensors.*\n.*quantizers\.0\.codebook: missing, expected \(64, 8\)\nstrange"
    ):
        open_release(damaged).load_codec()


def test_tokenizer_that_does_not_fit_is_refused(damaged):
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


# Files that were made to harm.


@pytest.mark.parametrize(
    ("module", "field", "value"),
    [
        ("trunk", "num_layers", 10**9),
        ("trunk", "max_position", 10**12),
        ("trunk", "head_dim", 10**12),
        ("audio_encoder", "max_position", 10**12),
        ("audio_encoder", "num_mel_bins", 10**9),
        ("vocab", "text", 10**30),
        ("codec", "encoder_dim", 10**9),
        ("codec", "encoder_rates", [10**9, 10**9]),
        ("codec", "decoder_rates", [-8, -8, 4, 2]),
        ("codec", "decoder_rates", []),
        ("codec", "decoder_rates", [1024] * 16),
        ("adapter", "stack", 10**9),
    ],
)
def test_config_with_a_huge_dimension_is_refused(damaged, module, field, value):
    values = json.loads((damaged / "config.json").read_text())
    values[module][field] = value
    (damaged / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"config\.json: {module}"):
        open_release(damaged)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"model_type": NaN}', "9" * 10**6])
def test_config_that_a_parser_would_fail_at(damaged, text):
    (damaged / "config.json").write_text(text)
    assert not is_release(damaged)
    with pytest.raises(ConfigError, match=r"config\.json: expected JSON, found"):
        open_release(damaged)


@pytest.mark.parametrize("file", checkpoint.FILES)
def test_release_with_a_pipe_in_it_is_refused(damaged, file):
    (damaged / file).unlink()
    os.mkfifo(damaged / file)
    with pytest.raises((CheckpointError, ConfigError), match=f"found no {file}"):
        open_release(damaged)


@pytest.mark.parametrize("stacked", [False, True])
def test_load_model_names_weights_that_are_not_finite(damaged, stacked):
    state = safetensors.numpy.load_file(damaged / "model.safetensors")
    state["trunk.layers.1.attention.q.weight"][0, 0, 0] = np.nan
    safetensors.numpy.save_file(state, damaged / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"trunk\.layers\.1\.attention\.q\.weight: expected finite values, found NaN"
    ):
        open_release(damaged).load_model(stacked=stacked, dtype=jnp.float32)


def test_load_model_larger_than_memory_is_refused_before_it_is_read(damaged, monkeypatch):
    """A file with a hole takes no space on disk: 100 GB may be claimed by a few bytes."""
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    for load in (lambda release: release.load_model(stacked=False, dtype=jnp.float32), lambda r: r.load_codec()):
        with pytest.raises(ConfigError, match=r"\d+ parameters: expected at most 0\.0 GB, the memory of the devices"):
            load(open_release(damaged))
