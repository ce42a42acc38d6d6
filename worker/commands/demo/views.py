"""What the user sees: a live view on a terminal, else lines; and a line while the demo waits for something."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from worker.commands.demo.counts import RECENT, DemoCounts, Speed, label_counts, latencies, reason_counts
from worker.core.sentiment import LABELS
from worker.printable import counted

COLOURS: Mapping[str, str] = {"negative": "red", "neutral": "yellow", "positive": "green"}


class View:
    """Shows the counts as they grow; ``show`` is called often and draws once in ``period_s`` seconds."""

    period_s: float

    def __init__(self, console: Console, counts: DemoCounts, total: int | None, addresses: Sequence[str]) -> None:
        self._console, self._counts, self._total, self._addresses = console, counts, total, addresses
        self._started = self._due = time.monotonic()
        self._speed = Speed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def show(self, now: float) -> None:
        if now >= self._due:
            self._due = now + self.period_s
            self._draw(now)

    def _draw(self, now: float) -> None:
        raise NotImplementedError


class LinesView(View):
    """A line every two seconds, where there is no terminal to draw on."""

    period_s = 2.0

    def __enter__(self) -> Self:
        for address in self._addresses:
            say(self._console, address)
        return self

    def _draw(self, now: float) -> None:
        counts = self._counts
        speed = f"{self._speed.at(now, counts.came_out):.0f}/s"
        events = f"{now - self._started:4.0f} s  {_events_in(counts, self._total)}, {speed}"
        results = f"{counted(counts.results, 'result')}: {label_counts(counts)}"
        say(
            self._console, f"{events} | {results} | {counted(counts.dead_letters, 'dead letter')} | {latencies(counts)}"
        )


class LiveView(View):
    """A view that is drawn anew five times a second."""

    period_s = 0.2

    def __init__(self, console: Console, counts: DemoCounts, total: int | None, addresses: Sequence[str]) -> None:
        super().__init__(console, counts, total, addresses)
        self._width = min(console.width, 110)
        self._texts = max(0, min(RECENT, console.height - 17))
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._draw(time.monotonic())
        self._live.__exit__(None, None, None)

    def _draw(self, now: float) -> None:
        self._live.update(self.picture(now), refresh=True)

    def picture(self, now: float) -> RenderableType:
        """The whole view, no higher than the terminal where that has 17 lines."""
        addresses = [_line((address, "dim")) for address in self._addresses]
        parts = (*self._bars(), Text(), self._facts(), Text(), *self._recent(), Text(), *addresses)
        return Panel(
            Group(self._numbers(now), Text(), *parts),
            title="sentiment-worker demo",
            subtitle="Ctrl-C ends it",
            width=self._width,
            border_style="dim",
        )

    def _numbers(self, now: float) -> RenderableType:
        counts = self._counts
        speed = f"{self._speed.at(now, counts.came_out):.0f} events/s"
        progress = ProgressBar(self._total, counts.delivered, width=30) if self._total else Text()
        line = Table.grid(expand=True)
        line.add_column()
        line.add_column(justify="center")
        line.add_column(justify="right")
        line.add_row(Text(_events_in(counts, self._total), style="bold"), progress, Text(speed, style="bold cyan"))
        return line

    def _bars(self) -> Iterator[Text]:
        labels = self._counts.labels
        most = max(labels.values(), default=1)
        for label in LABELS:
            length = bar(labels[label] / most, max(10, self._width - 22))
            yield _line(f"{label:<9}{labels[label]:>6}  ", (length, COLOURS[label]))

    def _facts(self) -> RenderableType:
        counts = self._counts
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True, min_width=17)
        facts.add_row("results", f"{counts.results}, {counts.agreement:.0%} agree with the reviews' own labels")
        facts.add_row("dead letters", f"{counts.dead_letters}: {reason_counts(counts)}")
        facts.add_row("publish to result", f"{latencies(counts)}; {counts.in_flight} in flight")
        return facts

    def _recent(self) -> Iterator[Text]:
        shown = list(self._counts.recent)[-self._texts :] if self._texts else []
        for label, score, review in shown:
            yield _line((f"{label:<9}", COLOURS[label]), f"{score:+.3f}  ", " ".join(review.text.split()))
        for _ in range(self._texts - len(shown)):
            yield Text()


def _line(*parts: str | tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def bar(share: float, width: int) -> str:
    """A bar as long as its share of the width, in eighths of a character."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _events_in(counts: DemoCounts, total: int | None) -> str:
    return f"{counted(counts.delivered, 'event')} in" if total is None else f"{counts.delivered} of {total} events in"


def say(console: Console, line: str, style: str | None = None) -> None:
    """Prints the line as it is: nothing in it counts as markup."""
    console.print(escape(line), style=style, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def waiting(console: Console, line: str, live: bool) -> Iterator[Callable[[str], None]]:
    """Shows that the demo waits for something; the function that it yields is called with the reason."""
    if live:
        with console.status(escape(line)) as status:
            yield lambda why: status.update(escape(f"{line} ({why})"))
    else:
        say(console, line)
        yield lambda why: None
