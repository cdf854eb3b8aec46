"""Written English as words."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from omni_jax.text.spoken_english import spoken_english

# ruff: noqa: RUF001
SPOKEN = {
    "What is 7 + 5?": "What is seven plus five?",
    "what’s seven plus five": "What's seven plus five",
    "WHAT IS SEVEN PLUS FIVE": "What is seven plus five",
    "What is **7** plus *5*? 🙂": "What is seven plus five?",
    "It costs $3.50.": "It costs three dollars and fifty cents.",
    "€20": "Twenty euros",
    "$1": "One dollar",
    "$0.99": "Ninety-nine cents",
    "$2.5 million": "Two point five million dollars",
    "20 EUR": "Twenty euros",
    "£1.01": "One pound and one penny",
    "at 3:30 pm": "At three thirty p m",
    "3 p.m. today": "Three p m today",
    "at 3:00": "At three o'clock",
    "15:05": "Fifteen oh five",
    "on 12/25/2024": "On December twenty-fifth, twenty twenty-four",
    "2024-12-25": "December twenty-fifth, twenty twenty-four",
    "May 1st, 2024": "May first, twenty twenty-four",
    "1 May 2024": "May first, twenty twenty-four",
    "on Dec. 24": "On December twenty-fourth",
    "in 1999": "In nineteen ninety-nine",
    "in 2005": "In two thousand five",
    "the 1990s": "The nineteen nineties",
    "the '80s": "The eighties",
    "20 °C": "Twenty degrees Celsius",
    "5 km": "Five kilometers",
    "1 km": "One kilometer",
    "1/2 km": "One half kilometer",
    "60 km/h": "Sixty kilometers per hour",
    "50%": "Fifty percent",
    "Dr. Smith e.g. Mr. Jones etc.": "Doctor Smith for example Mister Jones et cetera.",
    "3/4 cup": "Three quarters cup",
    "1½ cups": "One and a half cups",
    "2 1/2 cups": "Two and a half cups",
    "call 555-1234": "Call five five five, one two three four",
    "+1 800 555 1234": "Plus one, eight zero zero five five five, one two three four",
    "(555) 123-4567": "Five five five, one two three, four five six seven",
    "1-800-555-1234": "One, eight zero zero, five five five, one two three four",
    "3.14": "Three point one four",
    ".5": "Point five",
    "1,234,567": "One million two hundred thirty-four thousand five hundred sixty-seven",
    "the 21st": "The twenty-first",
    "WHAT IS 7 x 5 = ?": "What is seven times five equals what?",
    "-5": "Minus five",
    "10-5": "Ten minus five",
    "pages 5-10": "Pages five to ten",
    "50 - 20?": "Fifty minus twenty?",
    "50 − 20?": "Fifty minus twenty?",
    "7 × 9": "Seven times nine",
    "2*3*4": "Two times three times four",
    "x² + y²": "X squared plus y squared",
    "2^10": "Two to the power of ten",
    "7 + 5 =": "Seven plus five equals what?",
    "NASA and BBC and USA": "Nasa and B B C and U S A",
    "THE USA AND THE BBC": "The U S A and the B B C",
    "Visit https://www.example.com/a/b?c=d#e, please.": "Visit example dot com, please.",
    "mail ann.lee@example.com now": "Mail ann dot lee at example dot com now",
    "See example.com.": "See example dot com.",
    "@bob said #winning #5": "At bob said hashtag winning number five",
    "# Title\n\nHello **world**\n\n- milk\n- eggs\n\n1. One\n2. Two\n\n```python\nprint(1)\n```": (
        "Title. Hello world. Milk. Eggs. One. One. Two. Two. Print, one"
    ),
    "[docs](https://x.org/y) and `code`": "Docs and code",
    "Café Müller in São Paulo": "Cafe Muller in Sao Paulo",
    "你好": "Ni Hao",
    "Привет, мир!": "Privet, mir.",
    "“Hello,” she said—then left…": "Hello, she said, then left.",
    "R&D": "R and D",
    "and/or he/she": "And or he or she",
    "007": "Zero zero seven",
    "version 1.2.3": "Version one point two point three",
    "192.168.0.1": "One hundred ninety-two point one hundred sixty-eight point zero point one",
    "mp3": "Mp three",
    "the 2nd of May": "May second",
    "5k run": "Five thousand run",
    "A - B": "A, B",
    "well-known": "Well-known",
    "it's": "It's",
    "Wait... what?!": "Wait. What?",
    "i'm on monday": "I'm on Monday",
    "1st 2nd 3rd 4th 11th 12th 20th 100th": "First second third fourth eleventh twelfth twentieth one hundredth",
    "100": "One hundred",
    "1000000": "One million",
    "1234567890123456": "One two three four five six seven eight nine zero one two three four five six",
    "$1,234.56": "One thousand two hundred thirty-four dollars and fifty-six cents",
    "7 + 5 = 12": "Seven plus five equals twelve",
    "8 / 2": "Eight divided by two",
    "8/2=4": "Eight halves equals four",
    "≈ 5 ± 1": "Is about five plus or minus one",
    "<b>bold</b> text": "Bold text",
    "5 < 7 > 3": "Five is less than seven is more than three",
    "What is the capital of FRANCE?": "What is the capital of france?",
    "CAPITAL OF FRANCE?": "Capital of france?",
    "is 1984 a book": "Is one thousand nine hundred eighty-four a book",
    "1984. That was a year": "One thousand nine hundred eighty-four. That was a year",
    "U.S. and U.K.": "U S and U K",
    "C++ and C#": "C plus plus and C sharp",
    "Room 5B": "Room five B",
    "main.py": "Main dot py",
    "5 ft": "Five feet",
    "1 ft": "One foot",
    "100 m": "One hundred meters",
    "2 lbs": "Two pounds",
    "7:45": "Seven forty-five",
    "ratio 3:2": "Ratio three to two",
    "3pm": "Three p m",
    "10 GB": "Ten gigabytes",
    "5 GB of RAM": "Five gigabytes of ram",
    "20 % of 50": "Twenty percent of fifty",
    "5️⃣": "Five",
    "at 10 am I AM": "At ten a m I am",
    "1 000 000": "One million",
    "0.5": "Zero point five",
    "0": "Zero",
    "10:00 AM": "Ten a m",
    "I'M HERE": "I'm here",
    "AT 3 PM": "At three P M",
    "10 KM": "Ten kilometers",
    "Jan 5": "January fifth",
    "may 5 people": "May five people",
    "Tom & Jerry": "Tom and Jerry",
    "100°": "One hundred degrees",
    "2020": "Two thousand twenty",
    "2020 people came": "Two thousand twenty people came",
    "by 2030, all": "By twenty thirty, all",
    "100th": "One hundredth",
    "on 1/2/2024": "On January second, twenty twenty-four",
    "St. John on Main St.": "Saint John on Main Street.",
    "Ends in etc. Next": "Ends in et cetera. Next",
    "a & b": "A and b",
    "1:30:20": "One thirty and twenty seconds",
    "The answer is\n\n42.": "The answer is. Forty-two.",
    "42.": "Forty-two.",
    "7)": "Seven",
    "1. first\n2. second": "One. First. Two. Second",
    "if a<b and c>d then": "If a is less than b and c is more than d then",
    "x<5": "X is less than five",
    "<b>bold</b> <a href='x'>link</a>": "Bold link",
    "10^-3": "Ten to the power of minus three",
    "10⁻³": "Ten to the power of minus three",
    "5×10⁶": "Five times ten to the power of six",
    "2 ** 3": "Two cubed",
    "1e-5": "One times ten to the power of minus five",
    "-½": "Minus one half",
    "a != b": "A is not equal to b",
    "$1.5M": "One point five million dollars",
    "$2.5B": "Two point five billion dollars",
    "5¢": "Five cents",
    "5‰": "Five per thousand",
    "§5": "Section five",
    "$5–10": "Five to ten dollars",
    "$5-$10": "Five to ten dollars",
    "10%–20%": "Ten to twenty percent",
    "€3,50": "Three euros and fifty cents",
    "€1.234,56": "One thousand two hundred thirty-four euros and fifty-six cents",
    "USD 5": "Five dollars",
    "12/31/24": "December thirty-first, twenty twenty-four",
    "2024/05/01": "May first, twenty twenty-four",
    "2024-05-01T10:30:00Z": "May first, twenty twenty-four at ten thirty U T C",
    "10:30:15 pm": "Ten thirty and fifteen seconds p m",
    "1h 30m": "One hour thirty minutes",
    "10.30 am": "Ten thirty a m",
    "6-7pm": "Six to seven p m",
    "9am-5pm": "Nine a m to five p m",
    "3RD": "Third",
    "THE 21ST CENTURY": "The twenty-first century",
    "the US": "The U S",
    "GIVE US FOOD": "Give us food",
    "a.k.a. Bob": "Also known as Bob",
    "Dr Smith": "Doctor Smith",
    "№ 5": "Number five",
    "$-5": "Minus five dollars",
    "-$5": "Minus five dollars",
    "10 000": "Ten thousand",
    'He said "hi"!': "He said hi.",
    "It's 3 o'clock": "It's three o'clock",
    "cats' toys": "Cats toys",
    "e.g. this": "For example this",
    "2 + 2 ≠ 5": "Two plus two is not equal to five",
    "(yes) [no]": "Yes, no",
    "5 m/s": "Five meters per second",
    "20 miles": "Twenty miles",
    "1/3": "One third",
    "2/3": "Two thirds",
    "1/100": "One one hundredth",
    "7/1000": "Seven over one thousand",
    "$100k": "One hundred thousand dollars",
    "£5m": "Five million pounds",
    "1.5 million": "One point five million",
    "the 20th century": "The twentieth century",
    "2010s": "Twenty tens",
    "Call me @ 5": "Call me at five",
    "100%": "One hundred percent",
    "snake_case": "Snake case",
    "a/b": "A or b",
    "5-10 km": "Five to ten kilometers",
    "19.99": "Nineteen point nine nine",
    "Q1": "Q one",
    "word.Next": "Word. Next",
    "3 < 5": "Three is less than five",
    "iPhone": "iPhone",
    "I/O": "I or O",
    "rock 'n' roll": "Rock n roll",
}


@pytest.mark.parametrize("text", SPOKEN)
def test_spoken_english(text: str) -> None:
    assert spoken_english(text) == SPOKEN[text]


def test_spoken_english_names() -> None:
    names = ("France", "New Zealand")
    assert spoken_english("CAPITAL OF FRANCE?", names) == "Capital of France?"
    assert spoken_english("is new zealand in europe", names) == "Is New Zealand in europe"


SIGNS = [" ", "\n", "\n\n", "-", ".", "$", "%", "x", "#", "1", "23", "/"]
PIECES = st.one_of(st.sampled_from([*SPOKEN, *SIGNS]), st.text())


@given(st.lists(PIECES, max_size=4).map("".join))
@example("1/0 0/0 99:99 13/13/2024 2024-99-99 ½½ 5⁄0")
def test_spoken_english_never_raises_and_gives_words(text: str) -> None:
    words = spoken_english(text)
    assert re.fullmatch(r"[A-Za-z ,.?:'-]*", words)
    assert words == " ".join(words.split())
    assert not re.search(r"(?<![A-Za-z])['-]|['-](?![A-Za-z])|\s[,.?:]|[,.?:]{2}", words)


@pytest.mark.parametrize("text", SPOKEN)
def test_spoken_english_is_idempotent(text: str) -> None:
    assert spoken_english(SPOKEN[text]) == SPOKEN[text]


def test_spoken_english_is_linear() -> None:
    """No pattern backtracks over a long text."""
    pieces = (
        "a",
        "1",
        "1-",
        "1.",
        "1,",
        "1 ",
        "a.b",
        "A.",
        "a@",
        "a-",
        "*",
        "[",
        "![",
        "$ ",
        "-",
        ".",
        " .",
        "`",
        "1/",
    )
    for piece in pieces:
        start = time.perf_counter()
        spoken_english(piece * (16_000 // len(piece)))
        assert time.perf_counter() - start < 10, piece
