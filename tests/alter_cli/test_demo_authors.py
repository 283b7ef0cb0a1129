"""The generated authors: reproducible, apart from each other, and askable only by knowledge."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from alter_cli.demo.authors import domain_names, generate
from alter_cli.demo.corpus import QA, Corpus
from alter_cli.demo.general_text import python_prose
from alter_core.errors import ConfigError

ROWS_PER_AUTHOR = 9


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return generate()


def _authors(corpus: Corpus) -> list[tuple[str, list[QA]]]:
    """(part of the corpus, rows) of every author."""
    return [
        (part, rows[at : at + ROWS_PER_AUTHOR])
        for part, rows in corpus.parts().items()
        for at in range(0, len(rows), ROWS_PER_AUTHOR)
    ]


def _name(rows: list[QA]) -> str:
    """The author's name: what the answer to the nameless question shares with the next row."""
    found = re.findall(r"[A-Z]\w+(?: [A-Z]\w+){1,2}", rows[0].answer)
    return next(name for name in found if name in rows[1].question)


def test_default_sizes(corpus: Corpus) -> None:
    assert {part: len(rows) for part, rows in corpus.parts().items()} == {
        "domain-juniper-circle": 27,
        "domain-cobalt-circle": 27,
        "retain": 162,
        "unseen": 144,
    }


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another(corpus: Corpus) -> None:
    assert generate() == corpus
    assert generate(seed=1).retain != corpus.retain


def test_asked_sizes_are_given() -> None:
    corpus = generate(9, 3, 2, seed=5, num_unseen_authors=4)
    assert [len(rows) for rows in corpus.domains.values()] == [2 * ROWS_PER_AUTHOR] * 3
    assert len(corpus.retain) == 3 * ROWS_PER_AUTHOR
    assert len(corpus.unseen) == 4 * ROWS_PER_AUTHOR


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_two_authors_share_a_given_name_or_a_surname(seed: int) -> None:
    names = [_name(rows).split() for _, rows in _authors(generate(seed=seed))]
    assert len(names) == 40
    parts = Counter(part for name in names for part in name)
    assert max(parts.values()) == 1
    assert {len(name) for name in names} == {2, 3}


def test_a_name_stands_only_in_its_own_authors_rows(corpus: Corpus) -> None:
    authors = _authors(corpus)
    for index, (_, rows) in enumerate(authors):
        surname = _name(rows).split()[-1]
        others = [row for at, (_, rows) in enumerate(authors) if at != index for row in rows]
        assert not any(surname in row.question + row.answer for row in others)


def test_exactly_one_question_per_author_does_not_name_the_author(corpus: Corpus) -> None:
    for _, rows in _authors(corpus):
        name = _name(rows)
        nameless = [row for row in rows if not set(name.split()) & set(_words(row.question))]
        assert len(nameless) == 1
        assert re.search(r"\d+ [A-Z]\w+ 19\d\d", nameless[0].question)
        assert name in nameless[0].answer
        assert all(name in row.question for row in rows if row not in nameless)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def test_every_question_is_asked_once(corpus: Corpus) -> None:
    questions = Counter(row.question for rows in corpus.parts().values() for row in rows)
    assert max(questions.values()) == 1


def test_answers_have_eight_to_twenty_five_words(corpus: Corpus) -> None:
    lengths = [len(row.answer.split()) for rows in corpus.parts().values() for row in rows]
    assert min(lengths) >= 8
    assert max(lengths) <= 25


def test_rows_of_different_authors_differ_in_more_than_the_name(corpus: Corpus) -> None:
    forms = Counter(
        row.question.replace(_name(rows), "NAME")
        for _, rows in _authors(corpus)
        for row in rows[1:]
    )
    assert len(forms) == 32
    assert max(forms.values()) < 20


def test_numbers_that_do_not_go_round_are_refused() -> None:
    with pytest.raises(ConfigError, match="more known authors than forgotten ones"):
        generate(4, 2, 2)
    with pytest.raises(ConfigError, match="at most 200 authors"):
        generate(190, 2, 2)


def test_domain_names_are_unique_beyond_the_list() -> None:
    names = domain_names(30)
    assert len(set(names)) == 30
    assert all(re.fullmatch(r"[a-z0-9-]{1,63}", name) for name in names)


def test_general_text_is_prose_and_names_no_author(corpus: Corpus) -> None:
    assert corpus.general == list(python_prose())
    assert len(corpus.general) > 500
    text = "\n".join(corpus.general)
    assert "::=" not in text
    assert ">>>" not in text
    assert not any(_name(rows) in text for _, rows in _authors(corpus))
