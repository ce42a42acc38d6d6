"""A broker that demands credentials, certificates and permissions: what works, and what is said of what does not."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AclOperation, ResourceType

from tests.conftest import broker_or_reason
from tests.process import Workers, WorkerProcess, workers_in
from tests.secure import CERTIFIED, PASSWORD, SCRAM, USER, Authority, SecureKafka, Security
from tests.topics import Kafka, Topics, numbered
from tests.waiting import holds_for, wait_for
from worker.cluster import Connection, tls_context, wait_until_usable
from worker.health import Health
from worker.settings import WrongSetting

pytestmark = pytest.mark.kafka

MECHANISMS = ("PLAIN", *SCRAM)
READ, WRITE, DESCRIBE = AclOperation.READ, AclOperation.WRITE, AclOperation.DESCRIBE
TOPIC, GROUP = ResourceType.TOPIC, ResourceType.GROUP


@pytest.fixture(scope="module")
def secure(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    security = Security.made(tmp_path_factory.mktemp("certificates"))
    broker = broker_or_reason(request.config, controllable=True, extras=security.extras)
    yield SecureKafka(broker, security)
    broker.close()


@pytest.fixture
def kafka(secure: SecureKafka) -> Kafka:
    """The tests' own client, which may do everything."""
    return Kafka(secure.bootstrap)


@pytest.fixture
def secure_workers(secure: SecureKafka, checkpoint: Path, tmp_path: Path) -> Iterator[Workers]:
    with workers_in(secure.bootstrap, checkpoint, tmp_path) as workers:
        yield workers


def test_broker(secure):
    print(secure.address("LOGIN"))
