"""Output folders that appear only when complete."""

import pytest

from omni_jax.checkpoint.folders import new_folder, require_files, require_free
from omni_jax.errors import CheckpointError


def test_new_folder_appears_when_complete(tmp_path):
    with new_folder(tmp_path / "a" / "b") as partial:
        (partial / "file").touch()
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "file").is_file()


def test_new_folder_leaves_nothing_after_an_error(tmp_path):
    def fail():
        with new_folder(tmp_path / "a") as partial:
            (partial / "file").touch()
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_new_folder_replaces_an_empty_one_only(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as partial:
        (partial / "file").touch()
    assert (tmp_path / "empty" / "file").is_file()
    with pytest.raises(CheckpointError, match="expected a new or an empty folder"), new_folder(tmp_path / "empty"):
        pass


def test_new_folder_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    message = "a: expected a folder that can be created, found "
    with pytest.raises(CheckpointError, match=message), new_folder(tmp_path / "file" / "a"):
        pass
    assert (tmp_path / "file").is_file()


def test_require_free_refuses_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require_free("a")
    with pytest.raises(CheckpointError, match="found the current one"):
        require_free(".")


def test_require_files_names_the_missing(tmp_path):
    (tmp_path / "a").touch()
    require_files(tmp_path, ["a"], "a test")
    with pytest.raises(CheckpointError, match="expected a test with a, b, c; found no b, c"):
        require_files(tmp_path, ["a", "b", "c"], "a test")
