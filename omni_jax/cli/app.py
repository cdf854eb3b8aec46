"""The typer app of `omni-jax`: the names of its commands, and where each of them is defined."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from omni_jax.cli import startup
from omni_jax.cli.console import echo_err, replace_unencodable_output
from omni_jax.errors import EXTRAS, MissingExtraError, OmniError


class LazyCommand(NamedTuple):
    """A command that is imported when it is called."""

    module: str
    attribute: str
    """A function, or a typer app of subcommands."""
    summary: str
    """For the list of commands."""
    extra: str | None = None
    """Has all that the command needs beyond the core; None: it needs nothing, or another thing for each option."""


COMMANDS = {
    "ask": LazyCommand("omni_jax.cli.ask", "ask", "Answer one recording or text."),
    "demo": LazyCommand("omni_jax.cli.demo", "demo", "Answer the recorded questions that come with the package."),
    "batch": LazyCommand("omni_jax.cli.batch", "batch", "Answer a manifest or a folder of recordings; resumable."),
    "serve": LazyCommand("omni_jax.cli.serve", "serve", "Serve a web page and OpenAI's endpoints.", "serve"),
    "train": LazyCommand("omni_jax.training.command", "train_command", "Train a model; resumable.", "train"),
    "convert": LazyCommand("omni_jax.convert.commands", "app", "Import, export and inspect weights."),
    "prepare": LazyCommand(
        "omni_jax.cli.prepare", "prepare", "Turn a corpus into training records; resumable.", "data"
    ),
    "synthesize": LazyCommand(
        "omni_jax.cli.synthesize", "synthesize", "Turn text into spoken records; resumable.", "data"
    ),
    "evaluate": LazyCommand("omni_jax.cli.evaluate", "evaluate", "Measure quality and speed of a model.", "evaluation"),
    "compile": LazyCommand("omni_jax.cli.compile", "compile_", "Compile a program for a TPU without having one."),
}


class LazyGroup(TyperGroup):
    """Lists `COMMANDS` without importing their modules; an `OmniError` of a command ends with exit code 2."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=command.summary) for name, command in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Import the command that is called."""
        name, command, rest = super().resolve_command(ctx, args)
        ctx.obj = name
        return name, command if name is None else load_command(name), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except OmniError as error:
            problem: OmniError = error
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in EXTRAS:
                raise
            command = COMMANDS.get(ctx.obj)
            extra = EXTRAS[package] if command is None or command.extra is None else command.extra
            problem = MissingExtraError(f"this command needs {package}", extra)
        echo_err(str(problem))
        raise typer.Exit(2)


def load_command(name: str) -> Any:
    """Import a command and make a click command of it."""
    command = COMMANDS[name]
    found = getattr(importlib.import_module(command.module), command.attribute)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(found)
    return typer.main.get_command(single)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        version = importlib.metadata.version("omni-jax")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed, run from source)"
    typer.echo(f"omni-jax {version}")
    raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _common_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A speech-to-speech language model: speech or text in, text and speech out."""


def main(command: str | None = None) -> None:
    """The entry point of `omni-jax`, and of the scripts that are one of its commands.

    Args:
        command: runs this command, with the whole command line as its arguments.
    """
    startup.end_on_sigint()
    startup.enable_compilation_cache()
    startup.silence_libtpu()
    replace_unencodable_output()
    app(None if command is None else [command, *sys.argv[1:]], prog_name="omni-jax")
