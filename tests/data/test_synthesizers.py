"""Giving text a voice, and varying recordings. The engines are stand-ins; the real ones are tried where installed."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from omni_jax.audio.augment import Augmentation, augment, trim_silence
from omni_jax.data import synthesizers
from omni_jax.data.synthesizers import ESpeak, Flite, HibariTTS, Pico
from omni_jax.errors import MissingExtraError, SynthesisError

RATE = 16_000
PLAIN = Augmentation(stretch=(1.0, 1.0), room_chance=0, noise_chance=0, band_chance=0, level=(-20.0, -20.0))
"""Nothing but the level."""

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


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def decibels(audio: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(audio, dtype=np.float64))))


def amplitude(audio: np.ndarray, hertz: float, rate: int = RATE) -> float:
    """Of one frequency, away from both ends."""
    middle = audio[len(audio) // 8 : -len(audio) // 8] * np.hanning(len(audio) - 2 * (len(audio) // 8))
    wave = np.exp(-2j * np.pi * hertz * np.arange(len(middle)) / rate)
    return float(np.abs(np.mean(middle * wave)) * 4)


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


@pytest.mark.parametrize("name", ["espeak", "flite", "hibari", "pico"])
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
    ("name", "module", "package"), [("hibari", "hibari", "hibari-tts"), ("pico", "ttspico", "ttspico")]
)
def test_missing_package_is_reported_on_first_use(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=f"^{name}: expected the package {package}.*pip install {package}$"):
        synthesizers.open_synthesizer(name).voices()


def test_open_synthesizer_by_name():
    for name, kind in {"espeak": ESpeak, "flite": Flite, "hibari": HibariTTS, "pico": Pico}.items():
        assert type(synthesizers.open_synthesizer(name)) is kind
    with pytest.raises(SynthesisError, match=r"^synthesizer: expected espeak, flite, hibari, pico, found 'festival'$"):
        synthesizers.open_synthesizer("festival")


INSTALLED = {
    "espeak": bool(shutil.which("espeak-ng")),
    "flite": bool(shutil.which("flite")),
    "hibari": bool(find_spec("hibari")),
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


# Cutting.


def test_trim_cuts_ends_and_shortens_pauses():
    first, second, third = (0.5 * tone(hertz, seconds) for hertz, seconds in ((200, 0.5), (300, 0.4), (400, 0.3)))
    audio = np.concatenate([silence(1), first, silence(0.2), second, silence(1.5), third, silence(0.7)])
    trimmed = synthesizers.trim(audio, RATE)
    # 40 ms stay on every side of a sound, a short pause stays, the long one is at most 0.3 s and those 40 ms.
    assert len(trimmed) / RATE == pytest.approx(0.04 + 0.5 + 0.2 + 0.4 + 0.38 + 0.3 + 0.04, abs=0.011)
    begin, joint = round(0.04 * RATE), round(1.14 * RATE)
    np.testing.assert_array_equal(trimmed[begin:joint], audio[RATE : RATE + joint - begin])
    np.testing.assert_array_equal(trimmed[-len(third) - begin : -begin], third)
    assert np.abs(trimmed[: begin - 1]).max() == 0
    assert np.abs(trimmed[-begin + 1 :]).max() == 0
    shorter = synthesizers.trim(audio, RATE, pause=0.05)
    assert len(trimmed) - len(shorter) == pytest.approx((0.07 + 0.25) * RATE, abs=0.011 * RATE)


def test_trim_takes_faint_noise_for_silence_and_soft_speech_for_speech():
    rng = np.random.default_rng(0)
    noise = (0.35 * 10 ** (-50 / 20) * rng.standard_normal(RATE)).astype(np.float32)
    loud, soft = 0.5 * tone(200, 0.5), 0.5 * 10 ** (-40 / 20) * tone(200, 0.5)
    trimmed = synthesizers.trim(np.concatenate([noise, loud, soft, noise]), RATE)
    assert len(trimmed) / RATE == pytest.approx(1.08, abs=0.011)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100])
def test_trim_at_any_rate(rate: int):
    audio = np.concatenate([np.zeros(rate, np.float32), tone(200, 0.5, rate), np.zeros(rate, np.float32)])
    assert len(synthesizers.trim(audio, rate)) / rate == pytest.approx(0.58, abs=0.011)


@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.025, 0.05, 0.085])
@pytest.mark.parametrize("around", [0.0, 0.02, 1.0])
def test_trim_keeps_a_short_sound(seconds: float, around: float):
    sound = 0.5 * tone(1000, seconds)
    trimmed = synthesizers.trim(np.concatenate([silence(around), sound, silence(around)]), RATE)
    assert np.sum(trimmed**2) == pytest.approx(np.sum(sound**2), rel=1e-5)
    assert len(trimmed) / RATE <= seconds + 0.1


@pytest.mark.parametrize("samples", [0, 1, 1000, 16_000])
def test_trim_leaves_nothing_of_silence(samples: int):
    assert synthesizers.trim(np.zeros(samples, np.float32), RATE).shape == (0,)


# Varying.


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.3, 2.0])
def test_shift(ratio: float):
    shifted = synthesizers.shift(tone(500, 1), ratio)
    assert shifted.dtype == np.float32
    assert len(shifted) == pytest.approx(RATE / ratio, abs=1)
    assert highest(shifted, RATE) == pytest.approx(500 * ratio, rel=1e-3)


def test_shift_by_nothing_changes_nothing():
    audio = tone(500, 0.1)
    assert synthesizers.shift(audio, 1.0) is audio


def test_level_is_rms_unless_the_peak_forbids():
    audio = np.random.default_rng(0).uniform(-1, 1, 10_000).astype(np.float32)
    assert decibels(synthesizers.level(audio, -23)) == pytest.approx(-23, abs=1e-3)
    audio[5] = -60
    limited = synthesizers.level(audio, -20)
    assert limited.min() == pytest.approx(-0.98, rel=1e-6)
    np.testing.assert_allclose(limited / limited[5], audio / -60, atol=1e-6)
    assert limited.dtype == np.float32


@pytest.mark.parametrize("color", [-1.0, 0.0, 1.0, 2.0])
def test_noise_falls_by_its_color(color: float):
    made = synthesizers.noise(np.random.default_rng(1), 200_000, RATE, color)
    assert (made.shape, made.dtype) == ((200_000,), np.float32)
    assert decibels(made) == pytest.approx(0, abs=1e-3)
    power = np.abs(np.fft.rfft(made)) ** 2
    frequencies = np.fft.rfftfreq(len(made), 1 / RATE)

    def density(low: float, high: float) -> float:
        return float(10 * np.log10(power[(frequencies >= low) & (frequencies < high)].mean()))

    # Three octaves apart; below 50 Hz flat.
    assert density(200, 220) - density(1600, 1760) == pytest.approx(color * 10 * np.log10(8), abs=1.2)
    assert density(2, 20) == pytest.approx(density(25, 50), abs=1.5)


@pytest.mark.parametrize("directness", [3.0, 18.0])
def test_room_is_direct_sound_and_a_tail_that_dies(directness: float):
    response = synthesizers.room(np.random.default_rng(2), RATE, 0.5, directness)
    assert (response.shape, response.dtype) == ((8000,), np.float32)
    assert response[0] == 1
    assert 10 * np.log10(np.sum(response[1:].astype(float) ** 2)) == pytest.approx(-directness, abs=0.01)
    # 60 dB in half a second, so 30 from one quarter second to the next; the early reflections are over by 40 ms.
    assert decibels(response[1000:3000]) - decibels(response[5000:7000]) == pytest.approx(30, abs=1)
    assert not response[1:30].any()


def test_augment_is_decided_by_its_seed():
    audio = 0.1 * tone(200, 0.5)
    first, drawn = augment(audio, RATE, 7)
    again, same = augment(audio, RATE, 7)
    np.testing.assert_array_equal(first, again)
    assert drawn == same
    others = [augment(audio, RATE, seed) for seed in (8, [7, 1], [8, 1])]
    assert len({drawn["stretch"], *(other["stretch"] for _, other in others)}) == 4
    assert decibels(audio) == pytest.approx(-23, abs=0.1), "what is given is not written to"


def test_augment_draws_within_its_ranges_as_often_as_it_should():
    settings = Augmentation()
    audio = 0.1 * tone(200, 0.2)
    draws = []
    for seed in range(300):
        sound, drawn = augment(audio, RATE, seed)
        draws.append(drawn)
        assert sound.dtype == np.float32
        assert len(sound) == pytest.approx(len(audio) / drawn["stretch"], abs=1)
        assert np.abs(sound).max() <= 0.98 + 1e-6
        if np.abs(sound).max() < 0.979:
            assert decibels(sound) == pytest.approx(drawn["level"], abs=0.01)
    for name in ("stretch", "reverberation", "directness", "snr", "low_cut", "high_cut", "level"):
        low, high = getattr(settings, name)
        values = [drawn[name] for drawn in draws if name in drawn]
        assert low <= min(values) < low + 0.1 * (high - low), name
        assert high >= max(values) > high - 0.1 * (high - low), name
    assert {drawn["color"] for drawn in draws if "color" in drawn} == set(settings.colors)
    for chance, names in {
        0.4: ("reverberation", "directness"),
        0.7: ("snr", "color"),
        0.3: ("low_cut", "high_cut"),
    }.items():
        for name in names:
            assert sum(name in drawn for drawn in draws) / 300 == pytest.approx(chance, abs=0.09), name


def test_augment_with_nothing_but_the_level():
    audio = 0.3 * tone(200, 0.5)
    sound, drawn = augment(audio, RATE, 0, PLAIN)
    assert drawn == {"stretch": 1.0, "level": -20.0}
    np.testing.assert_allclose(sound, audio * 10 ** (-20 / 20) / np.sqrt(0.045), rtol=1e-4, atol=1e-7)


def test_augment_adds_noise_as_far_below_as_drawn():
    settings = Augmentation(**{**vars(PLAIN), "noise_chance": 1, "snr": (12.0, 12.0), "colors": (0.0,)})
    audio = 0.1 * tone(200, 2)
    sound, drawn = augment(audio, RATE, 0, settings)
    assert drawn["snr"] == 12
    speech_part = audio * (sound @ audio) / (audio @ audio)
    assert decibels(speech_part) - decibels(sound - speech_part) == pytest.approx(12, abs=0.1)


def test_augment_puts_the_voice_into_a_room():
    settings = Augmentation(**{**vars(PLAIN), "room_chance": 1, "reverberation": (0.3, 0.3), "directness": (6.0, 6.0)})
    click = np.concatenate([silence(0.1), np.ones(1, np.float32), silence(0.5)])
    sound, _ = augment(click, RATE, 0, settings)
    begin = round(0.1 * RATE)
    echo = sound / sound[begin]
    assert np.abs(echo[:begin]).max() < 1e-5
    assert 10 * np.log10(np.sum(echo[begin + 1 :] ** 2)) == pytest.approx(-6, abs=0.1)
    assert np.abs(echo[begin + round(0.3 * RATE) + 1 :]).max() < 1e-5


def test_augment_takes_out_lows_and_highs():
    settings = Augmentation(
        **{**vars(PLAIN), "band_chance": 1, "low_cut": (300.0, 300.0), "high_cut": (3000.0, 3000.0)}
    )
    pitches = (75, 300, 1000, 3000, 6000)
    sound, _ = augment(np.sum([0.1 * tone(hertz, 2) for hertz in pitches], axis=0), RATE, 0, settings)
    levels = {hertz: 20 * np.log10(amplitude(sound, hertz) / amplitude(sound, 1000)) for hertz in pitches}
    # Half the power at the cuts; from there 12 dB an octave below and 24 dB above.
    assert levels[300] == pytest.approx(-3, abs=0.1)
    assert levels[3000] == pytest.approx(-3, abs=0.1)
    assert levels[75] == pytest.approx(-24, abs=0.3)
    assert levels[6000] == pytest.approx(-24, abs=0.3)


@pytest.mark.parametrize("samples", [0, 100])
def test_augment_refuses_silence(samples: int):
    with pytest.raises(SynthesisError, match=f"expected sound to vary, found {samples} samples of silence"):
        augment(np.zeros(samples, np.float32), RATE, 0)
