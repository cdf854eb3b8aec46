"""The command line of training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
    command = ["configs/mini_omni_stage1.yaml", "--dry-run", "mesh.fsdp=1"]
    refused = run(*command)
    assert refused.returncode == 2
    assert "start=preset:mini_omni" in refused.stderr
    found = run(*command, "start=preset:mini_omni")
    assert found.returncode == 0, found.stderr
    assert "trunk             357,898,112  frozen" in found.stdout


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
