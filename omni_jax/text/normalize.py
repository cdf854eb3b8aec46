"""Prepares the text of a request as a release needs it: see `omni_jax.config.model.TextConfig`."""

from __future__ import annotations

import unicodedata
from typing import Any

from omni_jax.config.model import TextConfig
from omni_jax.errors import ConfigError
from omni_jax.text.unicode import clean_up


def normalize_text(text: Any, config: TextConfig, *, may_be_empty: bool = False) -> str:
    """The text of a request as the model's tokenizer takes it.

    Args:
        text: of the request.
        config: how the release wants it.
        may_be_empty: whether a text without a letter or a digit becomes an empty one.

    Raises:
        ConfigError: it is no string, has half a character, or no letter or digit.
    """
    if not isinstance(text, str):
        raise ConfigError(f"text: expected a string, found {type(text).__name__}", field="text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON and the shell can make a lone surrogate, which tokenizers do not accept.
        message = f"text: expected whole characters, found half of one at {error.start}"
        raise ConfigError(message, field="text") from None
    if config.spoken_english:
        # Its rules and a parser of Markdown, which most models have no use for.
        from omni_jax.text.spoken_english import spoken_english

        result = spoken_english(text, config.names)
    else:
        result = clean_up(text)
    if not any(unicodedata.category(char)[0] in "LN" for char in result):
        if may_be_empty:
            return ""
        found = "none" if not text else ascii(text if len(text) <= 40 else text[:40] + "...")
        raise ConfigError(f"text: expected some text with a letter or a digit, found {found}", field="text")
    return result
