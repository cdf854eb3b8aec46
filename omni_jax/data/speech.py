"""Giving text a voice: text-to-speech engines behind one interface, and what a room and a microphone do to a voice.

An engine turns text into samples in one of its voices. What it needs is looked for when it is first used, so that
this module can be imported where no engine is installed. `trim` takes out what synthesisers leave of silence,
`augment` makes one clean recording into one of many.
"""

from __future__ import annotations

import http.client
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import soxr

from omni_jax.audio import wav

SPEED = (0.5, 2.0)
"""Slowest and fastest, where 1 is the voice's own pace."""
PITCH = (-12.0, 12.0)
"""Lowest and highest, in semitones from the voice's own pitch."""


class SpeechError(RuntimeError):
    """Text that could not be given a voice: says what was expected and what was found."""


class Engine(Protocol):
    """A synthesiser."""

    name: str
    """In front of its voices' names wherever voices of several engines are listed."""

    def voices(self) -> list[str]:
        """The voices that can speak English, in a fixed order.

        Raises:
            SpeechError: what the engine needs is not installed.
        """
        ...

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """Say a text. The same arguments give the same samples.

        Args:
            text: what to say.
            voice: one of `voices()`.
            speed: the pace, within `SPEED`; 2 takes half as long.
            pitch: semitones up or down, within `PITCH`.

        Returns:
            f32 [samples], within -1..1, and samples per second.

        Raises:
            SpeechError: what the engine needs is not installed, there is no such voice, the text is blank, speed
                or pitch out of range, or no sound comes out.
        """
        ...


class ESpeak:
    """espeak-ng, a formant synthesiser: a dozen accents of English times a hundred variants of the voice.

    A voice is an accent or an accent with a variant, `en-us` or `en-us+f2`. The text goes in and the sound comes
    out through pipes.
    """

    name = "espeak"

    def __init__(self, program: str = "espeak-ng"):
        """Name the program.

        Args:
            program: looked for on PATH.
        """
        self.program = program

    def voices(self) -> list[str]:
        """See `Engine.voices`."""
        return list(self._known)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `Engine.speak`; pitch moves the voice's fundamental and leaves its formants."""
        _check(self, text, voice, self._known, speed, pitch)
        # 175 words a minute is its default pace; its pitch scale of 0..99 has an octave to 50 steps, 50 as designed.
        scale = round(min(max(50 + 50 * pitch / 12, 0), 99))
        command = [self.program, "-v", voice, "-s", str(round(175 * speed)), "-p", str(scale), "--stdin", "--stdout"]
        return _decoded(self, text, _run(command, text, self.name))

    @cached_property
    def _known(self) -> dict[str, None]:
        accents = []
        for line in _run([self.program, "--voices=en"], "", self.name).decode(errors="replace").splitlines()[1:]:
            # Priority, language, age and sex, name, file; files in mb/ need voices of another project.
            columns = line.split()
            if len(columns) >= 5 and not columns[4].startswith("mb/") and columns[1] != "variant":
                accents.append(columns[1])
        listing = _run([self.program, "--voices=variant"], "", self.name).decode(errors="replace")
        variants = sorted(set(re.findall(r"!v/(.+?)\s*(?:\(.*)?$", listing, re.MULTILINE)))
        accents = list(dict.fromkeys(accents))
        return dict.fromkeys([*accents, *(f"{accent}+{variant}" for accent in accents for variant in variants)])


class Flite:
    """Flite, Carnegie Mellon's small synthesiser, and the voices built into it (kal, awb, rms, slt)."""

    name = "flite"

    def __init__(self, program: str = "flite"):
        """Name the program.

        Args:
            program: looked for on PATH.
        """
        self.program = program

    def voices(self) -> list[str]:
        """See `Engine.voices`."""
        return list(self._known)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `Engine.speak`; pitch is moved by resampling, which makes another speaker's throat of it, too."""
        _check(self, text, voice, self._known, speed, pitch)
        ratio = 2.0 ** (pitch / 12)
        with tempfile.TemporaryDirectory() as folder:
            # It seeks in its output, so that a pipe will not do.
            file = Path(folder) / "speech.wav"
            stretch = f"duration_stretch={ratio / speed:.4f}"
            _run([self.program, "-voice", voice, "--setf", stretch, "-t", text, "-o", str(file)], "", self.name)
            samples, rate = _decoded(self, text, file.read_bytes() if file.exists() else b"")
        return shift(samples, ratio), rate

    @cached_property
    def _known(self) -> dict[str, None]:
        listing = _run([self.program, "-lv"], "", self.name).decode(errors="replace")
        names = listing.partition(":")[2].split()
        # awb_time can tell the time and nothing else; kal16 is kal at twice the rate.
        return dict.fromkeys(sorted(set(names) - {"awb_time", "kal" if "kal16" in names else ""}))


class HibariTTS:
    """hibari-tts, a small neural voice, American and female, that carries its weights; 24 kHz.

    Only voices inside the package are offered: others would have to be downloaded.
    """

    name = "hibari"

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def voices(self) -> list[str]:
        """See `Engine.voices`."""
        return list(self._known)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `Engine.speak`; pitch is moved by resampling, which makes another speaker's throat of it, too."""
        _check(self, text, voice, self._known, speed, pitch)
        ratio = 2.0 ** (pitch / 12)
        if voice not in self._loaded:
            self._loaded[voice] = self._module.Hibari(voice=voice)
        model = self._loaded[voice]
        # The seed is of the breath in the voice.
        samples = np.asarray(model(text, speed=speed / ratio, seed=0), np.float32)
        return shift(_sounding(self, text, samples), ratio), int(model.sample_rate)

    @cached_property
    def _module(self) -> Any:
        return _imported(self, "hibari", "hibari-tts")

    @cached_property
    def _known(self) -> dict[str, None]:
        self._module  # noqa: B018 - for its error
        from hibari.voices import VOICES

        return dict.fromkeys(sorted(name for name, about in VOICES.items() if about["bundled"]))


class Pico:
    """SVOX Pico, which spoke in early Android phones, an American and a British woman; 16 kHz. Carries its voices."""

    name = "pico"

    def voices(self) -> list[str]:
        """See `Engine.voices`."""
        return list(self._known)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `Engine.speak`; pitch moves the voice's fundamental and leaves its formants."""
        _check(self, text, voice, self._known, speed, pitch)
        # A second text would sound a little different: what it says depends on what it has said before.
        model = self._module.TtsEngine(voice)
        # Percent; at its own volume loud vowels are cut off.
        model.volume, model.rate, model.pitch = 50, round(100 * speed), round(100 * 2 ** (pitch / 12))
        samples = wav.from_pcm16(np.frombuffer(model.speak(text), np.int16))
        return _sounding(self, text, samples), 16_000

    @cached_property
    def _module(self) -> Any:
        return _imported(self, "ttspico", "ttspico")

    @cached_property
    def _known(self) -> dict[str, None]:
        self._module  # noqa: B018 - for its error
        return dict.fromkeys(("en-GB", "en-US"))


class Command:
    """Any program that writes a recording: `piper --text {text} --out {out}`, with `{voice}` if it has several."""

    name = "command"

    def __init__(self, template: str, voices: Sequence[str] = ("default",)):
        """Take a command line.

        Args:
            template: with `{text}` and `{out}`, the file to write, and perhaps `{voice}`, `{speed}` and `{pitch}`; no
                shell sees it.
            voices: what `{voice}` may be.

        Raises:
            SpeechError: `{text}` or `{out}` is missing.
        """
        self.words = shlex.split(template)
        if not all(any(f"{{{name}}}" in word for word in self.words) for name in ("text", "out")):
            raise SpeechError(f"command: expected {{text}} and {{out}} in it, found {template!r}")
        self._known = dict.fromkeys(voices)

    def voices(self) -> list[str]:
        """See `Engine.voices`."""
        return list(self._known)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `Engine.speak`; a speed or pitch that the command has no place for is made by resampling."""
        _check(self, text, voice, self._known, speed, pitch)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "speech.wav"
            values = {"text": text, "out": str(file), "voice": voice, "speed": f"{speed:g}", "pitch": f"{pitch:g}"}
            words = [re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), word) for word in self.words]
            _run(words, "", self.name)
            samples, rate = _decoded(self, text, file.read_bytes() if file.exists() else b"")
        given = " ".join(self.words)
        ratio = 1.0 if "{pitch}" in given else 2.0 ** (pitch / 12)
        return shift(samples, ratio if "{speed}" in given else ratio * speed), rate


class OpenAISpeech:
    """A server that has OpenAI's `/v1/audio/speech`, ours among them; its key is in `OPENAI_API_KEY`."""

    name = "openai"

    def __init__(self, url: str, model: str, voices: Sequence[str] = ("alloy",), *, seconds: float = 60.0):
        """Name the server.

        Args:
            url: up to and with `/v1`.
            model: to ask for.
            voices: it has.
            seconds: to wait for an answer.
        """
        self.url, self.model, self.seconds = url.rstrip("/"), model, seconds
        self._known = dict.fromkeys(voices)

    def voices(self) -> list[str]:
        """See `Engine.voices`."""
        return list(self._known)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `Engine.speak`; pace and pitch are moved together, by resampling."""
        _check(self, text, voice, self._known, speed, pitch)
        body = {"model": self.model, "voice": voice, "input": text, "response_format": "wav"}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/audio/speech", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as response:
                data = response.read()
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode(errors="replace")
            raise SpeechError(f"openai: expected sound from {self.url}, found status {error.code}: {said}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise SpeechError(f"openai: expected a server at {self.url}, found {error}") from None
        samples, rate = _decoded(self, text, data)
        return shift(samples, speed * 2.0 ** (pitch / 12)), rate


_ENGINES: Mapping[str, type[ESpeak] | type[Flite] | type[HibariTTS] | type[Pico]] = {
    kind.name: kind for kind in (ESpeak, Flite, HibariTTS, Pico)
}


def engine(name: str) -> Engine:
    """An engine by its name: espeak, flite, hibari or pico.

    Raises:
        SpeechError: any other name.
    """
    if name not in _ENGINES:
        raise SpeechError(f"engine: expected {', '.join(_ENGINES)}, found {name!r}")
    return _ENGINES[name]()


@dataclass(frozen=True)
class Voices:
    """Some voices of an engine, as the command line names them."""

    engine: str
    """espeak, flite, hibari, pico, command or openai."""
    only: tuple[str, ...] = ()
    """These; none: all that it has."""
    detail: str = ""
    """A command's template; a server's address, a space, and its model."""

    @classmethod
    def parse(cls, text: str) -> Voices:
        """Read `espeak`, `espeak=en-us+f2,en-gb`, `command=TEMPLATE` or `openai=URL MODEL`.

        The last two may end in ` @VOICE,...`.

        Raises:
            SpeechError: there is no such engine, or something is missing.
        """
        name, _, rest = text.partition("=")
        if name in _ENGINES:
            return cls(name, tuple(filter(None, rest.split(","))))
        detail, _, voices = rest.partition(" @")
        only = tuple(filter(None, voices.split(",")))
        if name == Command.name:
            Command(detail)
        elif name != OpenAISpeech.name or len(detail.split()) != 2:
            raise SpeechError(
                f"voices: expected {', '.join(_ENGINES)} (perhaps with =VOICE,...), command=TEMPLATE or "
                f"'openai=URL MODEL' (perhaps with ' @VOICE,...'), found {text!r}"
            )
        return cls(name, only, detail)

    def open(self) -> Engine:
        """The engine.

        Raises:
            SpeechError: what it needs is not installed.
        """
        if self.engine == Command.name:
            return Command(self.detail, self.only or ("default",))
        if self.engine == OpenAISpeech.name:
            url, model = self.detail.split()
            return OpenAISpeech(url, model, self.only or ("alloy",))
        return engine(self.engine)


def shift(audio: np.ndarray, ratio: float) -> np.ndarray:
    """Play samples faster by a ratio: everything `ratio` times as high and as short.

    Args:
        audio: f32 [samples].
        ratio: 1 changes nothing.
    """
    if abs(ratio - 1) < 1e-4:
        return audio
    # soxr wants rates as numbers of like size; only their quotient counts.
    return np.asarray(soxr.resample(audio, 10_000 * ratio, 10_000.0, quality="HQ"), np.float32)


def trim(audio: np.ndarray, rate: int, *, pause: float = 0.3) -> np.ndarray:
    """Cut the silence off both ends and shorten long pauses inside.

    Silence is what lies 45 dB below the loudest 10 ms, and not within 40 ms of anything louder, so that soft
    beginnings and ends of words stay.

    Args:
        audio: f32 [samples].
        rate: samples per second.
        pause: longest pause that stays, in seconds.

    Returns:
        f32 [samples], empty if there is no sound at all.
    """
    step = rate // 100
    frames = -(-len(audio) // step)
    padded = np.zeros(frames * step, np.float32)
    padded[: len(audio)] = audio
    power = np.mean(np.square(padded.reshape(frames, step)), axis=1)
    if frames == 0 or power.max() <= 0:
        return np.zeros(0, np.float32)
    loud = power > power.max() * 10**-4.5
    # Four frames on each side. numpy's "same" would be longer than a recording of fewer than nine.
    near = np.convolve(loud, np.ones(9))[4:-4] > 0
    keep = np.zeros(frames, bool)
    first, last = np.flatnonzero(near)[[0, -1]]
    longest, silent = round(pause * 100), 0
    for frame in range(first, last + 1):
        silent = 0 if near[frame] else silent + 1
        keep[frame] = silent <= longest
    parts = np.split(padded, np.flatnonzero(np.diff(keep)) * step + step)
    kept = parts[0 if keep[0] else 1 :: 2]
    joined = kept[0]
    for part in kept[1:]:
        joined = _join(joined, part, step)
    return joined


def between_silences(
    audio: np.ndarray, rate: int, wanted: int, before: float, after: float, *, decibels: float | None = None
) -> np.ndarray:
    """Speech as an engine gives it, trimmed, at another rate, with silences of known length around it.

    Args:
        audio: f32 [samples].
        rate: samples per second.
        wanted: of the result.
        before: seconds.
        after: seconds.
        decibels: RMS of the speech in the result, of full scale; None leaves it as loud as it is.
    """
    audio = trim(audio, rate)
    if rate != wanted:
        audio = soxr.resample(audio, rate, wanted, quality="HQ")
    if decibels is not None:
        audio = level(audio, decibels)
    silences = [np.zeros(round(seconds * wanted), np.float32) for seconds in (before, after)]
    return np.concatenate([silences[0], audio, silences[1]])


@dataclass(frozen=True)
class Augmentation:
    """How a clean recording is varied. Every pair is a range to draw from evenly; every `_chance` a probability."""

    stretch: tuple[float, float] = (0.94, 1.06)
    """Played this much faster, pitch and all."""
    room_chance: float = 0.4
    reverberation: tuple[float, float] = (0.1, 0.5)
    """Seconds until the echo has fallen by 60 dB."""
    directness: tuple[float, float] = (3.0, 18.0)
    """Direct sound above the echo, in dB."""
    noise_chance: float = 0.7
    snr: tuple[float, float] = (8.0, 40.0)
    """Speech above the noise, in dB."""
    colors: tuple[float, ...] = (-1.0, 0.0, 1.0, 2.0)
    """Of the noise, whose power falls with this power of the frequency: blue, white, pink, brown."""
    band_chance: float = 0.3
    low_cut: tuple[float, float] = (50.0, 350.0)
    """Hz below which little comes through."""
    high_cut: tuple[float, float] = (3000.0, 7000.0)
    """Hz above which little comes through."""
    level: tuple[float, float] = (-36.0, -16.0)
    """RMS of the result in dB of full scale; less where its peak would pass full scale."""


def augment(
    audio: np.ndarray, rate: int, seed: int | list[int], settings: Augmentation | None = None
) -> tuple[np.ndarray, dict[str, float]]:
    """What a room, its noise and a microphone make of a voice.

    Args:
        audio: f32 [samples], not silent; silence around the speech is where the echo ends.
        rate: samples per second.
        seed: of everything drawn; the same seed gives the same samples.
        settings: the ranges; `Augmentation()` if None.

    Returns:
        f32 [samples] within -1..1, as long as the stretched recording, and what was drawn, by name.

    Raises:
        SpeechError: the recording is silent.
    """
    ranges = settings or Augmentation()
    rng = np.random.default_rng(seed)
    if not np.any(audio):
        raise SpeechError(f"expected sound to vary, found {len(audio)} samples of silence")
    drawn = {"stretch": float(rng.uniform(*ranges.stretch))}
    sound = shift(np.asarray(audio, np.float32), drawn["stretch"])
    if rng.random() < ranges.room_chance:
        drawn["reverberation"] = float(rng.uniform(*ranges.reverberation))
        drawn["directness"] = float(rng.uniform(*ranges.directness))
        sound = _convolve(sound, room(rng, rate, drawn["reverberation"], drawn["directness"]))
    if rng.random() < ranges.noise_chance:
        drawn["snr"] = float(rng.uniform(*ranges.snr))
        drawn["color"] = float(rng.choice(ranges.colors))
        hiss = noise(rng, len(sound), rate, drawn["color"])
        sound = sound + hiss * _rms(sound) * np.float32(10 ** (-drawn["snr"] / 20))
    if rng.random() < ranges.band_chance:
        drawn["low_cut"] = float(rng.uniform(*ranges.low_cut))
        drawn["high_cut"] = float(rng.uniform(*ranges.high_cut))
        sound = _band(sound, rate, drawn["low_cut"], drawn["high_cut"])
    drawn["level"] = float(rng.uniform(*ranges.level))
    return level(sound, drawn["level"]), {name: round(value, 4) for name, value in drawn.items()}


def level(audio: np.ndarray, decibels: float, peak: float = 0.98) -> np.ndarray:
    """Sound at a given RMS.

    Args:
        audio: f32 [samples], not silent.
        decibels: RMS of the result, of full scale.
        peak: if the result would pass this, it is as loud as it can be within.
    """
    gain = min(10 ** (decibels / 20) / float(_rms(audio)), peak / float(np.abs(audio).max()))
    return (audio * np.float32(gain)).astype(np.float32)


def noise(rng: np.random.Generator, samples: int, rate: int, color: float) -> np.ndarray:
    """Noise whose power falls with a power of the frequency (0 white, 1 pink, 2 brown), f32 [samples] of RMS 1.

    Below 50 Hz, where a voice has nothing, it falls no further.
    """
    size = _fast(samples)
    spectrum = np.fft.rfft(rng.standard_normal(size))
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / rate), 50.0)
    colored = np.fft.irfft(spectrum * frequencies ** (-color / 2), size)[:samples]
    return (colored / np.sqrt(np.mean(colored**2))).astype(np.float32)


def room(rng: np.random.Generator, rate: int, reverberation: float, directness: float) -> np.ndarray:
    """A made-up room's impulse response: the sound itself, a few early reflections, a decaying tail of noise.

    Args:
        rng: of the reflections and the tail.
        rate: samples per second.
        reverberation: seconds until the tail has fallen by 60 dB.
        directness: direct sound above all the rest, in dB.

    Returns:
        f32 [samples]; the first sample is the direct sound, 1.
    """
    length = max(round(rate * reverberation), 2)
    times = np.arange(length) / rate
    tail = rng.standard_normal(length) * 10 ** (-3 * times / reverberation)
    tail[: round(0.004 * rate)] = 0
    for delay in rng.uniform(0.002, 0.04, 6):
        tail[min(round(delay * rate), length - 1)] += rng.choice([-1, 1]) * rng.uniform(2, 6)
    tail[0] = 0
    tail *= 10 ** (-directness / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1
    return tail.astype(np.float32)


def _check(engine: Engine, text: str, voice: str, known: Mapping[str, None], speed: float, pitch: float) -> None:
    """What no engine takes; some would fall back to another voice in silence."""
    if not text.strip():
        raise SpeechError(f"{engine.name}: text: expected something to say, found {text!r}")
    if voice not in known:
        raise SpeechError(f"{engine.name}: voice: expected one of its {len(known)} voices, found {voice!r}")
    for name, value, (low, high) in (("speed", speed, SPEED), ("pitch", pitch, PITCH)):
        if not low <= value <= high:
            raise SpeechError(f"{engine.name}: {name}: expected {low:g} to {high:g}, found {value:g}")


def _imported(engine: Engine, module: str, package: str) -> Any:
    """A module that an engine needs, or an error that says which package brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SpeechError(
            f"{engine.name}: expected the package {package}, found none ({error}): pip install {package}"
        ) from None


def _run(command: list[str], text: str, name: str) -> bytes:
    """What a program writes, or an error in words."""
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    except FileNotFoundError:
        raise SpeechError(
            f"{name}: expected the program {command[0]} on PATH, found none; Debian and Ubuntu have it: "
            f"apt-get install {command[0]}"
        ) from None
    except OSError as error:
        raise SpeechError(f"{name}: expected to run {command[0]}, found {error.strerror}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        raise SpeechError(f"{name}: expected {command[0]} to succeed, found exit code {done.returncode}: {said[0]}")
    return done.stdout


def _decoded(engine: Engine, text: str, data: bytes) -> tuple[np.ndarray, int]:
    """A wav's samples, mono, and its rate."""
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise SpeechError(
            f"{engine.name}: expected a wav, found {len(data)} bytes that cannot be decoded: {error.error_string}"
        ) from None
    return _sounding(engine, text, samples.mean(axis=1)), rate


def _sounding(engine: Engine, text: str, samples: np.ndarray) -> np.ndarray:
    if not np.any(np.abs(samples) > 1e-3):
        raise SpeechError(f"{engine.name}: expected speech for {text!r}, found {len(samples)} samples of silence")
    return samples


def _rms(audio: np.ndarray) -> np.float32:
    return np.sqrt(np.mean(np.square(audio, dtype=np.float64))).astype(np.float32)


def _join(a: np.ndarray, b: np.ndarray, overlap: int) -> np.ndarray:
    """One after the other, faded into each other."""
    ramp = np.linspace(0, 1, overlap, dtype=np.float32)
    return np.concatenate([a[:-overlap], a[-overlap:] * (1 - ramp) + b[:overlap] * ramp, b[overlap:]])


def _fast(size: int) -> int:
    """At least `size`, and quick to transform; a prime is ten times slower."""
    return -(-size // 1024) * 1024


def _convolve(audio: np.ndarray, response: np.ndarray) -> np.ndarray:
    """As long as the audio."""
    size = _fast(len(audio) + len(response) - 1)
    spectrum = np.fft.rfft(audio, size) * np.fft.rfft(response, size)
    return np.fft.irfft(spectrum, size)[: len(audio)].astype(np.float32)


def _band(audio: np.ndarray, rate: int, low: float, high: float) -> np.ndarray:
    """Without what lies outside low..high Hz, by the slopes of Butterworth filters of the second and fourth order."""
    # Silence after the end, so that the end does not leak into the beginning.
    size = _fast(len(audio) + rate // 10)
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / rate), 1e-3)
    gain = 1 / np.sqrt((1 + (low / frequencies) ** 4) * (1 + (frequencies / high) ** 8))
    return np.fft.irfft(np.fft.rfft(audio, size) * gain, size)[: len(audio)].astype(np.float32)
