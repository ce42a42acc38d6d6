"""The short form of `make chaos`: a few acts of each kind, and every event accounted for."""

import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from tests.support.broker import NotOursError, UnavailableError, allowed_kinds
from tests.support.process import environment

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(900)]

EVENTS, RATE = 12_000, 200


@pytest.mark.parametrize(
    ("delivery", "acts"),
    [
        ("at-least-once", ["kill", "broker_kill", "model_raises", "cuts"]),
        ("exactly-once", ["zombie", "broker_restart", "partition", "kill"]),
    ],
)
def test_every_event_is_accounted_for(tmp_path: Path, delivery: str, acts: list[str]) -> None:
    try:
        allowed_kinds(controllable=True)
    except (NotOursError, UnavailableError) as reason:
        pytest.skip(str(reason))
    report = tmp_path / "report.json"
    options = {"delivery": delivery, "events": EVENTS, "rate": RATE, "acts": len(acts), "report": report}
    command = [sys.executable, "-m", "tests.chaos"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(
        [*command, "--only", *acts],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment(),
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert orjson.loads(report.read_bytes())["audit"]["events"] == EVENTS
