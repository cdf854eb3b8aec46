"""Makes nano, from nothing to a release, one step after the other.

    python -m nano                  # goes on where it was interrupted
    python -m nano --anew           # teaches also the parts whose weights are in nano/parts
    python -m nano --until records  # stops after a step

Every step is a command of its own, printed before it runs; one that has finished has little to do when it is run
again. Everything is written under build/nano.
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

from omni_jax.checkpoint import TOKENIZER_FILES

BUILD = Path("build/nano")
PARTS = Path(__file__).parent / "parts"
TRUNK = "trunk.safetensors"
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
    Step("ear", ("-m", "nano.ear"), BUILD / "ear" / "ear.safetensors", ("ear.safetensors",)),
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
    Step("package", ("-m", "nano.assemble", "package", str(BUILD / "stage3_together"))),
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
        SystemExit: the command failed; with its exit code.
    """
    if step.serves and not anew and (PARTS / step.serves).exists():
        print(f"{step.name}: not needed, there is {PARTS / step.serves}", flush=True)
        return
    if step.done is not None and step.part and not anew and not step.done.exists():
        kept = [PARTS / name for name in step.part]
        if all(path.exists() for path in kept):
            step.done.parent.mkdir(parents=True, exist_ok=True)
            for path in kept:
                shutil.copyfile(path, step.done.parent / path.name)
                print(f"{step.name}: {path}", flush=True)
    if step.done is not None and step.done.exists() and not _unfinished(step):
        return
    print(f"{step.name}: python {' '.join(step.command)}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, *step.command], env=HUGE_PAGES | os.environ, check=False).returncode
    if code:
        raise SystemExit(code)
    print(f"{step.name}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def _unfinished(step: Step) -> bool:
    """Whether a part is one of a training that was interrupted: it leaves its state beside what it has so far."""
    return bool(step.part) and step.done is not None and (step.done.parent / "state.safetensors").exists()


if __name__ == "__main__":
    typer.run(main)
