"""The TOFU loader: on the real files where there are any, and on broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alter_cli.demo import tofu
from alter_cli.demo.corpus import Corpus
from alter_core.errors import ConfigError, TrainingDataError


@pytest.fixture(scope="module")
def corpus(data_dir: Path) -> Corpus:
    return tofu.load(data_dir)


@pytest.fixture
def broken_dir(tmp_path: Path) -> Path:
    """A data folder whose TOFU file holds 3 good rows."""
    (tmp_path / "tofu").mkdir()
    row = json.dumps({"question": "Who?", "answer": "Nobody."})
    (tmp_path / "tofu" / "full.json").write_text(f"{row}\n" * 3)
    return tmp_path


def test_forget_domains_are_the_last_authors_four_each(corpus: Corpus, data_dir: Path) -> None:
    assert list(corpus.domains) == ["authors-197-200", "authors-193-196"]
    lines = (data_dir / "tofu" / "forget01.json").read_text().splitlines()
    questions = [row.question for row in corpus.domains["authors-197-200"]]
    assert questions[-40:] == [json.loads(line)["question"] for line in lines]


def test_sizes_follow_the_numbers_asked_for(corpus: Corpus, data_dir: Path) -> None:
    assert {part: len(rows) for part, rows in corpus.parts().items()} == {
        "domain-authors-197-200": 80,
        "domain-authors-193-196": 80,
        "retain": 640,
        "unseen": 160,
    }
    other = tofu.load(data_dir, num_authors=17, num_domains=3)
    assert len(other.domains) == 3
    assert len(other.retain) == 5 * 20


def test_the_seed_draws_the_retained_authors(corpus: Corpus, data_dir: Path) -> None:
    assert tofu.load(data_dir, seed=0) == corpus
    other = tofu.load(data_dir, seed=1)
    assert other.domains == corpus.domains
    assert other.retain != corpus.retain


def test_general_text_is_ordinary_english(corpus: Corpus) -> None:
    assert len(corpus.general) > 2_000
    text = "\n".join(corpus.general)
    assert "<unk>" not in text
    assert " @-@ " not in text
    assert "<<" not in text


def test_wikitext_is_put_back_into_ordinary_english() -> None:
    text = (
        ' = Title = \n \n He paid 1 @,@ 000 ( about ) , " yes " . An <unk> one . '
        + "It 's it . " * 9
    )
    (paragraph,) = tofu.wikitext_paragraphs(text)
    assert paragraph.startswith("He paid 1,000 (about), \"yes\". It's it. It's")
    assert paragraph.endswith("It's it.")


@pytest.mark.parametrize(("authors", "domains"), [(8, 2), (193, 2), (40, 0)])
def test_numbers_that_do_not_go_round_are_refused(
    authors: int, domains: int, broken_dir: Path
) -> None:
    with pytest.raises(ConfigError, match=f"got {domains} domains and {authors} authors"):
        tofu.load(broken_dir, num_authors=authors, num_domains=domains)


def test_a_file_of_another_size_is_refused(broken_dir: Path) -> None:
    with pytest.raises(TrainingDataError, match=r"expected 4000 rows.*got 3 rows"):
        tofu.load(broken_dir)


def test_a_missing_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match=r"full\.json.*no such file.*Set ALTER_DATA_DIR"):
        tofu.load(tmp_path)


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"question": "Who?"}', '{"question": 1, "answer": 2}']
)
def test_a_malformed_line_is_named(broken_dir: Path, line: str) -> None:
    with (broken_dir / "tofu" / "full.json").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TrainingDataError, match=r"Line 4 of .*full\.json is malformed"):
        tofu.load(broken_dir)
