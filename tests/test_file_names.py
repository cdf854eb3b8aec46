"""File names made from ids."""

from __future__ import annotations

from omni_jax.file_names import safe_file_name


def test_safe_file_name() -> None:
    assert safe_file_name("q-1.a_ü") == "q-1.a_ü"
    assert safe_file_name("../a b").startswith("_a_b-")
    assert safe_file_name("..").startswith("-")
    assert safe_file_name("a/b") != safe_file_name("a:b")
    assert len(safe_file_name("日" * 300).encode()) < 250


def test_safe_file_name_with_forced_hash() -> None:
    assert safe_file_name("A", force_hash=True).startswith("A-")
    assert safe_file_name("A", force_hash=True) != safe_file_name("a", force_hash=True)
