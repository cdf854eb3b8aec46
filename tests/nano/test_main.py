"""The recipe's driver: runs what is missing, stops where something fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import nano.__main__ as recipe
from nano import records
from nano.__main__ import Step
from omni_jax.config.load import load_config
from omni_jax.config.run import RunConfig


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands; one that makes something writes the file it is given."""
    commands: list[list[str]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "make" in command:
            Path(command[-1]).write_bytes(b"made")
        return subprocess.CompletedProcess(command, 3 if "fails" in command else 0)

    monkeypatch.setattr(recipe.subprocess, "run", run)
    return commands


def test_what_is_done_is_not_run_again(ran: list[list[str]], tmp_path: Path):
    step = Step("a", ("make", str(tmp_path / "there")), tmp_path / "there")
    for _ in range(2):
        recipe.run(step, anew=False)
        assert ran == [[sys.executable, "make", str(tmp_path / "there")]]


def test_a_failure_stops_the_recipe(ran: list[list[str]]):
    with pytest.raises(SystemExit) as error:
        recipe.run(Step("b", ("fails",)), anew=False)
    assert error.value.code == 3


def test_a_training_that_was_stopped_is_not_done(ran: list[list[str]], tmp_path: Path):
    with pytest.raises(SystemExit, match="stage1: was stopped before its end"):
        recipe.run(Step("stage1", ("stops",), tmp_path / "release"), anew=False)


def test_kept_parts_are_used_unless_all_is_made_anew(
    ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    parts, folder = tmp_path / "parts", tmp_path / "run"
    parts.mkdir()
    folder.mkdir()
    monkeypatch.setattr(recipe, "PARTS", parts)
    (parts / "audio_encoder.safetensors").write_bytes(b"kept")
    (parts / "letters.txt").write_bytes(b"beside it")
    done = folder / "audio_encoder.safetensors"
    step = Step("audio_encoder", ("make", str(done)), done, ("audio_encoder.safetensors", "letters.txt"))
    recipe.run(step, anew=False)
    assert done.read_bytes() == b"kept"
    assert (folder / "letters.txt").read_bytes() == b"beside it"
    # They may be replaced by better ones.
    (parts / "audio_encoder.safetensors").write_bytes(b"newer")
    recipe.run(step, anew=False)
    assert done.read_bytes() == b"newer"
    assert ran == []
    recipe.run(step, anew=True)
    assert len(ran) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["audio_encoder.safetensors"]
    # What was taught here is no kept part, and neither replaced nor taught again.
    for anew in (False, True):
        recipe.run(step, anew=anew)
        assert done.read_bytes() == b"made"
    assert len(ran) == 1


def test_what_only_serves_a_kept_part_is_left_out(
    ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recipe, "PARTS", tmp_path)
    step = Step("text", ("text",), serves="trunk.safetensors")
    recipe.run(step, anew=False)
    assert len(ran) == 1
    (tmp_path / "trunk.safetensors").touch()
    recipe.run(step, anew=False)
    assert len(ran) == 1
    recipe.run(step, anew=True)
    assert len(ran) == 2


def test_every_step_begins_with_what_an_earlier_one_makes(tmp_path: Path):
    """And the records that its config names are ones that `nano.text` or `nano.records` writes."""
    texts = {"numbers", "products", "larger_products", "further_counts", "knowledge", "smalltalk", "repeat", "held_out"}
    spoken = {"train", "typed_train", "held_out_seen", "held_out_unseen", *records.READ, *records.DICTATED}
    folders = {f"build/nano/text/{name}" for name in texts} | {f"build/nano/records/{name}" for name in spoken}
    made = set()
    for step in recipe.STEPS:
        if step.command[0] == "train.py":
            config = load_config(RunConfig, step.command[1])
            assert str(step.done) == f"{config.out}/release", step.name
            assert config.start in made, step.name
            used = {source.path for source in (*config.data.sources, *config.data.held_out)}
            assert used <= folders, step.name
        if step.command[1:3] in (("nano.assemble", "average"), ("nano.assemble", "package")):
            runs = [path for path in step.command[3:] if not path.startswith("--") and path != str(step.done)]
            assert runs, step.name
            assert set(runs) <= made, step.name
        if step.done is not None:
            made |= {str(step.done), str(step.done.parent)}


def test_every_step_names_a_file_of_the_project():
    root = Path(recipe.__file__).parents[1]
    for step in recipe.STEPS:
        kind, name = step.command[:2]
        path = root / (name.replace(".", "/") + ".py" if kind == "-m" else name)
        assert path.is_file(), step.name
