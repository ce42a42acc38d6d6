"""Every option of every command, once: its name, default, bounds, unit and help.

A flag goes before the environment (``WORKER_MAX_BATCH_TEXTS``), which goes before the TOML file (``--config``). Secrets
come from the environment alone, or from the file that ``WORKER_…_FILE`` names.
"""

import difflib
import ipaddress
import os
import re
import time
import tomllib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard, TypeVar, get_args
from urllib.parse import quote, unquote

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSuppress,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from worker.errors import WrongSetting
from worker.printable import printable

PREFIX = "WORKER_"
DEFAULT_TEXT_FIELD = "text"
DEFAULT_MODEL = "cointegrated/rubert-tiny-sentiment-balanced"
SHIELD = "quoted:"  # a word of a list on its way through pydantic-settings, which would split it at commas and quotes
INT32 = 2**31 - 1
SECRETS = ("http_token", "sasl_password", "ssl_key_password")
AGO = re.compile(r"([0-9]{1,6})([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
HOST = re.compile(r"[^\s/\\@?#,]+")
PORT = re.compile(r"[0-9]{1,5}")
PROTOCOL = re.compile(r"[A-Za-z_]+://")
FLAG = re.compile(r"--[A-Za-z_-]+")
NEGATIVE = re.compile(r"-[.0-9]")  # numbers, in the place of flags
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
HTTP_TOKEN = re.compile(r"[!-~]{16,1024}")
TOPIC = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")  # Kafka's own rule (org.apache.kafka.common.internals.Topic)


def is_folder(model: str) -> bool:
    """Whether ``model`` names a folder, by its beginning: any other is a name on the hub, or ``builtin``."""
    return model in (".", "..") or model.startswith(("/", "./", "../", "~"))


def revision_fault(model: str, revision: str | None) -> str | None:
    """Why a model cannot have this revision; None if it can."""
    if revision and (model == "builtin" or is_folder(model)):
        return f"revision is of the hub, and model {model} is not from there; leave it out"
    return None


def revealed(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


def split_names(value: str) -> tuple[str, ...]:
    """``"a, b"`` → ``("a", "b")``."""
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _names(value: str) -> str:
    if not split_names(value):
        raise ValueError("it should name at least one, separated by commas")
    return value


def _is_host(name: str) -> bool:
    try:
        return bool(HOST.fullmatch(name) and name.encode("idna"))
    except UnicodeError:  # an empty label, or one of more than 63 characters
        return False


def _host(value: str) -> str:
    if not _is_host(value):
        raise ValueError("it should be a host's name or address")
    return value


def _once(names: Sequence[str]) -> None:
    """Raises ValueError where one of them is there twice."""
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(f"it should name each one once, and {name} is there twice")


def _host_names(value: str) -> str:
    if not all(HOST_NAME.fullmatch(name) for name in split_names(_names(value))):
        raise ValueError("it should be names of hosts without a port, separated by commas")
    _once(split_names(value.lower()))
    return value


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for a name. An IPv6 address may stand in brackets."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = ip_address(host)
    return address.is_loopback if address else host.lower() == "localhost"


def _servers(value: str) -> str:
    for server in split_names(_names(value)):
        if protocol := PROTOCOL.match(server):
            raise ValueError(
                f"it should be host:port without {protocol[0]}; security_protocol says which protocol it is"
            )
        host, _, port = server.rpartition(":")
        if not _is_host(host) or not PORT.fullmatch(port) or not 0 < int(port) < 65536:
            raise ValueError("it should be host:port, several separated by commas")
    _once(split_names(value.lower()))
    return value


def _topic(value: str) -> str:
    if not TOPIC.fullmatch(value):
        raise ValueError("it should be a topic's name: 1 to 249 letters, digits, dots, underscores or hyphens")
    return value


def _topics(value: str) -> str:
    for name in split_names(_names(value)):
        _topic(name)
    _once(split_names(value))
    return value


def _http_token(value: SecretStr) -> SecretStr:
    if not HTTP_TOKEN.fullmatch(value.get_secret_value()):
        raise ValueError("it should be 16 or more letters, digits and signs, such as `openssl rand -hex 32` prints")
    return value


def _path_in_object(value: str) -> str:
    if not all(value.split(".")):
        raise ValueError("it should be a field's name, or a dotted path such as payload.text")
    return value


def whole_name(pattern: str) -> re.Pattern[str]:
    """For names that match from their first character to their last. Raises re.error."""
    re.compile(pattern)  # by itself: what is wrong with it should not be mended by the parentheses
    return re.compile(rf"(?:{pattern})\Z")


def _pattern(value: str) -> str:
    try:
        whole_name(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it should be a regular expression of Python's, and {error}") from None
    return value


def text_fields(value: str) -> tuple[str, dict[str, str]]:
    """``"text, reviews=data.body"`` → ``("text", {"reviews": "data.body"})``: the path of all other topics, and by topic."""
    words = split_names(value)
    others = [word for word in words if "=" not in word]
    by_topic = [
        (name.strip(), path.strip()) for name, _, path in (word.partition("=") for word in words if "=" in word)
    ]
    return others[0] if others else DEFAULT_TEXT_FIELD, dict(by_topic)


def _text_fields(value: str) -> str:
    words = split_names(_names(value))
    if sum("=" not in word for word in words) > 1:
        raise ValueError("it should be one path for all topics, or topic=path for each, separated by commas")
    default, by_topic = text_fields(value)
    for path in (default, *by_topic.values()):
        _path_in_object(path)
    for topic in by_topic:
        _topic(topic)
    if len(by_topic) < sum("=" in word for word in words):
        raise ValueError("it should name each topic once")
    return value


def _width(value: int) -> int:
    if value >= 128 and value % 64:
        raise ValueError("it should be a multiple of 64, or below 128")
    return value


def _unshielded(words: list[str]) -> list[str]:
    return [
        unquote(word.removeprefix(SHIELD), errors="surrogatepass") if word.startswith(SHIELD) else word
        for word in words
    ]


def _reasons(words: list[str]) -> list[str]:
    from worker.core.events import Reason  # noqa: PLC0415 - it brings numpy, and --help is quick

    reasons = _unshielded(words)
    if not set(reasons) <= set(get_args(Reason)):
        raise ValueError(f"it should be one of {', '.join(get_args(Reason))}")
    _once(reasons)
    return reasons


def _label_map(words: list[str]) -> list[str]:
    mapped = _unshielded(words)
    _once([word.rpartition("=")[0] for word in mapped])
    return mapped


def moment_ms(value: str) -> int:
    """``2026-11-23T10:00Z`` (without a zone: UTC), or how long ago (``30m``), in ms since 1970. Raises ValueError."""
    ago = AGO.fullmatch(value)
    if ago:
        return int((time.time() - int(ago[1]) * SECONDS[ago[2]]) * 1000)
    moment = datetime.fromisoformat(value)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _moment(value: str) -> str:
    try:
        moment_ms(value)
    except (ValueError, OverflowError):
        raise ValueError("it should be a time such as 2026-11-23T10:00Z, or how long ago: 30m, 2h, 7d") from None
    return value


Words = Annotated[list[str], AfterValidator(_unshielded)]
LabelMap = Annotated[list[str], AfterValidator(_label_map)]
Columns = Annotated[
    Words, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]  # in a TOML file
Reasons = Annotated[list[str], AfterValidator(_reasons)]
Moment = Annotated[str, AfterValidator(_moment)]
Servers = Annotated[str, AfterValidator(_servers)]
Topic = Annotated[str, AfterValidator(_topic)]
Topics = Annotated[str, AfterValidator(_topics)]
Pattern = Annotated[str, AfterValidator(_pattern)]
TextFields = Annotated[str, AfterValidator(_text_fields)]
HostNames = Annotated[str, AfterValidator(_host_names)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FieldPath = Annotated[str, AfterValidator(_path_in_object)]


def _flaw(value: object) -> str | None:
    """Why no setting can have this value, as far as that can be told of all of them alike; None if one can."""
    words = _unshielded(value) if _is_words(value) else [value] if isinstance(value, str) else []
    for word in words:
        if not word:
            return "it should not be empty"
        control = CONTROL.search(word)
        if control and word.endswith("\r"):
            return "it should not end with a carriage return (CR), as the lines of a Windows text file do"
        if control:
            return f"it should have no control characters, and character {control.start() + 1} is {control[0]!a}"
    return None


def _unseen(name: str) -> str | None:
    """Which character at the ends of a name, or in it, does not show, so that the name is not what it looks like."""
    if name != name.strip():
        white = name[0] if name[0].isspace() else name[-1]
        return f"it should not {'begin' if name[0].isspace() else 'end'} with white space, and this is {white!a}"
    unseen = next(((at, each) for at, each in enumerate(name, 1) if unicodedata.category(each) == "Cf"), None)
    return f"it should have no invisible characters, and character {unseen[0]} is {unseen[1]!a}" if unseen else None


def _takes(annotation: object, *kinds: type) -> bool:
    return annotation in kinds or any(_takes(each, *kinds) for each in get_args(annotation))


class Settings(BaseSettings):
    """What every command's settings share: where values come from."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        protected_namespaces=(),
        case_sensitive=True,  # else flags are taken in any case, and cut at a line end
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
        cli_parse_none_str="–",
    )

    config: Path | None = Field(None, description="TOML file of settings, by the names below with underscores")

    @field_validator("*", mode="before")
    @classmethod
    def _is_plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses empty words and control characters in all settings, and what does not show in names and paths.

        Texts to score, patterns, the words of lists and secrets may have what does not show: they are of others' making.
        """
        name, annotation = str(info.field_name), cls.model_fields[str(info.field_name)].annotation
        flaw = None if name == "texts" else _flaw(value)
        if not flaw and isinstance(value, str) and name != "input_pattern" and _takes(annotation, str, Path):
            flaw = _unseen(value)
        if flaw:
            raise ValueError(flaw)
        if isinstance(value, bool) and _takes(annotation, int, float):
            return str(value).lower()  # pydantic takes true for 1
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags come first by themselves; ``load`` brings the others."""
        return (init_settings,)


LogLevel = Literal["debug", "info", "warning", "error"]


class LogSettings(Settings):
    log_level: LogLevel = Field("info", description="least severe level logged")
    log_format: Literal["auto", "console", "json"] = Field("auto", description="auto: console on a terminal, else json")


class CheckpointSettings(LogSettings):
    model: str = Field(
        DEFAULT_MODEL,
        description="checkpoint: a folder (named with / or ./ in front), a name on the hub, or builtin (small, for trials)",
    )
    revision: str | None = Field(None, description="the hub's branch, tag or commit; default: the newest")
    activation: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="logits to probabilities; sigmoid is the default model's card"
    )
    normalize: Literal["nfc", "none"] = Field(
        "nfc",
        description="nfc: before a text is tokenized, stress marks are dropped and letters composed (й, ё of two "
        "characters); none: it is left as it is, as on the default model's card",
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto (cuda, else cpu), cpu, cuda, cuda:N"
    )
    cpu_threads: Annotated[int, Field(ge=1, le=1_024)] | Literal["auto"] = Field(
        "auto", description="threads of the network on CPU; auto: measured at the start"
    )

    @model_validator(mode="after")
    def _has_a_revision(self) -> Self:
        fault = revision_fault(self.model, self.revision)
        if fault:
            raise ValueError(fault)
        return self


class ModelSettings(CheckpointSettings):
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto",
        description="numbers of the network; auto: on a CPU float32, on a GPU float16 where 99.9 % of labels are "
        "expected to stay, by the shipped reviews, else float32 with TF32; all but plain float32 may change a label now and "
        "then",
    )
    backend: Literal["auto", "torch", "onnx"] = Field(
        "auto", description="what runs the network on a CPU; auto: the faster one of those that are installed"
    )
    max_batch_tokens: Annotated[int, Field(ge=1, le=INT32)] | Literal["auto"] = Field(
        "auto", description="tokens in one pass of the network, padding included; auto: measured at the start"
    )


class ConnectionSettings(LogSettings):
    """How to reach the brokers."""

    bootstrap_servers: Servers = Field("localhost:9092", description="brokers, host:port, separated by commas")
    client_id: str = Field("sentiment-worker", description="name of this client in the brokers' logs")
    request_timeout_ms: int = Field(30_000, ge=1_000, le=INT32, description="for one request to a broker, ms")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to the brokers"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(None, description="how to log in")
    sasl_username: str | None = Field(
        None,
        description="who logs in; the password is in WORKER_SASL_PASSWORD or the file WORKER_SASL_PASSWORD_FILE names",
    )
    sasl_password: CliSuppress[SecretStr | None] = None
    ssl_cafile: Path | None = Field(
        None, description="authorities that vouch for the brokers, PEM; default: the system's"
    )
    ssl_certfile: Path | None = Field(None, description="this client's certificate, PEM")
    ssl_keyfile: Path | None = Field(
        None,
        description="this client's key, PEM; its password, if it has one, is in WORKER_SSL_KEY_PASSWORD or the file "
        "WORKER_SSL_KEY_PASSWORD_FILE names",
    )
    ssl_key_password: CliSuppress[SecretStr | None] = None

    @model_validator(mode="after")
    def _is_secured_as_a_whole(self) -> Self:
        if self.security_protocol.startswith("SASL") != (self.sasl_mechanism is not None):
            raise ValueError(
                "sasl_mechanism goes with security_protocol SASL_PLAINTEXT or SASL_SSL: set both or neither"
            )
        if self.sasl_mechanism and not (self.sasl_username and self.sasl_password):
            raise ValueError(
                "sasl_mechanism needs sasl_username, and sasl_password from WORKER_SASL_PASSWORD or …_FILE"
            )
        if self.sasl_username and not self.sasl_mechanism:
            raise ValueError("sasl_username goes with sasl_mechanism and security_protocol SASL_PLAINTEXT or SASL_SSL")
        for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            if getattr(self, name) and not self.security_protocol.endswith("SSL"):
                raise ValueError(
                    f"{name} goes with security_protocol SSL or SASL_SSL; without them nothing is encrypted"
                )
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("ssl_keyfile needs ssl_certfile")
        for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            path: Path | None = getattr(self, name)
            if path and not path.is_file():
                raise ValueError(f"{name} should be a PEM file, and {path} is none")
        return self


class EventSettings(ConnectionSettings):
    """What both the worker and a replay know about events."""

    dead_letter_topic: Topic = Field("sentiment.dead-letter", description="topic for what cannot be scored")
    group_id: str = Field("sentiment-worker", description="consumer group")
    input_format: Literal["json", "text"] = Field("json", description="json: an object with text; text: UTF-8")
    id_field: FieldPath = Field("id", description="where the event's id is; a dotted path reaches inside")


class RunSettings(ModelSettings, EventSettings):
    """Read text events from Kafka, publish their sentiment, commit."""

    input_topics: Topics | None = Field("texts", description="topics to read, separated by commas")
    input_pattern: Pattern | None = Field(
        None,
        description="instead: all topics whose whole name matches this regular expression, also those that come later",
    )
    output_topic: Topic = Field("sentiment", description="topic for results")
    group_instance_id: str | None = Field(
        None, description="static membership: a name of this process's own in the group"
    )
    auto_offset_reset: Literal["earliest", "latest"] = Field(
        "earliest", description="where to begin when the group has no offset, or it is gone"
    )
    isolation_level: Literal["read_committed", "read_uncommitted"] = Field(
        "read_committed", description="whether to skip records of aborted transactions"
    )
    delivery: Literal["at-least-once", "exactly-once"] = Field(
        "at-least-once",
        description="delivery guarantee; exactly-once: by transactions, for readers with read_committed",
    )
    transaction_ms: float = Field(
        100, ge=0, le=10_000, description="with exactly-once, a partition's results are committed so often, ms"
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
    output_format: Literal["json", "cloudevents"] = Field(
        "json", description="cloudevents: results are CloudEvents too, their attributes in the headers"
    )
    max_text_chars: int = Field(100_000, ge=1, description="longer texts become dead letters, characters")
    dead_letter_limit: float = Field(
        0.5, ge=0, le=1, description="share of dead letters among the newest records that ends the worker; 0: none does"
    )
    dead_letter_window: int = Field(1_000, ge=1, le=INT32, description="of at least so many records, records")
    compression_type: Literal["none", "gzip", "snappy", "lz4", "zstd"] = Field(
        "none", description="of what is published"
    )
    max_batch_texts: int = Field(512, ge=1, le=100_000, description="a micro-batch closes at so many records")
    linger_ms: float = Field(10, ge=0, le=60_000, description="or so long after its oldest record arrived, ms")
    max_unpacked_bytes: int = Field(
        256 * 2**20,
        ge=128 * 2**20,
        description="what compressed batches may hold unpacked, all together, bytes",
    )
    cache_size: int = Field(
        65_536, ge=0, description="results kept for repeated texts, half of them for certain; 0: none"
    )
    inference_timeout_s: Seconds = Field(60, description="a device batch that takes longer is hung, s")
    drain_timeout_s: Seconds = Field(20, description="to finish what is in flight at SIGTERM, s")
    http_host: Annotated[str, AfterValidator(_host)] = Field(
        "127.0.0.1", description="address for the console, /metrics, /livez, /readyz"
    )
    http_port: int = Field(8080, ge=0, le=65_535, description="its port; 0: any free one")
    http_names: HostNames | None = Field(
        None,
        description="names by which browsers and clients may ask for it, beside localhost and IP addresses: a service's, "
        "an Ingress's or a proxy's, separated by commas",
    )
    http_token: CliSuppress[Annotated[SecretStr, AfterValidator(_http_token)] | None] = None
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
    session_timeout_ms: int = Field(45_000, ge=1_000, le=INT32, description="group membership without a heartbeat, ms")
    fetch_max_wait_ms: int = Field(500, ge=1, le=INT32, description="a broker with nothing new answers after, ms")

    @property
    def topics(self) -> tuple[str, ...]:
        """The input topics that are named; none where there is a pattern."""
        return split_names(self.input_topics or "")

    def exposures(self) -> Iterator[str]:
        """A sentence for each thing that these settings leave open to others on the network."""
        if self.security_protocol == "SASL_PLAINTEXT":
            seen = "the password and every record" if self.sasl_mechanism == "PLAIN" else "every record"
            yield (
                "nothing is encrypted with security_protocol SASL_PLAINTEXT: "
                f"whoever is on the way to the brokers reads {seen}; use SASL_SSL"
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
        for topic in text_fields(self.text_field)[1]:
            if not self.reads(topic):
                raise ValueError(f"text_field has a path for the topic {topic}, which is not one of the input's")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.output_mode == "enrich" and self.input_format == "text":
            raise ValueError("output_mode enrich needs input_format json: a plain text has no fields")
        if self.output_mode == "enrich" and self.output_format == "cloudevents":
            raise ValueError(
                "output_format cloudevents goes with output_mode result: enrich leaves a CloudEvent the event that it was"
            )
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


class ReplaySettings(EventSettings):
    """Send dead letters back to the topics that they came from, each once."""

    log_level: LogLevel = Field("warning", description="least severe level logged")
    reason: Reasons = Field([], description="only dead letters of this reason; may be repeated; default: all")
    since: Moment | None = Field(
        None, description="only those written from then on: 2026-11-23T10:00Z, or how long ago: 30m, 2h, 7d"
    )
    until: Moment | None = Field(None, description="only those written before then, likewise")
    dry_run: bool = Field(False, description="count them, and send nothing")
    replay_group_id: str | None = Field(
        None, description="consumer group that remembers what has been replayed; default: group_id.replay"
    )

    @model_validator(mode="after")
    def _has_a_span(self) -> Self:
        if self.since and self.until and moment_ms(self.since) >= moment_ms(self.until):
            raise ValueError("since should be before until: nothing can be both")
        return self

    @model_validator(mode="after")
    def _has_a_group(self) -> Self:
        if self.replay_group_id == self.group_id:
            raise ValueError(
                "replay_group_id is the workers' group_id: they would share out the dead letters; take another"
            )
        return self


class ClassifySettings(ModelSettings):
    """Score texts: arguments, or the lines of a file or of standard input (-). One JSON line each."""

    log_level: LogLevel = Field("warning", description="least severe level logged")
    texts: CliPositionalArg[Words] = Field(
        [],
        description="texts to score, those that begin with -- behind a -- of its own; - for the lines of standard input",
    )
    file: Path | None = Field(None, description="score the lines of this file: UTF-8, or UTF-16 with a byte order mark")


class BenchSettings(CheckpointSettings):
    """This machine's speed with this model, and the settings to use. No Kafka."""

    model_config = SettingsConfigDict(populate_by_name=True)

    log_level: LogLevel = Field("warning", description="least severe level logged")
    file: Path | None = Field(
        None, description="texts, one a line, read as classify reads them; default: product reviews"
    )
    seconds: float = Field(1, gt=0, le=600, description="of measuring for each figure, s")
    json_output: bool = Field(False, alias="json", description="print JSON")


class CorpusSettings(Settings):
    """Labelled CSV files, for the commands that read them."""

    source: Words = Field([], description="NAME=PATH of a labelled CSV file; may be repeated")
    label_map: LabelMap = Field(
        [],
        description="NAME:RAW=CLASS, what a label of a source means, or NAME:RAW= to drop its rows; may be repeated",
    )
    text_column: Columns = Field(
        [],
        description="column of the text: COLUMN, or NAME=COLUMN for one source; may be repeated; default: text",
    )
    label_column: Columns = Field([], description="column of the label, likewise; default: label")
    hold_out_by: Literal["normalized", "exact"] | None = Field(
        None,
        description="which rows train leaves out, by the hash of the text: normalized (near copies stay together: case, ё "
        "and е, stress marks and spaces make no difference) or exact (as it is in the file); default: exact for builtin, "
        "whose rows were held out so, else normalized",
    )

    def rows_held_out_by(self, checkpoint: str | None) -> Literal["normalized", "exact"]:
        """``hold_out_by``, or what goes with the checkpoint that is measured or fine-tuned."""
        return self.hold_out_by or ("exact" if checkpoint == "builtin" else "normalized")


class EvaluateSettings(ModelSettings, CorpusSettings):
    """Macro-F1 per source and overall, with the confusion matrix, on labelled CSV files."""

    log_level: LogLevel = Field("warning", description="least severe level logged")
    held_out_only: bool = Field(False, description="only the rows that train leaves out")
    format: Literal["table", "json"] = Field("table", description="what is printed")


class TrainSettings(CorpusSettings):
    """A checkpoint by the model card's recipe: a base fine-tuned, or a new small network."""

    output: Path = Field(description="folder for the checkpoint; files of the same names are replaced")
    base: str | None = Field(
        None,
        description="checkpoint to fine-tune: a folder (named with / or ./ in front), or a hub name; default: a new network",
    )
    seed: int = Field(1, description="with the same seed, machine and threads a CPU gives the same figures again")
    epochs: int = Field(2, ge=1, description="passes over the balanced rows in fine-tuning")
    batch_texts: int = Field(64, ge=1, description="texts a step")
    learning_rate: float | None = Field(
        None, gt=0, description="peak; default: 5e-4 for a new network, 3e-5 for a base"
    )
    max_tokens: int = Field(256, ge=8, description="texts are cut to so many tokens")
    examples_per_class: int | None = Field(None, ge=1, description="after balancing; default: a third of the rows")
    max_repeats: int = Field(5, ge=1, description="times that a row may stand in one epoch, where balancing repeats it")
    token_masking: float = Field(0.1, ge=0, lt=1, description="share of tokens hidden in fine-tuning")
    consistency: float = Field(1.0, ge=0, description="weight of keeping two dropout passes close (R-Drop)")
    averaging: float = Field(0.99, ge=0, lt=1, description="decay a step of the running mean of the weights")
    pretrain_epochs: int = Field(12, ge=0, description="new network: passes with masked tokens first")
    pretrain_learning_rate: float = Field(1e-3, gt=0, description="new network: peak of those passes")
    pretrain_masking: float = Field(0.2, gt=0, lt=1, description="new network: share of tokens to guess")
    pretrain_summary: float = Field(0.5, ge=0, description="new network: weight of guessing all tokens from [CLS]")
    pretrain_max_tokens: int = Field(128, ge=8, description="new network: tokens a text is cut to in those passes")
    vocabulary: int = Field(8000, ge=100, description="new network: WordPieces")
    layers: int = Field(2, ge=1, description="new network: transformer layers")
    hidden: Annotated[int, AfterValidator(_width)] = Field(
        128, ge=1, description="new network: width, a multiple of 64 or below 128"
    )
    storage: Literal["float16", "float32"] = Field("float16", description="how weights are stored")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="what training computes in")
    threads: int = Field(0, ge=0, description="CPU threads; 0: torch's default")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto (cuda, else cpu), cpu, cuda, cuda:N"
    )
    development: bool = Field(False, description="measure on development rows, to choose a recipe by")


class DemoSettings(Settings):
    """The whole thing on an embedded broker: real texts, the real worker, the small built-in model."""

    events: int = Field(700, ge=1, description="events to replay")
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(50, description="events per second")
    plain: bool = Field(False, description="lines instead of the live view")
    keep_running: bool = Field(False, description="go on until Ctrl-C")


AnySettings = TypeVar("AnySettings", bound=Settings)


def load(
    kind: type[AnySettings], argv: Sequence[str], prog: str, environ: Mapping[str, str] = os.environ
) -> AnySettings:
    """Settings of one kind from flags, environment and file. A variable that is empty sets nothing, unless it is a secret.

    Raises WrongSetting with one sentence. ``--help`` prints and raises SystemExit(0). Reads the file; does not block
    otherwise.
    """
    arguments = _arguments(kind, argv, prog)
    values: dict[str, Any] = {"_cli_parse_args": arguments, "_cli_prog_name": prog}
    if not {"-h", "--help"} & set(arguments):
        values |= _file_values(kind, _config_path(arguments, environ))
        values |= _variable_values(kind, environ) | _secret_values(kind, environ)
    try:
        return kind(**values)
    except ValidationError as error:
        raise WrongSetting(*_sentences(kind, error.errors())) from None
    except SettingsError:
        raise WrongSetting(f"the command line cannot be read; `{prog} --help` lists the flags") from None


def unknown_variables(kind: type[Settings], environ: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each ``WORKER_…`` variable that sets nothing: a warning, for Kubernetes injects some of its own.

    What sets something of a worker is known to all commands: they may share its environment.
    """
    names = {*kind.model_fields, *RunSettings.model_fields, *(f"{name}_file" for name in SECRETS)}
    known = {PREFIX + name.upper() for name in names}
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    return [f"the variable {printable(name)} sets nothing{_perhaps(name, names, _variable)}" for name in unknown]


def _is_list(kind: type[Settings], name: str) -> bool:
    return name in kind.model_fields and kind.model_fields[name].annotation == list[str]


def _is_words(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _flags(kind: type[Settings]) -> dict[str, str | None]:
    """Each flag with the name of the setting that its value is of; None for those without a value."""
    flags: dict[str, str | None] = {"-h": None, "--help": None}
    for name, field in kind.model_fields.items():
        if name in (*SECRETS, "texts"):
            continue
        is_switch = field.annotation is bool
        for each in (name, field.alias or name):
            flags[_flag(each)] = None if is_switch else name
            if is_switch:
                flags[_flag(f"no_{each}")] = None
    return flags


def _arguments(kind: type[Settings], argv: Sequence[str], prog: str) -> list[str]:
    """The command line with a flag and its value as one word, the words of lists quoted: argparse leaves them as they are.

    Raises WrongSetting for what is no flag of ``kind``, by its name alone: the rest of it may be a secret.
    """
    flags, arguments, rest = _flags(kind), list[str](), iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        if word == "--" and "texts" in kind.model_fields:
            return [*arguments, word, *map(_shield, rest)]
        if flag not in flags and not word.startswith("--") and "texts" in kind.model_fields:
            arguments.append(_shield(word))
            continue
        if flag not in flags:
            raise WrongSetting(_no_flag(flag, [*flags, *map(_flag, SECRETS)], prog))
        name = flags[flag]
        if name is None and equals:
            raise WrongSetting(f"{flag} takes no value; `{prog} --help` lists the flags")
        if name and not equals:
            value = next(rest, "--")
            if value.startswith("-") and value != "-" and not NEGATIVE.match(value):
                raise WrongSetting(f"{flag} needs a value; `{prog} --help` lists the flags")
        if name and _is_list(kind, name):
            value = _shield(value)
        arguments.append(f"{flag}={value}" if name else flag)
    return arguments


def _no_flag(word: str, flags: Iterable[str], prog: str) -> str:
    """What is printed of the word is what can be a flag's name: any other may be a secret."""
    name = FLAG.match(word)
    what = f"{name[0]} is no flag" if name else "the command line has a word that is no flag"
    return f"{what}{_perhaps(name[0] if name else word, flags, _flag)}; `{prog} --help` lists the flags"


def _shield(word: str) -> str:
    return SHIELD + quote(word, safe="", errors="surrogatepass")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _perhaps(written: str, names: Iterable[str], shown: Callable[[str], str]) -> str:
    """What to add to a sentence on a name that is none: the name that is most like it, as it would be written there."""
    name = written.removeprefix(PREFIX).strip("-").replace("-", "_").lower()
    known = {each.strip("-").replace("-", "_") for each in names}
    (close,) = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8) or ("",)
    if close in SECRETS and shown is not _variable:
        return f"; {_secret_sentence(close)}"
    return f"; perhaps {shown(close)} is meant" if close else ""


def _config_path(arguments: Sequence[str], environ: Mapping[str, str]) -> Path | None:
    """The last flag's, as of the other settings, else the variable's. Raises WrongSetting."""
    given = [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]
    path = given[-1] if given else environ.get(_variable("config")) or None
    if path is None:
        return None
    if flaw := _flaw(path) or _unseen(path):
        raise WrongSetting(f"config = {path!r} is wrong: {flaw}")
    return Path(path)


def _file_values(kind: type[Settings], path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise WrongSetting(f"config: {path} cannot be read ({error.strerror}); it should be a TOML file") from None
    except UnicodeDecodeError:
        raise WrongSetting(f"config: {path} is not in UTF-8, as TOML has to be; save it in that encoding") from None
    except tomllib.TOMLDecodeError as error:
        raise WrongSetting(f"config: {path} is not valid TOML: {error}") from None
    if issubclass(kind, EventSettings):  # one file for the worker and its replays
        others = RunSettings.model_fields.keys() - kind.model_fields.keys() - set(SECRETS)
        values = {name: value for name, value in values.items() if name not in others}
    for name, value in values.items():
        if name in SECRETS:
            raise WrongSetting(f"config: {_secret_sentence(name)}")
        if name not in kind.model_fields or name == "config":
            raise WrongSetting(f"config: {path} sets {name}, which is no setting; {_hint(kind, name, value)}")
    return {
        name: ",".join(map(str, value)) if isinstance(value, list) and not _is_list(kind, name) else value
        for name, value in values.items()
    }


def _hint(kind: type[Settings], name: str, value: object) -> str:
    if isinstance(value, dict):
        return "settings stand at the top of the file, in no table"
    perhaps = _perhaps(name, kind.model_fields.keys() - {"config"}, str).removeprefix("; ")
    return perhaps or "`sentiment-worker run --help` lists them"


def _secret_sentence(name: str) -> str:
    return f"{name} is a secret: set {_variable(name)} or {_variable(name)}_FILE"


def _variable_values(kind: type[Settings], environ: Mapping[str, str]) -> dict[str, Any]:
    given = {name: environ.get(_variable(name)) for name in kind.model_fields}
    given = {name: value for name, value in given.items() if value or (value == "" and name in SECRETS)}
    return {name: [value] if _is_list(kind, name) else value for name, value in given.items()}


def _secret_values(kind: type[Settings], environ: Mapping[str, str]) -> dict[str, str]:
    values = {}
    for name in SECRETS:
        variable = _variable(name)
        path = environ.get(variable + "_FILE")
        if path is None or name not in kind.model_fields:
            continue
        if variable in environ:
            raise WrongSetting(f"{variable} and {variable}_FILE are both set; set one of them")
        if flaw := _flaw(path) or _unseen(path):
            raise WrongSetting(f"{variable}_FILE = {path!r} is wrong: {flaw}")
        try:
            values[name] = Path(path).read_text(encoding="utf-8-sig").rstrip("\r\n")
        except (OSError, UnicodeDecodeError):
            raise WrongSetting(f"{variable}_FILE: {path} cannot be read; it should be a file with the secret") from None
    return values


def _sentences(kind: type[Settings], errors: list[ErrorDetails]) -> list[str]:
    """A sentence for each wrong setting of a validation."""
    firsts = {error["loc"][:1] or error["msg"]: at for at, error in reversed(list(enumerate(errors)))}
    return [_sentence(kind, errors[at:]) for at in sorted(firsts.values())]


def _sentence(kind: type[Settings], errors: list[ErrorDetails]) -> str:
    """The first wrong setting of a validation, as one sentence without the values of secrets."""
    first = errors[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    name = str(first["loc"][0])
    wants = " or ".join(dict.fromkeys(_wish(error) for error in errors if error["loc"][:1] == first["loc"][:1]))
    if name not in kind.model_fields:
        return f"{name} is no setting; `--help` lists them"
    given = "" if name in SECRETS or first["type"] == "missing" else f" = {_as_given(first['input'])}"
    variable = _variable(name)
    where = f"variable {variable} or {variable}_FILE" if name in SECRETS else f"flag {_flag(name)}, variable {variable}"
    return f"{name}{given} is wrong: {wants} ({where})"


def _as_given(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(_unshielded(value) if _is_words(value) else value)


WISHES = {  # by pydantic's types of errors
    "bool_parsing": "it should be true or false",
    "bool_type": "it should be true or false",
    "finite_number": "it should be a finite number",
    "float_parsing": "it should be a number",
    "float_type": "it should be a number",
    "greater_than": "it should be greater than {gt:g}",
    "greater_than_equal": "it should be greater than or equal to {ge:.15g}",
    "int_from_float": "it should be a whole number",
    "int_parsing": "it should be a whole number",
    "int_parsing_size": "it should be a whole number",
    "int_type": "it should be a whole number",
    "less_than": "it should be less than {lt:g}",
    "less_than_equal": "it should be less than or equal to {le:.15g}",
    "list_type": "it should be a list",
    "literal_error": "it should be {expected}",
    "missing": "it has to be given",
    "path_type": "it should be a path",
    "string_pattern_mismatch": "it should be auto, cpu, cuda or cuda:N",  # the one pattern that there is
    "string_type": "it should be text",
    "string_unicode": "it should be text in UTF-8",
    "value_error": "{error}",
}


def _wish(error: ErrorDetails) -> str:
    wish = WISHES.get(error["type"], "it should be another value").format(**error.get("ctx", {}))
    is_a_switch = wish.endswith("number") and str(error["input"]) in ("true", "false")
    return f"{wish}, not {error['input']}" if is_a_switch else wish
