"""The environment variables: those of `alter serve` from its settings, the others from the list below.

A variable that the code reads and no row names stops the build.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from server.refusals import refused
from server.security import SecurityEnvironment
from server.settings import ENV_PREFIX, Environment

from .attributes import attribute_docs
from .command_line import root_command
from .markup import code, sentence, table

ROOT = Path(__file__).parents[1]
_OTHERS = {
    "ALTER_URL": ("`alter domains`, `fleet`, `trace`", "Where the server listens."),
    "ALTER_API_KEY": ("`alter eval --server`", "API key of the server that is evaluated."),
    "OPENAI_API_KEY": ("`alter eval fluency`", "API key of the judge."),
    "ALTER_DATA_DIR": (
        "`alter eval`, `alter demo --dataset tofu`",
        "Folder of the benchmarks' files.",
    ),
    "ALTER_NATIVE": (
        "`alter serve` on a CPU",
        "`0` takes torch in place of the C++ kernels. By default they are compiled at the first start.",
    ),
    "ALTER_DEVICE": (
        "`make setup`",
        "`cpu` or `gpu`; by default `gpu` if `nvidia-smi -L` lists one.",
    ),
    "ALTER_PYTHON": ("`make setup`", "The interpreter to build the virtual environment with."),
    "ALTER_VENV": ("`make setup`", "Where the virtual environment is."),
    "ALTER_EXTRAS": ("`make setup`", "Extras to install, `dev` by default; empty: none."),
    "TORCH_INDEX_URL": ("`make setup`", "A further index to look for torch in."),
}
_MADE_BY_THE_DEMO = "ALTER_DEMO_"
_VARIABLE = re.compile(r"\b(?:ALTER_[A-Z_]*[A-Z]|OPENAI_API_KEY|TORCH_INDEX_URL)\b")
_NAMES = re.compile(r"(--[a-z-]+|VLLM_[A-Z0-9_]+)")
_SOURCES = ("alter_core", "alter_cli", "alter_eval", "server", "trainer", "scripts")


def server_variables() -> str:
    """One row for each variable that `alter serve` and its clients read."""
    flags = {flag: option for option in _serve_options() for flag in option.opts}
    docs = attribute_docs(SecurityEnvironment) | attribute_docs(Environment)
    rows = []
    for name, field in Environment.model_fields.items():
        flag = _flag_of(name, flags)
        assert flag or name in docs, f"described nowhere: {_variable(name)}"
        meaning = sentence(docs.get(name, "")) or _without_variables(flags[flag].help)
        default = field.default if field.default is not None else ""
        default = code(int(default) if isinstance(default, bool) else default)
        rows.append(
            (code(_variable(name)), code(flag or ""), _type(field.annotation), default, meaning)
        )
    return table(("variable", "flag", "type", "default", "meaning"), rows)


def other_variables() -> str:
    """One row for each other variable."""
    unnamed = read_variables() - set(named_variables())
    assert not unnamed, f"described nowhere: {', '.join(sorted(unnamed))}"
    return table(("variable", "read by", "meaning"), [(code(n), *r) for n, r in _OTHERS.items()])


def refused_options() -> str:
    """One row for each option and variable of vLLM that stops the start."""
    return table(
        ("option or variable", "why"), [(_NAMES.sub(r"`\1`", name), why) for name, why in refused()]
    )


def named_variables() -> list[str]:
    """Every variable that has a row."""
    return [*map(_variable, Environment.model_fields), *_OTHERS]


def read_variables() -> set[str]:
    """Every variable of ours that the sources name."""
    files = [path for name in _SOURCES for path in _sources(ROOT / name)]
    found = {name for path in files for name in _VARIABLE.findall(path.read_text("utf-8"))}
    return {name for name in found if not name.startswith(_MADE_BY_THE_DEMO)}


def _sources(folder: Path) -> Iterator[Path]:
    yield from folder.rglob("*.py")
    yield from folder.rglob("*.sh")


def _variable(name: str) -> str:
    return ENV_PREFIX + name.upper()


def _serve_options() -> Iterable[Any]:
    return [p for p in root_command().commands["serve"].params if p.param_type_name == "option"]


def _flag_of(name: str, flags: typing.Collection[str]) -> str | None:
    """The flag of the same name, in the singular where it may be repeated."""
    flag = f"--alter-{name.replace('_', '-')}"
    return next((each for each in (flag, flag.removesuffix("s")) if each in flags), None)


def _without_variables(help_text: str) -> str:
    """A flag's help without its last sentence, which names the variable."""
    return re.sub(r"\s*Environment: [^.]*\.", "", help_text)


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_type(a) for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(code(value) for value in typing.get_args(annotation))
    words = {str: "text", int: "number", float: "number", bool: "0 or 1", Path: "path"}
    words[SecretStr] = "text, a secret"
    return words.get(annotation, str(annotation))
