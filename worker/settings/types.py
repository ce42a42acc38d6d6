"""Types of values: what each takes, and the sentence that says so where a value is refused."""

import math
import re
import time
from collections.abc import Callable, Collection, Sequence
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from worker.reasons import Reason
from worker.settings.base import unquoted
from worker.settings.values import AGO, input_formats, moment_ms, pairs, split_names, text_fields, whole_name

INT32 = 2**31 - 1
HOST = re.compile(r"[^\s/\\@?#,]+")
PORT = re.compile(r"[0-9]{1,5}")
PROTOCOL = re.compile(r"[A-Za-z_]+://")
HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
HTTP_TOKEN = re.compile(r"[!-~]{16,1024}")
TOPIC = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")  # Kafka's own rule (org.apache.kafka.common.internals.Topic)


def _should(do: str, is_right: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A validator that takes what ``is_right`` accepts; ``do`` says what a value should be or do, for the sentence."""

    def checked(value: Any) -> Any:
        if not is_right(value):
            raise ValueError(f"it should {do}")
        return value

    return checked


def _once(names: Sequence[str]) -> None:
    """Raises ValueError where one of them is there twice."""
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(f"it should name each one once, and {name} is there twice")


_names = _should("name at least one, separated by commas", split_names)


def _is_host(name: str) -> bool:
    try:
        return bool(HOST.fullmatch(name) and name.encode("idna"))
    except UnicodeError:  # an empty label, or one of more than 63 characters
        return False


_host = _should("be a host's name or address", _is_host)


def _host_names(value: str) -> str:
    if not all(HOST_NAME.fullmatch(name) for name in split_names(_names(value))):
        raise ValueError("it should be names of hosts without a port, separated by commas")
    _once(split_names(value.lower()))
    return value


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


_topic = _should("be a topic's name: 1 to 249 letters, digits, dots, underscores or hyphens", TOPIC.fullmatch)
_input_format = _should("be json, text or avro, or topic=format for each topic", ("json", "text", "avro").__contains__)
_path_in_object = _should("be a field's name, or a dotted path such as payload.text", lambda path: all(path.split(".")))
_instance_id = _should(
    "have no slash, which separates group_id and group_instance_id in a transactional id", lambda name: "/" not in name
)
_http_token = _should(
    "be 16 or more letters, digits and signs, such as `openssl rand -hex 32` prints",
    lambda token: HTTP_TOKEN.fullmatch(token.get_secret_value()),
)
_width = _should("be a multiple of 64, or below 128", lambda width: width < 128 or width % 64 == 0)


def _topics(value: str) -> str:
    for name in split_names(_names(value)):
        _topic(name)
    _once(split_names(value))
    return value


def _pattern(value: str) -> str:
    try:
        whole_name(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it should be a regular expression of Python's, and {error}") from None
    return value


def _text_fields(value: str) -> str:
    _check_topics(value, "path", text_fields(_names(value))[1])
    default, by_topic = text_fields(value)
    for path in (default, *by_topic.values()):
        _path_in_object(path)
    return value


def _input_formats(value: str) -> str:
    _check_topics(value, "format", input_formats(_names(value))[1])
    default, by_topic = input_formats(value)
    for each in (default, *by_topic.values()):
        _input_format(each)
    return value


def _check_topics(value: str, what: str, by_topic: Collection[str]) -> None:
    """Raises ValueError unless at most one word of ``value`` is for all topics, and the others are each for one."""
    words = split_names(value)
    if sum("=" not in word for word in words) > 1:
        raise ValueError(f"it should be one {what} for all topics, or topic={what} for each, separated by commas")
    for topic in by_topic:
        _topic(topic)
    if len(by_topic) < sum("=" in word for word in words):
        raise ValueError("it should name each topic once")


def _reasons(words: list[str]) -> list[str]:
    reasons = unquoted(words)
    if not set(reasons) <= set(get_args(Reason)):
        raise ValueError(f"it should be one of {', '.join(get_args(Reason))}")
    _once(reasons)
    return reasons


def _pairs(value: str, right: str) -> tuple[Sequence[str], Sequence[str]]:
    """The first and the second words of pairs. Raises ValueError if a word is no pair, or if a first word comes twice."""
    found, fault = [], ""
    try:
        found = pairs(value)
    except ValueError as error:
        fault = f", and {error}"
    if not found:
        raise ValueError(
            f"it should be {right}, separated by commas, with a backslash before a comma, an equals sign or a backslash "
            f"within a name{fault}"
        )
    _once([first for first, _ in found])
    return [first for first, _ in found], [second for _, second in found]


def _model_labels(value: str) -> str:
    _, names = _pairs(value, "LABEL=NAME for each label that has another name in results")
    _once(names)
    return value


def _label_scores(value: str) -> str:
    _, weights = _pairs(value, "LABEL=WEIGHT for each label that counts")
    for weight in weights:
        if not _is_finite(weight):
            raise ValueError(f"it should give each label a finite number, such as -0.5, and {weight} is not one")
    return value


def _is_finite(number: str) -> bool:
    try:
        return math.isfinite(float(number))
    except ValueError:
        return False


def _label_map(words: list[str]) -> list[str]:
    mapped = unquoted(words)
    _once([word.rpartition("=")[0] for word in mapped])
    return mapped


def _moment(value: str) -> str:
    try:
        moment_ms(value)
    except (ValueError, OverflowError):
        raise ValueError("it should be a time such as 2026-11-23T10:00Z, or how long ago: 30m, 2h, 7d") from None
    return value


def _end(value: str) -> str:
    try:
        is_right = value == "now" or (not AGO.fullmatch(value) and moment_ms(value) <= time.time() * 1000)
    except (ValueError, OverflowError):
        is_right = False
    if not is_right:
        raise ValueError("it should be now, or a time that has passed, such as 2026-11-23T10:00Z")
    return value


Words = Annotated[list[str], AfterValidator(unquoted)]
LabelMap = Annotated[list[str], AfterValidator(_label_map)]
ModelLabels = Annotated[str, AfterValidator(_model_labels)]
LabelScores = Annotated[str, AfterValidator(_label_scores)]
Columns = Annotated[  # a TOML file may have one word in place of a list
    Words, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
Reasons = Annotated[list[str], AfterValidator(_reasons)]
Moment = Annotated[str, AfterValidator(_moment)]
End = Annotated[str, AfterValidator(_end)]
Servers = Annotated[str, AfterValidator(_servers)]
Topic = Annotated[str, AfterValidator(_topic)]
Topics = Annotated[str, AfterValidator(_topics)]
Pattern = Annotated[str, AfterValidator(_pattern)]
InputFormats = Annotated[str, AfterValidator(_input_formats)]
TextFields = Annotated[str, AfterValidator(_text_fields)]
HostNames = Annotated[str, AfterValidator(_host_names)]
Host = Annotated[str, AfterValidator(_host)]
HttpToken = Annotated[SecretStr, AfterValidator(_http_token)]
InstanceId = Annotated[str, AfterValidator(_instance_id)]
FieldPath = Annotated[str, AfterValidator(_path_in_object)]
Width = Annotated[int, AfterValidator(_width)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
LogLevel = Literal["debug", "info", "warning", "error"]

# A file that is missing is refused, for a misspelled name would be waited for without end. `isfile` also says no, and raises
# nothing, where a folder on the way may not be entered.
PemFile = Annotated[Path, AfterValidator(_should("be a PEM file that is there at the start", isfile))]
TokenPath = Annotated[Path, AfterValidator(_should("be a file with a token that is there at the start", isfile))]
