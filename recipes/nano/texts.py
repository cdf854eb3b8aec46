"""Writes the texts of all data sets, as manifests that `omni-jax prepare` and `recipes.nano.speech` read.

    python -m recipes.nano.texts --out build/nano/texts

Written sets, for the task T1T2; training questions also come in the further phrasings:

    numbers             every training question for a sum or a difference
    products            every training question for a product; a set of its own, since they are few
    larger_products     see `questions.larger_products`
    further_counts      see `questions.further_counts`
    knowledge           training questions about everything else
    smalltalk           training questions about nano itself, greetings, thanks; a set of its own, since they are few
    unknown             questions of a grammar, which nano cannot answer
    typos               training questions with a wrong letter
    repeat              training texts that the model is asked to repeat; transcribing and reading aloud build on it
    held_out, typos_held_out    held-out questions

Spoken sets, to be synthesized; rows without an answer are dictations, rows without a question are read aloud:

    train               questions asked aloud
    natural_train       questions asked by natural voices
    smalltalk_train     questions of kinds that have few facts, and are asked first
    name_train          questions for its name
    noise_train, noise_held_out     recordings without a question
    typed_train         questions in writing, answered aloud
    read_train, read_free, read_answer_like, read_held_out      sentences to read aloud
    dictation_train, dictation_seen, dictation_unseen       sentences to write down
    held_out_seen, held_out_unseen, held_out_natural    held-out questions, for voices that training has and for others
    history_held_out    the past questions of conversation_held_out

Conversations, as `messages` of which the last answer is trained; see `conversations.py`:

    conversation_text, conversation_text_held_out       for the task T1T2
    conversation_train, conversation_natural, conversation_typed, conversation_held_out     to be synthesized
"""

from __future__ import annotations

import itertools
import json
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from omni_jax.checkpoint.folders import new_folder
from omni_jax.inference.messages import to_messages
from omni_jax.inference.request import Turn
from recipes.nano.conversations import Conversation, conversations
from recipes.nano.questions import (
    KINDS,
    SPLITS,
    Item,
    Split,
    all_questions,
    capitalize,
    further_counts,
    larger_products,
    sample,
)
from recipes.nano.sentences import free_sentences, pattern_sentences

UNKNOWN = "I am sorry, I don't know that."
NOT_UNDERSTOOD = "I did not hear that."
NOISES = ("noise", "hum", "music", "knocks", "language")
"""Kinds of recordings without a question; see `recipes.nano.noise`."""
FREE_SENTENCES = 40_000
"""Distinct ones: reading takes those in front, dictations those at the end."""
FOLDER = Path("build/nano/texts")
NUMBERS = ("sum", "difference", "product")
SMALLTALK = tuple(kind.name for kind in KINDS.values() if len(kind.facts) <= 10)
"""Kinds with so few facts that they would be rare among the others."""
NAME = "name"
"""The kind of questions for its name."""
WRONG_TRANSCRIPTS = 0.2
REPEAT = ("say: {}", "repeat: {}", "say again: {}", "repeat after me: {}", "please say: {}", "please repeat: {}")


@dataclass(frozen=True)
class Row:
    """A line of a manifest; the source of a question is its kind, and why it is held out."""

    question_text: str = ""
    answer_text: str = ""
    source: str = "nano sentence"

    @classmethod
    def of(cls, item: Item) -> Row:
        """A question and its answer."""
        return cls(item.question, item.answer, f"nano {item.kind} {item.held_out}".strip())


@dataclass(frozen=True)
class Sizes:
    """Numbers of texts."""

    questions: int = 12_000
    """Asked aloud, half of them in the further phrasings."""
    natural_questions: int = 1200
    """Asked aloud by natural voices, half of them in the further phrasings."""
    smalltalk_questions: int = 1000
    """Of kinds that are rare among the others, half of them in the further phrasings; without its name."""
    name_questions: int = 300
    """Its name, likewise."""
    unknown_questions: int = 1500
    """Asked aloud, of the grammar: nano knows no answer."""
    typed_questions: int = 12_000
    """Half of them by the kinds' shares; the others, for words that few answers have, by the number of answers."""
    typos: int = 20_000
    """Questions in writing with a wrong letter."""
    held_out_seen: int = 1000
    held_out_unseen: int = 500
    held_out_natural: int = 200
    held_out_text: int = 1000
    held_out_typos: int = 300
    sentences: int = 2000
    """To read aloud, of patterns."""
    free_sentences: int = 9000
    """To read aloud, of the grammar."""
    answer_like_sentences: int = 6000
    named_sentences: int = 600
    held_out_sentences: int = 300
    dictations: int = 2000
    free_dictations: int = 8000
    held_out_dictations: int = 200
    """In voices that training has; half as many in others."""
    repeated: int = 20_000
    """Questions, and as many sentences."""
    noises: int = 1200
    """Recordings without a question: see `recipes.nano.noise`."""
    held_out_noises: int = 200
    written_conversations: int = 120_000
    conversations: int = 5000
    """Their last questions are asked aloud."""
    natural_conversations: int = 600
    typed_conversations: int = 3000
    """Asked in writing, answered aloud."""
    held_out_conversations: int = 200
    written: int | None = None
    """Most rows of each written set; None: all there are."""

    @classmethod
    def limited(cls, limit: int) -> Sizes:
        """At most so many of everything, for a trial."""
        sizes = {field.name: min(getattr(cls, field.name) or limit, limit) for field in fields(cls)}
        return cls(**sizes)


def written_sets(sizes: Sizes) -> dict[str, Iterable[Row]]:
    """The sets for the task T1T2, by name."""

    def asked(kinds: Iterable[str]) -> list[Item]:
        return all_questions("train", kinds, further=True)

    items = {
        "numbers": asked(["sum", "difference"]),
        "products": asked(["product"]),
        "larger_products": larger_products(),
        "further_counts": further_counts(),
        "knowledge": asked(set(KINDS) - {*NUMBERS, *SMALLTALK}),
        "smalltalk": asked(SMALLTALK),
        "held_out": sample("held_out", sizes.held_out_text, 0),
    }
    rows: dict[str, Iterable[Row]] = {name: map(Row.of, found[: sizes.written]) for name, found in items.items()}
    typos = misspelled("train", sizes.typos // 2, 10) + misspelled("train", sizes.typos // 2, 11)
    return rows | {
        "repeat": itertools.islice(repeated(sizes.repeated), sizes.written),
        "unknown": map(unanswered, free_sentences(sizes.written or 8000, 1, "unknown")),
        "typos": typos[: sizes.written],
        "typos_held_out": misspelled("held_out", sizes.held_out_typos, 12),
    }


def repeated(count: int, seed: int = 0) -> Iterator[Row]:
    """Training texts to repeat: all questions but those about two numbers, `count` of any kind, `count` sentences."""
    rng = random.Random(f"repeat {seed}")
    texts = [item.question for item in all_questions("train", set(KINDS) - set(NUMBERS), further=True)]
    texts += [item.question for item in sample("train", count, seed)]
    texts += pattern_sentences("train", count, seed)
    for text in rng.sample(texts, len(texts)):
        yield Row(capitalize(rng.choice(REPEAT).format(text)), text, "nano repeat")


def spoken_sets(sizes: Sizes) -> dict[str, list[Row]]:
    """The sets to be synthesized, by name."""
    unseen = sizes.held_out_dictations // 2
    dictated = pattern_sentences("held_out", sizes.held_out_dictations + unseen, 1)
    free = free_sentences(FREE_SENTENCES, 0)
    read_free, dictated_free = free[: sizes.free_sentences], free[-sizes.free_dictations :]
    answer_like = free_sentences(sizes.answer_like_sentences, 0, "answer")
    unknown = free_sentences(sizes.unknown_questions, 0, "unknown")
    smalltalk = dict.fromkeys((kind for kind in SMALLTALK if kind != NAME), 1.0)
    return {
        # Rows of the same answer are neighbors: it is synthesized once.
        "train": by_answer([*map(Row.of, asked_questions(sizes.questions, 0)), *map(unanswered, unknown)]),
        "natural_train": list(map(Row.of, asked_questions(sizes.natural_questions, 8))),
        "smalltalk_train": by_answer(map(Row.of, asked_questions(sizes.smalltalk_questions, 13, smalltalk))),
        "name_train": list(map(Row.of, asked_questions(sizes.name_questions, 14, {NAME: 1}))),
        "typed_train": by_answer(map(Row.of, typed_questions(sizes.typed_questions))),
        "held_out_seen": list(map(Row.of, sample("held_out", sizes.held_out_seen, 0))),
        "held_out_unseen": list(map(Row.of, sample("held_out", sizes.held_out_unseen, 1))),
        "held_out_natural": list(map(Row.of, sample("held_out", sizes.held_out_natural, 2))),
        "read_train": read_aloud(pattern_sentences("train", sizes.sentences, 0)),
        "read_free": read_aloud(read_free),
        "read_answer_like": read_aloud(answer_like + free_sentences(sizes.named_sentences, 0, "named")),
        "read_held_out": read_aloud(pattern_sentences("held_out", sizes.held_out_sentences, 0)),
        "dictation_train": write_down(pattern_sentences("train", sizes.dictations, 1) + dictated_free),
        "dictation_seen": write_down(dictated[unseen:]),
        "dictation_unseen": write_down(dictated[:unseen]),
        "noise_train": noises(sizes.noises, 0),
        "noise_held_out": noises(sizes.held_out_noises, 1),
        "history_held_out": write_down(past_questions(held_out_conversations(sizes))),
    }


def conversation_sets(sizes: Sizes) -> dict[str, list[Conversation]]:
    """Conversations, by set."""
    spoken = ("conversation_train", sizes.conversations), ("conversation_typed", sizes.typed_conversations)
    return {
        "conversation_text": transcribed(conversations("train", sizes.written_conversations, 0)),
        "conversation_text_held_out": conversations("held_out", sizes.held_out_conversations, 0),
        # Of the same answer are neighbors: it is synthesized once.
        **{
            name: sorted(transcribed(conversations("train", count, seed)), key=lambda made: made.answer)
            for seed, (name, count) in enumerate(spoken, 1)
        },
        "conversation_natural": transcribed(conversations("train", sizes.natural_conversations, 3)),
        "conversation_held_out": held_out_conversations(sizes),
    }


def held_out_conversations(sizes: Sizes) -> list[Conversation]:
    """Those whose last questions are asked aloud."""
    return conversations("held_out", sizes.held_out_conversations, 4)


def past_questions(made: Iterable[Conversation]) -> list[str]:
    """The distinct questions before the last ones."""
    return list(dict.fromkeys(turn.question for one in made for turn in one.history))


def transcribed(made: list[Conversation]) -> list[Conversation]:
    """Conversations in which one past question in five has a wrong letter: the model's transcripts have errors."""
    rng = random.Random("transcribed")

    def changed(text: str) -> str:
        return misspell(text, rng) if rng.random() < WRONG_TRANSCRIPTS else text

    return [
        replace(one, history=tuple(replace(turn, question=changed(turn.question)) for turn in one.history))
        for one in made
    ]


def messages(made: Conversation) -> dict[str, object]:
    """A conversation as chat completions have it; only its last answer is trained."""
    past = to_messages(made.system, made.history)
    last = to_messages("", [Turn(made.question, made.answer)])
    untrained = [message | ({"weight": 0} if message["role"] == "assistant" else {}) for message in past]
    return {"messages": [*untrained, *last]}


def asked_questions(count: int, seed: int, shares: Mapping[str, float] | None = None) -> list[Item]:
    """Training questions, half of them in the further phrasings; `shares` as of `sample`."""
    half = count // 2
    return sample("train", half, seed, shares=shares) + sample("train", half, seed, further=True, shares=shares)


def unanswered(question: str) -> Row:
    """A question that nano has no answer to."""
    return Row(question, UNKNOWN, "nano unknown")


def noises(count: int, seed: int) -> list[Row]:
    """Rows for `recipes.nano.noise`, which makes a recording of each."""
    kinds = itertools.islice(itertools.cycle(NOISES), count)
    return [Row(f"{kind} {seed} {number}", answer_to_noise(kind), "nano noise") for number, kind in enumerate(kinds)]


def typed_questions(count: int) -> list[Item]:
    """Training questions, half of them in the further phrasings."""
    # Sums and differences have so many short answers that each occurs once or twice.
    answers = {name: len(kind.answers) for name, kind in KINDS.items() if name not in ("sum", "difference")}
    return [
        item
        for seed, shares in ((6, None), (7, answers))
        for further in (False, True)
        for item in sample("train", count // 4, seed, further=further, shares=shares)
    ]


def misspell(text: str, rng: random.Random) -> str:
    """A text with one wrong letter in a word of four letters or more: it is missing, doubled, swapped or another."""
    words = list(re.finditer(r"[A-Za-z]{4,}", text))
    if not words:
        return text
    start, end = rng.choice(words).span()
    at = rng.randrange(start + 1, end - 1)
    change = rng.choice(
        (
            text[at + 1 :],
            text[at] + text[at:],
            text[at + 1] + text[at] + text[at + 2 :],
            rng.choice(string.ascii_lowercase) + text[at + 1 :],
        )
    )
    return text[:at] + change


@cache
def known_answers() -> frozenset[tuple[str, str]]:
    """All that nano can be asked, held out or not, with the answers."""
    return frozenset((item.question, item.answer) for split in SPLITS for item in all_questions(split, further=True))


@cache
def known_questions() -> frozenset[str]:
    """The questions of `known_answers`."""
    return frozenset(question for question, _ in known_answers())


def misspelled(split: Split, count: int, seed: int) -> list[Row]:
    """Questions with a wrong letter, and their answers.

    One that has become another question of the model's scope is left out.
    """
    rng = random.Random(f"typos {split} {seed}")
    rows = []
    for item in sample(split, count, seed, further=split == "train" and seed % 2 == 1):
        text = misspell(item.question, rng)
        if text not in known_questions():
            rows.append(replace(Row.of(item), question_text=text))
    return rows


def answer_to_noise(kind: str) -> str:
    """What nano says to a recording of a kind."""
    return UNKNOWN if kind == "language" else NOT_UNDERSTOOD


def by_answer(rows: Iterable[Row]) -> list[Row]:
    """Sorted by answer, then question."""
    return sorted(rows, key=lambda row: (row.answer_text, row.question_text))


def read_aloud(texts: Iterable[str]) -> list[Row]:
    """Rows without a question."""
    return [Row(answer_text=text) for text in texts]


def write_down(texts: Iterable[str]) -> list[Row]:
    """Rows without an answer."""
    return [Row(question_text=text) for text in texts]


def main(
    out: Annotated[Path, typer.Option(help="New folder of the manifests.")] = FOLDER,
    limit: Annotated[int | None, typer.Option(min=8, help="At most so many rows of each set, for a trial.")] = None,
) -> None:
    """Write the texts of all data sets."""
    sizes = Sizes() if limit is None else Sizes.limited(limit)
    groups: dict[str, Callable[[Sizes], Mapping[str, Iterable[Row]]]] = {"written": written_sets, "spoken": spoken_sets}
    with new_folder(out) as folder:
        for group, make in groups.items():
            (folder / group).mkdir()
            for name, rows in make(sizes).items():
                lines = [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
                write_lines(folder / group / f"{name}.jsonl", lines)
        (folder / "conversations").mkdir()
        for name, made in conversation_sets(sizes).items():
            lines = [json.dumps(messages(one), ensure_ascii=False) for one in made]
            write_lines(folder / "conversations" / f"{name}.jsonl", lines)


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a manifest."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    typer.echo(f"{path.parent.name}/{path.stem}: {len(lines)} rows")


if __name__ == "__main__":
    typer.run(main)
