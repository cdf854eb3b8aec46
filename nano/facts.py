"""What nano can talk about: questions, the one right answer to each, and sentences to read aloud.

A kind (sums, capitals, jokes, ...) is a list of facts and a list of phrasings; every fact asked in every phrasing is
a question. What is held out is never trained on and decided by hashes, so it stays the same from run to run:

- a tenth of the number pairs of every kind that asks for two numbers: of sums both orders together (7 + 5 and 5 + 7),
  of products one order only, as nobody can work out a times table that they were never shown,
- a fifth of the phrasings of every kind, never its first, which is the plainest,
- of the sentences, a fifth of the patterns and a tenth of what the other patterns give; nor does a free sentence have a
  held-out pattern anywhere in it.

Spelling is American, as the voice that answers; numbers are words.

`python -m nano.facts` says how many there are; `python -m nano.facts FILE` also writes the training answers to FILE.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from nano.phrasings import FURTHER

Split = Literal["train", "held_out"]
T = TypeVar("T")

HELD_OUT_PAIRS = 1 / 10
HELD_OUT_PHRASINGS = 1 / 5
HELD_OUT_SENTENCES = 1 / 10
LONGEST_FREE_SENTENCE = 14
"""In words."""


@dataclass(frozen=True, slots=True)
class Item:
    """A question as asked, and its answer."""

    kind: str
    question: str
    answer: str
    fact: str
    """What is asked, however it is phrased: `sum 7 5`."""
    held_out: str
    """Why the question is never trained on: `pair`, `phrasing`, `both`, or empty if it is trained on."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something to ask for."""

    key: str
    fields: dict[str, str]
    """What a phrasing's {names} stand for."""
    answer: str
    pair: tuple[int, int] | None = None
    """The two numbers asked for, the same for both orders where that is the same fact."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Facts that are asked for alike."""

    name: str
    share: float
    """Of the spoken questions, relative to the other kinds."""
    phrasings: tuple[str, ...]
    further_phrasings: tuple[str, ...]
    """Others, for training alone."""
    facts: tuple[Fact, ...]
    held_out_phrasings: frozenset[str]
    held_out_pairs: frozenset[tuple[int, int]]

    @property
    def answers(self) -> frozenset[str]:
        """To all its facts, each once."""
        return frozenset(fact.answer for fact in self.facts)

    def items(self, fact: Fact, phrasings: Iterable[str]) -> Iterator[Item]:
        """A fact in some phrasings."""
        for phrasing in phrasings:
            reasons = (fact.pair in self.held_out_pairs, phrasing in self.held_out_phrasings)
            why = {(False, False): "", (True, False): "pair", (False, True): "phrasing", (True, True): "both"}[reasons]
            yield Item(self.name, _sentence(phrasing.format(**fact.fields)), fact.answer, fact.key, why)


def words(number: int) -> str:
    """A whole number from 0 to 1000 in English words.

    Raises:
        ValueError: any other number.
    """
    if not 0 <= number <= 1000:
        raise ValueError(f"expected a number from 0 to 1000, found {number}")
    if number == 1000:
        return "one thousand"
    if number >= 100:
        rest = number % 100
        return f"{_SMALL[number // 100]} hundred" + (f" {words(rest)}" if rest else "")
    if number < 20:
        return _SMALL[number]
    return _TENS[number // 10] + (f"-{_SMALL[number % 10]}" if number % 10 else "")


def normalize(text: str) -> str:
    """Text as a listener can write it down: lower case, no punctuation but apostrophes, single spaces."""
    kept = "".join(letter if letter.isalpha() or letter == "'" else " " for letter in text.lower())
    return " ".join(kept.split())


def questions(split: Split, kinds: Iterable[str] | None = None, *, further: bool = False) -> list[Item]:
    """Every question of a split, each once, in a fixed order.

    Args:
        split: `train` or `held_out`.
        kinds: names of `KINDS`; all of them if None.
        further: also in the further phrasings.
    """
    wanted = set(KINDS if kinds is None else kinds)
    found: dict[str, Item] = {}
    for kind in KINDS.values():
        if kind.name in wanted:
            phrasings = kind.phrasings + kind.further_phrasings if further else kind.phrasings
            for fact in kind.facts:
                for item in kind.items(fact, phrasings):
                    if (item.held_out == "") == (split == "train"):
                        found.setdefault(item.question, item)
    return list(found.values())


def larger_products() -> list[Item]:
    """Questions for products of a number up to ten and one up to a hundred, in either order, to be read in training.

    Nobody asks nano for them. But of a hundred products one learns each by heart and nothing about the others; a table
    this long teaches that the order of the numbers does not matter.
    """
    pairs = [(a, b) for a, b in itertools.product(range(1, 101), repeat=2) if min(a, b) <= 10 < max(a, b)]
    products = _number_facts("product", "times", ((a, b, a * b) for a, b in pairs), lambda a, b: None)
    return _in_training(KINDS["product"], products)


def further_counts() -> list[Item]:
    """Questions to count two to six numbers up to a hundred, in either direction, to be read in training.

    Nobody asks nano for them: what is asked for, three to five numbers up to twenty, is not among them. But of these
    few one learns each by heart, and what lies between two numbers that were never asked for together remains unknown.
    """
    kind = KINDS["count"]
    asked = {fact.key for fact in kind.facts}
    return _in_training(kind, (fact for fact in _counts(100, range(1, 6)) if fact.key not in asked))


def _in_training(kind: Kind, facts: Iterable[Fact]) -> list[Item]:
    """Other facts of a kind, in every phrasing that training has."""
    phrasings = kind.phrasings + kind.further_phrasings
    return [item for fact in facts for item in kind.items(fact, phrasings) if not item.held_out]


def sample(
    split: Split, count: int, seed: int, *, further: bool = False, shares: Mapping[str, float] | None = None
) -> list[Item]:
    """Questions to be asked: every kind by its share, every fact of a kind as often as its neighbors.

    A kind with fewer questions than its share has some of them again. Of the held-out questions about two numbers
    half are there because of the pair.

    Args:
        split: `train` or `held_out`.
        count: how many.
        seed: of the choice and the order.
        further: in the further phrasings instead of the others.
        shares: of the kinds to draw from; if None, of all kinds those that spoken questions have.
    """
    rng = random.Random(f"questions {split} {seed}")
    shares = shares or {name: kind.share for name, kind in KINDS.items()}
    total = sum(shares.values())
    # Largest remainders: the counts of all kinds add up to `count`.
    exact = {name: count * share / total for name, share in shares.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[: count - sum(counts.values())]:
        counts[name] += 1
    chosen = [item for name, wanted in counts.items() for item in _draw(KINDS[name], split, wanted, rng, further)]
    return _shuffled(chosen, rng)


def sentences(split: Split, count: int, seed: int) -> list[str]:
    """Distinct sentences to read aloud or to write down, in words that nano knows.

    Args:
        split: `train` or `held_out`; a held-out sentence is of a held-out pattern, or a held-out combination of
            words in a known one, about half of each.
        count: how many.
        seed: of the choice.
    """
    rng = random.Random(f"sentences {split} {seed}")
    held_out = _held_out(_PATTERNS, HELD_OUT_PHRASINGS, "pattern")
    known = [pattern for pattern in _PATTERNS if pattern not in held_out]
    groups = [known] if split == "train" else [known, sorted(held_out)]
    found: dict[str, None] = {}
    while len(found) < count:
        group = groups[len(found) % len(groups)]
        text = _compose(rng.choice(group), rng)
        new_words = _hash("sentence", text) < HELD_OUT_SENTENCES
        if group is not known or new_words == (split == "held_out"):
            found.setdefault(text)
    return list(found)


def free_sentences(count: int, seed: int, form: str = "sentence") -> list[str]:
    """Distinct sentences for training, of many forms and sometimes of none, in words that nano knows and a few others.

    Who has read only sentences of two dozen patterns knows what words sound like where these have them, and in a new
    pattern is lost.

    Args:
        count: how many.
        seed: of the choice.
        form: `sentence`; `answer` for forms of answers with the words that few answers have, right or wrong: nine
            tenths of all answers are numbers, and what is seldom said is not learned; or `named` for nano's own name,
            which only one answer has.
    """
    rng = random.Random(f"free {form}s {seed}")
    held_out = [
        re.compile(re.sub(r"\{(\w+)\}", lambda slot: f"({'|'.join(_slots()[slot[1]])})", pattern.rstrip(".?")), re.I)
        for pattern in _held_out(_PATTERNS, HELD_OUT_PHRASINGS, "pattern")
    ]
    found: dict[str, None] = {}
    while len(found) < count:
        text = _compose(_grow(form, rng), rng)
        known = _hash("sentence", text) >= HELD_OUT_SENTENCES and not any(pattern.search(text) for pattern in held_out)
        if known and len(text.split()) <= LONGEST_FREE_SENTENCE:
            found.setdefault(text)
    return list(found)


def _grow(symbol: str, rng: random.Random) -> str:
    """A pattern that the grammar gives."""
    parts = rng.choice(_GRAMMAR[symbol]).replace("}", "{").split("{")
    for position in range(1, len(parts), 2):
        part = parts[position]
        parts[position] = _grow(part, rng) if part in _GRAMMAR else f"{{{part}}}"
    return "".join(parts)


def _draw(kind: Kind, split: Split, count: int, rng: random.Random, further: bool) -> list[Item]:
    """`count` questions of a kind, going round its facts, each time in a phrasing not yet drawn for the fact."""
    left: dict[str, list[Item]] = {}
    held: list[Fact] = []
    rest: list[Fact] = []
    phrasings = kind.further_phrasings if further else kind.phrasings
    for fact in kind.facts:
        items = [item for item in kind.items(fact, phrasings) if (item.held_out == "") == (split == "train")]
        if items:
            left[fact.key] = items
            (held if fact.pair in kind.held_out_pairs else rest).append(fact)
    if held and rest:
        # Held-out pairs are few: they take every other turn.
        drawn = [fact for two in zip(_endless(held, rng), _shuffled(rest, rng), strict=False) for fact in two]
    else:
        drawn = _shuffled(held or rest, rng)
    chosen = []
    pools: dict[str, list[Item]] = {}
    for fact in itertools.islice(itertools.cycle(drawn), count):
        pool = pools.get(fact.key) or _shuffled(left[fact.key], rng)
        chosen.append(pool[0])
        pools[fact.key] = pool[1:]
    return chosen


def _shuffled(values: Sequence[T], rng: random.Random) -> list[T]:
    return rng.sample(values, len(values))


def _endless(facts: Sequence[Fact], rng: random.Random) -> Iterator[Fact]:
    while True:
        yield from _shuffled(facts, rng)


def _hash(*parts: object) -> float:
    """A number in 0..1 that depends on the parts alone."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _held_out(values: Iterable[T], share: float, *names: object) -> frozenset[T]:
    """At least `share` of the distinct values: those of the lowest hash."""
    ordered = sorted(set(values), key=lambda value: _hash(*names, value))
    return frozenset(ordered[: math.ceil(len(ordered) * share)])


def _held_out_phrasings(name: str, phrasings: Sequence[str]) -> frozenset[str]:
    """As `_held_out`, but never the first."""
    count = math.ceil(len(phrasings) * HELD_OUT_PHRASINGS)
    return frozenset(sorted(phrasings[1:], key=lambda phrasing: _hash("phrasing", name, phrasing))[:count])


def _sentence(text: str) -> str:
    """With a capital letter."""
    return text[0].upper() + text[1:]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _kind(
    name: str, share: float, phrasings: str, facts: Iterable[Fact], *, held_out_pairs: float = HELD_OUT_PAIRS
) -> Kind:
    lines, known = _lines(phrasings), tuple(facts)
    return Kind(
        name,
        share,
        lines,
        _lines(FURTHER[name]),
        known,
        _held_out_phrasings(name, lines),
        _held_out((fact.pair for fact in known if fact.pair), held_out_pairs, "pair", name),
    )


def _sorted(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)


def _number_facts(
    name: str,
    operator: str,
    triples: Iterable[tuple[int, int, int]],
    pair_of: Callable[[int, int], tuple[int, int] | None],
) -> Iterator[Fact]:
    for a, b, result in triples:
        answer = _sentence(f"{words(a)} {operator} {words(b)} is {words(result)}.")
        yield Fact(f"{name} {a} {b}", {"a": words(a), "b": words(b)}, answer, pair_of(a, b))


def _counts(largest: int, distances: range) -> Iterator[Fact]:
    """From a number to another so far away, upwards or downwards, between 0 and the largest."""
    for a, b in itertools.product(range(largest + 1), repeat=2):
        if abs(a - b) in distances:
            numbers = range(a, b + 1) if a < b else range(a, b - 1, -1)
            answer = _sentence(", ".join(map(words, numbers)) + ".")
            yield Fact(f"count {a} {b}", {"a": words(a), "b": words(b)}, answer, _sorted(a, b))


def _neighbours(name: str, step: int) -> Iterator[Fact]:
    """What comes after (step 1) or before (step -1); days and months go round, numbers stay within 0..100."""
    numbers = [words(number) for number in range(101)]
    for noun, row, circular in (("number", numbers, False), ("day", _DAYS, True), ("month", _MONTHS, True)):
        for place, x in enumerate(row):
            if circular or 0 <= place + step < len(row):
                other = row[(place + step) % len(row)]
                yield Fact(f"{name} {x}", {"noun": noun, "x": x}, f"{_sentence(name)} {x} comes {other}.")


def _one(name: str, answer: str) -> list[Fact]:
    return [Fact(name, {}, answer)]


def _row(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",")]


def _pairs(text: str) -> list[tuple[str, str]]:
    """`a: b` on each line, or several of them with commas between."""
    found = []
    for entry in text.replace("\n", ",").split(","):
        if entry.strip():
            a, b = entry.split(":")
            found.append((a.strip(), b.strip()))
    return found


def _unknown() -> Iterator[Fact]:
    """Things to name in questions that nano can't answer; every phrasing takes what it needs."""
    answer = "I am sorry, I don't know that."
    countries, cities = [country for country, _ in _CAPITALS], [city for _, city in _CAPITALS]
    for n in range(48):
        a, b = 2 + (7 * n) % 97, 2 + n % 9
        fields = {
            "country": countries[n % len(countries)],
            "city": cities[(5 * n) % len(cities)],
            "other": cities[(5 * n + 7) % len(cities)],
            "animal": _SOUNDS[n % len(_SOUNDS)][0],
            "thing": _THINGS[n % len(_THINGS)],
            "bare": _THINGS[n % len(_THINGS)].split()[-1],
            "a": words(a),
            "b": words(b),
        }
        yield Fact(f"unknown {n}", fields, answer)


def _compose(pattern: str, rng: random.Random) -> str:
    """A sentence of a pattern; the same slot twice gets two different words."""
    left: dict[str, list[str]] = {}
    parts = []
    for position, part in enumerate(pattern.replace("}", "{").split("{")):
        if position % 2 == 0:
            parts.append(part)
            continue
        row = left.setdefault(part, list(_slots()[part]))
        parts.append(row.pop(rng.randrange(len(row))))
    return _sentence(re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", "".join(parts)))


@cache
def _slots() -> dict[str, list[str]]:
    """The words of the facts, by the place they can take in a sentence."""
    animals = [animal.split()[-1] for animal, _ in _SOUNDS]
    return {
        "animal": animals,
        "animals": [_IRREGULAR.get(animal, animal + "s") for animal in animals],
        "thing": [thing.split()[-1] for thing in _THINGS],
        "adj": _ADJECTIVES,
        "color": sorted({color for _, color in _COLORS}),
        "number": [words(number) for number in range(2, 101)],
        "day": list(_DAYS),
        "month": list(_MONTHS),
        "country": [country for country, _ in _CAPITALS],
        "city": [city for _, city in _CAPITALS],
        "sound": [sound for _, sound in _SOUNDS],
        "name": _NAMES,
        "unit": [unit for unit, *_ in _UNITS],
        "whole": [whole for _, whole, _ in _UNITS],
        "opposite": [word for pair in _OPPOSITES for word in pair],
        "creature": [animal for animal, _ in _SOUNDS],
        "colored": [thing for thing, _ in _COLORS],
    }


_SMALL = _row("""
    zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen,
    sixteen, seventeen, eighteen, nineteen
""")
_TENS = _row("-, -, twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety")
_DAYS = _row("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
_MONTHS = _row("""
    January, February, March, April, May, June, July, August, September, October, November, December
""")

_OPPOSITES = _pairs("""
    hot: cold, big: small, tall: short, fast: slow, happy: sad, up: down, left: right, day: night, black: white
    open: closed, full: empty, rich: poor, young: old, hard: soft, wet: dry, light: dark, loud: quiet, early: late
    near: far, clean: dirty, strong: weak, thick: thin, wide: narrow, high: low, deep: shallow, sweet: sour, good: bad
    true: false, first: last, inside: outside, buy: sell, push: pull, win: lose, love: hate, yes: no, always: never
    above: below, front: back, summer: winter, cheap: expensive, easy: difficult, safe: dangerous, asleep: awake
    tight: loose, smooth: rough, war: peace, question: answer, laugh: cry, give: take, come: go, remember: forget
    north: south, east: west, boy: girl, man: woman, brother: sister, mother: father, same: different, begin: end
    alone: together
""")
_COLORS = _pairs("""
    the sky: blue, grass: green, snow: white, a banana: yellow, a tomato: red, coal: black, a lemon: yellow
    blood: red, milk: white, a frog: green, an elephant: gray, a carrot: orange, chocolate: brown, the sun: yellow
    a strawberry: red, a pumpkin: orange, the sea: blue, a leaf: green, a flamingo: pink, a crow: black, salt: white
    a cucumber: green, a mouse: gray, a cherry: red, a bear: brown, a swan: white, a pig: pink, gold: yellow
    a plum: purple, paper: white, a potato: brown, a lobster: red, broccoli: green, rice: white, a fox: orange
    coffee: brown
""")
_SOUNDS = _pairs("""
    a cow: moo, a dog: woof, a cat: meow, a sheep: baa, a duck: quack, a pig: oink, a horse: neigh, a lion: roar
    a frog: ribbit, a bee: buzz, a snake: hiss, an owl: hoot, a crow: caw, a mouse: squeak, a bird: tweet, a wolf: howl
    a donkey: hee-haw, a turkey: gobble, a chicken: cluck, a bear: growl, a rooster: cock-a-doodle-doo
""")
_CAPITALS = _pairs("""
    France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Portugal: Lisbon, England: London, Scotland: Edinburgh
    Wales: Cardiff, Ireland: Dublin, Norway: Oslo, Sweden: Stockholm, Finland: Helsinki, Denmark: Copenhagen
    Poland: Warsaw, Austria: Vienna, Hungary: Budapest, Greece: Athens, Turkey: Ankara, Russia: Moscow, Ukraine: Kyiv
    Belgium: Brussels, Romania: Bucharest, Bulgaria: Sofia, Croatia: Zagreb, Serbia: Belgrade, Iceland: Reykjavik
    China: Beijing, Japan: Tokyo, India: New Delhi, Thailand: Bangkok, Vietnam: Hanoi, Iran: Tehran, Iraq: Baghdad
    Egypt: Cairo, Morocco: Rabat, Kenya: Nairobi, Ghana: Accra, Nigeria: Abuja, Canada: Ottawa, Mexico: Mexico City
    Cuba: Havana, Brazil: Brasilia, Argentina: Buenos Aires, Chile: Santiago, Peru: Lima, Australia: Canberra
    New Zealand: Wellington, the United States: Washington
""")
_UNITS = [
    ("seconds", "a minute", 60),
    ("minutes", "an hour", 60),
    ("hours", "a day", 24),
    ("days", "a week", 7),
    ("months", "a year", 12),
    ("weeks", "a year", 52),
    ("days", "a year", 365),
    ("seasons", "a year", 4),
    ("years", "a decade", 10),
    ("years", "a century", 100),
    ("minutes", "half an hour", 30),
    ("seconds", "half a minute", 30),
    ("months", "half a year", 6),
    ("hours", "two days", 48),
    ("days", "two weeks", 14),
    ("minutes", "two hours", 120),
    ("days", "January", 31),
    ("days", "February", 28),
    ("days", "March", 31),
    ("days", "April", 30),
    ("days", "May", 31),
    ("days", "June", 30),
    ("days", "July", 31),
    ("days", "August", 31),
    ("days", "September", 30),
    ("days", "October", 31),
    ("days", "November", 30),
    ("days", "December", 31),
    ("millimeters", "a centimeter", 10),
    ("centimeters", "a meter", 100),
    ("meters", "a kilometer", 1000),
    ("grams", "a kilogram", 1000),
    ("inches", "a foot", 12),
    ("feet", "a yard", 3),
    ("ounces", "a pound", 16),
    ("cents", "a dollar", 100),
    ("letters", "the alphabet", 26),
    ("eggs", "a dozen", 12),
    ("players", "a soccer team", 11),
    ("sides", "a triangle", 3),
    ("sides", "a square", 4),
    ("sides", "a pentagon", 5),
    ("sides", "a hexagon", 6),
    ("colors", "a rainbow", 7),
    ("planets", "the solar system", 8),
    ("continents", "the world", 7),
]
_FAVORITES = _pairs("""
    color: blue, number: seven, animal: the owl, day: Sunday, month: May, season: summer, food: pizza, word: hello
    city: Paris, fruit: the banana
""")
_GREETINGS = _pairs("""
    hello: Hello, hi: Hello, good morning: Good morning, good afternoon: Good afternoon, good evening: Good evening
""")
_FAREWELLS = _pairs("""
    goodbye: Goodbye. Have a nice day., bye: Goodbye. Have a nice day., bye bye: Goodbye. Have a nice day.
    good night: Good night. Sleep well., see you later: See you later., see you soon: See you soon.
    see you tomorrow: See you tomorrow.
""")
_THINGS = _row("""
    a car, a phone, a bicycle, a pizza, a cake, a camera, a guitar, a boat, a house, a clock, a book, a piano
""")
_ADJECTIVES = _row("""
    hot, cold, big, small, tall, short, fast, slow, happy, sad, rich, poor, young, old, hard, soft, wet, dry, dark,
    loud, quiet, clean, dirty, strong, weak, thick, thin, wide, narrow, good, bad, cheap, expensive, safe, dangerous
""")
_NAMES = _row("the boy, the girl, the man, the woman, my brother, my sister, my mother, my father, the king")
_IRREGULAR = {"sheep": "sheep", "mouse": "mice", "wolf": "wolves"}

_PATTERNS = _lines("""
    The {adj} {animal} likes the {adj} {animal}.
    {name} has {number} {animals}.
    On {day} I see a {color} {animal}.
    {number} {adj} {animals} live in {country}.
    The {animal} is {adj} and the {animal} is {adj}.
    I live in {city}, and you live in {city}.
    In {month} the {animals} come to {country}.
    {name} sells a {color} {thing} in {city}.
    The {thing} is {color} and {adj}.
    A {adj} {animal} says {sound}.
    There are {number} {unit} and {number} {animals}.
    {name} comes from {city} on {day}.
    My favorite {animal} is {color}.
    Is the {thing} of {name} {color} or {color}?
    {name} gives me {number} {unit}.
    The {color} {animal} eats {number} eggs a day.
    {day} is a {adj} day in {month}.
    We buy {number} {adj} {animals} in {month}.
    Where is the {color} {thing}?
    {name} likes {city} in {month}.
    The {animal} and the {animal} live together in a {color} house.
    I am {adj}, but you are {adj}.
    {number} and {number} are numbers, {color} is a color.
    Do you know the {adj} {animal} from {city}?
    The {thing} is above the {animal}, and the {thing} is below.
    Every {day} {name} and {name} count {animals}.
    {name} asks a question, and the {animal} says {sound}.
    From {city} to {city} it takes {number} hours.
    The first {animal} is {color}, the last is {color}.
    Tell {name} that the {thing} is {adj}.
""")

_GRAMMAR: dict[str, Sequence[str]] = {
    "sentence": _lines("""
        {clause}.
        {clause}.
        {clause}.
        {clause}.
        {when}, {clause}.
        {clause}, and {clause}.
        {clause}, but {clause}.
        {clause} because {clause}.
        {clause} when {clause}.
        if {clause}, {clause}.
        I think {clause}.
        tell {one} that {clause}.
        does {one} {do} {what}?
        do {many} {do} {what} {place}?
        is {one} {adj} or {adj}?
        is {one} {place}?
        are {many} {color} or {color}?
        where is {one}?
        where are {many}?
        who {does} {what}?
        do you {do} {what}?
        can you {do} {what} {when}?
        how many {animals} are {place}?
        {do} {what}, please.
        {do} {what} and {what}.
        show {what} to {name}.
        {one}, {one} and {one}.
        {one} {place}, {many} {place}.
        {one} says {sound}, {sound}, {sound}.
        {word}, {word}, {word}.
        {word}, {word}, {word}, {word}.
        {word} {word} {word} {word}.
        {word} {does} {word} {place}.
    """),
    "answer": _lines("""
        the capital of {country} is {city}.
        the capital of {country} is {city}.
        the capital of {country} is {city}.
        {city} is the capital of {country}.
        {city} is the capital of {country}.
        {city} is the capital of {country}.
        the opposite of {opposite} is {opposite}.
        the opposite of {opposite} is {opposite}.
        the opposite of {opposite} is {opposite}.
        {creature} says {sound}.
        {creature} says {sound}.
        {colored} is {color}.
        there are {number} {unit} in {whole}.
        before {month} comes {month}.
        after {day} comes {day}.
        my favorite {favorite} is {word}.
        {country}, {country}, {country}.
        {country}, {city} and {country}.
        {city}, {country} and {city}.
        {opposite}, {opposite}, {opposite}.
        {opposite} is not {opposite}.
        {country} or {opposite}?
        {word}, {opposite}, {word}.
        {sound}, {opposite}, {city}, {sound}.
        {creature}, {country} and {colored}.
    """),
    "named": _lines("""
        my name is Nano, {name}.
        my name is Nano, and {clause}.
        my name is not {name}, my name is Nano.
        {name}, my name is Nano.
        {clause}, and my name is Nano.
        I am Nano, and {clause}.
        Nano {does} {what}.
        Nano {does} {what} {place}.
        {one} {does} Nano.
        {one} {does} Nano {when}.
        {name} and Nano {do} {what}.
        is Nano {place}?
        {do} {what}, Nano.
        {when}, {clause}, Nano.
    """),
    "favorite": [what for what, _ in _FAVORITES],
    "clause": _lines("""
        {one} {does} {what}
        {one} {does} {what} {place}
        {one} {does} {what} {when}
        {many} {do} {what}
        {many} {do} {what} {place}
        {one} is {how}
        {one} is {place}
        {many} are {how}
        {many} are {place}
        {one} lives {place}
        {many} live {place}
        {one} comes from {city} {when}
        {one} goes to {city} {when}
        {one} says {sound} {when}
        there is a {color} {thing} {place}
        there are {many} {place}
        {one} was {adj} {when}
        the favorite {thing} of {name} is {how}
        my favorite {thing} is {place}
        your favorite animal is the {animal}
    """),
    "one": _row("""
        {name}, {name}, the {animal}, the {adj} {animal}, a {color} {animal}, my {thing}, his {adj} {thing},
        the {color} {thing}, the {thing} of {name}, the {animal} from {city}, your favorite {animal},
        the first {animal}, the last {thing}, this {thing}
    """),
    "many": _row("""
        we, they, {number} {animals}, {number} {animals}, {number} {adj} {animals}, the {color} {animals},
        {name} and {name}, all {animals}
    """),
    "what": _lines("""
        {one}
        {one}
        {one}
        {number} {animals}
        {number} {unit}
        the {thing} and the {thing}
        a {adj}, {color} {thing}
        me
        it
    """),
    "does": _row("""
        likes, sees, eats, buys, sells, counts, knows, wants, finds, has, hears, loves, takes, needs, asks
    """),
    "do": _row("""
        like, see, eat, buy, sell, count, know, want, find, have, hear, love, take, need, ask
    """),
    "how": _row("""
        {adj}, {color}, {adj} and {adj}, {adj} but not {adj}, {color} or {color}, very {adj}, as {adj} as {one}
    """),
    "place": _row("""
        in {city}, in {country}, above {one}, below {one}, behind {one}, near {one}, with {one},
        from {city} to {city}, in the house
    """),
    "when": _row("""
        on {day}, in {month}, every {day}, for {number} {unit}, after {number} {unit}, today, at night
    """),
    "word": _row("""
        {adj}, {animal}, {animals}, {color}, {number}, {number}, {day}, {month}, {country}, {city}, {thing},
        {unit}, {sound}
    """),
}
"""What a part of a free sentence can be; what is not a part is a slot of `_slots`. A part named twice comes twice as
often."""

_ALL = [
    _kind(
        "sum",
        24,
        """
        what is {a} plus {b}?
        what's {a} plus {b}?
        how much is {a} plus {b}?
        what do you get if you add {a} and {b}?
        what do {a} and {b} make?
        add {a} and {b}.
        add {a} to {b}.
        {a} plus {b}?
        {a} plus {b} equals what?
        can you add {a} and {b}?
        please add {a} to {b}.
        tell me {a} plus {b}.
        what is the sum of {a} and {b}?
        tell me the sum of {a} and {b}.
        how much do {a} and {b} make?
        can you tell me what {a} plus {b} is?
        what does {a} plus {b} make?
        how much is {a} and {b} together?
        please tell me what {a} and {b} make.
        do you know what {a} plus {b} is?
        """,
        _number_facts("sum", "plus", ((a, b, a + b) for a in range(1, 100) for b in range(1, 101 - a)), _sorted),
    ),
    _kind(
        "difference",
        24,
        """
        what is {a} minus {b}?
        what's {a} minus {b}?
        how much is {a} minus {b}?
        what do you get if you take {b} from {a}?
        what is {a} take away {b}?
        take {b} from {a}.
        take {b} away from {a}.
        {a} minus {b}?
        {a} minus {b} equals what?
        can you take {b} away from {a}?
        {a} take away {b}?
        tell me {a} take away {b}.
        tell me {a} minus {b}.
        what is the difference between {a} and {b}?
        tell me the difference between {a} and {b}.
        how much is {a} take away {b}?
        {a} take away {b} equals what?
        can you tell me what {a} minus {b} is?
        what does {a} minus {b} make?
        subtract {b} from {a}.
        please subtract {b} from {a}.
        do you know what {a} minus {b} is?
        """,
        _number_facts(
            "difference", "minus", ((a, b, a - b) for a in range(1, 101) for b in range(1, a + 1)), lambda a, b: (a, b)
        ),
    ),
    _kind(
        "product",
        8,
        """
        what is {a} times {b}?
        what's {a} times {b}?
        how much is {a} times {b}?
        what do you get if you multiply {a} by {b}?
        what do {a} times {b} make?
        multiply {a} by {b}.
        multiply {a} and {b}.
        {a} times {b}?
        {a} times {b} equals what?
        can you multiply {a} by {b}?
        please multiply {a} and {b}.
        tell me {a} times {b}.
        what is the product of {a} and {b}?
        tell me the product of {a} and {b}.
        how much is {a} multiplied by {b}?
        can you tell me what {a} times {b} is?
        what does {a} times {b} make?
        what is {a} multiplied by {b}?
        please tell me what {a} times {b} is.
        do you know what {a} times {b} is?
        """,
        _number_facts(
            "product",
            "times",
            ((a, b, a * b) for a in range(1, 11) for b in range(1, 11)),
            lambda a, b: (a, b) if a < b else None,
        ),
        held_out_pairs=0.22,  # of the 45 with the smaller number first: a tenth of all
    ),
    _kind(
        "count",
        5,
        """
        count from {a} to {b}.
        please count from {a} to {b}.
        can you count from {a} to {b}?
        could you count from {a} to {b}?
        count for me from {a} to {b}.
        please count for me from {a} to {b}.
        I want you to count from {a} to {b}.
        say the numbers from {a} to {b}.
        please say the numbers from {a} to {b}.
        can you say the numbers from {a} to {b}?
        tell me the numbers from {a} to {b}.
        start at {a} and count to {b}.
        start counting at {a} and stop at {b}.
        which numbers go from {a} to {b}?
        what are the numbers from {a} to {b}?
        """,
        _counts(20, range(2, 5)),
    ),
    _kind(
        "after",
        6,
        """
        what comes after {x}?
        what {noun} comes after {x}?
        which {noun} comes after {x}?
        what is the {noun} after {x}?
        what's the {noun} after {x}?
        tell me the {noun} after {x}.
        tell me what comes after {x}.
        can you tell me what comes after {x}?
        what comes right after {x}?
        what comes next after {x}?
        which {noun} follows {x}?
        what follows {x}?
        do you know what comes after {x}?
        please tell me what comes after {x}.
        what is the next {noun} after {x}?
        after {x} comes what?
        which {noun} is next after {x}?
        name the {noun} after {x}.
        which {noun} comes right after {x}?
        do you know which {noun} follows {x}?
        """,
        _neighbours("after", 1),
    ),
    _kind(
        "before",
        6,
        """
        what comes before {x}?
        what {noun} comes before {x}?
        which {noun} comes before {x}?
        what is the {noun} before {x}?
        what's the {noun} before {x}?
        tell me the {noun} before {x}.
        tell me what comes before {x}.
        can you tell me what comes before {x}?
        what comes right before {x}?
        what comes just before {x}?
        which {noun} is right before {x}?
        what is just before {x}?
        do you know what comes before {x}?
        please tell me what comes before {x}.
        what is the last {noun} before {x}?
        before {x} comes what?
        which {noun} is just before {x}?
        name the {noun} before {x}.
        which {noun} comes right before {x}?
        do you know which {noun} comes before {x}?
        """,
        _neighbours("before", -1),
    ),
    _kind(
        "opposite",
        6,
        """
        what is the opposite of {x}?
        what's the opposite of {x}?
        tell me the opposite of {x}.
        can you tell me the opposite of {x}?
        do you know the opposite of {x}?
        please tell me the opposite of {x}.
        which word is the opposite of {x}?
        which word means the opposite of {x}?
        what word is the opposite of {x}?
        give me the opposite of {x}.
        please give me the opposite of {x}.
        say the opposite of {x}.
        can you say the opposite of {x}?
        I want to know the opposite of {x}.
        name the opposite of {x}.
        {x} is the opposite of what?
        what would be the opposite of {x}?
        do you know which word is the opposite of {x}?
        """,
        (
            Fact(f"opposite {x}", {"x": x}, f"The opposite of {x} is {y}.")
            for pair in _OPPOSITES
            for x, y in (pair, pair[::-1])
        ),
    ),
    _kind(
        "color",
        3,
        """
        what color is {x}?
        which color is {x}?
        what is the color of {x}?
        what's the color of {x}?
        tell me the color of {x}.
        tell me what color {x} is.
        can you tell me the color of {x}?
        can you tell me what color {x} is?
        do you know the color of {x}?
        do you know what color {x} is?
        please tell me the color of {x}.
        please tell me what color {x} is.
        which color does {x} have?
        what color does {x} have?
        I want to know the color of {x}.
        I want to know what color {x} is.
        {x} is what color?
        name the color of {x}.
        """,
        (Fact(f"color {x}", {"x": x}, _sentence(f"{x} is {color}.")) for x, color in _COLORS),
    ),
    _kind(
        "sound",
        3,
        """
        what does {x} say?
        what sound does {x} make?
        which sound does {x} make?
        what is the sound of {x}?
        what's the sound of {x}?
        tell me what {x} says.
        tell me the sound of {x}.
        can you tell me what {x} says?
        do you know what {x} says?
        do you know what sound {x} makes?
        please tell me what {x} says.
        how does {x} sound?
        tell me how {x} sounds.
        what noise does {x} make?
        which noise does {x} make?
        tell me what noise {x} makes.
        {x} says what?
        can you make the sound of {x}?
        make the sound of {x}.
        I want to know what {x} says.
        """,
        (Fact(f"sound {x}", {"x": x}, _sentence(f"{x} says {sound}.")) for x, sound in _SOUNDS),
    ),
    _kind(
        "animal",
        2,
        """
        which animal says {x}?
        what animal says {x}?
        who says {x}?
        tell me who says {x}.
        tell me which animal says {x}.
        can you tell me who says {x}?
        can you tell me which animal says {x}?
        do you know who says {x}?
        do you know which animal says {x}?
        please tell me who says {x}.
        please tell me which animal says {x}.
        which animal makes the sound {x}?
        who makes the sound {x}?
        name the animal that says {x}.
        what is the animal that says {x}?
        what's the animal that says {x}?
        """,
        (Fact(f"animal {sound}", {"x": sound}, _sentence(f"{x} says {sound}.")) for x, sound in _SOUNDS),
    ),
    _kind(
        "capital",
        5,
        """
        what is the capital of {x}?
        what's the capital of {x}?
        which city is the capital of {x}?
        what city is the capital of {x}?
        tell me the capital of {x}.
        can you tell me the capital of {x}?
        do you know the capital of {x}?
        please tell me the capital of {x}.
        name the capital of {x}.
        can you name the capital of {x}?
        what is the name of the capital of {x}?
        what is the capital city of {x}?
        what's the capital city of {x}?
        tell me the capital city of {x}.
        I want to know the capital of {x}.
        give me the capital of {x}.
        do you know which city is the capital of {x}?
        please name the capital city of {x}.
        """,
        (Fact(f"capital {x}", {"x": x}, f"The capital of {x} is {city}.") for x, city in _CAPITALS),
    ),
    _kind(
        "country",
        2.5,
        """
        {x} is the capital of which country?
        {x} is the capital of what country?
        which country has the capital {x}?
        what country has the capital {x}?
        which country is {x} the capital of?
        what country is {x} the capital of?
        what is {x} the capital of?
        tell me which country has the capital {x}.
        tell me which country {x} is the capital of.
        can you tell me which country {x} is the capital of?
        do you know which country {x} is the capital of?
        do you know which country has the capital {x}?
        please tell me which country {x} is the capital of.
        name the country with the capital {x}.
        the capital of which country is {x}?
        of which country is {x} the capital?
        """,
        (Fact(f"country {city}", {"x": city}, f"{city} is the capital of {x}.") for x, city in _CAPITALS),
    ),
    _kind(
        "unit",
        5,
        """
        how many {x} are in {y}?
        how many {x} are there in {y}?
        how many {x} does {y} have?
        tell me how many {x} are in {y}.
        tell me how many {x} there are in {y}.
        can you tell me how many {x} are in {y}?
        can you tell me how many {x} there are in {y}?
        do you know how many {x} are in {y}?
        do you know how many {x} {y} has?
        please tell me how many {x} are in {y}.
        please tell me how many {x} {y} has.
        what is the number of {x} in {y}?
        what's the number of {x} in {y}?
        {y} has how many {x}?
        I want to know how many {x} are in {y}.
        in {y} there are how many {x}?
        """,
        (Fact(f"unit {x} {y}", {"x": x, "y": y}, f"There are {words(count)} {x} in {y}.") for x, y, count in _UNITS),
    ),
    _kind(
        "favorite",
        1.5,
        """
        what is your favorite {x}?
        what's your favorite {x}?
        which {x} is your favorite?
        which {x} do you like best?
        what {x} do you like best?
        which {x} do you like most?
        what {x} do you like the most?
        tell me your favorite {x}.
        can you tell me your favorite {x}?
        please tell me your favorite {x}.
        do you have a favorite {x}?
        tell me which {x} you like best.
        tell me which {x} you like most.
        can you tell me which {x} you like best?
        I want to know your favorite {x}.
        """,
        (Fact(f"favorite {x}", {"x": x}, f"My favorite {x} is {y}.") for x, y in _FAVORITES),
    ),
    _kind(
        "name",
        0.8,
        """
        what is your name?
        what's your name?
        who are you?
        tell me your name.
        can you tell me your name?
        please tell me your name.
        do you have a name?
        what are you called?
        what do people call you?
        what can I call you?
        what should I call you?
        how are you called?
        may I know your name?
        I want to know your name.
        say your name.
        please say your name.
        tell me who you are.
        please tell me who you are.
        can you tell me who you are?
        do you know your name?
        """,
        _one("name", "My name is Nano."),
    ),
    _kind(
        "what",
        0.8,
        """
        what are you?
        tell me what you are.
        can you tell me what you are?
        please tell me what you are.
        are you a computer?
        are you a robot?
        are you a machine?
        are you a person?
        are you human?
        are you a human or a machine?
        are you a person or a robot?
        are you a computer or a person?
        what kind of machine are you?
        what kind of robot are you?
        what sort of thing are you?
        what kind of thing are you?
        are you real?
        are you a real person?
        do you know what you are?
        I want to know what you are.
        """,
        _one("what", "I am a small model that hears and talks."),
    ),
    _kind(
        "hobby",
        0.7,
        """
        what are your hobbies?
        do you have hobbies?
        do you have a hobby?
        what is your hobby?
        what's your hobby?
        tell me your hobbies.
        tell me about your hobbies.
        can you tell me your hobbies?
        can you tell me about your hobbies?
        please tell me about your hobbies.
        what do you do for fun?
        what do you do all day?
        what do you do in your free time?
        what do you like to do in your free time?
        what do you like to do for fun?
        what do you like to do all day?
        do you have any hobbies?
        how do you have fun?
        """,
        _one("hobby", "I like to count and to talk with people."),
    ),
    _kind(
        "feeling",
        0.8,
        """
        how are you?
        how are you today?
        how are you doing?
        how are you doing today?
        how do you feel?
        how do you feel today?
        how are you feeling?
        how are you feeling today?
        are you well?
        are you well today?
        are you okay?
        are you okay today?
        do you feel well?
        do you feel good today?
        tell me how you are.
        tell me how you feel.
        can you tell me how you feel?
        please tell me how you are.
        are you feeling good?
        are you feeling well today?
        """,
        _one("feeling", "I am fine, thank you."),
    ),
    _kind(
        "like",
        0.7,
        """
        what do you like?
        what do you like most?
        what do you like best?
        what do you love?
        what do you love most?
        tell me what you like.
        tell me what you love.
        tell me what you like best.
        can you tell me what you like?
        please tell me what you like.
        please tell me what you love.
        what things do you like?
        which things do you like?
        which things do you love?
        is there something you like?
        is there something you love?
        do you like something?
        do you love something?
        """,
        _one("like", "I like numbers and good questions."),
    ),
    _kind(
        "age",
        0.6,
        """
        how old are you?
        what is your age?
        what's your age?
        tell me your age.
        tell me how old you are.
        can you tell me your age?
        can you tell me how old you are?
        please tell me your age.
        please tell me how old you are.
        are you old?
        are you young?
        are you young or old?
        do you know how old you are?
        do you know your age?
        how many years old are you?
        when were you born?
        """,
        _one("age", "I am very young."),
    ),
    _kind(
        "home",
        0.6,
        """
        where do you live?
        where are you?
        where is your home?
        tell me where your home is.
        tell me where you live.
        tell me where you are.
        can you tell me where you live?
        can you tell me where you are?
        please tell me where you live.
        please tell me where you are.
        do you have a home?
        do you live in a house?
        in which city do you live?
        which city do you live in?
        which country do you live in?
        in which country do you live?
        where are you from?
        where do you come from?
        """,
        _one("home", "I live inside a computer."),
    ),
    _kind(
        "ability",
        0.7,
        """
        what can you do?
        what can you do for me?
        what do you know?
        what do you know about?
        how can you help me?
        can you help me?
        please help me.
        tell me what you can do.
        tell me what you know.
        tell me how you can help me.
        can you tell me what you can do?
        please tell me what you can do.
        please tell me what you know.
        what can I ask you?
        what can I ask?
        what questions can I ask you?
        which questions can I ask?
        what should I ask you?
        """,
        _one("ability", "I can count, add and answer easy questions."),
    ),
    _kind(
        "weather",
        1,
        """
        what is the weather like?
        what's the weather like?
        what is the weather like today?
        what's the weather like today?
        how is the weather?
        how is the weather today?
        how's the weather?
        is it raining?
        is it raining outside?
        will it rain today?
        will it rain tomorrow?
        is it sunny today?
        is it sunny outside?
        is it cold outside?
        is it hot outside?
        is it cold today?
        will it be hot tomorrow?
        will it be sunny tomorrow?
        tell me about the weather.
        can you tell me about the weather today?
        """,
        _one("weather", "I can't look outside, so I don't know."),
    ),
    _kind(
        "greeting",
        1.2,
        """
        {x}.
        {x}, Nano.
        {x}, my friend.
        {x} to you.
        {x}, computer.
        {x}, little friend.
        {x}, dear Nano.
        {x}, my dear friend.
        {x}, my little friend.
        {x}, nice to meet you.
        {x}, I am here.
        {x}, here I am.
        {x}, are you there?
        {x}, can you hear me?
        {x}, do you hear me?
        I want to say {x}.
        """,
        (Fact(f"greeting {x}", {"x": x}, f"{y}. How can I help you?") for x, y in _GREETINGS),
    ),
    _kind(
        "farewell",
        1.2,
        """
        {x}.
        {x}, Nano.
        {x}, my friend.
        {x} then.
        {x}, computer.
        {x}, little friend.
        {x}, dear Nano.
        {x}, my dear friend.
        okay, {x}.
        okay then, {x}.
        I have to go, {x}.
        I have to go now, {x}.
        that is all, {x}.
        that is all for now, {x}.
        I want to say {x}.
        """,
        (Fact(f"farewell {x}", {"x": x}, y) for x, y in _FAREWELLS),
    ),
    _kind(
        "thanks",
        0.8,
        """
        thank you.
        thanks.
        thank you very much.
        thanks very much.
        thank you, Nano.
        thanks, Nano.
        thank you for your help.
        thanks for your help.
        thank you so much.
        thanks so much.
        okay, thank you.
        okay, thanks.
        thank you, my friend.
        thanks, my friend.
        thank you for the answer.
        thanks for the answer.
        many thanks.
        I want to say thank you.
        """,
        _one("thanks", "You are welcome."),
    ),
    _kind(
        "joke",
        0.7,
        """
        tell me a joke.
        please tell me a joke.
        can you tell me a joke?
        could you tell me a joke?
        do you know a joke?
        do you know any jokes?
        can you tell jokes?
        say something funny.
        tell me something funny.
        can you say something funny?
        can you tell me something funny?
        please say something funny.
        make me laugh.
        can you make me laugh?
        please make me laugh.
        I want to hear a joke.
        I want to laugh.
        give me a joke.
        """,
        _one("joke", "Why is six afraid of seven? Because seven ate nine."),
    ),
    _kind(
        "unknown",
        5,
        """
        who is the president of {country}?
        who is the king of {country}?
        who was the first king of {country}?
        who was the first president of {country}?
        how many people live in {country}?
        how many people live in {city}?
        how many people are there in {city}?
        how big is {country}?
        how big is {city}?
        which city is bigger, {city} or {other}?
        is {city} bigger than {other}?
        how far is it from {city} to {other}?
        how far is it to {city}?
        how far is {city} from {other}?
        what language do people speak in {country}?
        which language do people speak in {country}?
        how do I get to {city}?
        how do I get from {city} to {other}?
        how old is {city}?
        how old is {thing}?
        what time is it?
        what time is it in {city}?
        how much does {animal} eat?
        how much does {animal} cost?
        how much does {thing} cost?
        how long does {animal} live?
        how long does {animal} sleep?
        where does {animal} live?
        where does {animal} sleep?
        how fast is {animal}?
        how fast is {thing}?
        what does {animal} eat?
        what does {animal} like to eat?
        who made the first {bare}?
        how do I make {thing}?
        how do people make {thing}?
        where can I buy {thing}?
        where can I buy {thing} in {city}?
        what is {a} divided by {b}?
        how much is {a} divided by {b}?
        """,
        _unknown(),
    ),
]
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
"""By name."""


def main(answers: Annotated[Path | None, typer.Argument(help="File to write, one answer a line")] = None) -> None:
    """Say how many questions there are; write the training answers to a file if one is named."""
    train, held_out = questions("train"), questions("held_out")
    counts = {"train": Counter(item.kind for item in train), "held out": Counter(item.kind for item in held_out)}
    print(f"{'kind':12}{'facts':>8}{'phrasings':>11}{'answers':>9}{'train':>9}{'held out':>10}")
    for name, kind in KINDS.items():
        asked = f"{counts['train'][name]:9}{counts['held out'][name]:10}"
        print(f"{name:12}{len(kind.facts):8}{len(kind.phrasings):11}{len(kind.answers):9}{asked}")
    known = {item.answer for item in train}
    both = len(known | {item.answer for item in held_out})
    print(
        f"{'all':12}{sum(len(kind.facts) for kind in KINDS.values()):8}{'':11}{both:9}{len(train):9}{len(held_out):10}"
    )
    if answers:
        answers.parent.mkdir(parents=True, exist_ok=True)
        answers.write_text("".join(f"{answer}\n" for answer in sorted(known)), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
