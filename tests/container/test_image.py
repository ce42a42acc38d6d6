"""The built image, run as it is deployed: no root, a root file system that cannot be written, one signal to end it."""

import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest

from tests.support.broker import free_port
from tests.support.process import Metrics
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import wait_for

IMAGE = os.environ.get("TEST_IMAGE", "")
IS_LIGHT = IMAGE.endswith("sentiment-worker:cpu")
EVENTS = 300
READY_SECONDS = 120

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.skipif(not IMAGE, reason="TEST_IMAGE names no image; `make image-test` builds one and tests it"),
]


def docker(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert not check or done.returncode == 0, f"docker {arguments[0]}: {done.stderr}"
    return done.stdout + done.stderr


class Container:
    """`docker run` of the image, in the machine's own network so that the test's broker can be reached."""

    def __init__(self, *options: str, **settings: object) -> None:
        self.name = f"sentiment-worker-{uuid.uuid4().hex[:8]}"
        variables = {"http_port": free_port(), **settings}
        given = [word for name, value in variables.items() for word in ("--env", f"WORKER_{name.upper()}={value}")]
        docker("run", "--detach", "--network", "host", "--name", self.name, *options, *given, IMAGE)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(docker("inspect", "--format", "{{json .State}}", self.name))
        return state

    def logs(self) -> str:
        return docker("logs", self.name)

    def get(self, path: str) -> str:
        """What the worker answers inside of the container; empty while it does not, or refuses."""
        url = f"'http://127.0.0.1:' + os.environ['WORKER_HTTP_PORT'] + '{path}'"
        ask = f"import os, urllib.request; print(urllib.request.urlopen({url}).read().decode())"
        done = subprocess.run(
            ["docker", "exec", self.name, "python", "-c", ask], capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout

    def wait_until_ready(self) -> None:
        wait_for(lambda: "ready" in self.get("/readyz"), "the container to be ready", READY_SECONDS, 0.5, self.logs)

    def stop(self, seconds: int = 30) -> int:
        """SIGTERM as Docker sends it, SIGKILL after so many seconds, and the exit code."""
        docker("stop", "--time", str(seconds), self.name)
        return int(self.state()["ExitCode"])


@pytest.fixture
def run(kafka: Kafka, topics: Topics) -> Iterator[Callable[..., Container]]:
    """Starts the image on the test's topics."""
    started = []

    def start(*options: str, **settings: object) -> Container:
        container = Container(
            *options,
            bootstrap_servers=kafka.bootstrap,
            input_topics=topics.input,
            output_topic=topics.output,
            dead_letter_topic=topics.dead_letters,
            group_id=topics.group,
            model="builtin",
            **settings,
        )
        started.append(container)
        return container

    yield start
    for container in started:
        docker("rm", "--force", "--volumes", container.name, check=False)


@pytest.mark.parametrize("user", [(), ("--user", "12345:12345")], ids=["its own user", "any other user"])
def test_events_in_results_out_and_a_clean_end(
    kafka: Kafka, topics: Topics, run: Callable[..., Container], user: tuple[str, ...]
) -> None:
    kafka.create_all(topics)
    container = run("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", *user)
    container.wait_until_ready()
    kafka.send(topics.input, [*map(numbered, range(EVENTS)), Record(b"no JSON", b"key")])
    wait_until_committed(kafka, topics)
    wait_for(lambda: container.state()["Health"]["Status"] == "healthy", "the health check")
    metrics = Metrics(container.get("/metrics"))

    assert container.stop() == 0, container.logs()
    assert not container.state()["OOMKilled"]
    results = [orjson.loads(record.value or b"") for record in kafka.read(topics.output)]
    assert sorted(int(result["id"]) for result in results) == list(range(EVENTS))
    assert [dict(letter.headers)["error.reason"] for letter in kafka.read(topics.dead_letters)] == [b"invalid_json"]
    assert metrics.get("records_consumed_total") == EVENTS + 1
    lines = container.logs().splitlines()
    assert all(line.startswith("{") for line in lines), "a line that is no JSON"
    assert orjson.loads(lines[-1])["message"] == "drained"


def test_a_dead_address_is_unhealthy(run: Callable[..., Container], topics: Topics, kafka: Kafka) -> None:
    """The check asks the worker, and does not only start: at a port where nothing listens it fails."""
    kafka.create_all(topics)
    container = run("--env", "WORKER_HTTP_HOST=127.0.0.2", "--health-interval", "1s", "--health-retries", "1")
    wait_for(lambda: container.get("/livez") == "" and container.state()["Health"]["Log"], "a health check", 60)
    wait_for(lambda: container.state()["Health"]["Log"][-1]["ExitCode"] == 1, "the health check to fail", 60)


def test_a_wrong_setting_ends_with_2_and_one_sentence() -> None:
    done = subprocess.run(
        ["docker", "run", "--rm", "--read-only", "--env", "WORKER_LINGER_MS=soon", IMAGE],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "linger_ms" in done.stderr


def installed() -> set[str]:
    """Names and versions of the packages in the image, as its own Python sees them."""
    look = "import importlib.metadata as m; print(*{f'{d.name}=={d.version}' for d in m.distributions()})"
    return set(docker("run", "--rm", "--read-only", "--entrypoint", "python", IMAGE, "-c", look).split())


def test_it_classifies_without_a_network_or_a_place_to_write() -> None:
    line = docker("run", "--rm", "--read-only", "--network", "none", IMAGE, "classify", "--model", "builtin", "Ужас!")
    assert json.loads(line)["label"] == "negative"


def test_it_lists_what_it_has() -> None:
    listed = json.loads(docker("run", "--rm", "--entrypoint", "cat", IMAGE, "/opt/worker/sbom.cdx.json"))
    assert listed["bomFormat"] == "CycloneDX"
    parts = [listed["metadata"]["component"], *listed["components"]]
    assert {f"{part['name']}=={part['version']}" for part in parts} == installed()
    assert all(part.get("licenses") for part in parts if part["name"] in ("sentiment-worker", "numpy", "aiokafka"))


@pytest.mark.skipif(not IS_LIGHT, reason="is about sentiment-worker:cpu, the image without torch")
def test_the_image_for_a_cpu_has_no_torch_and_is_small() -> None:
    names = {part.partition("==")[0] for part in installed()}
    assert "onnxruntime" in names
    assert not names & {"torch", "transformers", "sentencepiece", "sympy"}
    kibibytes = docker("run", "--rm", "--entrypoint", "du", IMAGE, "-sk", "/opt/worker").split()[0]
    assert int(kibibytes) < 280 * 1024, "with a base of 170 MB it should stay under 450 MB"


@pytest.mark.skipif("-aws:" not in IMAGE, reason="is about an image like sentiment-worker-aws:cpu, with EXTRAS=aws")
def test_the_image_with_the_extra_aws_has_what_amazon_msk_needs() -> None:
    broker = "b-1.name.abc123.c2.kafka.eu-west-1.amazonaws.com:9098"
    flags = ("--bootstrap-servers", broker, "--security-protocol", "SASL_SSL", "--sasl-mechanism", "AWS_MSK_IAM")
    said = docker(
        "run", "--rm", "--read-only", "--network", "none", IMAGE, "check", "--model", "builtin", *flags, check=False
    )
    assert "ok    settings" in said


def test_the_image_has_a_numeric_user_labels_and_no_compiler() -> None:
    config = json.loads(docker("image", "inspect", "--format", "{{json .Config}}", IMAGE))
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["sentiment-worker"], "a shell in between would keep the signal"
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "sentiment-worker"
    version = docker("run", "--rm", "--read-only", IMAGE, "--version").strip()
    assert labels["org.opencontainers.image.version"] == version
    tools = "for tool in cc gcc clang ld nvcc ptxas uv; do command -v $tool; done"
    look = f"{tools}; ls /opt/worker/lib/*/site-packages | grep -x triton"
    found = docker("run", "--rm", "--read-only", "--entrypoint", "sh", IMAGE, "-c", look, check=False)
    assert found == ""
