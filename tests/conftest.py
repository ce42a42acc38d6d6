"""Fixtures: a real Kafka, a tiny checkpoint, and workers that end with their test."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.broker import Broker, Extras, NotOursError, start_broker
from tests.support.checkpoint import Oracle, make_checkpoint
from tests.support.component import UnavailableError, skip_or_fail
from tests.support.process import Workers, workers_in
from tests.support.topics import Kafka, Topics

LONGEST = (  # of `make test`, each more than twenty seconds, the longest first; then those of `make unit`
    "test_run.py",
    "test_outages.py",
    "test_topics.py",
    "test_long_texts.py",
    "test_exactly_once.py",
    "test_partial_outages.py",
    "test_security.py",
    "test_command_line.py",
    "test_outputs.py",
    "test_clients.py",
    "test_console_page.py",
    "test_replay.py",
    "test_records.py",
    "test_check.py",
    "test_faults.py",
    "test_refusals.py",
    "test_reload.py",
    "test_waiting.py",
    "test_prometheus.py",
    "test_demo_command.py",
    "test_bert.py",
    "test_unpadded.py",
    "test_train.py",
    "test_tokenizer_files.py",
    "test_settings.py",
)
REACH = Path(__file__).parent / "reach"
used_brokers = pytest.StashKey[list[str]]()
# A busy machine fails no test: neither an example nor drawing it has to be quick. CI has the same examples every time.
settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[used_brokers] = []
    # A run that is told to end is interrupted, so that brokers and workers end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Nor do tests depend on what ``nohup`` and a shell's ``&`` have children ignore: workers under test are sent both.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Leaves out the tests against other components than Kafka, with a line that says so, unless they are asked for."""
    if path != REACH or any(asked_for(argument, parent.config) for argument in parent.config.args):
        return None
    return LeftOut.from_parent(parent, path=path)


def asked_for(argument: str, config: pytest.Config) -> bool:
    path = config.invocation_params.dir / argument.partition("::")[0]
    return path.resolve().is_relative_to(REACH)


class LeftOut(pytest.Directory):
    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip("tests/reach needs more than Kafka; `make reach` runs it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: of several processes that share the files none is left with a long one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collectstart() -> None:
    """Importing the tests makes half a million objects, which collections would look through for a second in vain."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Beside other processes torch's threads wait for each other, far longer than they compute."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    gc.freeze()  # nor do collections during the tests look through them
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[used_brokers]:
        terminalreporter.write_line(f"real Kafka: {line}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes that share the tests tells the first one which brokers it used."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["used_brokers"] = session.config.stash[used_brokers]
    gc.unfreeze()  # or libraries report as leaked what is still there when Python ends


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[used_brokers] += getattr(node, "workeroutput", {}).get("used_brokers", [])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """A test that would look into a broker that is not ours is skipped, with the reason."""
    try:
        return (yield)
    except NotOursError as reason:
        pytest.skip(str(reason))


def broker_or_reason(config: pytest.Config, *, controllable: bool, extras: Extras | None = None) -> Broker:
    """A running broker. Without one the test is skipped, and on CI it fails: there it must have run."""
    try:
        broker = start_broker(controllable=controllable, extras=extras)
    except NotOursError as reason:
        pytest.skip(str(reason))
    except UnavailableError as reason:
        skip_or_fail(f"no Kafka to test with ({reason})")
    config.stash[used_brokers].append(f"{broker.kind}, {broker.bootstrap}")
    return broker


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """The broker that ordinary tests share. Nobody stops it."""
    broker = broker_or_reason(request.config, controllable=False)
    yield broker
    broker.close()


@pytest.fixture(scope="session")
def second_broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    broker = broker_or_reason(request.config, controllable=True)
    yield broker
    broker.close()


@pytest.fixture
def fragile_broker(second_broker: Broker) -> Iterator[Broker]:
    """A broker for a test that stops, kills or pauses it; it runs again before the next test."""
    yield second_broker
    second_broker.restore()


@pytest.fixture
def kafka(broker: Broker) -> Kafka:
    return Kafka(broker.bootstrap)


@pytest.fixture
def topics() -> Topics:
    """Names that no other test has; nothing is created."""
    return Topics.unique()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


@pytest.fixture
def worker_module() -> str:
    """What workers run. Where the model plays no part a file takes one that costs nothing, and starts at once."""
    return "worker"


@pytest.fixture
def model(request: pytest.FixtureRequest, worker_module: str) -> Path:
    """The checkpoint of the workers. Those whose model costs nothing read none, and need not wait for one to be made."""
    if worker_module != "worker":
        return Path("builtin")
    made: Path = request.getfixturevalue("checkpoint")
    return made


@pytest.fixture
def workers(broker: Broker, model: Path, tmp_path: Path, worker_module: str) -> Iterator[Workers]:
    """Starts workers on the shared broker."""
    with workers_in(broker.bootstrap, model, tmp_path, worker_module, is_forked=True) as workers:
        yield workers


@pytest.fixture
def fragile_workers(fragile_broker: Broker, model: Path, tmp_path: Path, worker_module: str) -> Iterator[Workers]:
    """Starts workers on the broker that the test stops."""
    with workers_in(fragile_broker.bootstrap, model, tmp_path, worker_module, is_forked=True) as workers:
        yield workers
