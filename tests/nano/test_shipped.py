"""The voice that ships: no later change may alter what it says unnoticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nano import ship
from omni_jax import Omni
from omni_jax.checkpoint.release import open_release
from omni_jax.config.model import SHIPPED_RELEASES
from omni_jax.convert.release import export_mini_omni, import_mini_omni

SHIPPED_ANSWERS = json.loads(Path(__file__).with_name("shipped.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def omni() -> Omni:
    return Omni.load("nano")


def test_it_is_the_default_taught_and_small() -> None:
    omni = Omni.load()
    assert omni.trained
    assert omni.config == open_release("nano").config
    assert sum(file.stat().st_size for file in SHIPPED_RELEASES["nano"].iterdir()) < 16e6


@pytest.mark.parametrize("shipped", SHIPPED_ANSWERS, ids=lambda shipped: "-".join(map(str, shipped["ask"].values())))
def test_it_answers_as_it_was_shipped(omni: Omni, shipped: dict[str, Any]) -> None:
    reply = ship.ask(omni, shipped["ask"])
    assert reply.text == shipped["text"]
    np.testing.assert_array_equal(reply.tokens, shipped["tokens"])
    assert reply.finish_reason == "stop"


def test_to_the_pytorch_format_and_back(tmp_path: Path) -> None:
    export_mini_omni(open_release("nano"), tmp_path / "theirs")
    import_mini_omni(str(tmp_path / "theirs"), tmp_path / "back", whisper_source="nano", snac_source="nano")
    shipped = SHIPPED_ANSWERS[0]
    reply = ship.ask(Omni.load(tmp_path / "back"), shipped["ask"])
    assert reply.text == shipped["text"]
    np.testing.assert_array_equal(reply.tokens, shipped["tokens"])


def test_what_is_guarded_is_what_was_shipped() -> None:
    assert [shipped["ask"] for shipped in SHIPPED_ANSWERS] == [dict(question) for question in ship.GUARDED]
