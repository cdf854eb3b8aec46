"""The commands of README and documentation: all are parsed, and those that need no network and no corpus are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from omni_jax.cli.app import load_command
from omni_jax.config.load import load_config
from omni_jax.config.run import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
DOORS = {"train.py": ["train"], "convert_weights.py": ["convert"]}
"""Scripts, and the commands of `omni-jax` that they are."""

NOT_OFFLINE = {
    r"\b(Qwen|openai|hubertsiuzdak|gpt-omni)/": "downloads from the Hugging Face Hub",
    r"VoiceAssistant-400K|LibriSpeech|LibriTTS|OpenOrca|OpenAudioBench": "needs a public corpus",
    r"faster-whisper": "needs a speech recognizer",
    r"hibari|omni-jax synthesize qa\.jsonl": "needs a speech synthesizer of an extra",
    r"\b[A-Z_]{4,}\b": "has a placeholder",
    r"train.* configs/mini_omni_stage\d\.yaml": "trains the published size, on public corpora",
    r"recordings/|rehearsal|runs/lora": "tests/test_own_model.py runs it at a small size",
    r"configs/(finetune|lora|own_stage\d)\.yaml": "tests/test_own_model.py runs it at a small size",
    r"compile train": "takes minutes; tests/compile_report compiles train steps",
    r"build/nano": "needs the data sets of the recipe",
}
"""Commands that are not run, and why."""


def commands(page: str) -> list[list[str]]:
    """The lines of a page's code blocks that call this project, as words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language not in ("", "sh", "bash"):
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = shlex.split(line, comments=True) if re.match(r"(omni-jax|python \w+\.py) ", line) else []
            if words:
                found.append([word.strip("[]") for word in words])
    return found


def arguments(words: list[str]) -> list[str]:
    """What `omni-jax` is called with."""
    return words[1:] if words[0] == "omni-jax" else [*DOORS[words[1]], *words[2:]]


ALL = [(page, words) for page in PAGES for words in commands(page)]


def test_pages_have_commands() -> None:
    assert len(ALL) > 40
    assert {page for page, _ in ALL} >= {"README.md", "docs/cli.md", "docs/training.md", "docs/weights.md"}


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}: {' '.join(words)}" for page, words in ALL])
def test_documented_command_is_parsed(page: str, words: list[str]) -> None:
    name, *rest = arguments(words)
    command: Any = load_command(name)
    context = command.make_context(name, rest)
    if hasattr(command, "commands"):
        sub = command.commands[rest[0]]
        sub.make_context(sub.name, rest[1:], parent=context)


@pytest.mark.parametrize("words", [words for _, words in ALL if arguments(words)[0] == "train"], ids=" ".join)
def test_documented_training_configuration_is_valid(words: list[str]) -> None:
    path, *overrides = [word for word in arguments(words)[1:] if not word.startswith("--")]
    load_config(RunConfig, ROOT / path, overrides)


def test_documented_pod_commands_fit_their_slice() -> None:
    """docs/tpu.md trains on 256 chips: rows must divide over them."""
    lines = re.findall(r"^docs/tpu/train\.sh (.*)$", (ROOT / "docs" / "tpu.md").read_text(), re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        path, *overrides = shlex.split(line, comments=True)
        assert load_config(RunConfig, ROOT / path, overrides).data.batch_size % 256 == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in DOORS:
        shutil.copy(ROOT / name, folder / name)
    nano, questions = ROOT / "omni_jax" / "assets" / "nano", ROOT / "omni_jax" / "assets" / "questions"
    for release in ("my_release", "mini_omni", "releases/mini_omni", "releases/mini_omni_init"):
        shutil.copytree(nano, folder / release)
    for run_folder in ("runs/mini_omni/stage3", "runs/own/stage3"):
        shutil.copytree(nano, folder / run_folder / "release")
        (folder / run_folder / "checkpoints").mkdir()
    shutil.copy(questions / "sum.wav", folder / "question.wav")
    # Whatever its name says, a recording is recognized by its content.
    shutil.copy(questions / "sum.wav", folder / "voice_message.m4a")
    (folder / "keys.txt").write_text("secret\n")
    cases = [{"id": "sum", "audio": "question.wav"}, {"id": "name", "text": "What is your name?"}]
    (folder / "questions.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    exchange = {"question_text": "What is your name?", "question_audio": "question.wav", "answer_text": "Nano."}
    for name in ("manifest.jsonl", "mine.jsonl"):
        (folder / name).write_text(json.dumps({**exchange, "answer_audio": "question.wav"}) + "\n")
    return folder


def run(words: list[str], folder: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(folder / ".cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    if arguments(words)[0] != "serve":
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr[-2000:]}"
        return
    server = subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 300
        while True:
            assert server.poll() is None, server.stderr.read() if server.stderr else ""
            try:
                with urllib.request.urlopen("http://127.0.0.1:8000/healthz", timeout=5) as response:
                    assert response.status == 200
                break
            except urllib.error.URLError:
                assert time.monotonic() < until, "the server does not answer"
                time.sleep(0.5)
    finally:
        server.send_signal(signal.SIGKILL)
        server.communicate()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page == "README.md" else pytest.mark.nightly) for page in PAGES],
)
def test_documented_commands_run_as_printed(page: str, folder: Path) -> None:
    """In the order of the page, as later commands use what earlier ones wrote."""
    for words in commands(page):
        line = " ".join(words)
        if not any(re.search(pattern, line) for pattern in NOT_OFFLINE):
            run(words, folder)
