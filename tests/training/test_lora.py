"""LoRA in training: gradients as PEFT's, the same on one device and eight, frozen weights in eight bits, whole runs."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, traverse_util

from omni_jax import sharding
from omni_jax.checkpoint.release import open_release
from omni_jax.checkpoint.tensors import model_tensors, parameter_shapes
from omni_jax.config.load import build_config
from omni_jax.config.run import LoRAConfig, RunConfig
from omni_jax.convert import peft
from omni_jax.errors import ConfigError
from omni_jax.model.layers import Int8, linear
from omni_jax.model.lora import add_lora
from omni_jax.model.omni import OmniModel
from omni_jax.training import setup as training_setup
from omni_jax.training.batches import shard_batch
from omni_jax.training.checkpointing import Checkpoints
from omni_jax.training.checks import problems
from omni_jax.training.describe import describe
from omni_jax.training.loop import train
from omni_jax.training.lora import init_lora
from omni_jax.training.setup import TrainingSetup, compile_step
from omni_jax.training.stages import combine, partition
from omni_jax.training.step import forward
from tests import models
from tests.training import test_gradients
from tests.training.test_loop import losses, records, run_values
from tests.training.test_step import DATA, batch, flat, run_config

__all__ = ["records"]

LORA: dict[str, Any] = {"rank": 4, "alpha": 6.0}
peft_warnings = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@peft_warnings
def test_lora_gradient_equals_peft(tmp_path: Path):
    """Packed rows, scanned layers, remat; all eight heads; the adapter next to it is trained as a whole."""
    config = models.tiny_config()
    run = run_config(trainable=["adapter"], lora=LORA, loss=test_gradients.LOSS, remat="full")
    model = OmniModel(config, stacked=True, dtype=jnp.float32, rngs=nnx.Rngs(1))
    add_lora(model, run.lora)
    graph, state = nnx.split(model)
    random = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: (
            jnp.asarray(0.1 * random.standard_normal(x.shape, np.float32))
            + (0 if isinstance(x, jax.ShapeDtypeStruct) else x)
        ),
        nnx.to_pure_dict(state),
    )
    trainable, frozen = partition(params, run.trained)
    arrays = batch()
    counts = jnp.asarray(arrays["mask"].sum((0, 2)), jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def compute(trainable: Any) -> jax.Array:
        return forward(nnx.merge(graph, combine(trainable, frozen)), arrays, counts, run)[0]

    value, gradient = compute(trainable)
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    weights, mine = (
        model_tensors(nnx.merge(graph, combine(tree, rest))) for tree, rest in ((trainable, frozen), (gradient, zeros))
    )
    for name, tree in (("weights", weights), ("gradient", mine)):
        peft.write(tmp_path / name, config.trunk, run.lora, {n: t for n, t in tree.items() if peft.is_lora(n)})
    found = safetensors.numpy.load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    features = test_gradients.features_of(nnx.merge(graph, params), arrays)
    plain = {name: tensor.read() for name, tensor in weights.items() if not peft.is_lora(name)}
    expected, theirs = test_gradients.their_gradient(
        config, arrays, plain, features, tmp_path, lora=tmp_path / "weights"
    )
    assert abs(float(value) - expected) < 1e-4
    assert set(found) == {name for name in theirs if "lora_" in name}
    for name, array in found.items():
        assert np.abs(theirs[name]).max() > 1e-4, name
        np.testing.assert_allclose(array, theirs[name], atol=1e-4, err_msg=name)
    for name in ("gate", "up", "down"):
        name = f"adapter.map.{name}.weight"
        np.testing.assert_allclose(mine[name].read(), theirs[name], atol=1e-4, err_msg=name)


def steps(config: RunConfig, folder: Path, devices: list[jax.Device] | None = None) -> tuple[list[float], Any, Any]:
    """Losses of three steps, the train state after them, and the frozen parameters."""
    setup = TrainingSetup.of(config, devices)
    with Checkpoints(config, folder) as checkpoints:
        state, frozen, _ = checkpoints.restore_or_init(setup)
    found = []
    with jax.set_mesh(setup.mesh):
        step = compile_step(setup)
        for number in range(3):
            state, metrics = step(state, frozen, shard_batch(batch(number), setup.mesh).arrays)
            found.append(float(metrics["loss"]))
    return found, state, frozen


@pytest.mark.parametrize("stacked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lora_step_on_eight_devices_equals_one(
    stacked: bool, tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With dropout, weights in eight bits, gradient accumulation, remat, and embeddings that are trained as a whole."""
    assert len(jax.devices()) == 8
    monkeypatch.setattr(training_setup, "default_layout", lambda platform: (stacked, jnp.float32))
    optimizer = {"steps": 50, "peak_lr": 3e-3, "eps": 1e-3, "gradient_accumulation_steps": 2}
    config = run_config(
        start=str(tiny_release),
        trainable=["adapter", "audio_embedding"],
        lora={**LORA, "dropout": 0.3},
        frozen_dtype="int8",
        remat="full",
        optimizer=optimizer,
    )
    one, expected, _ = steps(config, tmp_path / "1", jax.devices()[:1])
    mesh = replace(config.mesh, data=2, fsdp=2, tensor=2)
    eight, found, frozen = steps(replace(config, mesh=mesh), tmp_path / "8")
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert len(set(one)) == 3
    arrays = flat(found.trainable)
    assert sum(name.endswith("lora.b") for name in arrays) == 7 * (1 if stacked else 2)
    for name, value in flat(expected.trainable).items():
        np.testing.assert_allclose(arrays[name], value, atol=1e-5, err_msg=name)
        assert value.any(), name
    if stacked:
        own = traverse_util.flatten_dict(found.trainable)
        base = traverse_util.flatten_dict(frozen)
        for path, array in own.items():
            if "lora" not in path:
                continue
            weight = base[(*path[:-2], "weight")].values
            inputs = 2 if path[-3] == "out" else 1
            # A is split as the inputs of the weight, B as its outputs, neither along the rank.
            spec, whole = array.sharding.spec, (*weight.sharding.spec, None, None, None)[: weight.ndim]
            mine = (*spec, None, None)[: array.ndim]
            assert mine == (
                (None, None, *whole[-inputs:]) if path[-1] == "a" else (*whole[: weight.ndim - inputs], None)
            )
        assert sum(len(set(x.sharding.spec) - {None}) for path, x in own.items() if "lora" in path) == 14


def test_lora_starts_as_the_base_and_drops_only_in_training(tiny_release: Path, tmp_path: Path):
    plain = run_config(start=str(tiny_release), trainable=["adapter"], data={**DATA, "tasks": {"T1T2": 1}})
    config = replace(plain, lora=LoRAConfig(**LORA, dropout=0.5))
    arrays, found = batch(), {}
    for name, run in (("plain", plain), ("lora", config)):
        setup = TrainingSetup.of(run, jax.devices()[:1])
        with Checkpoints(run, tmp_path / name) as checkpoints:
            state, frozen, _ = checkpoints.restore_or_init(setup)
        params = combine(state.trainable, frozen)
        compute = jax.jit(
            lambda params, key, setup=setup: forward(
                nnx.merge(setup.graph, params), arrays, jnp.ones(8), setup.config, key
            )[0]
        )
        found[name] = float(compute(params, None))
    assert found["lora"] == found["plain"]
    moved = traverse_util.flatten_dict(params)
    moved = {path: x + 0.3 if path[-1] == "b" else x for path, x in moved.items()}
    moved = traverse_util.unflatten_dict(moved)
    values = [float(compute(moved, key)) for key in (None, jax.random.key(0), jax.random.key(0), jax.random.key(1))]
    assert values[1] == values[2]
    assert len(set(values)) == 3
    drawn = np.stack([x for path, x in flat(params).items() if path.endswith("attention.q.lora.a")])
    assert drawn.std() == pytest.approx(48**-0.5, rel=0.1)
    assert (drawn[0] != drawn[1]).all()
    assert not any(x.any() for path, x in flat(params).items() if path.endswith("lora.b"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, records: Path, tiny_release: Path) -> tuple[dict, Path]:
    """A run with LoRA on weights in eight bits."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    values = run_values(
        out,
        records,
        steps=4,
        start=str(tiny_release),
        trainable=["audio_embedding"],
        lora={**LORA, "targets": ["q", "v", "down"]},
        frozen_dtype="int8",
        evaluation={"num_samples": 0, "max_batches": 1},
    )
    assert train(build_config(RunConfig, values, "test")) == out / "release"
    return values, out


def test_lora_run_ends_with_a_merged_release_and_an_adapter(finished: tuple[dict, Path], tiny_release: Path):
    _, out = finished
    start = open_release(tiny_release)
    adapter = peft.read(out / "lora", start.config.trunk)
    assert (adapter.rank, adapter.alpha, len(adapter.tensors)) == (4, 6.0, 2 * 3 * 2)
    before, after = (
        {n: t.read() for n, t in release.model_tensors().items()} for release in (start, open_release(out))
    )
    changed = {name for name, array in before.items() if array.tobytes() != after[name].tobytes()}
    layers = (
        f"trunk.layers.{layer}.{name}" for layer in range(2) for name in ("attention.q", "attention.v", "mlp.down")
    )
    maps = list(layers)
    assert changed == {"embed.audio", *(f"{name}.weight" for name in maps)}
    for name in maps:
        a, b = (adapter.tensors[name + suffix].read() for suffix in (peft.OUR_A, peft.OUR_B))
        change = after[f"{name}.weight"] - before[f"{name}.weight"]
        np.testing.assert_allclose(change, 1.5 * np.tensordot(b, a, 1), atol=1e-6)
        assert np.abs(change).max() > 1e-4


def test_lora_run_resumes_to_the_bit(finished: tuple[dict, Path], tmp_path: Path):
    values, whole = finished
    out = tmp_path / "again"
    shutil.copytree(whole, out)
    for name in ("release", "lora", "checkpoints/4"):
        shutil.rmtree(out / name)
    config = build_config(RunConfig, {**values, "out": str(out)}, "test")
    assert train(config) == out / "release"
    assert losses(out) == losses(whole)
    for name in ("release/model.safetensors", "lora/adapter_model.safetensors", "lora/adapter_config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    other = {**values, "out": str(out), "lora": {**values["lora"], "rank": 5}}
    (line,) = problems(TrainingSetup.of(build_config(RunConfig, other, "test")), out)
    assert "12 tensors differ, such as trunk.layers.0.attention.q.lora.a: expected (4, 48), found (5, 48)" in line


def test_lora_goes_on_from_an_adapter(finished: tuple[dict, Path], tmp_path: Path):
    values, out = finished
    lora = {**values["lora"], "start": str(out / "lora")}
    start = {**values, "out": str(tmp_path / "next")}
    setup = TrainingSetup.of(build_config(RunConfig, {**start, "lora": lora}, "test"))
    assert not problems(setup, tmp_path / "next")
    adapter = peft.read(out / "lora", setup.start.config.trunk)
    found = flat(init_lora(setup))
    assert set(found) == set(adapter.tensors)
    for name, array in found.items():
        np.testing.assert_array_equal(array, adapter.tensors[name].read(), err_msg=name)
    for changes, message in (
        ({"rank": 8}, "lora.rank: expected 4, as in "),
        ({"alpha": 4.0}, "lora.alpha: expected 6.0, as in "),
        ({"targets": ["v", "q"]}, "lora.targets: expected q, v, down, as in "),
        ({"start": str(tmp_path)}, f"{tmp_path}"),
    ):
        other = TrainingSetup.of(build_config(RunConfig, {**start, "lora": {**lora, **changes}}, "test"))
        (line,) = problems(other, tmp_path / "next")
        assert line.startswith(message)


def test_describe_counts_lora_and_frozen_weights(finished: tuple[dict, Path]):
    setup = TrainingSetup.of(build_config(RunConfig, finished[0], "test"))
    rows = {line.split()[0]: line.split() for line in describe(setup).splitlines() if line.split()}
    count = 2 * 4 * (48 + 64 + 48 + 32 + 96 + 48)
    assert rows["lora"][1:3] == [f"{count:,}", "trainable"]
    shapes = parameter_shapes(setup.start.config)
    trunk = sum(np.prod(shape) for name, shape in shapes.items() if name.startswith(("trunk.", "norm.")))
    assert rows["trunk"][1:3] == [f"{trunk:,}", "frozen"]


def test_frozen_dtype_is_the_memory_of_frozen_weights(tiny_release: Path, tmp_path: Path):
    found = {}
    for dtype in ("float32", "bfloat16", "int8"):
        config = run_config(start=str(tiny_release), trainable=["adapter"], lora=LORA, frozen_dtype=dtype)
        setup = TrainingSetup.of(config, jax.devices()[:1])
        with Checkpoints(config, tmp_path / dtype) as checkpoints:
            state, frozen, _ = checkpoints.restore_or_init(setup)
        abstract_state, abstract = setup.abstract()
        for real, shape in ((frozen, abstract), (state.trainable, abstract_state.trainable)):
            assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(lambda x: (x.shape, x.dtype), shape)
        assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {np.dtype(np.float32)}
        found[dtype] = sum(x.nbytes for x in jax.tree.leaves(frozen["trunk"]))
    assert found["bfloat16"] == found["float32"] / 2
    assert found["int8"] < 0.6 * found["bfloat16"]


def test_linear_of_int8_gives_gradients_in_bfloat16():
    random = np.random.default_rng(0)
    x, weight = (jnp.asarray(random.standard_normal((64, 48), np.float32)) for _ in range(2))
    rounded = Int8.of(weight)
    whole = rounded.values * rounded.scale[:, None]
    with jax.set_mesh(sharding.make_mesh(1)):
        found = jax.grad(lambda x: (linear(x, rounded).astype(jnp.float32) ** 2).sum())(x.astype(jnp.bfloat16))
        expected = jax.grad(lambda x: (linear(x, whole) ** 2).sum())(x)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.02 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 0}}, "lora.rank: Input should be greater than 0, found 0"),
        (
            {"lora": {"targets": ["q", "q_proj"]}},
            "targets must be some of q, k, v, out, gate, up, down, found q_proj",
        ),
        ({"lora": {"targets": []}}, "targets must be some of q, k, v, out, gate, up, down, found none"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout: "),
        (
            {"trainable": ["adapter", "trunk"]},
            "trainable: expected no trunk with lora, which adapts a frozen trunk",
        ),
    ],
)
def test_lora_config_names_what_is_wrong(changes: dict, message: str):
    with pytest.raises(ConfigError) as error:
        run_config(**{"lora": LORA, "trainable": [], **changes})
    assert message in str(error.value)
    assert run_config(lora=LORA, trainable=[]).trained == ("lora",)
