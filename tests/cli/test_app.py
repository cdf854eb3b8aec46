from __future__ import annotations

import subprocess
import sys

import pytest

from omni_jax.cli.app import COMMANDS, load_command
from tests.cli.shell import ROOT, run, shell


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("omni-jax ")


def test_help_does_not_import_jax() -> None:
    code = "import sys, omni_jax.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# `convert` reads weights with JAX in all of its subcommands.
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "convert"])
def test_help_of_a_command_does_not_import_jax(name: str) -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from omni_jax.cli.app import app
helped, mistyped = (CliRunner().invoke(app, [{name!r}, option]) for option in ("--help", "--no-such-option"))
assert helped.exit_code == 0, helped.output
assert "Usage: " in helped.stdout and {name!r} in helped.stdout
assert mistyped.exit_code == 2 and "No such option" in mistyped.stderr, mistyped.output
assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_command() -> None:
    listed = run("--help").stdout.partition("Commands:")[2]
    for name, command in COMMANDS.items():
        assert f"  {name} " in listed
        assert command.summary in listed


@pytest.mark.parametrize("name", [name for name in COMMANDS if COMMANDS[name].module.startswith("omni_jax.cli.")])
def test_summary_is_the_first_line_of_the_commands_help(name: str) -> None:
    assert load_command(name).help.splitlines()[0] == COMMANDS[name].summary


def test_mistyped_command_suggests_one() -> None:
    result = run("bacth")
    assert result.exit_code == 2
    assert "No such command 'bacth'. Did you mean 'batch'?" in result.stderr


def test_module_is_a_command() -> None:
    assert shell("--version").stdout == run("--version").stdout


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["serve"], "fastapi", "serve"),
        (["train", "configs/tiny_stage1.yaml"], "grain", "train"),
        (["prepare", "text", "nowhere.jsonl", "--out", "records"], "array_record", "data"),
        (["evaluate", "nowhere.jsonl", "--out", "measured"], "array_record", "evaluation"),
    ],
)
def test_missing_extra_is_one_sentence_with_the_command(arguments: list[str], package: str, extra: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
from omni_jax.cli import main
sys.argv = ["omni-jax", *{arguments!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert package in line
    assert line.endswith(f"pip install 'omni-jax[{extra}]'")
