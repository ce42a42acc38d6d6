"""``sentiment-worker classify``: texts in, one JSON line each out, as in the result record. No Kafka."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import orjson

from worker.events import iso_time, result_fields
from worker.model import SentimentModel
from worker.settings import ClassifySettings, WrongSetting

TEXTS_AT_ONCE = 512


def run(settings: ClassifySettings) -> int:
    """Scores the texts that the settings name; the n-th has the id n. Blocks; answers with the exit code.

    A text of white space alone gets a line with the reason in place of a label. Raises WrongSetting, ModelError.
    """
    texts = _texts(settings)
    model = SentimentModel.load_as_set(settings)
    try:
        _write(model, texts)
    except BrokenPipeError:  # the reader has enough, as in `classify … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _write(model: SentimentModel, texts: Iterable[str]) -> None:
    numbered = enumerate(texts, 1)
    while batch := list(islice(numbered, TEXTS_AT_ONCE)):
        for line in _lines(model, batch):
            sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()


def _texts(settings: ClassifySettings) -> Iterable[str]:
    sources = [bool(settings.file), settings.texts == ["-"], bool(settings.texts) and settings.texts != ["-"]]
    if sum(sources) != 1:
        raise WrongSetting("classify takes one of: texts as arguments, --file FILE, or - for standard input")
    if settings.file:
        return _file_lines(settings.file)
    if settings.texts == ["-"]:
        return (_decoded(line) for line in sys.stdin.buffer)
    return [text.encode(errors="surrogateescape").decode(errors="replace") for text in settings.texts]


def _file_lines(path: Path) -> Iterator[str]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise WrongSetting(f"file = {path} cannot be read: {error.strerror}") from None
    return (_decoded(line) for line in file)


def _decoded(line: bytes) -> str:
    return line.rstrip(b"\r\n").decode(errors="replace")


def _lines(model: SentimentModel, batch: list[tuple[int, str]]) -> Iterator[bytes]:
    with_words = [text for _, text in batch if text.strip()]
    scored = iter(model.score(with_words))
    processed_at = iso_time(time.time() * 1000)
    for number, text in batch:
        if not text.strip():
            yield orjson.dumps({"id": str(number), "reason": "empty_text"})
            continue
        sentiment, truncated = next(scored)
        if sentiment is None:
            yield orjson.dumps({"id": str(number), "reason": "inference_failed"})
            continue
        yield orjson.dumps(result_fields(str(number), sentiment, truncated, model.name, None, None, processed_at))
