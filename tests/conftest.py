import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before anything imports jax. Eight devices, so that sharded code can be tested on any machine; no network.
# Tests compile thousands of programs and run each a few times: optimizing them would take several times as long as all
# the rest. `make test-nightly` sets OMNI_JAX_TEST_OPTIMIZED to run the numeric tests at XLA's default level too.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        *(
            []
            if os.environ.get("OMNI_JAX_TEST_OPTIMIZED")
            else ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
        ),
        # Half the time to compile; later versions do not know these flags any more.
        *(
            ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
            if not os.environ.get("OMNI_JAX_TEST_OPTIMIZED") and version("jaxlib").startswith("0.10.")
            else []
        ),
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiled programs are not kept on disk: read back, one for several CPU devices has forgotten the order of its
# collectives and can deadlock (jax 0.10.2).
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
# Python frames in compiled programs: 3 % of the time, and only to debug the compiler.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from omni_jax.config.model import ModelConfig
from tests import models

SMALL_MODELS = (
    "tests/cli/",
    "tests/evaluation/",
    "tests/serve/",
    "tests/inference/test_async_engine.py",
    "tests/test_api.py",
    "tests/test_batch.py",
    "tests/test_long_recordings.py",
    "tests/test_microphone_example.py",
)
"""Tests that run the same two small models: one process compiles their programs for all of them."""


# Imports and traces leave millions of objects that live on. Looking through them for cycles took 7 % of all tests.
gc.disable()


def pytest_collection_finish() -> None:
    """From here on, collect what tests leave."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep together what shares compiled programs and fixtures, when several processes share the tests."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModel(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "small models" if file.startswith(SMALL_MODELS) else file

    return ByModel(config, log)


@pytest.fixture(scope="module")
def quickly_compiled() -> Iterator[None]:
    """Compiles everything of a test module with `models.quick_compile`."""
    with models.quick_compile():
        yield


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """The preset `tiny`."""
    return models.tiny_config()


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig) -> Path:
    """A folder with `mini_omni`, `whisper` and `snac` in it, float32, random."""
    folder = tmp_path_factory.mktemp("parts")
    models.whisper_folder(folder / "whisper", tiny_config.audio_encoder)
    models.snac_folder(folder / "snac", tiny_config.codec)
    models.mini_omni_folder(folder / "mini_omni", tiny_config)
    return folder


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig) -> Path:
    """A release folder with random float32 weights and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("release") / "tiny"
    models.release_folder(folder, tiny_config)
    return folder
