"""A progress bar for the base model's training: epoch, loss, and an estimate of the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from alter_cli.demo.memorization import Progress


@contextmanager
def training_bar(console: Console | None = None) -> Iterator[Callable[[Progress], None]]:
    """Shows a bar on `console` (default: stderr); what it yields is `train_base`'s `progress`.

    The time left is that to the last epoch allowed: training usually ends earlier.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("epoch {task.fields[epoch]}, loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("at most"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console or Console(stderr=True)) as bar:
        task = bar.add_task("training the base model", total=None, epoch="-", loss="-")

        def show(progress: Progress) -> None:
            bar.update(
                task,
                completed=progress.step,
                total=progress.max_steps,
                epoch=str(progress.epoch),
                loss=f"{progress.answer_loss:.3f}",
            )

        yield show
        bar.update(task, total=bar.tasks[0].completed)
