"""A model asked, heard and judged; the report opened."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from omni_jax import cli
from omni_jax.api import Omni
from omni_jax.audio import io as audio_io
from omni_jax.errors import ConfigError
from omni_jax.evaluation import asr_judge, report
from omni_jax.evaluation.run import Evaluation, evaluate
from omni_jax.evaluation.suites import Case
from omni_jax.tasks import Task
from tests.inference.reference_decoder import small_omni

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def omni() -> Omni:
    return small_omni()


class Parrot:
    """Hears what it is told to."""

    name = "parrot"

    def __init__(self, says: str):
        self.says = says
        self.heard: list[Path] = []

    def hear(self, path: Path) -> str:
        self.heard.append(path)
        assert len(audio_io.read_audio(path, 24_000)) > 0
        return self.says


@pytest.fixture(scope="module")
def cases(omni: Omni, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("questions")
    sound = np.random.default_rng(0).normal(size=3000).astype(np.float32) / 10
    audio_io.write_wav(folder / "q.wav", sound, 16_000)
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
    done: list[int] = []
    evaluation = evaluate(
        omni, cases, out, model="small", suite="made", listener=Parrot("read me"), slots=2, progress=done.append
    )
    assert sum(done) == len(cases)
    return evaluation, out


def test_everything_is_asked_heard_and_judged(omni: Omni, cases: list[Case], found: tuple[Evaluation, Path]) -> None:
    evaluation, out = found
    by_id = {result.id: result for result in evaluation.results}
    assert list(by_id) == [case.id for case in cases]
    assert by_id["spoken"].scores["exact"] == by_id["spoken"].scores["contains"] == 1
    assert by_id["wrong"].decode_text == by_id["spoken"].decode_text
    assert by_id["wrong"].scores["exact"] == 0
    assert "none.wav" in by_id["missing"].error
    assert by_id["missing"].scores == {"failed": 1.0, "contains": 0.0, "f1": 0.0, "exact": 0.0}
    assert by_id["asr"].scores["wer_edits"] == by_id["asr"].scores["cer_edits"] == 0
    assert "exact" not in by_id["typed"].scores
    # Nothing is written by T1A1: the sound is held against what was to be read.
    assert by_id["aloud"].heard == "read me"
    assert by_id["aloud"].scores["speech_wer_edits"] == 0
    assert by_id["typed"].scores["speech_wer_edits"] > 0
    reply = omni.reply(text="hello")
    assert reply.audio is not None
    np.testing.assert_array_equal(
        audio_io.to_pcm16(audio_io.read_audio(out / "typed.wav", reply.sample_rate)), audio_io.to_pcm16(reply.audio)
    )
    assert by_id["typed"].scores["answer_seconds"] == pytest.approx(reply.seconds, abs=1e-3)
    assert 0 < evaluation.speed["first_sound"] <= evaluation.speed["total"]


def test_answers_are_kept_when_the_listener_fails(omni: Omni, cases: list[Case], tmp_path: Path) -> None:
    class Deaf(Parrot):
        def hear(self, path: Path) -> str:
            raise ConfigError("listener: gone")

    with pytest.raises(ConfigError, match="gone"):
        evaluate(omni, cases[:1], tmp_path, model="small", suite="made", listener=Deaf("x"))
    (result,) = Evaluation.load(tmp_path).results
    assert result.scores["exact"] == 1
    assert result.heard is None


def test_figures(found: tuple[Evaluation, Path]) -> None:
    evaluation, out = found
    summary = evaluation.summary()
    assert set(summary) == {"A1A2", "A1A2 a", "A1A2 b", "A1T1", "A1T1 a", "T1A2", "T1A1"}
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
    assert "heard by parrot" in text
    assert "| T1A2 | seconds |" in text
    assert "+0.0 (+0.0 to +0.0)" in text
    assert "Nobody listened" in report.markdown(other)
    report.write(evaluation, out, other)
    page = (out / "report.html").read_text()
    # All that it shows is in it.
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("<audio") == 4
    assert page.count('alt="spectrogram"') == 4
    assert "none.wav" in page


def test_listeners(tmp_path: Path) -> None:
    assert asr_judge.listener("none") is None
    program = f"{sys.executable} -c \"import sys; print(open(sys.argv[1], 'rb').read(4).decode())\" {{audio}}"
    heard = asr_judge.listener(f"command={program}")
    assert heard is not None
    audio_io.write_wav(tmp_path / "a b.wav", np.ones(100, np.float32) / 2, 16_000)
    assert heard.hear(tmp_path / "a b.wav") == "RIFF"
    with pytest.raises(ConfigError, match="exit code 1"):
        heard.hear(tmp_path / "none.wav")
    for wrong in ("whisper", "command=", "command=listen", "faster-whisper"):
        with pytest.raises(ConfigError, match="listener"):
            asr_judge.listener(wrong)


def test_from_the_shell(tmp_path: Path) -> None:
    lines = [{"id": "a", "text": "hello", "expected": "x"}, {"id": "b", "text": "again"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["evaluate", str(tmp_path / "m.jsonl"), "--model", "tiny", "--max-steps", "12", "--out"]
    done = CliRunner().invoke(cli.app, [*command, str(tmp_path / "one")])
    assert done.exit_code == 0, done.output
    assert "untrained" in done.stdout
    assert (tmp_path / "one" / "report.html").is_file()
    again = CliRunner().invoke(cli.app, [*command, str(tmp_path / "two"), "--against", str(tmp_path / "one")])
    assert "## Against tiny" in again.stdout
    for wrong, message in (
        (["--listener", "ears"], "listener: expected"),
        (["--suite", "librispeech"], "found no case"),
    ):
        refused = CliRunner().invoke(cli.app, [*command, str(tmp_path / "three"), *wrong])
        assert refused.exit_code == 2
        assert message in refused.output


@pytest.mark.slow
def test_the_report_in_a_browser(found: tuple[Evaluation, Path]) -> None:
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
