"""``sentiment-worker classify``: texts in, one JSON line each out, as in the result record. No Kafka."""

import codecs
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from worker.commands.load_model import load_from_settings
from worker.core.empty_text import is_empty
from worker.core.encoder import result_fields
from worker.core.timestamps import iso_time
from worker.errors import UserError, WrongSetting
from worker.model.sentiment_model import SentimentModel
from worker.settings.commands import ClassifySettings

TEXTS_AT_ONCE = 512
BLOCK_BYTES = 1 << 17  # some 512 short texts
# Byte order marks. UTF-32's stand before UTF-16's, because one of them begins with one of those.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Bytes that are no character become half of a surrogate pair. UTF-8 cannot encode it, so that its line alone is refused.
codecs.register_error("unpaired", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


class NothingScored(UserError):
    """Not one of the texts could be scored."""

    exit_code = 1


def run(settings: ClassifySettings) -> int:
    """Scores the texts that the settings name; the n-th has the id n. Blocks; returns the exit code.

    A text that the worker would make a dead letter gets a line with the reason in place of a label. Raises WrongSetting and
    ModelError, NothingScored if all lines are such, and OSError of the output.
    """
    texts = _texts(settings)
    model = load_from_settings(settings)
    read, scored = _write(model, texts)
    if read and not scored:
        raise NothingScored("no text could be scored; the reason of each is in its line of the output")
    return 0


def _write(model: SentimentModel, batches: Iterable[list[str | None]]) -> tuple[int, int]:
    """Prints a line for each text; returns how many there were, and how many of them have a label."""
    number = scored = 0
    for batch in batches:
        for fields in _results(model, list(enumerate(batch, number + 1))):
            scored += "label" in fields
            sys.stdout.buffer.write(orjson.dumps(fields) + b"\n")
        sys.stdout.buffer.flush()
        number += len(batch)
    return number, scored


def _texts(settings: ClassifySettings) -> Iterator[list[str | None]]:
    """Texts in batches. A pipe's batch is what it holds at the moment, so that a slow one has its results at once."""
    if bool(settings.file) == bool(settings.texts) or (len(settings.texts) > 1 and "-" in settings.texts):
        raise WrongSetting("classify takes one of: texts as arguments, --file FILE, or - for standard input")
    if settings.file:
        return file_lines(settings.file)
    if settings.texts == ["-"]:
        return _line_batches(sys.stdin.buffer)
    words = [_decoded(text.encode(errors="surrogateescape")) for text in settings.texts]
    return (words[begin : begin + TEXTS_AT_ONCE] for begin in range(0, len(words), TEXTS_AT_ONCE))


def file_lines(path: Path) -> Iterator[list[str | None]]:
    """A file's lines in batches; None for a line that is not in the file's encoding. Raises WrongSetting."""
    try:
        return _line_batches(path.open("rb"))
    except OSError as error:
        raise WrongSetting(f"file = {path} cannot be read: {error.strerror}") from None


def _line_batches(file: BinaryIO) -> Iterator[list[str | None]]:
    begun = b""
    for block in _utf8(file):
        *lines, begun = (begun + block).split(b"\n")
        if lines:
            yield [_decoded(line) for line in lines]
    if begun:
        yield [_decoded(begun)]


def _utf8(file: BinaryIO) -> Iterator[bytes]:
    """The file in blocks, as they can be read; converted to UTF-8 if it begins with another byte order mark."""
    blocks: Iterator[bytes] = iter(lambda: file.read1(BLOCK_BYTES), b"")  # type: ignore[attr-defined]
    begin = b""
    while any(len(begin) < len(mark) and mark.startswith(begin) for mark in MARKS) and (block := next(blocks, b"")):
        begin += block
    mark = next(filter(begin.startswith, MARKS), b"")
    encoding = MARKS.get(mark, "utf-8")
    if encoding == "utf-8":
        yield begin.removeprefix(mark)
        yield from blocks
        return
    for text in codecs.iterdecode(chain([begin.removeprefix(mark)], blocks), encoding, "unpaired"):
        yield text.encode(errors="surrogatepass")


def _decoded(line: bytes) -> str | None:
    """A line's text; None if it is not in UTF-8."""
    try:
        return line.removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        return None


def _results(model: SentimentModel, batch: list[tuple[int, str | None]]) -> Iterator[dict[str, Any]]:
    scored = iter(model.score([text for _, text in batch if text is not None and not is_empty(text)]))
    processed_at = iso_time(time.time() * 1000)
    for number, text in batch:
        reason, sentiment = "invalid_utf8" if text is None else "empty_text" if is_empty(text) else None, None
        if reason is None:
            sentiment, truncated, windows = next(scored)
        if sentiment is None:
            yield {"id": str(number), "reason": reason or "inference_failed"}
        else:
            yield result_fields(
                str(number),
                sentiment,
                truncated,
                model.name,
                None,
                None,
                processed_at,
                labels=model.labels,
                windows=windows,
            )
