"""Unicode clean-up, for every release. Plain ASCII text in one line stays as it is."""

from __future__ import annotations

import unicodedata

_ASCII = str.maketrans(
    dict.fromkeys("‘’‚‛′ʼ´‹›＇", "'")  # noqa: RUF001
    | dict.fromkeys("“”„‟″«»＂", '"')  # noqa: RUF001
    | dict.fromkeys("‐‑‒–−﹣－", "-")  # noqa: RUF001
    | dict.fromkeys("—―", " - ")
    | {"…": "..."}
)


def clean_up(text: str) -> str:
    """One line in NFC, with quotes, apostrophes, dashes and ellipses in ASCII and single spaces.

    Control and zero-width characters are removed.
    """
    return " ".join(_to_ascii_punctuation(text).split())


def clean_up_lines(text: str) -> str:
    """As `clean_up`, with line ends and runs of spaces as they are."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(_to_ascii_punctuation(line) for line in lines)


def _to_ascii_punctuation(text: str) -> str:
    # What is removed goes first: NFC may join what was on both sides of it.
    kept = (" " if char.isspace() else char for char in text if char.isspace() or not _is_invisible(char))
    return unicodedata.normalize("NFC", "".join(kept)).translate(_ASCII)


def _is_invisible(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf")
