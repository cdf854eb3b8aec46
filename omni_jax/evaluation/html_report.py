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

from omni_jax.evaluation import plots
from omni_jax.evaluation.run import Evaluation, Result
from omni_jax.evaluation.tables import PERCENT, Table, difference_table, notes, results_table

MAX_CASES = 12
"""Cases of each task that are shown with their audio: half of them the worst, half drawn at random."""
HISTOGRAMS = {
    "answer_seconds": "Duration of spoken answers in seconds",
    "wer": "WER per case",
    "asr_wer": "ASR-WER per case",
}


def html_page(evaluation: Evaluation, folder: Path, other: Evaluation | None = None) -> str:
    """The report as HTML.

    Args:
        evaluation: the results.
        folder: where the spoken answers are.
        other: another evaluation of the same suite, to compare with.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    body = [f"<p>{html.escape(note)}</p>" for note in notes(evaluation)]
    body.append(_html_table(results_table(evaluation)))
    if other is not None:
        body.append(f"<h2>Against {html.escape(other.model)}</h2>")
        body.append(_html_table(difference_table(evaluation, other)))
    body.append(_histograms(evaluation))
    for task in dict.fromkeys(result.task for result in evaluation.results):
        body.append(f"<h2>{html.escape(task)}: examples</h2>")
        results = [result for result in evaluation.results if result.task == task]
        body += [_case(result, folder) for result in _choose_cases(results)]
    return _PAGE.format(title=html.escape(f"{evaluation.model} on {evaluation.suite}"), body="\n".join(body))


def _choose_cases(results: Sequence[Result]) -> list[Result]:
    def badness(result: Result) -> float:
        rates = [result.score(name) or 0.0 for name in ("wer", "asr_wer", "failed")]
        return max(*rates, 1 - result.scores.get("contains", result.scores.get("exact", 1.0)))

    worst = sorted(results, key=badness, reverse=True)[: MAX_CASES // 2]
    rest = [result for result in results if result not in worst]
    return worst + random.Random(0).sample(rest, min(MAX_CASES - len(worst), len(rest)))


def _case(result: Result, folder: Path) -> str:
    rows = {
        "question": result.question,
        "expected": " / ".join(result.expected),
        "answer": result.text,
        "ASR": result.asr_text or "",
        "error": result.error,
    }
    texts = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in rows.items() if value)
    audio = ""
    if result.audio:
        samples, sample_rate = soundfile.read(folder / result.audio, dtype="float32")
        audio = _player(samples, sample_rate) + _image(plots.spectrogram(samples, sample_rate), "spectrogram")
    return f"<article><h3>{html.escape(result.id)}</h3><dl>{texts}</dl>{audio}</article>"


def _player(audio: np.ndarray, sample_rate: int) -> str:
    file = io.BytesIO()
    # MP3 is a tenth of the size, and every browser plays it.
    soundfile.write(file, audio, sample_rate, format="MP3")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<audio controls preload="none" src="data:audio/mpeg;base64,{data}"></audio>'


def _histograms(evaluation: Evaluation) -> str:
    images = []
    for name, title in HISTOGRAMS.items():
        values = [value for result in evaluation.results if (value := result.score(name)) is not None]
        if len(values) > 1:
            clipped = np.minimum(values, 2.0).tolist() if name in PERCENT else values
            images.append(_image(plots.histogram(clipped, title), title))
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
