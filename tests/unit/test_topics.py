"""What a topic's configuration says of its limits."""

import pytest

from worker.kafka.topics import NO_LIMIT, _parsed_limits


@pytest.mark.parametrize(
    ("config", "retention_ms"),
    [
        ({}, NO_LIMIT),
        ({"cleanup.policy": "delete", "retention.ms": "604800000"}, 604_800_000),
        ({"cleanup.policy": "compact,delete", "retention.ms": "0"}, 0),
        ({"cleanup.policy": "delete", "retention.ms": "-1"}, NO_LIMIT),
        ({"cleanup.policy": "compact", "retention.ms": "604800000"}, NO_LIMIT),
        (
            {"cleanup.policy": "delete", "retention.ms": "1", "message.timestamp.type": "LogAppendTime"},
            NO_LIMIT,
        ),
    ],
)
def test_retention_is_that_of_topics_that_delete_by_the_producers_time(
    config: dict[str, str | None], retention_ms: int
) -> None:
    assert _parsed_limits(config).retention_ms == retention_ms
