"""The command line of training."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from typer.testing import CliRunner

from omni_jax.data.records import Exchange, RecordWriter
from omni_jax.training.command import train_command

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    """`train.py` on one device."""
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_train_command_wants_all_process_options_or_none(tmp_path: Path):
    found = run("configs/tiny_stage1.yaml", f"out={tmp_path / 'out'}", "--processes", "2", "--process", "0")
    assert found.returncode == 2
    assert "expected all of --coordinator, --processes and --process, or none of them" in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"), [("optimizer.peak=1", "optimizer.peak: "), ("data.batch_size=0", "data.batch_size: ")]
)
def test_train_command_names_a_wrong_field(override: str, message: str):
    found = run("configs/tiny_stage1.yaml", override)
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr


def test_train_command_dry_run_of_a_missing_release_suggests_a_preset():
    refused = run("configs/mini_omni_stage1.yaml", "--dry-run", "mesh.fsdp=1")
    assert refused.returncode == 2
    assert "start=preset:mini_omni" in refused.stderr


MEMORY = r"memory per device: (\d+\.\d+) GiB by the compiler's account"


def test_train_command_dry_run_says_what_is_wrong_and_reports_the_memory(tmp_path: Path):
    found = run("configs/tiny_stage1.yaml", "--dry-run", f"out={tmp_path / 'out'}", "data.sources=[{path: none}]")
    assert found.returncode == 2
    assert "train: none: expected a folder of records, found no such folder" in found.stderr
    assert "adapter                10,752  trainable" in found.stdout
    assert re.search(MEMORY, found.stdout)
    assert not (tmp_path / "out").exists()


def test_train_command_dry_run_of_a_run_that_can_start(tmp_path: Path):
    with RecordWriter(tmp_path / "records") as writer:
        writer.write(Exchange("q", np.ones(8000, np.int16), "a", np.zeros((4, 7), np.int32)))
    app = typer.Typer()
    app.command()(train_command)
    source = f"data.sources=[{{path: {tmp_path / 'records'}}}]"
    command = [str(ROOT / "configs" / "tiny_stage1.yaml"), "--dry-run", f"out={tmp_path / 'out'}", source]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    memory = re.search(MEMORY, found.output)
    assert memory
    assert 0 < float(memory[1]) < 1
    assert not (tmp_path / "out").exists()


def test_train_command_names_the_extra_of_a_missing_package(tmp_path: Path):
    """As in an installation without the extra `train`."""
    code = (
        "import sys; sys.modules['orbax'] = None; import typer; "
        "from omni_jax.training.command import train_command; typer.run(train_command)"
    )
    file = tmp_path / "run.yaml"
    values = yaml.safe_load((ROOT / "configs" / "tiny_stage1.yaml").read_text())
    file.write_text(yaml.safe_dump({**values, "out": str(tmp_path / "out")}))
    command = [sys.executable, "-c", code, str(file)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    assert "pip install 'omni-jax[train]'" in found.stderr
