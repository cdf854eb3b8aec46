"""docs/own_model.md at a tiny size: its commands, from an empty folder to a strict load in PyTorch."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from omni_jax.checkpoint.release import open_release
from omni_jax.convert.torch_mini_omni import MiniOmni
from tests import models
from tests.test_docs import commands

ROOT = Path(__file__).parents[1]
PAGE = "docs/own_model.md"
EXCHANGES = ROOT / "tests" / "assets" / "exchanges"
TINY = [
    "optimizer.steps=2", "optimizer.warmup_steps=1", "data.batch_size=2", "data.num_workers=0", "log_interval_steps=1",
    "evaluation.num_samples=0",
]  # fmt: skip
"""Overrides of each run."""
ANSWERS = {"configs/finetune.yaml": 1, "configs/lora.yaml": 1, "configs/own_stage3.yaml": 1}
"""Held-out exchanges of each task that a run answers; of the others, none."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with recordings, and the configurations of a checkout."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    recordings = tmp_path / "recordings"
    shutil.copytree(EXCHANGES, recordings)
    lines = (recordings / "exchanges.jsonl").read_text().splitlines(keepends=True)
    (recordings / "train.jsonl").write_text("".join(lines[:6]))
    (recordings / "test.jsonl").write_text("".join(lines[6:]))
    rows = [json.loads(line) for line in lines[6:]]
    questions = [
        {"id": str(n), "audio": row["question_audio"], "question": row["question_text"], "expected": row["answer_text"]}
        for n, row in enumerate(rows)
    ]
    (recordings / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "rehearsal.jsonl").write_text('{"id": "1", "text": "What is two plus three?"}\n')
    return tmp_path


def run_section(title: str, folder: Path, replaced: dict[str, str]) -> dict[str, float]:
    """Run the commands and the Python code of a section; returns the seconds of each command."""
    text = (ROOT / PAGE).read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    seconds = {}
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "python" and "litgpt" not in block:
            subprocess.run([sys.executable, "-c", block], cwd=folder, check=True)
        for line in block.splitlines() if not language else ():
            for name, path in replaced.items():
                line = line.replace(name, path)
            program, *words = line.split()
            assert program == "omni-jax"
            if words[0] == "train":
                words += [*TINY, f"evaluation.num_answers={ANSWERS.get(words[1], 0)}"]
            if words[0] in ("evaluate", "batch"):
                words += ["--max-steps", "30"]
            start = time.perf_counter()
            command = [sys.executable, "-m", "omni_jax.cli", *words]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}: {done.stderr[-3000:]}"
            seconds[line] = round(time.perf_counter() - start, 1)
    return seconds


def test_page_has_every_command_of_the_test() -> None:
    found = [" ".join(words[:2]) for words in commands(PAGE)]
    assert found.count("omni-jax train") == 6
    assert found.count("omni-jax prepare") == 5
    assert {"omni-jax convert", "omni-jax batch", "omni-jax evaluate"} <= set(found)


@pytest.mark.slow
def test_own_model_from_an_empty_folder_to_a_strict_load_in_pytorch(folder: Path, tiny_parts: Path) -> None:
    models.language_model_folder(folder / "lm", "qwen2", tied=True)
    replaced = {
        "Qwen/Qwen2-0.5B": "lm",
        "openai/whisper-small": str(tiny_parts / "whisper"),
        "hubertsiuzdak/snac_24khz": str(tiny_parts / "snac"),
    }
    seconds = run_section("Train a model of your own", folder, replaced)
    print(json.dumps(seconds, indent=1))
    assert open_release(folder / "runs/own/stage3").folder == folder / "runs/own/stage3/release"
    assert (folder / "runs/own/stage3/best/config.json").is_file()
    assert (folder / "results/report.html").is_file()
    config = yaml.safe_load((folder / "published/model_config.yaml").read_text())
    state = torch.load(folder / "published/lit_model.pth", weights_only=True)
    MiniOmni(config).load_state_dict(state, strict=True)


@pytest.mark.slow
def test_fine_tuning_nano_with_its_own_answers(folder: Path) -> None:
    seconds = run_section("Fine-tune nano", folder, {})
    print(json.dumps(seconds, indent=1))
    assert (folder / "runs/finetuned/release/config.json").is_file()
    lines = [json.loads(line) for line in (folder / "runs/finetuned/metrics.jsonl").read_text().splitlines()]
    (held_out,) = [line for line in lines if "held_out/loss" in line]
    assert {"held_out/answer_accuracy", "held_out/wer"} <= held_out.keys()
    assert (folder / "runs/lora/release/config.json").is_file()
    assert (folder / "releases/with_lora/config.json").is_file()
