"""The worker's parts, made from the settings, and how they are put together."""

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from worker import __version__
from worker.commands.kafka_connection import kafka_connection
from worker.commands.result_schema import wait_for_schema_id
from worker.core.avro_encoder import AvroEncoder
from worker.core.dead_letter_limit import DeadLetterLimit
from worker.core.decoder import Decoder
from worker.core.encoder import Encoder
from worker.core.max_age import MaxAge
from worker.core.sentiment import CARD
from worker.errors import WrongSetting
from worker.http.recent_outcomes import RecentOutcomes
from worker.kafka.at_least_once import AtLeastOnce
from worker.kafka.backlog import log_backlog
from worker.kafka.bounded_run import Until, check_group
from worker.kafka.connection import Connection
from worker.kafka.delivery import Delivery
from worker.kafka.exactly_once import ExactlyOnce
from worker.kafka.sink import Sink
from worker.kafka.source import Source
from worker.kafka.topics import (
    NO_LIMIT,
    TopicLimits,
    refuse_compacted,
    wait_for_a_match,
    wait_until_usable,
    watch_topics,
)
from worker.kafka.transactional_sink import TransactionalSink, new_transactional_id
from worker.model.autotune import tune_batch_texts
from worker.model.labels import listed
from worker.pipeline.accounting import Accounting
from worker.pipeline.inference import Inference
from worker.pipeline.input_schemas import InputSchemas
from worker.pipeline.outcomes import Outcomes
from worker.pipeline.publishing import Publishing
from worker.pipeline.stages import Pipeline
from worker.registry.client import RegistryRefused, SchemaRegistry
from worker.registry.schema_fetcher import SchemaFetcher
from worker.runtime.memory import keep_freed_blocks
from worker.runtime.tasks import cancel_all
from worker.settings.run import RunSettings
from worker.settings.values import input_formats, text_fields
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics
from worker.telemetry.tracing import Tracing

if TYPE_CHECKING:
    from worker.model.sentiment_model import SentimentModel

log = logging.getLogger(__name__)

WAITING_BATCHES: Final = 4  # micro-batches that may wait for those before them to be acknowledged

LoadModel = Callable[[RunSettings], "SentimentModel"]


def load_model(settings: RunSettings) -> "SentimentModel":
    """The model that the settings name. Blocks for seconds; raises UserError."""
    from worker.commands.load_model import load_from_settings  # noqa: PLC0415 - /livez answers meanwhile

    return load_from_settings(settings)


def tuned_model(load_model: LoadModel, settings: RunSettings) -> "SentimentModel":
    """What ``load_model`` loads, with the size of its micro-batches set. Blocks for seconds; raises what that raises."""
    model = load_model(settings)
    if settings.max_batch_texts == "auto":
        model.max_batch_texts = tune_batch_texts(model.device, lambda: model.batch_seconds())  # noqa: PLW0108 - GPU alone
    else:
        model.max_batch_texts = settings.max_batch_texts
    return model


@dataclass(frozen=True)
class Shared:
    """What the parts of the process share."""

    settings: RunSettings
    metrics: Metrics
    health: Health
    inference: Inference
    recent: RecentOutcomes
    tracing: Tracing | None
    load_model: LoadModel
    decoder: Decoder
    registry: SchemaRegistry | None = None
    until: Until | None = None


async def started_pipeline(shared: Shared) -> Pipeline:
    """Loads the model, looks for the topics and registers the schema of results, side by side, then connects.

    Waits for brokers and the registry; raises UserError.
    """
    connection = kafka_connection(shared.settings, lambda why: _tell_of_login(why, shared.health))
    keep_freed_blocks()
    loading = asyncio.create_task(_load(shared))
    finding = asyncio.create_task(_found_topics(shared.settings, connection, shared.health))
    schemas = _schema_fetcher(shared)
    asking = asyncio.create_task(_check_registry(schemas))
    registering = asyncio.create_task(_result_schema_id(shared))
    tasks = [loading, finding, asking, registering]
    try:
        await asyncio.gather(*tasks)  # what is missing is told while the model is loading
    finally:
        await cancel_all(tasks)
    topics, limits = finding.result()
    if shared.until:
        await check_group(connection, topics, shared.until, shared.health)
    outputs = {name: limits[name] for name in (shared.settings.output_topic, shared.settings.dead_letter_topic)}
    delivery = _delivery(shared, connection, outputs)
    source = _source(shared, connection, delivery, topics)
    await delivery.start()
    results = encoder(shared.settings, registering.result())
    return _pipeline(shared, connection, source, delivery, outputs, schemas, results)


def _tell_of_login(why_not: str, health: Health) -> None:
    if why_not:
        health.failing("login", why_not)
    else:
        health.working("login")


async def _load(shared: Shared) -> None:
    model = cast("SentimentModel", await shared.inference.load(lambda: tuned_model(shared.load_model, shared.settings)))
    gc.collect()
    gc.freeze()  # there are 80,000 objects, with torch 400,000: looking through those stops the event loop for 0.2 s
    tell_of_model(model, shared.metrics)
    shared.health.working("model")


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
    await log_backlog(
        connection,
        topics,
        group_id=settings.group_id,
        auto_offset_reset=settings.auto_offset_reset,
        isolation_level=settings.isolation_level,
        since_ms=settings.since_ms,
    )
    return topics, found


async def _result_schema_id(shared: Shared) -> int | None:
    """The id of the schema of results; None where they are not Avro. Waits for the registry; raises WrongSetting."""
    settings = shared.settings
    if settings.output_format != "avro" or shared.registry is None:
        return None
    return await wait_for_schema_id(
        shared.registry, settings.output_topic, auto_register=settings.schema_auto_register, health=shared.health
    )


def _loaded_model(shared: Shared) -> "SentimentModel":
    return cast("SentimentModel", shared.inference.model)


def _source(shared: Shared, connection: Connection, delivery: Delivery, topics: Sequence[str]) -> Source:
    settings = shared.settings
    return Source(
        connection,
        delivery,
        topics=topics,
        pattern=settings.input_pattern,
        group_id=settings.group_id,
        group_instance_id=settings.group_instance_id,
        auto_offset_reset=settings.auto_offset_reset,
        since_ms=settings.since_ms,
        until=shared.until,
        isolation_level=settings.isolation_level,
        client_rack=settings.client_rack,
        session_timeout_ms=settings.session_timeout_ms,
        fetch_max_wait_ms=settings.fetch_max_wait_ms,
        max_batch_texts=_loaded_model(shared).max_batch_texts,
        linger_s=settings.linger_ms / 1000,
        token_limit=shared.inference.token_limit(),
        max_unpacked_bytes=settings.max_unpacked_bytes,
        turn_budget=shared.inference.turn_budget,
        metrics=shared.metrics,
        health=shared.health,
    )


def _delivery(shared: Shared, connection: Connection, limits: dict[str, TopicLimits]) -> Delivery:
    settings = shared.settings
    sink_options: dict[str, Any] = {
        "limits": limits,
        "metrics": shared.metrics,
        "health": shared.health,
        "compression_type": settings.compression_type,
    }
    if settings.delivery == "exactly-once":
        transactional_id = new_transactional_id(settings.group_id, settings.group_instance_id)
        return ExactlyOnce(
            connection,
            TransactionalSink(connection, transactional_id=transactional_id, **sink_options),
            group_id=settings.group_id,
            interval_s=settings.transaction_ms / 1000,
            turn_budget=shared.inference.turn_budget,
            metrics=shared.metrics,
            health=shared.health,
        )
    return AtLeastOnce(
        Sink(connection, **sink_options),
        capacity=WAITING_BATCHES * _loaded_model(shared).max_batch_texts,
        turn_budget=shared.inference.turn_budget,
        metrics=shared.metrics,
        health=shared.health,
    )


def _pipeline(
    shared: Shared,
    connection: Connection,
    source: Source,
    delivery: Delivery,
    limits: dict[str, TopicLimits],
    schemas: SchemaFetcher | None,
    results: Encoder,
) -> Pipeline:
    settings, turn_budget = shared.settings, shared.inference.turn_budget
    output, dead_letters = settings.output_topic, settings.dead_letter_topic
    plain = shared.decoder
    dead_letter_limit = DeadLetterLimit(limit=settings.dead_letter_limit, window=settings.dead_letter_window)
    return Pipeline(
        source=source,
        inference=shared.inference,
        outcomes=Outcomes(
            plain,
            results,
            output_topic=output,
            dead_letter_topic=dead_letters,
            version=__version__,
            turn_budget=turn_budget,
            max_age=None if settings.max_age_s is None else MaxAge(plain, settings.max_age_s, time.time),
        ),
        publishing=Publishing(
            output_topic=output,
            dead_letter_topic=dead_letters,
            version=__version__,
            turn_budget=turn_budget,
            tracing=shared.tracing,
        ),
        accounting=Accounting(
            dead_letter_limit=dead_letter_limit,
            metrics=shared.metrics,
            output_topic=output,
            retention_ms=NO_LIMIT if settings.result_timestamp == "now" else limits[output].retention_ms,
            watch=shared.recent.add,
        ),
        delivery=delivery,
        dead_letter_limit=dead_letter_limit,
        metrics=shared.metrics,
        drain_timeout_s=settings.drain_timeout_s,
        tracing=shared.tracing,
        watch_topics=lambda: watch_topics(
            connection, {"output_topic": [output], "dead_letter_topic": [dead_letters]}, shared.health
        ),
        schemas=InputSchemas(plain, schemas) if schemas else None,
    )


def encoder(settings: RunSettings, schema_id: int | None) -> Encoder:
    """What writes results; ``schema_id`` is that of their schema, None where they are not Avro."""
    if schema_id is not None:
        return AvroEncoder(schema_id=schema_id, result_timestamp=settings.result_timestamp)
    return Encoder(
        output_mode=settings.output_mode,
        output_format=settings.output_format,
        group_id=settings.group_id,
        result_timestamp=settings.result_timestamp,
        reads_frames=settings.schema_registry_url is not None,
    )


def decoder(settings: RunSettings) -> Decoder:
    text_field, by_topic = text_fields(settings.text_field)
    input_format, formats = input_formats(settings.input_format)
    return Decoder(
        input_format=input_format,
        input_formats=formats,
        output_mode=settings.output_mode,
        text_field=text_field,
        text_fields=by_topic,
        id_field=settings.id_field,
        max_text_chars=settings.max_text_chars,
        on_null_text=settings.on_null_text,
        reads_frames=settings.schema_registry_url is not None,
    )


def _schema_fetcher(shared: Shared) -> SchemaFetcher | None:
    """What fetches schemas for the decoder; None where it reads no Avro."""
    if shared.registry is None or not shared.decoder.reads_avro:
        return None
    return SchemaFetcher(shared.registry, shared.decoder.schemas.add, shared.health)


async def _check_registry(schemas: SchemaFetcher | None) -> None:
    """Waits until the registry answers. Raises WrongSetting where it refuses the credentials."""
    try:
        if schemas:
            await schemas.check()
    except RegistryRefused as error:
        raise WrongSetting(str(error)) from None


def tracing(settings: RunSettings) -> Tracing | None:
    if settings.tracing == "off":
        return None
    return Tracing(group_id=settings.group_id, client_id=settings.client_id, version=__version__, environ=os.environ)


def tell_of_model(model: "SentimentModel", metrics: Metrics) -> None:
    metrics.set_model(model.name.removesuffix(f"@{model.revision}"), model.revision, in_force(model))
    metrics.set_labels(model.labels.names)
    log.info("model loaded", extra={"model": model.name, **in_force(model)})
    if model.labels != CARD:
        names, activation, weights, threshold = model.labels
        log.info(
            "results have this model's own labels",
            extra={
                "labels": listed(names),
                "activation": activation,
                "score": "none: set label_scores" if weights is None else "by weights",
                "threshold": threshold,
            },
        )


def in_force(model: "SentimentModel") -> dict[str, str]:
    """The values that a loaded model runs with, by the names of the settings: where one is ``auto``, what was chosen."""
    values = {
        "device": str(model.device),
        "backend": model.backend,
        "dtype": model.dtype,
        "cpu_threads": str(model.passes),
        "max_batch_tokens": str(model.max_batch_tokens),
        "max_batch_texts": str(model.max_batch_texts),
    }
    return values if model.device == "cpu" else {**values, "cuda_pass": model.cuda_pass}


def tell_that_it_is_ready(inference: Inference, metrics: Metrics) -> None:
    model = cast("SentimentModel", inference.model)
    extra = {"model": model.name, **in_force(model), "max_batch_texts": model.max_batch_texts}
    log.info("ready", extra={**extra, "partitions": metrics.partitions()})
