"""All figures of one GPU in under four minutes: `python -m benchmarks.gpu TEXTS.csv`.

Writes benchmarks/results/gpu-all.{json,md}, again after each part, and prints what was asked beside what was measured. It
needs no network: `benchmarks/gpu_device.sh` says what to bring to a machine that has none, and runs it there. TEXTS.csv has
a column `text`.

- right: labels and logits of each way to compute (padded; unpadded, where this version and device have it) in half
  precision, against transformers' own model in float32, on every text; the checkpoint builtin.
- engine: texts/s of each way from token ids, packing included, and from text, in micro-batches of --window texts; what
  `max_batch_texts=auto` takes; steps and kernels by time. This and what follows: a random checkpoint of the card's
  architecture, and no text that comes twice.
- end to end: events/s on a backlog from Kafka to Kafka, with the broker on the same machine: one process with default
  settings, with `cuda_pass=auto` besides, and tuned; 4 and 8 tuned ones that share the GPU; and one with exactly-once, to
  the end of a backlog, with what is lost and what is there twice. The first also says how long a start takes.
- latency: from the broker having an event to its having the result, at 10, 50 and 80 % of the default settings' speed.
- peers: the card's loop, transformers' pipeline, and transformers by hand with sorted texts, on the same device.

Kafka is a real one, as tests start it on this machine's Java or Docker; where there is none, the parts that need it are left
out, and the file says why. The load is librdkafka's, and times are by the broker's clock. A part or case for which --within
leaves no time is listed as not measured.

`--device cpu` rehearses the whole script on a machine without a GPU, with little of everything, the checkpoint builtin, and
1, 2 and 3 processes. It writes gpu-all-cpu.{json,md}; those are no figures of a GPU, and none of them counts for anything.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_kafka
from benchmarks.common import RESULTS, code, machine, make_checkpoint, read_texts, write
from benchmarks.gpu_model import engine, right
from benchmarks.gpu_peers import peers
from benchmarks.gpu_table import DEFAULT, table
from tests.support.broker import UnavailableError
from worker.runtime.memory import free_device_memory

PARTS = ("right", "engine", "end to end", "latency", "peers")
WORDS = {1: "one process", 2: "two processes", 3: "three processes", 4: "four processes", 8: "eight processes"}
TUNED_ON_CPU: dict[str, Any] = {"cache_size": 0}
TUNED: dict[str, Any] = {"cache_size": 0, "dtype": "float16", "max_batch_texts": 8_192, "cuda_pass": "auto"}
NEEDS_S = {"engine": 10, "end to end": 25, "case": 20, "latency": 40, "peers": 15}


class Scale(NamedTuple):
    """How much of everything is done. `seconds`: of a backlog and of a load. `share`: of the peers' texts."""

    texts: int | None
    window: int
    rounds: int
    events: int
    exactly_once_events: int
    seconds: float
    processes: tuple[int, int, int]
    partitions: int
    loads: int
    share: float
    heap: str


FULL = Scale(None, 8_192, 3, 3_000_000, 200_000, 4.0, (1, 4, 8), 16, 4, 1.0, "-Xms1g -Xmx4g")
REHEARSAL = Scale(512, 256, 1, 60_000, 2_000, 3.0, (1, 2, 3), 6, 1, 1 / 64, "-Xms128m -Xmx512m")


class Step(NamedTuple):
    """A step from Kafka to Kafka: the part that it belongs to, its name, and the time that it needs, by NEEDS_S."""

    part: str
    name: str
    measure: Callable[[], dict[str, Any]]
    need: str = "case"


def main() -> int:
    options = parsed_options()
    is_rehearsal = options.device == "cpu"
    run = Run(options, REHEARSAL if is_rehearsal else FULL, "gpu-all-cpu" if is_rehearsal else "gpu-all")
    with tempfile.TemporaryDirectory() as folder:
        run.measure(Path(folder))
    return int(bool(run.figures["failed"]))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a rehearsal (default: cuda)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--within", type=float, default=230, help="seconds for everything (default: 230)")
    parser.add_argument("--commit", help="of this tree (default: what git says)")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu rehearses the script without one")
    return options


class Run:
    """One run of the script: what has been measured so far, and the time that is left."""

    def __init__(self, options: argparse.Namespace, scale: Scale, name: str) -> None:
        self._options = options
        self._scale = scale
        self._name = name
        self._began = time.monotonic()
        self._texts = read_texts(options.texts)[: scale.texts]
        self.figures: dict[str, Any] = {
            **described(options.device, options.commit),
            "failed": {},
            "not_measured": {},
        }

    def measure(self, folder: Path) -> None:
        """Measures the parts that are asked for, and writes the files after each."""
        options, scale, texts = self._options, self._scale, self._texts
        checkpoint = make_checkpoint(folder / "card")
        dtype = "float32" if options.device == "cpu" else "float16"
        if "right" in options.parts:
            self._part("right", lambda: right(options.device, texts))
        if "engine" in options.parts:
            self._part("engine", lambda: engine(checkpoint, options.device, dtype, texts, scale.window, scale.rounds))
        if {"end to end", "latency"} & set(options.parts):
            self._part("end to end", lambda: self._kafka(folder, checkpoint))
        if "peers" in options.parts:
            self._part("peers", lambda: peers(checkpoint, options.device, dtype, texts, scale.share))

    def _part(self, name: str, measure: Callable[[], dict[str, Any]], need: str = "") -> None:
        """Adds a part's figures; why there are none, if it fails or there is no time for it."""
        left_s, needs_s = self._options.within - (time.monotonic() - self._began), NEEDS_S.get(need or name, 0)
        if left_s < needs_s:
            self.figures["not_measured"][name] = f"{left_s:.0f} s were left, and it needs {needs_s} s"
        else:
            began = time.monotonic()
            try:
                found = measure()
                self.figures[name] = {**found, "took_s": round(time.monotonic() - began, 1)}
            except UnavailableError as error:
                self.figures["not_measured"][name] = f"there is no Kafka: {error}"
            except Exception as error:  # noqa: BLE001 - what fails is told, and the other figures are still wanted
                traceback.print_exc()
                self.figures["failed"][name] = f"{type(error).__name__}: {error}"[:500]
            free_device_memory()
        self.figures["took_s"] = round(time.monotonic() - self._began, 1)
        write(self._name, self.figures, table(self.figures), is_shown=False)
        print(name, json.dumps(self.figures.get(name, "nothing")), flush=True)

    def _kafka(self, folder: Path, checkpoint: Path) -> dict[str, Any]:
        """Each step is a part of its own, so that one that fails costs no other. What is asked for comes first."""
        scale, is_rehearsal = self._scale, self._options.device == "cpu"
        settings: dict[str, Any] = {"model": "builtin" if is_rehearsal else checkpoint, "device": self._options.device}
        if is_rehearsal:
            settings |= {"cpu_threads": 1, "max_batch_tokens": 1_024}
        kept = {name: getattr(scale, name) for name in ("partitions", "events", "seconds", "loads")}
        with gpu_kafka.benched(folder, scale.heap, texts=self._options.texts, settings=settings, **kept) as bench:
            figures = {"broker": bench.broker.kind, "load_events_per_s": round(bench.fill())}
            for step in self._steps(bench, TUNED_ON_CPU if is_rehearsal else TUNED):
                if step.part in self._options.parts:
                    self._part(step.name, step.measure, step.need)
        return figures

    def _steps(self, bench: gpu_kafka.Bench, tuned: dict[str, Any]) -> Iterator[Step]:
        one, several, many = self._scale.processes

        def backlog(name: str, processes: int, settings: dict[str, Any]) -> Step:
            return Step("end to end", name, lambda: gpu_kafka.backlog(bench, processes, settings))

        yield backlog(DEFAULT, one, {})
        yield backlog(f"{WORDS[one]}, tuned", one, tuned)
        yield backlog(f"{WORDS[several]}, tuned", several, tuned)
        yield Step("latency", "latency", lambda: gpu_kafka.latency(bench, self._default_speed()), "latency")
        events = self._scale.exactly_once_events
        yield Step("end to end", "exactly once", lambda: gpu_kafka.exactly_once(bench, events, tuned))
        yield backlog(f"{WORDS[many]}, tuned", many, tuned)
        if "cuda_pass" in tuned:
            yield backlog(f"{DEFAULT} and cuda_pass=auto", one, {"cuda_pass": "auto"})

    def _default_speed(self) -> float:
        if DEFAULT not in self.figures:
            raise LookupError("loads are shares of the default settings' speed, which the part `end to end` measures")
        speed: float = self.figures[DEFAULT]["events_per_s"]
        return speed


def described(device: str, commit: str | None) -> dict[str, Any]:
    """The machine, the version and the day."""
    if device == "cpu":
        note = "A rehearsal on a CPU: whether the script works. No figure here is one of a GPU, and none counts."
        gpu = "none: the CPU stands in for it"
    else:
        properties = torch.cuda.get_device_properties(torch.device(device))
        note = "The load, the broker and the workers share this machine."
        gpu = f"{properties.name}, {properties.total_memory >> 30} GiB"
    return {
        "is_rehearsal": device == "cpu",
        "note": note,
        "machine": {**machine(None), "device": gpu, "torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": commit or git_commit(),
        "code": code(),
        "day": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def git_commit() -> str:
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known"


if __name__ == "__main__":
    sys.exit(main())
