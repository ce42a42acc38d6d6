"""Every setting that deploy/ gives to a worker is one, and has a value that the worker takes."""

import re
from pathlib import Path

import pytest

from tests.deploy.manifests import DEPLOY, EXAMPLES, container, read, settings_of_the_pod
from worker.settings.run import RunSettings
from worker.settings.sources import load, unknown_variables

ROOT = Path(__file__).parents[2]


def loaded(variables: dict[str, str], *arguments: str) -> RunSettings:
    assert variables
    assert unknown_variables(RunSettings, variables) == []
    return load(RunSettings, arguments, "run", variables)


def of_the_image() -> dict[str, str]:
    text = (ROOT / "Dockerfile").read_text()
    words = [word for word in text.split() if word.startswith("WORKER_")]
    return dict(word.split("=") for word in words)


def test_the_image_answers_to_others_than_itself() -> None:
    assert loaded(of_the_image()).http_host == "0.0.0.0"


def test_compose_sets_what_the_worker_takes() -> None:
    worker = read(DEPLOY / "compose.yaml")["services"]["worker"]
    given = {name: str(value) for name, value in worker["environment"].items()}
    settings = loaded(of_the_image() | given)
    assert float(worker["stop_grace_period"].removesuffix("s")) > settings.drain_timeout_s


def test_compose_lets_no_service_take_the_machine() -> None:
    for name, service in read(DEPLOY / "compose.yaml")["services"].items():
        assert service["deploy"]["resources"]["limits"].keys() == {"memory", "pids"}, name


def test_compose_publishes_each_service_at_an_address_of_its_own() -> None:
    """Of a range of ports Docker takes the next one at each start, until it meets another service's."""
    services = read(DEPLOY / "compose.yaml")["services"].values()
    published = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", port) for service in services for port in service.get("ports", ())]
    hosts = [port.rpartition(":")[0] for port in published]
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+", host) for host in hosts), hosts
    assert len(set(hosts)) == len(hosts) > 0


def test_compose_keeps_the_log_as_long_as_what_is_made_of_it() -> None:
    """Rows carry offsets: a database that outlives its topics would mix the rows of two logs."""
    services = read(DEPLOY / "compose.yaml")["services"]
    assert f"kafka:{services['kafka']['environment']['KAFKA_LOG_DIRS']}" in services["kafka"]["volumes"]
    assert "postgresql:/var/lib/postgresql/data" in services["postgresql"]["volumes"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_example_of_the_chart_sets_what_the_worker_takes(example: str, tmp_path: Path) -> None:
    (command, *flags) = container(example)["args"]
    assert command == "run"
    variables = settings_of_the_pod(example)
    for name, value in variables.items():
        if value.startswith("/run/secrets/"):
            variables[name] = str(tmp_path / Path(value).name)
            (tmp_path / Path(value).name).write_text("a-secret-of-nobody-here\n")
    loaded(variables, *flags)
