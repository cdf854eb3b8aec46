"""Puts a packaged model into the package, with its samples, curves and the answers that a test compares.

    python -m recipes.nano.ship build/nano/packaged

writes `omni_jax/assets/nano`, the release; `tests/recipes/shipped.json`, its answers to some questions; into
`docs/nano` learning curves, recordings of held-out questions with their answers, and spectrograms; and the figures of
`card.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure

from omni_jax import Omni
from omni_jax.audio import io as audio_io
from omni_jax.audio.encoding import write_audio
from omni_jax.data.records import Exchange
from omni_jax.evaluation.plots import draw_spectrogram
from omni_jax.inference.answer import Reply
from recipes.nano import card
from recipes.nano.suites import exchanges
from recipes.nano.training import METRICS, draw_curves

ROOT = Path(__file__).parents[2]
QUESTIONS = "omni_jax/assets/questions"
COMPARED: tuple[Mapping[str, Any], ...] = (
    {"audio": f"{QUESTIONS}/name.wav"},
    {"audio": f"{QUESTIONS}/sum.wav"},
    {"audio": f"{QUESTIONS}/day.wav", "config": {"batch_parallel": False}},
    {"audio": f"{QUESTIONS}/sum.wav", "task": "A1T2"},
    {"audio": f"{QUESTIONS}/day.wav", "task": "A1T1"},
    {"text": "What is the opposite of hot?"},
    {"text": "The dog is in the garden.", "task": "T1A1"},
)
"""Requests whose answers `tests/recipes/test_shipped.py` compares; paths are relative to the project."""
SAMPLES = (("held_out_seen", 0), ("held_out_unseen", 0), ("held_out_natural", 0), ("held_out_natural", 1))
"""Folders and numbers of the exchanges for `docs/nano`: the first ones, whatever the answers."""
CURVES = ("loss", "loss/text", "loss/audio_0", "accuracy/audio_0")


def answer(omni: Omni, request: Mapping[str, Any]) -> Reply:
    """The answer to one of `COMPARED`."""
    path = {"audio": ROOT / request["audio"]} if "audio" in request else {}
    settings = request.get("config", {})
    fields = {name: value for name, value in request.items() if name != "config"}
    return omni.generate(fields | path, **settings)


def compared_answers(omni: Omni) -> list[dict[str, Any]]:
    """The requests of `COMPARED`, with text and tokens of the answers."""
    replies = [(request, answer(omni, request)) for request in COMPARED]
    return [{"request": request, "text": reply.text, "tokens": reply.tokens.tolist()} for request, reply in replies]


def write_sample(omni: Omni, exchange: Exchange, path: Path) -> dict[str, str]:
    """Write a question and its answer as `path`-question.wav and `path`-answer.wav, and their spectrograms.

    Returns:
        The texts of question, answer and expected answer.
    """
    assert exchange.question_audio is not None
    question = audio_io.from_pcm16(exchange.question_audio)
    reply = omni.reply(question, sample_rate=audio_io.SAMPLE_RATE)
    assert reply.audio is not None
    write_audio(path.with_name(f"{path.name}-question.wav"), question, audio_io.SAMPLE_RATE)
    reply.save(path.with_name(f"{path.name}-answer.wav"))
    draw_spectrograms([(question, audio_io.SAMPLE_RATE), (reply.audio, reply.sample_rate)], path.with_suffix(".png"))
    return {"question": exchange.question_text, "answer": reply.text, "expected": exchange.answer_text}


def draw_spectrograms(recordings: Sequence[tuple[np.ndarray, int]], path: Path) -> None:
    """Draw recordings, f32 [samples] and sample rate each, side by side with a common time scale."""
    lengths = [max(len(audio) / rate, 0.3) for audio, rate in recordings]
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots(1, len(recordings), sharey=True, width_ratios=lengths)
    for axis, (audio, rate) in zip(axes, recordings, strict=True):
        draw_spectrogram(axis, audio, rate)
        axis.locator_params(axis="x", nbins=5)
        axis.label_outer()
    figure.savefig(path, dpi=80)


def main(
    packaged: Annotated[Path, typer.Argument(help="What `recipes.nano.assemble package` wrote.")],
    build: Annotated[Path, typer.Option(help="Folder of the records and the runs.")] = Path("build/nano"),
    root: Annotated[Path, typer.Option(help="Root of the project.")] = ROOT,
) -> None:
    """Put a packaged model into the package."""
    for file in packaged.iterdir():
        shutil.copyfile(file, root / "omni_jax/assets/nano" / file.name)
    omni = Omni.from_pretrained(packaged)
    lines = ",\n".join(json.dumps(entry) for entry in compared_answers(omni))
    (root / "tests/recipes/shipped.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    docs = root / "docs/nano"
    for metrics in sorted(build.glob(f"stage*/{METRICS}")):
        draw_curves(metrics.parent, CURVES)
        curve = metrics.with_name("curve.png")
        if curve.exists():
            shutil.copyfile(curve, docs / f"{metrics.parent.name}.png")
    samples = []
    for number, (name, index) in enumerate(SAMPLES, 1):
        *_, exchange = exchanges(build / "records" / name, index + 1)
        samples.append(write_sample(omni, exchange, docs / f"sample{number}"))
    card.write(card.collect(build / "evaluated") | {"samples": samples}, root)


if __name__ == "__main__":
    typer.run(main)
