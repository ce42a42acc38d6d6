"""The progress of a training: what each stage reports, and a view of it for a terminal or a log."""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars

ReportProgress = Callable[["Progress"], None]
"""Called after each step, on the thread that trains."""


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps of a stage, and a short note such as the loss."""

    stage: str
    done: int
    total: int
    note: str = ""


class ProgressView:
    """Shows progress: bars on a terminal, else a line at each tenth of a stage. A context manager; `train` calls it."""

    def __init__(self, console: Console | None = None) -> None:
        """`console` defaults to standard error."""
        self._console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bars = ProgressBars(*columns, console=self._console) if self._console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def __enter__(self) -> "ProgressView":
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Shows how far a stage has come."""
        if self._bars:
            self._draw(self._bars, progress)
        else:
            self._print(progress)

    def _draw(self, bars: ProgressBars, progress: Progress) -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total, note="")
        bars.update(self._tasks[progress.stage], total=progress.total, completed=progress.done, note=progress.note)

    def _print(self, progress: Progress) -> None:
        tenth = 10 * progress.done // max(1, progress.total)
        if tenth > self._tenths.get(progress.stage, -1):
            self._tenths[progress.stage] = tenth
            self._console.print(f"{progress.stage}: {progress.done}/{progress.total} {progress.note}".rstrip())
