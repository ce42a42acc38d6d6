"""Structured logs: one line for each message, with its fields, as JSON or for a terminal.

The worker's own lines never hold a text. Those of libraries may, and are logged at debug alone.
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
    "aiohttp", "aiokafka", "asyncio", "boto3", "botocore", "httpx", "huggingface_hub", "onnxruntime",
    "opentelemetry", "root", "torch", "transformers", "urllib3",
)  # fmt: skip
REPEAT_S: Final = 30.0  # before the same line of a library is logged again
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
    """One object a line. Where JSON cannot hold a field, all fields of that line are in Python's notation."""

    def __init__(self) -> None:
        names = {"levelname": "level", "name": "logger", "asctime": "time"}
        wanted = " ".join(f"%({name})s" for name in ("asctime", "levelname", "name", "message"))
        super().__init__(wanted, rename_fields=names)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        """RFC 3339, in UTC, with milliseconds."""
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def jsonify_log_record(self, log_data: dict[str, Any]) -> str:
        try:
            return printable(super().jsonify_log_record(log_data))
        except TypeError:  # an integer beyond 64 bits, half a surrogate pair
            return super().jsonify_log_record({name: ascii(value) for name, value in log_data.items()})


class RepeatFilter(logging.Filter):
    """Lets the same line of a library through once in REPEAT_S: retries log the same again and again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._next: dict[str, float] = {}  # when a line may be logged again

    def filter(self, record: logging.LogRecord) -> bool:
        if _is_our_own(record):
            return True
        line, now = f"{record.name} {record.getMessage()}", self._clock()
        if now < self._next.get(line, -math.inf):
            return False
        if len(self._next) >= MOST_LINES:
            self._next.clear()
        self._next[line] = now + REPEAT_S
        return True


def configure(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Sends logs to ``stream`` (default: stderr). ``level`` as in the settings; ``log_format`` auto, console or json.

    Libraries are quiet unless the level is debug: they log every retry, where the worker logs the beginning and the end of a
    failure. At debug each of their lines is logged once in REPEAT_S. Never logged is what aiokafka's connections write at
    debug, because it holds whole requests, the one with the password among them, what AWS's signer writes there, because it
    holds signatures, and what OpenTelemetry writes about a header that it cannot read, because it holds all of the header.
    """
    stream = stream or sys.stderr
    use_console = log_format == "console" or (log_format == "auto" and stream.isatty())
    if isinstance(stream, io.TextIOWrapper) and not use_console:
        stream.reconfigure(encoding="utf-8")  # JSON has no other encoding, whatever the locale's is
    handler = logging.StreamHandler(stream)
    handler.setFormatter(ConsoleFormatter() if use_console else JsonFormatter())
    if level == "debug":
        handler.addFilter(RepeatFilter())
    else:
        handler.addFilter(_is_our_own)
        # When it is imported it warns, by a handler of torch's own, that triton is missing, which nothing here uses.
        logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
        # It warns of each try, for half a minute, before the sentence that says that the hub does not answer.
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    logging.getLogger("aiokafka.conn").setLevel(logging.INFO)
    logging.getLogger("botocore").setLevel(logging.INFO)
    logging.getLogger("opentelemetry.util.re").setLevel(logging.ERROR)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def explain_exit(sentence: str, code: int) -> None:
    """Writes why the process ends to standard error, as a log line where logs are JSON. Never raises."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        log.error("%s", sentence, extra={"exit_code": code})
        return
    with contextlib.suppress(OSError):  # the reader has gone, or the disk is full
        sys.stderr.write(f"sentiment-worker: {sentence}\n")


def error_fields(error: BaseException) -> dict[str, str]:
    """Class and place of an error as fields of a log line, without its message or traceback, which may hold a text."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "at": " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1]),
    }


def _is_our_own(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] not in LIBRARIES or record.levelno >= logging.CRITICAL
