"""Output folders that appear only when complete, and checks of folders before work starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omni_jax.errors import CheckpointError


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill, which is renamed to `path` at the end; on an error it is removed.

    Raises:
        CheckpointError: as `require_free`, or the folder cannot be created.
    """
    path = Path(path)
    require_free(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a folder that can be created, found {error}") from None
    try:
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(path: str | Path) -> None:
    """Check that a new folder at `path` would overwrite nothing.

    Raises:
        CheckpointError: `path` exists and is not an empty folder, or is the current one.
    """
    path = Path(path)
    if path.resolve() == Path.cwd():
        raise CheckpointError(f"{path}: expected a new folder, found the current one, which cannot be replaced")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path}: expected a new or an empty folder, found something there already")


def require_files(folder: Path, files: Sequence[str], what: str) -> None:
    """Check that a folder has certain files; `what` says what it should be.

    Raises:
        CheckpointError: names the files that are missing.
    """
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: expected {what} with {', '.join(files)}; found no {', '.join(missing)}")
