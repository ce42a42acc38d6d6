"""The process, apart from what it does."""

import subprocess
import sys

from worker.service import runbook

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


def test_the_runbook_is_where_the_package_says() -> None:
    urls = ["Source, https://code.example/worker", "Runbook, https://code.example/worker/docs/operating.md"]
    assert runbook(urls) == "https://code.example/worker/docs/operating.md#sentimentworkernotready"
    assert runbook(urls[:1]) is None
