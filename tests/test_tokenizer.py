"""Tokenizers that come from anywhere, and the byte tokenizer."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

import omni_jax
from omni_jax.errors import CheckpointError
from omni_jax.tokenizer import byte_tokenizer, encode_text, load_tokenizer

NANO = Path(omni_jax.__file__).parent / "assets" / "nano" / "tokenizer.json"


def tokenizer_file(folder: Path, **changes: Any) -> Path:
    """The byte tokenizer with other parts."""
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(byte_tokenizer().to_str()) | changes))
    return folder / "tokenizer.json"


def precompiled(charsmap: bytes) -> dict[str, str]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}


def test_byte_tokenizer_has_an_id_per_byte() -> None:
    tokenizer = byte_tokenizer()
    ascii = "".join(map(chr, range(128)))
    assert len(set(encode_text(tokenizer, ascii))) == len(ascii)
    assert tokenizer.decode(encode_text(tokenizer, "na\u00efve \u4e16")) == "na\u00efve \u4e16"


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": precompiled(b"")},
        {"normalizer": precompiled(b"\4\0\0\0" + b"\xff" * 4)},
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}},
        {"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", -1.0]]}},
        {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}},
        {"model": 1},
    ],
    ids=["panic of the parser", "panic of the normalizer", "no unknown token", "id out of range", "merges", "model"],
)
def test_load_tokenizer_refuses_damaged_ones(changes: dict[str, Any], tmp_path: Path) -> None:
    file = tokenizer_file(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a tokenizer") as info:
        load_tokenizer(file)
    assert "\n" not in str(info.value)


def test_load_tokenizer_neither_cuts_nor_pads(tmp_path: Path) -> None:
    """Padding to so many tokens would end the process: no memory, no exception."""
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
    pad: dict[str, Any] = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    tokenizer = load_tokenizer(tokenizer_file(tmp_path, truncation=cut, padding=pad))
    assert encode_text(tokenizer, "Hello") == encode_text(byte_tokenizer(), "Hello")


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "l"}, "l" * 1000)] * 4}}, r"1e\+12"),
        ({"normalizer": {"type": "Sequence", "normalizers": [replace({"Regex": ""}, "l")] * 50}}, r"1.13e\+15"),
        ({"decoder": {"type": "Sequence", "decoders": [replace({"String": "l"}, "l" * 1000)] * 4}}, r"1e\+12"),
        ({"normalizer": {"type": "Prepend", "prepend": "l" * 10_000_000}}, r"1e\+07"),
    ],
)
def test_load_tokenizer_refuses_those_that_blow_up_text(part: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"json: {next(iter(part))}: expected texts .*, found {found} times"):
        load_tokenizer(tokenizer_file(tmp_path, **part))


def test_load_tokenizer_takes_usual_replacements(tmp_path: Path) -> None:
    """Those of Llama 2, T5 and ALBERT together."""
    quotes = [replace({"String": quote}, '"') for quote in ("``", "''")]
    spaces = [replace({"String": " "}, "\u2581"), replace({"Regex": " {2,}"}, "\u2581")]
    normalizers = [{"type": "Prepend", "prepend": "\u2581"}, *spaces, *quotes, {"type": "NFKC"}]
    back = [replace({"String": "\u2581"}, " "), {"type": "Fuse"}]
    load_tokenizer(
        tokenizer_file(
            tmp_path,
            normalizer={"type": "Sequence", "normalizers": normalizers},
            decoder={"type": "Sequence", "decoders": back},
        )
    )


def test_load_tokenizer_of_nano() -> None:
    tokenizer = load_tokenizer(NANO)
    assert tokenizer.decode(encode_text(tokenizer, "Hello world.")).strip() == "Hello world."


def test_encode_text_turns_panics_into_errors() -> None:
    tokenizer = byte_tokenizer()
    broken = type(tokenizer).from_str(
        json.dumps(json.loads(tokenizer.to_str()) | {"normalizer": precompiled(b"\4\0\0\0" + b"\xff" * 4)})
    )
    with pytest.raises(CheckpointError, match="tokenizer: expected a tokenizer that takes 'Hello', found index out of"):
        encode_text(broken, "Hello")
