"""Every `alter` command with its arguments and options, from the typer applications."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import typer

from alter_cli.main import whole_app

from .markup import code, fence, sentence, table

Command = Any
"""typer carries its own copy of click, whose classes it does not export."""


@functools.cache
def root_command() -> Command:
    """`alter`, with everything below it."""
    return typer.main.get_command(whole_app())


def all_commands() -> Iterator[tuple[str, Command]]:
    """Every command that does something, by its full name, in the order of `alter --help`."""
    yield from _below("alter", root_command())


def command_line() -> str:
    """One section a command."""
    return "\n".join(_section(name, command) for name, command in all_commands())


def _below(name: str, command: Command) -> Iterator[tuple[str, Command]]:
    if not hasattr(command, "commands"):
        yield name, command
        return
    for inner, below in command.commands.items():
        yield from _below(f"{name} {inner}", below)


_WORDS = {"str": "text", "int": "number", "float": "number", "Path": "path", "path": "path"}
_SAID_DEFAULT = re.compile(r"\s*\[default: (.*)\]$")
"""Where a default follows from something else, the help text says it."""


def _section(name: str, command: Command) -> str:
    context = command.context_class(command, info_name=name)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = " ".join([name, *(p.name.upper() for p in arguments), "[OPTIONS]" if options else ""])
    if command.context_settings.get("ignore_unknown_options"):
        usage += " [any flag of vllm serve]"
    text = f"## {name}\n\n{_prose(command.help)}\n{fence('text', usage)}"
    rows = [(code(p.name.upper()), _type(p, context), _prose(p.help)) for p in arguments]
    text += table(("argument", "type", "meaning"), rows)
    for panel in dict.fromkeys(p.rich_help_panel for p in options):
        text += f"\n**{panel or 'Options'}**\n"
        members = [p for p in options if p.rich_help_panel == panel]
        text += table(("option", "type", "default", "meaning"), [_row(p, context) for p in members])
    return text


def _row(option: Any, context: Any) -> tuple[str, str, str, str]:
    flags = ", ".join(code(flag) for flag in [*option.opts, *option.secondary_opts])
    help_text, default = _prose(option.help), _default(option)
    if (said := _SAID_DEFAULT.search(help_text)) is not None:
        help_text, default = help_text[: said.start()], said[1]
    meaning = sentence(help_text)
    if option.envvar:
        meaning += f" Environment: {code(option.envvar)}."
    kind = "" if option.is_flag else _type(option, context)
    return flags, kind, "required" if option.required else default, meaning


def _type(parameter: Any, context: Any) -> str:
    text = parameter.metavar or parameter.display_type(context).strip("<>")
    text = text.removeprefix("list[").removesuffix("]").removesuffix(" range")
    parts = [_WORDS.get(text) or code(text)]
    if parameter.min is not None:
        parts.append(f"from {parameter.min}")
    if parameter.max is not None:
        parts.append(f"up to {parameter.max}")
    if getattr(parameter, "multiple", False):
        parts.append("repeatable")
    return ", ".join(parts)


def _default(option: Any) -> str:
    value = option.default
    if isinstance(value, Enum):
        value = value.value
    if option.is_flag:
        return "on" if value else "off"
    return "" if value is None or value in ((), []) else code(value)


def _prose(text: str | None) -> str:
    """Without the escapes that keep rich from reading brackets as markup."""
    return (text or "").replace("\\[", "[").strip()
