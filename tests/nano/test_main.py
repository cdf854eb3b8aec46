"""The recipe's driver: runs what is missing, stops where something fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import nano.__main__ as recipe
from nano.__main__ import Step


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 3 if "fails" in command else 0)

    monkeypatch.setattr(recipe.subprocess, "run", run)
    return commands


def test_what_is_done_is_not_run_again(ran: list[list[str]], tmp_path: Path):
    recipe.run(Step("a", ("-m", "a"), tmp_path / "there"), anew=False)
    assert ran == [[sys.executable, "-m", "a"]]
    (tmp_path / "there").mkdir()
    recipe.run(Step("a", ("-m", "a"), tmp_path / "there"), anew=False)
    assert len(ran) == 1


def test_a_failure_stops_the_recipe(ran: list[list[str]]):
    with pytest.raises(SystemExit) as error:
        recipe.run(Step("b", ("fails",)), anew=False)
    assert error.value.code == 3


def test_kept_parts_are_used_unless_all_is_made_anew(
    ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recipe, "PARTS", tmp_path)
    (tmp_path / "ear.safetensors").write_bytes(b"kept")
    (tmp_path / "letters.txt").write_bytes(b"beside it")
    step = Step("ear", ("-m", "ear"), tmp_path / "run" / "ear.safetensors", ("ear.safetensors", "letters.txt"))
    recipe.run(step, anew=True)
    assert len(ran) == 1
    recipe.run(step, anew=False)
    assert len(ran) == 1
    assert step.done is not None
    assert step.done.read_bytes() == b"kept"
    assert (step.done.parent / "letters.txt").read_bytes() == b"beside it"
    # A training that was interrupted has a result already, and goes on.
    (tmp_path / "run" / "state.safetensors").touch()
    recipe.run(step, anew=False)
    assert len(ran) == 2


def test_what_only_serves_a_kept_part_is_left_out(
    ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recipe, "PARTS", tmp_path)
    step = Step("text", ("text",), tmp_path / "release", serves="trunk.safetensors")
    recipe.run(step, anew=False)
    assert len(ran) == 1
    (tmp_path / "trunk.safetensors").touch()
    recipe.run(step, anew=False)
    assert len(ran) == 1
    recipe.run(step, anew=True)
    assert len(ran) == 2


def test_every_step_names_a_file_of_the_project():
    root = Path(recipe.__file__).parents[1]
    for step in recipe.STEPS:
        kind, name = step.command[:2]
        path = root / (name.replace(".", "/") + ".py" if kind == "-m" else name)
        assert path.is_file(), step.name
