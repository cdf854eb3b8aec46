"""One run at a time writes to a folder."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from omni_jax import folder_lock
from omni_jax.errors import ConfigError, FolderInUseError
from omni_jax.folder_lock import LOCK, FolderLock, Holder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("HEARTBEAT", 0.02), ("SILENCE", 0.4), ("SETTLE", 0.1), ("POLL", 0.01)):
        monkeypatch.setattr(folder_lock, f"{name}_SECONDS", seconds)


@pytest.fixture(params=["links", "no links"])
def _file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with hard links, and one without, as a mounted bucket."""

    def refuse(*_: object) -> None:
        raise PermissionError

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)


def write_lock(folder: Path, **changes: object) -> Holder:
    """The lock file of another process."""
    folder.mkdir(exist_ok=True)
    holder = replace(Holder.of_this_process("omni-jax other"), **changes)
    (folder / LOCK).write_text(json.dumps(asdict(holder)))
    return holder


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.usefixtures("_file_system")
def test_folder_lock_is_held_by_one_and_says_who(tmp_path: Path):
    with FolderLock(tmp_path / "out", "omni-jax train") as first:
        first.check()
        with pytest.raises(FolderInUseError, match=rf"`omni-jax train` of .*, process {os.getpid()} on .*, since 20"):
            FolderLock(tmp_path / "out", "omni-jax train").__enter__()
        # Another file of the folder has a lock of its own.
        with FolderLock(tmp_path / "out", "omni-jax batch", ".other.lock"):
            pass
        first.check()
    assert not list((tmp_path / "out").iterdir())
    with FolderLock(tmp_path / "out", "omni-jax train"):
        pass


@pytest.mark.usefixtures("_file_system")
def test_folder_lock_of_many_at_once_is_held_by_one_at_a_time(tmp_path: Path):
    inside, most, refused = 0, 0, 0
    guard, start = threading.Lock(), threading.Barrier(8)

    def run() -> None:
        nonlocal inside, most, refused
        start.wait()
        try:
            with FolderLock(tmp_path, "omni-jax train") as lock:
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.3)
                with guard:
                    inside -= 1
                lock.check()
        except FolderInUseError:
            refused += 1

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refused >= 1


def test_folder_lock_of_an_ended_process_of_this_machine_is_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folder_lock, "SILENCE_SECONDS", 1000)
    write_lock(tmp_path, process=ended_process())
    with FolderLock(tmp_path, "omni-jax train"):
        pass
    # The id belongs to another process by now.
    write_lock(tmp_path, process=os.getppid(), started="1")
    with FolderLock(tmp_path, "omni-jax train"):
        pass
    # A zombie: it has ended, and nothing has waited for it.
    zombie = subprocess.Popen(["true"])
    while folder_lock._start_time(zombie.pid) != "ended":
        time.sleep(0.01)
    write_lock(tmp_path, process=zombie.pid)
    with FolderLock(tmp_path, "omni-jax train"):
        pass
    zombie.wait()


def test_folder_lock_of_a_killed_run_is_taken_over_and_that_of_a_live_one_is_not(tmp_path: Path):
    code = (
        "import sys, time; from omni_jax.folder_lock import FolderLock\n"
        f"with FolderLock({str(tmp_path)!r}, 'omni-jax train'): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match=f"process {other.pid} on "):
        FolderLock(tmp_path, "omni-jax train").__enter__()
    other.kill()
    other.communicate()
    with FolderLock(tmp_path, "omni-jax train"):
        pass


def test_folder_lock_of_another_machine_is_taken_over_after_its_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_lock(tmp_path, machine="elsewhere", host="elsewhere", process=ended_process())
    start = time.monotonic()
    with FolderLock(tmp_path, "omni-jax train") as lock:
        assert time.monotonic() - start > folder_lock.SILENCE_SECONDS
        lock.check()
    assert "on elsewhere, since" in caplog.text
    assert "waiting up to" in caplog.text
    # So is one that names no holder.
    (tmp_path / LOCK).write_text("{")
    with FolderLock(tmp_path, "omni-jax train"):
        pass
    assert "a lock file that cannot be read" in caplog.text


@pytest.mark.parametrize(
    "damage", ["pipe", "link to nothing", "[" * 50_000, '{"process": 1e999}', "group of processes"]
)
def test_folder_lock_that_is_damaged_is_taken_over_after_its_silence(tmp_path: Path, damage: str):
    if damage == "pipe":
        os.mkfifo(tmp_path / LOCK)
    elif damage == "link to nothing":
        (tmp_path / LOCK).symlink_to(tmp_path / "nothing")
    elif damage == "group of processes":
        write_lock(tmp_path, process=0)
    else:
        (tmp_path / LOCK).write_text(damage)
    start = time.monotonic()
    with FolderLock(tmp_path, "omni-jax train") as lock:
        assert time.monotonic() - start > folder_lock.SILENCE_SECONDS
        lock.check()
        assert (tmp_path / LOCK).is_file()


def test_folder_lock_of_another_machine_that_lives_is_refused(tmp_path: Path):
    holder = write_lock(tmp_path, machine="elsewhere", host="elsewhere")
    alive = threading.Timer(0.1, lambda: write_lock(tmp_path, **{**asdict(holder), "heartbeat": 1}))
    alive.start()
    with pytest.raises(FolderInUseError, match="on elsewhere"):
        FolderLock(tmp_path, "omni-jax train").__enter__()
    alive.join()
    # The holder gives it back while another waits.
    done = threading.Timer(0.1, (tmp_path / LOCK).unlink)
    done.start()
    start = time.monotonic()
    with FolderLock(tmp_path, "omni-jax train"):
        assert time.monotonic() - start < folder_lock.SILENCE_SECONDS
    done.join()


def test_folder_lock_that_was_taken_over_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with FolderLock(tmp_path, "omni-jax train") as lock:
        write_lock(tmp_path, host="elsewhere")
        deadline = time.monotonic() + 10
        while lock._heart.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(FolderInUseError, match=r"taken over by .*omni-jax other.* on elsewhere"):
            lock.check()
    assert "taken over by" in caplog.text
    # The lock of the other stays.
    assert (tmp_path / LOCK).exists()


def test_folder_lock_needs_a_folder_that_can_be_written_to(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/out: expected a folder to write to, found Not a directory"):
        FolderLock(tmp_path / "file" / "out", "omni-jax train").__enter__()
