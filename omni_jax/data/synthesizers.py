"""Giving text a voice: text-to-speech engines behind one interface, and what a room and a microphone do to a voice.

An engine turns text into samples in one of its voices. What it needs is looked for when it is first used, so that
this module can be imported where no engine is installed. `trim` takes out what synthesizers leave of silence,
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
from omni_jax.errors import SynthesisError

SPEED = (0.5, 2.0)
"""Slowest and fastest, where 1 is the voice's own pace."""


PITCH = (-12.0, 12.0)
"""Lowest and highest, in semitones from the voice's own pitch."""


class SpeechSynthesizer(Protocol):
    """A synthesizer."""

    name: str
    """In front of its voices' names wherever voices of several engines are listed."""

    def voices(self) -> list[str]:
        """The voices that can speak English, in a fixed order.

        Raises:
            SynthesisError: what the engine needs is not installed.
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
            SynthesisError: what the engine needs is not installed, there is no such voice, the text is blank, speed
                or pitch out of range, or no sound comes out.
        """
        ...


class ESpeak:
    """espeak-ng, a formant synthesizer: a dozen accents of English times a hundred variants of the voice.

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
    """Flite, Carnegie Mellon's small synthesizer, and the voices built into it (kal, awb, rms, slt)."""

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
        return change_speed(samples, ratio), rate

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
        return change_speed(_sounding(self, text, samples), ratio), int(model.sample_rate)

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
        samples = audio_io.from_pcm16(np.frombuffer(model.speak(text), np.int16))
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
            SynthesisError: `{text}` or `{out}` is missing.
        """
        self.words = shlex.split(template)
        if not all(any(f"{{{name}}}" in word for word in self.words) for name in ("text", "out")):
            raise SynthesisError(f"command: expected {{text}} and {{out}} in it, found {template!r}")
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
        return change_speed(samples, ratio if "{speed}" in given else ratio * speed), rate


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
            raise SynthesisError(f"openai: expected sound from {self.url}, found status {error.code}: {said}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise SynthesisError(f"openai: expected a server at {self.url}, found {error}") from None
        samples, rate = _decoded(self, text, data)
        return change_speed(samples, speed * 2.0 ** (pitch / 12)), rate


_ENGINES: Mapping[str, type[ESpeak] | type[Flite] | type[HibariTTS] | type[Pico]] = {
    kind.name: kind for kind in (ESpeak, Flite, HibariTTS, Pico)
}


def open_synthesizer(name: str) -> SpeechSynthesizer:
    """An engine by its name: espeak, flite, hibari or pico.

    Raises:
        SynthesisError: any other name.
    """
    if name not in _ENGINES:
        raise SynthesisError(f"engine: expected {', '.join(_ENGINES)}, found {name!r}")
    return _ENGINES[name]()


@dataclass(frozen=True)
class VoiceSpec:
    """Some voices of an engine, as the command line names them."""

    engine: str
    """espeak, flite, hibari, pico, command or openai."""
    only: tuple[str, ...] = ()
    """These; none: all that it has."""
    detail: str = ""
    """A command's template; a server's address, a space, and its model."""

    @classmethod
    def parse(cls, text: str) -> VoiceSpec:
        """Read `espeak`, `espeak=en-us+f2,en-gb`, `command=TEMPLATE` or `openai=URL MODEL`.

        The last two may end in ` @VOICE,...`.

        Raises:
            SynthesisError: there is no such engine, or something is missing.
        """
        name, _, rest = text.partition("=")
        if name in _ENGINES:
            return cls(name, tuple(filter(None, rest.split(","))))
        detail, _, voices = rest.partition(" @")
        only = tuple(filter(None, voices.split(",")))
        if name == Command.name:
            Command(detail)
        elif name != OpenAISpeech.name or len(detail.split()) != 2:
            raise SynthesisError(
                f"voices: expected {', '.join(_ENGINES)} (perhaps with =VOICE,...), command=TEMPLATE or "
                f"'openai=URL MODEL' (perhaps with ' @VOICE,...'), found {text!r}"
            )
        return cls(name, only, detail)

    def open(self) -> SpeechSynthesizer:
        """The engine.

        Raises:
            SynthesisError: what it needs is not installed.
        """
        if self.engine == Command.name:
            return Command(self.detail, self.only or ("default",))
        if self.engine == OpenAISpeech.name:
            url, model = self.detail.split()
            return OpenAISpeech(url, model, self.only or ("alloy",))
        return open_synthesizer(self.engine)


def _check(
    engine: SpeechSynthesizer, text: str, voice: str, known: Mapping[str, None], speed: float, pitch: float
) -> None:
    """What no engine takes; some would fall back to another voice in silence."""
    if not text.strip():
        raise SynthesisError(f"{engine.name}: text: expected something to say, found {text!r}")
    if voice not in known:
        raise SynthesisError(f"{engine.name}: voice: expected one of its {len(known)} voices, found {voice!r}")
    for name, value, (low, high) in (("speed", speed, SPEED), ("pitch", pitch, PITCH)):
        if not low <= value <= high:
            raise SynthesisError(f"{engine.name}: {name}: expected {low:g} to {high:g}, found {value:g}")


def _imported(engine: SpeechSynthesizer, module: str, package: str) -> Any:
    """A module that an engine needs, or an error that says which package brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SynthesisError(
            f"{engine.name}: expected the package {package}, found none ({error}): pip install {package}"
        ) from None


def _run(command: list[str], text: str, name: str) -> bytes:
    """What a program writes, or an error in words."""
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
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        raise SynthesisError(f"{name}: expected {command[0]} to succeed, found exit code {done.returncode}: {said[0]}")
    return done.stdout


def _decoded(engine: SpeechSynthesizer, text: str, data: bytes) -> tuple[np.ndarray, int]:
    """A wav's samples, mono, and its rate."""
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise SynthesisError(
            f"{engine.name}: expected a wav, found {len(data)} bytes that cannot be decoded: {error.error_string}"
        ) from None
    return _sounding(engine, text, samples.mean(axis=1)), rate


def _sounding(engine: SpeechSynthesizer, text: str, samples: np.ndarray) -> np.ndarray:
    if not np.any(np.abs(samples) > 1e-3):
        raise SynthesisError(f"{engine.name}: expected speech for {text!r}, found {len(samples)} samples of silence")
    return samples
