"""``sentiment-worker replay``: dead letters back to the topics that they came from, and a table of what became of them."""

import asyncio
import logging
import os
import signal
import sys

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from worker.commands.kafka_connection import kafka_connection
from worker.core.decoder import Decoder
from worker.core.replay_progress import ReplayCounts
from worker.kafka.replayer import Replayer
from worker.kafka.sink import Sink
from worker.printable import counted, printable
from worker.settings.commands import ReplaySettings
from worker.settings.values import input_formats, moment_ms
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)


def run(settings: ReplaySettings) -> int:
    """Replays, prints what has become of how many, and answers with the exit code. Blocks. Raises UserError."""
    with _progress() as progress:
        counts = asyncio.run(_replay(settings, progress))
    console = Console()
    console.print(table(counts, "would be replayed" if settings.dry_run else "replayed"))
    for sentence in _remarks(counts):
        console.print(printable(sentence), markup=False, soft_wrap=True)
    return 1 if counts.left or counts.refused or counts.kept_back else 0


async def _replay(settings: ReplaySettings, progress: Progress) -> ReplayCounts:
    connection, health, stop = kafka_connection(settings), Health(), asyncio.Event()
    sink = Sink(connection, limits={}, metrics=Metrics(""), health=health)
    input_format, formats = input_formats(settings.input_format)
    bar = progress.add_task("", total=None)
    replayer = Replayer(
        connection,
        sink,
        health,
        topic=settings.dead_letter_topic,
        group_id=settings.replay_group_id or f"{settings.group_id}.replay",
        reasons=settings.reason,
        since_ms=moment_ms(settings.since) if settings.since else None,
        until_ms=moment_ms(settings.until) if settings.until else None,
        is_dry=settings.dry_run,
        decoder=Decoder(
            input_format=input_format, input_formats=formats, id_field=settings.id_field, reads_frames=True
        ),
        stop=stop,
        tell=lambda done, total: progress.update(bar, completed=done, total=total),
    )
    _set_on_signals(stop)
    try:
        return await replayer.run()
    finally:
        await sink.close(5)


def _set_on_signals(stop: asyncio.Event) -> None:
    """The first SIGINT or SIGTERM sets ``stop``; a second one ends the process."""

    def stop_or_end() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()
        log.warning("stopping when the records that are being published are committed; a second signal ends at once")

    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop_or_end)


def _progress() -> Progress:
    return Progress(
        TextColumn("dead letters"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def table(counts: ReplayCounts, sent: str) -> Table:
    table = Table("reason", sent, "value not kept", "refused", "kept back")
    for column in table.columns[1:]:
        column.justify = "right"
    columns = (counts.sent, counts.not_kept, counts.refused, counts.kept_back)
    for reason in sorted(set().union(*columns)):
        table.add_row(escape(printable(reason)), *(str(column[reason]) for column in columns))
    table.add_section()
    table.add_row("all", *(str(column.total()) for column in columns))
    return table


def _remarks(counts: ReplayCounts) -> list[str]:
    remarks = []
    if counts.done_before:
        remarks.append(f"{counted(counts.done_before, 'dead letter')} had been replayed before.")
    if counts.not_kept:
        remarks.append("Where the value was not kept, for its size, only its producer can send it again.")
    if counts.refused:
        remarks.append(
            "What is refused is too large for the topic that it came from, or this machine's clock is wrong; it stays a "
            "dead letter."
        )
    if counts.kept_back:
        remarks.append(
            f"What is kept back is not recognised as a dead letter (the first: {counts.first_kept_back}); the next replay "
            "meets it again."
        )
    if counts.left:
        remarks.append(f"Stopped with up to {counts.left} left; the next replay goes on there.")
    return remarks
