"""The worker as a process of its own: run as a person runs it, or forked from one that has imported everything."""

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from prometheus_client.parser import text_string_to_metric_families

from tests.support.broker import free_port
from tests.support.fork_server import ForkedProcess, ForkServer
from tests.support.topics import Topics
from tests.support.waiting import wait_for, wait_until_frozen

PREFIX = "sentiment_worker_"
COSTLESS = "tests.support.costless_model"
READY_SECONDS = 180
LONG_SESSION = {
    "session_timeout_ms": 60_000
}  # for tests in which nobody may leave the group, however busy the machine is

FORK_SERVER = ForkServer(
    "worker.commands.run",
    "worker.commands.check",
    "worker.commands.classify",
    "worker.commands.replay",
    "worker.model.sentiment_model",
    "onnxruntime",
)
WITH_TORCH = ForkServer("worker.commands.bench", "worker.model.torch.loader", "transformers.models.bert.modeling_bert")


class Metrics:
    """One answer of /metrics."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self.samples = [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]

    def get(self, name: str, **labels: object) -> float:
        """The sum of a metric's samples that have these labels; 0 where there is none."""
        return sum(value for _, value in self._matching(name, labels))

    def by(self, label: str, name: str, **labels: object) -> dict[str, float]:
        """A metric's values by one of its labels."""
        return {found[label]: value for found, value in self._matching(name, labels)}

    def counts_by(self, label: str, name: str) -> dict[str, float]:
        """A counter's values by one of its labels, without the series that never counted."""
        return {value: count for value, count in self.by(label, name).items() if count}

    def _matching(self, name: str, labels: dict[str, object]) -> Iterator[tuple[dict[str, str], float]]:
        wanted = {label: str(value) for label, value in labels.items()}
        for sample, found, value in self.samples:
            if sample == PREFIX + name and wanted.items() <= found.items():
                yield found, value

    @property
    def outcomes(self) -> float:
        names = ("results_published_total", "dead_letters_total", "tombstones_total", "records_skipped_total")
        return sum(self.get(name) for name in names)


class WorkerProcess:
    """`python -m worker run` with these settings, or another module with its command line; prints into `folder`.

    `variables` are its environment's, beside those of `environment`. Where `is_forked` the process is forked from one that
    has imported the worker and what runs a model on a CPU, and begins two seconds earlier.
    """

    def __init__(
        self,
        folder: Path,
        module: str = "worker",
        variables: Mapping[str, str] | None = None,
        *,
        is_forked: bool = False,
        **settings: object,
    ) -> None:
        port = settings.get("http_port") or free_port()
        self.folder = folder
        self.is_paused = False
        self.url = f"http://127.0.0.1:{port}"
        flags = {"http_port": port, "log_format": "json", **settings}
        arguments = ["run"]
        for name, value in flags.items():
            arguments += [f"--{name.replace('_', '-')}", str(value)]
        self._output, self._errors = folder / f"{port}.out", folder / f"{port}.err"
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process = self._begun(module, arguments, output, errors, variables or {}, is_forked)

    def _begun(
        self,
        module: str,
        arguments: list[str],
        output: IO[bytes],
        errors: IO[bytes],
        variables: Mapping[str, str],
        is_forked: bool,
    ) -> "subprocess.Popen[bytes] | ForkedProcess":
        env = {**environment(), **variables}
        if is_forked:
            return FORK_SERVER.start(module, arguments, env=env, cwd=self.folder, stdout=output, stderr=errors)
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=env, cwd=self.folder
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """Everything printed so far, standard output and standard error."""
        files = (self._output, self._errors)  # which may end within a character, as the worker goes on
        return "".join(file.read_text(errors="replace") for file in files)

    @property
    def logs(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.splitlines() if line.startswith("{") and line.endswith("}")]

    def lines(self, *words: str) -> list[str]:
        """The printed lines that have all these words."""
        return [line for line in self.output.splitlines() if all(word in line for word in words)]

    def warnings(self, *words: str) -> list[str]:
        """The messages of the log lines from WARNING up that have all these words."""
        lines = [line for line in self.logs if line["level"] not in ("DEBUG", "INFO")]
        return [line["message"] for line in lines if all(word in line["message"] for word in words)]

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; 0 while nothing listens."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (OSError, http.client.HTTPException):
            return 0, ""

    def status(self, path: str) -> int:
        return self.get(path)[0]

    @property
    def metrics(self) -> Metrics:
        """Asks again where no answer comes, as on a busy machine."""
        status, text = wait_for(lambda: self._alive() and (found := self.get("/metrics"))[0] and found, "/metrics", 60)
        assert status == 200, f"/metrics answers {status}"
        return Metrics(text)

    def wait_for_status(self, path: str, status: int, seconds: float = READY_SECONDS) -> "WorkerProcess":
        wait_for(lambda: self._alive() and self.status(path) == status, f"{path} to answer {status}", seconds)
        return self

    def wait_until_ready(self) -> "WorkerProcess":
        return self.wait_for_status("/readyz", 200)

    def wait_until_assigned(self, partitions: int) -> "WorkerProcess":
        self.wait_until_ready()
        what = f"{partitions} assigned partitions"
        wait_for(lambda: self._alive() and self.metrics.get("assigned_partitions") == partitions, what)
        return self

    def _alive(self) -> bool:
        assert self.is_running, f"the worker ended with {self._process.returncode}:\n{self.output[-3000:]}"
        return True

    def terminate(self, seconds: float = 60) -> int:
        """SIGTERM, and the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait(seconds)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def hang_up(self) -> None:
        self._process.send_signal(signal.SIGHUP)

    def pause(self) -> None:
        """Freezes the process; blocks until it stands still."""
        self.is_paused = True
        self._process.send_signal(signal.SIGSTOP)
        wait_until_frozen(self.pid)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self.is_paused = False

    def ask(self, number: signal.Signals) -> None:
        """Sends a signal that a module for tests answers."""
        self._process.send_signal(number)

    def wait(self, seconds: float = 120) -> int:
        """The exit code, once it ends by itself."""
        return self._process.wait(seconds)


class Workers:
    """Starts workers for tests and ends every one of them, whatever becomes of the test."""

    def __init__(self, bootstrap: str, checkpoint: Path, folder: Path, module: str, *, is_forked: bool) -> None:
        self._defaults = {
            "is_forked": is_forked,
            "module": module,
            "bootstrap_servers": bootstrap,
            "model": checkpoint,
            "cpu_threads": 1,
            "session_timeout_ms": 6_000,
        }
        self._folder = folder
        self._started: list[WorkerProcess] = []

    def start(self, topics: Topics, variables: Mapping[str, str] | None = None, **settings: object) -> WorkerProcess:
        names = {
            "input_topics": topics.input,
            "output_topic": topics.output,
            "dead_letter_topic": topics.dead_letters,
            "group_id": topics.group,
        }
        given = {name: value for name, value in {**self._defaults, **names, **settings}.items() if value is not None}
        worker = WorkerProcess(self._folder, variables=variables, **given)  # type: ignore[arg-type]
        self._started.append(worker)
        return worker

    def close(self) -> None:
        """Ends what still runs. What each worker last printed is shown by pytest if the test failed."""
        for worker in self._started:
            if worker.is_running:
                worker.kill()
            print(f"worker {worker.pid} ended with {worker.wait()}:\n{worker.output[-4000:]}")


@contextmanager
def workers_in(
    bootstrap: str, checkpoint: Path, folder: Path, module: str = "worker", *, is_forked: bool = False
) -> Iterator[Workers]:
    workers = Workers(bootstrap, checkpoint, folder, module, is_forked=is_forked)
    try:
        yield workers
    finally:
        workers.close()


def forked(
    *arguments: object,
    module: str = "worker",
    stdin: bytes = b"",
    folder: Path | None = None,
    open_files: tuple[int, int] | None = None,
    **variables: str,
) -> "subprocess.CompletedProcess[str]":
    """What `python -m worker` with these arguments answers, without the seconds in which it imports a model's libraries.

    ``folder`` is where it runs; ``module`` may be another one, and one that lies there.
    """
    server = WITH_TORCH if arguments[:1] == ("bench",) else FORK_SERVER
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        given.write(stdin)
        given.seek(0)
        process = server.start(
            module,
            [str(argument) for argument in arguments],
            env=environment() | variables,
            cwd=folder or Path.cwd(),
            stdin=given,
            stdout=output,
            stderr=errors,
            open_files=open_files,
        )
        try:
            code = process.wait(150)
        finally:
            process.kill()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, code, output.read().decode(), errors.read().decode())


def forked_program(code: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """What `python -c` with this code and these arguments answers, where the worker is imported already."""
    (folder / "program.py").write_text(code)
    return forked(*arguments, module="program", folder=folder)


def environment() -> dict[str, str]:
    """This process's, without settings for workers, and with no way to the hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
    root = str(Path(__file__).parents[2])
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": root}
