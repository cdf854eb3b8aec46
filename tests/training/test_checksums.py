"""Whether a checkpoint is whole: files that changed, that are missing, and that were not there."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from omni_jax.training.checksums import SUMS, find_damage, hash_items, write_checksums


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "12"
    (folder / "state" / "d").mkdir(parents=True)
    rng = random.Random(0)
    for name in ("_CHECKPOINT_METADATA", "state/manifest.ocdbt", "state/d/0a", "state/d/1b", "state/empty"):
        (folder / name).write_bytes(rng.randbytes(0 if name == "state/empty" else 500))
    known = hash_items(folder)
    assert sorted(known) == ["state/d/0a", "state/d/1b", "state/empty", "state/manifest.ocdbt"]
    write_checksums(folder, known)
    return folder


def test_find_damage_of_a_whole_checkpoint_is_none(checkpoint: Path):
    assert find_damage(checkpoint) is None
    assert [find_damage(checkpoint, share, 3) for share in range(3)] == [None] * 3
    command = ["sha256sum", "--check", "--strict", "--quiet", SUMS]
    assert subprocess.run(command, cwd=checkpoint, check=False).returncode == 0


def test_find_damage_notices_every_flipped_bit_of_the_sums_and_any_flipped_byte(checkpoint: Path):
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size]
    places = [(checkpoint / SUMS, at) for at in range((checkpoint / SUMS).stat().st_size)]
    rng = random.Random(1)
    places += [(path, rng.randrange(path.stat().st_size)) for path in files for _ in range(20)]
    for path, at in places:
        data = bytearray(path.read_bytes())
        before = bytes(data)
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert find_damage(checkpoint), f"{path.name} at {at}"
        path.write_bytes(before)
    assert find_damage(checkpoint) is None


def test_find_damage_in_one_file_is_found_by_one_share(checkpoint: Path):
    (checkpoint / "state" / "d" / "0a").write_bytes(b"?")
    found = [find_damage(checkpoint, share, 4) for share in range(4)]
    assert [damage for damage in found if damage] == ["other bytes in state/d/0a than were written"]


def test_find_damage_says_what_is_missing_cut_or_stray(checkpoint: Path):
    def damage(change) -> str | None:
        copy = checkpoint.parent / "copy" / checkpoint.name
        shutil.copytree(checkpoint, copy)
        change(copy)
        found = find_damage(copy)
        shutil.rmtree(copy.parent)
        return found

    sums = (checkpoint / SUMS).read_bytes()
    assert damage(lambda copy: (copy / SUMS).unlink()) == f"no {SUMS}"
    assert damage(lambda copy: (copy / SUMS).write_bytes(b"")) == f"another {SUMS} than was written"
    assert damage(lambda copy: (copy / SUMS).write_bytes(sums[:-1])) == f"another {SUMS} than was written"
    assert damage(lambda copy: (copy / SUMS).write_bytes(sums.replace(b"\n", b"\r"))) is not None
    # A line less, so that a file is not named.
    assert "which is not in" in str(damage(lambda copy: (copy / SUMS).write_bytes(sums[: sums[:-1].rindex(b"\n") + 1])))
    assert damage(lambda copy: (copy / "state" / "d" / "1b").unlink()) == "no state/d/1b"
    assert damage(lambda copy: (copy / "state" / "d" / "2c").touch()) == f"state/d/2c, which is not in {SUMS}"
    assert "state/d/1b" in str(damage(lambda copy: (copy / "state" / "d" / "1b").write_bytes(b"short")))


def test_find_damage_of_pipes_devices_and_emptied_checkpoints(checkpoint: Path):
    for name in ("state/d/1b", SUMS):
        data = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)
        assert find_damage(checkpoint) == f"{name}, which is no file"
        (checkpoint / name).unlink()
        (checkpoint / name).symlink_to("/dev/zero")
        assert find_damage(checkpoint) == f"{name}, which is no file"
        (checkpoint / name).unlink()
        (checkpoint / name).write_bytes(data)
    assert find_damage(checkpoint) is None
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    write_checksums(checkpoint, {})
    assert find_damage(checkpoint) == f"no file in {SUMS}"


def test_find_damage_of_a_checkpoint_under_the_name_of_another_step(checkpoint: Path):
    other = checkpoint.rename(checkpoint.with_name("100"))
    assert find_damage(other) == f"another {SUMS} than was written"
    (other.parent / "7").write_text("stray")
    assert find_damage(other.parent / "7") == "a file"
    (other.parent / "8").mkdir()
    assert find_damage(other.parent / "8") == f"no {SUMS}"
