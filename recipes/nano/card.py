"""The figures of nano: collected into one file, and from there written into the texts that quote them.

`docs/nano/figures.json` has the figures. A text has them between two comments, `<!-- card: TABLE -->` and
`<!-- end -->`; a test compares. `recipes.nano.ship` does both;

    python -m recipes.nano.card

only writes the texts again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_jax.evaluation.metrics import Estimate
from omni_jax.evaluation.run import NUM_TIMED, RESULTS, Evaluation

ROOT = Path(__file__).parents[2]
FIGURES = "docs/nano/figures.json"
TEXTS = ("docs/nano.md", "README.md", "omni_jax/assets/nano/README.md")
PLACE = re.compile(r"(<!-- card: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

ROWS: Mapping[str, tuple[str, str]] = {
    "A1A2 questions, seen voices": ("seen", "A1A2"),
    "A1A2 questions, unseen voices": ("unseen", "A1A2"),
    "A1A2 questions, natural voices": ("natural", "A1A2"),
    "the same with noise at 10 dB": ("natural_noise", "A1A2"),
    "the same by telephone": ("natural_telephone", "A1A2"),
    "the same after 2 s of silence": ("natural_silence", "A1A2"),
    "A1T2 questions, seen voices": ("seen", "A1T2"),
    "A1T2 questions, unseen voices": ("unseen", "A1T2"),
    "A1T2 questions, natural voices": ("natural", "A1T2"),
    "A1T1 questions, seen voices": ("seen", "A1T1"),
    "A1T1 questions, unseen voices": ("unseen", "A1T1"),
    "A1T1 questions, natural voices": ("natural", "A1T1"),
    "A1T1 sentences, seen voices": ("dictation", "A1T1 dictation_seen"),
    "A1T1 sentences, unseen voices": ("dictation", "A1T1 dictation_unseen"),
    "T1A2 questions": ("text", "T1A2"),
    "T1T2 questions": ("text", "T1T2"),
    "T1T2 questions with a wrong letter": ("typos", "T1T2"),
    "T1A1 sentences": ("read", "T1A1"),
    "A1A2 follow-ups, history from text": ("conversation", "A1A2 follow_up"),
    "A1A2 follow-ups, history from speech": ("conversation_speech", "A1A2 follow_up"),
    "A1A2 new questions, history from speech": ("conversation_speech", "A1A2 new_question"),
    "A1T2 follow-ups, history from text": ("conversation", "A1T2 follow_up"),
    "A1T2 follow-ups, history from speech": ("conversation_speech", "A1T2 follow_up"),
    "T1T2 follow-ups": ("conversation_text", "T1T2 follow_up"),
    "T1T2 new questions after others": ("conversation_text", "T1T2 new_question"),
}
"""Evaluation, and section of its summary, by name of the row. One that does not exist has no row."""
SHORT = (
    "A1A2 questions, seen voices", "A1A2 questions, unseen voices", "A1A2 questions, natural voices",
    "the same with noise at 10 dB", "the same by telephone", "the same after 2 s of silence",
)  # fmt: skip
"""Rows of the table in the README."""
METRICS = {"exact": "exact", "wer": "WER", "asr_wer": "ASR-WER"}


def collect(evaluated: Path) -> dict[str, Any]:
    """The figures of all evaluations in a folder.

    Raises:
        ConfigError: one of those that the other figures and the short table are of is missing.
    """
    needed = {"noise", *(ROWS[name][0] for name in SHORT)}
    others = {suite for suite, _ in ROWS.values() if (evaluated / suite / RESULTS).exists()}
    found = {name: Evaluation.load(evaluated / name) for name in needed | others}
    rows = {}
    for name, (suite, section) in ROWS.items():
        if suite not in found:
            continue
        estimates = found[suite].summary()[section]
        rows[name] = {"cases": estimates["failed"].count} | {
            metric: number(estimates[metric]) for metric in METRICS if metric in estimates
        }
    noise = found["noise"].results
    answered = [result for result in noise if not result.error]
    taken = [result for result in answered if not result.scores["exact"]]
    kinds = {}
    for kind in sorted({result.group for result in found["seen"].results}):
        asked = [result for result in found["seen"].results if (result.task, result.group) == ("A1A2", kind)]
        kinds[kind] = {"asked": len(asked), "wrong": sum(not result.score("exact") for result in asked)}
    return {
        "rows": rows,
        "noise": {"cases": len(noise), "refused": len(noise) - len(answered), "taken for a question": len(taken)},
        "kinds": kinds,
        "speed": {name: round(value, 3) for name, value in found["natural"].speed.items()},
    }


def number(estimate: Estimate) -> list[float]:
    """Value and interval."""
    return [round(value, 4) for value in (estimate.value, estimate.low, estimate.high)]


def rows_table(figures: Mapping[str, Any], names: Sequence[str] = tuple(ROWS)) -> str:
    """Rows of figures, with their intervals."""
    lines = ["| | cases | exact | WER | ASR-WER |", "|---|---|---|---|---|"]
    for name in (name for name in names if name in figures["rows"]):
        row = figures["rows"][name]
        lines.append(f"| {name} | {row['cases']} | {' | '.join(percent(row.get(metric)) for metric in METRICS)} |")
    return "\n".join(lines) + "\n"


def short_table(figures: Mapping[str, Any]) -> str:
    """What a newcomer asks first."""
    lines = ["| | exact answers |", "|---|---|"]
    lines += [f"| {name} | {percent(figures['rows'][name]['exact'])} |" for name in SHORT]
    return "\n".join(lines) + "\n"


def noise_text(figures: Mapping[str, Any]) -> str:
    """Recordings without a question."""
    noise = figures["noise"]
    return (
        f"Of {noise['cases']} recordings without a question (noise, machines, music, knocking, other languages), "
        f"{noise['refused']} are refused because\nno speech is found in them, and {noise['taken for a question']} are "
        f"answered with something else than that it does not know or did not\nunderstand.\n"
    )


def kinds_table(figures: Mapping[str, Any]) -> str:
    """Wrong answers to seen voices, by kind of question; kinds without one are left out."""
    wrong = {kind: counts for kind, counts in figures["kinds"].items() if counts["wrong"]}
    ordered = sorted(wrong.items(), key=lambda item: -item[1]["wrong"])
    lines = ["| kind | wrong | asked |", "|---|---|---|"]
    return "\n".join(lines + [f"| {kind} | {counts['wrong']} | {counts['asked']} |" for kind, counts in ordered]) + "\n"


def speed_text(figures: Mapping[str, Any]) -> str:
    """Speed of one question at a time."""
    speed = figures["speed"]
    return (
        f"One question at a time on two cores, medians of {NUM_TIMED}: first audio after {speed['first_audio']:.2f} s, "
        f"whole answer after {speed['total']:.2f} s, real-time factor {speed['real_time_factor']:.2f}.\n"
    )


def samples_text(figures: Mapping[str, Any]) -> str:
    """Questions and answers with their recordings."""
    lines = []
    for number, sample in enumerate(figures["samples"], 1):
        right = "right" if sample["answer"] == sample["expected"] else f"expected: {sample['expected']}"
        links = ", ".join(f"[{part}](nano/sample{number}-{part}.wav)" for part in ("question", "answer"))
        lines.append(f"**{sample['question']}** *{sample['answer']}* ({right}; {links})\n")
        lines.append(f"![Spectrograms](nano/sample{number}.png)\n")
    return "\n".join(lines)


def percent(values: Sequence[float] | None) -> str:
    """A fraction with its interval: `97.1 % (96.0 to 98.0)`."""
    if values is None:
        return ""
    value, low, high = (100 * fraction for fraction in values)
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "rows": rows_table,
    "short": short_table,
    "noise": noise_text,
    "kinds": kinds_table,
    "speed": speed_text,
    "samples": samples_text,
}


def fill(text: str, figures: Mapping[str, Any]) -> str:
    """A text with the figures in their places."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]](figures) + place[3], text)


def write(figures: Mapping[str, Any], root: Path = ROOT) -> None:
    """Write the figures, and the texts that quote them."""
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    (root / FIGURES).write_text(f"{text}\n", encoding="utf-8")
    for name in TEXTS:
        text = (root / name).read_text(encoding="utf-8")
        (root / name).write_text(fill(text, figures), encoding="utf-8")


def read(root: Path = ROOT) -> dict[str, Any]:
    """What `write` wrote."""
    figures: dict[str, Any] = json.loads((root / FIGURES).read_text(encoding="utf-8"))
    return figures


if __name__ == "__main__":
    write(read())
