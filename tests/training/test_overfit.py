"""The recipe from end to end: three stages overfit eight spoken exchanges, and the model reproduces them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convert_weights
from omni_jax import Omni
from omni_jax.checkpoint.release import open_release
from omni_jax.data.prepare import prepare
from omni_jax.data.records import Exchange, Records, from_bytes
from omni_jax.data.shards import CodecSpec
from omni_jax.data.sources import Manifest
from omni_jax.delay import fill_invalid_codes, undelay
from omni_jax.inference.answer import Reply
from omni_jax.vocab import Vocab
from tests.test_convert_weights import run, sources

ROOT = Path(convert_weights.__file__).parent
EXCHANGES = ROOT / "tests" / "assets" / "exchanges"
STEPS = {1: 60, 2: 60, 3: 400}


def codes(reply: Reply, omni: Omni) -> np.ndarray:
    vocab = Vocab(omni.config.vocab)
    return fill_invalid_codes(undelay(reply.tokens[:7], vocab), vocab)


@pytest.mark.slow
def test_three_stages_overfit_eight_exchanges(tiny_parts: Path, tmp_path: Path):
    start = tmp_path / "start"
    assert run("import", tiny_parts / "mini_omni", start, *sources(tiny_parts)).exit_code == 0
    codec = CodecSpec(str(start))
    source = Manifest(EXCHANGES / "exchanges.jsonl", answer_sample_rate=codec.config.sample_rate)
    assert prepare(source, tmp_path / "records", codec=codec)["exchanges"] == 8
    # Programs that run hundreds of times are worth optimizing; one device suffices.
    environment = {**os.environ, "XLA_FLAGS": ""}
    for stage, steps in STEPS.items():
        out = tmp_path / f"stage{stage}"
        changes = [
            f"out={out}",
            f"start={start}",
            f"data.sources=[{{path: {tmp_path / 'records'}}}]",
            "data.batch_size=4",
        ]
        changes += [f"optimizer.steps={steps}", "checkpoint.save_interval_steps=1000", "log_interval_steps=50"]
        command = [sys.executable, "train.py", f"configs/tiny_stage{stage}.yaml", *changes]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        start = out

    omni = Omni.from_pretrained(start)
    questions = [
        json.loads(line)["question_audio"] for line in (EXCHANGES / "exchanges.jsonl").read_text().splitlines()
    ]
    records = Records(tmp_path / "records")
    exchanges: list[Exchange] = [from_bytes(records[index], codebook_size=64) for index in range(8)]
    replies = omni.batch([EXCHANGES / question for question in questions])
    for reply, exchange in zip(replies, exchanges, strict=True):
        assert reply.text == exchange.answer_text
        assert exchange.answer_codes is not None
        np.testing.assert_array_equal(codes(reply, omni), exchange.answer_codes)
    plain = omni.batch([EXCHANGES / question for question in questions], batch_parallel=False)
    assert [reply.text for reply in plain] == [exchange.answer_text for exchange in exchanges]

    # The trained weights survive export and import.
    assert run("export", start, tmp_path / "published").exit_code == 0
    assert run("import", tmp_path / "published", tmp_path / "again", *sources(tiny_parts)).exit_code == 0
    trained, again = (open_release(folder).model_tensors() for folder in (start, tmp_path / "again"))
    for name, tensor in trained.items():
        np.testing.assert_array_equal(again[name].read(), tensor.read(), err_msg=name)
