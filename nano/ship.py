"""Puts nano into the package, with what shows and what guards it.

    python -m nano.ship build/nano/packaged

writes `omni_jax/assets/nano`, the release; `tests/nano/shipped.json`, its answers to a few questions, which a test asks
again; and into `docs/nano` learning curves, recordings of held-out questions with the answers, and their spectrograms.
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

from nano import run
from nano.evaluate import RECORDS
from omni_jax import Omni
from omni_jax.audio import io as audio_io
from omni_jax.config.model import SHIPPED_RELEASES
from omni_jax.data.records import Exchange, Records, from_bytes
from omni_jax.evaluation.plots import draw_spectrogram
from omni_jax.inference.answer import Reply

ROOT = Path(__file__).parents[1]
QUESTIONS = "omni_jax/assets/questions"
GUARDED: tuple[Mapping[str, Any], ...] = (
    {"audio": f"{QUESTIONS}/name.wav"},
    {"audio": f"{QUESTIONS}/sum.wav"},
    {"audio": f"{QUESTIONS}/day.wav", "options": {"batch_parallel": False}},
    {"audio": f"{QUESTIONS}/sum.wav", "task": "A1T2"},
    {"audio": f"{QUESTIONS}/day.wav", "task": "A1T1"},
    {"text": "What is the opposite of hot?"},
    {"text": "The dog is in the garden.", "task": "T1A1"},
)
"""Fields of `Ask`, with paths from the root of the project; asked by `tests/nano/test_shipped.py`."""
SAMPLES = (("held_out_seen", 0), ("held_out_seen", 1), ("held_out_unseen", 0), ("held_out_unseen", 1))
"""Folders and numbers of the exchanges to listen to: the first ones, whatever is answered."""
CURVES = ("loss", "loss/text", "loss/audio_0", "accuracy/audio_0")


def guarded(omni: Omni) -> list[dict[str, Any]]:
    """The questions that are asked again by a test, their answers and the tokens these consist of."""
    return [
        {"ask": question, "text": reply.text, "tokens": reply.tokens.tolist()}
        for question in GUARDED
        for reply in [ask(omni, question)]
    ]


def ask(omni: Omni, question: Mapping[str, Any]) -> Reply:
    """Ask one of `GUARDED`, by itself."""
    here = {"audio": ROOT / question["audio"]} if "audio" in question else {}
    (reply,) = omni.batch([{**question, **here}])
    return reply


def sample(omni: Omni, exchange: Exchange, path: Path) -> str:
    """Write a question and its answer as `path`-question.wav and -answer.wav, with a picture of both.

    Returns:
        What to say of it, in Markdown.
    """
    assert exchange.question_audio is not None
    question = audio_io.to_mono(exchange.question_audio, audio_io.SAMPLE_RATE)
    reply = omni.reply(question, sample_rate=audio_io.SAMPLE_RATE)
    assert reply.audio is not None
    audio_io.write_wav(path.with_name(f"{path.name}-question.wav"), question, audio_io.SAMPLE_RATE)
    reply.save(path.with_name(f"{path.name}-answer.wav"))
    spectrograms([(question, audio_io.SAMPLE_RATE), (reply.audio, reply.sample_rate)], path.with_suffix(".png"))
    verdict = "right" if reply.text == exchange.answer_text else f"expected: {exchange.answer_text}"
    links = ", ".join(f"[{part}](nano/{path.name}-{part}.wav)" for part in ("question", "answer"))
    said = f"**{exchange.question_text}** *{reply.text}* ({verdict}; {links})"
    return f"{said}\n\n![Question and answer](nano/{path.name}.png)"


def spectrograms(sounds: Sequence[tuple[np.ndarray, int]], path: Path) -> None:
    """Draw sounds side by side, as wide as they are long."""
    lengths = [max(len(audio) / rate, 0.3) for audio, rate in sounds]
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots(1, len(sounds), sharey=True, width_ratios=lengths)
    for axis, (audio, rate) in zip(axes, sounds, strict=True):
        draw_spectrogram(axis, audio, rate)
        axis.locator_params(axis="x", nbins=5)
        axis.label_outer()
    figure.savefig(path, dpi=80)


def main(
    packaged: Annotated[Path, typer.Argument(help="What `nano.assemble package` wrote")],
    records: Annotated[Path, typer.Option(help="What nano.records wrote")] = RECORDS,
    runs: Annotated[Path, typer.Option(help="Folder of the stages' runs")] = Path("build/nano"),
) -> None:
    """Ship it."""
    for file in packaged.iterdir():
        shutil.copyfile(file, SHIPPED_RELEASES["nano"] / file.name)
    omni = Omni.load("nano")
    lines = ",\n".join(json.dumps(entry) for entry in guarded(omni))
    (ROOT / "tests/nano/shipped.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    docs = ROOT / "docs/nano"
    # Stages that were taught elsewhere have no metrics here; their curves stay.
    for metrics in sorted(runs.glob(f"stage*/{run.METRICS}")):
        run.draw(metrics.parent, CURVES)
        shutil.copyfile(metrics.with_name("curve.png"), docs / f"{metrics.parent.name}.png")
    for number, (folder, index) in enumerate(SAMPLES, 1):
        exchange = from_bytes(Records(records / folder)[index], codebook_size=omni.config.vocab.audio)
        typer.echo(sample(omni, exchange, docs / f"sample{number}") + "\n")


if __name__ == "__main__":
    typer.run(main)
