"""The report of an evaluation as one HTML file; plots and audio are embedded."""

from __future__ import annotations

import base64
import html
import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from omni_jax.audio import io as audio_io
from omni_jax.errors import AudioError
from omni_jax.evaluation import plots
from omni_jax.evaluation.run import Evaluation, Result
from omni_jax.evaluation.suites import Case
from omni_jax.evaluation.tables import PERCENT, Table, difference_table, legend, notes, results_table
from omni_jax.tasks import Task

MAX_CASES = 12
"""Cases of each task that are shown with their audio: half of them the worst, half drawn at random."""
NO_TRANSCRIPT = "(a recording without transcript)"
MAX_SECONDS = 60.0
"""Seconds of a question that the report plays."""
HISTOGRAMS = {
    "answer_seconds": ("Duration of spoken answers", "seconds"),
    "wer": ("WER of each case, 200 % and more in the last bar", "WER in %"),
    "asr_wer": ("ASR-WER of each case, 200 % and more in the last bar", "ASR-WER in %"),
}
"""Metrics whose distribution is shown: title and horizontal axis."""


def html_page(evaluation: Evaluation, folder: Path, other: Evaluation | None = None, cases: Sequence[Case] = ()) -> str:
    """The report as HTML.

    Args:
        evaluation: the results.
        folder: where the spoken answers are.
        other: another evaluation of the same suite, to compare with.
        cases: of the suite, whose recordings are played.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    body = [f"<p>{html.escape(note)}</p>" for note in notes(evaluation)]
    body.append(_html_table(results_table(evaluation)))
    meanings = "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in legend(evaluation).items())
    body.append(f"<dl>{meanings}</dl>")
    if other is not None:
        body.append(f"<h2>Against {html.escape(other.model)}</h2>")
        body.append(_html_table(difference_table(evaluation, other)))
    body.append(_histograms(evaluation))
    questions = {case.id: case.audio for case in cases}
    for task, results in evaluation.sections().items():
        if task not in set(Task):
            continue
        chosen = _choose_cases(results)
        body.append(f"<h2>{html.escape(task)}: examples</h2>")
        body.append(f"<p>{len(chosen)} of {len(results)} cases: the worst first, then some drawn at random.</p>")
        body += [_case(result, folder, questions.get(result.id)) for result in chosen]
    return _PAGE.format(title=html.escape(f"{evaluation.model} on {evaluation.suite}"), body="\n".join(body))


def _choose_cases(results: Sequence[Result]) -> list[Result]:
    def badness(result: Result) -> float:
        rates = [result.score(name) or 0.0 for name in ("wer", "asr_wer", "failed")]
        return max(*rates, 1 - result.scores.get("contains", result.scores.get("exact", 1.0)))

    worst = sorted(results, key=badness, reverse=True)[: MAX_CASES // 2]
    rest = [result for result in results if result not in worst]
    return worst + random.Random(0).sample(rest, min(MAX_CASES - len(worst), len(rest)))


def _case(result: Result, folder: Path, question: Path | bytes | None) -> str:
    before = (html.escape(f"{message['role']}: {message['content']}") for message in result.messages)
    rows = {
        "before": "<br>".join(before),
        "question": html.escape(result.question or NO_TRANSCRIPT) + _question_player(question),
        "expected": html.escape(" / ".join(result.expected)),
        "answer": html.escape(result.text),
        "ASR": html.escape(result.asr_text or ""),
        "error": html.escape(result.error),
    }
    texts = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items() if value)
    audio = ""
    if result.audio:
        samples, sample_rate = soundfile.read(folder / result.audio, dtype="float32")
        audio = _player(samples, sample_rate) + _image(plots.spectrogram(samples, sample_rate), "spectrogram")
    return f"<article><h3>{html.escape(result.id)}</h3><dl>{texts}</dl>{audio}</article>"


def _question_player(question: Path | bytes | None) -> str:
    """Plays the recording of a question; empty if there is none that can be read."""
    if question is None:
        return ""
    source = io.BytesIO(question) if isinstance(question, bytes) else question
    try:
        samples = audio_io.read_audio(source, audio_io.SAMPLE_RATE, max_seconds=MAX_SECONDS, truncate=True)
    except AudioError:
        return ""
    return _player(samples, audio_io.SAMPLE_RATE)


def _player(audio: np.ndarray, sample_rate: int) -> str:
    file = io.BytesIO()
    # MP3 is a tenth of the size, and every browser plays it.
    soundfile.write(file, audio, sample_rate, format="MP3")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<audio controls preload="none" src="data:audio/mpeg;base64,{data}"></audio>'


def _histograms(evaluation: Evaluation) -> str:
    images = []
    for name, (title, unit) in HISTOGRAMS.items():
        values = [value for result in evaluation.results if (value := result.score(name)) is not None]
        if len(values) > 1:
            shown = (100 * np.minimum(values, 2.0)).tolist() if name in PERCENT else values
            images.append(_image(plots.histogram(shown, title, unit), title))
    return f'<div class="plots">{"".join(images)}</div>'


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = [row(table.head, "th"), *(row(cells, "td") for cells in table.rows)]
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid #8886; padding: 0.3rem 0.8rem; text-align: left; white-space: nowrap; }}
article {{ border: 1px solid #8886; border-radius: 0.5rem; padding: 0.5rem 1rem; margin: 0.7rem 0; }}
h3 {{ margin: 0.2rem 0; font-size: 1rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: 0.3rem 0; }}
dt {{ opacity: 0.7; }} dd {{ margin: 0; overflow-wrap: anywhere; }}
audio {{ display: block; width: 100%; max-width: 30rem; }}
img {{ max-width: 100%; background: #fff; border-radius: 0.3rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
