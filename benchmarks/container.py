"""How soon a container of the worker is there: `python -m benchmarks.container IMAGE...`.

Writes benchmarks/results/container.{json,md}. A record waits in the input topic. Measured are the seconds from `docker run`
until /livez answers, until /readyz says ready, and until the record's result is in the output topic, and the memory (PSS) at
that moment; with the built-in model, and with a mounted checkpoint of the default model's architecture. The broker lets the
first member of a group begin at once (`group.initial.rebalance.delay.ms=0`).
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import event, machine, make_checkpoint, write
from tests.support.broker import Broker, free_port, start_broker
from tests.support.topics import Kafka, Topics
from tests.support.waiting import wait_for

MODELS = ("built-in", "default's size")
ROUNDS = 5
POLL_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        checkpoint = make_checkpoint(Path(name) / "checkpoint")
        for path in (Path(name), *checkpoint.iterdir()):
            path.chmod(0o755)  # the container's user is another one
        broker = start_broker()
        try:
            busy = round(os.getloadavg()[0], 1)
            figures: dict[str, Any] = {"machine": machine(broker), "load_before": busy, "images": {}}
            for image in options.images:
                figures["images"][image] = {"megabytes": megabytes(image)} | {
                    model: [
                        started(broker, image, checkpoint if model == MODELS[1] else None)
                        for _ in range(options.rounds)
                    ]
                    for model in MODELS
                }
        finally:
            broker.close()
    write("container", figures, table(figures))


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=120, check=True).stdout


def megabytes(image: str) -> int:
    return round(int(docker("image", "inspect", "--format", "{{.Size}}", image)) / 1e6)


def started(broker: Broker, image: str, checkpoint: Path | None) -> dict[str, float]:
    """Seconds from `docker run` to each of three moments, and megabytes of memory at the last."""
    kafka, topics, port = Kafka(broker.bootstrap), Topics.unique(), free_port()
    kafka.create_all(topics)
    kafka.send(topics.input, [event(1, "Очень довольна, спасибо!")])
    settings = {
        "bootstrap_servers": broker.bootstrap,
        "input_topics": topics.input,
        "output_topic": topics.output,
        "dead_letter_topic": topics.dead_letters,
        "group_id": topics.group,
        "http_port": port,
        "model": "/checkpoint" if checkpoint else "builtin",
    }
    variables = [word for name, value in settings.items() for word in ("--env", f"WORKER_{name.upper()}={value}")]
    mounted = ["--volume", f"{checkpoint}:/checkpoint:ro"] if checkpoint else []
    name = f"sentiment-worker-{uuid.uuid4().hex[:8]}"
    command = ["run", "--detach", "--read-only", "--network", "host", "--name", name, *mounted, *variables, image]
    start = time.monotonic()
    try:
        docker(*command)
        return {
            "alive_s": after(start, lambda: answer(port, "/livez") != "", name),
            "ready_s": after(start, lambda: "ready" in answer(port, "/readyz"), name),
            "result_s": after(start, lambda: kafka.count(topics.output) > 0, name),
            "memory_mb": memory(int(docker("inspect", "--format", "{{.State.Pid}}", name))),
        }
    finally:
        docker("rm", "--force", "--volumes", name)


def after(start: float, condition: Callable[[], bool], container: str) -> float:
    wait_for(condition, "the container", 60, POLL_S, lambda: docker("logs", container))
    return round(time.monotonic() - start, 2)


def answer(port: int, path: str) -> str:
    """What the worker answers; empty while it does not, or refuses."""
    with contextlib.suppress(OSError):
        return str(urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).read().decode())
    return ""


def memory(pid: int) -> float:
    """Millions of bytes of a process, pages that it shares counted by its share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6)


def table(figures: dict[str, Any]) -> str:
    where = figures["machine"]
    lines = [
        f"Machine: {where['cpu']}, {where['cores']} cores, which the broker shares. Times are from `docker run`, with an "
        f"empty /cache. Medians; in brackets minimum and maximum. The machine's load before was {figures['load_before']}.",
        "",
        "| image | MB | model | alive, s | ready, s | first result, s | memory, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for image, of in figures["images"].items():
        for model in MODELS:
            columns = [[one[what] for one in of[model]] for what in ("alive_s", "ready_s", "result_s", "memory_mb")]
            cells = [f"{statistics.median(values):g} ({min(values):g} to {max(values):g})" for values in columns]
            lines.append(f"| {image} | {of['megabytes']} | {model} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
