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
    """`done` of `total` steps of a stage, and a short note such as the loss.

    With `line` that sentence is shown, on a line of its own, and nothing else.
    """

    stage: str
    done: int
    total: int
    note: str = ""
    line: str = ""


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
        """Shows how far a stage has come, or a line of its own."""
        if progress.line:
            self._console.print(progress.line)
            return
        stage, done, total = progress.stage, progress.done, progress.total
        tenth = 10 * done // max(1, total)
        if self._bars:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, note="")
            self._bars.update(self._tasks[stage], total=total, completed=done, note=progress.note)
        elif tenth > self._tenths.get(stage, -1):
            self._tenths[stage] = tenth
            self._console.print(f"{stage}: {done}/{total} {progress.note}".rstrip())
