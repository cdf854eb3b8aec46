"""Text becomes speech: the same for the same seed, in many voices and in one, and what fails is counted."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from omni_jax.cli.app import app
from omni_jax.data.prepare import prepare
from omni_jax.data.records import Exchange, Records, from_bytes
from omni_jax.data.sources import RejectedRow, TextQA
from omni_jax.data.spoken_corpus import SpokenCorpus
from omni_jax.data.synthesizers import Command, OpenAISpeech, VoiceSpec
from omni_jax.errors import SynthesisError
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


def heard_pitch(sound: np.ndarray, rate: int) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(sound * np.hanning(len(sound)))))) * rate / len(sound)


def test_a_command(template: str) -> None:
    engine = Command(template, ("low", "high"))
    assert engine.voices() == ["low", "high"]
    samples, rate = engine.speak('it\'s {out} "now"; rm $HOME', "high")
    assert rate == 22_050
    assert len(samples) == int(22_050 * 0.35)
    assert heard_pitch(samples, rate) == pytest.approx(300, abs=5)
    # Neither place is in the template: the sound is played faster, and higher.
    faster, _ = engine.speak("a b", "low", speed=1.25, pitch=12)
    assert len(faster) == pytest.approx(22_050 * 0.2 / 2.5, abs=3)
    with pytest.raises(SynthesisError, match="exit code 1: no voice today"):
        engine.speak("fail", "low")
    with pytest.raises(SynthesisError, match="expected one of its 2 voices"):
        engine.speak("a", "none")
    with pytest.raises(SynthesisError, match=r"expected \{text\} and \{out\}"):
        Command("say {text}")


class Speaking(BaseHTTPRequestHandler):
    """A server of speech."""

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


def test_a_server(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_names_of_voices(template: str) -> None:
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


def spoken(source: TextQA, template: str, **options: Any) -> list[Any]:
    asking = (VoiceSpec.parse(f"command={template} @low,high"),)
    voiced = SpokenCorpus(source, asking, VoiceSpec.parse(f"command={template} @own"), **options)
    found = []
    for unit in voiced.units():
        for _, make in voiced.rows(unit):
            try:
                found.append(make())
            except RejectedRow as problem:
                found.append(problem)
    return found


def test_many_ask_and_one_answers(tmp_path: Path, template: str) -> None:
    source = rows(tmp_path / "qa.jsonl", *(f"question {n}" for n in range(12)))
    drafts = spoken(source, template, augment=False)
    pitches = {round(heard_pitch(draft.exchange.question_audio / 32768, 16_000), -1) for draft in drafts}
    assert min(pitches) < 160 < 240 < max(pitches)
    assert len(pitches) > 4
    for draft in drafts:
        assert heard_pitch(draft.answer_audio, 24_000) == pytest.approx(200, abs=8)
        assert np.sqrt(np.mean(draft.answer_audio**2)) == pytest.approx(0.1, rel=0.01)
        assert draft.exchange.voice == "command own"
    again, other = spoken(source, template, augment=False), spoken(source, template, augment=False, seed=1)

    def alike(one: list[Any], two: list[Any]) -> list[bool]:
        sounds = [[draft.exchange.question_audio for draft in drafts] for drafts in (one, two)]
        return [np.array_equal(a, b) for a, b in zip(*sounds, strict=True)]

    assert all(alike(drafts, again))
    assert not all(alike(drafts, other))
    # Rooms and noise, unless they are not wanted.
    varied = spoken(source, template)
    assert not np.array_equal(varied[0].exchange.question_audio, drafts[0].exchange.question_audio)


def test_what_fails_is_tried_again_and_then_counted(
    tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = rows(tmp_path / "qa.jsonl", "good one", "must fail", "a " * 30)
    tries: list[str] = []
    whole = Command.speak

    def speak(self: Command, text: str, *args: Any) -> Any:
        tries.append(text)
        if tries.count(text) == 1:
            raise SynthesisError("not the first time")
        return whole(self, text, *args)

    monkeypatch.setattr(Command, "speak", speak)
    found = spoken(source, template, max_question_seconds=1.0, augment=False)
    assert isinstance(found[0].exchange, Exchange)
    assert [problem.reason for problem in found[1:]] == ["no voice for the question", "spoken question too long"]
    assert tries.count("must fail") == 3


def test_records_of_it(tmp_path: Path, template: str) -> None:
    source = rows(tmp_path / "qa.jsonl", "one", "two", "fail")
    voiced = SpokenCorpus(
        source,
        (VoiceSpec.parse(f"command={template} @low"),),
        VoiceSpec.parse(f"command={template} @own"),
        CODEC.sample_rate,
    )
    index = prepare(voiced, tmp_path / "out", codec=SmallCodec())  # type: ignore[arg-type]
    assert (index["exchanges"], index["rejected"]) == (2, {"no voice for the question": 1})
    assert index["tasks"]["A1A2"] == 2
    record = from_bytes(Records(tmp_path / "out")[0], codebook_size=CODEC.codebook_size)
    assert record.answer_codes is not None
    assert (record.question_text, record.answer_text, record.voice) == ("one", "It is one", "command own")


def test_from_the_shell(tmp_path: Path, template: str) -> None:
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
