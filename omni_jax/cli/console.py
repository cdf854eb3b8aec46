"""Output of the commands: answers on stdout, messages on stderr."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from tqdm import tqdm


def echo_err(message: str) -> None:
    """Print a message on stderr, each line with the name of the program in front."""
    typer.echo("\n".join(f"omni-jax: {line}" for line in message.splitlines()), err=True)


def printable(text: str) -> str:
    """Text in which U+FFFD replaces control characters, which a terminal would obey."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A callback that draws a progress bar on stderr; its arguments are how many are done, and the total."""
    bar: tqdm | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            # What an earlier run has done does not count for the speed.
            bar = tqdm(total=total, initial=done, unit=unit, file=sys.stderr, dynamic_ncols=True)
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def replace_unencodable_output() -> None:
    """Print `?` for characters that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
