import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import soundfile
from typer.testing import CliRunner, Result

import omni_jax
from omni_jax import cli
from omni_jax.api import Omni
from omni_jax.errors import ConfigError, UntrainedWarning

ROOT = Path(omni_jax.__file__).parents[1]
QUESTIONS = Path(omni_jax.__file__).parent / "assets" / "questions"
NAME, SUM, DAY = (QUESTIONS / f"{name}.wav" for name in ("name", "sum", "day"))
STEPS = 12
"""Enough for the layers' delays and a few frames."""


@pytest.fixture(scope="module")
def tiny() -> Omni:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        return Omni.untrained("tiny")


@pytest.fixture
def loads(tiny: Omni, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`Omni.load("tiny")` gives the model at hand, which has its programs compiled; the names asked for."""
    real, names = Omni.load, []

    def load(name: str, *, codec: Any = "jax", int8: bool = False, mesh: Any = None) -> Omni:
        names.append(name)
        if name != "tiny" or codec != "jax" or int8 or mesh:
            return real(name, codec=codec, int8=int8, mesh=mesh)
        warnings.warn("the model 'tiny' is untrained", UntrainedWarning, stacklevel=2)
        return tiny

    monkeypatch.setattr(Omni, "load", load)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    return names


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], prog_name="omni-jax")


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "omni_jax.cli", *map(str, args)]


def shell(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=120, cwd=ROOT)


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process that has so many devices."""
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={count}")}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- ask


def test_ask_prints_the_text_and_writes_the_sound(
    tiny: Omni, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("ask", NAME, "--model", "tiny", "--max-steps", STEPS)
    expected = tiny.reply(NAME, max_steps=STEPS)
    assert result.exit_code == 0, result.output
    assert result.stdout == cli.printable(expected.text) + "\n"
    assert "omni-jax: note: the model 'tiny' is untrained" in result.stderr
    assert "Warning" not in result.stderr
    assert "first sound after" in result.stderr
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
        "first_token_seconds", "first_sound_seconds", "total_seconds", "steps_per_second", "real_time_factor"
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
    assert 0 < measured["first_token_seconds"] <= measured["first_sound_seconds"] <= measured["total_seconds"]
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
    silent = ("answer_seconds", "out", "first_sound_seconds", "real_time_factor")
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


def test_ask_cuts_when_told_to(loads: list[str], tmp_path: Path) -> None:
    long = tmp_path / "long.flac"
    soundfile.write(long, np.sin(np.arange(3 * 8000) / 9).astype(np.float32) / 2, 8000)
    refused = run("ask", long, "--model", "tiny", "--task", "A1T1")
    assert refused.exit_code == 2
    assert f"{long}: expected a recording of at most 2.00 s, found 3.00 s" in refused.stderr
    assert "--cut" in refused.stderr
    heard = run("ask", long, "--model", "tiny", "--task", "A1T1", "--max-steps", 3, "--cut", "--json")
    assert json.loads(heard.stdout)["question_seconds"] == 3


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no sound at all " * 50)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000, np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    (tmp_path / "cut_off.wav").write_bytes(NAME.read_bytes()[:5000])
    return tmp_path


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("none.wav", "there is no such file"),
        (".", "found a directory"),
        ("empty.wav", "empty file"),
        ("text.wav", "libsndfile cannot decode"),
        ("silent.wav", "found silence"),
        ("nan.wav", "NaN or infinity"),
        ("cut_off.wav", "ends early"),
    ],
)
def test_a_bad_recording_is_one_sentence(file: str, said: str, bad_files: Path, loads: list[str]) -> None:
    result = run("ask", bad_files / file, "--model", "tiny")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"omni-jax: {bad_files / file}: expected")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not loads, "the file is read before the model"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "expected either a recording or --text, found neither"),
        ([NAME, "--text", "hello"], "found both"),
        ([NAME, "--task", "T1A2"], "task T1A2: expected --text, found a recording"),
        (["--text", "hello", "--task", "A1A2"], "task A1A2: expected a recording, found --text"),
        (["--text", "hello", "--task", "T2A1"], "Invalid value for '--task'"),
        (["--text", "", "--model", "tiny"], "text: expected some text, found none"),
        (["--text", "hello " * 100, "--model", "tiny"], "at most the context of 192"),
        (["--text", "hello", "--task", "T1T2", "--out", "a.wav"], "answers in text only"),
        (["--text", "hello", "--out", "no/such/folder/a.wav"], "found no folder"),
        (["--text", "hello", "--out", "."], "found a folder"),
        ([NAME, "--out", NAME], "another file than the question"),
        (["--text", "hello", "--max-steps", 0], "Invalid value for '--max-steps'"),
        (["--text", "hello", "--temperature", -1], "Invalid value for '--temperature'"),
        (["--text", "hello", "--temperature", "nan"], "Invalid value for '--temperature'"),
        (["--text", "hello", "--top-k", -1], "Invalid value for '--top-k'"),
        (["--text", "hello", "--top-p", 2], "Invalid value for '--top-p'"),
        (["--text", "hello", "--top-p", 0, "--model", "tiny"], "top_p: expected"),
        (["--text", "hello", "--seed", -1], "Invalid value for '--seed'"),
        (["--text", "hello", "--codec", "opus"], "Invalid value for '--codec'"),
        (["--text", "hello", "--model", "no-such-model"], "no-such-model: expected"),
        (["--text", "hello", "--model", str(QUESTIONS)], "config.yaml"),
        (["--text", "hello", "--loud"], "No such option"),
    ],
)
def test_bad_usage_is_exit_code_2(args: list[object], said: str, loads: list[str]) -> None:
    result = run("ask", *args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_the_torch_codec_needs_its_extra(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **_: Any) -> Omni:
        from omni_jax.codec import torch_snac

        return torch_snac.import_snac()

    monkeypatch.setitem(sys.modules, "snac", None)
    monkeypatch.setattr(Omni, "load", load)
    result = run("ask", "--text", "hello", "--codec", "torch")
    assert result.exit_code == 2
    assert "pip install omni-jax[torch]" in result.stderr


def test_our_own_faults_are_not_hidden(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Omni, "load", lambda *_, **__: 1 / 0)
    assert isinstance(run("ask", "--text", "hello").exception, ZeroDivisionError)


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert cli.printable("a\x1b[2Jb\tc\nd\x85é") == "a\ufffd[2Jb\tc\nd\ufffdé"


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("omni-jax ")


# ---- demo


def test_demo_asks_every_recording(
    tiny: Omni, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "DEMO_STEPS", STEPS)
    result = run("demo", "--model", "tiny", "--out", tmp_path / "new" / "demo")
    assert result.exit_code == 0, result.output
    assert "untrained" in result.stderr
    blocks = [block.splitlines() for block in result.stdout.strip().split("\n\n")]
    assert [block[0].split(",")[0] for block in blocks] == ["day.wav", "name.wav", "sum.wav"]
    for block in blocks:
        assert [line.split()[0] for line in block[-4:]] == ["heard:", "answered:", "spoken:", "timings:"]
    expected = tiny.reply(SUM, max_steps=STEPS)
    sound, _ = soundfile.read(tmp_path / "new" / "demo" / "sum.wav", dtype="float32")
    assert expected.audio is not None
    np.testing.assert_allclose(sound, np.clip(expected.audio, -1, 1), atol=1e-4)
    (tmp_path / "file").touch()
    refused = run("demo", "--model", "tiny", "--out", tmp_path / "file")
    assert (refused.exit_code, "--out" in refused.stderr) == (2, True)


# ---- batch


def test_batch_answers_in_order(tiny: Omni, loads: list[str], tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "q.wav").write_bytes(NAME.read_bytes())
    (tmp_path / "broken.wav").write_text("this is no sound")
    rows: list[Any] = [
        {"id": "heard", "audio": "sounds/q.wav"},
        {"id": "broken", "audio": "broken.wav"},
        {"id": "typed/1", "text": "What is your name?", "max_steps": 4, "temperature": 1, "seed": 9},
        {"id": "heard", "text": "Again?"},
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
    args = ("batch", manifest, "--out", out, "--model", "tiny", "--max-steps", STEPS, "--slots", 1)
    result = run(*args)
    assert result.exit_code == 1, result.output
    assert "16 rows: 4 answered, 0 from an earlier run, 12 failed" in result.stderr

    lines = read_lines(out / "answers.jsonl")
    assert [line["id"] for line in lines] == [
        "heard", "broken", "typed/1", "heard", "both", "written", "misfit", "unknown", "range", None, None, "aloud",
        "surrogate", "unnamed", "no path", None,
    ]  # fmt: skip
    errors = {index: line["error"] for index, line in enumerate(lines) if "error" in line}
    assert errors.keys() == {1, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15}
    assert "broken.wav: expected audio" in errors[1]
    assert errors[3] == "rows.jsonl line 4: id 'heard' was used before, by rows.jsonl line 1"
    assert "expected either audio or text, found both" in errors[4]
    assert "task A1T2: expected audio, found text" in errors[6]
    assert "tusk" in errors[7]
    assert "line 8: seed" in errors[7]
    assert "top_p: expected" in errors[8]
    assert "line 10: id" in errors[9]
    assert "line 11" in errors[10]
    assert errors[12] == "text: expected whole characters, found half of one at 0"
    assert "expected a recording, found a directory" in errors[13]
    assert "line 15: audio: expected the path of a file, found 'a\\x00b.wav'" in errors[14]
    assert "line 17: expected a JSON object" in errors[15]

    heard = tiny.reply(NAME, max_steps=STEPS)
    assert lines[0] == {
        "id": "heard",
        "task": "A1A2",
        "text": heard.text,
        "audio": "heard.wav",
        "seconds": round(heard.seconds, 4),
        "finish_reason": "length",
        "num_invalid_codes": heard.num_invalid_codes,
        "request": lines[0]["request"],
    }
    assert lines[2]["text"] == tiny.reply(text=rows[2]["text"], max_steps=4, temperature=1, seed=9).text
    assert lines[5]["text"] == tiny.answer(NAME, max_steps=STEPS).text
    assert (lines[5]["audio"], lines[5]["seconds"]) == (None, None)
    names = {line["audio"] for line in lines if line.get("audio")}
    assert names == {path.name for path in out.glob("*.wav")} == {"heard.wav", "aloud.wav", lines[2]["audio"]}
    assert lines[2]["audio"].startswith("typed_1-")
    assert heard.audio is not None
    assert soundfile.info(out / "heard.wav").frames == len(heard.audio)

    # Once the bad rows are mended, only they are asked, and take their places.
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.wav")}
    (tmp_path / "broken.wav").write_bytes(SUM.read_bytes())
    write_lines(manifest, [rows[0], rows[1], rows[2], rows[5], rows[11]])
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert "5 rows: 1 answered, 4 from an earlier run, 0 failed" in result.stderr
    again = read_lines(out / "answers.jsonl")
    assert [line["id"] for line in again] == ["heard", "broken", "typed/1", "written", "aloud"]
    assert [again[0], *again[2:]] == [lines[0], lines[2], lines[5], lines[11]]
    assert {path: path.stat().st_mtime_ns for path in made} == made

    # With nothing to do the model is not even loaded; a row that changed or lost its wav is asked again.
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


def test_a_run_that_cannot_start_leaves_earlier_answers(loads: list[str], tmp_path: Path) -> None:
    manifest = write_lines(tmp_path / "rows.jsonl", [{"id": "a", "text": "x", "task": "T1T2"}])
    args = ("batch", manifest, "--out", tmp_path / "out", "--max-steps", 3)
    assert run(*args, "--model", "tiny").exit_code == 0
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    for mistaken in (["--model", "no-such-model"], ["--model", "tiny", "--top-p", 0]):
        assert run(*args, *mistaken).exit_code == 2
        assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before


def test_another_sound_or_model_under_the_same_name_is_asked_again(
    tiny_release: Path, loads: list[str], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_release, tmp_path / "model")
    manifest = write_lines(tmp_path / "rows.jsonl", [{"id": "a", "audio": "a.wav"}, {"id": "b", "text": "x"}])
    sound, rate = soundfile.read(NAME)
    soundfile.write(tmp_path / "a.wav", sound, rate)
    args = ("batch", manifest, "--out", tmp_path / "out", "--model", model, "--max-steps", 3, "--slots", 1)
    assert "2 answered, 0 from an earlier run" in run(*args).stderr
    # A copy elsewhere, with other dates, is the same.
    shutil.copytree(model, tmp_path / "copy")
    assert "0 answered, 2 from an earlier run" in run(*args, "--model", tmp_path / "copy").stderr
    soundfile.write(tmp_path / "a.wav", sound[::-1], rate)
    assert "1 answered, 1 from an earlier run" in run(*args).stderr
    state = safetensors.numpy.load_file(model / "model.safetensors")
    state["trunk.layers.1.mlp.down"] *= 1.01
    safetensors.numpy.save_file(state, model / "model.safetensors")
    assert "2 answered, 0 from an earlier run" in run(*args).stderr


def test_a_batch_in_eight_bits_answers_anew(tiny: Omni, loads: list[str], tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"id": "a", "text": "hello", "task": "T1T2"}\n')
    asked = ("batch", manifest, "--out", tmp_path / "out", "--model", "tiny", "--max-steps", STEPS)
    for more in ((), ("--int8",), ("--int8",)):
        result = run(*asked, *more)
        assert result.exit_code == 0, result.output
    # The second run in eight bits has nothing to do.
    assert loads == ["tiny", "tiny"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        rounded = Omni.untrained("tiny", int8=True)
    answer = json.loads((tmp_path / "out" / "answers.jsonl").read_text())
    assert answer["text"] == rounded.answer(text="hello", max_steps=STEPS).text


def test_batch_of_a_folder(loads: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b.wav", "a.wav", "a.WAV.wav"):
        (folder / name).write_bytes(NAME.read_bytes())
    soundfile.write(folder / "a.flac", soundfile.read(NAME)[0], 16000)
    (folder / "notes.txt").touch()
    options = ("--model", "tiny", "--task", "A1T2", "--max-steps", 3, "--slots", 2)
    result = run("batch", folder, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    lines = read_lines(tmp_path / "out" / "answers.jsonl")
    assert [line["id"] for line in lines] == ["a.WAV", "a.flac", "a.wav", "b"]
    assert {line["task"] for line in lines} == {"A1T2"}
    same = run("batch", folder, "--out", folder, "--model", "tiny")
    assert same.exit_code == 2
    assert "another folder" in same.stderr


def test_an_answer_never_replaces_a_question(loads: list[str], tmp_path: Path) -> None:
    question = tmp_path / "q.wav"
    question.write_bytes(NAME.read_bytes())
    rows = [{"id": "a", "audio": "q.wav", "task": "A1T1"}, {"id": "q", "text": "x"}]
    manifest = write_lines(tmp_path / "rows.jsonl", rows)
    result = run("batch", manifest, "--out", tmp_path, "--model", "tiny", "--max-steps", 3, "--slots", 1)
    assert result.exit_code == 1
    assert "would replace the recording" in read_lines(tmp_path / "answers.jsonl")[1]["error"]
    assert question.read_bytes() == NAME.read_bytes()


@pytest.mark.parametrize(
    ("source", "args", "said"),
    [
        ("none.jsonl", [], "expected a manifest or a folder, found No such file"),
        ("empty.jsonl", [], "found an empty file"),
        ("bare", [], "expected recordings"),
        ("good.jsonl", ["--top-p", 0], "top_p: expected"),
        ("good.jsonl", ["--slots", 0], "Invalid value for '--slots'"),
        ("good.jsonl", ["--out", "good.jsonl"], "expected a folder to write to"),
        ("good.jsonl", ["--model", "no-such-model"], "no-such-model: expected"),
    ],
)
def test_a_batch_that_cannot_start(
    source: str, args: list[Any], said: str, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("bare").mkdir()
    write_lines(Path("good.jsonl"), [{"id": "a", "text": "x"}])
    result = run("batch", source, "--out", "out", "--model", "tiny", *args)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr


# ---- as real processes


def test_help_does_not_wait_for_jax() -> None:
    code = "import sys, omni_jax.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_ask_in_a_process(tiny: Omni, tmp_path: Path) -> None:
    out = tmp_path / "answer.wav"
    result = shell("ask", NAME, "--model", "tiny", "--max-steps", STEPS, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["tokens"] == tiny.reply(NAME, max_steps=STEPS).tokens.tolist()
    assert all(line.startswith("omni-jax: ") for line in result.stderr.splitlines())
    assert soundfile.info(out).duration == pytest.approx(answer["answer_seconds"])


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.5])
def test_interrupted_is_130_for_the_shell_without_a_word(seconds: float) -> None:
    args = command("ask", "--text", "hello", "--model", "tiny", "--task", "T1T2")
    # Tests that a shell runs in the background are deaf to SIGINT, which is inherited; a handler is not.
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


def test_a_batch_is_shared_by_processes_of_several_chips(loads: list[str], tmp_path: Path) -> None:
    """One of two processes fails and is started again; each has four chips, of which two share a row."""
    rows = [{"id": f"q{number}", "text": f"question {number}", "task": "T1A2"} for number in range(9)]
    rows[4] = {"id": "heard", "audio": str(NAME)}
    rows[7] = {"id": "q0", "text": "not mine"}
    manifest, out, whole = write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out", tmp_path / "whole"
    options = ("--model", "tiny", "--max-steps", STEPS, "--slots", 4)
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

    for wrong, said in (
        (("--processes", 3, "--process", 0), "expected answers of 3 processes or none, found answers-00000-of-00002"),
        (("--processes", 2), "expected --process below --processes, found None and 2"),
        (("--processes", 2, "--process", 2), "found 2 and 2"),
        (("--processes", 2, "--process", 0, "--tensor", 2), "--tensor: expected a divisor of the 1 chips"),
    ):
        refused = run("batch", manifest, "--out", out, *options, *wrong, "--seed", 1)
        assert refused.exit_code == 2
        assert said in refused.stderr


def test_a_killed_batch_goes_on_where_it_stopped(tiny: Omni, loads: list[str], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(18):
        ask = {"audio": str((NAME, SUM, DAY)[number % 3])} if number % 2 else {"text": f"question {number}"}
        rows.append({"id": f"q{number:02}", **ask, "seed": number, "temperature": 0.5 * (number % 3)})
    manifest = write_lines(tmp_path / "rows.jsonl", rows)
    options = ("--model", "tiny", "--max-steps", STEPS, "--slots", 1)
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


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli._keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ  # tests have virtual devices
    monkeypatch.delenv("XLA_FLAGS")
    cli._keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "omni_jax" / "compiled")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    cli._keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == ""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cli._keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_ids_that_differ_in_case_have_files_of_their_own() -> None:
    rows = [cli.Row(id, "", given=cli.ManifestRow(id, text="x")) for id in ("A", "a")]
    assert len({row.wav.casefold() for row in cli._distinct(rows)}) == 2


def test_options_of_a_cluster() -> None:
    assert cli._beam(None, 2, None) is None
    assert cli._beam("DataflowRunner", 2, ["--project=p"]) == ["--runner=DataflowRunner", "--project=p"]
    assert cli._beam("DirectRunner", 1, None) == ["--runner=DirectRunner", "--direct_num_workers=1"]
    assert "--direct_running_mode=multi_processing" in (cli._beam("DirectRunner", 2, None) or ())
    with pytest.raises(ConfigError, match="expected --runner before options for it, found --project=p"):
        cli._beam(None, 2, ["--project=p"])
