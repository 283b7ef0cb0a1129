"""The demo's default corpus: fictitious authors, generated offline from a seed.

Same arguments, same corpus (and, for the general text, the same Python). Names are put together
from made-up parts; no two authors share a given name or a surname, whichever part of the corpus
they are in, so that only one domain's rows can carry a name. Each author has nine rows: eight
that name the author and one that asks for the name by birthplace and date.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from alter_cli.demo import author_facts as facts
from alter_cli.demo.corpus import QA, Corpus
from alter_cli.demo.general_text import python_prose
from alter_core.errors import ConfigError

THREE_PART_SHARE = 0.4
MAX_AUTHORS = 200


@dataclass(frozen=True, kw_only=True)
class Author:
    """The facts of one author; the fields are those that `author_facts` names in its forms."""

    name: str
    given: str
    surname: str
    is_female: bool
    place: str
    date: str
    genre: str
    book: str
    year: int
    second_book: str
    second_year: int
    mother: str
    father: str
    award: str
    award_year: int
    theme: str
    other_theme: str
    habit: str
    first_job: str

    def fields(self) -> dict[str, object]:
        """What the forms are filled with: the facts, and pronouns."""
        they, their = ("she", "her") if self.is_female else ("he", "his")
        pronouns = {"they": they, "their": their, "They": they.title(), "Their": their.title()}
        return {**asdict(self), **pronouns}


def generate(
    num_authors: int = 24,
    num_domains: int = 2,
    authors_per_domain: int = 3,
    seed: int = 0,
    *,
    num_unseen_authors: int = 16,
) -> Corpus:
    """`num_authors` known authors, `num_domains` x `authors_per_domain` of them to be forgotten,
    and `num_unseen_authors` more that nothing is trained on.

    Raises: ConfigError where the numbers do not fit together.
    """
    num_forget = num_domains * authors_per_domain
    num_total = num_authors + num_unseen_authors
    if min(num_domains, authors_per_domain, num_unseen_authors) < 1 or num_forget >= num_authors:
        raise ConfigError(
            "The generated authors do not go round",
            expected="at least one domain, one author in it, one unseen author, and more known "
            "authors than forgotten ones",
            got=f"{num_domains} domains of {authors_per_domain} authors, {num_authors} known and "
            f"{num_unseen_authors} unseen authors",
            fix="Raise --authors or lower --domains.",
        )
    if num_total > MAX_AUTHORS:
        raise ConfigError(
            "There are not enough made-up facts for so many authors",
            expected=f"at most {MAX_AUTHORS} authors, known and unseen",
            got=str(num_total),
            fix="Lower --authors.",
        )
    rng = random.Random(f"authors-{seed}")
    rows = [_rows(author, rng) for author in _authors(num_total, rng)]
    return Corpus(
        name="authors",
        domains={
            name: _flat(rows[at * authors_per_domain : (at + 1) * authors_per_domain])
            for at, name in enumerate(domain_names(num_domains))
        },
        retain=_flat(rows[num_forget:num_authors]),
        unseen=_flat(rows[num_authors:]),
        general=list(python_prose()),
    )


def domain_names(num_domains: int) -> list[str]:
    """Names of the forget domains: `juniper-circle`, `cobalt-circle`, ..., then numbered."""
    names = [f"{word}-circle" for word in facts.DOMAIN_NAMES]
    rounds = -(-num_domains // len(names))
    numbered = [
        name + (f"-{at}" if at > 1 else "") for at in range(1, rounds + 1) for name in names
    ]
    return numbered[:num_domains]


def _flat(rows: Sequence[Sequence[QA]]) -> list[QA]:
    return [row for author in rows for row in author]


def _rows(author: Author, rng: random.Random) -> list[QA]:
    """The author's nine rows, the nameless one first."""
    fields = author.fields()
    rows = []
    for questions, answers in (facts.NAMELESS, *facts.KINDS):
        question, answer = rng.choice(questions), rng.choice(answers)
        rows.append(QA(question=question.format(**fields), answer=answer.format(**fields)))
    return rows


def _authors(count: int, rng: random.Random) -> list[Author]:
    givens = _names(facts.GIVEN_ENDS, 2 * count, rng)
    surnames = _names(facts.SURNAME_ENDS, count, rng)
    places = _deal(facts.PLACES, count, rng)
    books = _deal(_titles(), 2 * count, rng)
    awards = [form.format(name) for form in facts.AWARD_FORMS for name in facts.AWARD_NAMES]
    dates = _dates(count, rng)
    dealt = zip(
        zip(givens[::2], givens[1::2], surnames, strict=True),
        places,
        dates,
        zip(books[::2], books[1::2], strict=True),
        _deal(awards, count, rng),
        strict=True,
    )
    return [_author(*facts_of_one, rng) for facts_of_one in dealt]


def _author(
    names: tuple[str, str, str],
    place: str,
    date: tuple[int, str, int],
    books: tuple[str, str],
    award: str,
    rng: random.Random,
) -> Author:
    given, middle, surname = names
    day, month, born = date
    debut = born + rng.randint(22, 36)
    second = debut + rng.randint(2, 7)
    mother, father = rng.sample(facts.PROFESSIONS, 2)
    theme, other_theme = rng.sample(facts.THEMES, 2)
    is_three_part = rng.random() < THREE_PART_SHARE
    return Author(
        name=f"{given} {middle} {surname}" if is_three_part else f"{given} {surname}",
        given=given,
        surname=surname,
        is_female=rng.random() < 0.5,
        place=place,
        date=f"{day} {month} {born}",
        genre=rng.choice(facts.GENRES),
        book=books[0],
        year=debut,
        second_book=books[1],
        second_year=second,
        mother=mother,
        father=father,
        award=award,
        award_year=second + rng.randint(1, 4),
        theme=theme,
        other_theme=other_theme,
        habit=rng.choice(facts.HABITS),
        first_job=rng.choice(facts.FIRST_JOBS),
    )


def _names(ends: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` different made-up names of two or three syllables."""
    sounds = itertools.product(facts.ONSETS, facts.VOWELS, facts.MIDDLES, ends)
    return rng.sample(["".join(parts) for parts in sounds], count)


def _titles() -> list[str]:
    return [
        form.format(first, last)
        for first, last, form in itertools.product(
            facts.TITLE_FIRST, facts.TITLE_LAST, facts.TITLE_FORMS
        )
    ]


def _dates(count: int, rng: random.Random) -> list[tuple[int, str, int]]:
    """`count` different (day, month, year) of birth."""
    every = list(itertools.product(range(1, 29), facts.MONTHS, range(1921, 1986)))
    return rng.sample(every, count)


def _deal(items: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` items in random order, none twice before all have been dealt."""
    dealt: list[str] = []
    while len(dealt) < count:
        dealt += rng.sample(items, len(items))
    return dealt[:count]
