"""The ASR judge: an independent speech recognizer that transcribes spoken answers, to measure intelligibility."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any, Protocol

from omni_jax.errors import ConfigError, MissingExtraError


class AsrJudge(Protocol):
    """A speech recognizer."""

    name: str

    def transcribe(self, path: Path) -> str:
        """The words spoken in a wav file."""


NUMERALS = frozenset("0123456789%$£€")
"""Characters that stand for words."""


class FasterWhisperJudge:
    """Whisper by CTranslate2, in English, numbers in words. Needs `pip install faster-whisper`.

    Left to itself it writes "32-20 is 12", which nothing can turn back into the words that were spoken.
    """

    def __init__(self, model: str):
        """Load a model.

        Args:
            model: its name, such as `base.en`, or the folder of a converted one.

        Raises:
            MissingExtraError: the package is not installed.
            ConfigError: there is no such model.
        """
        try:
            from faster_whisper import WhisperModel
        except ImportError:
            raise MissingExtraError("ASR judge faster-whisper", package="faster-whisper") from None
        self.name = f"faster-whisper {Path(model).name}"
        try:
            self._model: Any = WhisperModel(model, device="auto", compute_type="int8")
        except Exception as error:
            raise ConfigError(f"ASR judge faster-whisper={model}: expected a model, found {error}") from None
        vocabulary = self._model.hf_tokenizer.get_vocab()
        # -1 stands for the tokens that Whisper never outputs.
        self._suppressed = [-1, *sorted(number for token, number in vocabulary.items() if NUMERALS & set(token))]

    def transcribe(self, path: Path) -> str:
        """See `AsrJudge.transcribe`."""
        segments, _ = self._model.transcribe(
            str(path),
            language="en",
            beam_size=5,
            temperature=0.0,
            condition_on_previous_text=False,
            suppress_tokens=self._suppressed,
        )
        return "".join(segment.text for segment in segments).strip()


class CommandJudge:
    """A program that prints the transcript: `command=whisper-cli -np {audio}`."""

    def __init__(self, template: str):
        """Take a command line.

        Args:
            template: as for a shell; `{audio}` stands for the path of the wav file.

        Raises:
            ConfigError: there is no `{audio}` in it.
        """
        self._words = shlex.split(template)
        if not any("{audio}" in word for word in self._words):
            raise ConfigError(f"ASR judge command: expected {{audio}} in it, found {template!r}")
        self.name = Path(self._words[0]).name

    def transcribe(self, path: Path) -> str:
        """See `AsrJudge.transcribe`.

        Raises:
            ConfigError: the program does not run, or fails.
        """
        words = [word.replace("{audio}", str(path)) for word in self._words]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ConfigError(f"ASR judge command: expected to run {words[0]}, found {error.strerror}") from None
        if done.returncode:
            raise ConfigError(
                f"ASR judge command: expected success, found exit code {done.returncode}: {done.stderr[-300:]}"
            )
        return done.stdout.strip()


def parse_judge(text: str) -> AsrJudge | None:
    """Read `none`, `faster-whisper=MODEL` or `command=PROGRAM {audio}`.

    Raises:
        ConfigError: it is none of these, or there is no such model.
        MissingExtraError: the package faster-whisper is not installed.
    """
    name, _, detail = text.partition("=")
    if text == "none":
        return None
    if name == "faster-whisper" and detail:
        return FasterWhisperJudge(detail)
    if name == "command" and detail:
        return CommandJudge(detail)
    raise ConfigError(f"ASR judge: expected none, faster-whisper=MODEL or command=PROGRAM {{audio}}, found {text!r}")
