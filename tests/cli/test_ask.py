from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from omni_jax.api import Omni
from omni_jax.audio.encoding import encode
from omni_jax.cli.app import app
from omni_jax.cli.console import printable
from tests.cli.shell import NAME, QUESTIONS, ROOT, STEPS, SUM, command, run, shell


def test_ask_prints_text_and_writes_audio(
    tiny: Omni, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("ask", NAME, "--model", "tiny", "--max-steps", STEPS)
    expected = tiny.reply(NAME, max_steps=STEPS)
    assert result.exit_code == 0, result.output
    assert result.stdout == printable(expected.text) + "\n"
    assert "omni-jax: note: the model 'tiny' is untrained" in result.stderr
    assert "Warning" not in result.stderr
    assert "first audio after" in result.stderr
    assert "stopped at --max-steps" in result.stderr
    sound, rate = soundfile.read(tmp_path / "answer.wav", dtype="float32")
    assert soundfile.info(tmp_path / "answer.wav").subtype == "PCM_16"
    assert (rate, sound.shape) == (24_000, (5 * 2048,))
    assert expected.audio is not None
    np.testing.assert_allclose(sound, np.clip(expected.audio, -1, 1), atol=1e-4)


def test_ask_json(tiny: Omni, loads: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.wav"
    result = run("ask", SUM, "--model", "tiny", "--max-steps", STEPS, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    expected = tiny.reply(SUM, max_steps=STEPS)
    assert answer.pop("tokens") == expected.tokens.tolist()
    measured = {name: answer.pop(name) for name in list(answer) if name in {
        "first_token_seconds", "first_audio_seconds", "total_seconds", "steps_per_second", "real_time_factor"
    }}  # fmt: skip
    assert answer == {
        "text": expected.text,
        "task": "A1A2",
        "model": "tiny",
        "trained": False,
        "finish_reason": "length",
        "steps": STEPS,
        "num_invalid_codes": expected.num_invalid_codes,
        "question_seconds": soundfile.info(SUM).duration,
        "answer_seconds": expected.seconds,
        "out": str(out),
    }
    assert 0 < measured["first_token_seconds"] <= measured["first_audio_seconds"] <= measured["total_seconds"]
    assert measured["steps_per_second"] == pytest.approx(STEPS / measured["total_seconds"])
    assert measured["real_time_factor"] == pytest.approx(measured["total_seconds"] / expected.seconds)
    assert out.is_file()


@pytest.mark.parametrize("task", ["A1T2", "A1T1", "T1A2", "T1T2", "t1a1"])
def test_ask_every_task(task: str, loads: list[str], tmp_path: Path) -> None:
    out = tmp_path / "answer.wav"
    question = [NAME] if task[0] == "A" else ["--text", "What is your name?"]
    outputs_audio = task in ("T1A2", "t1a1")
    where = ["--out", out] if outputs_audio else []
    result = run("ask", *question, "--task", task, "--model", "tiny", "--max-steps", 9, *where, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["task"] == task.upper()
    assert len(answer["tokens"]) == 8
    assert (answer["question_seconds"] is None) == (task[0] != "A")
    assert out.exists() == outputs_audio
    silent = ("answer_seconds", "out", "first_audio_seconds", "real_time_factor")
    assert [answer[name] is None for name in silent] == [not outputs_audio] * 4


def test_ask_passes_every_option(tiny: Omni, loads: list[str], tmp_path: Path) -> None:
    options = ["--temperature", 0.9, "--top-k", 5, "--top-p", 0.8, "--seed", 3]
    switches = ["--no-batch-parallel", "--no-enforce-delay"]
    result = run(
        "ask", NAME, "--model", "tiny", "--max-steps", 9, "--json", "--out", tmp_path / "a.wav", *options, *switches
    )
    expected = tiny.reply(
        NAME,
        max_steps=9,
        temperature=0.9,
        top_k=5,
        top_p=0.8,
        seed=3,
        batch_parallel=False,
        enforce_delay=False,
    )
    assert json.loads(result.stdout)["tokens"] == expected.tokens.tolist()


def test_ask_truncates_only_if_asked(loads: list[str], tmp_path: Path) -> None:
    long = tmp_path / "long.flac"
    soundfile.write(long, np.sin(np.arange(3 * 8000) / 9).astype(np.float32) / 2, 8000)
    refused = run("ask", long, "--model", "tiny", "--task", "A1T2")
    assert refused.exit_code == 2
    assert f"{long}: expected a recording of at most 2.00 s, found 3.00 s" in refused.stderr
    assert "truncate" in refused.stderr
    truncated = run("ask", long, "--model", "tiny", "--task", "A1T2", "--max-steps", 3, "--truncate", "--json")
    assert json.loads(truncated.stdout)["question_seconds"] == 3


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no sound at all " * 50)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000, np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    (tmp_path / "cut_off.flac").write_bytes(encode(np.sin(np.arange(16000)) / 2, 16000, "flac")[:12_000])
    return tmp_path


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("none.wav", "found no such file"),
        (".", "found a folder"),
        ("empty.wav", "empty file"),
        ("text.wav", "cannot be decoded"),
        ("silent.wav", "found silence"),
        ("nan.wav", "NaN or infinity"),
        ("cut_off.flac", "damaged or cut"),
    ],
)
def test_ask_refuses_a_bad_recording_before_loading(file: str, message: str, bad_files: Path, loads: list[str]) -> None:
    result = run("ask", bad_files / file, "--model", "tiny")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"omni-jax: {bad_files / file}: expected")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not loads, "the file is read before the model"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected either audio or text, found neither"),
        ([NAME, "--text", "hello"], "found both"),
        ([NAME, "--task", "T1A2"], "task T1A2: expected text, found audio"),
        (["--text", "hello", "--task", "A1A2"], "task A1A2: expected audio, found text"),
        (["--text", "hello", "--task", "T2A1"], "Invalid value for '--task'"),
        (["--text", "", "--model", "tiny"], "text: expected some text with a letter or a digit, found none"),
        (["--text", "hello " * 100, "--model", "tiny"], "at most the context of 192"),
        (["--text", "hello", "--task", "T1T2", "--out", "a.wav"], "answers in text only"),
        (["--text", "hello", "--out", "no/such/folder/a.wav"], "found no folder"),
        (["--text", "hello", "--out", "."], "found a folder"),
        ([NAME, "--out", NAME], "another file than the question"),
        (["--text", "hello", "--out", "a.midi"], "ends in .wav, .flac, .mp3, .ogg, .opus, .aac, .m4a, found .midi"),
        (["--text", "hello", "--out", "a"], "found no suffix"),
        (["--text", "hello", "--max-steps", 0], "Invalid value for '--max-steps'"),
        (["--text", "hello", "--temperature", -1], "Invalid value for '--temperature'"),
        (["--text", "hello", "--temperature", "nan"], "Invalid value for '--temperature'"),
        (["--text", "hello", "--top-k", -1], "Invalid value for '--top-k'"),
        (["--text", "hello", "--top-p", 2], "Invalid value for '--top-p'"),
        (["--text", "hello", "--top-p", 0, "--model", "tiny"], "top_p: expected"),
        (["--text", "hello", "--seed", -1], "Invalid value for '--seed'"),
        (["--text", "hello", "--codec", "opus"], "Invalid value for '--codec'"),
        (["--text", "hello", "--model", "no-such-model"], "no-such-model: expected"),
        (["--text", "hello", "--model", str(QUESTIONS)], "config.json"),
        (["--text", "hello", "--loud"], "No such option"),
    ],
)
def test_ask_refuses_bad_usage(args: list[object], message: str, loads: list[str]) -> None:
    result = run("ask", *args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_ask_reads_standard_input_and_writes_by_suffix(tiny: Omni, tmp_path: Path) -> None:
    out = tmp_path / "answer.mp3"
    args = ["ask", "-", "--model", "tiny", "--max-steps", str(STEPS), "--out", str(out), "--json"]
    result = CliRunner().invoke(app, args, input=NAME.read_bytes())
    assert result.exit_code == 0, result.output
    expected = run("ask", NAME, "--model", "tiny", "--max-steps", STEPS, "--out", tmp_path / "a.wav", "--json")
    assert json.loads(result.stdout)["tokens"] == json.loads(expected.stdout)["tokens"]
    assert soundfile.info(out).format == "MP3"


def test_ask_names_a_missing_extra(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **_: Any) -> Any:
        from omni_jax.codec import torch_snac

        return torch_snac.import_snac()

    monkeypatch.setitem(sys.modules, "snac", None)
    monkeypatch.setattr(Omni, "from_pretrained", load)
    result = run("ask", "--text", "hello", "--codec", "torch")
    assert result.exit_code == 2
    assert "omni-jax[torch]" in result.stderr


def test_ask_does_not_hide_bugs(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Omni, "from_pretrained", lambda *_, **__: 1 / 0)
    assert isinstance(run("ask", "--text", "hello").exception, ZeroDivisionError)


@pytest.mark.slow
def test_ask_in_a_process(tiny: Omni, tmp_path: Path) -> None:
    out = tmp_path / "answer.wav"
    result = shell("ask", NAME, "--model", "tiny", "--max-steps", STEPS, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["tokens"] == tiny.reply(NAME, max_steps=STEPS).tokens.tolist()
    assert all(line.startswith("omni-jax: ") for line in result.stderr.splitlines())
    assert soundfile.info(out).duration == pytest.approx(answer["answer_seconds"])


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.5])
def test_ask_interrupted_ends_at_once_without_a_traceback(seconds: float) -> None:
    args = command("ask", "--text", "hello", "--model", "tiny", "--task", "T1T2")
    # A shell lets background processes ignore SIGINT, which children inherit; a handler is not inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    assert "loading" in process.stderr.readline()
    time.sleep(seconds)  # into the imports, or into the making of the model
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert all(line.startswith("omni-jax:") for line in rest.splitlines())
