"""Asks a model all cases of a suite, keeps what it wrote and said, and counts."""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omni_jax.api import Omni, Options, Request
from omni_jax.errors import AudioError, ConfigError
from omni_jax.evaluation import metrics
from omni_jax.evaluation.asr_judge import AsrJudge
from omni_jax.evaluation.metrics import Estimate
from omni_jax.evaluation.suites import Case
from omni_jax.file_names import safe_file_name
from omni_jax.tasks import Task

RESULTS = "results.json"
WINDOW = 64
"""Cases answered together, so that their sound need not all be in memory."""
TIMED = 20
"""Cases that are asked one by one, streaming, with a clock."""


@dataclass
class Result:
    """What came of a case."""

    id: str
    task: str
    group: str
    question: str
    expected: list[str]
    decode_text: str = ""
    audio: str = ""
    """File of the spoken answer, seen from the folder of the results."""
    seconds: float = 0.0
    """Of the spoken answer."""
    finish: str = ""
    heard: str | None = None
    """By the listener."""
    error: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    """Of this case alone."""


@dataclass
class Evaluation:
    """What a model did with a suite."""

    model: str
    suite: str
    listener: str | None
    trained: bool
    results: list[Result]
    speed: dict[str, float]
    """Medians over `TIMED` cases asked alone: see `clock`."""

    def summary(self) -> dict[str, dict[str, Estimate]]:
        """Figures by task, and by task and group where a suite has groups."""
        parts: dict[str, list[Result]] = {}
        for result in self.results:
            parts.setdefault(result.task, []).append(result)
        groups = {result.group for result in self.results} - {""}
        if len(groups) > 1:
            for result in self.results:
                if result.group:
                    parts.setdefault(f"{result.task} {result.group}", []).append(result)
        return {name: figures(results) for name, results in parts.items()}

    def save(self, folder: Path) -> None:
        """Write everything as JSON."""
        values = asdict(self) | {
            "summary": {
                name: {figure: asdict(estimate) for figure, estimate in found.items()}
                for name, found in self.summary().items()
            }
        }
        (folder / RESULTS).write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            ConfigError: there is nothing, or something else.
        """
        path = folder / RESULTS
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            results = [Result(**result) for result in values["results"]]
            return cls(
                **{name: values[name] for name in ("model", "suite", "listener", "trained", "speed")}, results=results
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: expected the results of an evaluation, found {error!r}") from None


def figures(results: Sequence[Result]) -> dict[str, Estimate]:
    """Every figure that some of the results have a score for; rates over all words or letters together."""
    found: dict[str, Estimate] = {}
    for name in ("wer", "cer", "speech_wer"):
        errors = [
            metrics.Errors(int(result.scores[f"{name}_edits"]), int(result.scores[f"{name}_length"]))
            for result in results
            if f"{name}_edits" in result.scores
        ]
        if errors:
            found[name] = metrics.rate(errors)
    for name in ("exact", "contains", "f1", "failed", "ended", "answer_seconds", "answer_words"):
        values = [result.scores[name] for result in results if name in result.scores]
        if values:
            found[name] = metrics.mean(values)
    return found


def evaluate(
    omni: Omni,
    cases: Sequence[Case],
    out: Path,
    *,
    model: str,
    suite: str,
    listener: AsrJudge | None = None,
    options: Options | None = None,
    slots: int = 8,
    progress: Callable[[int], object] = lambda _: None,
) -> Evaluation:
    """Ask everything.

    Args:
        omni: the model.
        cases: of a suite.
        out: folder for the spoken answers and the results.
        model: its name, for the results.
        suite: its name, for the results.
        listener: hears the spoken answers.
        options: of decoding.
        slots: cases answered at once.
        progress: told how many more cases are done.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for start in range(0, len(cases), WINDOW):
        window = cases[start : start + WINDOW]
        results += _answer(omni, window, out, options or {}, slots)
        progress(len(window))
    for result, case in zip(results, cases, strict=True):
        result.scores = score(result, case)
    name, speed = None if listener is None else listener.name, clock(omni, cases, options or {})
    evaluation = Evaluation(model, suite, name, omni.trained, results, speed)
    # What was answered is kept, whatever becomes of the listener.
    evaluation.save(out)
    if listener is not None:
        for result, case in zip(results, cases, strict=True):
            if result.audio:
                result.heard = listener.hear(out / result.audio)
                result.scores = score(result, case)
        evaluation.save(out)
    return evaluation


def _ask(case: Case) -> Request:
    audio: Any = io.BytesIO(case.audio) if isinstance(case.audio, bytes) else case.audio
    return Request(audio, case.text or None, case.task)


def _answer(omni: Omni, cases: Sequence[Case], out: Path, options: Options, slots: int) -> list[Result]:
    results = [
        Result(case.id, case.task, case.group, case.question or case.text, list(case.expected)) for case in cases
    ]
    requests = []
    for case, result in zip(cases, results, strict=True):
        try:
            requests.append((result, omni.prepare(_ask(case), **options)))
        except (AudioError, ConfigError) as error:
            result.error = str(error)
    replies = omni.run([request for _, request in requests], slots)
    for (result, _), reply in zip(requests, replies, strict=True):
        result.decode_text, result.finish, result.seconds = reply.text, reply.finish_reason, round(reply.seconds, 3)
        if reply.audio is not None and len(reply.audio):
            result.audio = f"{safe_file_name(result.id)}.wav"
            reply.save(out / result.audio)
    return results


def score(result: Result, case: Case) -> dict[str, float]:
    """The scores of one case; a failed one is wrong in everything."""
    scores = {"failed": float(bool(result.error))}
    if case.expected and case.task.outputs_text:
        if case.task is Task.A1T1:
            for name, measure in (("wer", metrics.word_errors), ("cer", metrics.char_errors)):
                errors = metrics.best(case.expected, result.decode_text, measure)
                scores |= {f"{name}_edits": errors.edits, f"{name}_length": errors.length}
        else:
            scores["contains"] = metrics.contains(case.expected, result.decode_text)
            scores["f1"] = metrics.f1(case.expected, result.decode_text)
        scores["exact"] = metrics.exact(case.expected, result.decode_text)
    if result.error:
        return scores
    scores["ended"] = float(result.finish == "stop")
    if case.task.outputs_text:
        scores["answer_words"] = len(result.decode_text.split())
    if case.task.outputs_audio:
        scores["answer_seconds"] = result.seconds
        # Where nothing is written, what was to be read aloud is what should be heard.
        said = result.decode_text if case.task.outputs_text else case.text
        if result.heard is not None:
            errors = metrics.word_errors(said, result.heard)
            scores |= {"speech_wer_edits": errors.edits, "speech_wer_length": errors.length}
    return scores


def clock(omni: Omni, cases: Sequence[Case], options: Options) -> dict[str, float]:
    """Medians of what single cases take, streaming; the first one is asked twice, as it compiles.

    Returns:
        `first_sound` and `total` in seconds, `steps_per_second`, `real_time_factor`; nothing if no case speaks.
    """
    found: dict[str, list[float]] = {}
    speaking = [case for case in cases if case.task.outputs_audio][:TIMED]
    for turn, case in enumerate(speaking[:1] + speaking):
        ask = _ask(case)
        try:
            parts = omni.stream(ask.audio, text=ask.text, task=ask.task, **options)
        except (AudioError, ConfigError):
            continue
        start, first, reply = time.perf_counter(), None, None
        for part in parts:
            if first is None and len(part.audio):
                first = time.perf_counter() - start
            reply = part.reply
        if turn and first is not None and reply is not None and reply.timing.real_time_factor is not None:
            found.setdefault("first_sound", []).append(first)
            found.setdefault("total", []).append(reply.timing.total)
            found.setdefault("steps_per_second", []).append(reply.timing.steps_per_second)
            found.setdefault("real_time_factor", []).append(reply.timing.real_time_factor)
    return {name: round(statistics.median(values), 4) for name, values in found.items()}
