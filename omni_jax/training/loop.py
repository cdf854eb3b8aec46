"""A run, top to bottom: mesh, data, model, resume, step, checkpoint, log, evaluate, release.

The same code on one CPU and on every process of a pod. Everything a run needs to go on is in its checkpoints: kill
it at any moment and start it again with the same command.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tokenizers import Tokenizer

from omni_jax import checkpoint, sharding
from omni_jax.api import Ask, Omni, byte_tokenizer, default_layout
from omni_jax.audio.wav import SAMPLE_RATE, AudioError
from omni_jax.codec.snac import Snac, make_decoder
from omni_jax.config import PRESETS, ConfigError, ModelConfig, RunConfig, save
from omni_jax.data import pipeline
from omni_jax.data.records import Records, from_bytes
from omni_jax.prompts import Task
from omni_jax.tensorfile import LazyTensor
from omni_jax.tpu.chips import CHIPS
from omni_jax.training.report import HEADS, Reporter
from omni_jax.training.stages import Params, divide, part_of, unite
from omni_jax.training.step import Batch, TrainState, forward, optimizer, train_step
from omni_jax.vocab import Vocab

PRESET = "preset:"
IN_BATCH = ("tokens", "targets", "mask", "positions", "segments", "speech_index", "sound")
"""Arrays of a batch that the step takes."""


class TrainingError(RuntimeError):
    """A run that cannot go on: says at which step and why."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run's weights come from: the parts of a release, or of an untrained preset."""

    config: ModelConfig
    tokenizer: Tokenizer
    release: checkpoint.Release | None
    seed: int

    @classmethod
    def find(cls, name: str, seed: int) -> Start:
        """Open `preset:NAME`, a release folder, or the run folder of a finished stage.

        Raises:
            ConfigError: there is no such preset.
            CheckpointError: it is not a release, or the run has not finished.
        """
        if name.startswith(PRESET):
            preset = name.removeprefix(PRESET)
            if preset not in PRESETS:
                raise ConfigError(f"start: expected one of {', '.join(PRESETS)} after {PRESET}, found {preset!r}")
            return cls(PRESETS[preset], byte_tokenizer(), None, seed)
        release = checkpoint.open_release(name)
        return cls(release.config, release.tokenizer(), release, seed)

    def model(self, *, stacked: bool, dtype: Any, mesh: Mesh) -> Any:
        """The model with float32 weights on the mesh."""
        if self.release is None:
            return checkpoint.init_model(self.config, stacked=stacked, dtype=dtype, seed=self.seed, mesh=mesh)
        return self.release.load_model(stacked=stacked, dtype=dtype, param_dtype=jnp.float32, mesh=mesh)

    def codec(self) -> Snac:
        """The codec; untrained for a preset."""
        return Snac(self.config.codec, rngs=nnx.Rngs(self.seed)) if self.release is None else self.release.load_codec()


@dataclasses.dataclass
class Setup:
    """Everything a run is made of before any weight is there."""

    config: RunConfig
    start: Start
    mesh: Mesh
    graph: nnx.GraphDef
    shapes: Any
    """Abstract parameters, nested dict."""
    shardings: Any
    stacked: bool
    dtype: Any

    @classmethod
    def of(cls, config: RunConfig, devices: Sequence[jax.Device] | None = None) -> Setup:
        """Check a run and lay it out over the devices.

        Args:
            config: of the run.
            devices: all of this process's backend if None.

        Raises:
            ConfigError: something does not fit: names the field.
        """
        start = Start.find(config.start, config.seed)
        mesh = mesh_of(config, devices)
        stacked, dtype = default_layout(mesh.devices.flat[0].platform)
        if config.dtype != "auto":
            dtype = jnp.dtype(config.dtype)
        model = checkpoint.abstract(start.config, stacked=stacked, dtype=dtype)
        model.lay_on(mesh)
        graph, state = nnx.split(model)
        divide(nnx.to_pure_dict(state), config.learn)
        return cls(config, start, mesh, graph, nnx.to_pure_dict(state), sharding.of_state(state, mesh), stacked, dtype)

    def split(self, params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters, shapes or shardings: what learns and what does not."""
        return divide(params, self.config.learn)

    def state_shapes(self) -> tuple[TrainState, TrainState]:
        """The abstract train state and its shardings."""
        learning, _ = self.split(self.shapes)
        places, _ = self.split(self.shardings)
        whole = sharding.replicated(self.mesh)
        tx = optimizer(self.config.optimizer)
        moments = jax.eval_shape(tx.init, learning)
        moment_places = optax.tree.map_params(
            tx, lambda _, place: place, moments, places, transform_non_params=lambda _: whole
        )
        number = jax.ShapeDtypeStruct((), jnp.int32)
        return (
            TrainState(number, learning, moments, number, number),
            TrainState(whole, places, moment_places, whole, whole),
        )


def mesh_of(config: RunConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh a run asks for, over all devices of all processes, or those given.

    Raises:
        ConfigError: it does not divide the devices or slices, or the rows do not divide over it.
    """
    sizes = config.mesh
    rest, count = sizes.fsdp * sizes.tensor, jax.device_count() if devices is None else len(devices)
    data = sizes.data if sizes.data > 0 else count // rest
    if data < 1 or data * rest != count:
        raise ConfigError(
            f"mesh: expected data * fsdp * tensor to be the {count} devices, "
            f"found {sizes.data} * {sizes.fsdp} * {sizes.tensor}"
        )
    ways = data * sizes.fsdp * config.optimizer.accumulate
    if config.data.batch % ways:
        raise ConfigError(
            f"data.batch: expected a multiple of {ways} (data * fsdp * optimizer.accumulate), found {config.data.batch}"
        )
    return sharding.make_mesh(data, sizes.fsdp, sizes.tensor, devices)


def row_share(mesh: Mesh, process: int) -> tuple[int, int]:
    """Which share of a batch's rows a process reads: (index, count).

    Its rows need not be neighbours: where a mesh is laid out for the wires between chips, those of a host are a square
    of it. Processes whose devices split rows between them (tensor parallelism across processes) read the same share.

    Raises:
        ConfigError: some rows, but not all, are those of another process, too.
    """
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(sharding.ways("batch", mesh), -1)):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    shares = sorted({frozenset(share) for share in rows.values()}, key=min)
    if sum(map(len, shares)) != len(frozenset.union(*shares)) or len({len(share) for share in shares}) > 1:
        raise ConfigError(f"mesh: expected processes to have the same rows or none in common, found {rows}")
    return shares.index(frozenset(rows[process])), len(shares)


def train(config: RunConfig, *, profile: str | None = None) -> Path | None:
    """Train, from the last checkpoint of `config.out` if there is one.

    Args:
        config: the run.
        profile: folder for a profiler trace of a few steps after the first log step.

    Returns:
        The release folder; None if the run was asked to stop before its end (it has saved itself).

    Raises:
        ConfigError: the configuration cannot be run.
        PipelineError: the data cannot be used.
        TrainingError: the loss stayed non-finite.
    """
    setup = Setup.of(config)
    out = Path(config.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if (out / checkpoint.RELEASE).exists():
        return out / checkpoint.RELEASE
    if jax.process_index() == 0:
        save(config, out / "run.yaml")
    stop = Stop()
    shapes, places = setup.state_shapes()
    manager = checkpoint_manager(config, out)
    step_fn = step_program(setup, places)
    state, frozen, noted = begin(setup, manager, shapes, places)
    step = int(state.step)
    data, order = open_data(setup, step, noted)
    report = Reporter(config, step)
    evaluate = Evaluation(setup)
    try:
        point = data.get_state()
        batch, tally = place(next(data), setup.mesh), Tally()
        while step < config.optimizer.steps and not stop.asked(step):
            tally.add(batch)
            state, metrics = step_fn(state, frozen, batch.arrays)
            step += 1
            last = step == config.optimizer.steps
            # Where the data stands for a checkpoint of this step: before the batch that is fetched ahead.
            point = data.get_state()
            if not last:
                # The device is busy with the step just queued: time to put the next batch beside it.
                waiting = time.perf_counter()
                read = next(data)
                report.waited += time.perf_counter() - waiting
                batch = place(read, setup.mesh)
            if step % config.log_every == 0 or last:
                log(setup, report, step, metrics, tally, data.skipped)
                tally = Tally()
            if profile and step == config.log_every:
                jax.profiler.start_trace(profile)
            if profile and step == config.log_every + PROFILED:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            if step % config.checkpoint.every == 0 or last:
                write(manager, step, state, frozen, order, point)
            if last or (config.evaluate_every and step % config.evaluate_every == 0):
                evaluate(step, unite(state.learning, frozen), report)
        if step < config.optimizer.steps:
            if manager.latest_step() != step:
                write(manager, step, state, frozen, order, point)
            manager.wait_until_finished()
            report.say(f"asked to stop: saved at step {step}; the same command goes on from there")
            return None
        manager.wait_until_finished()
    finally:
        manager.close()
        report.close()
        data.close()
    release(setup, unite(state.learning, frozen), out / checkpoint.RELEASE)
    return out / checkpoint.RELEASE


COMPILER_OPTIONS = {
    # Left to itself the compiler gathers weights beside other work, but waits while gradients are summed. It refuses
    # to do otherwise on any other kind.
    CHIPS["v5e"].kind: {
        "xla_enable_async_reduce_scatter_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
        # The sums need a little more than the 16 MiB that a fusion may take of the chip's own memory.
        "xla_tpu_scoped_vmem_limit_kib": "20480",
    },
}
"""What the compiler is told of a step, by kind of device."""


def step_program(setup: Setup, places: TrainState) -> Any:
    """The step as it is compiled: of (state, frozen, batch), the state donated and placed as `state_shapes` says.

    What it gives is that of `omni_jax.training.step.train_step`.
    """
    return jax.jit(
        partial(train_step, setup.graph, setup.config),
        donate_argnums=0,
        out_shardings=(places, sharding.replicated(setup.mesh)),
        compiler_options=COMPILER_OPTIONS.get(setup.mesh.devices.flat[0].device_kind),
    )


class Stop:
    """Whether somebody wants the run to end: SIGTERM, as a preempted machine gets it, or Ctrl-C's SIGINT.

    With several processes all must stop at the same step, so they ask JAX's coordination service, which is told of
    a SIGTERM to any of them.
    """

    def __init__(self) -> None:
        self.signalled = False
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._remember)

    def _remember(self, *_: Any) -> None:
        self.signalled = True

    def asked(self, step: int) -> bool:
        """Whether to stop before the next step; all processes get the same answer."""
        if jax.process_count() == 1:
            return self.signalled
        return multihost_utils.reached_preemption_sync_point(step)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A batch on its way to the devices, with what the host counted in it."""

    arrays: Batch
    positions: int
    """Positions of this process that hold something."""
    capacity: int
    """Positions of this process."""


def place(batch: pipeline.Batch, mesh: Mesh) -> Placed:
    """Send this process's rows to its devices; returns at once."""
    spot = sharding.rows(mesh)
    arrays = {name: jax.make_array_from_process_local_data(spot, batch[name]) for name in IN_BATCH}
    return Placed(arrays, int(np.count_nonzero(batch["segments"])), batch["segments"].size)


@dataclasses.dataclass
class Tally:
    """What went through the steps since the last log."""

    positions: int = 0
    capacity: int = 0
    steps: int = 0

    def add(self, batch: Placed) -> None:
        """Count a batch."""
        self.positions += batch.positions
        self.capacity += batch.capacity
        self.steps += 1


def begin(
    setup: Setup, manager: ocp.CheckpointManager, shapes: TrainState, places: TrainState
) -> tuple[TrainState, Params, dict[str, Any] | None]:
    """The state, the frozen parameters and what `write` noted of the data: of the last checkpoint, or at step 0."""
    latest = manager.latest_step()
    if latest is not None:
        _, frozen_shapes = setup.split(setup.shapes)
        _, frozen_places = setup.split(setup.shardings)

        def at(shape: Any, place: Any) -> Any:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

        found = manager.restore(
            latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.tree.map(at, shapes, places)),
                frozen=ocp.args.StandardRestore(jax.tree.map(at, frozen_shapes, frozen_places)),
                data=ocp.args.JsonRestore(),
            ),
        )
        return found["state"], found["frozen"], found["data"]
    model = setup.start.model(stacked=setup.stacked, dtype=setup.dtype, mesh=setup.mesh)
    learning, frozen = setup.split(nnx.to_pure_dict(nnx.state(model)))
    del model
    tx = optimizer(setup.config.optimizer)
    moments = jax.jit(tx.init, out_shardings=places.moments)(learning)

    def zero() -> jax.Array:
        return jax.device_put(np.int32(0), sharding.replicated(setup.mesh))

    return TrainState(zero(), learning, moments, zero(), zero()), frozen, None


def open_data(setup: Setup, step: int, noted: dict[str, Any] | None) -> tuple[pipeline.Batches, int]:
    """This process's part of the data, from where the run stands.

    Args:
        setup: of the run.
        step: how many are done.
        noted: by `write`; None: nothing is read yet.

    Returns:
        The data, and the seed of its order.
    """
    config = setup.config
    share, shares = row_share(setup.mesh, jax.process_index())
    order, points = config.seed, None
    if noted is not None:
        order, points = noted.get("order", config.seed), noted["points"]
        if len(points) != shares:
            # Which records each process has seen cannot be shared out among another number of them; in the order of
            # before they would begin with those that all have seen.
            print(f"data: {len(points)} readers before, {shares} now: the records are shuffled anew")
            order, points = int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]), None
    data = pipeline.batches(
        config.data,
        setup.start.config,
        setup.start.tokenizer,
        seed=order,
        process_index=share,
        process_count=shares,
    )
    if points is not None:
        data.set_state(points[share])
    return data, order


def checkpoint_manager(config: RunConfig, out: Path) -> ocp.CheckpointManager:
    """Saves in the background; a checkpoint has its name only when it is whole."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.checkpoint.keep,
        keep_period=config.checkpoint.keep_every,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(out / checkpoint.RUN, options=options)


def write(
    manager: ocp.CheckpointManager, step: int, state: TrainState, frozen: Params, order: int, point: dict[str, Any]
) -> None:
    """Start saving a checkpoint: parameters, moments, step, and where each reader stands in data of which order."""
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            frozen=ocp.args.StandardSave(frozen),
            data=ocp.args.JsonSave({"points": gather_points(point), "order": order}),
        ),
        force=True,
    )


def gather_points(point: dict[str, Any]) -> list[dict[str, Any]]:
    """The data's state of every reader, in the order of their shares."""
    if jax.process_count() == 1:
        return [point]
    text = np.frombuffer(json.dumps(point).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.zeros(longest, np.uint8)
    padded[: len(text)] = text
    gathered = multihost_utils.process_allgather(padded)
    points = [json.loads(bytes(row).rstrip(b"\0")) for row in gathered]
    # Processes that share rows read the same.
    order = sorted({p["layout"]["process"]: p for p in points}.items(), key=lambda item: int(item[0].split()[0]))
    return [p for _, p in order]


def log(
    setup: Setup,
    report: Reporter,
    step: int,
    metrics: dict[str, jax.Array],
    tally: Tally,
    left_out: Mapping[str, int],
) -> None:
    """Wait for the device, write what a step measured.

    Raises:
        TrainingError: too many steps in a row were not finite.
    """
    values = jax.device_get(metrics)
    in_a_row = int(values["skipped_in_a_row"])
    if in_a_row >= setup.config.most_skipped:
        raise TrainingError(
            f"steps {step - in_a_row + 1} to {step}: the loss or its gradient was not finite {in_a_row} times in a "
            f"row (most_skipped is {setup.config.most_skipped}); with another seed other records come next"
        )
    seconds, waiting = report.rate(step)
    processes = jax.process_count()
    rate = tally.positions / tally.steps / seconds * processes
    codec = setup.start.config.codec
    numbers = {
        "loss": float(values["loss"]),
        **{f"loss/{name}": float(x) for name, x in zip(HEADS, values["heads"], strict=True)},
        **{f"accuracy/{name}": float(x) for name, x in zip(HEADS, values["accuracy"], strict=True)},
        "gradient_norm": float(values["gradient_norm"]),
        "update_norm": float(values["update_norm"]),
        "parameter_norm": float(values["parameter_norm"]),
        "learning_rate": float(values["learning_rate"]),
        "skipped_steps": float(values["skipped"]),
        "seconds_per_step": seconds,
        "positions_per_second": rate,
        # A frame is one target of the first audio layer.
        "speech_seconds_per_second": float(values["counts"][0]) * codec.frame / codec.sample_rate / seconds,
        "padding": 1 - tally.positions / tally.capacity,
        "waiting_for_data": waiting,
        **{f"skipped_records/{reason}": float(count) for reason, count in left_out.items()},
    }
    flops = model_flops(setup, rate)
    numbers["model_flops_per_second"] = flops
    peak = peak_flops(setup.mesh)
    if peak:
        numbers["model_flop_utilisation"] = flops / peak
    report.scalars(step, numbers)
    audio = float(np.mean(values["heads"][:7]))
    shown = {"loss": f"{numbers['loss']:.3f}", "text": f"{values['heads'][7]:.3f}", "audio": f"{audio:.3f}"}
    shown |= {"pos/s": f"{rate:.0f}", "speech s/s": f"{numbers['speech_seconds_per_second']:.1f}"}
    if peak:
        shown["mfu"] = f"{flops / peak:.0%}"
    report.progress(step, shown)


def model_flops(setup: Setup, positions_per_second: float) -> float:
    """Model FLOP/s: 6 per parameter and position for matrices that learn, 4 for frozen ones gradients pass through.

    The usual count (arXiv 2204.02311, appendix B) without attention and recomputation; the ear, which runs on
    recordings and not on positions, is left out.
    """
    learning = set(setup.config.learn)
    total = 0.0
    for path, shape in traverse_util.flatten_dict(setup.shapes).items():
        part = part_of(path)
        if part == "ear" or (part.endswith("_embedding") and not setup.start.config.trunk.tied_head):
            continue
        total += (6.0 if part in learning else 4.0) * float(np.prod(shape.shape))
    return total * positions_per_second


def peak_flops(mesh: Mesh) -> float | None:
    """Peak bfloat16 FLOP/s of the mesh's devices; None where it is not known."""
    kind = mesh.devices.flat[0].device_kind
    chip = next((chip for chip in CHIPS.values() if kind in (chip.kind, f"{chip.kind}p")), None)
    return None if chip is None else chip.flops * mesh.devices.size


PROFILED = 5
"""Steps in a profiler trace."""


class Evaluation:
    """Losses of the held-out exchanges per task and head, and a few of them answered aloud."""

    def __init__(self, setup: Setup):
        self.setup = setup

        def sums(params: Params, batch: Batch) -> dict[str, jax.Array]:
            # The sums don't depend on the weights of the heads in the loss, nor so on how many targets there are.
            return forward(nnx.merge(setup.graph, params), batch, jnp.ones(len(HEADS)), setup.config)[1]

        self.sums = jax.jit(sums, out_shardings=sharding.replicated(setup.mesh))

    def __call__(self, step: int, params: Params, report: Reporter) -> None:
        """Evaluate parameters; nothing happens when the run holds nothing out."""
        config, start = self.setup.config, self.setup.start
        if not config.data.held_out:
            return
        numbers: dict[str, float] = {}
        share, shares = row_share(self.setup.mesh, jax.process_index())
        for task in config.data.tasks:
            only = dataclasses.replace(config.data, tasks={task: 1.0})
            batches = pipeline.held_out(only, start.config, start.tokenizer, process_index=share, process_count=shares)
            total: dict[str, np.ndarray] = {}
            for batch in batches:
                found = jax.device_get(self.sums(params, place(batch, self.setup.mesh).arrays))
                total = {name: total.get(name, 0.0) + value for name, value in found.items()}
            for index, name in enumerate(HEADS):
                if total and total["count"][index]:
                    numbers[f"held_out/{task}/loss/{name}"] = float(total["loss"][index] / total["count"][index])
                    numbers[f"held_out/{task}/accuracy/{name}"] = float(total["correct"][index] / total["count"][index])
        report.scalars(step, numbers)
        # Decoding is driven by one host: a pod evaluates its release afterwards.
        if jax.process_count() == 1 and config.samples:
            self._answer(step, params, report)

    def _answer(self, step: int, params: Params, report: Reporter) -> None:
        start = self.setup.start
        omni = Omni(nnx.merge(self.setup.graph, params), make_decoder(start.codec()), start.tokenizer)
        records = Records(self.setup.config.data.held_out[0].path)
        for index in range(min(self.setup.config.samples, len(records))):
            exchange = from_bytes(records[index], codebook_size=start.config.vocab.audio)
            if exchange.question_audio is not None:
                ask = Ask(audio=exchange.question_audio, sample_rate=SAMPLE_RATE)
            elif exchange.question_text:
                ask = Ask(text=exchange.question_text)
            else:
                ask = Ask(text=exchange.answer_text, task=Task.T1A1)
            try:
                reply = omni.batch([ask], max_steps=SAMPLE_STEPS)[0]
            except (AudioError, ConfigError) as error:
                report.say(f"sample {index} is left out: {error}")
                continue
            report.sample(step, str(index), exchange.question_text, exchange.answer_text, reply)


SAMPLE_STEPS = 256
"""Longest sample answer: 21 s."""


def release(setup: Setup, params: Params, folder: Path) -> None:
    """Write the trained model as a release folder."""
    start = setup.start
    tensors = checkpoint.model_tensors(nnx.merge(setup.graph, params))
    if start.release is not None:
        codec, files = start.release.codec_tensors(), start.release.tokenizer_files()
        checkpoint.save_release(folder, start.config, tensors, codec, files)
        return
    codec = {name: LazyTensor.of(np.asarray(value)) for name, value in start.codec().params().items()}
    with tempfile.TemporaryDirectory() as made:
        tokenizer, settings = (Path(made) / name for name in checkpoint.TOKENIZER_FILES)
        start.tokenizer.save(str(tokenizer))
        settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
        checkpoint.save_release(folder, start.config, tensors, codec, [tokenizer, settings])


def describe(config: RunConfig) -> str:
    """What a run would do, without doing it: parts, parameters, shapes, mesh, memory.

    Raises:
        ConfigError: it cannot be run.
    """
    setup = Setup.of(config)
    flat = traverse_util.flatten_dict(setup.shapes)
    places = traverse_util.flatten_dict(setup.shardings)
    lines = [f"mesh {dict(setup.mesh.shape)} over {setup.mesh.devices.size} {setup.mesh.devices.flat[0].device_kind}"]
    lines.append(f"{'part':<16} {'parameters':>12}  {'':<8} {'bytes per device':>17}")
    parts: dict[str, list[float]] = {}
    for path, shape in flat.items():
        local = np.prod(places[path].shard_shape(shape.shape)) * 4
        # Weights; what learns also has two moments and a gradient.
        local *= 4 if part_of(path) in config.learn else 1
        entry = parts.setdefault(part_of(path), [0, 0])
        entry[0] += np.prod(shape.shape)
        entry[1] += local
    for part, (count, local) in parts.items():
        kind = "learns" if part in config.learn else "frozen"
        lines.append(f"{part:<16} {int(count):>12,}  {kind:<8} {int(local):>17,}")
    learns = sum(count for part, (count, _) in parts.items() if part in config.learn)
    total = sum(count for count, _ in parts.values())
    memory = sum(local for _, local in parts.values())
    lines.append(f"{'all':<16} {int(total):>12,}  {int(learns):,} learn; {memory / 2**30:.2f} GiB a device")
    model, trunk, rows = setup.start.config, setup.start.config.trunk, config.data.batch
    width = np.dtype(setup.dtype).itemsize
    here = rows // config.optimizer.accumulate / (setup.mesh.shape["data"] * setup.mesh.shape["fsdp"])
    per_layer = here * config.data.length * trunk.width * width
    logits = here * config.loss.chunk * Vocab(model.vocab).text_rows * 4 * 2
    lines.append(
        f"a step: {rows} rows of {config.data.length} positions, {config.optimizer.accumulate} part(s); estimated "
        f"activations {per_layer * (trunk.layers + 8) / 2**30:.2f} GiB (remat {config.remat}), "
        f"logits {logits / 2**30:.2f} GiB a device"
    )
    lines.append(f"steps {config.optimizer.steps}, learning rate up to {config.optimizer.peak:g}; into {config.out}")
    return "\n".join(lines)
