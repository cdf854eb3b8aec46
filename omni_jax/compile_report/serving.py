"""What a chip serves: encoder, prefill, decoding and codec added up, for a stated mix of questions and answers.

The sum of the least times of the four programs, each compiled for the slice, as if they ran one after another and the
host took no time: a bound of what the hardware can do.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from omni_jax import sharding
from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.codec.snac import receptive_field
from omni_jax.compile_report.programs import (
    CODEC_FRAMES,
    Program,
    bytes_per_chip,
    codec_program,
    decode_program,
    encode_program,
    mean_pages,
    prefill_program,
)
from omni_jax.compile_report.report import CompileReport, check_groups, check_model, report_program
from omni_jax.compile_report.topology import Topology
from omni_jax.config.model import ModelConfig
from omni_jax.errors import ConfigError
from omni_jax.inference.engine import MAX_PREFILL_ROWS, PROMPT_BUCKETS
from omni_jax.model.pages import num_pages
from omni_jax.vocab import NUM_CODEBOOKS, Vocab

DELAY_STEPS = NUM_CODEBOOKS + 1
"""Steps of an answer besides one per frame."""
CODEC_ROWS = 64
"""Rows that the codec decodes together; its time per frame hardly depends on it."""
FREE_MEMORY = 0.1
"""Part of a chip's memory that is left to the other programs."""
LOGITS_ARRAYS = 8
"""Temporary arrays of a decode step that are as large as the float32 logits; 256 rows of mini_omni take seven."""


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ServingProfile:
    """A mix of questions and answers, given by their means."""

    question_seconds: float = Field(default=3.0, gt=0)
    answer_seconds: float = Field(default=5.0, gt=0)
    history_positions: int = Field(default=300, gt=0)
    """Positions of a prompt: the conversation so far, the question included. All of them are prefilled."""


@dataclass(frozen=True)
class ServingReport:
    """What one chip serves."""

    model: str
    topology: str
    tensor: int
    """Chips that share each row."""
    int8: bool
    profile: ServingProfile
    rows: int
    """Conversations whose caches each group of `tensor` chips holds, each of half an answer: page by page."""
    reports: dict[str, CompileReport]
    """By program: `encode`, `prefill`, `decode`, `codec`; and `encode_short`, if short windows change it."""
    seconds: dict[str, float]
    """Seconds that each program takes of a group of chips for one question and its answer."""
    speech_per_second: float
    """Seconds of speech per second and chip."""
    speech_per_second_short: float
    """The same with short windows of the audio encoder."""
    conversations_by_time: float
    """Real-time conversations per chip for which there is time, if each asks and is answered in turns."""
    conversations_by_memory: float
    """Those per chip for whose caches there is memory."""
    first_sound_seconds: float
    """From the end of a question to the first audio, if the chip begins with it at once, in a full batch."""

    @property
    def conversations(self) -> float:
        """Real-time conversations per chip."""
        return min(self.conversations_by_time, self.conversations_by_memory)

    @property
    def limited_by(self) -> Literal["time", "memory"]:
        """What ends first."""
        return "time" if self.conversations_by_time <= self.conversations_by_memory else "memory"

    def to_json(self) -> dict[str, Any]:
        """All of it, for `--json`."""
        return dataclasses.asdict(self) | {"conversations": self.conversations, "limited_by": self.limited_by}

    def table(self) -> str:
        """The report as lines of text."""
        profile, total = self.profile, sum(self.seconds.values())
        rows = {
            "serve": f"{self.model}{', int8' * self.int8} on {self.topology}, {self.tensor} chips a row",
            "mix": f"questions of {profile.question_seconds:g} s, answers of {profile.answer_seconds:g} s, prompts of "
            f"{profile.history_positions} positions",
            "batch": f"{self.rows} conversations; {self.reports['decode'].roofline_seconds * 1e3:.2f} ms a step",
        }
        for name, seconds in self.seconds.items():
            rows[name] = f"{seconds * 1e3:.3f} ms an answer, {seconds / total:.0%}"
        rows |= {
            "speech": f"{self.speech_per_second:.0f} s per second and chip; {self.speech_per_second_short:.0f} s with "
            "--short-windows",
            "real-time conversations": f"{self.conversations:.0f} per chip, limited by {self.limited_by} "
            f"(time {self.conversations_by_time:.0f}, memory {self.conversations_by_memory:.0f})",
            "first sound": f"{self.first_sound_seconds * 1e3:.0f} ms after the question",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def serving_report(
    topology: Topology,
    *,
    model: str = "mini_omni",
    profile: ServingProfile | None = None,
    tensor: int = 1,
    int8: bool = False,
) -> ServingReport:
    """Compile the programs and add them up. Prompts are padded as `omni-jax batch` pads them.

    Args:
        topology: the slice.
        model: a preset.
        profile: the mix; None: the default.
        tensor: chips that share each row.
        int8: whether the weights are quantized.

    Raises:
        ConfigError: an argument cannot be used, the model does not fit, or the mix does not fit its context.
    """
    config, profile = check_model(model), profile or ServingProfile()
    steps = _steps(config, profile)
    if profile.history_positions + steps > config.trunk.max_position:
        raise ConfigError(
            f"profile: expected prompt and answer to fit the context of {config.trunk.max_position} positions, found "
            f"{profile.history_positions} and {steps}",
            field="profile",
        )
    samples = round(profile.question_seconds * SAMPLE_RATE)
    if samples > config.audio_encoder.max_samples:
        raise ConfigError(
            f"profile: question_seconds: expected at most {config.audio_encoder.max_samples / SAMPLE_RATE:g}, "
            f"found {profile.question_seconds:g}",
            field="profile",
        )
    devices = topology.devices()
    groups = check_groups(len(devices), tensor)
    mesh = sharding.make_mesh(groups, 1, tensor, devices)

    length = next(size for size in PROMPT_BUCKETS if size >= profile.history_positions)
    prefilled = MAX_PREFILL_ROWS * groups
    # Attention reads the pages of each row alone: the mean over an answer counts.
    positions = profile.history_positions + steps // 2
    short = config.with_short_windows()
    programs = {
        "encode": (encode_program(config, mesh, prefilled, samples=samples, int8=int8), prefilled),
        "encode_short": (encode_program(short, mesh, prefilled, samples=samples, int8=int8), prefilled),
        "prefill": (prefill_program(config, mesh, prefilled, length=length, int8=int8), prefilled),
        "codec": (codec_program(config, mesh, CODEC_ROWS * groups), CODEC_ROWS * groups),
    }
    if short.audio_encoder.window(samples) == config.audio_encoder.window(samples):
        del programs["encode_short"]
    reports = {
        name: report_program(name, model, topology, batch, program, int8=int8 and name != "codec")
        for name, (program, batch) in programs.items()
    }
    one_row = decode_program(config, mesh, groups, int8=int8, positions=positions)
    rows = _rows(config, one_row, topology, tensor, mean_pages(config, positions) * groups)
    while "decode" not in reports:
        decode = decode_program(config, mesh, rows * groups, int8=int8, positions=positions)
        try:
            found = report_program("decode", model, topology, rows * groups, decode, int8=int8, positions=positions)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or rows == 1:
                raise
        else:
            if found.fits or rows == 1:
                reports["decode"] = found
                break
        # What a step needs besides the state is known to the compiler alone.
        rows = rows * 3 // 4
        rows = rows // 8 * 8 or rows

    per_answer = {
        "encode": reports["encode"].roofline_seconds / MAX_PREFILL_ROWS,
        "prefill": reports["prefill"].roofline_seconds / MAX_PREFILL_ROWS,
        "decode": reports["decode"].roofline_seconds / rows * steps,
        "codec": reports["codec"].roofline_seconds / (CODEC_ROWS * CODEC_FRAMES) * (steps - DELAY_STEPS),
    }
    seconds = sum(per_answer.values())
    speech = profile.answer_seconds / seconds / tensor
    if "encode_short" in reports:
        seconds += reports["encode_short"].roofline_seconds / MAX_PREFILL_ROWS - per_answer["encode"]
    turn = profile.question_seconds + profile.answer_seconds
    # The first audio is final when the frames after it that it depends on are there.
    first_frames = receptive_field(config.codec).right_samples // config.codec.frame_size + 1
    first_sound = (
        reports["encode"].roofline_seconds
        + reports["prefill"].roofline_seconds
        + (first_frames + NUM_CODEBOOKS) * reports["decode"].roofline_seconds
        + reports["codec"].roofline_seconds / CODEC_ROWS
    )
    return ServingReport(
        model=model,
        topology=topology.name,
        tensor=tensor,
        int8=int8,
        profile=profile,
        rows=rows,
        reports=reports,
        seconds=per_answer,
        speech_per_second=speech,
        speech_per_second_short=profile.answer_seconds / seconds / tensor,
        conversations_by_time=speech * turn / profile.answer_seconds,
        conversations_by_memory=rows / tensor,
        first_sound_seconds=first_sound,
    )


def _steps(config: ModelConfig, profile: ServingProfile) -> int:
    """Decode steps of an answer."""
    return math.ceil(profile.answer_seconds * config.codec.sample_rate / config.codec.frame_size) + DELAY_STEPS


def _rows(config: ModelConfig, one_row: Program, topology: Topology, tensor: int, pages_of_row: float) -> int:
    """How many rows of a group of chips fit besides the weights; a multiple of 8 where there are so many.

    To compile for more than there is room for takes the compiler several times as long.

    Args:
        config: the model.
        one_row: the program of one row in each group.
        topology: the slice.
        tensor: chips that share each row.
        pages_of_row: the mean number of pages of a row, times the groups.

    Raises:
        ConfigError: not one.
    """
    weights, state, *_ = one_row.arguments
    room = topology.chip.hbm_bytes * (1 - FREE_MEMORY) - bytes_per_chip(weights)
    vocab = Vocab(config.vocab)
    logits = 4 * (vocab.text_rows + NUM_CODEBOOKS * vocab.audio_rows) / tensor
    cache = bytes_per_chip(state) / num_pages(state.caches["trunk"]) * pages_of_row
    rows = int(room / (cache + LOGITS_ARRAYS * logits))
    if rows < 1:
        raise ConfigError(
            f"topology {topology.name}: expected room for the weights, {bytes_per_chip(weights) / 2**30:.1f} GiB a "
            f"chip, and a cache, found {topology.chip.hbm_bytes / 2**30:.0f} GiB; let more chips share a row "
            "(--tensor)",
            field="topology",
        )
    return rows // 8 * 8 or rows
