"""The numbered events of a run: from a number follows the record, and all that has to become of it.

Every record has its number in a header, which results, dead letters and tombstones keep.
"""

import math
from typing import Final

from tests.support.topics import Record

KEYS: Final = 600
NUMBER: Final = "number"
POISON: Final = "яд"  # the model fails on a text that begins so, and on no other
RESULT, TOMBSTONE = "result", "tombstone"


def kind_of(number: int) -> str:
    """What has to become of an event: a result, a tombstone, or a dead letter of this reason."""
    if number % 100 == 17:
        return "missing_text"
    if number % 100 == 43:
        return TOMBSTONE
    return "inference_failed" if number % 1000 == 500 else RESULT


def record_of(number: int) -> Record:
    values = {
        RESULT: f'{{"text": "событие {number}"}}',
        "inference_failed": f'{{"text": "{POISON} {number}"}}',
        "missing_text": "{}",
        TOMBSTONE: None,
    }
    value = values[kind_of(number)]
    return Record(
        None if value is None else value.encode(),
        key_of(number),
        ((NUMBER, str(number).encode()),),
        topic="",
        offset=-1,
    )


def key_of(number: int) -> bytes:
    return f"key {number % KEYS}".encode()


def logit_of(number: int) -> float:
    """The logit for positive; the others are 0. By it a result shows which text it belongs to."""
    return number % 997 / 200


def score_of(number: int) -> float:
    """The score that a result has to have."""
    return 1 / (1 + math.exp(-logit_of(number))) - 0.5
