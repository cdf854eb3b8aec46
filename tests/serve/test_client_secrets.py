"""Client secrets: valid for some time, and never too many."""

from __future__ import annotations

import pytest

from omni_jax.errors import BusyError
from omni_jax.serve import client_secrets
from omni_jax.serve.client_secrets import MAX_BYTES, SECRET_BYTES, ClientSecrets
from omni_jax.serve.realtime_schema import Session


def test_one_client_leaves_secrets_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets, large = ClientSecrets(), Session(model="small", instructions="a" * 65_536)
    size = SECRET_BYTES + len(large.model_dump_json())
    for _ in range(MAX_BYTES // 4 // size):
        secrets.create("a", large, 10)
    with pytest.raises(BusyError, match="try again later"):
        secrets.create("a", large, 10)
    value, expires = secrets.create("b", large, 10)
    assert secrets.find(value) == (large, "b")
    monkeypatch.setattr(client_secrets.time, "time", lambda: expires + 1.0)
    assert secrets.find(value) is None
    secrets.create("a", large, 10)
