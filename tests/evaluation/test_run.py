"""An evaluation of a small model, its results and its report."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omni_jax.api import Omni
from omni_jax.audio import io as audio_io
from omni_jax.audio.encoding import write_audio
from omni_jax.errors import ConfigError
from omni_jax.evaluation import asr_judge, report
from omni_jax.evaluation.comparison import compare
from omni_jax.evaluation.run import Evaluation, Result, evaluate, measure_speed
from omni_jax.evaluation.suites import Case, RecordedTurn
from omni_jax.inference.messages import to_messages
from omni_jax.inference.request import Request, Turn
from omni_jax.tasks import Task
from tests.inference.reference_decoder import small_omni

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def omni() -> Omni:
    return small_omni()


class ConstantJudge:
    """Transcribes every recording as the same text."""

    name = "constant"

    def __init__(self, text: str):
        self.text = text

    def transcribe(self, path: Path) -> str:
        assert len(audio_io.read_audio(path, 24_000)) > 0
        return self.text


@pytest.fixture(scope="module")
def cases(omni: Omni, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("questions")
    sound = np.random.default_rng(0).normal(size=3000).astype(np.float32) / 10
    write_audio(folder / "q.wav", sound, 16_000)
    said = omni.transcribe(folder / "q.wav").text
    answered = omni.reply(folder / "q.wav").text
    return [
        Case("spoken", Task.A1A2, folder / "q.wav", "", (answered,), "q", "a"),
        Case("wrong", Task.A1A2, (folder / "q.wav").read_bytes(), "", ("zebra crossing",), "q", "b"),
        Case("missing", Task.A1A2, folder / "none.wav", "", ("x",), "q", "b"),
        Case("asr", Task.A1T1, folder / "q.wav", "", (said or "x",), "q", "a"),
        Case("typed", Task.T1A2, None, "hello"),
        Case("aloud", Task.T1A1, None, "read me"),
    ]


@pytest.fixture(scope="module")
def found(omni: Omni, cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    out = tmp_path_factory.mktemp("evaluated")
    progress: list[tuple[int, int]] = []
    evaluation = evaluate(
        omni, cases, out, model="small", suite="made", judge=ConstantJudge("read me"), max_batch_size=2,
        progress=lambda done, total: progress.append((done, total)),
    )  # fmt: skip
    assert progress == [(len(cases), len(cases))]
    return evaluation, out


def test_evaluate_answers_and_scores_every_case(omni: Omni, cases: list[Case], found: tuple[Evaluation, Path]) -> None:
    evaluation, out = found
    by_id = {result.id: result for result in evaluation.results}
    assert list(by_id) == [case.id for case in cases]
    assert by_id["spoken"].scores["exact"] == by_id["spoken"].scores["contains"] == 1
    assert by_id["wrong"].text == by_id["spoken"].text
    assert by_id["wrong"].scores["exact"] == 0
    assert "none.wav" in by_id["missing"].error
    assert by_id["missing"].scores == {"failed": 1.0, "contains": 0.0, "f1": 0.0, "exact": 0.0}
    assert by_id["asr"].scores["wer_edits"] == by_id["asr"].scores["cer_edits"] == 0
    assert "exact" not in by_id["typed"].scores
    # T1A1 outputs no text: the reference is the text to be read.
    assert by_id["aloud"].asr_text == "read me"
    assert by_id["aloud"].scores["asr_wer_edits"] == 0
    assert by_id["typed"].scores["asr_wer_edits"] > 0
    reply = omni.reply(text="hello")
    assert reply.audio is not None
    np.testing.assert_array_equal(
        audio_io.to_pcm16(audio_io.read_audio(out / "typed.wav", reply.sample_rate)), audio_io.to_pcm16(reply.audio)
    )
    assert by_id["typed"].scores["answer_seconds"] == pytest.approx(reply.seconds, abs=1e-3)
    assert 0 < evaluation.speed["first_audio"] <= evaluation.speed["total"]


def test_evaluate_saves_answers_if_the_judge_fails(omni: Omni, cases: list[Case], tmp_path: Path) -> None:
    class FailingJudge(ConstantJudge):
        def transcribe(self, path: Path) -> str:
            raise ConfigError("judge: gone")

    with pytest.raises(ConfigError, match="gone"):
        evaluate(omni, cases[:1], tmp_path, model="small", suite="made", judge=FailingJudge("x"))
    (result,) = Evaluation.load(tmp_path).results
    assert result.scores["exact"] == 1
    assert result.asr_text is None


def test_evaluate_with_a_history_from_text_and_from_speech(tmp_path: Path) -> None:
    omni = small_omni(text_specials=7, conversation=True, max_position=128)
    sound = np.random.default_rng(0).normal(size=3000).astype(np.float32) / 10
    write_audio(tmp_path / "q.wav", sound, 16_000)
    transcript = omni.transcribe(tmp_path / "q.wav").text.strip()
    spoken = RecordedTurn("Is it?", "Yes", audio=tmp_path / "q.wav")
    lost = RecordedTurn("Is it?", "Yes", audio=tmp_path / "none.wav")
    histories = {"text": (Turn("Is it?", "Yes"),), "speech": (spoken, Turn("Hi?", "No"), spoken), "lost": (lost,)}
    cases = [
        Case(id, Task.A1T2, tmp_path / "q.wav", expected=("x",), system="Bob", history=history)
        for id, history in histories.items()
    ]
    evaluation = evaluate(omni, cases, tmp_path / "out", model="small", suite="made")
    by_text, by_speech, failed = evaluation.results
    system = {"role": "system", "content": "Bob"}
    assert transcript
    assert transcript != "Is it?"
    assert by_text.messages == [system, *to_messages("", [Turn("Is it?", "Yes")])]
    turns = [Turn(transcript, "Yes"), Turn("Hi?", "No"), Turn(transcript, "Yes")]
    assert by_speech.messages == [system, *to_messages("", turns)]
    for result, history in ((by_text, [Turn("Is it?", "Yes")]), (by_speech, turns)):
        request = Request(tmp_path / "q.wav", task="A1T2", system="Bob", history=history)
        assert result.text == omni.generate(request).text
    assert "none.wav: expected a recording" in failed.error
    assert failed.scores["exact"] == 0.0
    report.write(evaluation, tmp_path / "out", cases=cases)
    assert "<dd>system: Bob<br>user: Is it?<br>assistant: Yes</dd>" in (tmp_path / "out" / "report.html").read_text()
    assert Evaluation.load(tmp_path / "out").results == evaluation.results

    (refused,) = evaluate(small_omni(), cases[1:2], tmp_path / "plain", model="small", suite="made").results
    assert refused.error.startswith("system: expected none: this model was not trained on conversations")


def test_measure_speed_times_recordings_in_memory(omni: Omni, cases: list[Case]) -> None:
    in_memory = next(case for case in cases if isinstance(case.audio, bytes))
    speed = measure_speed(omni, [in_memory.request()])
    assert set(speed) == {"first_audio", "total", "steps_per_second", "real_time_factor"}
    assert measure_speed(omni, [Request(text="hello", task="T1T2")]) == {}


def test_summary_and_saved_results(found: tuple[Evaluation, Path]) -> None:
    evaluation, out = found
    summary = evaluation.summary()
    # In the order of the tasks, each followed by its groups.
    assert list(summary) == ["A1A2", "A1A2 a", "A1A2 b", "A1T1", "A1T1 a", "T1A2", "T1A1"]
    assert summary["A1A2"]["exact"].value == pytest.approx(1 / 3)
    assert summary["A1A2"]["failed"].value == pytest.approx(1 / 3)
    assert summary["A1A2 b"]["exact"].value == 0
    assert summary["A1T1"]["wer"].value == 0
    again = Evaluation.load(out)
    assert again.results == evaluation.results
    assert again.summary() == summary
    saved = json.loads((out / "results.json").read_text())
    assert saved["summary"]["A1A2"]["exact"]["count"] == 3
    with pytest.raises(ConfigError, match="expected the results of an evaluation"):
        Evaluation.load(out / "none")


def test_report(found: tuple[Evaluation, Path], omni: Omni, cases: list[Case], tmp_path: Path) -> None:
    evaluation, out = found
    other = evaluate(omni, cases[1:], tmp_path, model="other", suite="made")
    text = report.markdown(evaluation, other)
    row = next(line for line in text.splitlines() if line.startswith("| A1A2 | 3 |"))
    assert "33.3 % (0.0 to 100.0)" in row
    assert "ASR judge: constant" in text
    assert "| T1A2 | seconds |" in text
    assert "+0.0 (+0.0 to +0.0)" in text
    assert "There was no ASR judge" in report.markdown(other)
    # Pooled as in the table, and for each group.
    (difference,) = [one for one in compare(evaluation, other, ["contains"]) if one.section == "A1A2 b"]
    assert difference.difference.value == 0.0
    assert difference.difference.count == 2
    assert "| A1A2 b | contains-match |" in text
    for line in ("Rows: each task, and below it the groups", "- WER: word error rate", "- failed: share of cases"):
        assert line in text
    report.write(evaluation, out, other, cases)
    page = (out / "report.html").read_text()
    # All that it shows is in it.
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    # Four spoken answers, and the recordings of three questions; a fourth is missing.
    assert page.count("<audio") == 4 + 3
    assert page.count("<dt>question</dt>") == len(cases)
    assert "<dt>WER</dt><dd>word error rate" in page
    assert page.count('alt="spectrogram"') == 4
    assert "none.wav" in page


def test_compare_pools_word_error_rates_as_the_table_does() -> None:
    def of(*edits: tuple[int, int]) -> Evaluation:
        results = [
            Result(f"{n}", "A1T1", "", "", ["x"], scores={"failed": 0.0, "wer_edits": e, "wer_length": length})
            for n, (e, length) in enumerate(edits)
        ]
        return Evaluation("m", "s", None, True, results, {})

    mine, theirs = of((5, 10), (0, 90)), of((0, 10), (9, 90))
    (difference,) = compare(mine, theirs, ["wer"])
    assert difference.value == mine.summary()["A1T1"]["wer"].value == 0.05
    assert difference.other == theirs.summary()["A1T1"]["wer"].value == 0.09
    assert difference.difference.value == pytest.approx(-0.04)
    assert not mine.all_failed
    assert Evaluation("m", "s", None, True, [Result("a", "A1T1", "", "", [], error="gone")], {}).all_failed


def test_parse_judge(tmp_path: Path) -> None:
    assert asr_judge.parse_judge("none") is None
    program = f"{sys.executable} -c \"import sys; print(open(sys.argv[1], 'rb').read(4).decode())\" {{audio}}"
    judge = asr_judge.parse_judge(f"command={program}")
    assert judge is not None
    write_audio(tmp_path / "a b.wav", np.ones(100, np.float32) / 2, 16_000)
    assert judge.transcribe(tmp_path / "a b.wav") == "RIFF"
    with pytest.raises(ConfigError, match="exit code 1"):
        judge.transcribe(tmp_path / "none.wav")
    for wrong in ("whisper", "command=", "command=listen", "faster-whisper"):
        with pytest.raises(ConfigError, match="ASR judge"):
            asr_judge.parse_judge(wrong)


def test_faster_whisper_writes_numbers_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    class WhisperModel:
        def __init__(self, *_: Any, **__: Any):
            vocabulary = {"ten": 3, "\u012010": 4, "7": 5, "x": 6, "%": 7}
            self.hf_tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary)

        def transcribe(self, path: str, **options: Any) -> Any:
            asked.update(options)
            return [SimpleNamespace(text=" Ten"), SimpleNamespace(text=" times.")], None

    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=WhisperModel))
    judge = asr_judge.parse_judge("faster-whisper=some/base")
    assert judge is not None
    assert (judge.name, judge.transcribe(tmp_path / "a.wav")) == ("faster-whisper base", "Ten times.")
    assert asked["suppress_tokens"] == [-1, 4, 5, 7]


@pytest.mark.slow
def test_report_in_a_browser(found: tuple[Evaluation, Path]) -> None:
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("the report is opened in Chromium, which is not installed")
    from playwright.sync_api import sync_playwright

    evaluation, out = found
    report.write(evaluation, out)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        page: Any = browser.new_page(viewport={"width": 400, "height": 800})
        page.goto(f"file://{out / 'report.html'}")
        assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        length = """async () => { const one = document.querySelector('audio'); one.load();
            await new Promise((done) => one.onloadedmetadata = done); return one.duration; }"""
        assert page.evaluate(length) > 0.05
        browser.close()
