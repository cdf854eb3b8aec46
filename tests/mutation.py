"""Damaged copies of files, for tests that read thousands of them."""

from __future__ import annotations

import random


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, mostly in the header; a piece removed, repeated or moved; or the end cut."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 2, 8, 64])):
        if not changed:
            break
        at = rng.randrange(min(len(changed), rng.choice([64, 512, len(changed)])))
        action = rng.randrange(6)
        if action < 3:
            changed[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif action == 3:
            changed[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", bytes(4)])
        elif action == 4:
            size = rng.randrange(1, 200)
            changed[at : at + size] = changed[at : at + size] * rng.choice([0, 2, 3])
        elif rng.random() < 0.1 and len(changed) > 100:
            del changed[rng.randrange(50, len(changed)) :]
    return bytes(changed)


_PIECES = [
    *(
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        '"',
        "'",
        "\\",
        "-",
        "&",
        "*",
        "!",
        "|",
        ">",
        "#",
        "%",
        " ",
        "~",
        "[[[[",
        "]]]",
        "{{",
    ),
    *("null", "true", "NaN", "Infinity", "1e999", "-1", "0", "0.5", "1e3", "9223372036854775808", "0x7f", "1_000"),
    *('"a"', '""', "\\u0000", "\\ud800", "&a", "*a", "<<:", "!!int", "!!python/name:", "2020-01-01", ".inf", "é", "世"),
]


def mutate_text(text: str, rng: random.Random) -> str:
    """Words and signs of JSON and YAML inserted, removed, repeated, exchanged for others; or nested, or the end cut."""
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, size = rng.randrange(len(text) + 1), rng.choice([0, 1, 1, 5, 40])
        piece = rng.choice(_PIECES)
        action = rng.randrange(6)
        if action < 3:
            text = text[:at] + piece + text[at + size :]
        elif action == 3:
            text = text[:at] + text[at : at + size] * rng.choice([2, 3]) + text[at + size :]
        elif action == 4:
            text = text[:at] + piece * rng.choice([3, 100, 2000]) + text[at:]
        elif rng.random() < 0.3:
            text = text[:at]
    return text
