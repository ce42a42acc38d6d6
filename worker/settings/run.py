"""The options of ``run`` and ``check``."""

import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import CliSuppress

from worker.settings.schema_registry import SchemaRegistrySettings
from worker.settings.shared import EventSettings, ModelSettings
from worker.settings.types import (
    INT32,
    End,
    Host,
    HostNames,
    HttpToken,
    InstanceId,
    Moment,
    Pattern,
    TextFields,
    Topic,
    Topics,
)
from worker.settings.values import (
    DEFAULT_TEXT_FIELD,
    input_formats,
    ip_address,
    moment_ms,
    split_names,
    text_fields,
    whole_name,
)


def _is_loopback(host: str) -> bool:
    address = ip_address(host)
    return address.is_loopback if address else host.lower() == "localhost"


class RunSettings(ModelSettings, EventSettings, SchemaRegistrySettings):
    """Read text events from Kafka, publish their sentiment, commit."""

    input_topics: Topics | None = Field("texts", description="topics to read, separated by commas")
    input_pattern: Pattern | None = Field(
        None,
        description="in place of input_topics: all topics whose whole name matches this regular expression, also later ones",
    )
    output_topic: Topic = Field("sentiment", description="topic for results")
    group_instance_id: InstanceId | None = Field(
        None, description="static membership: a name of this process's own in the group"
    )
    auto_offset_reset: Literal["earliest", "latest"] = Field(
        "earliest", description="where to begin when the group has no offset, or it is gone"
    )
    since: Moment | None = Field(
        None,
        description="where a group without an offset begins: at the first record with this timestamp or a later one; a time "
        "such as 2026-11-23T10:00Z, or how long ago, such as 30m, 2h or 7d",
    )
    until: End | None = Field(
        None,
        description="the worker ends when its group has read every partition up to this time: a past time such as "
        "2026-11-23T10:00Z, or now; it needs a group_id that no other worker uses",
    )
    isolation_level: Literal["read_committed", "read_uncommitted"] = Field(
        "read_committed", description="whether to skip records of aborted transactions"
    )
    client_rack: str | None = Field(
        None,
        description="rack or zone that this worker runs in, by the name that brokers there have as broker.rack: records are "
        "fetched from a replica there, if the brokers' replica.selector.class is RackAwareReplicaSelector; default: from "
        "each partition's leader",
    )
    delivery: Literal["at-least-once", "exactly-once"] = Field(
        "at-least-once",
        description="delivery guarantee; exactly-once: by transactions, for readers with read_committed",
    )
    transaction_ms: float = Field(
        100, ge=0, le=3_333, description="with exactly-once, shortest time from one commit to the next, ms"
    )
    output_mode: Literal["result", "enrich"] = Field(
        "result", description="result: a new object; enrich: the input object with the field sentiment"
    )
    text_field: TextFields = Field(
        DEFAULT_TEXT_FIELD,
        description="where the text is; a dotted path reaches inside; by topic: reviews=body,posts=data.text, and text for "
        "the others",
    )
    on_null_text: Literal["dead_letter", "skip"] = Field(
        "dead_letter",
        description="what becomes of a record whose text, or an object around it, is null: a dead letter, or it is skipped "
        "and counted",
    )
    result_timestamp: Literal["event", "now"] = Field(
        "event",
        description="timestamp of results: the input record's, or that of their publishing, for outputs that keep records "
        "for less time than the input is old",
    )
    output_format: Literal["json", "cloudevents", "avro"] = Field(
        "json",
        description="cloudevents: results are CloudEvents too, their attributes in the headers; avro: results are Avro in "
        "the framing of Confluent's serializers; it needs schema_registry_url",
    )
    schema_auto_register: bool = Field(
        True,
        description="with output_format=avro, the schema of results is registered under the output topic's name and -value; "
        "false: it is only looked up there",
    )
    max_text_chars: int = Field(100_000, ge=1, description="longer texts become dead letters, characters")
    max_age_s: float | None = Field(
        None,
        gt=0,
        description="a record is skipped and counted if its timestamp is older than this when the worker reads it, s",
    )
    dead_letter_limit: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of dead letters among the newest records that ends the worker; 0: no share does",
    )
    dead_letter_window: int = Field(
        1_000, ge=1, le=INT32, description="dead_letter_limit looks at so many of the newest records, or more"
    )
    compression_type: Literal["none", "gzip", "snappy", "lz4", "zstd"] = Field(
        "none", description="compression of what is published"
    )
    max_batch_texts: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = Field(
        "auto",
        description="a micro-batch closes when it has this number of records; auto: 512 on a CPU; on a GPU the fastest "
        "number, measured at the start",
    )
    linger_ms: float = Field(
        10,
        ge=0,
        le=60_000,
        description="a micro-batch closes at the latest so long after its oldest record arrived, ms",
    )
    max_unpacked_bytes: int = Field(
        256 * 2**20,
        ge=128 * 2**20,
        description="memory for compressed batches when they are unpacked, all together, bytes",
    )
    cache_size: int = Field(
        65_536, ge=0, description="results kept for texts that come again, of which half stay for certain; 0: none"
    )
    inference_timeout_s: float = Field(60, gt=0, description="a device batch that takes longer counts as hung, s")
    drain_timeout_s: float = Field(20, gt=0, description="time to finish what is in flight at SIGTERM, s")
    http_host: Host = Field("127.0.0.1", description="address for the console, /metrics, /livez, /readyz")
    http_port: int = Field(8080, ge=0, le=65_535, description="port of http_host; 0: any free one")
    http_names: HostNames | None = Field(
        None,
        description="names of http_host that browsers and clients may use, beside localhost and IP addresses: a service's, "
        "an Ingress's or a proxy's, separated by commas",
    )
    http_token: CliSuppress[HttpToken | None] = None
    http_token_for: Literal["changes", "all"] = Field(
        "changes",
        description="what needs the token in WORKER_HTTP_TOKEN or the file WORKER_HTTP_TOKEN_FILE names: whatever changes "
        "something, or all but /livez and /readyz",
    )
    console_texts: bool = Field(False, description="the console at / shows the newest results' texts too")
    tracing: Literal["off", "otel"] = Field(
        "off",
        description="otel: spans of each micro-batch to a collector, as the OTEL_… variables say; needs the extra otel",
    )
    session_timeout_ms: int = Field(
        45_000, ge=1_000, le=INT32, description="a worker without a heartbeat leaves the group after so long, ms"
    )
    fetch_max_wait_ms: int = Field(
        500, ge=1, le=INT32, description="a broker that has nothing new answers after so long, ms"
    )

    @property
    def since_ms(self) -> int | None:
        """The time that ``since`` names, in ms since 1970; None where it is not set."""
        return moment_ms(self.since) if self.since else None

    @property
    def until_ms(self) -> int | None:
        """The time that ``until`` names, in ms since 1970; None for now, or where it is not set."""
        return moment_ms(self.until) if self.until and self.until != "now" else None

    @property
    def topics(self) -> tuple[str, ...]:
        """The input topics that are named; none where there is a pattern."""
        return split_names(self.input_topics or "")

    def exposures(self) -> Iterator[str]:
        """A sentence for each thing that these settings let others read."""
        if self.security_protocol == "SASL_PLAINTEXT":
            shown = {"PLAIN": "the password and every record", "OAUTHBEARER": "the token and every record"}
            seen = shown.get(self.sasl_mechanism or "", "every record")
            yield (
                "nothing is encrypted with security_protocol SASL_PLAINTEXT: "
                f"whoever is on the way to the brokers reads {seen}; use SASL_SSL"
            )
        yield from self.registry_exposures()
        if self.oauth_token_url and self.oauth_token_url.startswith("http:"):
            yield (
                f"nothing is encrypted with oauth_token_url {self.oauth_token_url}: whoever is on the way to it reads the "
                "client's secret and its tokens; use https"
            )
        if self.http_token_for != "all" and not _is_loopback(self.http_host):
            seen = "results with their texts" if self.console_texts else "results"
            lets = " with http_token_for changes" if self.http_token else ""
            wants = "http_token_for=all" if self.http_token else "http_token and http_token_for=all"
            yield (
                f"http_host {self.http_host} answers other machines without a token{lets}: whoever reaches the port reads "
                f"metrics, settings and {seen}; set {wants}, or let only those in who may"
            )

    def reads(self, topic: str) -> bool:
        """Whether a topic is one of the input's."""
        if self.input_pattern:
            return whole_name(self.input_pattern).match(topic) is not None
        return topic in self.topics

    @model_validator(mode="before")
    @classmethod
    def _takes_a_pattern_alone(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {"input_topics": None, **given} if given.get("input_pattern") else given

    @model_validator(mode="after")
    def _has_an_input(self) -> Self:
        if (self.input_topics is None) == (self.input_pattern is None):
            raise ValueError("input_topics and input_pattern: set one of them, not both")
        by_topic = {"text_field": text_fields(self.text_field)[1], "input_format": input_formats(self.input_format)[1]}
        for name, topic in ((name, topic) for name, topics in by_topic.items() for topic in topics):
            if not self.reads(topic):
                raise ValueError(f"{name} has a value for the topic {topic}, which is not one of the input's")
        return self

    @model_validator(mode="after")
    def _has_a_span(self) -> Self:
        if self.until and "group_id" not in self.model_fields_set:
            raise ValueError("until needs a group_id of its own, which no other worker has used; set group_id, too")
        if self.until and self.auto_offset_reset == "latest":
            raise ValueError(
                "until needs auto_offset_reset earliest, for latest begins where the run ends; set since to begin later"
            )
        if self.since and self.until_ms is not None and moment_ms(self.since) >= self.until_ms:
            raise ValueError("since should be before until, or no record lies between them")
        if self.max_age_s and self.until_ms is not None and self.until_ms / 1000 < time.time() - self.max_age_s:
            raise ValueError(
                "max_age_s would skip every record before until, because all of them are older; leave it out, or raise it"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        default, by_topic = input_formats(self.input_format)
        if self.output_mode == "enrich" and {default, *by_topic.values()} != {"json"}:
            raise ValueError("output_mode enrich needs input_format json: a field can be added to a JSON object alone")
        if "avro" in (default, *by_topic.values()) and not self.schema_registry_url:
            raise ValueError("input_format avro needs schema_registry_url: records name their schemas only by ids")
        if self.output_mode == "enrich" and self.output_format == "cloudevents":
            raise ValueError(
                "output_format cloudevents goes with output_mode result: enrich leaves a CloudEvent the event that it was"
            )
        if self.output_format == "avro" and self.output_mode == "enrich":
            raise ValueError("output_mode enrich needs output_format json: it adds a field to the input's own JSON")
        if self.output_format == "avro" and not self.schema_registry_url:
            raise ValueError("output_format avro needs schema_registry_url: results name their schema by its id there")
        if self.output_topic == self.dead_letter_topic:
            raise ValueError("output_topic and dead_letter_topic are the same topic; take two")
        for name in ("output_topic", "dead_letter_topic"):
            if self.reads(getattr(self, name)):
                by = f"matches input_pattern {self.input_pattern!r}" if self.input_pattern else "is one of input_topics"
                raise ValueError(f"{name} {by}: the worker would read what it wrote; take another topic")
        if self.delivery == "exactly-once" and self.isolation_level == "read_uncommitted":
            raise ValueError(
                "delivery exactly-once needs isolation_level read_committed: an aborted input record has no result"
            )
        if self.http_token_for == "all" and not self.http_token:
            raise ValueError("http_token_for all needs http_token, from WORKER_HTTP_TOKEN or WORKER_HTTP_TOKEN_FILE")
        if self.fetch_max_wait_ms >= self.request_timeout_ms:
            raise ValueError("fetch_max_wait_ms should be below request_timeout_ms: an empty fetch would time out")
        return self
