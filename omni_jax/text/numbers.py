"""Numbers as American English words."""

from __future__ import annotations

_SMALL = [
    *["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
    *["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"],
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SCALES = ("", " thousand", " million", " billion", " trillion")
_IRREGULAR_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
MAX_DIGITS = 3 * len(_SCALES)
"""Longer numbers are read digit by digit."""
NUMBER_WORDS = frozenset([*_SMALL, *_TENS, "hundred", *(scale.strip() for scale in _SCALES if scale)])


def cardinal(digits: str) -> str:
    """A whole number: `120` is `one hundred twenty`; digit by digit if it is long or begins with a zero."""
    if len(digits) > MAX_DIGITS or (digits[0] == "0" and len(digits) > 1):
        return spell_digits(digits)
    number = int(digits)
    if not number:
        return _SMALL[0]
    parts = []
    for power in reversed(range(len(_SCALES))):
        group = number // 1000**power % 1000
        if group:
            parts.append(_below_thousand(group) + _SCALES[power])
    return " ".join(parts)


def _below_thousand(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    words = [f"{_SMALL[hundreds]} hundred"] if hundreds else []
    if rest >= 20:
        words.append(_TENS[rest // 10 - 2] + (f"-{_SMALL[rest % 10]}" if rest % 10 else ""))
    elif rest:
        words.append(_SMALL[rest])
    return " ".join(words)


def spell_digits(digits: str) -> str:
    """Digit by digit: `505` is `five zero five`."""
    return " ".join(_SMALL[int(digit)] for digit in digits)


def decimal(number: str) -> str:
    """A number with or without a fraction, with or without commas: `1,000.5` is `one thousand point five`."""
    whole, point, fraction = number.replace(",", "").partition(".")
    words = [cardinal(whole)] if whole else []
    return " ".join([*words, "point", spell_digits(fraction)] if point else words)


def ordinal(digits: str) -> str:
    """`21` is `twenty-first`."""
    words = cardinal(digits)
    cut = max(words.rfind(" "), words.rfind("-")) + 1
    last = words[cut:]
    if last in _IRREGULAR_ORDINALS:
        return words[:cut] + _IRREGULAR_ORDINALS[last]
    return words[:cut] + (last[:-1] + "ieth" if last.endswith("y") else last + "th")


def year(digits: str) -> str:
    """Four digits as a year: `1905` is `nineteen oh five`, `2024` is `twenty twenty-four`."""
    century, rest = int(digits[:2]), int(digits[2:])
    if century % 10 == 0 and rest < 10:
        return cardinal(digits)
    if not rest:
        return f"{cardinal(digits[:2])} hundred"
    return f"{cardinal(digits[:2])} {'oh ' if rest < 10 else ''}{cardinal(str(rest))}"


def fraction(numerator: str, denominator: str) -> str:
    """`3/4` is `three quarters`; denominators above 100 are read with `over`."""
    many = "" if numerator == "1" else "s"
    if not 2 <= int(denominator[:MAX_DIGITS]) <= 100:
        return f"{cardinal(numerator)} over {cardinal(denominator)}"
    if denominator == "2":
        return f"{cardinal(numerator)} {'halves' if many else 'half'}"
    part = "quarter" if denominator == "4" else ordinal(denominator)
    return f"{cardinal(numerator)} {part}{many}"
