"""Makes nano: runs the steps of the recipe that have not been done, one after the other.

    python -m recipes.nano                          # start, or continue
    python -m recipes.nano --from-scratch           # also make tokenizer, codec and trunk
    python -m recipes.nano --until stage1           # stop after a step
    python -m recipes.nano --force stage3           # run a step and all after it again

Each step is a command, printed before it runs. A step whose output exists is not run again, even if its inputs have
changed. Everything is written under build/nano of the current folder; the last step, `ship`, changes the project.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from omni_jax.checkpoint.release import AUDIO_ENCODER
from recipes.nano.audio_encoder import WHISPER
from recipes.nano.suites import SUITES

BUILD = Path("build/nano")
WHISPER_BASE = BUILD / "audio_encoder"
"""What recipes.nano.audio_encoder writes: the encoder, and the whole model as the ASR judge."""
ROOT = Path(__file__).parents[2]
OMNI_JAX = str(Path(sys.executable).with_name("omni-jax"))
WRITTEN = (
    "numbers", "products", "larger_products", "further_counts", "knowledge", "smalltalk", "unknown", "typos", "repeat",
    "held_out", "typos_held_out",
)  # fmt: skip
"""Sets of texts that are not synthesized; see texts.py."""
WRITTEN_CONVERSATIONS = ("conversation_text", "conversation_text_held_out")
TRANSCRIBED = ("natural", "read")
"""Suites whose spoken answers are transcribed, which takes a second each; those of the others are alike."""
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""A training step on CPUs allocates hundreds of megabytes; with small pages much of its time goes there."""
TRIAL_TRAINING = (
    "optimizer.steps=2", "optimizer.warmup_steps=1", "checkpoint.save_interval_steps=2", "log_interval_steps=1",
    "evaluation.interval_steps=2", "evaluation.num_samples=0", "data.num_workers=0",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A command, and the file or folder that exists once it has been run."""

    name: str
    command: tuple[str, ...]
    output: Path | None = None
    """None: the command itself finds out what is done."""
    folder: Path | None = None
    """What `--force` removes, where it is not the output with its folder."""

    @property
    def done(self) -> bool:
        """Whether its output exists."""
        return self.output is not None and self.output.exists()


def script(name: str, *arguments: str | Path) -> tuple[str, ...]:
    """The command of a script of the recipe."""
    return sys.executable, "-m", f"recipes.nano.{name}", *map(str, arguments)


def training_step(name: str, run: str, *, trial: bool = False) -> Step:
    """A stage of training."""
    config = ROOT / "configs" / f"nano_{name}.yaml"
    overrides = TRIAL_TRAINING if trial else ()
    return Step(name, (sys.executable, str(ROOT / "train.py"), str(config), *overrides), BUILD / run / "release")


def steps(*, from_scratch: bool = False, trial: bool = False) -> list[Step]:
    """All steps, in order.

    Args:
        from_scratch: make tokenizer, codec and trunk instead of taking those of the shipped release.
        trial: with little data, two training steps, and espeak-ng as the only synthesizer.
    """
    return [
        *data_steps(from_scratch=from_scratch, trial=trial),
        *stage_steps(from_scratch=from_scratch, trial=trial),
        *release_steps(trial=trial),
    ]


def data_steps(*, from_scratch: bool, trial: bool) -> list[Step]:
    """Texts, tokenizer, codec, records, and a trunk trained in writing."""
    texts, tokenizer, codec = BUILD / "texts", BUILD / "tokenizer", BUILD / "codec" / "codec.safetensors"
    untrained, records = BUILD / "untrained", BUILD / "records"
    limit, steps, espeak = (("--limit", "24"), ("--steps", "2"), ("--trial",)) if trial else ((), (), ())
    modules = ("--codec", codec, "--tokenizer", tokenizer) if from_scratch else ()
    making = [
        Step("tokenizer", script("tokenizer", "--out", tokenizer), tokenizer),
        Step("codec", script("codec", "--texts", texts, "--out", codec.parent, *steps, *espeak), codec),
    ]
    synthesize = script("speech", "--texts", texts, "--codec", untrained, "--out", records, *espeak)
    return [
        Step("texts", script("texts", "--out", texts, *limit), texts),
        *(making if from_scratch else ()),
        Step("untrained", script("assemble", "untrained", untrained, *modules), untrained),
        *(prepare_step(name) for name in WRITTEN),
        *(prepare_conversations_step(name) for name in WRITTEN_CONVERSATIONS),
        *((training_step("text", "text_run", trial=trial),) if from_scratch else ()),
        Step("speech", synthesize, folder=records),
    ]


def prepare_step(name: str) -> Step:
    """A written set as records."""
    manifest, out = BUILD / "texts" / "written" / f"{name}.jsonl", BUILD / "text" / name
    command = (OMNI_JAX, "prepare", "manifest", str(manifest), "--out", str(out))
    return Step(f"prepare_{name}", command, out / "index.json")


def prepare_conversations_step(name: str) -> Step:
    """Written conversations as records."""
    file, out = BUILD / "texts" / "conversations" / f"{name}.jsonl", BUILD / "text" / name
    command = (OMNI_JAX, "prepare", "text", str(file), "--license", "Apache-2.0", "--out", str(out))
    return Step(f"prepare_{name}", command, out / "index.json")


def stage_steps(*, from_scratch: bool, trial: bool) -> list[Step]:
    """The audio encoder, the three stages, and fine-tuning on conversations."""
    start = BUILD / "start"
    trunk = ("--trunk", BUILD / "text_run") if from_scratch else ()
    return [
        Step("audio_encoder", script("audio_encoder", "--out", WHISPER_BASE), WHISPER_BASE),
        Step(
            "start",
            script("assemble", "start", start, "--audio-encoder", WHISPER_BASE / AUDIO_ENCODER, *trunk),
            start,
        ),
        *(training_step(name, name, trial=trial) for name in ("stage1", "stage2", "stage3", "conversation")),
    ]


def release_steps(*, trial: bool) -> list[Step]:
    """The last run's model in eight bits, evaluated and put into the package."""
    packaged, suites = BUILD / "packaged", BUILD / "suites"
    encoder = WHISPER_BASE / AUDIO_ENCODER
    package = script("assemble", "package", BUILD / "conversation", packaged, "--audio-encoder", encoder)
    return [
        Step("package", package, packaged),
        Step("suites", script("suites", "--out", suites), suites),
        *(evaluation_step(name, packaged, suites, trial=trial) for name in SUITES),
        Step("ship", script("ship", packaged)),
    ]


def evaluation_step(name: str, model: Path, suites: Path, *, trial: bool) -> Step:
    """Evaluate the model on a suite."""
    out = BUILD / "evaluated" / name
    command = (OMNI_JAX, "evaluate", str(suites / f"{name}.jsonl"), "--model", str(model), "--out", str(out))
    options: tuple[str, ...] = ()
    if trial:
        # Of the first two recordings without a question neither may be taken for speech.
        options = () if name == "noise" else ("--limit", "2")
    elif name in TRANSCRIBED:
        options = ("--asr-judge", f"faster-whisper={WHISPER_BASE / WHISPER}")
    return Step(f"evaluate_{name}", (*command, *options), out / "report.html")


def run(step: Step) -> None:
    """Run a step unless its output exists.

    Raises:
        SystemExit: the command failed, with its exit code; or it stopped early and can continue.
    """
    if step.done:
        return
    typer.echo(f"{step.name}: {' '.join(step.command)}")
    start = time.monotonic()
    code = subprocess.run(step.command, env=environment(), check=False).returncode
    if code:
        raise SystemExit(code)
    if step.output is not None and not step.done:
        raise SystemExit(f"{step.name}: stopped before its end; the same command continues")
    typer.echo(f"{step.name}: {(time.monotonic() - start) / 60:.1f} minutes")


def environment() -> dict[str, str]:
    """Environment variables of the commands."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return HUGE_PAGES | dict(os.environ) | {"PYTHONPATH": path}


def check_outdated(step: Step, later: Sequence[Step]) -> None:
    """Refuse to run a step if outputs of later steps exist: they would be of other inputs.

    Raises:
        SystemExit: there are some; says how to make them again.
    """
    outdated = [other for other in later if other.done]
    if step.output is not None and not step.done and outdated:
        names = ", ".join(str(other.output) for other in outdated)
        raise SystemExit(f"{step.name}: expected no output of later steps, found {names}: --force {step.name}")


def remove(step: Step) -> None:
    """Remove what a step has written."""
    path = step.folder or step.output
    if path is not None:
        shutil.rmtree(path if path.parent == BUILD else path.parent, ignore_errors=True)


def main(
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Make tokenizer, codec and trunk, too.")] = False,
    until: Annotated[str | None, typer.Option(help="Stop after this step.")] = None,
    force: Annotated[str | None, typer.Option(help="Remove the outputs of this step and all later ones first.")] = None,
    trial: Annotated[bool, typer.Option("--trial", help="A few rows and steps, to see that all commands run.")] = False,
) -> None:
    """Make nano."""
    every = steps(from_scratch=from_scratch, trial=trial)
    names = [step.name for step in every]
    for option, name in (("--until", until), ("--force", force)):
        if name is not None and name not in names:
            raise typer.BadParameter(f"{option}: expected one of {', '.join(names)}, found {name}")
    if force is not None:
        for step in every[names.index(force) :]:
            remove(step)
    for index, step in enumerate(every):
        check_outdated(step, every[index + 1 :])
        run(step)
        if step.name == until:
            break


if __name__ == "__main__":
    typer.run(main)
