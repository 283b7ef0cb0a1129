"""Pages that the documentation's hook makes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from docsite import hook
from docsite.markup import cell, table
from docsite.pages import filled, separated


def test_a_cell_escapes_outside_of_code_alone() -> None:
    assert cell("a | b <c> *d* `e|f*<g>`\nh") == "a \\| b &lt;c> \\*d\\* `e|f*<g>` h"


def test_a_table_without_rows_is_nothing() -> None:
    assert table(("a", "b"), []) == ""


def test_what_nothing_generates_is_an_error() -> None:
    assert filled("<!-- generated -->\nprose") == "<!-- generated -->\nprose"
    with pytest.raises(KeyError, match="no-such-part"):
        filled("prose\n<!-- generated: no-such-part -->\n")


@pytest.mark.parametrize("first", ["- one", "1. one", "| one |"])
def test_a_list_or_table_below_a_paragraph_begins_anew(first: str) -> None:
    assert separated(f"prose\n{first}\nmore") == f"prose\n\n{first}\nmore"
    assert separated(f"prose\n\n{first}\n{first}") == f"prose\n\n{first}\n{first}"


def test_code_and_the_lines_of_a_list_stay_as_they_are() -> None:
    text = "```\ncode\n- code\n```\n\n- one\n  goes on\n- two"
    assert separated(text) == text


def test_the_navigation_takes_folders_and_leaves_out_pages_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for name in ("b.md", "a.md", "README.md", "figures.json"):
        (tmp_path / "notes" / name).touch()
    nav = [
        {"Home": "index.md"},
        {"Notes": "notes/"},
        {"More": ["more/index.md", {"Later": "later.md?"}]},
    ]
    config = SimpleNamespace(docs_dir=str(tmp_path), nav=nav)
    notes = {"Notes": ["notes/README.md", "notes/a.md", "notes/b.md"]}
    assert hook.on_config(config).nav == [{"Home": "index.md"}, notes, {"More": ["more/index.md"]}]
    (tmp_path / "later.md").touch()
    config.nav = nav
    assert hook.on_config(config).nav[2] == {"More": ["more/index.md", {"Later": "later.md"}]}
