"""The worker on a real Kafka: `python -m benchmarks.worker TEXTS.csv` writes benchmarks/results/worker.{json,md}.

Its questions, with a randomly initialised model of the card's architecture:

- backlog: texts per second of the worker on a backlog, of the same engine without Kafka, and of the card's own function,
  one text at a time. The three take turns; ratios are medians over the rounds.
- light load: from publishing an event to its result, by the broker's clock, at 5 events per second; and with a model that
  costs nothing, which leaves the linger and the ways to and from the broker.

It starts a Kafka as the tests do. Nothing else should run on the machine.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from benchmarks.broker_log import percentiles
from benchmarks.common import WINDOW, alive, event, machine, make_checkpoint, ratio, read_texts, write
from benchmarks.testbed import new_testbed
from tests.support.broker import Broker, start_broker
from tests.support.process import COSTLESS, workers_in
from tests.support.topics import Kafka, Topics
from tests.support.waiting import wait_for
from worker.commands.load_model import prepare_process
from worker.model.sentiment_model import SentimentModel
from worker.pipeline.inference import Inference
from worker.telemetry.metrics import Metrics

LINGER_MS = 10
LIGHT_RATE = 5
TORCH_THREADS = torch.get_num_threads()  # as torch chooses; the engine has its passes take one thread each


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_checkpoint(folder / "card")
        broker = start_broker(controllable=True)
        try:
            figures = {
                "machine": machine(broker),
                "backlog": backlog(broker, checkpoint, folder, texts, options.events, options.rounds),
                "light_load": light_load(broker, checkpoint, texts, options.seconds),
                "light_load_costless": light_load(broker, checkpoint, texts, options.seconds, COSTLESS),
                "help_s": help_seconds(),
            }
        finally:
            broker.close()
    write("worker", figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--events", type=int, default=5_000, help="events of the backlog (default: 5000)")
    parser.add_argument("--rounds", type=int, default=3, help="times that the three take turns (default: 3)")
    parser.add_argument("--seconds", type=float, default=40, help="of light load, s (default: 40)")
    return parser.parse_args()


# Backlog.


def backlog(
    broker: Broker, checkpoint: Path, folder: Path, texts: Sequence[str], events: int, rounds: int
) -> dict[str, Any]:
    """Texts per second of each, by round."""
    prepare_process()
    model = SentimentModel.load(str(checkpoint))
    measured = {"backend": model.backend, "cpu_threads": model.passes, "max_batch_tokens": model.max_batch_tokens}
    card = CardLoop(checkpoint)
    speeds: dict[str, list[float]] = {"card loop": [], "engine": [], "worker": []}
    sample = texts[:events]
    for turn in range(rounds):
        speeds["card loop"].append(card.speed(sample[turn * 400 : turn * 400 + 400]))
        speeds["engine"].append(asyncio.run(engine_speed(model, sample)))
        speeds["worker"].append(worker_speed(broker, checkpoint, folder, sample, **measured))
        print({name: round(values[-1], 1) for name, values in speeds.items()}, flush=True)
    worker = speeds["worker"]
    return {
        "events": events,
        "texts_per_s": {name: [round(value, 1) for value in values] for name, values in speeds.items()},
        "worker / card loop": ratio(worker, speeds["card loop"]),
        "worker / engine": ratio(worker, speeds["engine"]),
    }


class CardLoop:
    """The card's function, as it stands on the card, called for one text after another."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32)

    def speed(self, texts: Sequence[str]) -> float:
        torch.set_num_threads(TORCH_THREADS)
        started = time.perf_counter()
        self.probabilities(texts)
        return len(texts) / (time.perf_counter() - started)

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.array([self._probabilities(text) for text in texts])

    def _probabilities(self, text: str) -> NDArray[np.float32]:
        with torch.no_grad():
            inputs = self._tokenizer(text, return_tensors="pt", truncation=True, padding=True)
            answer: NDArray[np.float32] = torch.sigmoid(self._model(**inputs).logits).cpu().numpy()[0]
            return answer


async def engine_speed(model: Any, texts: Sequence[str]) -> float:
    """The worker's inference, micro-batch after micro-batch, one tokenized one is scored."""
    inference = Inference(Metrics("benchmark"))
    await inference.load(lambda: model)
    windows = [list(texts[begin : begin + WINDOW]) for begin in range(0, len(texts), WINDOW)]
    started = time.perf_counter()
    tokenizing = asyncio.ensure_future(inference.tokenize(windows[0]))
    for following in [*windows[1:], None]:
        job = await tokenizing
        if following is not None:
            tokenizing = asyncio.ensure_future(inference.tokenize(following))
        await inference.forward(job)
    return len(texts) / (time.perf_counter() - started)


def worker_speed(broker: Broker, checkpoint: Path, folder: Path, texts: Sequence[str], **settings: object) -> float:
    """Results per second from the first micro-batch published to the last: a backlog, without the start."""
    kafka, topics = Kafka(broker.bootstrap), Topics.unique()
    kafka.create_all(topics, 4)
    kafka.send(topics.input, [event(number, text) for number, text in enumerate(texts)])
    with workers_in(broker.bootstrap, checkpoint, folder) as workers:
        worker = workers.start(
            topics, **{"cache_size": 0, "cpu_threads": "auto", "max_batch_texts": WINDOW, **settings}
        )
        worker.wait_until_ready()
        wait_for(lambda: alive(worker) and kafka.count(topics.output) >= len(texts), "all results", 300, every=0.5)
        assert worker.terminate() == 0
    moments = published(kafka, topics)
    later = [moment for moment in moments if moment > moments[0]]
    return len(later) / (moments[-1] - moments[0])


def published(kafka: Kafka, topics: Topics) -> list[float]:
    """When each result was made, s since 1970, ascending."""
    results = (json.loads(record.value or b"") for record in kafka.read(topics.output))
    return sorted(datetime.fromisoformat(result["processed_at"]).timestamp() for result in results)


# Light load.


def light_load(
    broker: Broker, checkpoint: Path, texts: Sequence[str], seconds: float, module: str = "worker"
) -> dict[str, Any]:
    """Milliseconds from publishing to the result, by the broker's clock, 5 events per second, one partition."""
    with new_testbed(broker, 1, checkpoint, module, cpu_threads="auto", linger_ms=LINGER_MS) as bed:
        worker = bed.start().wait_until_ready()
        times, _ = bed.waits_under_load(LIGHT_RATE, seconds, lambda number: event(number, texts[number]))
        assert worker.terminate() == 0
    return {
        "linger_ms": LINGER_MS,
        "events": len(times),
        **percentiles(times),
    }


# The rest.


def help_seconds() -> dict[str, float]:
    """Median of `--help` and `run --help`, as a person starts them."""
    command = Path(sys.executable).with_name("sentiment-worker")
    answers = {}
    for words in (["--help"], ["run", "--help"]):
        times = []
        for _ in range(7):
            started = time.perf_counter()
            subprocess.run([command, *words], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - started)
        answers[" ".join(words)] = round(statistics.median(times), 3)
    return answers


def table(figures: dict[str, Any]) -> str:
    speeds = figures["backlog"]["texts_per_s"]
    rows = [
        f"Machine: {figures['machine']['cpu']}, {figures['machine']['cores']} cores. A model of the card's "
        f"architecture with random weights, {figures['backlog']['events']} events, medians of {len(speeds['worker'])} "
        "rounds in turn.",
        "",
        "| what | figure |",
        "| --- | --- |",
        *(f"| {name}, texts/s | {statistics.median(values):.0f} |" for name, values in speeds.items()),
        *(
            f"| {name} | {value['median']} ({value['min']} to {value['max']}) |"
            for name, value in figures["backlog"].items()
            if isinstance(value, dict) and "median" in value
        ),
        f"| light load, publish to result, p50 | {figures['light_load']['p50_ms']} ms |",
        f"| light load, publish to result, p95 | {figures['light_load']['p95_ms']} ms |",
        f"| the same with a model that costs nothing, p50 | {figures['light_load_costless']['p50_ms']} ms |",
        f"| linger | {figures['light_load']['linger_ms']} ms |",
        *(f"| `{words}` | {seconds} s |" for words, seconds in figures["help_s"].items()),
    ]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
