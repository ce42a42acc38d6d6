"""What a worker publishes fits the JSON Schemas of results and dead letters."""

from pathlib import Path

import orjson
import pytest
from jsonschema import Draft202012Validator

from tests.support.process import Workers
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Record, Topics, numbered
from worker.core.schemas import SCHEMAS

pytestmark = pytest.mark.kafka

OF_RESULTS = Draft202012Validator(SCHEMAS["result", "json"]())
OF_DEAD_LETTERS = Draft202012Validator(SCHEMAS["dead-letter", "json"]())
LONG = {"id": "long", "text": "очень хорошо " * 2_000}


@pytest.fixture
def model() -> Path:
    return Path("builtin")


@pytest.mark.parametrize("settings", [{}, {"long_text": "windows", "max_windows": 2, "threshold": 0.5}])
async def test_results_and_dead_letters_fit_their_schemas(
    settings: dict[str, object], kafka: Kafka, topics: Topics, workers: Workers
) -> None:
    kafka.create_all(topics, 1)
    kafka.send(topics.input, [*map(numbered, range(5)), Record(orjson.dumps(LONG), b"k"), Record(b"{", b"k")])
    await kafka.send_as_it_is(topics.input, 0, Record('{"text": "без времени"}'.encode(), b"k", timestamp=-1))
    worker = workers.start(topics, **settings).wait_until_ready()
    wait_until_committed(kafka, topics)
    assert worker.terminate() == 0
    results = [orjson.loads(record.value or b"") for record in kafka.read(topics.output)]
    for result in results:
        OF_RESULTS.validate(result)
        assert set(result) <= set(OF_RESULTS.schema["properties"])
        assert ("windows" in result, "labels" in result) == (bool(settings), bool(settings))
    assert {result["truncated"] for result in results} == {True, False}
    assert None in {result["event_time"] for result in results}
    (letter,) = kafka.read(topics.dead_letters)
    headers = {name: (value or b"").decode() for name, value in letter.headers}
    OF_DEAD_LETTERS.validate(headers)
    assert set(headers) <= set(OF_DEAD_LETTERS.schema["properties"])
