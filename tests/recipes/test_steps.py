"""The driver of the recipe: it runs the missing steps in order, and stops at a failure."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import recipes.nano.__main__ as recipe
from omni_jax.config.load import load_config
from omni_jax.config.run import RunConfig
from recipes.nano import texts
from recipes.nano.__main__ import Step

pytestmark = pytest.mark.slow


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands; one with `make` writes the file that is its last argument."""
    commands: list[tuple[str, ...]] = []

    def run(command: tuple[str, ...], *, env: dict[str, str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "make" in command:
            Path(command[-1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 3 if "fail" in command else 0)

    monkeypatch.setattr(recipe.subprocess, "run", run)
    return commands


def made(name: str, folder: Path) -> Step:
    return Step(name, ("make", str(folder / name)), folder / name)


def test_run_skips_a_step_whose_output_exists(ran: list[tuple[str, ...]], tmp_path: Path) -> None:
    step = made("a", tmp_path)
    for _ in range(2):
        recipe.run(step)
        assert ran == [step.command]


def test_run_repeats_a_step_without_output(ran: list[tuple[str, ...]]) -> None:
    for count in (1, 2):
        recipe.run(Step("a", ("a",)))
        assert len(ran) == count


def test_run_exits_with_the_code_of_a_failed_command(ran: list[tuple[str, ...]]) -> None:
    with pytest.raises(SystemExit) as error:
        recipe.run(Step("b", ("fail",)))
    assert error.value.code == 3


def test_run_stops_at_a_step_without_its_output(ran: list[tuple[str, ...]], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="stage1: stopped before its end"):
        recipe.run(Step("stage1", ("stop",), tmp_path / "release"))


def run_main(monkeypatch: pytest.MonkeyPatch, steps: list[Step], **options: str) -> None:
    monkeypatch.setattr(recipe, "steps", lambda **_: steps)
    recipe.main(**options)


def test_main_runs_until_a_step_and_continues(
    ran: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [made(name, tmp_path) for name in "abc"]
    run_main(monkeypatch, steps, until="b")
    assert ran == [step.command for step in steps[:2]]
    run_main(monkeypatch, steps)
    assert ran == [step.command for step in steps]
    with pytest.raises(typer.BadParameter, match="--until: expected one of a, b, c, found d"):
        run_main(monkeypatch, steps, until="d")


def test_main_force_runs_a_step_and_later_ones_again(
    ran: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "BUILD", tmp_path)
    steps = [made(name, tmp_path) for name in "abc"]
    run_main(monkeypatch, steps)
    run_main(monkeypatch, steps, force="b")
    assert [command[-1][-1] for command in ran] == list("abcbc")


def test_main_refuses_outputs_of_later_steps(
    ran: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [made(name, tmp_path) for name in "abc"]
    steps[2].output.mkdir()
    with pytest.raises(SystemExit, match=r"a: expected no output of later steps, found .*c: --force a"):
        run_main(monkeypatch, steps)
    assert ran == []


def test_remove_deletes_what_a_step_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "BUILD", tmp_path)
    for path in ("packaged/model", "stage1/release/model", "stage1/checkpoints/1", "records/train", "texts/a"):
        (tmp_path / path).mkdir(parents=True)
    recipe.remove(Step("package", (), tmp_path / "packaged"))
    recipe.remove(Step("stage1", (), tmp_path / "stage1" / "release"))
    recipe.remove(Step("speech", (), folder=tmp_path / "records"))
    recipe.remove(Step("ship", ()))
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.fixture(scope="module")
def folders() -> set[str]:
    """Of all records that the recipe makes."""
    sizes = texts.Sizes.limited(8)
    written = texts.written_sets(sizes)
    assert set(recipe.WRITTEN) == set(written)
    spoken = {f"build/nano/records/{name}" for name in texts.spoken_sets(sizes)}
    conversations = set(texts.conversation_sets(sizes))
    assert set(recipe.WRITTEN_CONVERSATIONS) <= conversations
    spoken |= {f"build/nano/records/{name}" for name in conversations - set(recipe.WRITTEN_CONVERSATIONS)}
    return spoken | {f"build/nano/text/{name}" for name in (*written, *recipe.WRITTEN_CONVERSATIONS)}


@pytest.mark.parametrize(("from_scratch", "trial"), list(itertools.product([False, True], repeat=2)))
def test_steps_begin_with_what_earlier_ones_make(folders: set[str], from_scratch: bool, trial: bool) -> None:
    """Configurations, folders of records and commands agree with each other."""
    made = set()
    for step in recipe.steps(from_scratch=from_scratch, trial=trial):
        used = {word for word in step.command if word.startswith("build/nano/")}
        if step.command[1].endswith("train.py"):
            config = load_config(RunConfig, step.command[2], step.command[3:])
            assert str(step.output) == f"{config.out}/release", step.name
            assert {source.path for source in (*config.data.sources, *config.data.held_out)} <= folders, step.name
            used = {config.start}
        written_now = {str(path) for path in (step.output, step.output and step.output.parent) if path is not None}
        if step.name == "speech":
            written_now = {"build/nano/records"}
        assert all(any(path == have or path.startswith(f"{have}/") for have in made | written_now) for path in used), (
            step.name
        )
        made |= written_now
    names = [step.name for step in recipe.steps(from_scratch=from_scratch)]
    assert len(set(names)) == len(names)
    assert ("codec" in names) == ("text" in names) == ("tokenizer" in names) == from_scratch


def test_steps_are_commands_of_the_project() -> None:
    for step in recipe.steps(from_scratch=True):
        program, *arguments = step.command
        if program == sys.executable:
            name = f"{arguments[1].replace('.', '/')}.py" if arguments[0] == "-m" else arguments[0]
            assert (recipe.ROOT / name).is_file(), step.name
        else:
            assert Path(program).name == "omni-jax"
            assert arguments[0] in ("prepare", "evaluate")


@pytest.mark.nightly
def test_trial_runs_every_step(tmp_path: Path) -> None:
    """All commands but `ship`, with 24 rows of each set, two training steps, and espeak-ng."""
    command = [sys.executable, "-m", "recipes.nano", "--from-scratch", "--trial", "--until", "evaluate_read"]
    # One device, and programs that are compiled quickly.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = recipe.environment() | {"XLA_FLAGS": quick}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "build/nano/evaluated/read/report.html").exists()
    # Everything that can tell is done.
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert [line.split(":")[0] for line in done.stdout.splitlines() if " minutes" in line] == ["speech"]
