"""Reads a Dockerfile into its stages: as much of the format as ours uses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Stage:
    """One `FROM ... AS name` and the instructions below it, as (keyword, arguments)."""

    name: str
    image: str
    instructions: tuple[tuple[str, str], ...]

    def arguments(self, keyword: str) -> list[str]:
        return [arguments for name, arguments in self.instructions if name == keyword]

    def last(self, keyword: str) -> str:
        return self.arguments(keyword)[-1]

    def last_list(self, keyword: str) -> list[str]:
        """The last `KEYWORD ["a", "b"]`, also behind options such as HEALTHCHECK's."""
        text = self.last(keyword)
        return [str(item) for item in json.loads(text[text.index("[") :])]


def read_stages(path: Path) -> dict[str, Stage]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    stages: dict[str, Stage] = {}
    for statement in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not statement.strip():
            continue
        keyword, arguments = statement.split(maxsplit=1)
        arguments = " ".join(arguments.split())
        if keyword == "FROM":
            image, _, name = arguments.split()
            stages[name] = Stage(name, image, ())
        else:
            name, stage = list(stages.items())[-1]
            instructions = (*stage.instructions, (keyword, arguments))
            stages[name] = dataclasses.replace(stage, instructions=instructions)
    return stages
