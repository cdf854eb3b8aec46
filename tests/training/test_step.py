"""The training step: augmentation, gradients, skipped steps; the same on one device, eight devices, two processes."""

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.checkpoint.tensors import init_model
from omni_jax.config.load import build_config
from omni_jax.config.run import RunConfig
from omni_jax.model.omni import OmniModel
from omni_jax.training import step
from omni_jax.training.optimizer import adamw
from omni_jax.training.stages import partition
from omni_jax.training.step import TrainState, forward, train_step
from tests.inference.reference_decoder import random_model
from tests.models import tiny_config

ROOT = Path(__file__).parents[2]
TINY = tiny_config(tts_adapter_layers=1)
# Programs of this size are compiled a dozen times here.
MODEL = replace(TINY, audio_encoder=replace(TINY.audio_encoder, num_layers=1), trunk=replace(TINY.trunk, num_layers=2))
EVERYTHING = ("adapter", "trunk", "text_embedding", "audio_embedding", "tts_adapter")
ROWS, LENGTH, CLIPS = 8, 40, 2
STEPS = 3
DATA = {"sources": [{"path": "unused"}], "tasks": {"A1A2": 1}, "batch_size": ROWS, "max_length": LENGTH}
TWO_PROCESS_MESHES = ((8, 1, 1), (2, 2, 2))
# A large eps: the gradient of a key bias is nothing but rounding, which AdamW would blow up to whole steps.
OPTIMIZER = {"steps": 50, "peak_lr": 3e-3, "warmup_steps": 2, "eps": 1e-3}


def run_config(**changes) -> RunConfig:
    values = {
        "out": "unused",
        "start": "preset:tiny",
        "trainable": EVERYTHING,
        "data": DATA,
        "optimizer": OPTIMIZER,
        "loss": {"chunk_size": 16 * ROWS},
        "remat": "none",
        "log_interval_steps": 2,
    }
    return build_config(RunConfig, {**values, **changes}, "test")


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two packed examples; the second one takes the second clip."""
    rng = np.random.default_rng(seed)
    half = LENGTH // 2
    local = np.concatenate([np.arange(half), np.arange(half)]).astype(np.int32)
    per_clip = MODEL.audio_encoder.max_position
    index = np.where((local >= 1) & (local <= 8), local - 1, -1) + np.where(np.arange(LENGTH) < half, 0, per_clip)
    index = np.where((local >= 1) & (local <= 8), index, -1).astype(np.int32)
    segments = np.where(np.arange(LENGTH) < half, 1, 2).astype(np.int32)
    return {
        "tokens": rng.integers(0, MODEL.vocab.audio, (ROWS, 8, LENGTH), dtype=np.int32),
        "targets": rng.integers(0, MODEL.vocab.audio, (ROWS, 8, LENGTH), dtype=np.int32),
        "mask": rng.random((ROWS, 8, LENGTH)) < 0.4,
        "positions": np.tile(local, (ROWS, 1)),
        "segments": np.tile(segments, (ROWS, 1)),
        "speech_index": np.tile(index, (ROWS, 1)),
        "sound": rng.integers(-3000, 3000, (ROWS, CLIPS, MODEL.audio_encoder.max_samples), dtype=np.int16),
    }


@cache
def weights() -> tuple[Any, Any]:
    """Graph and weights of a model with stacked layers, on one device."""
    graph, state = nnx.split(init_model(MODEL, stacked=True, dtype=jnp.float32, seed=0))
    return graph, jax.tree.map(np.asarray, nnx.to_pure_dict(state))


COMPILED: dict[str, Any] = {}
"""Jitted steps by the repr of their config."""


class Trainer:
    """A model and its compiled step, on a mesh or without one."""

    def __init__(self, config: RunConfig, mesh: Mesh | None = None):
        self.config, self.mesh = config, mesh
        graph, params = weights()
        if mesh is None:
            params = jax.tree.map(jnp.asarray, params)
        else:
            _, state = nnx.split(nnx.merge(graph, params))
            params = jax.device_put(params, sharding.of_state(state, mesh))
        self.trainable, self.frozen = partition(params, config.trainable)
        self.compiled = COMPILED.setdefault(repr(config), jax.jit(partial(train_step, graph, config)))

    def init_state(self) -> TrainState:
        # Zeros that are sharded as what they belong to, or the second step would be compiled again.
        tx, like = adamw(self.config.optimizer), jax.tree.map(jnp.zeros_like, self.trainable)
        opt_state = optax.tree.map_params(tx, lambda _, zeros: zeros, tx.init(self.trainable), like)
        zero = jnp.int32(0)
        if self.mesh is not None:
            replicated = sharding.replicated(self.mesh)
            zero = jax.device_put(np.int32(0), replicated)
            opt_state = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, replicated), opt_state)
        return TrainState(zero, self.trainable, opt_state, zero, zero)

    def shard(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        if self.mesh is None:
            return arrays
        rows = sharding.rows(self.mesh)
        return {name: jax.make_array_from_callback(x.shape, rows, x.__getitem__) for name, x in arrays.items()}

    def step(self, state: TrainState, arrays: dict[str, np.ndarray]) -> tuple[TrainState, dict[str, Any]]:
        with nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return self.compiled(state, self.frozen, self.shard(arrays))

    def run(self, steps: int) -> tuple[TrainState, list[dict]]:
        state, metrics = self.init_state(), []
        for number in range(steps):
            state, found = self.step(state, batch(number))
            metrics.append(jax.device_get(found))
        return state, metrics


def flat(tree) -> dict[str, np.ndarray]:
    return {".".join(map(str, k)): np.asarray(v) for k, v in traverse_util.flatten_dict(tree).items()}


@pytest.fixture(scope="module")
def one_device() -> tuple[TrainState, list[dict]]:
    return Trainer(run_config()).run(STEPS)


def augmented(**augmentation: Any) -> RunConfig:
    return run_config(data={**DATA, **augmentation})


def test_forward_without_audio_tasks_skips_audio_encoder(monkeypatch: pytest.MonkeyPatch):
    model = random_model(MODEL)
    monkeypatch.setattr(OmniModel, "encode_audio", lambda *_: pytest.fail("the audio encoder was run"))
    arrays = batch() | {"speech_index": np.full((ROWS, LENGTH), -1, np.int32)}
    data = {**DATA, "tasks": {"T1T2": 1, "T1A2": 1}}
    assert np.isfinite(forward(model, arrays, jnp.ones(8), run_config(data=data))[0])


def test_encode_audio_gives_the_same_for_clips_in_turn_and_together(monkeypatch: pytest.MonkeyPatch):
    model = random_model(MODEL)
    losses = []
    for in_turn in (True, False):
        monkeypatch.setattr(step, "encodes_clips_in_turn", lambda in_turn=in_turn: in_turn)
        losses.append(forward(model, batch(), jnp.ones(8), run_config())[1]["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_corrupt_codes_replaces_a_share_of_codes_only():
    codes = 100
    tokens = np.random.default_rng(0).integers(0, codes + 8, (4, 8, 500)).astype(np.int32)
    corrupted = np.asarray(jax.jit(step.corrupt_codes, static_argnums=(1, 2))(tokens, 0.2, codes, jax.random.key(1)))
    other = corrupted != tokens
    code = tokens < codes
    assert not other[:, 7].any(), "text"
    assert not other[:, :7][~code[:, :7]].any(), "specials"
    # Of a hundred codes one is the right one again.
    assert abs(other[:, :7][code[:, :7]].mean() - 0.2 * 0.99) < 0.01
    drawn = corrupted[other]
    assert (drawn.min(), drawn.max()) == (0, codes - 1)
    agree = np.corrcoef(other[:, 0].ravel(), other[:, 1].ravel())[0, 1]
    assert abs(agree) < 0.1, "each code on its own"


@pytest.mark.parametrize(
    "augmentation",
    [{"spec_augment": {"max_warp": 0.2}}, pytest.param({"audio_token_noise": 0.3}, marks=pytest.mark.nightly)],
)
def test_augmentation_differs_by_step(augmentation: dict):
    def losses(config: RunConfig) -> list[float]:
        """Of one batch and the same parameters at different steps."""
        trainer, found = Trainer(config), []
        for number in range(2):
            state = trainer.init_state()
            found.append(float(trainer.step(replace(state, step=state.step + number), batch())[1]["loss"]))
        return found

    assert len({*losses(augmented(**augmentation)), *losses(run_config())}) == 3, "two draws and none"


@pytest.mark.nightly
def test_augmentation_with_gradient_accumulation():
    config = augmented(spec_augment={"max_warp": 0.2})
    config = replace(config, optimizer=replace(config.optimizer, gradient_accumulation_steps=4))
    _, metrics = Trainer(config).run(2)
    assert np.isfinite([step["loss"] for step in metrics]).all()


def test_train_step_fits_a_batch():
    """`test_overfit` goes on until the answers are exact."""
    trainer = Trainer(run_config())
    state, losses = trainer.init_state(), []
    for _ in range(40):
        state, metrics = trainer.step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 40


@pytest.mark.parametrize(
    ("sizes", "augmentation"),
    [
        ((2, 2, 2), {"spec_augment": {"max_warp": 0.2}}),
        *(pytest.param(sizes, {}, marks=pytest.mark.nightly) for sizes in [(8, 1, 1), (1, 8, 1), (1, 4, 2)]),
        pytest.param((2, 2, 2), {"audio_token_noise": 0.3}, marks=pytest.mark.nightly),
    ],
)
def test_train_step_on_eight_devices_equals_one(sizes: tuple[int, int, int], augmentation: dict):
    """Losses and parameters, whatever the augmentation has drawn."""
    assert len(jax.devices()) == 8
    config = augmented(**augmentation)
    expected, expected_metrics = Trainer(config).run(STEPS)
    trainer = Trainer(config, sharding.make_mesh(*sizes))
    state, metrics = trainer.run(STEPS)
    for mine, theirs in zip(metrics, expected_metrics, strict=True):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-5)
    for name, value in flat(expected.trainable).items():
        np.testing.assert_allclose(flat(state.trainable)[name], value, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_train_step_in_two_processes_of_four_devices_equals_one_device(one_device, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4")}
    environment |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "training" / "two_processes.py"), coordinator]
    processes, logs = [], [tmp_path / "0.log", tmp_path / "1.log"]
    for number, log in enumerate(logs):
        with log.open("w") as file:
            arguments = [*command, str(number), str(tmp_path / "found.npz")]
            processes.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=file))
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=400) == 0, log.read_text()
    with np.load(tmp_path / "found.npz") as found:
        # Process 0 has every other row.
        order = np.stack([np.arange(4), np.arange(4, 8)], 1).ravel()
        np.testing.assert_array_equal(found["targets"], batch()["targets"][order])
        for sizes in TWO_PROCESS_MESHES:
            name = "x".join(map(str, sizes))
            losses = [step["loss"] for step in one_device[1]]
            np.testing.assert_allclose(found[f"{name}/loss"], losses, rtol=1e-5)
            for key, value in flat(one_device[0].trainable).items():
                np.testing.assert_allclose(found[f"{name}/{key}"], value, atol=1e-5, err_msg=f"{name} {key}")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"remat": "dots"}, marks=pytest.mark.nightly),
    ],
)
def test_remat_gives_the_same_losses(one_device, changes):
    _, metrics = Trainer(run_config(**changes)).run(2)
    for mine, theirs in zip(metrics, one_device[1], strict=False):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-5)


def test_gradient_accumulation_equals_whole_batch(one_device):
    """Micro-batches hold different numbers of targets, so a mean of their means would be another loss."""
    optimizer = {**OPTIMIZER, "gradient_accumulation_steps": 4}
    state, metrics = Trainer(run_config(optimizer=optimizer)).run(STEPS)
    for mine, theirs in zip(metrics, one_device[1], strict=True):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-5)
        np.testing.assert_allclose(mine["head_losses"], theirs["head_losses"], rtol=1e-5)
    for name, value in flat(one_device[0].trainable).items():
        np.testing.assert_allclose(flat(state.trainable)[name], value, atol=1e-5, err_msg=name)


def test_gradients_are_added_up_in_bfloat16(one_device):
    """Four micro-batches: each sum is rounded to eight bits; losses are not."""
    optimizer = {**OPTIMIZER, "gradient_accumulation_steps": 4, "gradient_accumulation_dtype": "bfloat16"}
    state, metrics = Trainer(run_config(optimizer=optimizer)).run(STEPS)
    np.testing.assert_allclose(metrics[0]["loss"], one_device[1][0]["loss"], rtol=1e-5)
    expected = one_device[0].opt_state.mu
    error = optax.tree.norm(optax.tree.sub(state.opt_state.mu, expected)) / optax.tree.norm(expected)
    assert 1e-4 < error < 4 * 2**-9


def test_frozen_parameters_have_no_opt_state_and_trainable_ones_change():
    trainer = Trainer(run_config(trainable=("adapter", "tts_adapter")))
    state, _ = trainer.run(2)
    size = sum(x.size for x in jax.tree.leaves(state.trainable))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * size
    assert set(state.trainable) == {"adapter", "tts_adapter"}
    before = flat(trainer.trainable)
    for name, value in flat(state.trainable).items():
        assert not np.array_equal(value, before[name]), name


def test_update_norm_is_computed_in_logged_steps_only(one_device):
    metrics = one_device[1]
    assert [bool(np.isfinite(step["update_norm"])) for step in metrics] == [False, True, False]
    assert metrics[1]["param_norm"] > 0


def test_train_step_skips_and_counts_losses_that_are_not_finite():
    trainer = Trainer(run_config())
    poisoned = jax.tree.map(lambda x: x, trainer.trainable)
    poisoned["norm"]["scale"] = poisoned["norm"]["scale"].at[0].set(jnp.nan)
    state = replace(trainer.init_state(), trainable=poisoned)
    after, metrics = trainer.step(state, batch())
    after, metrics = trainer.step(after, batch())
    assert not np.isfinite(metrics["loss"])
    assert (int(after.num_skipped), int(after.num_skipped_in_a_row), int(after.step)) == (2, 2, 2)
    for name, value in flat(after.trainable).items():
        np.testing.assert_array_equal(value, flat(poisoned)[name], err_msg=name)
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(after.opt_state))
    healed = replace(after, trainable=trainer.trainable)
    after, _ = trainer.step(healed, batch())
    assert (int(after.num_skipped), int(after.num_skipped_in_a_row)) == (2, 0)
