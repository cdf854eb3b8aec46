"""The text of requests: Unicode clean-up, and what is refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_jax.checkpoint.release import load_model_config, save_model_config
from omni_jax.config.model import ModelConfig, TextConfig
from omni_jax.errors import ConfigError
from omni_jax.text.normalize import normalize_text
from omni_jax.text.unicode import clean_up

PLAIN = TextConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What's 7 + 5?  *Yes* # $3.50 :-)", "What's 7 + 5? *Yes* # $3.50 :-)"),
        ("what’s “this”, ‘that’ «there»", 'what\'s "this", \'that\' "there"'),  # noqa: RUF001
        ("50 − 20, 5–10, yes—no, wait…", "50 - 20, 5-10, yes - no, wait..."),  # noqa: RUF001
        (" one\r\ntwo\tthree\u2028four\u00a0five\x00\x07 ", "one two three four five"),
        ("zero\u200bwidth\ufeff soft\u00adhyphen", "zerowidth softhyphen"),
        ("cafe\u0301", "café"),
        ("a\u200b\u0301", "á"),
        ("你好 🙂 ½", "你好 🙂 ½"),
    ],
)
def test_clean_up(text: str, expected: str) -> None:
    assert clean_up(text) == expected
    assert normalize_text(text, PLAIN) == expected


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=1))
def test_clean_up_keeps_ascii(text: str) -> None:
    assert clean_up(text) == text


@given(st.text())
def test_clean_up_is_idempotent_and_in_one_line(text: str) -> None:
    cleaned = clean_up(text)
    assert clean_up(cleaned) == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") for char in cleaned)
    assert "  " not in cleaned


@pytest.mark.parametrize("spoken_english", [False, True])
@pytest.mark.parametrize("text", ["", " ", "!!!", "\n", "🙂", "...", "\u200b"])
def test_text_without_letter_or_digit_is_refused(text: str, spoken_english: bool) -> None:
    with pytest.raises(ConfigError, match="text: expected some text with a letter or a digit, found") as raised:
        normalize_text(text, TextConfig(spoken_english=spoken_english))
    assert raised.value.field == "text"


@pytest.mark.parametrize("text", ["7", "a", "你", "½"])
def test_one_letter_or_digit_is_enough(text: str) -> None:
    assert normalize_text(text, PLAIN) == text
    assert normalize_text(text, TextConfig(spoken_english=True))


def test_text_config_in_config_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = ModelConfig(text=TextConfig(spoken_english=True, names=("Paris",), max_words=9))
    save_model_config(config, path)
    assert load_model_config(path) == config
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["text"]
    path.write_text(json.dumps(values), encoding="utf-8")
    assert load_model_config(path) == ModelConfig()
    for wrong, message in [
        ({"max_words": 0}, r"text\.max_words: .*found 0"),
        ({"spoken": True}, r"text\.spoken"),
        ({"names": ["Paris"]}, "names need spoken_english"),
        ({"spoken_english": True, "names": [" "]}, "names must not be empty"),
    ]:
        path.write_text(json.dumps(values | {"text": wrong}), encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            load_model_config(path)
