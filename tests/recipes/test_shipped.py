"""The shipped model: answers that change are detected, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax import Omni
from omni_jax.checkpoint.release import open_release
from omni_jax.config.model import SHIPPED_RELEASES
from omni_jax.convert.release import export_mini_omni, import_mini_omni
from recipes.nano import ship

pytestmark = pytest.mark.slow

SHIPPED_ANSWERS = json.loads(Path(__file__).with_name("shipped.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def omni() -> Omni:
    return Omni.from_pretrained("nano")


def test_shipped_model_is_the_default_trained_and_small() -> None:
    omni = Omni.from_pretrained()
    assert omni.trained
    assert omni.config == open_release("nano").config
    assert sum(file.stat().st_size for file in SHIPPED_RELEASES["nano"].iterdir()) < 36e6


@pytest.mark.parametrize("shipped", SHIPPED_ANSWERS, ids=lambda one: "-".join(map(str, one["request"].values())))
def test_shipped_answers_do_not_change(omni: Omni, shipped: dict[str, Any]) -> None:
    reply = ship.answer(omni, shipped["request"])
    assert reply.text == shipped["text"]
    np.testing.assert_array_equal(reply.tokens, shipped["tokens"])
    assert reply.finish_reason == "stop"


def test_shipped_model_to_pytorch_and_back(tmp_path: Path) -> None:
    export_mini_omni(open_release("nano"), tmp_path / "theirs")
    import_mini_omni(str(tmp_path / "theirs"), tmp_path / "back", whisper_source="nano", snac_source="nano")
    shipped = SHIPPED_ANSWERS[0]
    reply = ship.answer(Omni.from_pretrained(tmp_path / "back"), shipped["request"])
    assert reply.text == shipped["text"]
    np.testing.assert_array_equal(reply.tokens, shipped["tokens"])


def test_shipped_requests_are_those_of_ship() -> None:
    assert [shipped["request"] for shipped in SHIPPED_ANSWERS] == [dict(question) for question in ship.COMPARED]
