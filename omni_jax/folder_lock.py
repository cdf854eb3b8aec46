"""One run at a time writes to a folder: a file in it says which one.

A run holds the lock while its process lives, and rewrites the file every `HEARTBEAT_SECONDS`. Another run is refused,
and says who holds the lock. It takes the lock over
  - at once, if the holder was a process of the same machine that has ended;
  - otherwise after watching the file for `SILENCE_SECONDS`, if it did not change meanwhile.
No clocks of two machines are compared. A process that finds that its lock was taken over stops: `FolderLock.check`.

A new file appears by a hard link, which fails if another is there. Where there are no links, as on a mounted bucket,
and where a lock is taken over, the file is replaced and read back after `SETTLE_SECONDS`: the last to write has it.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import platform
import stat
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from omni_jax.errors import ConfigError, FolderInUseError
from omni_jax.input_files import parse_json

logger = logging.getLogger(__name__)

LOCK = ".lock"
HEARTBEAT_SECONDS = 15.0
SILENCE_SECONDS = 120.0
"""More than a minute above the heartbeat: a mounted bucket shows the files of other machines a minute late."""
SETTLE_SECONDS = 2.0
POLL_SECONDS = 0.5
MAX_BYTES = 64 << 10
"""Of a lock file that are read."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. Unknown fields are empty."""

    command: str = ""
    user: str = ""
    host: str = ""
    process: int = 0
    machine: str = ""
    """Identifies the running kernel, and the namespace that process ids are of."""
    started: str = ""
    """When the process started, in the kernel's ticks: ids are used again."""
    since: str = ""
    """When it got the lock."""
    token: str = ""
    """Random."""
    heartbeat: int = 0
    """How often the file has been rewritten."""

    @classmethod
    def of_this_process(cls, command: str) -> Holder:
        """This process."""
        return cls(
            command,
            _user(),
            platform.node(),
            os.getpid(),
            _machine(),
            _start_time(os.getpid()),
            datetime.now(UTC).isoformat(timespec="seconds"),
            uuid.uuid4().hex,
        )

    @classmethod
    def parse(cls, text: bytes) -> Holder:
        """Of a lock file; damaged ones name no one."""
        try:
            holder = cls(**parse_json(text))
            holder = replace(holder, process=int(holder.process), heartbeat=int(holder.heartbeat))
        except (ValueError, TypeError):
            return cls()
        # To the kernel 0 and less are groups of processes, which do not end.
        return holder if holder.process > 0 else cls()

    def has_ended(self) -> bool:
        """Whether this is a process of this machine that is certain to have ended."""
        if self.machine != _machine() or os.name != "posix":
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        # The id may be that of another process by now, or of one that has ended and was not waited for.
        now = _start_time(self.process)
        return bool(now and self.started) and now != self.started

    def __str__(self) -> str:
        if not self.token:
            return "a lock file that cannot be read"
        return f"`{self.command}` of {self.user}, process {self.process} on {self.host}, since {self.since}"


class FolderLock:
    """The lock of a folder, as a context manager.

    Args:
        folder: made if it is not there.
        command: what holds it, for messages.
        name: of the lock file: several may be held that are about different files of a folder.

    Raises:
        FolderInUseError: another run holds it.
        ConfigError: the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, command: str, name: str = LOCK):
        self.folder = Path(folder)
        self.path = self.folder / name
        self.holder = Holder.of_this_process(command)
        self._taken_by: Holder | None = None
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="folder_lock", daemon=True)

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._acquire():
                pass
        except OSError as error:
            raise ConfigError(f"{self.folder}: expected a folder to write to, found {error.strerror}") from None
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """See that the lock is still held.

        Raises:
            FolderInUseError: another run took it over, because this process did not write for a while.
        """
        if self._taken_by is not None:
            raise FolderInUseError(f"{self.folder}: taken over by {self._taken_by}")

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held any more."""
        self._released.set()
        if self._heart.is_alive() and threading.current_thread() is not self._heart:
            self._heart.join()
        try:
            if self._is_mine(self._read()):
                self.path.unlink()
        except OSError as error:
            logger.warning("%s: the lock could not be removed: %s", self.path, error.strerror)

    def _acquire(self) -> bool:
        """Try once; False: something has changed, try again."""
        found = self._read()
        if found is None:
            return self._create()
        if found.has_ended():
            logger.info("%s: taking over from %s, which has ended", self.folder, found)
        elif found.machine == self.holder.machine:
            raise self._in_use(found)
        else:
            logger.warning(
                "%s: locked by %s; waiting up to %.0f s for a sign of life", self.folder, found, SILENCE_SECONDS
            )
            if not self._is_silent(found):
                return False
            logger.warning("%s: taking over, as there was none", self.folder)
        return self._overwrite()

    def _is_silent(self, found: Holder) -> bool:
        deadline = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            now = self._read()
            if now == found:
                continue
            if now is not None and now.token and now.token == found.token:
                raise self._in_use(now)
            return False
        return True

    def _in_use(self, holder: Holder) -> FolderInUseError:
        return FolderInUseError(
            f"{self.folder}: expected one run at a time, found {holder}: wait for it, stop it, or choose another folder"
        )

    def _create(self) -> bool:
        partial = self._write_partial()
        try:
            os.link(partial, self.path)
        except FileExistsError:
            return False
        except OSError:
            return self._overwrite()
        finally:
            partial.unlink(missing_ok=True)
        return True

    def _overwrite(self) -> bool:
        self._replace()
        time.sleep(SETTLE_SECONDS)
        return self._is_mine(self._read())

    def _is_mine(self, found: Holder | None) -> bool:
        return found is not None and found.token == self.holder.token

    def _replace(self) -> None:
        self._write_partial().replace(self.path)

    def _write_partial(self) -> Path:
        partial = self.path.with_name(f"{self.path.name}.{self.holder.token}.part")
        partial.write_text(json.dumps(asdict(self.holder), indent=1), encoding="utf-8")
        return partial

    def _read(self) -> Holder | None:
        try:
            mode = self.path.stat().st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                with self.path.open("rb") as file:
                    return Holder.parse(file.read(MAX_BYTES))
        except FileNotFoundError:
            return Holder() if self.path.is_symlink() else None
        # A pipe or a device, which would not end.
        return Holder()

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                found = self._read()
                if found is not None and not self._is_mine(found):
                    self._taken_by = found
                    logger.error("%s: taken over by %s", self.folder, found)
                    return
                self.holder = replace(self.holder, heartbeat=self.holder.heartbeat + 1)
                self._replace()
            except OSError:
                # A full disk, or a network that is away for a while: others wait longer than for one heartbeat.
                continue


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container's user may have no name.
        return str(os.getuid())


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return platform.node()


def _start_time(process: int) -> str:
    """Start of a process in ticks since the machine started; "ended" for a zombie, and empty where it is not known."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The name of the program, in parentheses, may have spaces in it.
    state, *values = status.rpartition(")")[2].split()
    return "ended" if state in "ZX" else values[18]
