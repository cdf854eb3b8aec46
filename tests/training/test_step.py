"""The step: what it computes, what it leaves alone, the same on one device and on eight."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from omni_jax import config as configs
from omni_jax import sharding
from omni_jax.checkpoint.tensors import init_model
from omni_jax.config.run import LossConfig, RunConfig
from omni_jax.model.omni import OmniModel
from omni_jax.training import loss, step
from omni_jax.training.stages import partition
from omni_jax.training.step import TrainState, advance, forward, optimizer, train_step, updates
from tests.models import tiny_config

ROOT = Path(__file__).parents[2]
TINY = tiny_config(tts_adapter_layers=1)
# Programs of this size are compiled a dozen times here.
MODEL = replace(TINY, audio_encoder=replace(TINY.audio_encoder, num_layers=1), trunk=replace(TINY.trunk, num_layers=2))
EVERYTHING = ("adapter", "trunk", "text_embedding", "audio_embedding", "tts_adapter")
ROWS, LENGTH, CLIPS = 8, 40, 2
STEPS = 3
TWO_PROCESS_MESHES = ((8, 1, 1), (2, 2, 2))
# A large eps: the gradient of a key bias is nothing but rounding, which AdamW would blow up to whole steps.
OPTIMIZER = {"steps": 50, "peak": 3e-3, "warmup": 2, "eps": 1e-3}


def run_config(**changes) -> RunConfig:
    values = {
        "out": "unused",
        "start": "preset:tiny",
        "learn": EVERYTHING,
        "data": {"sources": [{"path": "unused"}], "tasks": {"A1A2": 1}, "batch": ROWS, "length": LENGTH},
        "optimizer": OPTIMIZER,
        "loss": {"chunk": 16 * ROWS},
        "remat": "none",
    }
    return configs.build(RunConfig, {**values, **changes}, "test")


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two packed examples, the second of which hears the second clip."""
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


class Trainer:
    """A model and its compiled step on a mesh."""

    def __init__(self, config: RunConfig, mesh=None, stacked: bool = True):
        self.config, self.mesh = config, mesh
        model = init_model(MODEL, stacked=stacked, dtype=jnp.float32, seed=0, mesh=mesh)
        graph, state = nnx.split(model)
        self.graph = graph
        self.learning, self.frozen = partition(nnx.to_pure_dict(state), config.trainable)
        self.step = jax.jit(partial(train_step, graph, config))

    def begin(self) -> TrainState:
        zero = jnp.int32(0)
        moments = jax.jit(optimizer(self.config.optimizer).init)(self.learning)
        if self.mesh is not None:
            zero = jax.device_put(np.int32(0), sharding.replicated(self.mesh))
        return TrainState(zero, self.learning, moments, zero, zero)

    def place(self, arrays):
        if self.mesh is None:
            return arrays
        spot = sharding.rows(self.mesh)
        return {
            name: jax.make_array_from_callback(x.shape, spot, lambda index, x=x: x[index]) for name, x in arrays.items()
        }

    def go(self, steps: int) -> tuple[TrainState, list[dict]]:
        state, metrics = self.begin(), []
        for number in range(steps):
            state, found = self.step(state, self.frozen, self.place(batch(number)))
            metrics.append(jax.device_get(found))
        return state, metrics


def flat(tree) -> dict[str, np.ndarray]:
    return {".".join(map(str, k)): np.asarray(v) for k, v in traverse_util.flatten_dict(tree).items()}


@pytest.fixture(scope="module")
def one_device() -> tuple[TrainState, list[dict]]:
    return Trainer(run_config()).go(STEPS)


def test_the_loss_is_cross_entropy_per_head_whatever_the_chunk():
    """Against logits made whole and a log-softmax taken in numpy."""
    model = init_model(MODEL, stacked=False, dtype=jnp.float32, seed=0)
    arrays = batch()
    rng = np.random.default_rng(1)
    text, audio = (rng.standard_normal((ROWS, LENGTH, MODEL.trunk.hidden_size)).astype(np.float32) for _ in range(2))
    logits = [np.asarray(model.audio_logits(jnp.asarray(audio)))[..., k, :] for k in range(7)]
    logits.append(np.asarray(model.text_logits(jnp.asarray(text))))
    expected, right, squares = np.zeros(8), np.zeros(8), np.zeros(8)
    for k, scores in enumerate(logits):
        scores = scores.astype(np.float64)
        normalizer = np.log(np.exp(scores).sum(-1))
        said = np.take_along_axis(scores, arrays["targets"][:, k, :, None], -1)[..., 0]
        where = arrays["mask"][:, k]
        expected[k] = (normalizer - said)[where].sum()
        squares[k] = (normalizer**2)[where].sum()
        right[k] = (scores.argmax(-1) == arrays["targets"][:, k])[where].sum()
    counts = arrays["mask"].sum((0, 2))
    for chunk in (ROWS * LENGTH, ROWS * 16, ROWS * 7):
        config = LossConfig(chunk_size=chunk, z=0.1, text=2.0, audio=(1.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0))
        value, sums = loss.of_batch(
            model, text, audio, arrays["targets"], arrays["mask"], counts.astype(np.float32), config
        )
        np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
        np.testing.assert_allclose(sums["z"], squares, rtol=1e-5)
        np.testing.assert_array_equal(sums["correct"], right)
        np.testing.assert_array_equal(sums["count"], counts)
        weights = np.array([*config.audio, config.text])
        whole = (weights * (expected + 0.1 * squares) / counts).sum()
        np.testing.assert_allclose(value, whole, rtol=1e-5)


def test_a_head_without_targets_costs_nothing():
    model = init_model(MODEL, stacked=False, dtype=jnp.float32, seed=0)
    arrays = batch()
    hidden = np.ones((ROWS, LENGTH, MODEL.trunk.hidden_size), np.float32)
    nothing = np.zeros((ROWS, 8, LENGTH), bool)

    def value(hidden):
        return loss.of_batch(model, hidden, hidden, arrays["targets"], nothing, jnp.zeros(8), LossConfig())[0]

    found, gradient = jax.value_and_grad(value)(hidden)
    assert float(found) == 0.0
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("chunk", [ROWS * LENGTH, ROWS * 16, ROWS * 7])
def test_the_gradient_of_the_loss_is_what_jax_derives_from_whole_logits(chunk):
    model = init_model(MODEL, stacked=False, dtype=jnp.float32, seed=0)
    arrays = batch()
    config = LossConfig(chunk_size=chunk, z=0.1, text=2.0, audio=(1.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0))
    rng = np.random.default_rng(1)
    hidden = [rng.standard_normal((ROWS, LENGTH, MODEL.trunk.hidden_size)).astype(np.float32) for _ in range(2)]
    counts = arrays["mask"].sum((0, 2)).astype(np.float32)
    tables = model.head_tables()
    weights = np.array([*config.audio, config.text], np.float32) / counts

    def chunked(tables, text, audio):
        heads = SimpleNamespace(head_tables=lambda: tables, mesh=None)
        return 3.0 * loss.of_batch(heads, text, audio, arrays["targets"], arrays["mask"], counts, config)[0]

    def whole(tables, text, audio):
        logits = [*jnp.moveaxis(jnp.einsum("btd,cvd->btcv", audio, tables[1]), 2, 0), text @ tables[0].T]
        value = 0.0
        for head, scores in enumerate(logits):
            normalizer = jax.nn.logsumexp(scores, axis=-1)
            said = jnp.take_along_axis(scores, arrays["targets"][:, head, :, None], -1)[..., 0]
            each = normalizer - said + config.z * normalizer**2
            value += weights[head] * jnp.where(arrays["mask"][:, head], each, 0.0).sum()
        return 3.0 * value

    found, expected = (jax.grad(function, (0, 1, 2))(tables, *hidden) for function in (chunked, whole))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)


def test_tasks_without_speech_never_run_the_ear(monkeypatch):
    model = init_model(MODEL, stacked=False, dtype=jnp.float32, seed=0)
    monkeypatch.setattr(OmniModel, "hear", lambda *_: pytest.fail("the ear was run"))
    arrays = batch() | {"speech_index": np.full((ROWS, LENGTH), -1, np.int32)}
    data = {"sources": [{"path": "unused"}], "tasks": {"T1T2": 1, "T1A2": 1}, "batch": ROWS, "length": LENGTH}
    assert np.isfinite(forward(model, arrays, jnp.ones(8), run_config(data=data))[0])


def test_clips_are_heard_alike_together_and_apart(monkeypatch):
    model = init_model(MODEL, stacked=False, dtype=jnp.float32, seed=0)
    losses = []
    for apart in (True, False):
        monkeypatch.setattr(step, "clips_apart", lambda model, apart=apart: apart)
        losses.append(forward(model, batch(), jnp.ones(8), run_config())[1]["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_share_of_the_codes_is_misread_and_nothing_else():
    codes = 100
    tokens = np.random.default_rng(0).integers(0, codes + 8, (4, 8, 500)).astype(np.int32)
    read = np.asarray(jax.jit(step.corrupt_codes, static_argnums=(1, 2))(tokens, 0.2, codes, jax.random.key(1)))
    other = read != tokens
    code = tokens < codes
    assert not other[:, 7].any(), "text"
    assert not other[:, :7][~code[:, :7]].any(), "specials"
    # Of a hundred codes one is the right one again.
    assert abs(other[:, :7][code[:, :7]].mean() - 0.2 * 0.99) < 0.01
    corrupt_codes = read[other]
    assert (corrupt_codes.min(), corrupt_codes.max()) == (0, codes - 1)
    agree = np.corrcoef(other[:, 0].ravel(), other[:, 1].ravel())[0, 1]
    assert abs(agree) < 0.1, "each code on its own"


@pytest.mark.parametrize("how", [{"spec_augment": {"warp": 0.2}}, {"audio_token_noise": 0.3}])
def test_what_is_varied_is_otherwise_at_every_step_and_alike_on_every_mesh(how):
    data = {"sources": [{"path": "unused"}], "tasks": {"A1A2": 1}, "batch": ROWS, "length": LENGTH}
    varied = run_config(data={**data, **how}, log_interval_steps=1)

    def losses(trainer: Trainer) -> list[float]:
        """Of one batch at different steps, nothing learned between them."""
        state, arrays = trainer.begin(), trainer.place(batch())
        found = []
        for number in range(2):
            at = replace(state, step=state.step + number)
            found.append(float(trainer.step(at, trainer.frozen, arrays)[1]["loss"]))
        return found

    alone = losses(Trainer(varied))
    assert len({*alone, *losses(Trainer(run_config()))}) == 3, "two draws and none"
    np.testing.assert_allclose(losses(Trainer(varied, sharding.make_mesh(2, 2, 2))), alone, rtol=1e-5)
    parts = run_config(data=varied.data, optimizer={**OPTIMIZER, "accumulate": 4})
    assert np.isfinite(losses(Trainer(parts))).all()


def test_it_learns_a_batch():
    trainer = Trainer(run_config(optimizer={"steps": 60, "peak": 1e-2, "warmup": 2, "weight_decay": 0.0}))
    state, losses = trainer.begin(), []
    for _ in range(40):
        state, metrics = trainer.step(state, trainer.frozen, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.25 * losses[0]
    assert int(state.step) == 40


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(8, 1, 1), (1, 8, 1), (1, 4, 2)])]
)
def test_eight_devices_do_what_one_does(one_device, sizes):
    assert len(jax.devices()) == 8
    state, metrics = Trainer(run_config(), sharding.make_mesh(*sizes)).go(STEPS)
    for mine, theirs in zip(metrics, one_device[1], strict=True):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-5)
    for name, value in flat(one_device[0].learning).items():
        np.testing.assert_allclose(flat(state.learning)[name], value, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_of_four_devices_do_what_one_device_does(one_device, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4")}
    environment |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "training" / "one_of_two.py"), coordinator]
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
            for key, value in flat(one_device[0].learning).items():
                np.testing.assert_allclose(found[f"{name}/{key}"], value, atol=1e-5, err_msg=f"{name} {key}")


@pytest.mark.parametrize("changes", [{"remat": "full"}, pytest.param({"remat": "dots"}, marks=pytest.mark.slow)])
def test_recomputing_changes_nothing(one_device, changes):
    _, metrics = Trainer(run_config(**changes)).go(2)
    for mine, theirs in zip(metrics, one_device[1], strict=False):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-5)


def test_a_batch_in_parts_is_the_whole_batch(one_device):
    """The parts hold different numbers of targets, so a mean of their means would be another loss."""
    optimizer = {**OPTIMIZER, "accumulate": 4}
    state, metrics = Trainer(run_config(optimizer=optimizer)).go(STEPS)
    for mine, theirs in zip(metrics, one_device[1], strict=True):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-5)
        np.testing.assert_allclose(mine["heads"], theirs["heads"], rtol=1e-5)
    for name, value in flat(one_device[0].learning).items():
        np.testing.assert_allclose(flat(state.learning)[name], value, atol=1e-5, err_msg=name)


def test_what_is_frozen_has_no_moments_and_what_learns_moves():
    trainer = Trainer(run_config(learn=("adapter", "tts_adapter")))
    state, _ = trainer.go(2)
    size = sum(x.size for x in jax.tree.leaves(state.learning))
    moments = sum(x.size for x in jax.tree.leaves(state.moments) if x.ndim)
    assert moments == 2 * size
    assert set(state.learning) == {"adapter", "tts_adapter"}
    before = flat(trainer.learning)
    for name, value in flat(state.learning).items():
        assert not np.array_equal(value, before[name]), name


def test_norms_and_biases_do_not_decay():
    config = replace(run_config().optimizer, warmup_steps=0, weight_decay=0.5)
    learning = {"a": {"scale": jnp.ones(3), "q_bias": jnp.ones(3), "q": jnp.ones((3, 3))}}
    zeros = jax.tree.map(jnp.zeros_like, learning)
    moments = advance(config, optimizer(config).init(learning), zeros, jnp.float32(0.0), jnp.array(True))
    found = updates(config, moments, learning)
    assert float(abs(found["a"]["scale"]).max()) == 0.0
    assert float(abs(found["a"]["q_bias"]).max()) == 0.0
    assert float(found["a"]["q"].max()) < 0.0


def test_both_halves_of_the_optimizer_are_optax():
    config = replace(run_config().optimizer, weight_decay=0.5, max_grad_norm=2.0, eps=1e-8)
    rng = np.random.default_rng(0)
    mine = theirs = {"norm": {"scale": jnp.ones(3)}, "q": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)}
    transformation = optimizer(config)
    moments = reference = transformation.init(mine)
    # The norms of these gradients lie below the clip and above it.
    for size in (0.1, 1.0, 10.0, 0.5):
        gradient = jax.tree.map(lambda x, size=size: jnp.asarray(size * rng.standard_normal(x.shape), x.dtype), mine)
        moments = advance(config, moments, gradient, optax.tree.norm(gradient), jnp.array(True))
        mine = optax.apply_updates(mine, updates(config, moments, mine))
        found, reference = transformation.update(gradient, reference, theirs)
        theirs = optax.apply_updates(theirs, found)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), (mine, moments), (theirs, reference))
    skipped = advance(config, moments, gradient, jnp.float32(jnp.nan), jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, skipped, moments)


def test_only_logged_steps_measure_norms():
    trainer = Trainer(run_config(log_every=2))
    _, metrics = trainer.go(3)
    assert [bool(np.isfinite(step["update_norm"])) for step in metrics] == [False, True, False]
    assert metrics[1]["parameter_norm"] > 0


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted():
    trainer = Trainer(run_config())
    poisoned = jax.tree.map(lambda x: x, trainer.learning)
    poisoned["norm"]["scale"] = poisoned["norm"]["scale"].at[0].set(jnp.nan)
    state = replace(trainer.begin(), learning=poisoned)
    after, metrics = trainer.step(state, trainer.frozen, batch())
    after, metrics = trainer.step(after, trainer.frozen, batch())
    assert not np.isfinite(metrics["loss"])
    assert (int(after.skipped), int(after.skipped_in_a_row), int(after.step)) == (2, 2, 2)
    for name, value in flat(after.learning).items():
        np.testing.assert_array_equal(value, flat(poisoned)[name], err_msg=name)
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(after.moments))
    healed = replace(after, learning=trainer.learning)
    after, _ = trainer.step(healed, trainer.frozen, batch())
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (2, 0)
