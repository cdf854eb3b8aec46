"""What was found, for people: a table in Markdown, and one HTML file to look at and listen to."""

from __future__ import annotations

import base64
import html
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from omni_jax.errors import ConfigError
from omni_jax.evaluation.metrics import CONFIDENCE, RESAMPLES, Estimate
from omni_jax.evaluation.run import Evaluation, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 12
"""Cases of each task that the HTML report lets listen to: half of them the worst, half drawn."""
NAMES = {
    "wer": "WER",
    "cer": "CER",
    "exact": "exact",
    "contains": "right answer in it",
    "f1": "F1",
    "speech_wer": "WER as heard",
    "failed": "failed",
    "ended": "came to its end",
    "answer_words": "words",
    "answer_seconds": "seconds",
}
SHARES = ("wer", "cer", "exact", "contains", "f1", "speech_wer", "failed", "ended")
"""Figures that are shown in percent."""


def text(figure: str, estimate: Estimate) -> str:
    """A figure with its interval: `12.3 % (10.1 to 14.9)`."""
    scale, unit = (100, " %") if figure in SHARES else (1, "")
    value, low, high = (scale * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f}{unit} ({low:.1f} to {high:.1f})"


def rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """The table: a heading for each figure that any part has, a row for each part."""
    summary = evaluation.summary()
    used = [name for name in NAMES if any(name in found for found in summary.values())]
    head = ["", "cases", *(NAMES[name] for name in used)]
    body = []
    for part, found in summary.items():
        count = str(found["failed"].count)
        body.append([part, count, *(text(name, found[name]) if name in found else "" for name in used)])
    return head, body


def notes(evaluation: Evaluation) -> list[str]:
    """What must be known to read the figures."""
    found = [
        f"Model {evaluation.model}, suite {evaluation.suite}, {len(evaluation.results)} cases. In brackets: where "
        f"{CONFIDENCE:.0%} of {RESAMPLES} resamples of the cases lie."
    ]
    if not evaluation.trained:
        found.append("The model is untrained: its weights are random, and the figures mean nothing.")
    if evaluation.listener is None:
        found.append("Nobody listened to the spoken answers: only what the model wrote is judged.")
    else:
        found.append(f"Spoken answers were heard by {evaluation.listener}, and compared with what the model wrote.")
    if evaluation.speed:
        speed = evaluation.speed
        found.append(
            f"One at a time: first sound after {speed['first_sound']:.2f} s, the whole answer after "
            f"{speed['total']:.2f} s, {speed['steps_per_second']:.0f} steps/s, {speed['real_time_factor']:.2f} times "
            "the duration of the sound (medians, on the machine that asked)."
        )
    return found


def difference(evaluation: Evaluation, other: Evaluation) -> list[list[str]]:
    """How this one differs from another, case by case, with the interval of the mean difference.

    Rows of task, figure, this, other, difference. Only cases that both have count.
    """
    mine, theirs = ({result.id: result for result in one.results} for one in (evaluation, other))
    table = []
    for task in dict.fromkeys(result.task for result in evaluation.results):
        shared = [key for key in mine if mine[key].task == task and key in theirs and theirs[key].task == task]
        for name in NAMES:
            pairs = [(_score(mine[key], name), _score(theirs[key], name)) for key in shared]
            values = np.array([(a, b) for a, b in pairs if a is not None and b is not None])
            if not len(values):
                continue
            drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
            changes = (values[:, 0] - values[:, 1])[drawn].mean(1)
            low, high = np.quantile(changes, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
            scale, unit = (100, " %") if name in SHARES else (1, "")
            a, b = scale * values.mean(0)
            change = f"{a - b:+.1f}{unit} ({scale * low:+.1f} to {scale * high:+.1f})"
            table.append([task, NAMES[name], f"{a:.1f}{unit}", f"{b:.1f}{unit}", change])
    return table


def _score(result: Result, name: str) -> float | None:
    if f"{name}_edits" in result.scores:
        return result.scores[f"{name}_edits"] / max(result.scores[f"{name}_length"], 1)
    return result.scores.get(name)


def markdown(evaluation: Evaluation, other: Evaluation | None = None) -> str:
    """The report as Markdown."""
    head, body = rows(evaluation)
    lines = ["# Evaluation", "", *notes(evaluation), "", *_markdown_table(head, body)]
    if other is not None:
        lines += ["", f"## Against {other.model}", ""]
        lines += _markdown_table(["", "", evaluation.model, other.model, "difference"], difference(evaluation, other))
    return "\n".join(lines) + "\n"


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(head), "|---" * len(head) + "|", *map(line, body)]


def page(evaluation: Evaluation, folder: Path, other: Evaluation | None = None) -> str:
    """The report as one HTML file; sound and plots are in it.

    Args:
        evaluation: what was found.
        folder: where its spoken answers are.
        other: to compare with.
    """
    head, body = rows(evaluation)
    parts = [f"<p>{html.escape(note)}</p>" for note in notes(evaluation)]
    parts.append(_html_table(head, body))
    if other is not None:
        parts.append(f"<h2>Against {html.escape(other.model)}</h2>")
        parts.append(_html_table(["", "", evaluation.model, other.model, "difference"], difference(evaluation, other)))
    parts.append(_histograms(evaluation))
    for task in dict.fromkeys(result.task for result in evaluation.results):
        parts.append(f"<h2>{html.escape(task)}: some answers</h2>")
        parts += [_case(result, folder) for result in _shown([r for r in evaluation.results if r.task == task])]
    return _PAGE.format(title=html.escape(f"{evaluation.model} on {evaluation.suite}"), body="\n".join(parts))


def _shown(results: Sequence[Result]) -> list[Result]:
    def wrong(result: Result) -> float:
        worst = [_score(result, name) or 0.0 for name in ("wer", "speech_wer", "failed")]
        return max(*worst, 1 - result.scores.get("contains", result.scores.get("exact", 1.0)))

    worst = sorted(results, key=wrong, reverse=True)[: SHOWN // 2]
    rest = [result for result in results if result not in worst]
    return worst + random.Random(0).sample(rest, min(SHOWN - len(worst), len(rest)))


def _case(result: Result, folder: Path) -> str:
    lines = [("asked", result.question), ("expected", " / ".join(result.expected)), ("written", result.decode_text)]
    lines += [("heard", result.heard or ""), ("problem", result.error)]
    shown = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in lines if value)
    sound = ""
    if result.audio:
        audio, rate = soundfile.read(folder / result.audio, dtype="float32")
        sound = _player(audio, rate) + _spectrogram(audio, rate)
    return f"<article><h3>{html.escape(result.id)}</h3><dl>{shown}</dl>{sound}</article>"


def _player(audio: np.ndarray, rate: int) -> str:
    file = io.BytesIO()
    # MP3 is a tenth of the size, and every browser plays it.
    soundfile.write(file, audio, rate, format="MP3")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<audio controls preload="none" src="data:audio/mpeg;base64,{data}"></audio>'


def _spectrogram(audio: np.ndarray, rate: int) -> str:
    figure = _figure(6, 1.4)
    draw_spectrogram(figure.subplots(), audio, rate)
    return _picture(figure, "spectrogram")


def draw_spectrogram(axis: Axes, audio: np.ndarray, rate: int) -> None:
    """Fill a plot with the spectrogram of a sound, up to 8 kHz.

    Args:
        axis: an empty plot of matplotlib.
        audio: f32 [samples].
        rate: samples per second.
    """
    with np.errstate(divide="ignore"):
        axis.specgram(audio + 1e-6, NFFT=512, Fs=rate, noverlap=384, cmap="magma", vmin=-120)
    axis.set_ylim(0, min(8000, rate / 2))
    axis.set_xlabel("s")
    axis.set_ylabel("Hz")


def _histograms(evaluation: Evaluation) -> str:
    wanted = {
        "answer_seconds": "Seconds of the spoken answers",
        "wer": "WER of each case",
        "speech_wer": "WER as heard, of each case",
    }
    shown = []
    for name, title in wanted.items():
        values = [value for result in evaluation.results if (value := _score(result, name)) is not None]
        if len(values) > 1:
            figure = _figure(4, 2)
            axis = figure.subplots()
            axis.hist(np.minimum(values, 2.0) if name in SHARES else values, bins=30)
            axis.set_title(title, fontsize=9)
            shown.append(_picture(figure, title))
    return f'<div class="plots">{"".join(shown)}</div>'


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the report's plots take matplotlib: pip install 'omni-jax[evaluation]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _picture(figure: Figure, description: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, dpi=90)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def _html_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="wide"><table>{row(head, "th")}{"".join(row(cells, "td") for cells in body)}</table></div>'


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


def write(evaluation: Evaluation, folder: Path, other: Evaluation | None = None) -> None:
    """Write `report.md` and `report.html`."""
    (folder / "report.md").write_text(markdown(evaluation, other), encoding="utf-8")
    (folder / "report.html").write_text(page(evaluation, folder, other), encoding="utf-8")
