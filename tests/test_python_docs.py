"""The Python code of docs/python.md, run as printed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.api import Omni
from omni_jax.inference.generation import GenerationConfig

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
QUESTION = Path(__file__).parents[1] / "omni_jax" / "assets" / "questions" / "name.wav"


@pytest.mark.slow
def test_python_docs_run_as_printed(tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(QUESTION, "question.wav")
    from_pretrained = Omni.from_pretrained

    shutil.copytree(tiny_release, "talker")
    config = json.loads(Path("talker/config.json").read_text())
    Path("talker/config.json").write_text(json.dumps(config | {"conversation": True}))

    def load(name: str, **options: Any) -> Omni:
        return from_pretrained(tiny_release if name == "nano" else name, **options)

    monkeypatch.setattr(Omni, "from_pretrained", load)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 8
    assert (tmp_path / "answer.wav").stat().st_size > 44
    assert names["handle"].outcome == "done"
    assert len(names["talk"].history) == 2
    np.testing.assert_array_equal(names["same"].answer(text="a").tokens, names["omni"].answer(text="a").tokens)
    assert np.isfinite(float(names["loss"]))
    gradients = jax.tree.leaves(names["gradients"])
    assert all(np.isfinite(np.asarray(gradient)).all() for gradient in gradients)
    assert sum(float(np.abs(np.asarray(gradient)).max()) > 0 for gradient in gradients) > 10
    expected = names["omni"].answer("question.wav", max_steps=1).tokens[7, 0]
    assert int(names["first_text_token"][0]) == expected


def test_python_docs_list_every_option() -> None:
    section = PAGE.read_text().split("## Options")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE)
    assert rows == [(field.name, repr(field.default)) for field in dataclasses.fields(GenerationConfig)]
