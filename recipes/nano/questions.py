"""What nano can talk about: questions, each with its one answer, made from the tables and phrasings in `facts/`.

A kind (sums, capitals, jokes, ...) is a list of facts and a list of phrasings; every fact in every phrasing is a
question. The held-out set is decided by hashes and therefore the same in every run:

- a tenth of the number pairs of each kind that asks for two numbers: of sums in both orders (7 + 5 and 5 + 7), of
  products in one order only, since a times table cannot be derived from other products,
- a fifth of the phrasings of each kind, never its first.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
T = TypeVar("T")

FACTS = Path(__file__).parent / "facts"
HELD_OUT_PAIRS = 1 / 10
HELD_OUT_PHRASINGS = 1 / 5


@dataclass(frozen=True, slots=True)
class Item:
    """A question as asked, and its answer."""

    kind: str
    question: str
    answer: str
    fact: str
    """What is asked, in any phrasing: `sum 7 5`."""
    held_out: str
    """Why the question is held out: `pair`, `phrasing` or `both`; empty for a training question."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something to ask for."""

    key: str
    fields: dict[str, str]
    """Values of the {names} in phrasings."""
    answer: str
    pair: tuple[int, int] | None = None
    """The two numbers asked for; equal for both orders where these are the same fact."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Facts that are asked for in the same phrasings."""

    name: str
    share: float
    """Of the spoken questions, relative to the other kinds."""
    phrasings: tuple[str, ...]
    further_phrasings: tuple[str, ...]
    """For training only."""
    facts: tuple[Fact, ...]
    held_out_phrasings: frozenset[str]
    held_out_pairs: frozenset[tuple[int, int]]

    @property
    def answers(self) -> frozenset[str]:
        """Of all its facts, each once."""
        return frozenset(fact.answer for fact in self.facts)

    def held_out(self, fact: Fact, phrasing: str) -> str:
        """Why this question is held out: see `Item.held_out`."""
        pair, form = fact.pair in self.held_out_pairs, phrasing in self.held_out_phrasings
        return {(False, False): "", (True, False): "pair", (False, True): "phrasing", (True, True): "both"}[pair, form]

    def item(self, fact: Fact, phrasing: str) -> Item:
        """A fact in a phrasing."""
        question = capitalize(phrasing.format(**fact.fields))
        return Item(self.name, question, fact.answer, fact.key, self.held_out(fact, phrasing))

    def in_split(self, split: Split, fact: Fact, phrasings: Iterable[str]) -> list[str]:
        """The phrasings in which a fact belongs to a split."""
        return [phrasing for phrasing in phrasings if (self.held_out(fact, phrasing) == "") == (split == "train")]


def read_facts(name: str) -> Any:
    """A YAML file of `facts/`; every scalar is a string, also `yes` and 60."""
    return yaml.load((FACTS / name).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


TABLES = read_facts("tables.yaml")


def words(number: int) -> str:
    """A whole number from 0 to 1000 in American English words.

    Raises:
        ValueError: any other number.
    """
    if not 0 <= number <= 1000:
        raise ValueError(f"expected a number from 0 to 1000, found {number}")
    if number == 1000:
        return "one thousand"
    if number >= 100:
        rest = number % 100
        return f"{TABLES['digits'][number // 100]} hundred" + (f" {words(rest)}" if rest else "")
    if number < 20:
        return TABLES["digits"][number]
    return TABLES["tens"][number // 10 - 2] + (f"-{TABLES['digits'][number % 10]}" if number % 10 else "")


def normalize(text: str) -> str:
    """Text as the audio encoder's CTC head spells it: lower case, no punctuation but apostrophes, single spaces."""
    kept = "".join(letter if letter.isalpha() or letter == "'" else " " for letter in text.lower())
    return " ".join(kept.split())


def capitalize(text: str) -> str:
    """With a capital first letter; the rest as it is."""
    return text[0].upper() + text[1:]


def hash_fraction(*parts: object) -> float:
    """A number in 0..1 that depends on the parts only."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def lowest_hashes(values: Iterable[T], share: float, *names: object) -> frozenset[T]:
    """At least `share` of the distinct values: those of the lowest hash."""
    ordered = sorted(set(values), key=lambda value: hash_fraction(*names, value))
    return frozenset(ordered[: math.ceil(len(ordered) * share)])


def held_out_phrasings(name: str, phrasings: Sequence[str]) -> frozenset[str]:
    """A fifth of the phrasings of a kind or form, never the first."""
    count = math.ceil(len(phrasings) * HELD_OUT_PHRASINGS)
    ordered = sorted(phrasings[1:], key=lambda phrasing: hash_fraction("phrasing", name, phrasing))
    return frozenset(ordered[:count])


def all_questions(split: Split, kinds: Iterable[str] | None = None, *, further: bool = False) -> list[Item]:
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
                for phrasing in kind.in_split(split, fact, phrasings):
                    item = kind.item(fact, phrasing)
                    found.setdefault(item.question, item)
    return list(found.values())


def larger_products() -> list[Item]:
    """Training questions for products of a number up to ten and one up to a hundred, in either order.

    They are outside the model's scope. Of a hundred products it memorizes each; this longer table teaches that the
    order of the numbers does not matter.
    """
    pairs = ((a, b) for a, b in itertools.product(range(1, 101), repeat=2) if min(a, b) <= 10 < max(a, b))
    return _in_training(KINDS["product"], _number_facts("product", "times", int.__mul__, pairs, lambda a, b: None))


def further_counts() -> list[Item]:
    """Training questions to count two to six numbers up to a hundred, in either direction.

    They are outside the model's scope, which is three to five numbers up to twenty. Of these few it memorizes each;
    more of them teach what is between any two numbers.
    """
    kind = KINDS["count"]
    asked = {fact.key for fact in kind.facts}
    return _in_training(kind, (fact for fact in _counts(100, range(1, 6)) if fact.key not in asked))


def sample(
    split: Split, count: int, seed: int, *, further: bool = False, shares: Mapping[str, float] | None = None
) -> list[Item]:
    """Questions drawn at random: every kind by its share, every fact of a kind equally often.

    A kind with fewer questions than its share repeats some. Of the held-out questions about two numbers, half are
    held out because of the pair.

    Args:
        split: `train` or `held_out`.
        count: of the questions.
        seed: of choice and order.
        further: in the further phrasings instead of the others.
        shares: of the kinds to draw from; None: those of the spoken questions.
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


def _in_training(kind: Kind, facts: Iterable[Fact]) -> list[Item]:
    """Other facts of a kind, in every phrasing of training."""
    phrasings = kind.phrasings + kind.further_phrasings
    return [kind.item(fact, phrasing) for fact in facts for phrasing in kind.in_split("train", fact, phrasings)]


def _draw(kind: Kind, split: Split, count: int, rng: random.Random, further: bool) -> list[Item]:
    """`count` questions of a kind: round after round of its facts, each time in a phrasing not yet drawn for it."""
    left: dict[str, list[str]] = {}
    held: list[Fact] = []
    rest: list[Fact] = []
    for fact in kind.facts:
        if phrasings := kind.in_split(split, fact, kind.further_phrasings if further else kind.phrasings):
            left[fact.key] = phrasings
            (held if fact.pair in kind.held_out_pairs else rest).append(fact)
    if held and rest:
        # Held-out pairs are few: they alternate with the others.
        endless = itertools.chain.from_iterable(_shuffled(held, rng) for _ in itertools.count())
        drawn = [fact for two in zip(endless, _shuffled(rest, rng), strict=False) for fact in two]
    else:
        drawn = _shuffled(held or rest, rng)
    chosen = []
    pools: dict[str, list[str]] = {}
    for fact in itertools.islice(itertools.cycle(drawn), count):
        phrasing, *pools[fact.key] = pools.get(fact.key) or _shuffled(left[fact.key], rng)
        chosen.append(kind.item(fact, phrasing))
    return chosen


def _shuffled(values: Sequence[T], rng: random.Random) -> list[T]:
    return rng.sample(values, len(values))


def _number_facts(
    kind: str,
    operator: str,
    calculate: Callable[[int, int], int],
    pairs: Iterable[tuple[int, int]],
    pair_of: Callable[[int, int], tuple[int, int] | None],
) -> Iterator[Fact]:
    for a, b in pairs:
        answer = capitalize(f"{words(a)} {operator} {words(b)} is {words(calculate(a, b))}.")
        yield Fact(f"{kind} {a} {b}", {"a": words(a), "b": words(b)}, answer, pair_of(a, b))


def _counts(largest: int, distances: range) -> Iterator[Fact]:
    """From a number to another so far away, upwards or downwards, between 0 and the largest."""
    for a, b in itertools.product(range(largest + 1), repeat=2):
        if abs(a - b) in distances:
            numbers = range(a, b + 1) if a < b else range(a, b - 1, -1)
            answer = capitalize(", ".join(map(words, numbers)) + ".")
            yield Fact(f"count {a} {b}", {"a": words(a), "b": words(b)}, answer, _sorted(a, b))


def _neighbors(kind: str, step: int) -> Iterator[Fact]:
    """What comes after (step 1) or before (step -1); days and months are circular, numbers stay within 0..100."""
    numbers = [words(number) for number in range(101)]
    for noun, row in (("number", numbers), ("day", TABLES["days"]), ("month", TABLES["months"])):
        for index, x in enumerate(row):
            if noun != "number" or 0 <= index + step < len(row):
                other = row[(index + step) % len(row)]
                yield Fact(f"{kind} {x}", {"noun": noun, "x": x}, f"{capitalize(kind)} {x} comes {other}.")


def _unknown() -> Iterator[Fact]:
    """Words for questions that nano cannot answer; a phrasing takes those it needs."""
    countries, cities, animals = list(TABLES["capitals"]), list(TABLES["capitals"].values()), list(TABLES["sounds"])
    things = TABLES["things"]
    for n in range(48):
        fields = {
            "country": countries[n % len(countries)],
            "city": cities[(5 * n) % len(cities)],
            "other": cities[(5 * n + 7) % len(cities)],
            "animal": animals[n % len(animals)],
            "thing": things[n % len(things)],
            "bare": things[n % len(things)].split()[-1],
            "a": words(2 + (7 * n) % 97),
            "b": words(2 + n % 9),
        }
        yield Fact(f"unknown {n}", fields, "I am sorry, I don't know that.")


def _sorted(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)


def _table_facts(kind: str, spec: Mapping[str, Any]) -> Iterator[Fact]:
    """The rows of the kind's table, or its only answer."""
    if "table" not in spec:
        yield Fact(kind, {}, spec["answer"])
        return
    table = TABLES[spec["table"]]
    for row in table.items() if isinstance(table, dict) else table:
        ways = [row, row[::-1]] if "both_ways" in spec else [row[::-1] if "swapped" in spec else row]
        for x, y, *count in ways:
            fields = {"x": x, "y": y} | ({"count": words(int(count[0]))} if count else {})
            key = f"{kind} {x} {y}" if count else f"{kind} {x}"
            yield Fact(key, fields, capitalize(spec["answer"].format(**fields)))


def _computed_facts(kind: str) -> Iterable[Fact]:
    """Facts that are not in a table."""
    to_hundred = range(1, 101)
    sums = ((a, b) for a in to_hundred for b in to_hundred if a + b <= 100)
    differences = ((a, b) for a in to_hundred for b in to_hundred if b <= a)
    products = itertools.product(range(1, 11), range(1, 11))
    return {
        "sum": _number_facts(kind, "plus", int.__add__, sums, _sorted),
        "difference": _number_facts(kind, "minus", int.__sub__, differences, lambda a, b: (a, b)),
        "product": _number_facts(kind, "times", int.__mul__, products, lambda a, b: (a, b) if a < b else None),
        "count": _counts(20, range(2, 5)),
        "after": _neighbors(kind, 1),
        "before": _neighbors(kind, -1),
        "unknown": _unknown(),
    }[kind]


def _kind(name: str, spec: Mapping[str, Any]) -> Kind:
    phrasings = tuple(spec["phrasings"].splitlines())
    facts = tuple(_table_facts(name, spec) if "answer" in spec else _computed_facts(name))
    pairs = (fact.pair for fact in facts if fact.pair)
    held_out_pairs = lowest_hashes(pairs, float(spec.get("held_out_pairs", HELD_OUT_PAIRS)), "pair", name)
    further = tuple(spec["further"].splitlines())
    held_out = held_out_phrasings(name, phrasings)
    return Kind(name, float(spec["share"]), phrasings, further, facts, held_out, held_out_pairs)


KINDS: dict[str, Kind] = {name: _kind(name, spec) for name, spec in read_facts("kinds.yaml").items()}
"""By name."""
