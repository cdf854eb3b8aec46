"""Small suites in the layouts of the published benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni_jax.errors import ConfigError
from omni_jax.evaluation import suites
from omni_jax.evaluation.suites import Case, RecordedTurn
from omni_jax.inference.request import Turn
from omni_jax.tasks import Task
from tests.data.test_sources import librispeech, put, tone


def test_manifest(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "audio": "a.wav", "expected": "Seven.", "question": "What is it?"},
        {"id": "b", "audio": "b.wav", "task": "A1T1", "expected": ["x", "y"], "group": "g"},
        {"id": "c", "text": "Hello"},
    ]
    put(tmp_path / "m.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert suites.read("manifest", tmp_path / "m.jsonl") == [
        Case("a", Task.A1A2, tmp_path / "a.wav", "", ("Seven.",), "What is it?"),
        Case("b", Task.A1T1, tmp_path / "b.wav", "", ("x", "y"), "", "g"),
        Case("c", Task.T1A2, None, "Hello"),
    ]


def test_manifest_with_a_history(tmp_path: Path) -> None:
    turns = [{"question": "Hi?", "answer": "Yes."}, {"audio": "a/b.wav", "question": "What is it?", "answer": "Seven."}]
    row = {"id": "a", "text": "And now?", "task": "T1T2", "system": "Your name is Bob.", "history": turns}
    pairs = {"id": "b", "text": "And?", "task": "T1T2", "system": None, "history": [["Hi?", "Yes."]]}
    none = {"id": "c", "text": "d", "history": None}
    put(tmp_path / "m.jsonl", "\n".join(map(json.dumps, (row, pairs, none))))
    case, in_pairs, without = suites.read("manifest", tmp_path / "m.jsonl")
    assert (in_pairs.history, without.history) == ((Turn("Hi?", "Yes."),), ())
    first, second = case.history
    assert (case.system, first) == ("Your name is Bob.", Turn("Hi?", "Yes."))
    assert second == RecordedTurn("What is it?", "Seven.", audio=tmp_path / "a" / "b.wav")
    request = case.request()
    assert (request.system, request.history) == ("Your name is Bob.", case.history)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: expected a JSON object"),
        ("[]", "line 1: "),
        ('{"id": "a", "color": 1}', "line 1: color: Unexpected"),
        ('{"id": 1, "text": "b"}', "line 1: id: Input should be a valid string, found 1"),
        ('{"id": "a", "text": "b", "expected": 12}', r"line 1: expected.*, found 12"),
        ('{"id": "a"}', "expected either audio or text, found neither"),
        ('{"id": "a", "audio": "a", "text": "b"}', "found both"),
        ('{"id": "a", "text": "b", "task": "sing"}', "task: expected one of"),
        ('{"id": "a", "text": "b", "task": "A1T1"}', "task A1T1: expected audio"),
        ('{"id": "a", "text": "b", "history": [{"reply": "c"}]}', r"line 1: history\.0\.reply: Unexpected"),
        ('{"id": "a", "text": "b", "history": "c"}', "line 1: history: Input should be a valid list"),
        ('{"id": "a", "text": "b", "task": "T1A1", "system": "c"}', "line 1: system: expected none for task T1A1"),
        ('{"id": "a", "text": "b"}\n{"id": "a", "text": "c"}', "found 'a' twice"),
        ("", "found no case"),
    ],
)
def test_manifest_refuses_bad_lines(tmp_path: Path, line: str, message: str) -> None:
    put(tmp_path / "m.jsonl", line)
    with pytest.raises(ConfigError, match=message):
        suites.read("manifest", tmp_path / "m.jsonl")


def test_librispeech(tmp_path: Path) -> None:
    librispeech(tmp_path)
    cases = suites.read("librispeech", tmp_path / "dev-clean")
    assert [case.id for case in cases] == ["84-121123-0000", "84-121123-0001"]
    assert cases[0].expected == ("Go do you hear.",)
    assert cases[0].task is Task.A1T1
    assert isinstance(cases[0].audio, Path)
    assert cases[0].audio.is_file()


def test_voicebench(tmp_path: Path) -> None:
    sound = {"bytes": tone(0.3, 16_000), "path": "a.wav"}
    (tmp_path / "sd-qa").mkdir()
    (tmp_path / "alpacaeval").mkdir()
    rows = [{"prompt": "Who?", "reference": "Ann", "audio": sound}, {"prompt": "When?", "reference": "", "audio": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sd-qa" / "usa-00000-of-00001.parquet")
    open_ended = [{"prompt": "Tell me.", "audio": sound}]
    pq.write_table(pa.Table.from_pylist(open_ended), tmp_path / "alpacaeval" / "test-00000-of-00001.parquet")
    cases = suites.read("voicebench", tmp_path)
    assert [(case.group, case.question, case.expected) for case in cases] == [
        ("alpacaeval", "Tell me.", ()),
        ("sd-qa", "Who?", ("Ann",)),
        ("sd-qa", "When?", ()),
    ]
    assert [len(case.audio) > 0 for case in cases if isinstance(case.audio, bytes)] == [True, True, False]


def test_uro_bench(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "source_wav": "audio/1.wav", "source_text": "Sum?", "target_text": ["7", "seven"]},
        {"id": 2, "source_wav": "audio/2.wav", "source_text": "Say hi."},
    ]
    put(tmp_path / "basic" / "gsm8k_test" / "test.jsonl", "\n".join(map(json.dumps, rows)))
    cases = suites.read("uro_bench", tmp_path)
    assert [(case.id, case.expected) for case in cases] == [
        ("gsm8k_test-0000", ("7", "seven")),
        ("gsm8k_test-0001", ()),
    ]
    assert cases[0].audio == tmp_path / "basic" / "gsm8k_test" / "audio" / "1.wav"


def test_open_audio_bench(tmp_path: Path) -> None:
    put(tmp_path / "llama_questions" / "llama_questions.csv", "Questions,Answer,audio_filename\nWhat?,Seven,0.wav\n")
    put(tmp_path / "web_questions" / "web_questions.csv", "question,answers,audio_filename\nWho?,Ann;Anna ,1.wav\n")
    header = "question,answer_normalized_value,answer_normalized_aliases,audio_filename\n"
    put(tmp_path / "trivia_qa" / "trivia_qa.csv", header + 'Where?,rome,"rome,roma",2.wav\n')
    cases = suites.read("open_audio_bench", tmp_path)
    assert {case.id: case.expected for case in cases} == {
        "llama_questions-0000": ("Seven",),
        "trivia_qa-0000": ("rome", "roma"),
        "web_questions-0000": ("Ann", "Anna"),
    }
    assert cases[0].audio == tmp_path / "llama_questions" / "audios" / "0.wav"
    put(tmp_path / "web_questions" / "web_questions.csv", "question,answers\nWho?,Ann\n")
    with pytest.raises(ConfigError, match="expected the column audio_filename"):
        suites.read("open_audio_bench", tmp_path)


def test_read_refuses_missing_suites(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        suites.read("manifest", tmp_path / "none")
    put(tmp_path / "test.jsonl", '{"source_text": "a"}')
    with pytest.raises(ConfigError, match="expected a uro_bench suite, found KeyError"):
        suites.read("uro_bench", tmp_path)
