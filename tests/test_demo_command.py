"""The demo as a person runs it: a process, with or without a terminal, left alone or interrupted."""

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys

import pytest

pytest.importorskip("confluent_kafka")

DEMO = [sys.executable, "-m", "worker", "demo"]
SUM = re.compile(
    r"^(\d+) events? in = (\d+) results? \+ (\d+) dead letters? \+ (\d+) tombstones? forwarded"
    r" \+ (\d+) records? skipped$",
    re.MULTILINE,
)


def test_it_ends_by_itself_and_adds_up():
    done = subprocess.run(
        [*DEMO, "--events", "100", "--rate", "50"], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    total, *parts = map(int, SUM.search(done.stdout).groups())
    assert (total, parts) == (112, [100, 9, 2, 1])
    assert "It adds up, and the worker drained." in done.stdout
    assert re.search(r"metrics +http://127\.0\.0\.1:\d+/metrics", done.stdout)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_kept_running_it_drains_at_ctrl_c_and_leaves_no_process():
    with subprocess.Popen(
        [*DEMO, "--keep-running", "--events", "20", "--rate", "50"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        said = ""
        while not re.search(r"([3-9]\d|\d{3,}) results", said):  # more than those of one pass
            line = process.stdout.readline()
            assert line, process.stderr.read()
            said += line
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=150)
    assert process.returncode == 0, said + out + err
    total, *parts = map(int, SUM.search(out).groups())
    assert total == sum(parts) > 20
    for port in re.findall(r"127\.0\.0\.1:(\d+)", said):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)), timeout=5)


def test_interrupted_while_it_starts_it_ends_soon():
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "Starting the worker" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=150)
    assert process.returncode == 130
    assert err == "Stopped before anything could add up.\n"


def test_on_a_terminal_it_draws():
    ours, theirs = pty.openpty()
    command = [*DEMO, "--events", "50", "--rate", "50"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "24"}
    said = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # the terminal goes with the process
            while data := os.read(ours, 65_536):
                said += data
    os.close(ours)
    shown = said.decode()
    assert process.returncode == 0, shown
    assert shown.count("sentiment-worker demo") > 2
    for part in ("62 of 62 events in", "█", "9: 2 invalid_json", "in flight", "It adds up"):
        assert part in shown
