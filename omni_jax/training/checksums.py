"""Content hashes of a checkpoint folder: whether all of it is there, as it was written.

A whole checkpoint has a file `SHA256SUMS` with a line for every other file, in the format of the program `sha256sum`:
`cd checkpoints/500 && sha256sum -c SHA256SUMS` checks it, too. The file is written last, so that a folder that was not
completed, or not renamed or copied as a whole, has none or names files that are not there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = "SHA256SUMS"
READERS = 8
"""Files that are read at once: a mounted bucket answers each read late."""


def hash_items(folder: Path) -> dict[str, str]:
    """The hashes of the files in the folders of a checkpoint, which are almost all of its bytes.

    Raises:
        OSError: a file cannot be read.
    """
    names = [name for name in _files(folder) if "/" in name]
    return dict(zip(names, _hashes(folder, names), strict=True))


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """Write the hashes of all files of a checkpoint.

    Args:
        folder: of the checkpoint; its name is the step.
        known: hashes of some of the files.

    Raises:
        OSError: a file cannot be read, or the hashes cannot be written.
    """
    names = _files(folder)
    rest = [name for name in names if name not in known]
    hashes = {**known, **dict(zip(rest, _hashes(folder, rest), strict=True))}
    with (folder / SUMS).open("wb") as file:
        file.write(_render(folder.name, {name: hashes[name] for name in names}))
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole.

    Args:
        folder: of the checkpoint; its name is the step.
        share: which of `num_shares` shares of the files to read.
        num_shares: processes that share the reading.
    """
    if not folder.is_dir():
        return "a file"
    try:
        found = _files(folder)
        # Reading a pipe or a device would not end.
        if odd := [name for name in (*found, SUMS) if (folder / name).exists() and not (folder / name).is_file()]:
            return f"{odd[0]}, which is no file"
        written = (folder / SUMS).read_bytes()
        lines = [line.partition("  ") for line in written.decode().splitlines()]
        expected = {name: digest for digest, _, name in lines[1:]}
        if _render(folder.name, expected) != written:
            return f"another {SUMS} than was written"
        if not expected:
            return f"no file in {SUMS}"
        if missing := sorted(expected.keys() - found):
            return f"no {missing[0]}"
        if stray := sorted(set(found) - expected.keys()):
            return f"{stray[0]}, which is not in {SUMS}"
        names = found[share::num_shares]
        for name, digest in zip(names, _hashes(folder, names), strict=True):
            if digest != expected[name]:
                return f"other bytes in {name} than were written"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except OSError as error:
        return f"{error.filename} unreadable ({error.strerror})"
    except UnicodeDecodeError:
        return f"another {SUMS} than was written"
    return None


def _render(step: str, hashes: Mapping[str, str]) -> bytes:
    lines = [f"# checkpoint of step {step}", *(f"{digest}  {name}" for name, digest in hashes.items())]
    return "".join(f"{line}\n" for line in lines).encode()


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != SUMS)


def _hashes(folder: Path, names: Sequence[str]) -> Iterator[str]:
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(_sha256, [folder / name for name in names])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
