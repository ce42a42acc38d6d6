"""Few files may be open: the limit is raised, and where that does not do it is said. More partitions need no more."""

import resource
import sys

import pytest

from tests.support.process import COSTLESS, Workers
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Topics, numbered

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets another process's limits be set"),
]

PARTITIONS = 40


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


@pytest.mark.parametrize(("hard", "is_enough"), [(70, True), (69, False)])
def test_many_partitions_beside_one_broker(
    kafka: Kafka, topics: Topics, workers: Workers, hard: int, is_enough: bool
) -> None:
    kafka.create_all(topics, PARTITIONS)
    worker = workers.start(topics, {"FILES": str(hard)}, module="tests.support.few_files", delivery="exactly-once")
    worker.wait_until_assigned(PARTITIONS)
    assert resource.prlimit(worker.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    kafka.send(topics.input, map(numbered, range(400)))
    wait_until_committed(kafka, topics)
    said = worker.warnings(f"{hard} files may be open, and a worker may need 70 beside 1 broker")
    assert bool(said) is not is_enough
    assert worker.terminate() == 0
