"""The command line: import, export, init, inspect, their errors and their memory."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperModel
from typer.testing import CliRunner

import convert_weights
from omni_jax.audio.features import log_mel, pad
from omni_jax.audio.io import read_audio
from omni_jax.checkpoint.release import open_release
from omni_jax.cli.demo import QUESTIONS
from omni_jax.codec.snac import FRAME_SLOTS, make_decoder
from omni_jax.codec.torch_snac import import_snac
from omni_jax.config.model import SHIPPED_RELEASES, AdapterConfig, AudioEncoderConfig, TrunkConfig, VocabConfig
from tests import models
from tests.reference_openai_whisper import load_model

ROOT = Path(convert_weights.__file__).parent


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run(*arguments):
    return CliRunner().invoke(convert_weights.app, [str(argument) for argument in arguments])


def sources(folder):
    return "--whisper", folder / "whisper", "--snac", folder / "snac"


def test_import_export_import_is_bit_exact(tiny_parts, tmp_path, tiny_config):
    done = run("import", tiny_parts / "mini_omni", tmp_path / "release", *sources(tiny_parts))
    assert done.exit_code == 0, done.output
    assert open_release(tmp_path / "release").config == tiny_config
    assert run("export", tmp_path / "release", tmp_path / "back").exit_code == 0
    again = run("import", tmp_path / "back", tmp_path / "again", *sources(tiny_parts))
    assert again.exit_code == 0, again.output
    for file in (tmp_path / "release").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_init_then_export(tiny_parts, tmp_path):
    models.language_model_folder(tmp_path / "lm", "qwen2", tied=False)
    arguments = ("--tts-adapter-layers", 2, "--adapter", "mlp", "--seed", 3, *sources(tiny_parts))
    done = run("init", tmp_path / "release", "--lm", tmp_path / "lm", *arguments)
    assert done.exit_code == 0, done.output
    config = open_release(tmp_path / "release").config
    assert (config.tts_adapter_layers, config.adapter.kind, config.trunk.tie_word_embeddings) == (2, "mlp", False)
    assert run("export", tmp_path / "release", tmp_path / "theirs").exit_code == 0
    assert run("export", tmp_path / "release", tmp_path / "trunk", "--to", "transformers").exit_code == 0
    assert names(tmp_path / "theirs") == [
        "lit_model.pth",
        "model_config.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((tmp_path / "trunk" / "config.json").read_text())["model_type"] == "qwen2"


def test_dtype_option(tiny_parts, tmp_path):
    done = run("import", tiny_parts / "mini_omni", tmp_path / "out", "--dtype", "bfloat16", *sources(tiny_parts))
    assert done.exit_code == 0, done.output
    assert {tensor.dtype.name for tensor in open_release(tmp_path / "out").model_tensors().values()} == {"bfloat16"}
    assert run("init", tmp_path / "no", "--lm", tmp_path, "--dtype", "fp8", *sources(tiny_parts)).exit_code == 2


def test_export_to_whisper_and_snac_and_import_again(tmp_path):
    nano = open_release("nano")
    for name, to in (("whole", "mini-omni"), ("audio_encoder", "whisper"), ("codec", "snac")):
        done = run("export", "nano", tmp_path / name, "--to", to)
        assert done.exit_code == 0, done.output

    whisper, loaded = WhisperModel.from_pretrained(tmp_path / "audio_encoder", output_loading_info=True)
    assert all(name.startswith("decoder.") for name in loaded["missing_keys"])
    assert not loaded["unexpected_keys"]
    positions = nano.config.audio_encoder.max_position
    question = read_audio(QUESTIONS / "sum.wav")
    mel = np.array(log_mel(pad(question, nano.config.audio_encoder.max_samples)[None]))
    with torch.no_grad():
        theirs = whisper.eval().encoder(torch.from_numpy(mel))[0].numpy()
    # A recording of full length, as transformers knows no `mask_padding`.
    ours = np.asarray(nano.load_model(stacked=False, dtype="float32").audio_encoder(mel, np.array([positions])))
    # Whisper's features reach 22, where float32 itself differs by 1e-3 from float64 in single elements.
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)

    codec = nano.load_codec()
    codes = np.random.default_rng(1).integers(0, codec.config.codebook_size, (1, 9, 7)).astype(np.int32)
    books = [torch.from_numpy(codes[:, :, slots].reshape(1, -1).astype(np.int64)) for slots in FRAME_SLOTS]
    with torch.no_grad():
        theirs = import_snac().SNAC.from_pretrained(str(tmp_path / "codec")).decode(books)[:, 0].numpy()
    np.testing.assert_allclose(np.asarray(make_decoder(codec)(codes)), theirs, atol=1e-4)

    again = tmp_path / "again"
    done = run(
        "import", tmp_path / "whole", again, "--whisper", tmp_path / "audio_encoder", "--snac", tmp_path / "codec"
    )
    assert done.exit_code == 0, done.output
    back = open_release(again)
    assert back.config.codec == nano.config.codec
    encoders = [
        {n: t for n, t in release.model_tensors().items() if n.startswith("audio_encoder.")} for release in (nano, back)
    ]
    assert encoders[0].keys() == encoders[1].keys()
    for name, tensor in encoders[0].items():
        np.testing.assert_array_equal(encoders[1][name].read(), tensor.read().astype(np.float32))
    codec = back.codec_tensors()
    for name, tensor in nano.codec_tensors().items():
        # Lengths and directions are float32, the shipped codec float16.
        np.testing.assert_allclose(codec[name].read(), tensor.read(), rtol=1e-5, atol=1e-7)


def test_inspect(tiny_parts, tiny_release):
    ours = run("inspect", tiny_release)
    assert ours.exit_code == 0, ours.output
    lines = [line.split() for line in ours.output.splitlines()]
    assert ["trunk.layers.*.attention.q.weight", "2", "x", "4x16x48", "float32", "6,144"] in lines
    assert ["embed.audio", "7x72x48", "float32", "24,192"] in lines
    sizes = {line[0]: int(line[1].replace(",", "")) for line in lines if len(line) == 2}
    assert set(sizes) == {"adapter", "codec", "audio_encoder", "embed", "norm", "trunk", "total"}
    assert sizes["total"] == sum(sizes.values()) / 2
    release = open_release(tiny_release)
    files = ("model.safetensors", "audio_encoder.safetensors", "codec.safetensors")
    held = sum((tiny_release / name).stat().st_size for name in files)
    assert 0 <= held - 4 * sizes["total"] < 50_000, release

    # A model that ships with the package, by name; a folder of that name that is no release does not hide it.
    shipped = run("inspect", "nano")
    assert shipped.exit_code == 0, shipped.output
    assert shipped.output == run("inspect", SHIPPED_RELEASES["nano"]).output
    # Types are those in the files: int8 matrices, their scales not counted.
    types = {line[0]: line[-2] for line in map(str.split, shipped.output.splitlines()) if len(line) > 2}
    assert types["trunk.layers.*.attention.q.weight"] == "int8"
    assert types["norm.scale"] == "float32"

    # The tied head is counted once.
    theirs = run("inspect", tiny_parts / "mini_omni")
    assert "lm_head" not in theirs.output
    assert theirs.exit_code == 0, theirs.output
    lines = [line.split() for line in theirs.output.splitlines()]
    assert ["transformer.h.*.attn.attn.weight", "2", "x", "128x48", "float32", "12,288"] in lines


def test_help_shows_whole_ids_and_extras():
    """Of a narrow terminal; what is in brackets is no markup."""
    text = " ".join(run("init", "--help").output.split())
    for name in ("Qwen/Qwen3-0.6B", "openai/whisper-small", "hubertsiuzdak/snac_24khz", "omni-jax[torch]"):
        assert name in text


# Errors: one message, exit code 2, no traceback, no folder.


def fails(*arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.output
    return done.stderr.removeprefix("error: ").rstrip("\n")


def test_output_folder_in_use_is_refused(tiny_parts, tiny_release, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    (tmp_path / "file").touch()
    models.language_model_folder(tmp_path / "lm", "llama", tied=True)
    for out in (tmp_path / "out", tmp_path / "file"):
        for arguments in (
            ("import", tiny_parts / "mini_omni", out, *sources(tiny_parts)),
            ("export", tiny_release, out),
            ("export", tiny_release, out, "--to", "transformers"),
            ("init", out, "--lm", tmp_path / "lm", *sources(tiny_parts)),
        ):
            message = fails(*arguments)
            assert message == f"{out}: expected a new or an empty folder, found something there already"
    assert names(tmp_path / "out") == ["precious"]


def test_output_to_the_current_folder_is_refused(tiny_release, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        fails("export", tiny_release, ".")
        == ".: expected a new folder, found the current one, which cannot be replaced"
    )
    assert not names(tmp_path)


def test_output_to_an_empty_folder(tiny_release, tmp_path):
    (tmp_path / "out").mkdir()
    assert run("export", tiny_release, tmp_path / "out").exit_code == 0


def test_training_run_as_a_release(tiny_release, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for arguments in (("inspect", tmp_path / "run"), ("export", tmp_path / "run", tmp_path / "out")):
        assert "a training run that has not finished" in fails(*arguments)
    shutil.copytree(tiny_release, tmp_path / "run" / "release")
    assert run("inspect", tmp_path / "run").output == run("inspect", tiny_release).output
    assert run("export", tmp_path / "run", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("name", ["lit_model.pth", "model_config.yaml", "tokenizer.json"])
def test_import_names_the_missing_file(name, tiny_parts, tmp_path):
    folder = shutil.copytree(tiny_parts / "mini_omni", tmp_path / "mini_omni")
    (folder / name).unlink()
    message = fails("import", folder, tmp_path / "out", *sources(tiny_parts))
    assert message.startswith(f"{folder}: expected a Mini-Omni checkpoint with ")
    assert message.endswith(f"found no {name}")


def test_missing_or_swapped_sources(tiny_parts, tmp_path):
    source = tiny_parts / "mini_omni"
    assert "expected a Whisper" in fails(
        "import", source, tmp_path / "out", "--whisper", tmp_path / "no", "--snac", tiny_parts / "snac"
    )
    assert "expected a SNAC, found a Mini-Omni checkpoint" in fails(
        "import", source, tmp_path / "out", "--whisper", tiny_parts / "whisper", "--snac", source
    )
    swapped = "--whisper", tiny_parts / "snac", "--snac", tiny_parts / "snac"
    message = fails("import", source, tmp_path / "out", *swapped)
    assert message == f"{tiny_parts / 'snac'}: expected a Whisper, found a SNAC"
    doubled = "--whisper", tiny_parts / "whisper", "--snac", tiny_parts / "whisper"
    message = fails("import", source, tmp_path / "out", *doubled)
    assert message == f"{tiny_parts / 'whisper'}: expected a SNAC, found a Whisper"
    assert "expected a release" in fails("export", tmp_path / "no", tmp_path / "out")
    assert "expected a language model" in fails("init", tmp_path / "out", "--lm", source, *sources(tiny_parts))
    assert "expected a release with config.json or" in fails("inspect", tiny_parts / "snac")
    assert not (tmp_path / "out").exists()


def test_import_error_lists_all_tensors(tiny_parts, tmp_path):
    folder = shutil.copytree(tiny_parts / "mini_omni", tmp_path / "mini_omni")
    state = torch.load(folder / "lit_model.pth", weights_only=True)
    state["strange"] = state.pop("transformer.ln_f.weight")
    torch.save(state, folder / "lit_model.pth")
    message = fails("import", folder, tmp_path / "out", *sources(tiny_parts))
    assert message.splitlines()[1:] == [
        "transformer.ln_f.weight: missing, expected (48,)",
        "strange: unknown, found (48,)",
    ]


def test_export_of_a_model_that_the_published_code_lacks(tmp_path):
    models.release_folder(
        tmp_path / "release", replace(models.tiny_config(), adapter=AdapterConfig(intermediate_size=100))
    )
    message = fails("export", tmp_path / "release", tmp_path / "out")
    assert message.endswith(
        "adapter.intermediate_size: expected at most trunk.intermediate_size, which is 96, found 100"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_export_without_torch(tiny_release, tmp_path):
    """Only formats that are PyTorch files need it."""
    script = """
import sys
sys.modules["torch"] = None
import convert_weights
try:
    convert_weights.app(sys.argv[1:])
except SystemExit as end:
    sys.exit(end.code)
"""

    def without(*arguments):
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    done = without("export", tiny_release, tmp_path / "trunk", "--to", "transformers")
    assert done.returncode == 0, done.stderr
    done = without("export", tiny_release, tmp_path / "theirs")
    assert done.returncode == 2
    assert "this format needs PyTorch: pip install 'omni-jax[torch]'" in done.stderr
    assert not (tmp_path / "theirs").exists()
    assert without("export", tiny_release, tmp_path / "audio_encoder", "--to", "whisper").returncode == 0
    done = without("export", tiny_release, tmp_path / "codec", "--to", "snac")
    assert done.returncode == 2
    assert "this format needs PyTorch: pip install 'omni-jax[torch]'" in done.stderr
    assert not (tmp_path / "codec").exists()


# Memory.

MEASURE = """
import sys, threading, time
import psutil
import convert_weights, torch
import jax, numpy
from omni_jax.checkpoint.release import open_release

# Libraries and compiler are loaded before the measurement starts.
jax.random.normal(jax.random.key(0), (64, 64)).block_until_ready()
process = psutil.Process()
start = peak = process.memory_info().rss
stop = threading.Event()

def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, process.memory_info().rss)

thread = threading.Thread(target=watch)
thread.start()
try:
    if sys.argv[1] == "load":
        model = open_release(sys.argv[2]).load_model(stacked=sys.argv[3] == "stacked", dtype="float32")
    else:
        convert_weights.app(sys.argv[1:], standalone_mode=False)
finally:
    stop.set()
    thread.join()
print(peak - start)
"""


@pytest.fixture(scope="module")
def bigger(tmp_path_factory):
    """Some 150 MB of weights in the proportions of the real model: a third are the tables."""
    folder = tmp_path_factory.mktemp("bigger")
    config = replace(
        models.tiny_config(),
        audio_encoder=AudioEncoderConfig(
            hidden_size=192, num_layers=6, num_heads=6, intermediate_size=768, max_position=100
        ),
        trunk=TrunkConfig(
            hidden_size=448, num_layers=9, num_heads=7, num_kv_heads=1, intermediate_size=2048, max_position=192
        ),
        vocab=VocabConfig(text=24000, audio=64, text_specials=64, audio_specials=64),
    )
    config = replace(config, adapter=replace(config.adapter, intermediate_size=config.trunk.intermediate_size))
    models.whisper_folder(folder / "whisper", config.audio_encoder)
    models.snac_folder(folder / "snac", config.codec)
    models.mini_omni_folder(folder / "mini_omni", config)
    assert run("import", folder / "mini_omni", folder / "release", *sources(folder)).exit_code == 0
    assert run("export", folder / "release", folder / "lm", "--to", "transformers").exit_code == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("action", ["import", "export", "transformers", "init", "load stacked", "load single"])
def test_memory_of_conversion(action, bigger, tmp_path):
    arguments = {
        "import": ("import", bigger / "mini_omni", tmp_path / "out", *sources(bigger)),
        "export": ("export", bigger / "release", tmp_path / "out"),
        "transformers": ("export", bigger / "release", tmp_path / "out", "--to", "transformers"),
        "init": ("init", tmp_path / "out", "--lm", bigger / "lm", "--tts-adapter-layers", 1, *sources(bigger)),
        "load stacked": ("load", bigger / "release", "stacked"),
        "load single": ("load", bigger / "release", "single"),
    }[action]
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    size = (bigger / "release" / "model.safetensors").stat().st_size
    assert size > 120e6
    ratio = int(done.stdout.split()[-1]) / size
    print(f"{action}: {ratio:.2f} times the weights")
    assert ratio < 1.5


def test_export_to_openai_whisper_and_import_again(tmp_path):
    assert run("export", "nano", tmp_path / "whole").exit_code == 0
    done = run("export", "nano", tmp_path / "whisper", "--to", "openai-whisper")
    assert done.exit_code == 0, done.output
    load_model(tmp_path / "whisper" / "small.pt")
    # In the folder of the checkpoint, where the published code has it.
    shutil.copyfile(tmp_path / "whisper" / "small.pt", tmp_path / "whole" / "small.pt")
    done = run("import", tmp_path / "whole", tmp_path / "again", "--whisper", tmp_path / "whole", "--snac", "nano")
    assert done.exit_code == 0, done.output
    nano, again = (open_release(source) for source in ("nano", tmp_path / "again"))
    expected, found = nano.audio_encoder_tensors(), again.audio_encoder_tensors()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].read(), tensor.read())
