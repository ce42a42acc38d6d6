"""All figures of a GPU, in minutes: `python -m benchmarks.gpu TEXTS.csv` writes benchmarks/results/gpu.{json,md}.

It needs no network. In this order, and each part is written down as soon as it is there:

- right: logits of CUDA graphs, of half precision and of both together against float32 without graphs, and labels on every
  text of the file (checkpoint builtin); what `dtype=auto` expects of them from the shipped reviews, and chooses.
- engine: texts/s from token ids and from text, for a model of the card's architecture, in micro-batches of --window.
- floor: the multiply-adds that a text needs, at the measured peak of products of matrices in the same number type.
- where the time goes: tokenizing, packing, the device alone, and all of it together, for one micro-batch.
- end to end: events/s on a backlog, one worker and four that share the GPU, with the broker on the same machine; in
  micro-batches of --window too (8,192).
- latency: publish to result at half the measured speed, in an open loop, by the broker's clock; in micro-batches of the
  worker's default (512).

The broker is a Kafka where tests would start one and nothing need be fetched for it: bring a Java runtime and the folder of
jars that tests keep in `$XDG_CACHE_HOME/sentiment-worker` (`~/.cache/sentiment-worker`). Else, and with --mock, it is
librdkafka's mock cluster, and the table says so and why. That dates no records, so latency is not measured; and it takes one
consumer per group: each of four workers has topics and a group of its own. Its topics have 4 partitions of 5 MiB, and what
is older than that is dropped: a backlog is compressed, and lies in a topic for every 50,000 events.

`--device cpu --quick` shows on any machine that the script works, and writes gpu-cpu.{json,md}: no figures of a GPU.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import OffsetSpec
from numpy.typing import NDArray

from benchmarks.broker_log import percentiles
from benchmarks.common import alive, event, machine, make_checkpoint, read_texts, write
from benchmarks.engine import compared, flops_per_text
from benchmarks.load_generator import publish
from benchmarks.testbed import new_testbed
from tests.support.broker import KINDS, VERSION, Broker, UnavailableError, allowed_kinds
from tests.support.broker import started as start_kafka
from tests.support.process import WorkerProcess
from tests.support.topics import Kafka, Topics
from tests.support.waiting import wait_for
from worker.commands.demo.broker import ANSWER_S
from worker.commands.demo.broker import start as start_mock
from worker.model.reviews import read_reviews
from worker.model.sentiment_model import SentimentModel
from worker.model.torch.bert import shortest_run_s
from worker.model.torch.cuda import CudaPassDevice, Passes, Shapes, expected_agreement, pack
from worker.settings.run import RunSettings

ASKED = {
    "labels that agree in half precision, %": 99.9,
    "from ids, texts/s": 300_000, "from text, texts/s": 100_000,
    "one worker, events/s": 30_000, "four workers, events/s": 80_000, "half load, p99 ms": 25,
}  # fmt: skip
PARTITIONS = 8
TOPIC_EVENTS = 50_000  # of a backlog in one topic of the mock: a third of what it keeps, with these texts
WORKERS_WINDOW: int = RunSettings.model_fields["max_batch_texts"].default
WARM_SHARE = 0.2
LOADING_S = 300


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)
    if options.quick:
        texts = texts[:2_000]
    name = "gpu" if options.device != "cpu" else "gpu-cpu"
    figures: dict[str, Any] = {"machine": {**machine(None), "device": described(options.device)}, "asked": ASKED}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "card")
        parts: dict[str, Callable[[], Any]] = {
            "right": lambda: rightness(options.device, texts),
            "engine": lambda: engine(checkpoint, options, texts),
            "kafka": lambda: kafka(checkpoint, Path(folder), options, texts),
        }
        for part, measure in parts.items():
            if part in options.parts:
                started = time.perf_counter()
                figures[part] = {**measure(), "took_s": round(time.perf_counter() - started, 1)}
                write(name, figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script (default: cuda)")
    parser.add_argument("--dtype", default="float16", help="of the card's architecture (default: float16)")
    parser.add_argument("--window", type=int, default=8_192, help="texts of a micro-batch (default: 8192)")
    parser.add_argument("--budget", type=int, default=65_536, help="tokens in a pass (default: 65536)")
    parser.add_argument("--rounds", type=int, default=5, help="of the engine (default: 5)")
    parser.add_argument("--events", type=int, default=400_000, help="of a backlog, for each worker (default: 400000)")
    parser.add_argument("--seconds", type=float, default=20, help="of half load, s (default: 20)")
    parser.add_argument("--parts", nargs="+", default=["right", "engine", "kafka"], help="(default: all three)")
    parser.add_argument("--mock", action="store_true", help="librdkafka's mock cluster, even where there is a Kafka")
    parser.add_argument("--quick", action="store_true", help="little of everything: whether it works, not how fast")
    options = parser.parse_args()
    if options.quick:
        options.window, options.budget, options.rounds, options.seconds = 512, 1_024, 1, 4.0
        options.events = 4_000 if options.device == "cpu" else 200_000  # seconds, in which all workers become ready
    if options.device == "cpu":
        options.dtype = "float32"
    return options


def described(device: str) -> str:
    if device == "cpu":
        return "none: the CPU stands in for it"
    properties = torch.cuda.get_device_properties(torch.device(device))
    return f"{properties.name}, {properties.total_memory >> 30} GiB, torch {torch.__version__}"


# Right.


def rightness(device: str, texts: Sequence[str]) -> dict[str, Any]:
    """Largest differences of logits from float32 on the device without graphs, and labels that agree; AssertionError."""
    exact = SentimentModel.load("builtin", device=device, dtype="float32", backend="torch")
    ids = exact.tokenize(texts).ids
    wanted = plain_logits(exact, ids)
    half_type = "float16" if device != "cpu" else "bfloat16"
    half = SentimentModel.load("builtin", device=device, dtype=half_type, backend="torch")
    found = {
        "graphs, float32": exact._all_logits(ids),
        f"plain, {half_type}": plain_logits(half, ids),
        f"graphs, {half_type}": half._all_logits(ids),
    }
    auto = SentimentModel.load("builtin", device=device, backend="torch")
    sample = exact.tokenize(read_reviews()).ids
    figures: dict[str, Any] = {
        "texts": len(texts),
        "half": f"graphs, {half_type}",
        "auto_is": auto.dtype,
        "expected_agreement": expected_agreement(exact._all_logits(sample), half._all_logits(sample)),
        "against_float32": {
            name: {**compared(wanted, logits), "changed_labels": int((wanted.argmax(1) != logits.argmax(1)).sum())}
            for name, logits in found.items()
        },
        "graphs_change_half_by": float(np.abs(found[f"plain, {half_type}"] - found[f"graphs, {half_type}"]).max()),
        "graphs": [graphs_of(model) for model in (exact, half)],
    }
    assert figures["against_float32"]["graphs, float32"]["largest_difference"] < 1e-3, figures
    assert figures["graphs_change_half_by"] < 5e-2, figures
    return figures


def plain_logits(model: SentimentModel, ids: Sequence[Any]) -> NDArray[np.float32]:
    """Without graphs, one pass at a time."""
    passes = model._run
    if isinstance(passes, Passes):
        pass_device = passes._pass_device
        assert isinstance(pass_device, CudaPassDevice)
        plain = CudaPassDevice(
            pass_device._forward, model.device, labels=pass_device._labels, padding=pass_device._padding
        )
        model._run = Passes(plain, passes._shapes)
    try:
        return model._all_logits(ids)
    finally:
        model._run = passes


def graphs_of(model: SentimentModel) -> int:
    pass_device = getattr(model._run, "_pass_device", None)
    return len(pass_device._graphs) if isinstance(pass_device, CudaPassDevice) else 0


# Engine.


def engine(checkpoint: Path, options: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    model = SentimentModel.load(
        str(checkpoint), device=options.device, dtype=options.dtype, backend="torch", max_batch_tokens=options.budget
    )
    windows = [list(texts[begin : begin + options.window]) for begin in range(0, len(texts), options.window)]
    ids = [model.tokenize(window).ids for window in windows]
    ways: dict[str, Callable[[], object]] = {
        "from ids": lambda: [model._all_logits(each) for each in ids],
        "from text": lambda: asyncio.run(overlapped(model, windows)),
        "tokenizing alone": lambda: [model.tokenize(window) for window in windows],
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):  # the first warms up
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                speeds[name].append(len(texts) / (time.perf_counter() - started))
    peak = matmul_peak(model.device, getattr(torch, options.dtype))
    flops = flops_per_text(checkpoint, texts[:2_048])
    floor = peak / flops
    took, window = where_time_goes(model, windows[0])
    return {
        "texts": len(texts),
        "dtype": model.dtype,
        "tokenizer": type(model._tokenizer.encode).__name__,
        "passes": model.passes,
        "graphs": graphs_of(model),
        "memory_mb": round(model.memory_bytes() / 1e6),
        "texts_per_s": {name: [round(value) for value in values] for name, values in speeds.items()},
        "peak_tflops": round(peak / 1e12, 2),
        "mflop_per_text": round(flops / 1e6, 1),
        "floor_texts_per_s": round(floor),
        "from ids / floor": round(statistics.median(speeds["from ids"]) / floor, 4),
        "ms_of_a_window": took,
        "window": window,
    }


async def overlapped(model: SentimentModel, windows: Sequence[list[str]]) -> None:
    """One window is tokenized, on a thread, while the one before it is on the device: as the worker does it."""
    ids = model.tokenize(windows[0]).ids
    for following in [*windows[1:], None]:
        coming = asyncio.to_thread(model.tokenize, following or [])
        _, tokens = await asyncio.gather(asyncio.to_thread(model._all_logits, ids), coming)
        ids = tokens.ids


def where_time_goes(model: SentimentModel, window: list[str]) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds for one window, each step alone and the passes together; and what is in it."""
    from worker.core.batching import cut_by_length
    from worker.core.sentiment import to_sentiments

    ids = model.tokenize(window).ids
    lengths = [len(each) for each in ids]
    batches = cut_by_length(lengths, model.max_batch_tokens, model.pass_tokens, model.widths)
    shapes = Shapes(model.max_tokens, model.max_batch_tokens)
    shaped = [(batch, shapes.of(len(batch), max(lengths[index] for index in batch))) for batch in batches]
    wire = np.zeros(max(shape.rows * (shape.width + 1) for _, shape in shaped), dtype=np.int32)
    logits = model._all_logits(ids)
    steps: dict[str, Callable[[], object]] = {
        "tokenize": lambda: model.tokenize(window),
        "cut": lambda: cut_by_length(lengths, model.max_batch_tokens, model.pass_tokens, model.widths),
        "pack": lambda: [pack([ids[index] for index in batch], shape, wire) for batch, shape in shaped],
        "passes, one thread": lambda: [model.logits([ids[index] for index in batch]) for batch in batches],
        "passes, as the engine does": lambda: model._all_logits(ids),
        "logits to sentiments": lambda: to_sentiments(logits, model.labels),
    }
    took = {name: round(1000 * shortest_run_s(step), 3) for name, step in steps.items()}
    if isinstance(model._run, Passes):
        took["device alone"] = round(device_ms(model, shaped, ids), 3)
    padded = sum(shape.rows * shape.width for _, shape in shaped)
    return took, {"texts": len(window), "passes": len(batches), "tokens": sum(lengths), "padded": padded}


def device_ms(model: SentimentModel, shaped: Sequence[Any], ids: Sequence[Any]) -> float:
    """All passes of a window queued at once, between two events of the device."""
    passes = model._run
    assert isinstance(passes, Passes)
    pass_device = passes._pass_device
    assert isinstance(pass_device, CudaPassDevice)
    slots = [(pass_device.slot(shape), shape, [ids[index] for index in batch]) for batch, shape in shaped]
    ends = [pack(of_batch, shape, slot.wire) for slot, shape, of_batch in slots]
    times = []
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(pass_device._passes)
        for (slot, shape, _), length in zip(slots, ends, strict=True):
            pass_device.dispatch(slot, shape, length)
        end.record(pass_device._passes)
        pass_device.settle()
        times.append(begin.elapsed_time(end))
    return float(min(times[1:]))


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of large square products."""
    size = 8_192 if device.type == "cuda" else 1_024
    matrix = torch.randn(size, size, device=device, dtype=dtype)

    def product() -> None:
        for _ in range(4):
            torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 4 * 2 * size**3 / shortest_run_s(product)


# Kafka.


@dataclass
class Server:
    """A running broker: where and what it is; the Kafka, or else why there is none, and the mock's owner."""

    bootstrap: str
    kind: str
    why: str = ""
    owner: Producer | None = None
    kafka: Broker | None = None
    client: Kafka = field(init=False)

    def __post_init__(self) -> None:
        self.client = Kafka(self.bootstrap)

    def create(self, *names: str) -> None:
        """Makes topics: with PARTITIONS of a Kafka, with the mock's own 4 of the mock."""
        for name in names:
            if self.owner is None:
                self.client.create(name, PARTITIONS)
            else:
                self.owner.list_topics(name, timeout=ANSWER_S)  # asking makes it: the mock knows no CreateTopics

    def places(self, names: Sequence[str]) -> list[TopicPartition]:
        """All partitions of these topics, by a request that the mock knows too."""
        topics = self.client.admin.list_topics(timeout=ANSWER_S).topics
        return [TopicPartition(name, number) for name in names for number in topics[name].partitions]

    def offsets(self, places: Sequence[TopicPartition], end: OffsetSpec) -> int:
        """The sum of these partitions' first or next offsets, in one request."""
        answers = self.client.admin.list_offsets(dict.fromkeys(places, end))
        return sum(answer.result(30).offset for answer in answers.values())


def kafka(checkpoint: Path, folder: Path, options: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    """Backlogs for one and for four workers, then half of the one's speed in an open loop."""
    settings = {
        "device": options.device, "dtype": options.dtype, "max_batch_tokens": options.budget,
        "cache_size": 0, "backend": "torch",
    }  # fmt: skip
    of_backlog = {**settings, "model": checkpoint, "max_batch_texts": options.window}
    counts = (1, 2) if options.quick else (1, 4)
    speeds: dict[int, float] = {}
    with broker(options.mock) as server:
        for count in counts:
            speeds[count] = backlog_speed(server, folder, of_backlog, texts, options.events, count)
            print(f"{count} of the workers: {speeds[count]:,.0f} events/s", flush=True)
        latency = half_load(server, checkpoint, settings, texts, max(1.0, speeds[1] / 2), options.seconds)
    return {
        "broker": server.kind,
        "no_kafka": server.why,
        "micro_batches": {"backlog": options.window, "half_load": WORKERS_WINDOW},
        "events_per_s": {str(count): round(speed) for count, speed in speeds.items()},
        **latency,
    }


@contextmanager
def broker(mock: bool) -> Iterator[Server]:
    """A Kafka that is here, else or if wanted the mock."""
    found = "--mock" if mock else kafka_at_hand()
    if isinstance(found, str):
        print(f"librdkafka's mock cluster, no Kafka: {found}", flush=True)
        owner, bootstrap = start_mock()
        yield Server(bootstrap, "mock", found, owner)
        return
    with closing(found):
        yield Server(found.bootstrap, found.kind, kafka=found)


def kafka_at_hand() -> Broker | str:
    """A running Kafka, of the first kind for which nothing must be fetched; the reasons where there is none."""
    reasons = []
    with patch("tests.support.broker.fetch_jars", side_effect=UnavailableError("Kafka's jars are not in the cache")):
        for kind in allowed_kinds(controllable=True):
            try:
                if kind == "docker":
                    look_for_image()
                found = KINDS[kind]()
                start_kafka(found)
            except Exception as error:  # noqa: BLE001 - whatever keeps one from starting, there is the next, and the mock
                reasons.append(f"{kind}: {' '.join(str(error).split())[:120] or type(error).__name__}")
            else:
                return found
    return "; ".join(reasons)


def look_for_image() -> None:
    """An exception of some kind where Docker does not answer soon or would have to fetch Kafka's image."""
    from docker import from_env  # type: ignore[import-untyped]

    from_env(timeout=5).images.get(f"apache/kafka:{VERSION}")


def backlog_speed(
    server: Server, folder: Path, settings: dict[str, Any], texts: Sequence[str], events: int, workers: int
) -> float:
    """Results per second from a fifth of all, or from when all workers are ready, to nine tenths.

    With the mock, each worker has topics of its own.
    """
    total = events * workers
    groups = workers if server.kind == "mock" else 1
    backlogs = [backlog(server, texts, total // groups) for _ in range(groups)]
    of_worker = [backlogs[number % groups] for number in range(workers)]
    results = server.places([topics.output for topics in backlogs])
    with ExitStack() as stack:
        running = [started(stack, folder / f"{topics.group}-{number}", server.bootstrap, topics, settings)
                   for number, topics in enumerate(of_worker)]  # fmt: skip

        def reached(least: float) -> tuple[float, int] | None:
            for worker in running:
                alive(worker)
            found = server.offsets(results, OffsetSpec.latest())
            return (time.monotonic(), found) if found >= least else None

        for worker in running:
            worker.wait_for_status("/readyz", 200, LOADING_S)
        begin = wait_for(lambda: reached(total * WARM_SHARE), "a fifth of the results", 300, every=0.05)
        assert begin[1] < total * 0.7, "most events were scored before all workers were ready: raise --events"
        end = wait_for(lambda: reached(total * 0.9), "most of the results", 600, every=0.05)
        wait_for(lambda: reached(total), "all results", 120, every=0.2)
    return (end[1] - begin[1]) / (end[0] - begin[0])


def backlog(server: Server, texts: Sequence[str], events: int) -> Topics:
    """New topics, with so many events published to the input; of the mock, to several inputs, separated by commas."""
    topics = Topics.unique()
    is_mock = server.kind == "mock"
    parts = [range(begin, min(events, begin + TOPIC_EVENTS)) for begin in range(0, events, TOPIC_EVENTS)]
    inputs = [f"{topics.input}.{part.start}" for part in parts] if is_mock else [topics.input]
    # The mock keeps little, and answers a fetch with one batch of a partition: large and compressed ones.
    sending: dict[str, Any] = {"compression.type": "zstd", "linger.ms": 200} if is_mock else {}
    server.create(*inputs, topics.output, topics.dead_letters)
    for part, name in zip(parts, cycle(inputs), strict=False):
        publish(server.bootstrap, name, (event(number, numbered(texts, number)) for number in part), **sending)
    first = server.offsets(server.places(inputs), OffsetSpec.earliest())
    assert not first, f"the broker has dropped {first} events of the backlog: lower TOPIC_EVENTS"
    return replace(topics, input=",".join(inputs))


def numbered(texts: Sequence[str], number: int) -> str:
    """No text twice: from the second time on it has a number."""
    times, at = divmod(number, len(texts))
    return texts[at] + (f" {times}" if times else "")


def started(stack: ExitStack, folder: Path, bootstrap: str, topics: Topics, settings: dict[str, Any]) -> WorkerProcess:
    folder.mkdir()
    worker = WorkerProcess(
        folder,
        "worker",
        bootstrap_servers=bootstrap,
        input_topics=topics.input,
        output_topic=topics.output,
        dead_letter_topic=topics.dead_letters,
        group_id=topics.group,
        **settings,
    )
    stack.callback(worker.terminate)
    return worker


def half_load(
    server: Server, checkpoint: Path, settings: dict[str, Any], texts: Sequence[str], rate: float, seconds: float
) -> dict[str, Any]:
    """Milliseconds from publishing to the result of each event at `rate` events/s; nothing where there is no Kafka."""
    if server.kafka is None:
        return {}
    with new_testbed(server.kafka, PARTITIONS, checkpoint, "worker", **settings) as bed:
        bed.start().wait_for_status("/readyz", 200, LOADING_S)
        times, _ = bed.waits_under_load(rate, seconds, lambda number: event(number, numbered(texts, number)))
    return {"half_load": {"events_per_s": round(rate), **percentiles(times)}}


# The table.


def table(figures: dict[str, Any]) -> str:
    lines = [
        f"Machine: {figures['machine']['cpu']}, {figures['machine']['cores']} cores; {figures['machine']['device']}."
    ]
    right, engine, kafka = (figures.get(part) for part in ("right", "engine", "kafka"))
    if right:
        lines += [
            "",
            f"builtin checkpoint, {right['texts']} texts, against float32 without graphs. `dtype=auto` expects "
            f"{right['expected_agreement']:.3%} of labels to agree and takes {right['auto_is']}.",
            "",
            "| way | labels that agree | other labels | largest difference of a logit |",
            "| --- | --- | --- | --- |",
            *(
                f"| {name} | {each['labels_that_agree']:.2%} | {each['changed_labels']} | {each['largest_difference']:.2e} |"
                for name, each in right["against_float32"].items()
            ),
        ]
    rows: list[tuple[str, float, float | None]] = []
    if right:
        agreeing = 100 * (1 - right["against_float32"][right["half"]]["changed_labels"] / right["texts"])
        rows += [(name := "labels that agree in half precision, %", round(agreeing, 3), ASKED[name])]
    if engine:
        speeds = {name: statistics.median(values) for name, values in engine["texts_per_s"].items()}
        rows += [
            ("from ids, texts/s", speeds["from ids"], ASKED["from ids, texts/s"]),
            ("from text, texts/s", speeds["from text"], ASKED["from text, texts/s"]),
            ("tokenizing alone, texts/s", speeds["tokenizing alone"], None),
            (f"floor at {engine['peak_tflops']} TFLOP/s, texts/s", engine["floor_texts_per_s"], None),
            ("from ids / floor", engine["from ids / floor"], None),
        ]
        rows += [(f"one window: {name}, ms", value, None) for name, value in engine["ms_of_a_window"].items()]
        rows += [(f"one window: {name}", value, None) for name, value in engine["window"].items()]
    if kafka:
        words = {"1": "one worker, events/s", "2": "two workers, events/s", "4": "four workers, events/s"}
        rows += [(words[count], speed, ASKED.get(words[count])) for count, speed in kafka["events_per_s"].items()]
        if load := kafka.get("half_load"):
            rows += [(f"half load ({load['events_per_s']} events/s), p50 ms", load["p50_ms"], None)]
            rows += [("half load, p99 ms", load["p99_ms"], ASKED["half load, p99 ms"])]
        lines += ["", served(kafka)]
    if rows:
        lines += ["", "| what | measured | asked |", "| --- | --- | --- |"]
        lines += [f"| {name} | {value:,} | {'' if asked is None else f'{asked:,}'} |" for name, value, asked in rows]
    return "\n".join(lines) + "\n"


def served(kafka: dict[str, Any]) -> str:
    """The sentences on the broker and on the micro-batches."""
    name = kafka["broker"]
    if name == "mock":
        name = f"librdkafka's mock cluster, no Kafka ({kafka['no_kafka']}); each worker with topics of its own"
    sizes = kafka["micro_batches"]
    return (
        f"Broker: {name}; on the same machine. Micro-batches of {sizes['backlog']:,} texts on the backlog, "
        f"of {sizes['half_load']:,} at half load."
    )


if __name__ == "__main__":
    main()
