"""Damaged files of four kinds, two thousand each: read, or refused with one sentence, soon."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import omni_jax
from omni_jax.batch import read_rows
from omni_jax.checkpoint.release import load_model_config
from omni_jax.checkpoint.safetensors_io import LazyTensor, SafetensorsFile, write_safetensors
from omni_jax.config.load import load_config
from omni_jax.config.model import ModelConfig
from omni_jax.config.run import RunConfig
from omni_jax.convert import families, mini_omni, peft, snac, whisper
from omni_jax.errors import CheckpointError, ConfigError, ConversionError, OmniError
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.request import Request
from omni_jax.input_files import parse_json
from tests.mutation import mutate, mutate_text

NUM_FILES = 2000
"""Of each kind."""
MAX_SECONDS = 2.0
"""Of processor time, for one file."""
ROOT = Path(__file__).parents[1]
NANO = Path(omni_jax.__file__).parent / "assets" / "nano" / "config.json"

pytestmark = pytest.mark.slow


def read_all(
    originals: list[bytes], path: Path, read: Callable[[Path], Any], errors: tuple[type[OmniError], ...]
) -> int:
    """Read mutants of files, half of them of their text; returns how many are refused. Any other error is raised."""
    num_refused = 0
    for seed in range(NUM_FILES):
        rng = random.Random(seed)
        data = rng.choice(originals)
        if rng.random() < 0.5:
            data = mutate(data, rng)
        else:
            data = mutate_text(data.decode("latin-1"), rng).encode(rng.choice(["utf-8", "latin-1"]), "replace")
        path.write_bytes(data)
        start = time.process_time()
        try:
            read(path)
        except errors as error:
            num_refused += 1
            assert str(error).startswith(str(path)), seed  # noqa: PT017
            assert len(str(error)) < 20_000, seed  # noqa: PT017
        assert time.process_time() - start < MAX_SECONDS, seed
    return num_refused


def test_fuzz_model_config(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        load_model_config(path)
        # What is taken is JSON for the library too, with the same values.
        assert parse_json(path.read_bytes()) == json.loads(path.read_bytes())

    num_refused = read_all([NANO.read_bytes()], tmp_path / "config.json", read, (ConfigError,))
    assert 0.5 * NUM_FILES < num_refused < NUM_FILES


def test_fuzz_run_config(tmp_path: Path) -> None:
    originals = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    num_refused = read_all(originals, tmp_path / "run.yaml", lambda path: load_config(RunConfig, path), (ConfigError,))
    assert 0.3 * NUM_FILES < num_refused < NUM_FILES


def test_fuzz_safetensors(tmp_path: Path) -> None:
    tensors = {
        "embed": np.arange(6, dtype=np.float32).reshape(2, 3),
        "layers.0.weight": np.ones((3, 4), np.float16),
        "scalar": np.array(1.0, np.float64),
        "empty": np.zeros((0, 3), np.int8),
        "bytes": np.arange(5, dtype=np.uint8),
    }
    write_safetensors(tmp_path / "whole", {name: LazyTensor.of(array) for name, array in tensors.items()})
    whole = (tmp_path / "whole").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")

    def with_header(text: str) -> bytes:
        header = text.encode("utf-8", "replace")
        return len(header).to_bytes(8, "little") + header + whole[start:]

    rng = random.Random(0)
    # Whose length fits the header, which the mutants of the whole file seldom have.
    originals = [with_header(mutate_text(whole[8:start].decode(), rng)) for _ in range(NUM_FILES)] + [whole] * NUM_FILES

    def read(path: Path) -> None:
        file = SafetensorsFile(path)
        found = {name: tensor.read() for name, tensor in file.tensors.items()}
        # What is taken is a file for the library too, with the same values.
        expected = safetensors.numpy.load(path.read_bytes())
        assert found.keys() == expected.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name])

    num_refused = read_all(originals, tmp_path / "x.safetensors", read, (CheckpointError,))
    assert 0.5 * NUM_FILES < num_refused < NUM_FILES


def test_fuzz_manifest(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "audio": "a.wav"},
        {"id": "b", "text": "What is the capital of France?", "task": "T1T2", "seed": 7},
        {"id": "c", "audio": "../c.mp3", "truncate": True, "temperature": 0.5, "max_steps": 100},
        {"id": "d", "text": "né", "top_k": 5, "task": None},
    ]
    manifest = "".join(json.dumps(row, ensure_ascii=index % 2 == 0) + "\n" for index, row in enumerate(rows)).encode()
    defaults = Request(config=GenerationConfig())
    num_errors = 0

    def read(path: Path) -> None:
        nonlocal num_errors
        for row in read_rows(path, tmp_path / "out", defaults):
            assert (row.request is None) == bool(row.error)
            assert "\n" not in row.error
            assert len(row.error) < 20_000
            row.fingerprint("model")
            num_errors += bool(row.error)

    num_refused = read_all([manifest], tmp_path / "m.jsonl", read, (ConfigError,))
    assert num_refused < NUM_FILES / 10
    assert NUM_FILES < num_errors < 20 * NUM_FILES


STRANGE: list[Any] = [None, True, 0, -1, 10**30, 1e300, 0.5, "", "x", [], [0], [10**9, 10**9], ["x"], {}, {"a": {}}]


@pytest.mark.parametrize("kind", ["mini_omni", "snac", "whisper", "qwen2", "peft"])
def test_fuzz_config_of_other_formats(kind: str) -> None:
    config = ModelConfig()
    read: Callable[[dict[str, Any]], Any]
    if kind == "mini_omni":
        values = mini_omni.config_to_yaml(config)
        read = partial(
            mini_omni.config_from_yaml,
            audio_encoder=config.audio_encoder, codec=config.codec, tts_adapter=True, source="here",
        )  # fmt: skip
    elif kind == "snac":
        values, read = snac.config_to_json(config.codec), partial(snac.config_from_json, source="here")
    elif kind == "whisper":
        values = {"model_type": "whisper", "d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12}
        values |= {"encoder_ffn_dim": 3072, "num_mel_bins": 80, "max_source_positions": 1500}
        read = partial(whisper.config_from_json, source="here")
    elif kind == "peft":
        values = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "alpha_pattern": {"q_proj": 8}, "use_rslora": False}
        values |= {"use_dora": False, "bias": "none", "init_lora_weights": True}

        def read(values: dict[str, Any]) -> None:
            rank, alpha, scale = peft.scales_from_json(values, "here")
            assert np.isfinite(np.float32(scale("layers.0.q_proj", rank) / (alpha / rank)))

    else:
        values = families.config_to_json(config.trunk, 151_936)
        read = partial(families.config_from_json, source="here")
    num_refused = 0
    for seed in range(NUM_FILES):
        rng = random.Random(seed)
        changes = {name: rng.choice(STRANGE) for name in rng.sample(sorted(values), rng.choice([1, 1, 2]))}
        start = time.process_time()
        try:
            read(values | changes)
        except (ConversionError, ConfigError) as error:
            num_refused += 1
            assert str(error).startswith("here"), changes  # noqa: PT017
        assert time.process_time() - start < MAX_SECONDS, changes
    assert num_refused > 0.3 * NUM_FILES
