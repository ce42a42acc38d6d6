"""A real Kafka Connect for the tests, with one connector: the recipe that deploy/ has."""

import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.broker import free_port
from tests.support.component import ServiceProcess, UnavailableError
from tests.support.maven import jars, unpacked
from tests.support.waiting import wait_for

POM = Path(__file__).parents[1] / "kafka" / "connect.xml"
VERSION = POM.read_text().partition("<kafka.version>")[2].partition("<")[0]
JAVA = ("java", "-Xms64m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
MAIN = "org.apache.kafka.connect.cli.ConnectStandalone"


class Connect:
    """Kafka Connect on its own with the connector of a recipe's folder, which reads `topic` in place of its own.

    `variables` are the environment of the recipe's `${env:...}`. Raises UnavailableError where its parts cannot be had.
    """

    def __init__(self, recipe: Path, topic: str, variables: Mapping[str, str], folder: Path) -> None:
        if shutil.which("java") is None:
            raise UnavailableError("there is no java")
        plugin = re.findall(r"^ARG PLUGIN=(\S+)$", (recipe / "Dockerfile").read_text(), re.MULTILINE)[0]
        classpath = f"{jars(POM, f'connect-{VERSION}')}/*"
        self._port = free_port()
        ours = {
            "plugin.path": unpacked(plugin),
            "offset.storage.file.filename": folder / "connect.offsets",
            "offset.flush.interval.ms": 1_000,
        }
        lines = [(recipe / "worker.properties").read_text(), *(f"{name}={value}\n" for name, value in ours.items())]
        (folder / "worker.properties").write_text("".join(lines))
        sink = json.loads((recipe / "sink.json").read_text())
        self.name = sink["name"] = f"{sink['name']}-{topic}"
        self.group = f"connect-{self.name}"
        sink["config"]["topics"] = topic
        (folder / "sink.json").write_text(json.dumps(sink))
        command = (*JAVA, "-cp", classpath, MAIN, folder / "worker.properties", folder / "sink.json")
        address = {"CONNECT_LISTENERS": f"http://127.0.0.1:{self._port}"}
        self._process = ServiceProcess(command, folder / "connect.log", {**variables, **address})

    def wait_until_running(self) -> "Connect":
        wait_for(lambda: self._process.alive() and set(self.states) == {"RUNNING"}, "the connector to run", 90)
        return self

    def wait_until_failed(self, seconds: float = 60) -> None:
        wait_for(lambda: self._process.alive() and "FAILED" in self.states, "a task to fail", seconds)

    @property
    def states(self) -> list[str]:
        """Of the connector's tasks; empty while it is not known."""
        status = self.ask("GET", "/status")
        return [task["state"] for task in status["tasks"]] if status else []

    def restart(self) -> None:
        """Begins the connector's tasks anew, as an operator would."""
        self.ask("POST", "/restart?includeTasks=true")

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """What Connect answers about its connector; None while it does not, or where there is nothing to say."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/connectors/{self.name}{path}",
            None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method,
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            if error.code not in (404, 409):  # not there yet, or busy
                raise AssertionError(error.read().decode()) from error
        except OSError:
            pass
        return None

    @property
    def output(self) -> str:
        return self._process.output

    def close(self) -> None:
        self._process.stop()
