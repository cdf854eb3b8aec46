"""Writes the texts of all data sets, as manifests that `omni-jax prepare` and `recipes.nano.speech` read.

    python -m recipes.nano.texts --out build/nano/texts

Written sets, for the task T1T2; training questions also come in the further phrasings:

    numbers             every training question for a sum or a difference
    products            every training question for a product; a set of its own, since they are few
    larger_products     see `questions.larger_products`
    further_counts      see `questions.further_counts`
    knowledge           training questions about everything else
    smalltalk           training questions about nano itself, greetings, thanks; a set of its own, since they are few
    repeat              training texts that the model is asked to repeat; transcribing and reading aloud build on it
    held_out            held-out questions

Spoken sets, to be synthesized; rows without an answer are dictations, rows without a question are read aloud:

    train               questions asked aloud
    typed_train         questions in writing, answered aloud
    read_train, read_free, read_answer_like, read_held_out      sentences to read aloud
    dictation_train, dictation_free, dictation_seen, dictation_unseen       sentences to write down
    held_out_seen, held_out_unseen      held-out questions, for voices that training has and for others
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from omni_jax.checkpoint.folders import new_folder
from recipes.nano.questions import (
    KINDS,
    Item,
    all_questions,
    capitalize,
    further_counts,
    larger_products,
    sample,
)
from recipes.nano.sentences import free_sentences, pattern_sentences

FOLDER = Path("build/nano/texts")
NUMBERS = ("sum", "difference", "product")
SMALLTALK = tuple(kind.name for kind in KINDS.values() if len(kind.facts) <= 10)
"""Kinds with so few facts that they would be rare among the others."""
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

    questions: int = 6000
    """Asked aloud twice."""
    more_questions: int = 18_000
    """Asked aloud once."""
    phrased_questions: int = 24_000
    """Asked aloud once, in the further phrasings."""
    mixed_questions: int = 24_000
    """Asked aloud once, half of them in the further phrasings."""
    typed_questions: int = 80_000
    """Half of them by the kinds' shares; the others, for words that few answers have, by the number of answers."""
    held_out_seen: int = 1000
    held_out_unseen: int = 500
    held_out_text: int = 1000
    sentences: int = 24_000
    """To read aloud, of patterns."""
    more_sentences: int = 60_000
    free_sentences: int = 30_000
    """To read aloud, of the grammar."""
    more_free_sentences: int = 30_000
    answer_like_sentences: int = 24_000
    named_sentences: int = 2000
    held_out_sentences: int = 300
    dictations: int = 40_800
    free_dictations: int = 12_000
    more_free_dictations: int = 12_000
    held_out_dictations: int = 200
    """In voices that training has; half as many in others."""
    repeated: int = 20_000
    """Questions, and as many sentences."""
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
    return rows | {"repeat": itertools.islice(repeated(sizes.repeated), sizes.written)}


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
    mixed = sizes.mixed_questions // 2
    first = sample("train", sizes.questions, 0)
    asked = first + first + sample("train", sizes.more_questions, 2)
    asked += sample("train", sizes.phrased_questions, 3, further=True)
    asked += sample("train", mixed, 4) + sample("train", mixed, 5, further=True)
    unseen = sizes.held_out_dictations // 2
    dictated = pattern_sentences("held_out", sizes.held_out_dictations + unseen, 1)
    # One draw, so that all are distinct.
    counts = (sizes.free_sentences, sizes.free_dictations, sizes.more_free_sentences, sizes.more_free_dictations)
    free = iter(free_sentences(sum(counts), 0))
    read_free, dictated_free, more_read_free, more_dictated_free = (
        list(itertools.islice(free, count)) for count in counts
    )
    answer_like = free_sentences(sizes.answer_like_sentences, 0, "answer")
    return {
        # Rows of the same answer are neighbors: it is synthesized once.
        "train": by_answer(map(Row.of, asked)),
        "typed_train": by_answer(map(Row.of, typed_questions(sizes.typed_questions))),
        "held_out_seen": list(map(Row.of, sample("held_out", sizes.held_out_seen, 0))),
        "held_out_unseen": list(map(Row.of, sample("held_out", sizes.held_out_unseen, 1))),
        "read_train": read_aloud(read_sentences(sizes.sentences, sizes.more_sentences)),
        "read_free": read_aloud(read_free + more_read_free),
        "read_answer_like": read_aloud(answer_like + free_sentences(sizes.named_sentences, 0, "named")),
        "read_held_out": read_aloud(pattern_sentences("held_out", sizes.held_out_sentences, 0)),
        "dictation_train": write_down(pattern_sentences("train", sizes.dictations, 1)),
        "dictation_free": write_down(dictated_free + more_dictated_free),
        "dictation_seen": write_down(dictated[unseen:]),
        "dictation_unseen": write_down(dictated[:unseen]),
    }


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


def read_sentences(count: int, more: int) -> list[str]:
    """Distinct training sentences of patterns."""
    read = pattern_sentences("train", count, 0)
    known = set(read)
    # Twice as many as wanted, since some are known.
    drawn = pattern_sentences("train", 2 * more, 2)
    return read + [text for text in drawn if text not in known][:more]


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
                (folder / group / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
                typer.echo(f"{group}/{name}: {len(lines)} rows")


if __name__ == "__main__":
    typer.run(main)
