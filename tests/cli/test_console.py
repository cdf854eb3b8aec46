from __future__ import annotations

from omni_jax.cli.console import printable


def test_printable_replaces_control_characters() -> None:
    assert printable("a\x1b[2Jb\tc\nd\x85é") == "a\ufffd[2Jb\tc\nd\ufffdé"
