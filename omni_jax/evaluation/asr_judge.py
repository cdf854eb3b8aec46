"""Who listens to spoken answers: an independent recognizer, so that a voice that nobody understands does not pass."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any, Protocol

from omni_jax.errors import ConfigError


class AsrJudge(Protocol):
    """A recognizer."""

    name: str

    def hear(self, path: Path) -> str:
        """What is said in a wav file."""


class FasterWhisperJudge:
    """Whisper by CTranslate2 (pip install faster-whisper): a model's name, or the folder of a converted one."""

    def __init__(self, model: str):
        try:
            from faster_whisper import WhisperModel
        except ImportError:
            raise ConfigError("listener faster-whisper: pip install faster-whisper") from None
        self.name = f"faster-whisper {Path(model).name}"
        try:
            self._model: Any = WhisperModel(model, device="auto", compute_type="int8")
        except Exception as error:
            raise ConfigError(f"listener faster-whisper={model}: expected a model, found {error}") from None

    def hear(self, path: Path) -> str:
        """See `Listener.hear`; greedy, in English."""
        segments, _ = self._model.transcribe(
            str(path), language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False
        )
        return "".join(segment.text for segment in segments).strip()


class CommandJudge:
    """Any program that prints what it hears: `command=whisper-cli -np {audio}`."""

    def __init__(self, template: str):
        self._words = shlex.split(template)
        if not any("{audio}" in word for word in self._words):
            raise ConfigError(f"listener command: expected {{audio}} in it, found {template!r}")
        self.name = Path(self._words[0]).name

    def hear(self, path: Path) -> str:
        """See `Listener.hear`."""
        words = [word.replace("{audio}", str(path)) for word in self._words]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ConfigError(f"listener command: expected to run {words[0]}, found {error.strerror}") from None
        if done.returncode:
            raise ConfigError(
                f"listener command: expected success, found exit code {done.returncode}: {done.stderr[-300:]}"
            )
        return done.stdout.strip()


def parse_judge(text: str) -> AsrJudge | None:
    """Read `none`, `faster-whisper=MODEL` or `command=PROGRAM {audio}`.

    Raises:
        ConfigError: it is none of these, or what it needs is not there.
    """
    name, _, detail = text.partition("=")
    if text == "none":
        return None
    if name == "faster-whisper" and detail:
        return FasterWhisperJudge(detail)
    if name == "command" and detail:
        return CommandJudge(detail)
    raise ConfigError(f"listener: expected none, faster-whisper=MODEL or command=PROGRAM {{audio}}, found {text!r}")
