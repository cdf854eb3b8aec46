from __future__ import annotations

import warnings
from typing import Any

import jax
import pytest

from omni_jax.api import Omni
from omni_jax.errors import UntrainedWarning


@pytest.fixture(scope="module")
def tiny() -> Omni:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        return Omni.untrained("tiny")


@pytest.fixture
def loads(tiny: Omni, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`from_pretrained("tiny")` gives the fixture, which has its programs compiled; the names that were loaded."""
    real, names = Omni.from_pretrained, []

    def load(name: str, *, codec: Any = "jax", mesh: Any = None, **options: Any) -> Omni:
        names.append(name)
        if name != "tiny" or codec != "jax" or mesh or any(options.values()):
            return real(name, codec=codec, mesh=mesh, **options)
        warnings.warn("the model 'tiny' is untrained", UntrainedWarning, stacklevel=2)
        return tiny

    monkeypatch.setattr(Omni, "from_pretrained", load)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    return names
