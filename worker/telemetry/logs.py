"""Structured logs: one line a message, as JSON or for a console, with what belongs to it as fields.

The worker's own lines never hold a text; what libraries say, which is told at debug alone, may.
"""

import contextlib
import io
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

from pythonjsonlogger.orjson import OrjsonFormatter

from worker.printable import printable

LIBRARIES = (
    "aiohttp", "aiokafka", "asyncio", "httpx", "huggingface_hub", "onnx_ir", "onnxruntime", "onnxscript",
    "opentelemetry", "root", "torch", "transformers", "urllib3",
)  # fmt: skip
AGAIN_S: Final = 30.0
MOST_LINES: Final = 1_000  # that are remembered
log = logging.getLogger("worker")
_OWN_FIELDS = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class ConsoleFormatter(logging.Formatter):
    """``12:00:00 INFO  message key=value``"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        fields = {name: value for name, value in vars(record).items() if name not in _OWN_FIELDS}
        line = " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())])
        return printable(line)


class JsonFormatter(OrjsonFormatter):
    """One object a line. A line with a field that JSON cannot hold has its fields in Python's notation instead."""

    def __init__(self) -> None:
        names = {"levelname": "level", "name": "logger", "asctime": "time"}
        wanted = " ".join(f"%({name})s" for name in ("asctime", "levelname", "name", "message"))
        super().__init__(wanted, rename_fields=names)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        """As RFC 3339 has it, in UTC, with milliseconds."""
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def jsonify_log_record(self, log_data: dict[str, Any]) -> str:
        try:
            return printable(super().jsonify_log_record(log_data))
        except TypeError:  # an integer beyond 64 bits, half a surrogate pair
            return super().jsonify_log_record({name: ascii(value) for name, value in log_data.items()})


class NotAgain(logging.Filter):
    """Lets what a library says through once in half a minute: its retries say the same again and again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._told: dict[str, float] = {}  # when a line may be told again

    def filter(self, record: logging.LogRecord) -> bool:
        if _is_our_own(record):
            return True
        line, now = f"{record.name} {record.getMessage()}", self._clock()
        if now < self._told.get(line, -math.inf):
            return False
        if len(self._told) >= MOST_LINES:
            self._told.clear()
        self._told[line] = now + AGAIN_S
        return True


def configure(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Sends logs to ``stream`` (default: stderr). ``level`` as in the settings; ``log_format`` auto, console or json.

    The libraries' own loggers are kept quiet unless the level is debug: they repeat every retry, where the worker tells
    of a trouble once and of its end; at debug they say the same once in half a minute. What aiokafka's connections say at
    debug is never logged: each request as it is, the one with the password among them; nor what OpenTelemetry says of a
    header that it cannot read: all of it.
    """
    stream = stream or sys.stderr
    use_console = log_format == "console" or (log_format == "auto" and stream.isatty())
    if isinstance(stream, io.TextIOWrapper) and not use_console:
        stream.reconfigure(encoding="utf-8")  # JSON has no other encoding, whatever the locale's is
    handler = logging.StreamHandler(stream)
    handler.setFormatter(ConsoleFormatter() if use_console else JsonFormatter())
    if level == "debug":
        handler.addFilter(NotAgain())
    else:
        handler.addFilter(_is_our_own)
        # By a handler of torch's own it says at import that triton, which nothing here uses, is not there.
        logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
    logging.getLogger("aiokafka.conn").setLevel(logging.INFO)
    logging.getLogger("opentelemetry.util.re").setLevel(logging.ERROR)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def explain_exit(sentence: str, code: int) -> None:
    """Says why the process ends, last of all: on standard error, as a line of the log where logs are JSON. Never raises."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        log.error("%s", sentence, extra={"exit_code": code})
        return
    with contextlib.suppress(OSError):  # the reader has gone, or the disk is full
        sys.stderr.write(f"sentiment-worker: {sentence}\n")


def whereabouts(error: BaseException) -> dict[str, str]:
    """Kind and place of an error. Not its words, nor a traceback's: they may hold a text."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "at": " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1]),
    }


def _is_our_own(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] not in LIBRARIES or record.levelno >= logging.CRITICAL
