"""Conversations: questions that only the turns before them, or a system text, make clear.

The phrasings are in `facts/conversations.yaml` and, for training only, `facts/further_conversations.yaml`; everything
else is taken from `questions`. Held out are a fifth of the phrasings in the former, never the first, and what
`questions` holds out about numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from omni_jax.inference.request import Turn
from recipes.nano.questions import (
    HELD_OUT_PHRASINGS,
    KINDS,
    SPLITS,
    TABLES,
    Fact,
    Kind,
    Split,
    capitalize,
    held_out_phrasings,
    lowest_hashes,
    read_facts,
    words,
)

FORMS: dict[str, list[str]] = read_facts("conversations.yaml")
"""Phrasings by form."""
FURTHER_FORMS: dict[str, list[str]] = read_facts("further_conversations.yaml")
"""Further phrasings, for training only."""
NAMES = FORMS.pop("names")
FURTHER_NAMES = FURTHER_FORMS.pop("names")
MADE_UP = 0.4
"""Share of names in training that are made up: what a model has never seen must be copied."""
SYLLABLES = tuple(
    onset + vowel + coda
    for onset in ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "sh", "th", "tr", "br")
    for vowel in ("a", "e", "i", "o", "u", "ee", "ai")
    for coda in ("", "", "n", "l", "r", "s", "m")
)
UNKNOWN = KINDS["unknown"].facts[0].answer
ASKED_NAMES = lowest_hashes(NAMES[1:], HELD_OUT_PHRASINGS, "name")
"""Of held-out conversations. Training has them too, as it has the facts; what is held out is how one asks."""
PHRASINGS = {
    (split, form): [text for text in texts if (text in held_out_phrasings(form, texts)) == (split == "held_out")]
    for split in SPLITS
    for form, texts in FORMS.items()
}
"""Of each split and form, but the further ones."""
NEIGHBORS = {"after": KINDS["after"], "before": KINDS["before"]}
OF = ("capital", "color", "sound", "opposite")
"""Kinds whose question may say "of" before its subject."""
SUBJECTS = (*OF, "after", "before", "country", "animal", "favorite")
"""Kinds that ask about one thing, {x}."""
FAVORITES = {
    "color": sorted(set(TABLES["colors"].values())),
    "day": TABLES["days"],
    "month": TABLES["months"],
    "number": [words(number) for number in range(2, 100)],
    "animal": list(TABLES["sounds"]),
    "city": list(TABLES["capitals"].values()),
    "season": ["spring", "summer", "fall", "winter"],
}
"""What a user may like best."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A last turn, and what came before it."""

    kind: str
    """The form of its last question, or the kind."""
    system: str
    """Empty: none."""
    history: tuple[Turn, ...]
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of `questions`, with what is asked."""

    kind: Kind
    fact: Fact
    turn: Turn


class _Maker:
    """Draws conversations of a split."""

    def __init__(self, split: Split, seed: int) -> None:
        self.split: Split = split
        self.rng = random.Random(f"conversations {split} {seed}")

    def name(self) -> str:
        """Of a person."""
        if self.split == "held_out":
            return self.rng.choice(sorted(ASKED_NAMES))
        if self.rng.random() < MADE_UP:
            return "".join(self.rng.choices(SYLLABLES, k=self.rng.randint(1, 3))).capitalize()
        return self.rng.choice(NAMES + FURTHER_NAMES)

    def phrasing(self, form: str) -> str:
        """Of a form; half of those in training are further ones."""
        if self.split == "train" and self.rng.random() < 0.5:
            return self.rng.choice(FURTHER_FORMS[form])
        return self.rng.choice(PHRASINGS[self.split, form])

    def asked(self, *kinds: str) -> Asked:
        """A training question of one of the kinds.

        If none is named: of any, by their shares, but its name, which a system text may change.
        """
        kind = KINDS[self.rng.choice(kinds)] if kinds else self.any_kind(but="name")
        while True:
            fact = self.rng.choice(kind.facts)
            pool = kind.phrasings if self.rng.random() < 0.5 else kind.further_phrasings
            if phrasings := kind.in_split("train", fact, pool):
                item = kind.item(fact, self.rng.choice(phrasings))
                return Asked(kind, fact, Turn(item.question, item.answer))

    def any_kind(self, but: str = "") -> Kind:
        kinds = [kind for kind in KINDS.values() if kind.name != but]
        return self.rng.choices(kinds, [kind.share for kind in kinds])[0]

    def before(self, most: int) -> tuple[Turn, ...]:
        """Turns about anything."""
        return tuple(self.asked().turn for _ in range(self.rng.randint(0, most)))

    def plain_system(self) -> str:
        if self.rng.random() >= 0.3:
            return ""
        further = [] if self.split == "held_out" else FURTHER_FORMS["system_plain"]
        return self.rng.choice(FORMS["system_plain"] + further)

    def follow_up(self, form: str, previous: Turn, answer: str, **fields: str) -> Conversation:
        """The form's question right after a turn."""
        question = capitalize(self.phrasing(form).format(**fields))
        return Conversation(form, self.plain_system(), (*self.before(2), previous), question, answer)


def conversations(split: Split, count: int, seed: int) -> list[Conversation]:
    """Distinct conversations, all forms in turn.

    Args:
        split: `train` or `held_out`: of the last question's phrasing, and of the numbers asked for last.
        count: of the conversations. One in three ends with a question that needs nothing of what came before it.
        seed: of the choice.
    """
    maker = _Maker(split, seed)
    makers = [make for make, share in MAKERS for _ in range(share)]
    found: dict[Conversation, None] = {}
    tries = 0
    while len(found) < count:
        made = makers[tries % len(makers)](maker)
        tries += 1
        if made is not None:
            found.setdefault(made)
    return list(found)


def _value(asked: Asked) -> str | None:
    """The words that answer a question, without the sentence around them; None if they are not the point of it."""
    kind, fact = asked.kind.name, asked.fact
    number = _number(asked)
    if number is not None:
        return words(number)
    if kind in NEIGHBORS:
        return fact.answer.removesuffix(".").rsplit(" comes ", 1)[1]
    if kind in ("capital", "color", "opposite", "sound", "country", "animal"):
        return fact.fields["y"]
    if kind == "unit":
        return fact.fields["count"]
    return None


def _number(asked: Asked) -> int | None:
    """The result of a sum, difference or product."""
    if asked.kind.name not in ("sum", "difference", "product"):
        return None
    a, b = map(int, asked.fact.key.split()[1:])
    return {"sum": a + b, "difference": a - b, "product": a * b}[asked.kind.name]


def _fact(kind: str, key: str) -> Fact | None:
    return _FACTS[kind].get(f"{kind} {key}")


def _neighbor(maker: _Maker, form: str) -> Conversation | None:
    """What comes after that, what before."""
    asked = maker.asked("after", "after", "before", "sum", "difference", "product")
    fact = _fact(form, _value(asked) or "")
    return None if fact is None else maker.follow_up(form, asked.turn, fact.answer)


def _calculation(maker: _Maker, form: str) -> Conversation | None:
    """That and another number."""
    asked = maker.asked("sum", "difference", "product")
    kind = {"add": "sum", "subtract": "difference", "multiply": "product"}[form]
    other = maker.rng.randint(1, 10 if maker.rng.random() < 0.7 else 50)
    fact = _fact(kind, f"{_number(asked)} {other}")
    if fact is None or (maker.split == "train" and fact.pair in KINDS[kind].held_out_pairs):
        return None
    return maker.follow_up(form, asked.turn, fact.answer, b=words(other))


def _other(maker: _Maker, form: str) -> Conversation | None:
    """The same question about something else; in `correction`, about what was meant."""
    asked = maker.asked(*(OF if form == "other_of" else SUBJECTS))
    # What comes after a day is not asked of a number.
    facts = [
        fact
        for fact in asked.kind.facts
        if fact.fields["x"] != asked.fact.fields["x"] and fact.fields.get("noun") == asked.fact.fields.get("noun")
    ]
    fact = maker.rng.choice(facts)
    return maker.follow_up(form, asked.turn, fact.answer, x=fact.fields["x"])


def _corrected_numbers(maker: _Maker) -> Conversation | None:
    """Other numbers; where one is said, it takes the place of the last."""
    asked = maker.asked("sum", "difference", "product")
    kind, operator = asked.kind, {"sum": "plus", "difference": "minus", "product": "times"}[asked.kind.name]
    a, b = map(int, asked.fact.key.split()[1:])
    alone = maker.rng.random() < 0.4
    new_a, new_b = a if alone else maker.rng.choice((a, maker.rng.randint(1, 50))), maker.rng.randint(1, 50)
    fact = _fact(kind.name, f"{new_a} {new_b}")
    if fact is None or (new_a, new_b) == (a, b) or (maker.split == "train" and fact.pair in kind.held_out_pairs):
        return None
    said = words(new_b) if alone else f"{words(new_a)} {operator} {words(new_b)}"
    return maker.follow_up("correction", asked.turn, fact.answer, x=said)


def _again(maker: _Maker) -> Conversation:
    turn = maker.asked().turn
    return maker.follow_up("again", turn, turn.answer)


def _asked(maker: _Maker) -> Conversation:
    turn = maker.asked().turn
    return maker.follow_up("asked", turn, f"You asked: {turn.question}")


def _first_asked(maker: _Maker) -> Conversation:
    history = tuple(maker.asked().turn for _ in range(maker.rng.randint(1, 3)))
    question = capitalize(maker.phrasing("first_asked"))
    return Conversation("first_asked", maker.plain_system(), history, question, f"You asked: {history[0].question}")


def _sure(maker: _Maker) -> Conversation:
    turn = maker.asked("sum", "difference", "product", "after", "before", "opposite", "capital", "unit", "color").turn
    return maker.follow_up("sure", turn, f"Yes. {turn.answer}")


def _why(maker: _Maker) -> Conversation:
    turn = maker.asked("sum", "difference", "product", "after", "before", "capital", "unit", "color", "sound").turn
    return maker.follow_up("why", turn, UNKNOWN)


def _another(maker: _Maker) -> Conversation:
    return maker.follow_up("another", maker.asked("joke").turn, "I know only one joke.")


def _tell_name(maker: _Maker, name: str) -> Turn:
    return Turn(capitalize(maker.phrasing("user_name").format(x=name)), f"Nice to meet you, {name}.")


def _told_name(maker: _Maker) -> Conversation:
    turn = _tell_name(maker, maker.name())
    return Conversation("user_name", maker.plain_system(), maker.before(1), turn.question, turn.answer)


def _user_name(maker: _Maker) -> Conversation:
    """Told before, by the user or the system text, or never."""
    name = maker.name()
    where = maker.rng.choice(("history", "history", "history", "system", "nowhere"))
    system, history = maker.plain_system(), maker.before(2)
    if where == "history":
        history = (*maker.before(1), _tell_name(maker, name), *history)
    elif where == "system":
        system = maker.phrasing("system_user_name").format(x=name)
    answer = UNKNOWN if where == "nowhere" else f"Your name is {name}."
    return Conversation("ask_user_name", system, history, capitalize(maker.phrasing("ask_user_name")), answer)


def _tell_favorite(maker: _Maker, noun: str, thing: str) -> Turn:
    text = maker.phrasing("user_favorite").format(noun=noun, x=thing)
    return Turn(capitalize(text), f"Your favorite {noun} is {thing}.")


def _user_favorite(maker: _Maker) -> Conversation:
    noun = maker.rng.choice(list(FAVORITES))
    told = _tell_favorite(maker, noun, maker.rng.choice(FAVORITES[noun]))
    draw = maker.rng.random()
    if draw < 0.25:
        return Conversation("user_favorite", maker.plain_system(), maker.before(1), told.question, told.answer)
    if draw < 0.5:
        own = _fact("favorite", noun)
        assert own is not None
        return maker.follow_up("your_favorite", told, own.answer)
    question = capitalize(maker.phrasing("ask_user_favorite").format(noun=noun))
    history = (*maker.before(1), told, *maker.before(2)) if draw < 0.9 else maker.before(2)
    answer = told.answer if draw < 0.9 else UNKNOWN
    return Conversation("ask_user_favorite", maker.plain_system(), history, question, answer)


def _system_name(maker: _Maker) -> Conversation:
    name = maker.name()
    system = maker.phrasing("system_name").format(x=name)
    asked = maker.asked("name")
    return Conversation("system_name", system, maker.before(2), asked.turn.question, f"My name is {name}.")


def _system_brief(maker: _Maker) -> Conversation:
    """The answer alone; those before it are brief as well."""
    kinds = ("sum", "difference", "product", "after", "before", "capital", "color", "opposite", "sound", "unit")

    def brief() -> Turn:
        asked = maker.asked(*kinds)
        return replace(asked.turn, answer=f"{capitalize(_value(asked) or '')}.")

    *history, last = [brief() for _ in range(maker.rng.randint(1, 3))]
    system = maker.phrasing("system_brief")
    return Conversation("system_brief", system, tuple(history), last.question, last.answer)


def _new_question(maker: _Maker) -> Conversation:
    """What came before does not matter, and a name in the system text only where it is asked for."""
    history = tuple(maker.asked().turn for _ in range(maker.rng.randint(1, 3)))
    last = _new(maker)
    system = maker.plain_system()
    draw = maker.rng.random()
    if last.kind.name not in ("name", "greeting"):
        if draw < 0.15:
            system = maker.phrasing("system_name").format(x=maker.name())
        elif draw < 0.3:
            system = maker.phrasing("system_user_name").format(x=maker.name())
    return Conversation(last.kind.name, system, history, last.turn.question, last.turn.answer)


def _new(maker: _Maker) -> Asked:
    """A question of the split."""
    kind = maker.any_kind()
    if maker.split == "train":
        return maker.asked(kind.name)
    while True:
        fact = maker.rng.choice(kind.facts)
        if phrasings := kind.in_split("held_out", fact, kind.phrasings):
            item = kind.item(fact, maker.rng.choice(phrasings))
            return Asked(kind, fact, Turn(item.question, item.answer))


def _of(make: Callable[[_Maker, str], Conversation | None], form: str) -> Callable[[_Maker], Conversation | None]:
    return lambda maker: make(maker, form)


MAKERS: tuple[tuple[Callable[[_Maker], Conversation | None], int], ...] = (
    (_of(_neighbor, "after"), 3),
    (_of(_neighbor, "before"), 2),
    (_of(_calculation, "add"), 3),
    (_of(_calculation, "subtract"), 3),
    (_of(_calculation, "multiply"), 2),
    (_of(_other, "other"), 4),
    (_of(_other, "other_of"), 2),
    (_of(_other, "correction"), 2),
    (_corrected_numbers, 2),
    (_again, 3),
    (_asked, 3),
    (_first_asked, 1),
    (_sure, 1),
    (_why, 1),
    (_another, 1),
    (_told_name, 1),
    (_user_name, 3),
    (_user_favorite, 3),
    (_system_name, 2),
    (_system_brief, 2),
    (_new_question, 22),
)
"""What makes the conversations, and how often, relative to the others."""
_FACTS = {name: {fact.key: fact for fact in kind.facts} for name, kind in KINDS.items()}


def forms(split: Split) -> Iterator[tuple[str, str]]:
    """Every form with each of its phrasings of a split, but the further ones."""
    yield from ((form, text) for form in FORMS for text in PHRASINGS[split, form])
