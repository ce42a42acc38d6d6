"""Fixtures: light workers, and whether the long form is wanted (`CHAOS_LONG=1`, as `make chaos` sets it)."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.driver import Feed
from tests.support.broker import Broker
from tests.support.process import Workers, workers_in
from tests.support.topics import Kafka, Topics

IS_LONG = os.environ.get("CHAOS_LONG") == "1"
BeginFeed = Callable[[Kafka, Topics, int, float], Feed]

SHORT_FORM = ("test_auditor.py", "test_driver.py", "test_proxy.py", "test_run.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The single cases take minutes each; without `make chaos` one run of a few acts stands for them."""
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name not in SHORT_FORM and not IS_LONG:
            item.add_marker(pytest.mark.skip(reason="a single case of the long form, which is run by make chaos"))


@pytest.fixture
def light(broker: Broker, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers on the shared broker; with `module=MODEL` they need no checkpoint."""
    with workers_in(broker.bootstrap, Path("builtin"), tmp_path) as workers:
        yield workers


@pytest.fixture
def fragile_light(fragile_broker: Broker, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers on the broker that the test stops."""
    with workers_in(fragile_broker.bootstrap, Path("builtin"), tmp_path) as workers:
        yield workers


@pytest.fixture
def begin_feed() -> Iterator[BeginFeed]:
    """Begins to publish so many events at such a rate."""
    feeds: list[Feed] = []

    def begin(kafka: Kafka, topics: Topics, events: int, rate: float) -> Feed:
        feeds.append(Feed(kafka.bootstrap, topics.input, events, rate))
        feeds[-1].start()
        return feeds[-1]

    yield begin
    for feed in feeds:
        feed.stop()
