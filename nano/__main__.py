"""Makes nano, from nothing to a release, one step after the other.

    python -m nano                  # goes on where it was interrupted
    python -m nano --anew           # teaches also the parts whose weights are in nano/parts
    python -m nano --until records  # stops after a step

Every step is a command of its own, printed before it runs. What there is already is not made again, but for the
examination, and it is not made anew when what it was made from changes: remove it. Everything is written under
build/nano; the last step, `ship`, puts the model into the package, its figures into the tests and its pictures into the
documentation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from omni_jax.checkpoint.release import TOKENIZER_FILES

BUILD = Path("build/nano")
PARTS = Path(__file__).parent / "parts"
TRUNK = "trunk.safetensors"
KEPT = ".kept"
"""Lies beside parts that were taken from `PARTS`."""
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""A training step on CPUs frees and takes hundreds of megabytes; in small pages a good part of its time goes there."""


@dataclass(frozen=True)
class Step:
    """A command, and the file or folder that is there once it need not be run again."""

    name: str
    command: tuple[str, ...]
    done: Path | None = None
    part: tuple[str, ...] = ()
    """What may be taken from `PARTS` instead: `done` and files beside it."""
    serves: str = ""
    """The file in `PARTS` that makes this step needless."""


def train(name: str, run: str, serves: str = "") -> Step:
    """A stage of training."""
    return Step(name, ("train.py", f"configs/nano_{name}.yaml"), BUILD / run / "release", serves=serves)


STEPS = (
    Step("synthesize", ("-m", "nano.synthesize")),
    Step("codec", ("-m", "nano.codec"), BUILD / "codec" / "codec.safetensors", ("codec.safetensors",)),
    Step(
        "audio_encoder",
        ("-m", "nano.audio_encoder"),
        BUILD / "audio_encoder" / "audio_encoder.safetensors",
        ("audio_encoder.safetensors",),
    ),
    Step("texts", ("-m", "nano.text")),
    Step("untaught", ("-m", "nano.assemble", "untaught", str(BUILD / "untaught")), BUILD / "untaught", serves=TRUNK),
    train("text", "text_run", serves=TRUNK),
    Step(
        "trunk",
        ("-m", "nano.assemble", "trunk", str(BUILD / "text_run")),
        BUILD / "trunk" / TRUNK,
        (TRUNK, *TOKENIZER_FILES),
    ),
    Step("records", ("-m", "nano.records")),
    Step("start", ("-m", "nano.assemble", "taught", str(BUILD / "start")), BUILD / "start"),
    train("stage1", "stage1"),
    train("stage2", "stage2"),
    train("stage3", "stage3"),
    train("stage3_voice", "stage3_voice"),
    train("stage3_together", "stage3_together"),
    train("stage3_last", "stage3_last"),
    Step(
        "mean",
        (
            "-m",
            "nano.assemble",
            "average",
            str(BUILD / "stage3_together"),
            str(BUILD / "stage3_last"),
            "--out",
            str(BUILD / "mean"),
        ),
        BUILD / "mean",
    ),
    Step("package", ("-m", "nano.assemble", "package", str(BUILD / "mean"))),
    Step("evaluate", ("-m", "nano.evaluate", "ask", str(BUILD / "packaged"))),
    Step("ship", ("-m", "nano.ship", str(BUILD / "packaged"))),
)


def main(
    anew: Annotated[bool, typer.Option("--anew", help="Teach also the parts that nano/parts has")] = False,
    until: Annotated[str | None, typer.Option(help=f"One of {', '.join(step.name for step in STEPS)}")] = None,
) -> None:
    """Make nano."""
    if until is not None and until not in [step.name for step in STEPS]:
        raise typer.BadParameter(f"--until: expected one of {', '.join(s.name for s in STEPS)}, found {until}")
    for step in STEPS:
        run(step, anew=anew)
        if step.name == until:
            break


def run(step: Step, *, anew: bool) -> None:
    """Run a step unless it is done.

    Raises:
        SystemExit: the command failed, with its exit code; or it ended early and can go on.
    """
    if step.serves and not anew and (PARTS / step.serves).exists():
        print(f"{step.name}: not needed, there is {PARTS / step.serves}", flush=True)
        return
    kept = [PARTS / name for name in step.part]
    if step.done is not None and kept:
        there = step.done.parent
        taken = (there / KEPT).exists()
        if not anew and (taken or not step.done.exists()) and all(path.exists() for path in kept):
            there.mkdir(parents=True, exist_ok=True)
            for path in kept:
                shutil.copyfile(path, there / path.name)
                print(f"{step.name}: {path}", flush=True)
            (there / KEPT).touch()
        elif anew and taken:
            for name in (*step.part, KEPT):
                (there / name).unlink(missing_ok=True)
    if step.done is not None and step.done.exists():
        return
    print(f"{step.name}: python {' '.join(step.command)}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, *step.command], env=HUGE_PAGES | os.environ, check=False).returncode
    if code:
        raise SystemExit(code)
    if step.done is not None and not step.done.exists():
        raise SystemExit(f"{step.name}: was stopped before its end; the same command goes on")
    print(f"{step.name}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    typer.run(main)
