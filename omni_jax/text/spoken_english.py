"""Written English as the words of its reader, for models that know only words.

The result has letters of English, `'` and `-` within words, and `, . ? :`. Each rule is a pattern and what it is
replaced by; they apply in order, and a rule may rely on those before it: money is read before plain numbers. What a
number, a symbol or an abbreviation stands for is decided by what is next to it, American English in case of doubt.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TypeAlias

from anyascii import anyascii

from omni_jax.text.markdown import markdown_blocks
from omni_jax.text.numbers import NUMBER_WORDS, cardinal, decimal, fraction, ordinal, spell_digits, year
from omni_jax.text.unicode import clean_up, clean_up_lines

Rule: TypeAlias = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]

MONTHS = [
    *["January", "February", "March", "April", "May", "June"],
    *["July", "August", "September", "October", "November", "December"],
]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_CAPITALIZED = {word.lower(): word for word in [*_DAYS, *MONTHS, "I"] if word not in ("May", "March")}
_SPELLED = frozenset(
    "AI API ATM CEO CIA CPU DIY DNA EU FAQ FBI GPU IOU IP ISO SOS TV UFO UK UN URL USA USB UV VIP".split(" ")  # noqa: SIM905
)
"""Read letter by letter although they have vowels."""
_ABBREVIATIONS = {
    "mr.": "Mister",
    "mrs.": "Missus",
    "ms.": "Miss",
    "dr.": "Doctor",
    "prof.": "Professor",
    "jr.": "Junior",
    "sr.": "Senior",
    "a.k.a.": "also known as",
    "e.g.": "for example",
    "i.e.": "that is",
    "vs.": "versus",
    "approx.": "approximately",
    "dept.": "department",
    "and/or": "and or",
    "24/7": "twenty-four seven",
    "w/o": "without",
}
_UNITS = {
    "km/h": "kilometer(s) per hour",
    "kmh": "kilometer(s) per hour",
    "mph": "mile(s) per hour",
    "m/s": "meter(s) per second",
    "km": "kilometer(s)",
    "cm": "centimeter(s)",
    "mm": "millimeter(s)",
    "m": "meter(s)",
    "mi": "mile(s)",
    "ft": "foot/feet",
    "yd": "yard(s)",
    "kg": "kilogram(s)",
    "mg": "milligram(s)",
    "g": "gram(s)",
    "lb": "pound(s)",
    "lbs": "pound(s)",
    "oz": "ounce(s)",
    "ml": "milliliter(s)",
    "mL": "milliliter(s)",
    "l": "liter(s)",
    "L": "liter(s)",
    "°C": "degree(s) Celsius",
    "°F": "degree(s) Fahrenheit",
    "°": "degree(s)",
    "h": "hour(s)",
    "hr": "hour(s)",
    "hrs": "hour(s)",
    "min": "minute(s)",
    "s": "second(s)",
    "sec": "second(s)",
    "ms": "millisecond(s)",
    "Hz": "hertz",
    "kHz": "kilohertz",
    "MHz": "megahertz",
    "GHz": "gigahertz",
    "KB": "kilobyte(s)",
    "kB": "kilobyte(s)",
    "MB": "megabyte(s)",
    "GB": "gigabyte(s)",
    "TB": "terabyte(s)",
    "W": "watt(s)",
    "kW": "kilowatt(s)",
    "kWh": "kilowatt hour(s)",
    "V": "volt(s)",
    "%": "percent",
}
_CURRENCIES = {
    "$": ("dollar(s)", "cent(s)"),
    "€": ("euro(s)", "cent(s)"),
    "£": ("pound(s)", "penny/pence"),
    "¥": ("yen", ""),
    "₹": ("rupee(s)", "paisa/paise"),
    "USD": ("dollar(s)", "cent(s)"),
    "EUR": ("euro(s)", "cent(s)"),
    "GBP": ("pound(s)", "penny/pence"),
}
_SIGNS = {
    "!": ".",
    ";": ",",
    "•": ",",
    "→": ",",
    "⁄": "/",  # noqa: RUF001
    "×": " times ",  # noqa: RUF001
    "÷": " divided by ",
    "±": " plus or minus ",
    "=": " equals ",
    "≠": " is not equal to ",
    "≤": " is at most ",
    "≥": " is at least ",
    "≈": " is about ",
    "∞": " infinity ",
    "√": " the square root of ",
    "¢": " cents ",
    "‰": " per thousand ",
    "§": " section ",
    "π": " pi ",
    "µ": "micro",
    "™": "",
    "©": "",
    "®": "",
}
_CURRENCY_SIGNS = "".join(sign for sign in _CURRENCIES if len(sign) == 1)
_RAISED = re.compile(r"(?:(?<=\d)|(?<=\b[A-Za-z]))[-+⁻⁺]?[⁰¹²³⁴-⁹]+|[²³]")
"""Exponents; other raised digits number notes."""
_KEPT_SIGNS = frozenset("°" + _CURRENCY_SIGNS)
NUMBER = r"(?<!\d)\d++(?:,\d{3}(?!\d))*+(?:\.\d++)?+"
"""Possessive, so that a long row of digits is read once."""


def spoken_english(text: str, names: Sequence[str] = ()) -> str:
    """A text as it is read aloud, in one line, in sentence case.

    Args:
        text: as written, perhaps in Markdown. Emoji are left out. Of a web address the name of the host is read, and
            letters of other scripts are read as anyascii transliterates them.
        names: words that have a capital letter wherever they stand.
    """
    lines = _apply(_BEFORE_MARKDOWN, clean_up_lines(text))
    *blocks, last = [clean_up(block) for block in markdown_blocks(lines)] or [""]
    text = " ".join([*map(_end_sentence, blocks), last])
    text = _apply(_ADDRESSES, text)
    text = _apply(RULES, _lower_capitals(_to_ascii(text)))
    return _sentence_case(text, names)


def _apply(rules: Sequence[Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _end_sentence(block: str) -> str:
    return block if not block or block[-1] in ".?!:,;" else block + "."


def _to_ascii(text: str) -> str:
    """ASCII and a few signs that rules read; letters and digits of other scripts are transliterated."""
    # 1½ is not 11/2, -½ not 1/2, and 5² not 52.
    text = re.sub(r"(?<!\w)-(?=[¼-¾⅐-⅞])", " minus ", text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = _RAISED.sub(lambda raised: "^" + unicodedata.normalize("NFKC", raised[0]).replace("−", "-"), text)  # noqa: RUF001
    text = text.replace("№", " number ").replace("!=", "≠")
    text = "".join(_SIGNS.get(char, char) for char in unicodedata.normalize("NFKC", text))
    return re.sub(r"[^ -~]", _transliterate, text)


def _transliterate(char: re.Match[str]) -> str:
    if char[0] in _KEPT_SIGNS:
        return char[0]
    category = unicodedata.category(char[0])
    if category[0] not in "LMN":
        return " "
    letters = anyascii(char[0])
    return f" {letters} " if category == "Lo" and len(letters) > 1 else letters


def _lower_capitals(text: str) -> str:
    """Words in capitals in lower case, names like BBC letter by letter; units after a number as they are."""
    words = re.findall(r"[A-Za-z]{2,}", text)
    shouted = bool(words) and all(word.isupper() for word in words)

    def lower(word: re.Match[str]) -> str:
        if word[0] == "US" and not shouted:
            return "U S"
        if re.search(r"\d ?$", text[max(0, word.start() - 2) : word.start()]):
            if word[0] in ("ST", "ND", "RD", "TH"):
                return word[0].lower()
            if word[0] in _UNITS or word[0] in _CURRENCIES:
                return word[0]
            if word[0].lower() in _UNITS:
                return word[0].lower()
        if word[0] in _SPELLED or not re.search("[AEIOUY]", word[0]):
            return " ".join(word[0])
        return word[0].lower()

    text = re.sub(r"(?<![A-Za-z'])[A-Z]{2,}(?![A-Za-z])", lower, text)
    if not shouted:
        return text
    return re.sub(r"(?<![A-Z] )\b[A-Z](?:'[A-Z]+)?\b(?! [A-Z]\b)", lambda word: word[0].lower(), text)


def _quantity(number: str, name: str) -> str:
    """A number and what it counts: `name` has its plural, as in `mile(s)` or `foot/feet`."""
    one = number == "1"
    singular, slash, plural = name.partition("/") if "(" not in name else (name, "", "")
    if slash:
        return f"{number} {singular if one else plural}"
    return f"{number} {singular.replace('(s)', '' if one else 's')}"


def _unit(found: re.Match[str]) -> str:
    number = "1" if "/" in found["number"] else found["number"]
    return found["number"] + _quantity(number, _UNITS[found["unit"]]).removeprefix(number) + " "


def _money(found: re.Match[str]) -> str:
    unit, cents = _CURRENCIES[found["currency"]]
    amount = found["amount"].replace(",", "")
    scale = found["scale"] or ""
    scale = f" {_SCALES.get(scale.lower(), scale)}"
    whole, _, part = amount.partition(".")
    if scale.strip() or len(part) > 2 or (part and not cents):
        return f" {amount}{scale.rstrip()} {_quantity('', unit).strip()} "
    part = str(int(part.ljust(2, "0"))) if part else "0"
    if part == "0":
        return f" {_quantity(whole, unit)} "
    if whole.strip("0") == "":
        return f" {_quantity(part, cents)} "
    return f" {_quantity(whole, unit)} and {_quantity(part, cents)} "


def _time(found: re.Match[str]) -> str:
    hour, minute = str(int(found["hour"])), found["minute"] or "00"
    if int(hour) > 24 or int(minute) > 59:
        return found[0]
    half = f" {found['half'][0].lower()} m " if found["half"] else ""
    seconds = str(int(found["second"] or 0))
    second = "" if seconds == "0" else f" and {_quantity(seconds, 'second(s)')}"
    if minute == "00":
        return cardinal(hour) + ("" if half else " o'clock") + second + half
    return f"{cardinal(hour)} {'oh ' if minute[0] == '0' else ''}{cardinal(str(int(minute)))}{second}{half}"


def _date(found: re.Match[str]) -> str:
    parts = found.groupdict()
    month, day, written_year = parts["month"], int(parts["day"]), parts.get("year")
    if month.isdigit():
        number = int(month)
        if number > 12 >= day:
            number, day = day, number
        if not 1 <= number <= 12:
            return found[0]
        month = MONTHS[number - 1]
    if not 1 <= day <= 31:
        return found[0]
    full = next((name for name in MONTHS if name.lower().startswith(month.lower().rstrip("."))), month)
    if written_year and len(written_year) == 2:
        written_year = f"20{written_year}"
    return f"{full} {ordinal(str(day))}" + (f", {year(written_year)}" if written_year else "")


def _phone(found: re.Match[str]) -> str:
    groups = re.findall(r"\d+", found[0])
    if sum(map(len, groups)) < 7:
        return found[0]
    plus = "plus " if found[0].startswith("+") else ""
    return plus + ", ".join(map(spell_digits, groups)) + " "


def _range(found: re.Match[str]) -> str:
    low, high = (float(found[name].replace(",", "")) for name in ("low", "high"))
    return f"{found['low']} {'to' if low < high else 'minus'} {found['high']}"


def _host(found: re.Match[str]) -> str:
    return " " + found["host"].lower().removeprefix("www.").replace(".", " dot ").replace("-", " dash ") + " "


def _mail(found: re.Match[str]) -> str:
    return f"{found['user'].replace('.', ' dot ')} at{_host(found)}"


def _decade(found: re.Match[str]) -> str:
    words = year(found[1] + "0")
    return f"{words[:-1]}ies" if words.endswith("y") else f"{words}s"


def _mixed_number(found: re.Match[str]) -> str:
    part = fraction(found[2], found[3])
    return f"{cardinal(found[1])} and {re.sub('^one ', 'a ', part)}"


def _strongest(found: re.Match[str]) -> str:
    return next((mark for mark in "?." if mark in found[0]), found[0][-1])


def _power(found: re.Match[str]) -> str:
    sign, number = found.groups()
    if not sign and number in ("2", "3"):
        return " squared " if number == "2" else " cubed "
    return f" to the power of {'minus ' if sign == '-' else ''}{number} "


_LOWER_MONTHS = [name.lower() for name in MONTHS if name.lower() in _CAPITALIZED]
_MONTH = rf"(?P<month>{'|'.join(MONTHS + _LOWER_MONTHS)}|(?:{'|'.join(name[:3] for name in MONTHS)}|Sept)\b\.?)"
_YEAR = r"(?P<year>(?:1[1-9]|20)\d\d)"
_UNIT = "|".join(re.escape(unit) for unit in sorted(_UNITS, key=len, reverse=True))
_SIGN = f"[{_CURRENCY_SIGNS}]"
_SCALES = {"k": "thousand", "m": "million", "mn": "million", "b": "billion", "bn": "billion"}
_SCALE = r"(?:\s?(?P<scale>thousand|million|billion|trillion|[kKmMbB]|[mb]n)\b)?"
_TOP_LEVEL = "com|org|net|edu|gov|io|ai|dev|app|info|co|uk|de|fr|eu|us|ca"
_OF_YEAR = rf"(?:,?\s+{_YEAR}\b(?![,.]?\d))?"
_WHEN = "|".join(
    [
        "in|since|by|until|till|from|of|before|after|during|year|around|circa|early|late|spring|summer|fall|winter",
        *MONTHS,
    ]
)
_BARE = r"(?!['%°,.]?\d|\s?[-+*/%°])"
"""Not a year: a part of a longer number, an operand or a quantity."""


def _rule(pattern: str, replacement: str | Callable[[re.Match[str]], str], flags: int = 0) -> Rule:
    return re.compile(pattern, flags), replacement


_TAGS = "a|b|i|u|p|s|br|hr|em|strong|code|pre|span|div|ul|ol|li|dl|dt|dd|h[1-6]|img|sub|sup|del|ins|small|mark|kbd"
_HTML = rf"/?(?:{_TAGS}|table|thead|tbody|tr|td|th|blockquote|details|summary)(?:\s+[\w-]+\s*=[^<>]*)?\s*/?>|!--"
_BEFORE_MARKDOWN = [
    _rule(r"^\s*[•‣▪]\s*", "- ", re.MULTILINE),
    # What Markdown takes for an empty item of a list, for an HTML tag, or for emphasis.
    _rule(r"^(\s*\d+)([.)])\s*$", r"\1\\\2", re.MULTILINE),
    _rule(rf"<(?!{_HTML}|\w+://|[\w.+-]+@)", r"\\<", re.IGNORECASE),
    _rule(r"(?<=\d)\s?\*\*\s?(?=\d)", "^"),
]
_ADDRESSES = [
    _rule(r"\b(?P<user>[\w.+-]{1,64})@(?P<host>[\w-]{1,63}(?:\.[\w-]{1,63}){1,5})", _mail),
    _rule(r"\b(?:https?|ftp)://(?P<host>[\w-]+(?:\.[\w-]+)*)(?::\d+)?(?:[/?#][^\s,)\]]*[\w/=])?/?", _host, re.I),
    _rule(rf"\b(?P<host>(?:[A-Za-z][\w-]{{0,62}}\.){{1,5}}(?:{_TOP_LEVEL}))\b(?:/[^\s,)\]]*[\w/=])?/?", _host),
    _rule(r"(?<!\w)@(?=\w)", " at "),
    _rule(r"#(?=\d)", " number "),
    _rule(r"#(?=\w)", " hashtag "),
    _rule(r"(?<=[a-z])#|(?<=C)#", " sharp "),
]
_ABBREVIATED = [
    *(_rule(rf"(?<![A-Za-z]){re.escape(short)}(?!\w)", word, re.I) for short, word in _ABBREVIATIONS.items()),
    _rule(r"\b(Mrs?|Ms|Dr|Prof)(?= [A-Z])", lambda m: _ABBREVIATIONS[f"{m[1].lower()}."]),
    _rule(r"(?<![\w.])etc\.(?=\s+[A-Z]|\s*$)", "et cetera.", re.I),
    _rule(r"(?<![\w.])etc\.", "et cetera", re.I),
    _rule(r"\bNo\.\s?(?=\d)", "number ", re.I),
    _rule(r"\bSt\.\s(?=[A-Z])", "Saint "),
    _rule(r"(?<=\w )St\.(?=\s*$)", "Street."),
    _rule(r"(?<=\w )St\.", "Street"),
    _rule(r"\b((?:[A-Z]\.){2,})", lambda m: " ".join(m[1].replace(".", ""))),
]
_TIMES = [
    _rule(r"(?<=\b\d{4}-\d\d-\d\d)T(?=\d\d:\d\d)", " at "),
    _rule(r"(?<=\d:\d\d)(:\d\d)?(?:\.\d+)?Z\b", r"\1 U T C"),
    _rule(r"\b(\d{1,2})\.(\d\d)(?=\s?[ap]\.?m\b)", r"\1:\2", re.I),
    _rule(r"\b(\d{1,2}(?::\d\d)?(?:\s?[ap]m)?)\s?-\s?(?=\d{1,2}(?::\d\d)?\s?[ap]\.?m\b)", r"\1 to ", re.I),
    _rule(r"\b(?P<hour>\d{1,2}):(?P<minute>\d\d)(?::(?P<second>\d\d))?(?:\s?(?P<half>[ap]\.?\s?m\b\.?))?", _time, re.I),
    _rule(r"\b(?P<hour>\d{1,2})(?P<minute>)(?P<second>)\s?(?P<half>[ap]\.m\.|[ap]m\b)", _time, re.I),
]
_DATES = [
    _rule(r"\b(?P<year>\d{4})([-/])(?P<month>\d\d)\2(?P<day>\d\d)\b", _date),
    _rule(r"(?<![\d/])(?P<month>\d{1,2})/(?P<day>\d{1,2})/(?P<year>\d{4}|\d\d)\b(?!/)", _date),
    _rule(rf"\b{_MONTH}\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\b{_OF_YEAR}", _date),
    _rule(rf"\b(?:the\s)?(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:\s+of)?\s+{_MONTH}(?![a-z]){_OF_YEAR}", _date),
    _rule(rf"\b(?P<when>(?:{_WHEN}),?\s+){_YEAR}\b{_BARE}", lambda m: m["when"] + year(m["year"]), re.I),
    _rule(rf"\({_YEAR}\)", lambda m: f", {year(m['year'])},"),
    _rule(r"\b((?:1[1-9]|20)\d)0'?s\b", _decade),
    _rule(r"(?<!\w)'?([2-9]0)'?s\b", lambda m: cardinal(m[1])[:-1] + "ies"),
]
_AMOUNTS = [
    _rule(r"\b(\d+)\s?h\s?(\d{1,2})\s?m(?:in)?\b", r"\1 hr \2 min"),
    _rule(r"\b(usd|eur|gbp)\s?(?=\d)", lambda m: {"usd": "$", "eur": "€", "gbp": "£"}[m[1].lower()], re.I),
    _rule(r"(?<=€)(\s?\d{1,3})((?:\.\d{3})*),(\d\d)\b", lambda m: f"{m[1]}{m[2].replace('.', '')}.{m[3]}"),
    _rule(rf"({_SIGN})\s?({NUMBER})\s?-\s?\1?\s?(?={NUMBER})", r"\2 to \1"),
    _rule(rf"({NUMBER})\s?%\s?-\s?(?={NUMBER}\s?%)", r"\1 to "),
    _rule(rf"(?<!\w)-(?={_SIGN}\s?\d)|(?<={_SIGN})-(?=\d)", "minus "),
    _rule(rf"({_SIGN})minus ", r"minus \1"),
    _rule(r"(?<![\d+.,-])\b\d{1,3}(?: \d{3})+\b(?![-\d])", lambda m: m[0].replace(" ", "")),
    _rule(rf"(?P<currency>{_SIGN})\s?(?P<amount>{NUMBER}){_SCALE}", _money),
    _rule(rf"(?P<amount>{NUMBER}){_SCALE}\s?(?P<currency>{_SIGN}|USD\b|EUR\b|GBP\b)", _money),
    _rule(r"\+?\(?\b\d{1,4}\)?(?:[-.]\d{2,4}){2,}\b|\b\d{3}-\d{4}\b|\(\d{3}\) \d{3}-\d{4}\b|\+\d+(?: \d+)+", _phone),
    _rule(r"\b(\d+)\s(\d+)/(\d+)\b(?!/)", _mixed_number),
    _rule(rf"(?<![\d.,/])(?P<number>\d+/\d+|{NUMBER})\s?(?P<unit>{_UNIT})(?![\w°%])", _unit),
    _rule(r"(?<![\d/.,])\b(\d+)/(\d+)\b(?![/.,]?\d)", lambda m: fraction(m[1], m[2])),
    _rule(r"\b(\d+)(?:st|nd|rd|th)\b", lambda m: ordinal(m[1]), re.I),
    _rule(r"(?<=\d)k\b", " thousand "),
]
_OPERATORS = [
    _rule(r"(?<=\d)[eE]([-+])(\d+)\b", lambda m: f" times 10 {_power(m)}"),
    _rule(r"\^\s?\(?([-+]?)(\d+)\)?", _power),
    _rule(r"(?<=\d):(?=\d)", " to "),
    _rule(rf"\b(?P<low>{NUMBER})-(?P<high>{NUMBER})\b(?!-)", _range),
    _rule(r"(?<=[\d)])\s+-+\s+(?=[\d(])|(?<=\d)\s+-\s?(?=\d)", " minus "),
    _rule(r"(?<![\w-])-(?=\.?\d)", " minus "),
    _rule(r"(?<=[\d)])\s*[x*X]\s*(?=[\d(])", " times "),
    _rule(r"(?<=[\d)])\s*/\s*(?=[\d(])", " divided by "),
    _rule(r"\+", " plus "),
    _rule(r"&", " and "),
    _rule(r"(?<=[\w)])\s?<\s?(?=[\w(])|(?<=\s)<(?=\s)", " is less than "),
    _rule(r"(?<=[\w)])\s?>\s?(?=[\w(])|(?<=\s)>(?=\s)", " is more than "),
    _rule(r"~(?=\s?\d)", " about "),
    _rule(r"\bequals\s*(?=[?.]?\s*$)", "equals what?"),
]
_NUMBERS = [
    _rule(r"(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])", " "),
    _rule(r"(?<![\d.])\d++(?:\.\d++){2,}", lambda m: " point ".join(map(cardinal, m[0].split(".")))),
    _rule(rf"{NUMBER}|\.\d+", lambda m: f" {decimal(m[0])} "),
]
_LEFT_OVER = [
    *(_rule(re.escape(sign), f"{_quantity('', _CURRENCIES[sign][0])} ") for sign in _CURRENCY_SIGNS),
    *(_rule(sign, f"{_quantity('', _UNITS[sign])} ") for sign in "%°"),
    _rule("@", " at "),
    _rule(r"(?<=[A-Za-z])/(?=[A-Za-z])", " or "),
    _rule(r"(?<=\w)\.(?=[a-z])", " dot "),
    _rule(r"--+|\s-+(?=\s|$)|^-+\s|[()\[\]{}|]", ", "),
    _rule(r"\.(?=[A-Za-z])", ". "),
    _rule(r"[^A-Za-z,.?:'\s-]", " "),
    _rule(r"(?<![A-Za-z])['-]+|['-]+(?![A-Za-z])", " "),
    _rule(r"\s+", " "),
    _rule(r" (?=[,.?:])", ""),
    _rule(r"[,.?:]{2,}", _strongest),
    _rule(r"^[,.?: ]+|, ?$", ""),
    _rule(r"(?<=[,.?:])(?=[A-Za-z])", " "),
    _rule(r"^ | $", ""),
]
RULES: list[Rule] = [*_ABBREVIATED, *_TIMES, *_DATES, *_AMOUNTS, *_OPERATORS, *_NUMBERS, *_LEFT_OVER]
"""In order."""


def _sentence_case(text: str, names: Sequence[str]) -> str:
    text = re.sub(r"[A-Za-z]+", lambda word: word[0].lower() if word[0].lower() in NUMBER_WORDS else word[0], text)
    known = _CAPITALIZED | {name.lower(): name for name in names}
    pattern = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    text = re.sub(rf"\b(?:{pattern})\b", lambda word: known[word[0].lower()], text, flags=re.IGNORECASE)
    return re.sub(r"(?:^|(?<=[.?] ))[a-z](?![A-Za-z]*[A-Z])", lambda letter: letter[0].upper(), text)
