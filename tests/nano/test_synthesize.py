"""What is planned to be said, and the shards it becomes. The voices are stand-ins."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer
from typer.testing import CliRunner

from nano import facts, synthesize
from nano.records import READ
from nano.synthesize import Sizes, SynthesisError, Utterance, make_shard, recordings
from omni_jax.data import synthesizers

TRAINING = (
    *("questions/train", "questions/more", "questions/phrased", "questions/recorded"),
    *("questions/dictation_train", "questions/dictation_free", "questions/dictation_recorded"),
    *("answers/train", "answers/more", "answers/read_train", "answers/read_more", "answers/read_free"),
    "answers/read_more_free",
    "answers/read_answer_like",
    "answers/read_named",
)
SEEN = ("questions/held_out_seen", "questions/dictation_seen")
UNSEEN = ("questions/held_out_unseen", "questions/dictation_unseen")
RATE = 22_050


class Speaker:
    """Says every text in a tenth of a second a letter, `slow` ones in ten seconds; fails where it is told to."""

    def __init__(self, name: str = "espeak"):
        self.name = name
        self.spoken: list[str] = []
        self.fails_at = ""

    def voices(self) -> list[str]:
        return ["en-us"]

    def speak(self, text: str, voice: str, speed: float = 1.0, pitch: float = 0.0) -> tuple[np.ndarray, int]:
        if text == self.fails_at:
            raise synthesizers.SpeechError("out of breath")
        self.spoken.append(text)
        seconds = 10.0 if text == "slow" else 0.1 * len(text)
        time = np.arange(round(seconds * RATE)) / RATE
        quiet = np.zeros(RATE, np.float32)
        return np.concatenate([quiet, 0.3 * np.sin(2 * np.pi * 300 * time), quiet]).astype(np.float32), RATE


@pytest.fixture
def speaker(monkeypatch: pytest.MonkeyPatch) -> Speaker:
    """Whoever is asked for, and no other processes."""
    made = Speaker()
    monkeypatch.setattr(synthesize, "_engine", lambda name: made)
    monkeypatch.setattr(synthesize, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    return made


@pytest.fixture(scope="module")
def plan() -> dict[str, list[Utterance]]:
    return synthesize.plan(Sizes())


def asked(*texts: str) -> list[Utterance]:
    return [Utterance(text, "sum", "espeak", "en-us", 1.1, -0.5, f"It is {text}.", "pair") for text in texts]


def owned(*texts: str) -> list[Utterance]:
    return [Utterance(text, "answer", "hibari", "heart") for text in texts]


def texts(utterances: list[Utterance]) -> set[str]:
    return {facts.normalize(utterance.text) for utterance in utterances}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The plan.


def test_plan_has_as_many_as_wanted(plan: dict[str, list[Utterance]]):
    counts = {name: len(utterances) for name, utterances in plan.items()}
    held_out, more = counts.pop("answers/held_out"), counts.pop("answers/more")
    assert counts == {
        "questions/train": 2 * 6000,
        "questions/more": 18_000,
        "questions/phrased": 24_000,
        "questions/recorded": 24_000,
        "questions/held_out_seen": 1000,
        "questions/held_out_unseen": 500,
        "questions/dictation_train": 2400 + 38_400,
        "questions/dictation_free": 12_000,
        "questions/dictation_recorded": 12_000,
        "questions/dictation_seen": 200,
        "questions/dictation_unseen": 100,
        "answers/train": 6000,
        "answers/read_train": 24_000,
        "answers/read_more": 60_000,
        "answers/read_free": 30_000,
        "answers/read_more_free": 30_000,
        "answers/read_answer_like": 24_000,
        "answers/read_named": 2000,
        "answers/read_held_out": 300,
    }
    assert held_out > 100
    answers = {item.answer for item in facts.questions("train")}
    assert texts(plan["answers/train"] + plan["answers/more"]) == {facts.normalize(answer) for answer in answers}
    assert more == len(answers) - 6000
    assert not texts(plan["answers/read_more"]) & texts(plan["answers/read_train"])
    free = [*plan["answers/read_free"], *plan["questions/dictation_free"]]
    assert not texts(plan["answers/read_more_free"]) & texts(free)
    free += plan["answers/read_more_free"]
    assert not texts(plan["questions/dictation_recorded"]) & texts(free)
    said = Counter(utterance.text for utterance in plan["questions/train"])
    assert all(count % 2 == 0 for count in said.values()), "every question is said twice"


def test_plan_is_the_same_in_every_process(plan: dict[str, list[Utterance]]):
    program = "from nano.synthesize import *; print(zlib.crc32(repr(plan(Sizes())).encode()))"
    environment = {**os.environ, "PYTHONHASHSEED": "1234", "PYTHONPATH": str(Path(facts.__file__).parents[1])}
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment)
    assert int(other.stdout) == zlib.crc32(repr(plan).encode())


def test_unseen_voices_are_never_heard_in_training(plan: dict[str, list[Utterance]]):
    def voices(*parts: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for part in parts:
            for utterance in plan[part]:
                found.setdefault(utterance.engine, set()).add(utterance.voice)
        return found

    def speakers(found: dict[str, set[str]]) -> set[str]:
        return {voice.rpartition("+")[2] for voice in found["espeak"]} | found["flite"]

    training, seen, unseen = voices(*TRAINING), voices(*SEEN), voices(*UNSEEN)
    assert not speakers(training) & speakers(unseen)
    assert not any(voice.startswith("en-gb-scotland") for voice in training["espeak"] | seen["espeak"])
    assert any(voice.startswith("en-gb-scotland") for voice in unseen["espeak"])
    assert set(unseen) == {"espeak", "flite"}
    assert unseen["flite"] == {"rms"}
    assert speakers(seen) <= speakers(training)
    assert training["flite"] == seen["flite"] == {"awb", "kal16", "slt"}
    assert training["hibari"] == seen["hibari"] == {"heart"}
    assert len(training["espeak"]) > 200


def test_nothing_held_out_is_said_in_training(plan: dict[str, list[Utterance]]):
    training = set().union(*(texts(plan[part]) for part in TRAINING))
    held_out = {facts.normalize(item.question) for item in facts.questions("held_out")}
    assert not training & held_out
    for part in (*SEEN, *UNSEEN, "answers/held_out", "answers/read_held_out"):
        assert not training & texts(plan[part]), part
    for part in ("questions/held_out_seen", "questions/held_out_unseen"):
        assert texts(plan[part]) <= held_out
        assert {utterance.held_out for utterance in plan[part]} == {"pair", "phrasing", "both"}
    assert {utterance.held_out for part in TRAINING for utterance in plan[part]} == {""}
    # Nor is what only a held-out pair of numbers is the answer to.
    known = {item.answer for item in facts.questions("train")}
    secret = {facts.normalize(item.answer) for item in facts.questions("held_out") if item.answer not in known}
    assert len(secret) > 100
    assert not training & secret


def test_every_question_has_its_answer_spoken(plan: dict[str, list[Utterance]]):
    training = {utterance.text for utterance in plan["answers/train"]}
    more, others = ({utterance.text for utterance in plan[f"answers/{part}"]} for part in ("more", "held_out"))
    assert len(training) == 6000
    assert not training & more
    for part in ("more", "phrased", "recorded"):
        assert {utterance.answer for utterance in plan[f"questions/{part}"]} <= training | more
    assert not (training | more) & others
    assert {utterance.answer for utterance in plan["questions/train"]} <= training
    tested = {utterance.answer for part in UNSEEN[:1] + SEEN[:1] for utterance in plan[part]}
    assert others < tested <= training | more | others
    for part in ("train", "more", "held_out", *itertools.chain.from_iterable(READ.values())):
        voices = {(u.engine, u.voice, u.speed, u.pitch) for u in plan[f"answers/{part}"]}
        assert voices == {("hibari", "heart", 1.0, 0.0)}


def test_further_phrasings_are_said_by_voices_further_from_themselves(plan: dict[str, list[Utterance]]):
    further = {facts.normalize(item.question) for item in facts.questions("train", further=True)}
    others = {facts.normalize(item.question) for item in facts.questions("train")}
    assert texts(plan["questions/phrased"]) <= further
    # Here and there two kinds share a phrasing.
    assert len(texts(plan["questions/phrased"]) & others) < 240
    for engine in synthesize.ENGINES["many"]:
        most = synthesize.WIDER_PITCH[engine]
        for part, limit in (("questions/phrased", most), ("questions/more", synthesize.PITCH[engine])):
            pitches = [abs(u.pitch) for u in plan[part] if u.engine == engine]
            assert 0.95 * limit < max(pitches) <= limit, (part, engine)


def test_voices_made_from_recordings(plan: dict[str, list[Utterance]]):
    questions, sentences = plan["questions/recorded"], plan["questions/dictation_recorded"]
    for part in (questions, sentences):
        share = Counter((utterance.engine, utterance.voice) for utterance in part)
        engines = {
            name: [count / len(part) for (engine, _), count in share.items() if engine == name]
            for name in ("pico", "flite", "festival", "hibari")
        }
        # Four, three, two and one of ten, by two, three, one and one voice.
        for (name, shares), wanted, voices in zip(engines.items(), (0.4, 0.3, 0.2, 0.1), (2, 3, 1, 1), strict=True):
            assert shares == pytest.approx([wanted / voices] * voices, abs=0.015), name
        for name in engines:
            most = max(abs(utterance.pitch) for utterance in part if utterance.engine == name)
            assert 0.95 * synthesize.WIDER_PITCH[name] < most <= synthesize.WIDER_PITCH[name]
    assert sum(share.values()) == len(sentences)
    # In the phrasings that are said by everybody, and in the further ones.
    further = {facts.normalize(item.question) for item in facts.questions("train", further=True)}
    others = {facts.normalize(item.question) for item in facts.questions("train")}
    assert texts(questions) <= further
    known = sum(facts.normalize(utterance.text) in others for utterance in questions)
    assert known / len(questions) == pytest.approx(0.5, abs=0.01)


def test_any_shard_is_like_all(plan: dict[str, list[Utterance]]):
    for part in ("recorded", "phrased", "train", "more"):
        everything = plan[f"questions/{part}"]
        shard = everything[: synthesize.SHARD]
        for kind, count in Counter(utterance.kind for utterance in everything).items():
            share = count / len(everything)
            found = sum(utterance.kind == kind for utterance in shard) / len(shard)
            assert found == pytest.approx(share, abs=4 * (share / len(shard)) ** 0.5), kind
    answers = [utterance.text for utterance in plan["answers/train"]]
    spoken = {utterance.answer for utterance in everything}
    share = sum(answer in spoken for answer in answers) / len(answers)
    assert sum(answer in spoken for answer in answers[:250]) / 250 == pytest.approx(share, abs=0.12)


@pytest.mark.parametrize("name", ["espeak", "flite", "hibari", "pico"])
def test_planned_voices_exist(name: str, plan: dict[str, list[Utterance]]):
    try:
        known = set(synthesizers.engine(name).voices())
    except synthesizers.SpeechError:
        pytest.skip(f"{name} is not installed")
    assert {u.voice for utterances in plan.values() for u in utterances if u.engine == name} <= known


def test_festival_speaks():
    engine = synthesize._engine("festival")
    (voice,) = synthesize.SEEN_FESTIVAL
    try:
        subprocess.run(["festival", "-b", f"(voice_{voice})"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("festival or its voice is not installed")
    lengths = {}
    for speed in (0.9, 1.0, 1.8):
        samples, rate = engine.speak("It's a fine day, isn't it?", voice, speed)
        assert rate == 16_000
        lengths[speed] = len(samples) / rate
    assert 0.5 < lengths[1.0] < 3
    assert lengths[0.9] > lengths[1.0] > 1.5 * lengths[1.8]


# Shards.


def test_shards_of_questions_come_back(tmp_path: Path, speaker: Speaker):
    (tmp_path / "questions").mkdir()
    utterances = asked("one", "three", "fifteen")
    outcome = make_shard(str(tmp_path / "questions/train-00000"), utterances[:2], 0)
    make_shard(str(tmp_path / "questions/train-00001"), utterances[2:], 2)
    assert outcome == {"made": 2}
    assert sorted(contents(tmp_path)) == [f"questions/train-0000{n}.{end}" for n in (0, 1) for end in ("flac", "jsonl")]
    found = list(recordings(tmp_path, "questions/train"))
    assert [recording.utterance for recording in found] == utterances
    for number, recording in enumerate(found):
        audio, varied = synthesize.say(utterances[number], zlib.crc32(f"questions/train {number}".encode()), own=False)
        np.testing.assert_array_equal(recording.audio, audio)
        assert recording.varied == varied
        assert recording.rate == 16_000
        assert recording.audio.dtype == np.int16
        # Its 0.1 s a letter, 40 ms that trimming leaves, 0.1 to 0.3 s of silence, all stretched.
        natural = len(audio) / 16_000 * varied["stretch"]
        assert 0.1 * len(recording.utterance.text) + 0.27 < natural < 0.1 * len(recording.utterance.text) + 0.7
    with pytest.raises(SynthesisError, match="expected recordings of questions/held_out_seen, found none"):
        next(recordings(tmp_path, "questions/held_out_seen"))


def test_recordings_differ_though_the_words_are_the_same(tmp_path: Path, speaker: Speaker):
    (tmp_path / "questions").mkdir()
    make_shard(str(tmp_path / "questions/train-00000"), asked("seven", "seven"), 0)
    make_shard(str(tmp_path / "questions/held_out_seen-00000"), asked("seven"), 0)
    parts = ("questions/train", "questions/held_out_seen")
    found = [recording for part in parts for recording in recordings(tmp_path, part)]
    stretches = [recording.varied["stretch"] for recording in found]
    assert len(set(stretches)) == 3
    # Nor is there the same silence around them.
    natural = [len(recording.audio) * stretch for recording, stretch in zip(found, stretches, strict=True)]
    assert np.diff(sorted(natural)).min() > 4


def test_a_recording_does_not_depend_on_its_shard(tmp_path: Path, speaker: Speaker):
    for folder, shards in (("a", ((0, 3),)), ("b", ((0, 1), (1, 2)))):
        (tmp_path / folder / "questions").mkdir(parents=True)
        for number, (first, count) in enumerate(shards):
            chosen = asked("one", "two", "three")[first : first + count]
            make_shard(str(tmp_path / folder / f"questions/train-{number:05d}"), chosen, first)
    a, b = (list(recordings(tmp_path / folder, "questions/train")) for folder in "ab")
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one.audio, other.audio)


def test_answers_are_clean_and_equally_loud(tmp_path: Path, speaker: Speaker):
    (tmp_path / "answers").mkdir()
    make_shard(str(tmp_path / "answers/train-00000"), owned("eleven", "slow"), 0)
    found = list(recordings(tmp_path, "answers/train"))
    assert [recording.utterance.text for recording in found] == ["eleven", "slow"], "long answers stay"
    for recording, seconds in zip(found, (0.6, 10.0), strict=True):
        audio = recording.audio / 32_768
        assert (recording.rate, recording.varied) == (24_000, {})
        assert len(audio) / 24_000 == pytest.approx(0.05 + 0.04 + seconds + 0.04 + 0.15, abs=0.011)
        assert not audio[: round(0.05 * 24_000)].any()
        assert not audio[-round(0.15 * 24_000) :].any()
        voice = audio[round(0.05 * 24_000) : -round(0.15 * 24_000)]
        assert 10 * np.log10(np.mean(voice**2)) == pytest.approx(-20, abs=0.01)


def test_questions_longer_than_the_ear_are_left_out(tmp_path: Path, speaker: Speaker):
    (tmp_path / "questions").mkdir()
    outcome = make_shard(str(tmp_path / "questions/train-00000"), asked("one", "slow", "three"), 0)
    assert outcome == {"made": 2, "too long": 1}
    found = list(recordings(tmp_path, "questions/train"))
    assert [recording.utterance.text for recording in found] == ["one", "three"]
    audio, _ = synthesize.say(asked("three")[0], zlib.crc32(b"questions/train 2"), own=False)
    np.testing.assert_array_equal(found[1].audio, audio)
    lines = (tmp_path / "questions/train-00000.jsonl").read_text().splitlines()
    assert 9.5 < float(json.loads(lines[1])["dropped"].removesuffix(" s long")) < 11.5


def test_a_shard_may_be_left_with_nothing(tmp_path: Path, speaker: Speaker):
    (tmp_path / "questions").mkdir()
    assert make_shard(str(tmp_path / "questions/train-00000"), asked("slow"), 0) == {"too long": 1}
    assert list(recordings(tmp_path, "questions/train")) == []


def test_a_shard_is_whole_or_not_there(tmp_path: Path, speaker: Speaker):
    (tmp_path / "answers").mkdir()
    path = tmp_path / "answers/train-00000"
    speaker.fails_at = "two"
    with pytest.raises(synthesizers.SpeechError, match="out of breath"):
        make_shard(str(path), owned("one", "two"), 0)
    assert contents(tmp_path) == {}
    # As if stopped between the sound and the lines, of which the sound is of something else.
    soundfile.write(path.with_suffix(".flac"), np.ones(100, np.int16), 24_000)
    with pytest.raises(SynthesisError):
        list(recordings(tmp_path, "answers/train"))
    speaker.fails_at = ""
    make_shard(str(path), owned("one", "two"), 0)
    assert [len(recording.audio) > 10_000 for recording in recordings(tmp_path, "answers/train")] == [True, True]


# All shards of a plan.

PARTS = {"questions/train": asked("one", "two", "three", "four", "five"), "answers/train": owned("six", "seven")}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesize, "SHARD", 2)


@pytest.mark.usefixtures("small")
def test_synthesis_goes_on_where_it_was_stopped(tmp_path: Path, speaker: Speaker):
    assert synthesize.synthesize(tmp_path / "whole", PARTS) == ({"made": 7}, 0)
    assert sorted(contents(tmp_path / "whole")) == [
        *("answers/train-00000.flac", "answers/train-00000.jsonl", "answers/train.plan"),
        *(f"questions/train-0000{n}.{end}" for n in (0, 1, 2) for end in ("flac", "jsonl")),
        "questions/train.plan",
    ]
    for part, utterances in PARTS.items():
        assert [recording.utterance for recording in recordings(tmp_path / "whole", part)] == utterances

    # Some now, then an error, then the rest.
    assert synthesize.synthesize(tmp_path / "pieces", PARTS, shards=1, workers=1) == ({"made": 2}, 3)
    speaker.fails_at = "five"
    with pytest.raises(synthesizers.SpeechError, match="out of breath"):
        synthesize.synthesize(tmp_path / "pieces", PARTS, workers=1)
    speaker.fails_at, speaker.spoken = "", []
    outcome, left = synthesize.synthesize(tmp_path / "pieces", PARTS, workers=1)
    assert left == 0
    assert "five" in speaker.spoken
    assert not {"one", "two", "three", "four"} & set(speaker.spoken)
    assert outcome == {"made": len(speaker.spoken)}
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")

    speaker.spoken.clear()
    assert synthesize.synthesize(tmp_path / "whole", PARTS) == ({}, 0)
    assert speaker.spoken == []


@pytest.mark.usefixtures("small")
def test_a_lost_shard_is_made_again(tmp_path: Path, speaker: Speaker):
    synthesize.synthesize(tmp_path, PARTS)
    whole = contents(tmp_path)
    (tmp_path / "questions/train-00001.jsonl").unlink()
    assert synthesize.synthesize(tmp_path, PARTS) == ({"made": 2}, 0)
    assert contents(tmp_path) == whole


@pytest.mark.usefixtures("small")
def test_another_plan_is_refused_before_anything_is_made(tmp_path: Path, speaker: Speaker):
    synthesize.synthesize(tmp_path, PARTS, shards=1)
    before = contents(tmp_path)
    others = {**PARTS, "answers/train": owned("six", "eight")}
    with pytest.raises(
        SynthesisError,
        match=r"answers/train\.plan: expected the plan .*found another: remove train\.plan and train-\* ",
    ):
        synthesize.synthesize(tmp_path, others)
    assert contents(tmp_path) == before
    # A part at a time is the same plan.
    assert synthesize.synthesize(tmp_path, {"answers/train": PARTS["answers/train"]}) == ({"made": 2}, 0)


def test_synthesis_in_processes_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(8000) / 16_000)
    soundfile.write(tmp_path / "voice.wav", tone, 16_000)
    program = tmp_path / "espeak-ng"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '--voices=en) printf "Pty Language Age Voice File\\n 2 en-us --/M English gmw/en-US\\n" ;;\n'
        "--voices=variant) ;;\n"
        f'*) cat "{tmp_path}/voice.wav" ;;\n'
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    # Here, too, so that this process doesn't keep the stand-in.
    monkeypatch.setattr(synthesize, "_engine", synthesizers.engine)
    part = {"questions/train": asked("one", "two")}
    assert synthesize.synthesize(tmp_path / "made", part, workers=1) == ({"made": 2}, 0)
    found = list(recordings(tmp_path / "made", "questions/train"))
    assert [recording.utterance for recording in found] == part["questions/train"]
    np.testing.assert_array_equal(
        found[1].audio, synthesize.say(asked("two")[0], zlib.crc32(b"questions/train 1"), own=False)[0]
    )


# The command.


@pytest.mark.usefixtures("small")
def test_the_command_says_what_it_did(tmp_path: Path, speaker: Speaker, monkeypatch: pytest.MonkeyPatch):
    parts = {**PARTS, "questions/train": asked("one", "two", "slow")}
    monkeypatch.setattr(synthesize, "plan", lambda sizes: parts)
    app = typer.Typer()
    app.command()(synthesize.main)

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["--out", str(tmp_path), *arguments])
        return result.exit_code, (result.stdout or result.stderr).strip()

    assert run("--shards", "1") == (0, "2 made; 2 shards left")
    assert run("--only", "answers/train") == (0, "2 made; complete")
    assert run() == (0, "1 too long; complete")
    assert run() == (0, "nothing to do; complete")
    parts["answers/train"] = owned("nine", "ten")
    code, said = run()
    assert code == 2
    assert re.match(r"nano\.synthesize: .*answers/train\.plan: expected .*found another", said)
    code, said = run("--only", "answers/tran")
    assert code == 2
    assert "answers/tran" in said
