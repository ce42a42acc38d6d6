"""What the demo sends: real reviews as JSON events, with records among them that no worker can score."""

import csv
import importlib.resources
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Review(NamedTuple):
    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Message:
    """A record to send. ``expected`` is its right outcome: result, tombstone, skipped, or the reason of a dead letter."""

    id: str
    key: bytes | None
    value: bytes | None
    expected: str
    review: Review | None = None


BROKEN: Sequence[tuple[str, bytes | None]] = (
    ("invalid_json", '{"id": "broken", "text": "Отличное качест'.encode()),
    ("missing_text", '{"id": "broken", "review": "Текст есть, но не там"}'.encode()),
    ("empty_text", b'{"id": "broken", "text": " \\n\\t "}'),
    ("tombstone", None),
    ("invalid_utf8", '{"id": "broken", "text": "Платье в кодировке прошлого века"}'.encode("cp1251")),
    ("text_not_string", b'{"id": "broken", "text": 5}'),
    ("skipped", None),
    ("not_an_object", '["Массив", "вместо", "объекта"]'.encode()),
    ("invalid_json", "Просто строка, не JSON".encode()),
    ("too_large", json.dumps({"id": "broken", "text": "ну " * 50_000}, ensure_ascii=False).encode()),
    ("missing_text", b"{}"),
    ("tombstone", None),
)
"""Records that no worker can score: the expected outcome of each, and its value."""


def reviews() -> list[Review]:
    """The reviews that ship with the package, which its model was never trained on. Reads a file."""
    path = importlib.resources.files("worker.model") / "builtin" / "demo.csv"
    rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    return [Review(row["text"], row["label"]) for row in rows]


def one_pass(of: Sequence[Review], events: int, number: int = 0) -> list[Message]:
    """``events`` reviews as JSON events, with the broken records spread among them. Each ``number`` has ids of its own."""
    messages = [_review_message(of[n % len(of)], n) for n in range(number * events, (number + 1) * events)]
    for place, (expected, value) in reversed(list(enumerate(BROKEN))):
        messages.insert((place + 1) * events // (len(BROKEN) + 1), _broken_message(expected, value, number, place))
    return messages


def endless_passes(of: Sequence[Review], events: int) -> Iterator[Message]:
    """One pass after another."""
    number = 0
    while True:
        yield from one_pass(of, events, number)
        number += 1


def _review_message(review: Review, number: int) -> Message:
    id = f"review-{number + 1}"
    product = f"product-{number % 40 + 1}"
    value = json.dumps({"id": id, "product": product, "text": review.text}, ensure_ascii=False).encode()
    return Message(id, product.encode(), value, "result", review)


def _broken_message(expected: str, value: bytes | None, number: int, place: int) -> Message:
    id = f"broken-{number * len(BROKEN) + place + 1}"
    return Message(id, None if expected == "skipped" else id.encode(), value, expected)
