"""``sentiment-worker classify``: texts in, one JSON line each out, as in the result record. No Kafka."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import orjson

from worker.events import is_empty, iso_time, result_fields
from worker.model import SentimentModel
from worker.settings import ClassifySettings, WrongSetting

TEXTS_AT_ONCE = 512
BLOCK_BYTES = 1 << 17  # some 512 short texts

log = logging.getLogger(__name__)


def run(settings: ClassifySettings) -> int:
    """Scores the texts that the settings name; the n-th has the id n. Blocks; answers with the exit code.

    What the worker would make a dead letter of gets a line with the reason in place of a label. Raises WrongSetting,
    ModelError.
    """
    texts = _texts(settings)
    model = SentimentModel.load_as_set(settings)
    try:
        _write(model, texts)
    except BrokenPipeError:  # the reader has enough, as in `classify … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        log.error("cannot write: %s", error.strerror)
        return 1
    return 0


def _write(model: SentimentModel, batches: Iterable[list[str | None]]) -> None:
    number = 0
    for batch in batches:
        for line in _lines(model, list(enumerate(batch, number + 1))):
            sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
        number += len(batch)


def _texts(settings: ClassifySettings) -> Iterator[list[str | None]]:
    """Texts in batches. Of a pipe whatever is there, so that a slow one has its answers at once."""
    if bool(settings.file) == bool(settings.texts) or (len(settings.texts) > 1 and "-" in settings.texts):
        raise WrongSetting("classify takes one of: texts as arguments, --file FILE, or - for standard input")
    if settings.file:
        return _line_batches(_opened(settings.file))
    if settings.texts == ["-"]:
        return _line_batches(sys.stdin.buffer)
    words = [_decoded(text.encode(errors="surrogateescape")) for text in settings.texts]
    return (words[begin : begin + TEXTS_AT_ONCE] for begin in range(0, len(words), TEXTS_AT_ONCE))


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise WrongSetting(f"file = {path} cannot be read: {error.strerror}") from None


def _line_batches(file: BinaryIO) -> Iterator[list[str | None]]:
    begun = b""
    while block := file.read1(BLOCK_BYTES):  # type: ignore[attr-defined]
        *lines, begun = (begun + block).split(b"\n")
        if lines:
            yield [_decoded(line) for line in lines]
    if begun:
        yield [_decoded(begun)]


def _decoded(line: bytes) -> str | None:
    """None for what is no UTF-8."""
    try:
        return line.removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        return None


def _lines(model: SentimentModel, batch: list[tuple[int, str | None]]) -> Iterator[bytes]:
    scored = iter(model.score([text for _, text in batch if text is not None and not is_empty(text)]))
    processed_at = iso_time(time.time() * 1000)
    for number, text in batch:
        if text is None:
            yield orjson.dumps({"id": str(number), "reason": "invalid_utf8"})
            continue
        if is_empty(text):
            yield orjson.dumps({"id": str(number), "reason": "empty_text"})
            continue
        sentiment, truncated = next(scored)
        if sentiment is None:
            yield orjson.dumps({"id": str(number), "reason": "inference_failed"})
            continue
        yield orjson.dumps(result_fields(str(number), sentiment, truncated, model.name, None, None, processed_at))
