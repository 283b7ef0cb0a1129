"""What a run tells while it works."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Stage(Protocol):
    """One piece of work with a known number of steps."""

    def step(self, completed: int, **figures: float) -> None:
        """Reports steps done so far, with figures such as `loss` and `probability`."""


class Reporter(Protocol):
    """Takes the stages of a run."""

    def stage(self, name: str, num_steps: int) -> contextlib.AbstractContextManager[Stage]:
        """Opens a stage."""

    def say(self, line: str) -> None:
        """A line about what was done; never text of a row."""


class SilentReporter:
    """Says nothing."""

    @contextlib.contextmanager
    def stage(self, name: str, num_steps: int) -> Iterator[Stage]:
        """See Reporter."""
        yield _SilentStage()

    def say(self, line: str) -> None:
        """See Reporter."""


class RichReporter:
    """Progress bars with loss, forget probability and time left, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    @contextlib.contextmanager
    def stage(self, name: str, num_steps: int) -> Iterator[Stage]:
        """See Reporter."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(name, total=num_steps, figures="")

            class BarStage:
                def step(self, completed: int, **figures: float) -> None:
                    shown = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
                    progress.update(task, completed=completed, figures=shown)

            yield BarStage()
            # A stage may end before its last step.
            progress.update(task, total=progress.tasks[0].completed)

    def say(self, line: str) -> None:
        """See Reporter."""
        self._console.print(line, highlight=False)


class _SilentStage:
    def step(self, completed: int, **figures: float) -> None:
        pass
