"""Spans of what the worker does with records, by OpenTelemetry's conventions for messaging, sent by OTLP over HTTP.

A span describes a whole micro-batch, the unit of work here, and links to the trace contexts of its events, up to a bound. It
is made when its work is done and handed to the SDK's own thread. Nothing here waits for the collector: where that does not
answer, spans are dropped and records go on. Only ``Tracing`` imports the SDK, and it is only made where tracing is on.
"""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from worker.core.events import Headers, Record
from worker.errors import WrongSetting
from worker.runtime.tasks import within

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Link, Span

log = logging.getLogger(__name__)

LINKS: Final = 128  # of one span, as many as the SDK keeps unless OTEL_SPAN_LINK_COUNT_LIMIT says otherwise
SERVICE: Final = "sentiment-worker"
HEADER_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")  # they may hold a token
_TRACEPARENT: Final = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


def trace_context(headers: Headers) -> tuple[int, int, int] | None:
    """Trace id, span id and flags of the W3C header ``traceparent``; None without a valid one."""
    for name, value in headers:
        if name == "traceparent":
            found = _TRACEPARENT.fullmatch(value or b"")
            if found is None:
                return None
            trace_id, span_id, flags = (int(part, 16) for part in found.groups())
            return (trace_id, span_id, flags) if trace_id and span_id else None
    return None


def refuse_without_the_extra() -> None:
    """Raises WrongSetting where OpenTelemetry is not installed."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: PLC0415
        import opentelemetry.sdk.trace  # noqa: F401, PLC0415
    except ImportError:
        raise WrongSetting("tracing otel needs the extra otel: pip install 'sentiment-worker[otel]'") from None


class BatchTrace(NamedTuple):
    """What the next span of a micro-batch needs: the receive span, the links, and when the last span ended."""

    receive: "Span"
    links: "list[Link]"
    ended_at: int  # in ns since 1970


class Tracing:
    """Makes spans, and has them sent. Every method but ``close`` returns at once.

    OpenTelemetry's variables say where spans go, how many are kept and under which name: OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME and so on.
    """

    def __init__(self, *, group_id: str, client_id: str, version: str, environ: Mapping[str, str]) -> None:
        """Raises WrongSetting where the extra is missing, or a variable of OpenTelemetry's cannot be used."""
        protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        if protocol not in (None, "", "http/protobuf"):
            raise WrongSetting(
                f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}, and spans are sent by http/protobuf alone; leave it out"
            )
        for name in HEADER_VARIABLES:
            if any("=" not in header for header in filter(str.strip, environ.get(name, "").split(","))):
                raise WrongSetting(f"{name} should be name=value, several of them separated by commas")
        refuse_without_the_extra()
        try:
            self._start(version, environ)
        except ValueError as error:
            raise WrongSetting(f"tracing otel: a variable of OpenTelemetry's cannot be used: {error}") from None
        self._common = {"messaging.system": "kafka", "messaging.client.id": client_id}
        self._consumer = {"messaging.consumer.group.name": group_id}

    def _start(self, version: str, environ: Mapping[str, str]) -> None:
        from opentelemetry import trace  # noqa: PLC0415 - of the extra
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        is_named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        names = {"service.version": version} | ({} if is_named else {"service.name": SERVICE})
        self._trace = trace
        self._provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_logging_failures(OTLPSpanExporter())))
        self._tracer = self._provider.get_tracer(SERVICE, version)

    def received(self, records: Iterable[Record], asked_at: int) -> BatchTrace:
        """A micro-batch of these records has been taken; the pipeline asked for it at ``asked_at``, in ns since 1970."""
        records = list(records)
        links = self._links(records)
        attributes = self._attributes("poll", "receive", records) | self._consumer
        now = time.time_ns()
        receive = self._span("poll", "CLIENT", attributes, links, asked_at, now)
        return BatchTrace(receive, links, now)

    def processed(self, batch: BatchTrace, records: Iterable[Record], failed: int) -> None:
        """These records of a micro-batch have an outcome; ``failed`` of them become dead letters."""
        records = list(records)
        attributes = self._attributes("process", "process", records) | self._consumer
        attributes |= {"sentiment_worker.dead_letters": failed}
        context = self._trace.set_span_in_context(batch.receive)
        self._span("process", "CONSUMER", attributes, batch.links, batch.ended_at, time.time_ns(), context)

    def sent(self, topic: str, records: Sequence[Record], began_at: int) -> None:
        """A topic has acknowledged the outcomes of these records, or refused them for good.

        Sending began at ``began_at``, in ns since 1970.
        """
        attributes = self._attributes("send", "send", records) | {"messaging.destination.name": topic}
        self._span("send", "CLIENT", attributes, self._links(records), began_at, time.time_ns())

    async def close(self, timeout_s: float) -> None:
        """Sends the spans that are left, as far as that is possible within ``timeout_s``."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            loop.call_soon_threadsafe(done.set)

        # A daemon thread, so that a collector that does not answer cannot keep the process from ending.
        threading.Thread(target=shut_down, daemon=True).start()
        try:
            await within(timeout_s, done.wait())
        except TimeoutError:
            log.warning("the last spans could not be sent in time")

    def _span(
        self, operation: str, kind: str, attributes: dict[str, Any], links: "list[Link]", began_at: int, ended_at: int,
        context: Any = None,
    ) -> "Span":  # fmt: skip
        name = " ".join(filter(None, (operation, attributes.get("messaging.destination.name"))))
        span = self._tracer.start_span(
            name, context, self._trace.SpanKind[kind], attributes, links, began_at, record_exception=False
        )
        span.end(ended_at)
        return span

    def _attributes(self, name: str, kind: str, records: Sequence[Record]) -> dict[str, Any]:
        """Attributes of a span over these records, with their topic and partition where they have one in common."""
        attributes: dict[str, Any] = {
            **self._common,
            "messaging.operation.name": name,
            "messaging.operation.type": kind,
            "messaging.batch.message_count": len(records),
        }
        if kind == "send":
            return attributes
        places = {(record.topic, record.partition) for record in records}
        if len({topic for topic, _ in places}) == 1:
            attributes["messaging.destination.name"] = records[0].topic
            if len(places) == 1:
                attributes["messaging.destination.partition.id"] = str(records[0].partition)
        return attributes

    def _links(self, records: Iterable[Record]) -> "list[Link]":
        trace = self._trace
        found = (
            (record, context) for record in records if record.headers and (context := trace_context(record.headers))
        )
        return [
            trace.Link(
                trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(flags)),
                {
                    "messaging.destination.name": record.topic,
                    "messaging.destination.partition.id": str(record.partition),
                    "messaging.kafka.offset": record.offset,
                },
            )
            for record, (trace_id, span_id, flags) in islice(found, LINKS)
        ]


def _logging_failures(exporter: "SpanExporter") -> "SpanExporter":
    """The exporter, with one log line when failures begin and one when they end; the SDK would log each failure."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult  # noqa: PLC0415

    class LoggingExporter(SpanExporter):
        is_failing = False

        def export(self, spans: "Sequence[ReadableSpan]") -> "SpanExportResult":
            result = exporter.export(spans)
            is_failing = result is not SpanExportResult.SUCCESS
            if is_failing and not self.is_failing:
                log.warning("the collector does not take spans; they are dropped, and records go on")
            elif self.is_failing and not is_failing:
                log.info("the collector takes spans again")
            self.is_failing = is_failing
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return LoggingExporter()
