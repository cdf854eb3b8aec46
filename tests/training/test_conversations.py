"""Training on conversations: what is said in an earlier turn is answered in a later one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import convert_weights
from omni_jax import Omni
from omni_jax.checkpoint.release import RELEASE, open_release
from omni_jax.config.run import RunConfig
from omni_jax.data.prepare import prepare
from omni_jax.data.records import Exchange, PastTurn, RecordWriter
from omni_jax.data.sources import TextQA
from omni_jax.errors import ConfigError
from omni_jax.inference.request import Turn
from omni_jax.training.setup import InitialModel, TrainingSetup

ROOT = Path(convert_weights.__file__).parent
NAMES = ["Ann", "Bob", "Cat", "Dan", "Eve", "Fay", "Gus", "Hal", "Ivy", "Jo"]
STEPS = 300


def conversation(name: str) -> list[tuple[str, str]]:
    """The third turn is answered from the first; they are the same but for the name."""
    return [(f"I am {name}.", "Hello."), ("Is it cold?", "No."), ("Who am I?", f"{name}.")]


def run_config(sources: list[Path], **changes: object) -> RunConfig:
    values = {
        "out": "unused",
        "start": "preset:tiny",
        "trainable": ["trunk"],
        "data": {"sources": [{"path": str(path)} for path in sources], "tasks": {"T1T2": 1.0}},
        "optimizer": {"steps": 1, "peak_lr": 1e-3},
        **changes,
    }
    return RunConfig(**values)


def test_training_on_conversations_makes_a_model_of_conversations(tmp_path: Path) -> None:
    for name, history in (("plain", ()), ("talk", (PastTurn("c?", "d"),))):
        with RecordWriter(tmp_path / name) as writer:
            writer.write(Exchange("a?", answer_text="b", history=history))
    plain, talk = tmp_path / "plain", tmp_path / "talk"
    found = [
        TrainingSetup.of(run_config(sources)).start.config.conversation
        for sources in ([plain], [tmp_path / "missing"], [plain, talk])
    ]
    assert found == [False, False, True]


def test_model_without_a_system_token_is_refused() -> None:
    start = InitialModel.find("preset:tiny", 0)
    vocab = type(start.config.vocab)(text=300, audio=64, text_specials=6, audio_specials=8)
    small = type(start)(type(start.config)(**vars(start.config) | {"vocab": vocab}), start.tokenizer, None, 0)
    with pytest.raises(ConfigError, match=r"text_specials of 7 or more.*found 6"):
        small.for_conversations()


@pytest.mark.slow
def test_overfitted_conversations_answer_the_third_turn_from_the_first(tmp_path: Path) -> None:
    """With the keys and values of earlier turns, and without them."""
    rows = []
    for name in NAMES:
        messages = [
            {"role": role, "content": text}
            for turn in conversation(name)
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        rows.append(json.dumps({"messages": messages}))
    (tmp_path / "talk.jsonl").write_text("\n".join(rows))
    assert prepare(TextQA(tmp_path / "talk.jsonl"), tmp_path / "records")["conversations"] == 10
    changes = [
        f"out={tmp_path / 'run'}",
        "start=preset:tiny",
        f"data.sources=[{{path: {tmp_path / 'records'}, tasks: [T1T2]}}]",
        "data.tasks={T1T2: 1}",
        "trainable=[trunk, text_embedding]",
        "data.batch_size=4",
        f"optimizer.steps={STEPS}",
        "checkpoint.save_interval_steps=1000",
        "log_interval_steps=50",
        "evaluation.num_samples=0",
    ]
    command = [sys.executable, "train.py", "configs/tiny_stage3.yaml", *changes]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert open_release(tmp_path / "run" / RELEASE).config.conversation

    omni = Omni.from_pretrained(tmp_path / "run")
    for name in NAMES:
        turns = conversation(name)
        talk = omni.conversation()
        for question, _ in turns:
            talk.reply(text=question, task="T1T2")
        assert talk.history == tuple(Turn(*turn) for turn in turns)
    alone = [
        {"text": conversation(name)[2][0], "task": "T1T2", "history": conversation(name)[:2]}
        for name in reversed(NAMES)
    ]
    fresh = Omni.from_pretrained(tmp_path / "run")
    assert [reply.text for reply in fresh.batch(alone)] == [f"{name}." for name in reversed(NAMES)]
