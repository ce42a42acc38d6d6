"""The command line, and a note of whose metadata it asks brokers for: `python -m tests.support.recorded_requests run …`.

`ASKED` is a file that gets a line for each request: its class and its topics, null for all. The first requests for a
producer's id fail, as they do while its coordinator is away. The model costs nothing.
"""

import json
import os
from pathlib import Path
from typing import Any

from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.transaction import InitProducerIdRequest

from tests.support.command_line import main_with
from tests.support.costless_model import CostlessModel
from worker.commands import check
from worker.kafka import connection as cluster
from worker.kafka.aiokafka_compat.metadata import TopicsRequest

FAILURES = 3


def install() -> None:
    send, left = AIOKafkaConnection.send, FAILURES

    def noted(connection: AIOKafkaConnection, request: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal left
        if isinstance(request, MetadataRequest | TopicsRequest):
            topics = request.topics if isinstance(request, TopicsRequest) else request._topics
            line = json.dumps([type(request).__name__, None if topics is None else sorted(topics)])
            with Path(os.environ["ASKED"]).open("a") as file:
                file.write(f"{line}\n")
        if isinstance(request, InitProducerIdRequest) and left:
            left -= 1
            raise KafkaConnectionError
        return send(connection, request, *arguments, **options)

    assert cluster  # its own change to `send` comes first
    AIOKafkaConnection.send = noted


if __name__ == "__main__":
    check._model = lambda _: check.Finding("model", "ok", "costs nothing")
    install()
    main_with(lambda _: CostlessModel())
