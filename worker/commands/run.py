"""The worker process: its HTTP server, its signals, and how it ends."""

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from worker import __version__
from worker.commands.run_parts import (
    LoadModel,
    Shared,
    decoder,
    load_model,
    started_pipeline,
    tell_of_model,
    tell_that_it_is_ready,
    tracing,
    tuned_model,
)
from worker.commands.schema_registry import schema_registry
from worker.commands.secret_values import secret_value
from worker.core.avro_encoder import probabilities_in
from worker.core.dead_letter_limit import TooManyDeadLetters
from worker.core.topic_ids import TopicRecreated
from worker.errors import UserError, WrongSetting
from worker.http.access import AccessControl
from worker.http.console import Console, shown_settings
from worker.http.recent_outcomes import RecentOutcomes
from worker.http.reload import Reloader
from worker.http.server import Server
from worker.kafka.bounded_run import Until
from worker.kafka.group_consumer import GroupTimeouts
from worker.kafka.partition_reader import UnreadableRecord
from worker.kafka.standstill import Standstill
from worker.pipeline.inference import Inference
from worker.pipeline.model_runner import FatalInferenceError
from worker.pipeline.publishing import DeadLetterRefused
from worker.pipeline.stages import DrainTimeout, Pipeline
from worker.runtime.file_descriptors import raise_limit
from worker.runtime.tasks import cancel_all
from worker.settings.run import RunSettings
from worker.settings.values import split_names
from worker.telemetry.health import Health
from worker.telemetry.logs import error_fields
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from worker.model.sentiment_model import SentimentModel

log = logging.getLogger(__name__)

LAST_SPANS_S: Final = 2.0
MICRO_BATCH_SHARE: Final = 0.25  # of a revocation's time, for one micro-batch with texts in windows
PROBE_S: Final = 1.0  # for a last look at /livez and /metrics before a process that cannot go on ends


def run(settings: RunSettings, load_model: LoadModel = load_model) -> int:
    """Runs the worker until SIGTERM or SIGINT, or until something breaks. Blocks; answers with the exit code.

    ``load_model`` is called on a thread of its own, and again for each reload. Raises UserError. A second signal, a hung
    inference and a drain that takes too long end the process at once, with exit code 1.
    """
    raise_limit()
    try:
        import uvloop  # noqa: PLC0415 - not for every platform

        factory = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        code = runner.run(_run(settings, load_model))
        if runner.run(_left()):  # asyncio would wait for them without a bound
            _end_at_once(code)
        return code


async def _left() -> set[asyncio.Future[Any]]:
    """Cancels all other tasks; returns those that do not end."""
    return await cancel_all(asyncio.all_tasks() - {asyncio.current_task()})


async def _run(settings: RunSettings, load_model: LoadModel) -> int:
    metrics = Metrics(__version__)
    inference = _inference(settings, metrics)
    health = Health(inference.why_not_alive, when_ready=lambda: tell_that_it_is_ready(inference, metrics))
    health.not_ready("model", "loading")
    health.not_ready("group", "not joined yet")  # until the source says otherwise
    registry, reads = schema_registry(settings), decoder(settings)
    in_avro = probabilities_in if settings.output_format == "avro" else None
    recent = RecentOutcomes(reads, texts=settings.console_texts, probabilities=in_avro)
    until = Until(settings.group_id, settings.until_ms) if settings.until else None
    shared = Shared(settings, metrics, health, inference, recent, tracing(settings), load_model, reads, registry, until)
    reloader = _reloader(shared)
    server = _server(shared, reloader)
    try:
        await server.start()
    except OSError as error:
        where = f"{settings.http_host}:{settings.http_port}"
        raise WrongSetting(
            f"http_host and http_port: cannot listen on {where}: {os.strerror(error.errno or 0)}"
        ) from None
    log.info(
        "serving the console, /metrics, /livez and /readyz",
        extra={"address": f"http://{settings.http_host}:{server.port}"},
    )
    for doubt in settings.exposures():
        log.warning("%s", doubt)
    stop = _on_signals(reloader)
    try:
        return await _work(shared, stop)
    finally:
        if registry:
            await registry.close()
        if shared.tracing:
            await shared.tracing.close(LAST_SPANS_S)
        await server.stop()


def _inference(settings: RunSettings, metrics: Metrics) -> Inference:
    timeouts = GroupTimeouts.of(
        request_timeout_ms=settings.request_timeout_ms, session_timeout_ms=settings.session_timeout_ms
    )
    return Inference(
        metrics,
        timeout_s=settings.inference_timeout_s,
        cache_size=settings.cache_size,
        micro_batch_s=MICRO_BATCH_SHARE * timeouts.revoke_s,
    )


def _reloader(shared: Shared) -> Reloader:
    """Loads the setting's model as it is then. What was measured at the start stays: beside scoring it would be wrong."""

    def reloaded(old: Any) -> Any:
        names = ("max_batch_tokens", "max_batch_texts", "cuda_pass")
        measured = {"cpu_threads": old.passes, **{name: getattr(old, name) for name in names}}
        return tuned_model(shared.load_model, shared.settings.model_copy(update=measured))

    return Reloader(
        shared.inference,
        shared.metrics,
        reloaded,
        lambda model: tell_of_model(cast("SentimentModel", model), shared.metrics),
    )


def runbook(urls: Sequence[str]) -> str | None:
    """Where it stands what to do if the worker is not ready, by the package's lines ``name, address``; None without one."""
    found = (url.removeprefix("Runbook, ") for url in urls if url.startswith("Runbook, "))
    return next((f"{url}#sentimentworkernotready" for url in found), None)


def _project_urls() -> list[str]:
    try:
        return metadata("sentiment-worker").get_all("Project-URL", [])
    except PackageNotFoundError:
        return []


def _server(shared: Shared, reloader: Reloader) -> Server:
    settings = shared.settings
    access = AccessControl(
        shared.metrics,
        names=[settings.http_host, *split_names(settings.http_names or "")],
        token=secret_value(settings, "http_token"),
        token_for=settings.http_token_for,
    )
    console = Console(
        shared.metrics,
        shared.health,
        shared.recent,
        shown_settings(settings),
        version=__version__,
        runbook=runbook(_project_urls()),
    )
    return Server(
        shared.health,
        shared.metrics,
        access,
        host=settings.http_host,
        port=settings.http_port,
        routes=[console, reloader],
    )


async def _work(shared: Shared, stop: asyncio.Event) -> int:
    starting = asyncio.create_task(started_pipeline(shared))
    endings = [
        asyncio.create_task(event.wait()) for event in (stop, *([shared.until.finished] if shared.until else []))
    ]
    try:
        await asyncio.wait({starting, *endings}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            code = 1 if shared.until else 0
            log.info("stopped before it had begun", extra={"exit_code": code})
            _end_at_once(code)
        pipeline = starting.result()
        for ending in endings:
            ending.add_done_callback(lambda task: None if task.cancelled() else _drain(pipeline, shared.health))
        await pipeline.run()
    except (UnreadableRecord, Standstill, TopicRecreated, DeadLetterRefused, TooManyDeadLetters) as error:
        log.error("%s", error, extra={"exit_code": 1})
        return 1
    except (FatalInferenceError, DrainTimeout) as error:
        log.error("%s", error, extra={"exit_code": 1})
        await asyncio.sleep(PROBE_S if isinstance(error, FatalInferenceError) else 0)
        _end_at_once(1)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a fault of ours: the next process begins where this one has committed
        log.critical("failed for a reason that nobody foresaw", extra={**error_fields(error), "exit_code": 1})
        return 1
    finally:
        for ending in endings:
            ending.cancel()
    return _tell_of_end(shared)


def _tell_of_end(shared: Shared) -> int:
    """Logs what was done, and answers with the exit code of a worker that has drained."""
    if shared.until is None:
        log.info("drained", extra={"exit_code": 0})
        return 0
    code = 0 if shared.until.finished.is_set() else 1
    message = (
        "drained before the end of the run; the same command will continue it"
        if code
        else "every partition is read to its end"
    )
    log.log(logging.ERROR if code else logging.INFO, message, extra={**shared.metrics.outcomes(), "exit_code": code})
    return code


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
        task = loop.create_task(reloader.reload_or_log())
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
    health.not_ready("worker", "draining")
    pipeline.drain()


def _end_at_once(code: int) -> NoReturn:
    """Without waiting for threads: a native call that hangs or still loads cannot be joined."""
    logging.shutdown()
    os._exit(code)
