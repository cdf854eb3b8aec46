"""Options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from omni_jax.inference.generation import GenerationConfig
from omni_jax.tasks import Task

Model = Annotated[
    str, typer.Option(help="`nano`, a release folder, the folder of a finished run, or a hub id.", show_default=True)
]
Codec = Annotated[Literal["jax", "torch"], typer.Option(help="Implementation that decodes audio tokens.")]
Int8 = Annotated[
    bool, typer.Option("--int8", help="Decode with 8-bit weights: half the bytes per step; slower on a CPU.")
]
ShortWindows = Annotated[
    bool,
    typer.Option(
        "--short-windows",
        help="Encode a short recording in a quarter or a half of the audio encoder's window, whatever the release "
        "says: faster, with other features.",
    ),
]
TaskName = Annotated[
    Task | None,
    typer.Option(
        help="Input and output: A1 speech or T1 text in; A2 text and speech, T2 text out; A1T1 transcribes, T1A1 "
        "reads aloud. Default: A1A2 for a recording, T1A2 for text.",
        case_sensitive=False,
        show_default=False,
    ),
]
Truncate = Annotated[bool, typer.Option("--truncate", help="Use only the beginning of a recording that is too long.")]
MaxBatchSize = Annotated[int, typer.Option(min=1, max=1024, help="Requests that are decoded together.")]
Tensor = Annotated[int, typer.Option(min=1, help="Devices that share a row (tensor parallelism).")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def generation_config(
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many steps. Default: when the context is full.", show_default=False),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0 is greedy: the most probable token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k most probable tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(max=1, help="Sample from the fewest tokens that together have this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same answer.")] = 0,
    no_batch_parallel: Annotated[
        bool,
        typer.Option("--no-batch-parallel", help="A1A2: take the text from the same row as the audio."),
    ] = False,
    no_enforce_delay: Annotated[
        bool, typer.Option("--no-enforce-delay", help="Let the model decide when each codebook begins.")
    ] = False,
) -> GenerationConfig:
    """The command line's spelling of `GenerationConfig`.

    Raises:
        ConfigError: an option is out of range.
    """
    return GenerationConfig(
        max_steps=max_steps,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch_parallel=not no_batch_parallel,
        enforce_delay=not no_enforce_delay,
    )


def takes_generation_config(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command: the options of `generation_config` take the place of its parameter `config`."""
    own = inspect.signature(command, eval_str=True).parameters
    shared = inspect.signature(generation_config, eval_str=True).parameters
    parameters = [
        option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in own.values()
        for option in (shared.values() if parameter.name == "config" else [parameter])
    ]

    def wrapper(**values: Any) -> None:
        config = generation_config(**{name: values.pop(name) for name in shared})
        command(**values, config=config)

    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    # Typer reads the options from these two.
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper
