"""Too many records that cannot be scored end the worker, before the whole topic becomes dead letters."""

import pytest

from tests.support.process import COSTLESS, Workers
from tests.support.scenario import letter_place, wait_until_committed
from tests.support.topics import Kafka, Record, Topics, numbered, repeated
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def bad(number: int) -> Record:
    return Record(b'{"txt": "%d"}' % number if number % 3 else b"<xml/>", b"key %d" % (number % 50))


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_too_many_end_the_worker_and_no_restart_repeats_a_dead_letter(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    kafka.create_all(topics, 2)
    good = kafka.send(topics.input, map(numbered, range(3_000)))
    unscorable = kafka.send(topics.input, map(bad, range(6_000)))
    settings = {"max_batch_texts": 100, "dead_letter_window": 500, "delivery": delivery}
    for _ in range(2):
        worker = workers.start(topics, **settings)
        assert worker.wait(240) == 1
        (sentence,) = worker.warnings("dead_letter_limit = 0.5")
        assert "for missing_text" in sentence, "two in three are for that"
        assert "Traceback" not in worker.output
        letters = kafka.read(topics.dead_letters)
        assert len(letters) < 2_000, "most of the records that cannot be scored are not taken"
        done = len(kafka.read(topics.output, committed_only=False)) + len(
            kafka.read(topics.dead_letters, committed_only=False)
        )
        assert done > 0
        wait_for(
            lambda done=done: sum(kafka.committed(topics.group, topics.input).values()) == done,  # type: ignore[misc]
            "what is acknowledged to be committed, and no more; nothing was aborted either",
            30,
        )
        assert not repeated(map(letter_place, letters))

    workers.start(topics, **settings, dead_letter_limit=0)
    wait_until_committed(kafka, topics)
    letters = kafka.read(topics.dead_letters)
    assert sorted(map(letter_place, letters)) == sorted(record.place for record in unscorable)
    assert len(kafka.read(topics.output)) == len(good)
