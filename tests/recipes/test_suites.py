"""Held-out records as suites of `omni-jax evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omni_jax.audio.io import SAMPLE_RATE, read_audio
from omni_jax.data.records import Exchange, PastTurn, RecordWriter
from omni_jax.evaluation.suites import RecordedTurn, manifest
from omni_jax.inference.request import Turn
from omni_jax.tasks import Task
from recipes.nano import suites

pytestmark = pytest.mark.slow

AUDIO = np.random.default_rng(0).integers(-8000, 8000, 16_000).astype(np.int16)
QUESTION = Exchange("What is one plus one?", AUDIO, "One plus one is two.", np.zeros((2, 7), int), "nano sum pair")
FOLLOW_UP = Exchange(
    "And what comes after that?",
    AUDIO,
    "After two comes three.",
    np.zeros((2, 7), int),
    "nano conversation",
    system="Answer the question.",
    history=(PastTurn("What is one plus one?", "One plus one is two."),),
)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two records of every held-out set."""
    sets = {
        "held_out_seen": QUESTION,
        "held_out_unseen": QUESTION,
        "held_out_natural": QUESTION,
        "noise_held_out": Exchange("", AUDIO, "I did not hear that.", np.zeros((2, 7), int), "nano noise"),
        "typos_held_out": Exchange("What is your nmae?", None, "My name is Nano.", source="nano name phrasing"),
        "dictation_seen": Exchange("The cat is red.", AUDIO, source="nano sentence"),
        "dictation_unseen": Exchange("The cat is red.", AUDIO, source="nano sentence"),
        "read_held_out": Exchange("", None, "The dog is blue.", np.zeros((2, 7), int), source="nano sentence"),
        "held_out": Exchange("What is your name?", None, "My name is Nano.", source="nano name phrasing"),
        "conversation_held_out": FOLLOW_UP,
        "conversation_text_held_out": replace(FOLLOW_UP, question_audio=None, answer_codes=None, source="text"),
        "history_held_out": Exchange("What is one plus one?", -AUDIO, source="nano sentence"),
    }
    for name, exchange in sets.items():
        with RecordWriter(tmp_path / "records" / name) as writer:
            for _ in range(2):
                writer.write(exchange)
    return tmp_path / "records"


def test_main_writes_suites_that_evaluation_reads(folders: Path, tmp_path: Path) -> None:
    suites.main(folders, folders, tmp_path / "suites")
    cases = {name: list(manifest(tmp_path / "suites" / f"{name}.jsonl")) for name in suites.SUITES}
    tasks = {name: [case.task for case in found[::2]] for name, found in cases.items()}
    assert tasks == {
        "seen": [Task.A1A2, Task.A1T1, Task.A1T2],
        "unseen": [Task.A1A2, Task.A1T1, Task.A1T2],
        "natural": [Task.A1A2, Task.A1T1, Task.A1T2],
        "natural_noise": [Task.A1A2],
        "natural_telephone": [Task.A1A2],
        "natural_silence": [Task.A1A2],
        "noise": [Task.A1A2],
        "dictation": [Task.A1T1, Task.A1T1],
        "text": [Task.T1A2, Task.T1T2],
        "typos": [Task.T1T2],
        "read": [Task.T1A1],
        "conversation": [Task.A1A2, Task.A1T2],
        "conversation_speech": [Task.A1A2, Task.A1T2],
        "conversation_text": [Task.T1T2],
    }
    for found in cases.values():
        assert len({case.id for case in found}) == len(found)
    answered, transcribed = cases["seen"][0], cases["seen"][2]
    assert (answered.expected, answered.question, answered.group) == (
        ("One plus one is two.",),
        "What is one plus one?",
        "sum",
    )
    assert transcribed.expected == ("What is one plus one?",)
    assert answered.audio is not None
    assert Path(answered.audio).is_file()
    assert [case.group for case in cases["dictation"]] == ["dictation_seen"] * 2 + ["dictation_unseen"] * 2
    assert [case.text for case in cases["text"][::2]] == ["What is one plus one?", "What is your name?"]
    assert cases["read"][0].text == "The dog is blue."

    turn = Turn("What is one plus one?", "One plus one is two.")
    for name in ("conversation", "conversation_text"):
        assert (cases[name][0].system, cases[name][0].history) == ("Answer the question.", (turn,))
        assert (cases[name][0].expected, cases[name][0].group) == (("After two comes three.",), "follow_up")
    (spoken,) = cases["conversation_speech"][0].history
    assert isinstance(spoken, RecordedTurn)
    assert Turn(spoken.question, spoken.answer) == turn
    np.testing.assert_allclose(read_audio(spoken.audio), -read_audio(cases["conversation"][0].audio))

    assert cases["noise"][0].expected == ("I am sorry, I don't know that.", "I did not hear that.")
    assert cases["typos"][0].text == "What is your nmae?"
    loaded = {name: read_audio(cases[name][0].audio) for name in ("natural", *suites.CHANGES)}
    assert len(loaded["natural_silence"]) == len(loaded["natural"]) + 2 * SAMPLE_RATE
    for name in ("natural_noise", "natural_telephone"):
        assert len(loaded[name]) == len(loaded["natural"])


def test_add_noise_is_10_db_below_the_speech() -> None:
    tone = 0.1 * np.sin(np.arange(SAMPLE_RATE)).astype(np.float32)
    audio = np.concatenate([np.zeros(SAMPLE_RATE, np.float32), tone])
    noisy = suites.add_noise(audio, 3)
    noise, speech = noisy[: SAMPLE_RATE // 2], noisy[-SAMPLE_RATE // 2 :]
    assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2) - 1) == pytest.approx(10, abs=0.6)


def test_telephone_cuts_high_frequencies() -> None:
    audio = 0.1 * np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32)
    power = np.abs(np.fft.rfft(suites.call_by_telephone(audio, 0))) ** 2
    assert power[4000:].sum() < 0.01 * power[:4000].sum()


def test_questions_that_are_answered_alike_alone_are_no_follow_ups() -> None:
    name = "conversation_held_out"
    past = (PastTurn("What is one plus one?", "One plus one is two."),)
    assert suites.group(replace(QUESTION, history=past), name) == "new_question"
    named = replace(QUESTION, question_text="What is your name?", answer_text="My name is Nano.", history=past)
    assert suites.group(named, name) == "new_question"
    assert suites.group(replace(named, answer_text="My name is Bob.", system="Your name is Bob."), name) == "follow_up"


def test_main_limit(folders: Path, tmp_path: Path) -> None:
    suites.main(folders, folders, tmp_path / "suites", limit=1, only=["seen"])
    assert [path.name for path in (tmp_path / "suites").glob("*.jsonl")] == ["seen.jsonl"]
    assert len(list(manifest(tmp_path / "suites" / "seen.jsonl"))) == 3
