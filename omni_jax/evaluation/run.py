"""Answers all cases of a suite, keeps the answers, and scores them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omni_jax.errors import AudioError, ConfigError
from omni_jax.evaluation import metrics
from omni_jax.evaluation.asr_judge import AsrJudge
from omni_jax.evaluation.metrics import Estimate
from omni_jax.evaluation.suites import Case, RecordedTurn
from omni_jax.file_names import safe_file_name
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.messages import to_messages
from omni_jax.inference.request import Request, Turn
from omni_jax.input_files import read_json
from omni_jax.tasks import Task

if TYPE_CHECKING:
    from omni_jax.api import Omni

RESULTS = "results.json"
WINDOW = 64
"""Cases answered together, so that the audio of all need not be in memory."""
NUM_TIMED = 20
"""Cases whose speed is measured."""
ERROR_RATES = ("wer", "cer", "asr_wer")
MEANS = ("exact", "contains", "f1", "failed", "finished", "answer_seconds", "answer_words")


@dataclass
class Result:
    """The answer to a case, and its scores."""

    id: str
    task: str
    group: str
    question: str
    expected: list[str]
    text: str = ""
    """The text of the answer."""
    audio: str = ""
    """Wav file of the spoken answer, relative to the folder of the results."""
    seconds: float = 0.0
    """Duration of the spoken answer."""
    finish_reason: str = ""
    asr_text: str | None = None
    """The ASR judge's transcript of the spoken answer."""
    error: str = ""
    """Why there is no answer."""
    messages: list[dict[str, str]] = field(default_factory=list)
    """System text and turns before the question, as the model got them, in the form of chat completions."""
    scores: dict[str, float] = field(default_factory=dict)

    def errors(self, name: str) -> metrics.ErrorCount | None:
        """The errors of this case that an error rate counts; None if it does not apply."""
        if f"{name}_edits" not in self.scores:
            return None
        return metrics.ErrorCount(int(self.scores[f"{name}_edits"]), int(self.scores[f"{name}_length"]))

    def score(self, name: str) -> float | None:
        """A metric of this case alone; None if it does not apply."""
        errors = self.errors(name)
        return self.scores.get(name) if errors is None else errors.rate


@dataclass
class Evaluation:
    """The results of a model on a suite."""

    model: str
    suite: str
    asr_judge: str | None
    trained: bool
    results: list[Result]
    speed: dict[str, float]
    """See `measure_speed`."""

    def sections(self) -> dict[str, list[Result]]:
        """The results by task, and where a suite has several groups, by task and group.

        Tasks are in the order of `Task`; the groups of a task follow it in alphabetical order.
        """
        several = len({result.group for result in self.results} - {""}) > 1
        sections: dict[str, list[Result]] = {}
        for task in Task:
            results = [result for result in self.results if result.task == task]
            if results:
                sections[task.value] = results
            for group in sorted({result.group for result in results} - {""}) if several else ():
                sections[f"{task} {group}"] = [result for result in results if result.group == group]
        return sections

    def summary(self) -> dict[str, dict[str, Estimate]]:
        """The metrics of each section."""
        return {name: summarize(results) for name, results in self.sections().items()}

    @property
    def all_failed(self) -> bool:
        """Whether there is no answer to any case."""
        return all(result.error for result in self.results)

    def save(self, folder: Path) -> None:
        """Write everything as JSON."""
        summary = {
            section: {name: asdict(estimate) for name, estimate in estimates.items()}
            for section, estimates in self.summary().items()
        }
        values = asdict(self) | {"summary": summary}
        (folder / RESULTS).write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            ConfigError: there is no such file, or it has something else in it.
        """
        path = folder / RESULTS
        try:
            values = read_json(path, ConfigError)
            results = [Result(**result) for result in values["results"]]
            names = ("model", "suite", "asr_judge", "trained", "speed")
            return cls(**{name: values[name] for name in names}, results=results)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: expected the results of an evaluation, found {error!r}") from None


def summarize(results: Sequence[Result]) -> dict[str, Estimate]:
    """Every metric that applies to some of the results. Error rates are over all words or characters together."""
    estimates: dict[str, Estimate] = {}
    for name in ERROR_RATES:
        errors = [errors for result in results if (errors := result.errors(name)) is not None]
        if errors:
            estimates[name] = metrics.error_rate(errors)
    for name in MEANS:
        values = [result.scores[name] for result in results if name in result.scores]
        if values:
            estimates[name] = metrics.mean(values)
    return estimates


def evaluate(
    omni: Omni,
    cases: Sequence[Case],
    out: Path,
    *,
    model: str,
    suite: str,
    judge: AsrJudge | None = None,
    config: GenerationConfig | None = None,
    max_batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> Evaluation:
    """Answer and score all cases.

    Args:
        omni: the model.
        cases: of a suite.
        out: folder for the spoken answers and the results.
        model: its name, for the results.
        suite: its name, for the results.
        judge: transcribes the spoken answers; None: they are not scored.
        config: how to answer.
        max_batch_size: cases decoded together.
        progress: called with how many cases are answered, and of how many.

    Raises:
        ConfigError: the judge fails. The results without it are saved by then.
        MissingExtraError: a package of the extra `evaluation` is not installed.
    """
    config = config or GenerationConfig()
    out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    requests: list[Request] = []
    for start in range(0, len(cases), WINDOW):
        window = cases[start : start + WINDOW]
        asked = _transcribe_past(omni, window, max_batch_size)
        results += _answer(omni, window, asked, out, config, max_batch_size)
        requests += [request for request in asked if isinstance(request, Request)]
        if progress is not None:
            progress(len(results), len(cases))
    for result, case in zip(results, cases, strict=True):
        result.scores = score(result, case)
    speed = measure_speed(omni, requests, config)
    evaluation = Evaluation(model, suite, None if judge is None else judge.name, omni.trained, results, speed)
    evaluation.save(out)
    if judge is not None:
        for result, case in zip(results, cases, strict=True):
            if result.audio:
                result.asr_text = judge.transcribe(out / result.audio)
                result.scores |= _asr_scores(result, case)
        evaluation.save(out)
    return evaluation


def _transcribe_past(omni: Omni, cases: Sequence[Case], max_batch_size: int) -> list[Request | str]:
    """The request of each case, with the model's transcripts of past questions that are recordings; or an error."""
    prepared, errors, found = {}, {}, {}
    for audio in {turn.audio: None for case in cases for turn in case.history if isinstance(turn, RecordedTurn)}:
        try:
            # As `Conversation` does it: with the default options.
            prepared[audio] = omni.prepare(Request(audio, task=Task.A1T1))
        except (AudioError, ConfigError) as error:
            errors[audio] = str(error)
    for audio, reply in zip(prepared, omni.run(list(prepared.values()), max_batch_size), strict=True):
        found[audio] = reply.text.strip()
    requests: list[Request | str] = []
    for case in cases:
        failed = [turn.audio for turn in case.history if isinstance(turn, RecordedTurn) and turn.audio in errors]
        if failed:
            requests.append(errors[failed[0]])
            continue
        turns = [
            Turn(found[turn.audio], turn.answer) if isinstance(turn, RecordedTurn) else turn for turn in case.history
        ]
        requests.append(replace(case.request(), history=turns))
    return requests


def _answer(
    omni: Omni,
    cases: Sequence[Case],
    asked: Sequence[Request | str],
    out: Path,
    config: GenerationConfig,
    max_batch_size: int,
) -> list[Result]:
    results = [
        Result(case.id, case.task, case.group, case.question or case.text, list(case.expected)) for case in cases
    ]
    requests = []
    for request, result in zip(asked, results, strict=True):
        if isinstance(request, str):
            result.error = request
            continue
        result.messages = to_messages(request.system or "", request.history)
        try:
            requests.append((result, omni.prepare(request, config=config)))
        except (AudioError, ConfigError) as error:
            result.error = str(error)
    replies = omni.run([request for _, request in requests], max_batch_size)
    for (result, _), reply in zip(requests, replies, strict=True):
        result.text, result.finish_reason, result.seconds = reply.text, reply.finish_reason, round(reply.seconds, 3)
        if reply.audio is not None and len(reply.audio):
            result.audio = f"{safe_file_name(result.id)}.wav"
            reply.save(out / result.audio)
    return results


def score(result: Result, case: Case) -> dict[str, float]:
    """The scores of one case. One that failed counts as wrong in every metric of its text."""
    scores = {"failed": float(bool(result.error))}
    if case.expected and case.task.outputs_text:
        if case.task is Task.A1T1:
            for name, count_errors in (("wer", metrics.word_errors), ("cer", metrics.char_errors)):
                errors = metrics.fewest_errors(case.expected, result.text, count_errors)
                scores |= {f"{name}_edits": errors.edits, f"{name}_length": errors.length}
        else:
            scores["contains"] = metrics.contains_match(case.expected, result.text)
            scores["f1"] = metrics.f1(case.expected, result.text)
        scores["exact"] = metrics.exact_match(case.expected, result.text)
    if result.error:
        return scores
    scores["finished"] = float(result.finish_reason == "stop")
    if case.task.outputs_text:
        scores["answer_words"] = len(result.text.split())
    if case.task.outputs_audio:
        scores["answer_seconds"] = result.seconds
    return scores


def _asr_scores(result: Result, case: Case) -> dict[str, float]:
    """The scores of what the judge understood of a spoken answer."""
    assert result.asr_text is not None, "the judge has transcribed it"
    # T1A1 outputs no text: its reference is the text to be read.
    errors = metrics.word_errors(result.text if case.task.outputs_text else case.text, result.asr_text)
    return {"asr_wer_edits": errors.edits, "asr_wer_length": errors.length}


def measure_speed(
    omni: Omni, requests: Sequence[Request], config: GenerationConfig | None = None, *, count: int = NUM_TIMED
) -> dict[str, float]:
    """Answer requests one by one, streaming, and take medians. The first one is answered twice, as it compiles.

    Args:
        omni: the model.
        requests: those that output audio are timed, except those that cannot be used.
        config: how to answer requests that do not say.
        count: how many to time.

    Returns:
        Fields of `Timing`: `first_audio` and `total` in seconds, `steps_per_second`, `real_time_factor`; empty if no
        request outputs audio.
    """
    names = ("first_audio", "total", "steps_per_second", "real_time_factor")
    prepared = []
    for request in [request for request in requests if request.resolve_task().outputs_audio][:count]:
        try:
            prepared.append(omni.prepare(request, config=config))
        except (AudioError, ConfigError):
            continue
    found: dict[str, list[float]] = {}
    for turn, one in enumerate(prepared[:1] + prepared):
        for chunk in omni.stream_prepared(one):
            reply = chunk.reply
        assert reply is not None, "the last chunk of a stream has the reply"
        values = [getattr(reply.timing, name) for name in names]
        if turn and None not in values:
            for name, value in zip(names, values, strict=True):
                found.setdefault(name, []).append(value)
    return {name: round(statistics.median(values), 4) for name, values in found.items()}
