"""The worker process: its parts made from the settings, its signals, its end."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from worker import __version__
from worker.core.dead_letter_limit import DeadLetterLimit, TooManyDeadLetters
from worker.core.events import Decoder, Encoder
from worker.core.topic_ids import TopicRecreated
from worker.errors import UserError, WrongSetting
from worker.http.access import Guard
from worker.http.console import Console, Tap, shown_settings
from worker.http.reload import Reloader
from worker.http.server import Monitor
from worker.kafka.backlog import tell_backlog
from worker.kafka.connection import (
    NO_LIMIT,
    Connection,
    TopicLimits,
    refuse_compacted,
    wait_for_a_match,
    wait_until_usable,
    watch_topics,
)
from worker.kafka.exactly_once import Transactions
from worker.kafka.sink import Sink
from worker.kafka.source import Source, Standstill, UnreadableRecord
from worker.pipeline.inference import Inference, InferenceLost
from worker.pipeline.stages import DeadLetterRefused, DrainTimeout, Pipeline
from worker.runtime.file_descriptors import raise_limit
from worker.runtime.memory import keep_blocks
from worker.runtime.tasks import cancelled
from worker.settings import RunSettings, revealed, split_names, text_fields
from worker.telemetry.health import Health
from worker.telemetry.logs import whereabouts
from worker.telemetry.metrics import Metrics
from worker.telemetry.tracing import Tracing

if TYPE_CHECKING:
    from worker.model.sentiment_model import SentimentModel

log = logging.getLogger(__name__)

LAST_SPANS_S: Final = 2.0
PROBE_S: Final = 1.0  # for a last look at /livez and /metrics before a process that cannot be mended ends


def project_urls() -> list[str]:
    """The package's ``name, address`` lines, as pyproject.toml has them under ``project.urls``."""
    try:
        return metadata("sentiment-worker").get_all("Project-URL", [])
    except PackageNotFoundError:
        return []


def runbook(urls: list[str]) -> str | None:
    """What to do where the worker is not ready: an address, if one of the project's URLs is named ``Runbook``."""
    found = (url.removeprefix("Runbook, ") for url in urls if url.startswith("Runbook, "))
    return next((f"{url}#sentimentworkernotready" for url in found), None)


def run(settings: RunSettings) -> int:
    """Runs the worker until SIGTERM or SIGINT, or until something breaks. Blocks; answers with the exit code.

    Raises UserError. A second signal, a hung inference and a drain that takes too long end the process
    at once, with exit code 1.
    """
    raise_limit()
    try:
        import uvloop  # noqa: PLC0415 - not for every platform

        factory = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        code = runner.run(_run(settings))
        if runner.run(_left()):  # asyncio would wait for them without a bound
            _end_at_once(code)
        return code


async def _left() -> set[asyncio.Future[Any]]:
    """The tasks that do not end; all others have ended."""
    return await cancelled(asyncio.all_tasks() - {asyncio.current_task()})


async def _run(settings: RunSettings) -> int:
    metrics = Metrics(__version__)
    inference = Inference(metrics, timeout_s=settings.inference_timeout_s, cache_size=settings.cache_size)
    health = Health(inference.trouble, when_ready=lambda: _tell_that_it_is_ready(settings, inference, metrics))
    health.hold("model", "loading")
    health.hold("group", "not joined yet")  # until the source says otherwise
    reloader = Reloader(
        inference,
        metrics,
        lambda old: _reloaded(settings, cast("SentimentModel", old)),
        lambda model: _tell_of_model(cast("SentimentModel", model), metrics),
    )
    tracing = _tracing(settings)
    guard = Guard(
        host=settings.http_host,
        names=split_names(settings.http_names or ""),
        token=revealed(settings.http_token),
        token_for=settings.http_token_for,
    )
    tap = Tap(_decoder(settings), texts=settings.console_texts)
    console = Console(
        metrics, health, tap, shown_settings(settings), version=__version__, runbook=runbook(project_urls())
    )
    monitor = Monitor(health, metrics, guard, port=settings.http_port, parts=[console, reloader])
    try:
        await monitor.start()
    except OSError as error:
        where = f"{settings.http_host}:{settings.http_port}"
        raise WrongSetting(
            f"http_host and http_port: cannot listen on {where}: {os.strerror(error.errno or 0)}"
        ) from None
    log.info(
        "serving the console, /metrics, /livez and /readyz",
        extra={"address": f"http://{settings.http_host}:{monitor.port}"},
    )
    for doubt in settings.exposures():
        log.warning("%s", doubt)
    stop = _on_signals(reloader)
    try:
        return await _work(settings, metrics, inference, health, tap, stop, tracing)
    finally:
        if tracing:
            await tracing.close(LAST_SPANS_S)
        await monitor.stop()


async def _work(
    settings: RunSettings,
    metrics: Metrics,
    inference: Inference,
    health: Health,
    tap: Tap,
    stop: asyncio.Event,
    tracing: Tracing | None,
) -> int:
    starting = asyncio.create_task(_started(settings, metrics, inference, health, tap, tracing))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            log.info("stopped before it had begun", extra={"exit_code": 0})
            _end_at_once(0)
        pipeline = starting.result()
        stopping.add_done_callback(lambda task: None if task.cancelled() else _drain(pipeline, health))
        await pipeline.run()
    except (UnreadableRecord, Standstill, TopicRecreated, DeadLetterRefused, TooManyDeadLetters) as error:
        log.error("%s", error, extra={"exit_code": 1})
        return 1
    except (InferenceLost, DrainTimeout) as error:
        log.error("%s", error, extra={"exit_code": 1})
        await asyncio.sleep(PROBE_S if isinstance(error, InferenceLost) else 0)
        _end_at_once(1)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a fault of ours: the next process begins where this one has committed
        log.critical("failed for a reason that nobody foresaw", extra={**whereabouts(error), "exit_code": 1})
        return 1
    finally:
        stopping.cancel()
    log.info("drained", extra={"exit_code": 0})
    return 0


async def _started(
    settings: RunSettings, metrics: Metrics, inference: Inference, health: Health, tap: Tap, tracing: Tracing | None
) -> Pipeline:
    connection = Connection.as_set(settings)
    keep_blocks()
    loading = asyncio.create_task(_load(settings, inference, metrics, health))
    finding = asyncio.create_task(_found_topics(settings, connection, health))
    try:
        await asyncio.gather(loading, finding)  # what is missing is told while the model is loading
    finally:
        await cancelled([loading, finding])
    topics, found = finding.result()
    outputs = {"output_topic": [settings.output_topic], "dead_letter_topic": [settings.dead_letter_topic]}
    limits = {name: found[name] for names in outputs.values() for name in names}
    transactions, turn_budget = None, inference.turn_budget
    if settings.delivery == "exactly-once":
        transactions = Transactions(
            connection,
            group_id=settings.group_id,
            limits=limits,
            turn_budget=turn_budget,
            metrics=metrics,
            health=health,
            compression_type=settings.compression_type,
            interval_s=settings.transaction_ms / 1000,
        )
    source = Source(
        connection,
        topics=topics,
        pattern=settings.input_pattern,
        group_id=settings.group_id,
        group_instance_id=settings.group_instance_id,
        auto_offset_reset=settings.auto_offset_reset,
        isolation_level=settings.isolation_level,
        session_timeout_ms=settings.session_timeout_ms,
        fetch_max_wait_ms=settings.fetch_max_wait_ms,
        max_batch_texts=settings.max_batch_texts,
        linger_s=settings.linger_ms / 1000,
        max_unpacked_bytes=settings.max_unpacked_bytes,
        transactions=transactions,
        turn_budget=turn_budget,
        metrics=metrics,
        health=health,
    )
    sink = Sink(connection, limits=limits, metrics=metrics, health=health, compression_type=settings.compression_type)
    if transactions is None:
        await sink.start()
    return Pipeline(
        source=source,
        decoder=_decoder(settings),
        inference=inference,
        encoder=Encoder(
            output_mode=settings.output_mode,
            output_format=settings.output_format,
            group_id=settings.group_id,
            result_timestamp=settings.result_timestamp,
        ),
        sink=sink,
        flood=DeadLetterLimit(limit=settings.dead_letter_limit, window=settings.dead_letter_window),
        turn_budget=turn_budget,
        metrics=metrics,
        output_topic=settings.output_topic,
        dead_letter_topic=settings.dead_letter_topic,
        version=__version__,
        drain_timeout_s=settings.drain_timeout_s,
        retention_ms=NO_LIMIT if settings.result_timestamp == "now" else limits[settings.output_topic].retention_ms,
        transactions=transactions,
        tracing=tracing,
        watch=tap,
        watch_topics=lambda: watch_topics(connection, outputs, health),
    )


async def _load(settings: RunSettings, inference: Inference, metrics: Metrics, health: Health) -> None:
    model = cast("SentimentModel", await inference.load(lambda: _loaded(settings)))
    gc.collect()
    gc.freeze()  # torch brings 400,000 objects: to look through them would stop the event loop for a fifth of a second
    _tell_of_model(model, metrics)
    health.well("model")


async def _found_topics(
    settings: RunSettings, connection: Connection, health: Health
) -> tuple[Sequence[str], dict[str, TopicLimits]]:
    """The input topics, and what each topic accepts, once all are there. Raises WrongSetting."""
    topics = settings.topics
    if settings.input_pattern:
        topics = await wait_for_a_match(connection, settings.input_pattern, health)
    roles = {
        "input_topics": topics,
        "output_topic": [settings.output_topic],
        "dead_letter_topic": [settings.dead_letter_topic],
    }
    found = await wait_until_usable(connection, roles, health)
    refuse_compacted(found, settings.dead_letter_topic)
    await tell_backlog(
        connection,
        topics,
        group_id=settings.group_id,
        auto_offset_reset=settings.auto_offset_reset,
        isolation_level=settings.isolation_level,
    )
    return topics, found


def _tracing(settings: RunSettings) -> Tracing | None:
    if settings.tracing == "off":
        return None
    return Tracing(group_id=settings.group_id, client_id=settings.client_id, version=__version__, environ=os.environ)


def _decoder(settings: RunSettings) -> Decoder:
    text_field, by_topic = text_fields(settings.text_field)
    return Decoder(
        input_format=settings.input_format,
        output_mode=settings.output_mode,
        text_field=text_field,
        text_fields=by_topic,
        id_field=settings.id_field,
        max_text_chars=settings.max_text_chars,
        on_null_text=settings.on_null_text,
    )


def _loaded(settings: RunSettings) -> "SentimentModel":
    from worker.model.sentiment_model import SentimentModel  # noqa: PLC0415 - torch takes seconds, and /livez answers meanwhile

    return SentimentModel.load_as_set(settings)


def _reloaded(settings: RunSettings, old: "SentimentModel") -> "SentimentModel":
    """The setting's model as it is now. What was measured at the start stays: measured beside scoring it would be wrong."""
    measured = {"cpu_threads": old.passes, "max_batch_tokens": old.max_batch_tokens}
    return _loaded(settings.model_copy(update=measured))


def _tell_of_model(model: "SentimentModel", metrics: Metrics) -> None:
    name, _, revision = model.name.rpartition("@")
    metrics.tell_of_model(name, revision, in_force(model))
    log.info("model loaded", extra={"model": model.name, **in_force(model)})


def in_force(model: "SentimentModel") -> dict[str, str]:
    """What a loaded model runs with, by the names of the settings, of which ``auto`` says nothing."""
    return {
        "device": str(model.device),
        "backend": model.backend,
        "dtype": model.dtype,
        "cpu_threads": str(model.passes),
        "max_batch_tokens": str(model.max_batch_tokens),
    }


def _tell_that_it_is_ready(settings: RunSettings, inference: Inference, metrics: Metrics) -> None:
    model = cast("SentimentModel", inference.model)
    extra = {"model": model.name, **in_force(model), "max_batch_texts": settings.max_batch_texts}
    log.info("ready", extra={**extra, "partitions": metrics.partitions()})


def _on_signals(reloader: Reloader) -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; the second one ends the process. SIGHUP reloads the model.

    One that is ignored from the start, as under nohup, stays ignored. A terminal that is closed sends SIGHUP too; the worker
    drains then, as no process should outlive its terminal unasked.
    """
    stop = asyncio.Event()

    def stop_or_end() -> None:
        if stop.is_set():
            log.error("a second signal: ending at once", extra={"exit_code": 1})
            _end_at_once(1)
        stop.set()

    loop = asyncio.get_running_loop()
    had_terminal = _has_terminal()
    reloads: set[asyncio.Task[None]] = set()  # the loop itself keeps tasks by weak references alone

    def reload_or_stop() -> None:
        if had_terminal and not _has_terminal():
            stop.set()
            return
        task = loop.create_task(reloader.or_log())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, reload_or_stop)
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop_or_end)
    return stop


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _drain(pipeline: Pipeline, health: Health) -> None:
    log.info("draining: no more records are taken")
    health.hold("worker", "draining")
    pipeline.drain()


def _end_at_once(code: int) -> NoReturn:
    """Without waiting for threads: a native call that hangs or still loads cannot be joined."""
    logging.shutdown()
    os._exit(code)
