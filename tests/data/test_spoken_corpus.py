"""A corpus of text is synthesized: equal for equal seeds, in many voices and in one, and failures are counted."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from omni_jax.audio.augment import Augmentation
from omni_jax.cli.app import app
from omni_jax.data.prepare import prepare
from omni_jax.data.records import Exchange, Records, from_bytes
from omni_jax.data.sources import Manifest, RejectedRow, Source, TextQA
from omni_jax.data.spoken_corpus import SpokenCorpus
from omni_jax.data.synthesizers import Command, OpenAISpeech, VoiceSpec
from omni_jax.errors import MissingExtraError, SynthesisError
from tests.data.test_prepare import CODEC, SmallCodec
from tests.data.test_sources import put

SPEAKER = """
import sys
import numpy as np, soundfile
text, out, voice = sys.argv[1:4]
if "fail" in text:
    sys.exit("no voice today")
pitch = {"low": 100, "high": 300, "own": 200}[voice]
seconds = 0.05 * len(text.split()) + 0.1
sound = 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(22050 * seconds)) / 22050)
soundfile.write(out, sound, 22050, subtype="PCM_16")
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = tmp_path_factory.mktemp("speaker") / "speaker.py"
    script.write_text(SPEAKER)
    return f"{sys.executable} {script} {{text}} {{out}} {{voice}}"


def peak_frequency(audio: np.ndarray, rate: int) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(audio * np.hanning(len(audio)))))) * rate / len(audio)


def test_command_synthesizer(template: str) -> None:
    engine = Command(template, ("low", "high"))
    assert engine.voices() == ["low", "high"]
    samples, rate = engine.speak('it\'s {out} "now"; rm $HOME', "high")
    assert rate == 22_050
    assert len(samples) == int(22_050 * 0.35)
    assert peak_frequency(samples, rate) == pytest.approx(300, abs=5)
    # The template has neither {speed} nor {pitch}: the audio is resampled.
    faster, _ = engine.speak("a b", "low", speed=1.25, pitch=12)
    assert len(faster) == pytest.approx(22_050 * 0.2 / 2.5, abs=3)
    with pytest.raises(SynthesisError, match="exit code 1: no voice today"):
        engine.speak("fail", "low")
    with pytest.raises(SynthesisError, match="expected one of its 2 voices"):
        engine.speak("a", "none")
    with pytest.raises(SynthesisError, match=r"expected \{text\} and \{out\}"):
        Command("say {text}")
    with pytest.raises(SynthesisError, match=r"expected a command line, found .* No closing quotation"):
        Command("say {text} {out} '")


class Speaking(BaseHTTPRequestHandler):
    """A server with `/v1/audio/speech`."""

    asked: list[Any] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body, self.headers.get("Authorization")))
        if body["input"] == "fail":
            self.send_response(429)
            self.end_headers()
            self.wfile.write(b'{"error": "busy"}')
            return
        if body["input"] == "leave":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"RIFF")
            return
        file = io.BytesIO()
        soundfile.write(file, 0.5 * np.sin(np.arange(4800) / 10), 24_000, format="WAV")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(file.getvalue())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Speaking) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def test_openai_synthesizer(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine = OpenAISpeech(server + "/", "tts", ("alloy", "nova"))
    samples, rate = engine.speak("hello", "nova")
    assert (len(samples), rate) == (4800, 24_000)
    path, body, key = Speaking.asked[-1]
    assert (path, key) == ("/v1/audio/speech", "Bearer secret")
    assert body == {"model": "tts", "voice": "nova", "input": "hello", "response_format": "wav"}
    with pytest.raises(SynthesisError, match=r"found status 429: .*busy"):
        engine.speak("fail", "nova")
    with pytest.raises(SynthesisError, match=r"expected a server at .*IncompleteRead"):
        engine.speak("leave", "nova")
    with pytest.raises(SynthesisError, match="expected a server at"):
        OpenAISpeech("http://127.0.0.1:1/v1", "tts").speak("hello", "alloy")


def test_parse_voice_spec(template: str) -> None:
    assert VoiceSpec.parse("espeak") == VoiceSpec("espeak")
    assert VoiceSpec.parse("espeak=en-us+f2,en-gb") == VoiceSpec("espeak", ("en-us+f2", "en-gb"))
    assert VoiceSpec.parse(f"command={template} @low,high") == VoiceSpec("command", ("low", "high"), template)
    assert VoiceSpec.parse("openai=http://a/v1 tts @nova") == VoiceSpec("openai", ("nova",), "http://a/v1 tts")
    assert isinstance(VoiceSpec.parse("openai=http://a/v1 tts").open(), OpenAISpeech)
    for wrong in ("sing", "openai=http://a/v1", "command=say {text}", ""):
        with pytest.raises(SynthesisError):
            VoiceSpec.parse(wrong)


def rows(path: Path, *questions: str) -> TextQA:
    put(path, "".join(json.dumps({"question": text, "answer": f"It is {text}"}) + "\n" for text in questions))
    return TextQA(path)


def synthesize(source: Source, template: str, **options: Any) -> list[Any]:
    """Pending exchanges and rejected rows."""
    questions = (VoiceSpec.parse(f"command={template} @low,high"),)
    corpus = SpokenCorpus(source, questions, VoiceSpec.parse(f"command={template} @own"), **options)
    found = []
    for shard in corpus.shards():
        for _, load in corpus.rows(shard):
            try:
                found.append(load())
            except RejectedRow as row:
                found.append(row)
    return found


@pytest.mark.slow
def test_questions_have_many_voices_and_answers_one(tmp_path: Path, template: str) -> None:
    source = rows(tmp_path / "qa.jsonl", *(f"question {n}" for n in range(12)))
    pending = synthesize(source, template, augment_questions=False)
    pitches = {round(peak_frequency(each.exchange.question_audio / 32768, 16_000), -1) for each in pending}
    assert min(pitches) < 160 < 240 < max(pitches)
    assert len(pitches) > 4
    for each in pending:
        assert peak_frequency(each.answer_audio, 24_000) == pytest.approx(200, abs=8)
        assert np.sqrt(np.mean(each.answer_audio**2)) == pytest.approx(0.1, rel=0.01)
        assert each.exchange.voice == "command own"
    again, other = (
        synthesize(source, template, augment_questions=False),
        synthesize(source, template, augment_questions=False, seed=1),
    )

    def alike(one: list[Any], two: list[Any]) -> list[bool]:
        audio = [[each.exchange.question_audio for each in pending] for pending in (one, two)]
        return [np.array_equal(a, b) for a, b in zip(*audio, strict=True)]

    assert all(alike(pending, again))
    assert not all(alike(pending, other))
    augmented = synthesize(source, template)
    assert not np.array_equal(augmented[0].exchange.question_audio, pending[0].exchange.question_audio)


def test_failed_synthesis_is_repeated_then_rejected(
    tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = rows(tmp_path / "qa.jsonl", "good one", "must fail", "a " * 30)
    attempts: list[str] = []
    original = Command.speak

    def speak(self: Command, text: str, *args: Any) -> Any:
        attempts.append(text)
        if attempts.count(text) == 1:
            raise SynthesisError("not the first time")
        return original(self, text, *args)

    monkeypatch.setattr(Command, "speak", speak)
    found = synthesize(source, template, max_question_seconds=1.0, augment_questions=False)
    assert isinstance(found[0].exchange, Exchange)
    assert [row.reason for row in found[1:]] == ["question synthesis failed", "spoken question too long"]
    assert attempts.count("must fail") == 3


def test_answer_speed_is_that_of_answers_only(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds: dict[str, float] = {}
    original = Command.speak

    def speak(self: Command, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> Any:
        speeds[voice] = speed
        return original(self, text, voice, speed, pitch)

    monkeypatch.setattr(Command, "speak", speak)
    synthesize(rows(tmp_path / "qa.jsonl", "one"), template, answer_speed=1.3)
    assert speeds.pop("own") == 1.3
    assert 1.3 not in speeds.values()


def test_prepare_spoken_corpus(tmp_path: Path, template: str) -> None:
    source = rows(tmp_path / "qa.jsonl", "one", "two", "fail")
    corpus = SpokenCorpus(
        source,
        (VoiceSpec.parse(f"command={template} @low"),),
        VoiceSpec.parse(f"command={template} @own"),
        CODEC.sample_rate,
    )
    index = prepare(corpus, tmp_path / "out", codec=SmallCodec())
    assert (index["exchanges"], index["rejected"]) == (2, {"question synthesis failed": 1})
    assert index["tasks"]["A1A2"] == 2
    record = from_bytes(Records(tmp_path / "out")[0], codebook_size=CODEC.codebook_size)
    assert record.answer_codes is not None
    assert (record.question_text, record.answer_text, record.voice) == ("one", "It is one", "command own")


def test_synthesize_command_line(tmp_path: Path, template: str) -> None:
    rows(tmp_path / "qa.jsonl", "one", "two")
    command = ["synthesize", str(tmp_path / "qa.jsonl"), "--out", str(tmp_path / "out"), "--codec", "tiny"]
    voices = ["--questions", f"command={template} @low,high", "--answer", f"command={template} @own"]
    done = CliRunner().invoke(app, [*command, *voices, "--clean", "--license", "MIT"])
    assert done.exit_code == 0, done.output
    assert "2 exchanges" in done.output
    assert json.loads((tmp_path / "out" / "index.json").read_text())["licenses"] == {"text": "MIT"}
    for wrong, message in ((["--answer", "sing"], "voices: expected"), (["--codec", "none"], "none")):
        refused = CliRunner().invoke(app, [*command, *voices, *wrong])
        assert refused.exit_code == 2
        assert message in refused.output


def test_missing_package_stops_instead_of_rejecting_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hibari", None)
    corpus = SpokenCorpus(rows(tmp_path / "qa.jsonl", "one"), (), VoiceSpec("hibari", ("heart",)))
    with pytest.raises(MissingExtraError, match="pip install hibari-tts"):
        prepare(corpus, tmp_path / "out", codec=SmallCodec())


def test_voice_spec_sets_ranges_of_speed_and_pitch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    drawn: list[tuple[float, float]] = []
    original = Command.speak

    def speak(self: Command, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> Any:
        drawn.append((speed, pitch))
        return original(self, text, voice, speed, pitch)

    monkeypatch.setattr(Command, "speak", speak)
    voices = replace(VoiceSpec.parse(f"command={template} @low"), speed=(1.5, 1.6), pitch=(6.0, 7.0))
    corpus = SpokenCorpus(rows(tmp_path / "qa.jsonl", "ranges"), (voices,), VoiceSpec.parse(f"command={template} @own"))
    ((_, load),) = corpus.rows(corpus.shards()[0])
    load()
    (speed, pitch), answer = drawn
    assert 1.5 <= speed <= 1.6
    assert 6 <= pitch <= 7
    assert answer == (1, 0)


def test_augmentation_settings(tmp_path: Path, template: str) -> None:
    source = rows(tmp_path / "qa.jsonl", "a quiet question")
    settings = Augmentation(room_chance=0, noise_chance=0, band_chance=0, level=(-40.0, -40.0))
    (pending,) = synthesize(source, template, augmentation=settings)
    audio = pending.exchange.question_audio / 32768
    assert np.sqrt(np.mean(audio**2)) == pytest.approx(0.01, rel=0.02)


def test_answers_are_shifted_and_synthesized_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    spoken: list[str] = []
    original = Command.speak
    monkeypatch.setattr(Command, "speak", lambda self, text, *rest: spoken.append(text) or original(self, text, *rest))
    lines = [json.dumps({"question": f"Q{n}", "answer": "shifted by some samples"}) for n in range(4)]
    put(tmp_path / "qa.jsonl", "\n".join(lines))
    pending = synthesize(TextQA(tmp_path / "qa.jsonl"), template, max_answer_shift=0.05)
    assert spoken.count("shifted by some samples") == 1
    starts = [int(np.flatnonzero(each.answer_audio)[0]) for each in pending]
    assert len(set(starts)) == 4
    assert max(starts) - min(starts) <= 0.05 * 24_000


def test_rows_without_question_or_answer(tmp_path: Path, template: str) -> None:
    lines = [{"question_text": "write this down"}, {"answer_text": "read this aloud"}]
    put(tmp_path / "m.jsonl", "\n".join(map(json.dumps, lines)))
    dictation, reading = synthesize(Manifest(tmp_path / "m.jsonl"), template)
    assert (dictation.exchange.question_audio is None, dictation.answer_audio is None) == (False, True)
    assert (reading.exchange.question_audio is None, reading.answer_audio is None) == (True, False)
    assert dictation.exchange.voice == ""


def test_equal_rows_have_different_voices(tmp_path: Path, template: str) -> None:
    first, second = synthesize(rows(tmp_path / "qa.jsonl", "twice", "twice"), template)
    assert not np.array_equal(first.exchange.question_audio, second.exchange.question_audio)
    (alone,) = synthesize(rows(tmp_path / "one.jsonl", "twice"), template)
    np.testing.assert_array_equal(alone.exchange.question_audio, first.exchange.question_audio)
