"""What a log line looks like, and whose are kept quiet."""

import io
import json
import logging
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from aiokafka.protocol.admin import SaslAuthenticateRequest_v1

from worker.telemetry import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def configured(level: str = "info", log_format: str = "json", stream: io.StringIO | None = None) -> io.StringIO:
    stream = stream or io.StringIO()
    logs.configure(level, log_format, stream)
    return stream


def json_lines(stream: io.StringIO) -> list[dict[str, Any]]:
    text = stream.getvalue()
    assert text.endswith("\n")
    lines = [json.loads(line) for line in text.removesuffix("\n").split("\n")]
    assert all(isinstance(line, dict) for line in lines)
    return lines


def test_a_json_line_has_time_level_logger_message_and_the_fields() -> None:
    stream = configured()
    fields = {"partition": 3, "offset": 1201, "counts": {"ж": 1}, "seconds": 0.5, "why": None}
    logging.getLogger("worker.kafka.sink").warning("published %d «%s»", 7, "да", extra=fields)
    (line,) = json_lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]), "RFC 3339"
    time = datetime.fromisoformat(line.pop("time"))
    assert time.tzinfo is not None
    assert abs(datetime.now(time.tzinfo) - time).total_seconds() < 60
    assert line == {"level": "WARNING", "logger": "worker.kafka.sink", "message": "published 7 «да»", **fields}


def test_json_is_one_object_a_line_whatever_the_message() -> None:
    stream = configured()
    log = logging.getLogger("worker.x")
    log.info('two\nlines "quoted" \u2028\x9b \\ \x00', extra={"reason": "a\nb"})
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("failed")
    log.info("a folder", extra={"path": Path("/x"), "error": ValueError("x"), "bytes": b"\xff", "nan": float("nan")})
    first, second, third = json_lines(stream)
    assert first["message"] == 'two\nlines "quoted" \u2028\x9b \\ \x00'
    assert stream.getvalue().replace("\n", "").isprintable()
    assert first["reason"] == "a\nb"
    assert "ValueError: first\nsecond" in second["exc_info"]
    assert (third["path"], third["nan"]) == ("/x", None)


def test_json_is_utf_8_whatever_the_locale() -> None:
    file = io.BytesIO()
    logs.configure("info", "json", io.TextIOWrapper(file, encoding="latin-1", errors="backslashreplace"))
    logging.getLogger("worker").info("«да» é")
    assert json.loads(file.getvalue())["message"] == "«да» é"


def test_why_the_process_ends_is_told_as_the_log_is(capsys: pytest.CaptureFixture[str]) -> None:
    stream = configured()
    logs.explain_exit("it is wrong", 2)
    (line,) = json_lines(stream)
    assert (line["level"], line["message"], line["exit_code"]) == ("ERROR", "it is wrong", 2)
    configured(log_format="console")
    logs.explain_exit("it is wrong", 2)
    assert capsys.readouterr().err == "sentiment-worker: it is wrong\n"


def test_a_console_line_has_the_fields_behind_the_message() -> None:
    stream = configured(log_format="console")
    logging.getLogger("worker.kafka.sink").warning("published %d", 7, extra={"partition": 3, "offset": 1201})
    logging.getLogger("worker.kafka.sink").info("plain")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING published 7 partition=3 offset=1201", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    plain", second)


def test_a_console_line_stays_one_line() -> None:
    stream = configured(log_format="console")
    logging.getLogger("worker").warning("two\nlines", extra={"why": "a\r\nb\x1b[31m"})
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(r"two\nlines why=a\r\nb\u001b[31m")


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, "\udc80"])
def test_a_line_with_what_json_cannot_hold_is_not_lost(value: object) -> None:
    stream = configured()
    logging.getLogger("worker").warning("odd", extra={"value": value})
    (line,) = json_lines(stream)
    assert (line["message"], line["value"]) == ("'odd'", ascii(value))


def test_auto_is_console_on_a_terminal_and_json_elsewhere() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        configured(log_format="auto", stream=stream)
        logging.getLogger("worker").info("hello")
    assert not terminal.getvalue().startswith("{")
    assert json_lines(file)[0]["message"] == "hello"


def test_json_is_json_on_a_terminal_too() -> None:
    terminal = Terminal()
    configured(log_format="json", stream=terminal)
    logging.getLogger("worker").info("hello")
    assert json_lines(terminal)[0]["message"] == "hello"


def test_logs_go_to_standard_error_alone(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logging.getLogger("worker").info("hello")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert json.loads(printed.err)["message"] == "hello"


@pytest.mark.parametrize(
    ("level", "told"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_what_is_below_the_level_is_not_told(level: str, told: list[str]) -> None:
    stream = configured(level)
    for name in ("debug", "info", "warning", "error"):
        logging.getLogger("worker.x").log(getattr(logging, name.upper()), name)
    assert [line["message"] for line in json_lines(stream)] == told


@pytest.mark.parametrize("library", ["aiokafka.consumer.group_coordinator", "asyncio", "aiohttp.server"])
def test_the_libraries_repeat_their_retries_only_at_debug(library: str) -> None:
    quiet = configured("info")
    logging.getLogger(library).error("again")
    assert quiet.getvalue() == ""
    loud = configured("debug")
    logging.getLogger(library).error("again")
    assert json_lines(loud)[0]["message"] == "again"
    logging.getLogger(library).setLevel(logging.ERROR)  # as transformers does when it is imported
    quiet_again = configured("warning")
    logging.getLogger(library).error("again")
    assert quiet_again.getvalue() == ""


def test_a_librarys_retry_is_told_once_in_half_a_minute_and_the_workers_own_lines_always() -> None:
    now = [0.0]
    told = logs.RepeatFilter(clock=lambda: now[0])

    def is_told(name: str, line: str) -> bool:
        return bool(told.filter(logging.makeLogRecord({"name": name, "levelno": logging.ERROR, "msg": line})))

    assert is_told("aiokafka", "again")
    assert not is_told("aiokafka", "again")
    assert is_told("aiokafka", "another")
    assert is_told("aiokafka.cluster", "again")
    assert [is_told("worker", "ours") for _ in range(3)] == [True] * 3
    now[0] = logs.REPEAT_S
    assert is_told("aiokafka", "again")
    for number in range(2 * logs.MOST_LINES):
        is_told("aiokafka", f"line {number}")
    assert len(told._next) <= logs.MOST_LINES


def test_configured_again_nothing_is_told_twice() -> None:
    first = configured()
    second = configured()
    logging.getLogger("worker").info("hello")
    assert first.getvalue() == ""
    assert len(json_lines(second)) == 1


def test_requests_to_brokers_are_not_logged_even_at_debug() -> None:
    """One of them holds the password."""
    stream = configured("debug")
    request = SaslAuthenticateRequest_v1(sasl_auth_bytes=b"user\x00user\x00hunter2")
    logging.getLogger("aiokafka.conn").debug("Request to %s:%d %d: %s", "broker", 9092, 1, request)
    logging.getLogger("aiokafka.consumer").debug("said")
    assert "hunter2" not in stream.getvalue()
    assert "said" in stream.getvalue()
