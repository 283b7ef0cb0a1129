"""The error tree, walked whole."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import textwrap

import pytest

from alter_core import errors
from alter_core.errors import AlterError

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, BaseException)
]


def documented_parents() -> dict[str, str | None]:
    """Class name -> its parent's, read off the tree in the module's docstring."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in textwrap.dedent(errors.__doc__ or "").splitlines():
        if found := re.match(r"^((?:[│├└─ ]{4})*)(\w+Error)\b", line):
            depth = len(found[1]) // 4
            path = [*path[:depth], found[2]]
            parents[found[2]] = path[-2] if depth else None
    return parents


def test_the_docstring_shows_every_class_under_its_parent() -> None:
    actual = {
        cls.__name__: None if cls is AlterError else cls.__base__.__name__  # type: ignore[union-attr]
        for cls in CLASSES
    }
    assert documented_parents() == actual
    assert len(actual) > 15


def test_every_branch_of_the_tree_explains_itself() -> None:
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"^[│├└─ ]*(\w+Error)\b(.*)$", line):
            is_group = any(
                cls.__base__ is getattr(errors, found[1]) and cls is not AlterError
                for cls in CLASSES
            )
            assert is_group or found[2].strip(), found[1]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_is_an_alter_error_with_a_docstring_of_its_own(cls: type[AlterError]) -> None:
    assert issubclass(cls, AlterError)
    assert cls.__doc__ == vars(cls)["__doc__"]
    assert cls.__doc__.rstrip().endswith(".")


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({}, "It broke."),
        ({"expected": "7"}, "It broke; expected 7."),
        ({"got": "5"}, "It broke; got 5."),
        ({"expected": "7", "got": "5"}, "It broke; expected 7; got 5."),
        ({"fix": "Mend it."}, "It broke. Mend it."),
        (
            {"expected": "7", "got": "5", "fix": "Mend it."},
            "It broke; expected 7; got 5. Mend it.",
        ),
    ],
)
def test_the_message_says_what_was_expected_what_came_and_what_to_do(
    cls: type[AlterError], details: dict[str, str], message: str
) -> None:
    assert str(cls("It broke", **details)) == message
    assert str(cls("It broke.", **details)) == message


@pytest.mark.parametrize("cls", CLASSES)
def test_the_parts_of_the_message_can_be_read_apart(cls: type[AlterError]) -> None:
    error = cls("It broke", expected="7", got="5", fix="Mend it.")
    assert (error.what, error.expected, error.got, error.fix) == ("It broke", "7", "5", "Mend it.")


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("fix", [None, "Mend it.", "Run `mend`"])
def test_an_error_survives_the_way_from_another_process(
    cls: type[AlterError], fix: str | None
) -> None:
    error = cls("It broke", expected="7", got="5", fix=fix)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own
        assert type(twin) is cls
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_an_empty_value_is_shown_and_not_dropped() -> None:
    assert str(AlterError("It broke", got="")) == "It broke; got ."
