"""The process, apart from what it does."""

import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.broker import free_port
from worker.commands.run import _reloader, runbook
from worker.commands.run_parts import in_force, tuned_model
from worker.settings.run import RunSettings

STUBBORN = """
import asyncio
from worker.commands import run as service
from worker.runtime import tasks
from worker.cli import main

tasks.cancel_all.__defaults__ = (0.1,)

async def endless():
    while True:
        try:
            await asyncio.sleep(3_600)
        except asyncio.CancelledError:
            pass

async def work(*_):
    global task
    task = asyncio.create_task(endless())
    await asyncio.sleep(0)
    return 0

service._work = work
main()
"""


def test_the_process_ends_though_a_task_of_it_does_not() -> None:
    command = [sys.executable, "-c", STUBBORN, "run", "--http-port", "0"]
    done = subprocess.run(command, capture_output=True, timeout=150, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert "a task does not end although it is cancelled" in done.stderr


@pytest.mark.parametrize("command", ["run", "check"])
def test_an_open_address_and_a_password_in_the_clear_are_warned_of(command: str) -> None:
    server = f"--bootstrap-servers=127.0.0.1:{free_port()}"
    login = ["--security-protocol=SASL_PLAINTEXT", "--sasl-mechanism=PLAIN", "--sasl-username=worker"]
    waiting = ["--http-host=0.0.0.0", "--http-port=0", "--request-timeout-ms=1000", "--fetch-max-wait-ms=500"]
    started = subprocess.Popen(
        [sys.executable, "-m", "worker", command, "--model=builtin", server, *login, *waiting],
        env={**os.environ, "WORKER_SASL_PASSWORD": "hunter2"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said, deadline = "", threading.Timer(150, started.kill)
    deadline.start()
    assert started.stdout
    for line in started.stdout:
        said += line
        if "http_token_for=all" in line:
            break
    deadline.cancel()
    started.kill()
    started.communicate(timeout=150)
    assert "whoever is on the way to the brokers reads the password and every record; use SASL_SSL" in said
    assert "http_host 0.0.0.0 answers other machines without a token" in said
    assert "hunter2" not in said


PLAIN = """
import asyncio
from worker.commands import run as service
from worker.cli import main

async def work(*_):
    return 0

service._work = work
main()
"""


def test_a_process_with_closed_streams_ends_well() -> None:
    """The event loop would take their numbers, and libuv aborts where it is to close one of those."""
    command = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", PLAIN, "run", "--http-port", "0"]
    assert subprocess.run(command, timeout=150, check=False).returncode == 0


FAILING = """
import sys
from worker import errors
from worker.commands import run as service
from worker.kafka.standstill import Standstill
from worker.cli import main

error = {"Standstill": Standstill, "WrongSetting": errors.WrongSetting}[sys.argv.pop()]

async def started(*_):
    raise error("it is so")

service.started_pipeline = started
main()
"""


@pytest.mark.parametrize(("error", "code"), [("Standstill", 1), ("WrongSetting", 2)])
def test_the_line_that_says_why_it_ends_has_the_exit_code(error: str, code: int) -> None:
    command = [sys.executable, "-c", FAILING, "run", "--http-port", "0", "--log-format", "json", error]
    done = subprocess.run(command, capture_output=True, timeout=150, check=False, text=True)
    last = [json.loads(line) for line in done.stderr.splitlines()][-1]
    assert (done.returncode, last["level"], last["message"]) == (code, "ERROR", "it is so")
    assert last["exit_code"] == code


HANGING_UP = """
import asyncio, os, signal, sys
from worker.commands import run as service
from worker.cli import main

signal.signal(signal.SIGHUP, signal.Handlers[sys.argv.pop()])

async def work(*_):
    os.kill(os.getpid(), signal.SIGHUP)
    await asyncio.sleep(0.2)
    return 0

service._work = work
main()
"""


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_hang_up_that_is_ignored_stays_ignored(before: signal.Handlers) -> None:
    """As under nohup; otherwise it asks for a reload, which there is no model for here."""
    command = [sys.executable, "-c", HANGING_UP, "run", "--http-port", "0", before.name]
    done = subprocess.run(command, capture_output=True, timeout=150, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert ("no reload" in done.stderr) is (before is signal.SIG_DFL)


def test_the_runbook_is_where_the_package_says() -> None:
    urls = ["Source, https://code.example/worker", "Runbook, https://code.example/worker/docs/operating.md"]
    assert runbook(urls) == "https://code.example/worker/docs/operating.md#sentimentworkernotready"
    assert runbook(urls[:1]) is None


# How many texts a micro-batch has.


class GpuModel:
    """What loading gives on a GPU, as far as micro-batches are concerned."""

    device = "cuda:0"
    backend = "torch"
    dtype = "float16"
    passes = 2
    max_batch_tokens = 65_536
    max_batch_texts = 0
    cuda_pass = "padded"
    measured = 0

    def batch_seconds(self) -> dict[int, float]:
        self.measured += 1
        return {512: 1.0, 1_024: 1.2, 2_048: 2.4}


def test_auto_measures_the_micro_batch_on_a_gpu_and_not_on_a_cpu() -> None:
    model = GpuModel()
    assert tuned_model(lambda _: cast("Any", model), RunSettings()).max_batch_texts == 1_024
    model.device = "cpu"
    assert tuned_model(lambda _: cast("Any", model), RunSettings()).max_batch_texts == 512
    assert model.measured == 1


def test_how_passes_are_computed_is_told_on_a_gpu_alone() -> None:
    model = GpuModel()
    assert in_force(cast("Any", model))["cuda_pass"] == "padded"
    model.device = "cpu"
    assert "cuda_pass" not in in_force(cast("Any", model))


def test_a_number_is_taken_as_it_is() -> None:
    model = GpuModel()
    assert tuned_model(lambda _: cast("Any", model), RunSettings(max_batch_texts=64)).max_batch_texts == 64
    assert model.measured == 0


def test_a_reload_keeps_the_micro_batch_that_was_measured_at_the_start() -> None:
    old, new, asked = GpuModel(), GpuModel(), []

    def load_model(settings: RunSettings) -> Any:
        asked.append((settings.max_batch_texts, settings.max_batch_tokens, settings.cpu_threads))
        return new

    shared = SimpleNamespace(load_model=load_model, settings=RunSettings(), inference=None, metrics=None)
    old.max_batch_texts = 2_048
    assert _reloader(cast("Any", shared))._load(cast("Any", old)) is cast("Any", new)
    assert asked == [(2_048, 65_536, 2)]
    assert (new.max_batch_texts, new.measured) == (2_048, 0)
