"""Structured logs: one line a message, as JSON or for a console, with what belongs to it as fields. Never a text."""

import logging
import sys
from typing import Any, TextIO

from pythonjsonlogger.orjson import OrjsonFormatter

LIBRARIES = ("aiokafka", "asyncio", "aiohttp", "transformers", "huggingface_hub", "httpx", "urllib3")
log = logging.getLogger("worker")
_OWN_FIELDS = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class ConsoleFormatter(logging.Formatter):
    """``12:00:00 INFO  message key=value``"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        fields = {name: value for name, value in vars(record).items() if name not in _OWN_FIELDS}
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())])


def configure(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Sends logs to ``stream`` (default: stderr). ``level`` as in the settings; ``log_format`` auto, console or json.

    The libraries' own loggers are kept quiet unless the level is debug: they repeat every retry, where the worker tells
    of a trouble once and of its end.
    """
    stream = stream or sys.stderr
    use_console = log_format == "console" or (log_format == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(ConsoleFormatter() if use_console else _json_formatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else logging.CRITICAL)


def _json_formatter() -> logging.Formatter:
    options: dict[str, Any] = {
        "rename_fields": {"levelname": "level", "name": "logger", "asctime": "time"},
        "datefmt": "%Y-%m-%dT%H:%M:%S%z",
    }
    return OrjsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", **options)
