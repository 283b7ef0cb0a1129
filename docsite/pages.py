"""Pages as they are built: generated parts filled in, and read the way that other readers of Markdown do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from . import bundle_manifest, command_line, environment, http_api, metrics, problems

GENERATED: Mapping[str, Callable[[], str]] = {
    "command-line": command_line.command_line,
    "http-routes": http_api.routes,
    "http-bodies": http_api.bodies,
    "manifest": bundle_manifest.manifest,
    "metrics": metrics.metrics,
    "error-types": problems.error_types,
    "http-types": problems.http_types,
    "client-errors": problems.client_errors,
    "server-variables": environment.server_variables,
    "other-variables": environment.other_variables,
    "refused-options": environment.refused_options,
}
_MARK = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)
_FENCE = re.compile(r"^ {0,3}(```|~~~)")
_LIST = re.compile(r"(?:[-*+]|\d+\.) ")


def filled(markdown: str) -> str:
    """With every generated part. Raises: KeyError for a name that nothing generates."""
    return _MARK.sub(lambda match: GENERATED[match[1]](), markdown)


def separated(markdown: str) -> str:
    """A list or table right below a paragraph begins anew, as in CommonMark; Python-Markdown wants a blank
    line there."""
    lines: list[str] = []
    is_code, above = False, ""
    for line in markdown.split("\n"):
        if _FENCE.match(line):
            is_code = not is_code
        elif not is_code and above.strip() and _begins(line, above):
            lines.append("")
        lines.append(line)
        above = line
    return "\n".join(lines)


def _begins(line: str, above: str) -> bool:
    """Whether a list or table begins with `line`, in the middle of a paragraph."""
    if line.startswith("|"):
        return not above.startswith("|")
    return bool(_LIST.match(line)) and not _LIST.match(above) and not above.startswith((" ", "#"))
