"""Compiles a program for a TPU slice, without a TPU, and reports memory, work, traffic and the least time.

All numbers come from the compiler and from data sheets; nothing is run. The predicted time is a lower bound, as in a
roofline model: the largest of the times that matrix products, HBM traffic and ICI traffic take at their peak rates,
each as if it had the chip to itself.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Literal

from omni_jax import sharding
from omni_jax.compile_report import flops, hlo
from omni_jax.compile_report.programs import INFERENCE_PROGRAMS, Program, train_program
from omni_jax.compile_report.topology import Topology
from omni_jax.config.model import PRESETS, ModelConfig
from omni_jax.config.run import RunConfig
from omni_jax.errors import ConfigError

PROGRAMS = ("train", *INFERENCE_PROGRAMS)

Bound = Literal["compute", "memory", "ici"]


@dataclass(frozen=True)
class CompileReport:
    """What one program needs on each chip. Traffic, work and time are per step for `decode` and `batch`."""

    program: str
    model: str
    topology: str
    batch: int
    """Rows over all chips."""
    int8: bool
    """Whether decoding uses quantized weights."""
    positions: int | None
    """Positions that each row uses of its cache, for `decode` and `batch`; None: all, or another program."""
    mesh: dict[str, int]
    """Devices along each mesh axis."""
    compile_seconds: float
    memory_per_chip_bytes: int
    """Arguments, results that do not overwrite an argument, temporaries and code."""
    arguments_bytes: int
    temporary_bytes: int
    hbm_bytes: int
    """Size of a chip's HBM."""
    fits: bool
    """Whether the memory needed is at most `hbm_bytes`."""
    flops: float
    """Floating-point operations of matrix products and convolutions."""
    bytes: float
    """Bytes of HBM read and written."""
    bytes_ideal: float
    """The least of `bytes`: weights and cache once, the state of a training step twice."""
    bytes_ratio: float
    """`bytes / bytes_ideal`."""
    roofline_seconds: float
    """The least time."""
    bound_by: Bound
    """What takes that time."""
    collective_bytes: dict[str, float]
    """ICI traffic by kind of collective."""
    overlapped_bytes: float
    """Bytes of `collective_bytes` that are sent while other work runs; the chip waits for the rest."""
    aliased_bytes: int
    """Bytes of arguments that results overwrite: a donated cache or state."""
    flop_utilization: float
    """Fraction of the peak FLOP/s if the program takes `roofline_seconds`."""
    exposed_ici_seconds: float
    """Time of the ICI traffic that does not overlap with other work, at the peak rate."""
    predicted_utilization: float
    """Fraction of the peak FLOP/s if work and HBM traffic overlap, and the exposed ICI traffic is added."""
    predicted_utilization_serial: float
    """The same if HBM traffic is added as well: as if no product was computed while its factors are read."""

    def table(self) -> str:
        """The report as lines of text."""
        gib = 2**30
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        ici = ", ".join(f"{kind} {amount / 1e6:.1f} MB" for kind, amount in self.collective_bytes.items())
        ici += f"; {self.overlapped_bytes / sum(self.collective_bytes.values()):.0%} overlapped" if ici else "none"
        verdict = "fits" if self.fits else "DOES NOT FIT"
        free = (self.hbm_bytes - self.memory_per_chip_bytes) / gib
        per_step = " per step" if self.program in ("decode", "batch") else ""
        rows = {
            "program": f"{self.program}, {self.model}{', int8' * self.int8}, batch {self.batch}"
            f"{f', {self.positions} positions' * (self.positions is not None)} on {self.topology} ({mesh})",
            "compile time": f"{self.compile_seconds:.1f} s",
            "memory per chip": f"{self.memory_per_chip_bytes / gib:.2f} of {self.hbm_bytes / gib:.0f} GiB: "
            f"{verdict}, {free:.2f} GiB free (arguments {self.arguments_bytes / gib:.2f}, temporary "
            f"{self.temporary_bytes / gib:.2f}, overwritten in place {self.aliased_bytes / gib:.2f})",
            f"work per chip{per_step}": f"{self.flops / 1e9:.3f} GFLOP",
            f"HBM traffic per chip{per_step}": f"{self.bytes / 1e6:.1f} MB, {self.bytes_ratio:.2f} x the minimum of "
            f"{self.bytes_ideal / 1e6:.1f} MB",
            f"ICI traffic per chip{per_step}": ici,
            f"least time{per_step}": f"{self.roofline_seconds * 1e3:.3f} ms, bound by {self.bound_by}; "
            f"{self.flop_utilization:.0%} of the peak FLOP/s",
            "utilization": f"{self.predicted_utilization:.0%} of the peak FLOP/s with the "
            f"{self.exposed_ici_seconds * 1e3:.3f} ms of ICI traffic that does not overlap; "
            f"{self.predicted_utilization_serial:.0%} if HBM traffic does not either",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def compile_report(
    program: str,
    topology: Topology,
    *,
    model: str = "mini_omni",
    config: RunConfig | None = None,
    batch: int | None = None,
    tensor: int = 1,
    int8: bool = False,
    positions: int | None = None,
) -> CompileReport:
    """Compile one program.

    Args:
        program: one of `PROGRAMS`.
        topology: the slice.
        model: a preset; for `train`, the config says which.
        config: the run, for `train`.
        batch: rows over all chips; None: what the config says, or one per group of `tensor` chips.
        tensor: chips that share a row, for all but `train`.
        int8: quantized weights, for `prefill`, `decode` and `batch`.
        positions: how many positions of its cache each row uses, for `decode` and `batch`; None: all.

    Raises:
        ConfigError: an argument cannot be used; names it.
    """
    if program not in PROGRAMS:
        raise ConfigError(f"program: expected one of {', '.join(PROGRAMS)}, found {program!r}", field="program")
    shape = check_model(model)
    if int8 and program not in ("prefill", "decode", "batch"):
        raise ConfigError(f"int8: expected with prefill, decode or batch, found with {program}", field="int8")
    if positions is not None and program not in ("decode", "batch"):
        raise ConfigError(f"positions: expected with decode or batch, found with {program}", field="positions")
    if positions is not None and not 1 <= positions <= (longest := shape.trunk.max_position):
        raise ConfigError(f"positions: expected 1 to {longest}, found {positions}", field="positions")
    devices = topology.devices()
    if program == "train":
        if config is None:
            raise ConfigError("train: expected --config, the configuration of a run", field="config")
        model, batch = config.start.removeprefix("preset:"), batch or config.data.batch_size
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch))
        return report_program(program, model, topology, batch, train_program(config, devices), int8=False)
    groups = check_groups(len(devices), tensor)
    batch = batch or groups
    if batch % groups:
        raise ConfigError(
            f"batch: expected a multiple of {groups} groups of {tensor} chips, found {batch}", field="batch"
        )
    mesh = sharding.make_mesh(groups, 1, tensor, devices)
    options: dict[str, Any] = {"int8": True} if int8 else {}
    if positions is not None:
        options["positions"] = positions
    made = INFERENCE_PROGRAMS[program](shape, mesh, batch, **options)
    return report_program(program, model, topology, batch, made, int8=int8, positions=positions)


def check_model(name: str) -> ModelConfig:
    """The preset of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"model: expected one of {', '.join(PRESETS)}, found {name!r}", field="model")
    return PRESETS[name]


def check_groups(num_chips: int, tensor: int) -> int:
    """How many groups of `tensor` chips there are.

    Raises:
        ConfigError: some are left over.
    """
    if num_chips % tensor:
        raise ConfigError(f"tensor: expected a divisor of {num_chips} chips, found {tensor}", field="tensor")
    return num_chips // tensor


def report_program(
    name: str,
    model: str,
    topology: Topology,
    batch: int,
    program: Program,
    *,
    int8: bool,
    positions: int | None = None,
) -> CompileReport:
    """Compile a program and report on it.

    Args:
        name: what the report calls it.
        model: the preset it was made from.
        topology: the slice it was made for.
        batch: rows over all chips.
        program: the program.
        int8: whether weights are quantized.
        positions: how many positions of its cache each row uses.
    """
    start = time.perf_counter()
    traced, compiled = program.compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    # The TPU compiler gives both.
    assert memory is not None
    assert text is not None
    chip = topology.chip
    bytes_per_cycle = chip.ici_bandwidth / chip.clock
    cost = hlo.parse(text, unknown_trips=program.steps, branch=program.branch, bytes_per_cycle=bytes_per_cycle).cost
    work = flops.count(traced.jaxpr, program.steps, program.branch) / topology.num_chips / program.steps
    hbm_traffic = cost.hbm / program.steps
    collectives = {kind: amount / program.steps for kind, amount in cost.collectives.items()}
    times: dict[Bound, float] = {
        "compute": work / chip.flops,
        "memory": hbm_traffic / chip.hbm_bandwidth,
        "ici": sum(collectives.values()) / chip.ici_bandwidth,
    }
    bound_by = max(times, key=lambda name: times[name])
    exposed = (sum(collectives.values()) - cost.overlapped / program.steps) / chip.ici_bandwidth
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return CompileReport(
        program=name,
        model=model,
        topology=topology.name,
        batch=batch,
        int8=int8,
        positions=positions,
        mesh=dict(program.mesh.shape),
        compile_seconds=seconds,
        memory_per_chip_bytes=needed,
        arguments_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        hbm_bytes=chip.hbm_bytes,
        fits=needed <= chip.hbm_bytes,
        flops=work,
        bytes=hbm_traffic,
        bytes_ideal=program.ideal_bytes,
        bytes_ratio=hbm_traffic / program.ideal_bytes,
        roofline_seconds=times[bound_by],
        bound_by=bound_by,
        collective_bytes=collectives,
        overlapped_bytes=cost.overlapped / program.steps,
        aliased_bytes=memory.alias_size_in_bytes,
        flop_utilization=times["compute"] / times[bound_by],
        exposed_ici_seconds=exposed,
        predicted_utilization=times["compute"] / (max(times["compute"], times["memory"]) + exposed),
        predicted_utilization_serial=times["compute"] / (times["compute"] + times["memory"] + exposed),
    )
