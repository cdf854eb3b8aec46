from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import soundfile

from omni_jax.api import Omni
from omni_jax.errors import UntrainedWarning
from tests.cli.shell import DAY, NAME, ROOT, STEPS, SUM, command, read_lines, run, with_devices, write_lines


def test_batch_answers_in_order(tiny: Omni, loads: list[str], tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "q.wav").write_bytes(NAME.read_bytes())
    (tmp_path / "broken.wav").write_text("this is no sound")
    rows: list[Any] = [
        {"id": "spoken", "audio": "sounds/q.wav"},
        {"id": "broken", "audio": "broken.wav"},
        {"id": "typed/1", "text": "What is your name?", "max_steps": 4, "temperature": 1, "seed": 9},
        {"id": "spoken", "text": "Again?"},
        {"id": "both", "text": "x", "audio": "sounds/q.wav"},
        {"id": "written", "audio": "sounds/q.wav", "task": "A1T2", "batch_parallel": False},
        {"id": "misfit", "text": "x", "task": "A1T2"},
        {"id": "unknown", "text": "x", "tusk": "T1T2", "seed": "one"},
        {"id": "range", "text": "x", "top_p": 7},
        {"text": "nameless"},
        ["no", "object"],
        {"id": "aloud", "text": "good day", "task": "T1A1"},
        {"id": "surrogate", "text": "\ud83d"},
        {"id": "unnamed", "audio": ""},
        {"id": "no path", "audio": "a\0b.wav"},
    ]
    manifest = write_lines(tmp_path / "rows.jsonl", rows)
    manifest.write_text(manifest.read_text() + '\n{"id": "half", "te\n')
    out = tmp_path / "answers"
    args = ("batch", manifest, "--out", out, "--model", "tiny", "--max-steps", STEPS, "--max-batch-size", 1)
    result = run(*args)
    assert result.exit_code == 1, result.output
    assert "16 rows: 4 answered, 0 from an earlier run, 12 failed" in result.stderr

    lines = read_lines(out / "answers.jsonl")
    assert [line["id"] for line in lines] == [
        "spoken", "broken", "typed/1", "spoken", "both", "written", "misfit", "unknown", "range", None, None, "aloud",
        "surrogate", "unnamed", "no path", None,
    ]  # fmt: skip
    errors = {index: line["error"] for index, line in enumerate(lines) if "error" in line}
    assert errors.keys() == {1, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15}
    assert "broken.wav: expected audio" in errors[1]
    assert errors[3] == "rows.jsonl line 4: id 'spoken' was used before, by rows.jsonl line 1"
    assert "expected either audio or text, found both" in errors[4]
    assert "task A1T2: expected audio, found text" in errors[6]
    assert "tusk" in errors[7]
    assert "line 8: seed" in errors[7]
    assert "top_p: expected" in errors[8]
    assert "line 10: id" in errors[9]
    assert "line 11" in errors[10]
    assert errors[12] == "text: expected whole characters, found half of one at 0"
    assert "expected a recording, found a folder" in errors[13]
    assert "line 15: audio: expected the path of a file, found 'a\\x00b.wav'" in errors[14]
    assert "line 17: expected a JSON object" in errors[15]

    spoken = tiny.reply(NAME, max_steps=STEPS)
    assert lines[0] == {
        "id": "spoken",
        "task": "A1A2",
        "text": spoken.text,
        "audio": "spoken.wav",
        "seconds": round(spoken.seconds, 4),
        "finish_reason": "length",
        "num_invalid_codes": spoken.num_invalid_codes,
        "request": lines[0]["request"],
    }
    assert lines[2]["text"] == tiny.reply(text=rows[2]["text"], max_steps=4, temperature=1, seed=9).text
    assert lines[5]["text"] == tiny.answer(NAME, max_steps=STEPS).text
    assert (lines[5]["audio"], lines[5]["seconds"]) == (None, None)
    names = {line["audio"] for line in lines if line.get("audio")}
    assert names == {path.name for path in out.glob("*.wav")} == {"spoken.wav", "aloud.wav", lines[2]["audio"]}
    assert lines[2]["audio"].startswith("typed_1-")
    assert spoken.audio is not None
    assert soundfile.info(out / "spoken.wav").frames == len(spoken.audio)

    # After the bad rows are corrected, only they are answered, in their places.
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.wav")}
    (tmp_path / "broken.wav").write_bytes(SUM.read_bytes())
    write_lines(manifest, [rows[0], rows[1], rows[2], rows[5], rows[11]])
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert "5 rows: 1 answered, 4 from an earlier run, 0 failed" in result.stderr
    again = read_lines(out / "answers.jsonl")
    assert [line["id"] for line in again] == ["spoken", "broken", "typed/1", "written", "aloud"]
    assert [again[0], *again[2:]] == [lines[0], lines[2], lines[5], lines[11]]
    assert {path: path.stat().st_mtime_ns for path in made} == made

    # The model is not loaded if no row needs it; a row that changed or whose wav is missing is answered again.
    loads.clear()
    assert run(*args).exit_code == 0
    assert not loads
    (out / "aloud.wav").unlink()
    write_lines(manifest, [rows[0], {**rows[5], "task": "A1T1"}, rows[11]])
    result = run(*args)
    assert "3 rows: 2 answered, 1 from an earlier run, 0 failed" in result.stderr
    assert read_lines(out / "answers.jsonl") == [again[0], {**again[3], "task": "A1T1"} | {
        name: read_lines(out / "answers.jsonl")[1][name] for name in ("text", "finish_reason", "request")
    }, again[4]]  # fmt: skip


def test_batch_that_cannot_start_leaves_earlier_answers(loads: list[str], tmp_path: Path) -> None:
    manifest = write_lines(tmp_path / "rows.jsonl", [{"id": "a", "text": "x", "task": "T1T2"}])
    args = ("batch", manifest, "--out", tmp_path / "out", "--max-steps", 3)
    assert run(*args, "--model", "tiny").exit_code == 0
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    for mistaken in (["--model", "no-such-model"], ["--model", "tiny", "--top-p", 0]):
        assert run(*args, *mistaken).exit_code == 2
        assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before


def test_batch_answers_again_if_the_recording_or_the_release_changed(
    tiny_release: Path, loads: list[str], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_release, tmp_path / "model")
    manifest = write_lines(tmp_path / "rows.jsonl", [{"id": "a", "audio": "a.wav"}, {"id": "b", "text": "x"}])
    sound, rate = soundfile.read(NAME)
    soundfile.write(tmp_path / "a.wav", sound, rate)
    args = ("batch", manifest, "--out", tmp_path / "out", "--model", model, "--max-steps", 3, "--max-batch-size", 1)
    assert "2 answered, 0 from an earlier run" in run(*args).stderr
    # A copy elsewhere, with other dates, is the same.
    shutil.copytree(model, tmp_path / "copy")
    assert "0 answered, 2 from an earlier run" in run(*args, "--model", tmp_path / "copy").stderr
    soundfile.write(tmp_path / "a.wav", sound[::-1], rate)
    assert "1 answered, 1 from an earlier run" in run(*args).stderr
    state = safetensors.numpy.load_file(model / "model.safetensors")
    state["trunk.layers.1.mlp.down.weight"] *= 1.01
    safetensors.numpy.save_file(state, model / "model.safetensors")
    assert "2 answered, 0 from an earlier run" in run(*args).stderr


@pytest.mark.parametrize("option", ["int8", "short_windows"])
def test_batch_answers_again_with_another_option(tiny: Omni, loads: list[str], option: str, tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"id": "a", "text": "hello", "task": "T1T2"}\n')
    args = ("batch", manifest, "--out", tmp_path / "out", "--model", "tiny", "--max-steps", STEPS)
    flag = f"--{option.replace('_', '-')}"
    for more in ((), (flag,), (flag,)):
        result = run(*args, *more)
        assert result.exit_code == 0, result.output
    # The second run with the option has nothing to do.
    assert loads == ["tiny", "tiny"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        other = Omni.untrained("tiny", int8=option == "int8", short_windows=option == "short_windows")
    answer = json.loads((tmp_path / "out" / "answers.jsonl").read_text())
    assert answer["text"] == other.answer(text="hello", max_steps=STEPS).text


def test_batch_of_a_folder(loads: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b.wav", "a.wav", "a.WAV.wav"):
        (folder / name).write_bytes(NAME.read_bytes())
    soundfile.write(folder / "a.flac", soundfile.read(NAME)[0], 16000)
    (folder / "notes.txt").touch()
    options = ("--model", "tiny", "--task", "A1T2", "--max-steps", 3, "--max-batch-size", 2)
    result = run("batch", folder, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    lines = read_lines(tmp_path / "out" / "answers.jsonl")
    assert [line["id"] for line in lines] == ["a.WAV", "a.flac", "a.wav", "b"]
    assert {line["task"] for line in lines} == {"A1T2"}
    same = run("batch", folder, "--out", folder, "--model", "tiny")
    assert same.exit_code == 2
    assert "another output folder" in same.stderr


def test_batch_never_overwrites_a_question(loads: list[str], tmp_path: Path) -> None:
    question = tmp_path / "q.wav"
    question.write_bytes(NAME.read_bytes())
    rows = [{"id": "a", "audio": "q.wav", "task": "A1T1"}, {"id": "q", "text": "x"}]
    manifest = write_lines(tmp_path / "rows.jsonl", rows)
    result = run("batch", manifest, "--out", tmp_path, "--model", "tiny", "--max-steps", 3, "--max-batch-size", 1)
    assert result.exit_code == 1
    assert "would replace the recording" in read_lines(tmp_path / "answers.jsonl")[1]["error"]
    assert question.read_bytes() == NAME.read_bytes()


@pytest.mark.parametrize(
    ("source", "args", "message"),
    [
        ("none.jsonl", [], "expected a manifest or a folder, found no such file"),
        ("empty.jsonl", [], "found an empty file"),
        ("bare", [], "expected recordings"),
        ("good.jsonl", ["--top-p", 0], "top_p: expected"),
        ("good.jsonl", ["--max-batch-size", 0], "Invalid value for '--max-batch-size'"),
        ("good.jsonl", ["--out", "good.jsonl"], "expected a folder to write to"),
        ("good.jsonl", ["--model", "no-such-model"], "no-such-model: expected"),
    ],
)
def test_batch_that_cannot_start(
    source: str, args: list[Any], message: str, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("bare").mkdir()
    write_lines(Path("good.jsonl"), [{"id": "a", "text": "x"}])
    result = run("batch", source, "--out", "out", "--model", "tiny", *args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_batch_is_shared_by_processes_of_several_devices(loads: list[str], tmp_path: Path) -> None:
    """One of two processes fails and is started again; each has four devices, of which two share a row."""
    rows = [{"id": f"q{number}", "text": f"question {number}", "task": "T1A2"} for number in range(9)]
    rows[4] = {"id": "spoken", "audio": str(NAME)}
    rows[7] = {"id": "q0", "text": "not mine"}
    manifest, out, whole = write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out", tmp_path / "whole"
    options = ("--model", "tiny", "--max-steps", STEPS, "--max-batch-size", 4)
    assert run("batch", manifest, "--out", whole, *options).exit_code == 1
    expected = read_lines(whole / "answers.jsonl")

    def process(number: int, *more: object) -> subprocess.Popen[str]:
        args = ("batch", manifest, "--out", out, *options, "--tensor", 2, "--processes", 2, "--process", number)
        return subprocess.Popen(command(*args, *more), stderr=subprocess.PIPE, text=True, cwd=ROOT, env=with_devices(4))

    failing, second = process(0, "--temperature", -1), process(1)
    assert "temperature" in failing.communicate(timeout=240)[1]
    assert "4 rows: 3 answered, 0 from an earlier run, 1 failed" in second.communicate(timeout=240)[1]
    first, again = process(0), process(1)
    assert "5 rows: 5 answered, 0 from an earlier run, 0 failed" in first.communicate(timeout=240)[1]
    assert "4 rows: 0 answered, 3 from an earlier run, 1 failed" in again.communicate(timeout=240)[1]
    assert [process.returncode for process in (failing, second, first, again)] == [2, 1, 0, 1]
    assert read_lines(out / "answers-00000-of-00002.jsonl") == expected[0::2]
    assert read_lines(out / "answers-00001-of-00002.jsonl") == expected[1::2]
    assert {path.name for path in out.glob("*.wav")} == {path.name for path in whole.glob("*.wav")}

    for wrong, message in (
        (("--processes", 3, "--process", 0), "expected answers of 3 processes or none, found answers-00000-of-00002"),
        (("--processes", 2), "expected --process below --processes, found None and 2"),
        (("--processes", 2, "--process", 2), "found 2 and 2"),
        (("--processes", 2, "--process", 0, "--tensor", 2), "--tensor: expected a divisor of the 1 local devices"),
    ):
        refused = run("batch", manifest, "--out", out, *options, *wrong, "--seed", 1)
        assert refused.exit_code == 2
        assert message in refused.stderr


@pytest.mark.slow
def test_batch_resumes_after_a_kill(tiny: Omni, loads: list[str], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(18):
        ask = {"audio": str((NAME, SUM, DAY)[number % 3])} if number % 2 else {"text": f"question {number}"}
        rows.append({"id": f"q{number:02}", **ask, "seed": number, "temperature": 0.5 * (number % 3)})
    manifest = write_lines(tmp_path / "rows.jsonl", rows)
    options = ("--model", "tiny", "--max-steps", STEPS, "--max-batch-size", 1)
    whole = tmp_path / "whole"
    assert run("batch", manifest, "--out", whole, *options).exit_code == 0

    out = tmp_path / "killed"
    answers = out / "answers.jsonl"
    process = subprocess.Popen(
        command("batch", manifest, "--out", out, *options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=with_devices(1),
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if answers.exists() and answers.read_bytes().count(b"\n") >= 3:
                break
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    survived = [line for line in answers.read_bytes().split(b"\n")[:-1] if line]
    assert 3 <= len(survived) < len(rows)
    # Such a half line is what a kill in the middle of a write leaves.
    with answers.open("ab") as file:
        file.write(answers.read_bytes()[:40])

    result = run("batch", manifest, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert f"18 rows: {18 - len(survived)} answered, {len(survived)} from an earlier run" in result.stderr
    assert answers.read_bytes() == (whole / "answers.jsonl").read_bytes()
    names = sorted(path.name for path in whole.glob("*.wav"))
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "answers.jsonl"])
    for name in names:
        one, other = (soundfile.read(folder / name, dtype="int16")[0].astype(int) for folder in (whole, out))
        # The codec decodes rows in groups whose sizes differ; its rounding may, by one step of 16 bit.
        np.testing.assert_allclose(one, other, atol=1, rtol=0)
