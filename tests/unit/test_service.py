"""The process, apart from what it does."""

import os
import subprocess
import sys
import threading

import pytest

from tests.broker import free_port

STUBBORN = """
import asyncio
from worker import service, tasks
from worker.cli import main

tasks.cancelled.__defaults__ = (0.1,)

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
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, text=True)
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
    said, deadline = "", threading.Timer(60, started.kill)
    deadline.start()
    assert started.stdout
    for line in started.stdout:
        said += line
        if "http_token_for=all" in line:
            break
    deadline.cancel()
    started.kill()
    started.communicate(timeout=60)
    assert "whoever is on the way to the brokers reads the password and every record; use SASL_SSL" in said
    assert "http_host 0.0.0.0 answers other machines without a token" in said
    assert "hunter2" not in said
