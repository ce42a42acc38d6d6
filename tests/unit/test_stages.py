"""What the pipeline does where something breaks, or a partition is lost, with stages that do what the test says."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition

from worker.core.dead_letter_limit import DeadLetterLimit
from worker.core.events import Decoded, Decoder, Encoder, Event, Failure, Outgoing, Stage
from worker.kafka.reader import Record
from worker.kafka.sink import ProducerRecord
from worker.kafka.source import Assignment
from worker.pipeline import stages as module
from worker.pipeline.stages import MicroBatch, Outcome, Part, Pipeline, Stages
from worker.reasons import Reason
from worker.runtime.loop_budget import TurnBudget
from worker.telemetry.metrics import Metrics


class FakeSource:
    """Notes what is acknowledged, and what is dropped."""

    def __init__(self) -> None:
        self.acknowledged: list[tuple[Assignment, int]] = []
        self.dropped: list[Assignment] = []
        self.held = 0

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def next_batch(self) -> None: ...

    def stop_taking(self) -> None: ...

    async def close(self, _: float) -> int:
        return 0

    def records_held(self) -> int:
        return self.held

    def acknowledge(self, assignment: Assignment, next_offset: int, records: int) -> None:
        self.acknowledged.append((assignment, next_offset))

    def drop(self, assignment: Assignment, records: int) -> None:
        self.dropped.append(assignment)


class FakeSink:
    """Takes everything; ``after_first`` is called once the first records are acknowledged."""

    def __init__(self) -> None:
        self.published: list[tuple[int, int]] = []  # partition and offset
        self.after_first: Callable[[], None] = lambda: None

    async def publish(self, producer_records: Sequence[ProducerRecord]) -> list[Reason | None]:
        self.published += [(producer_record.origin, producer_record.offset) for producer_record in producer_records]
        await asyncio.sleep(0)
        self.after_first()
        return [None] * len(producer_records)

    async def close(self, _: float) -> None: ...


class FakeTurnBudget(TurnBudget):
    """Notes what it is asked for, and has something happen meanwhile."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.asked: list[int] = []
        self._meanwhile = meanwhile

    async def before(self, records: int) -> None:
        self.asked.append(records)
        self._meanwhile()


class FakeInference:
    async def watch(self) -> None:
        await asyncio.Event().wait()


class FakeTransactions:
    def __init__(self) -> None:
        self.is_finished = False

    def serve(self, *_: object) -> None: ...

    async def finish(self) -> None:
        self.is_finished = True


def piped(source: FakeSource, sink: FakeSink, transactions: FakeTransactions | None = None) -> Pipeline:
    return Pipeline(
        source=source,  # type: ignore[arg-type]
        decoder=Decoder(),
        inference=FakeInference(),  # type: ignore[arg-type]
        encoder=Encoder(output_mode="result"),
        sink=sink,  # type: ignore[arg-type]
        flood=DeadLetterLimit(limit=0, window=1),
        turn_budget=TurnBudget(),
        metrics=Metrics("test"),
        output_topic="out",
        dead_letter_topic="dead",
        version="test",
        transactions=transactions,  # type: ignore[arg-type]
    )


def part_of(assignment: Assignment, count: int) -> Part:
    tp = assignment.tp
    records = [Record(tp.topic, tp.partition, offset, 0, b"k", b"v", ()) for offset in range(count)]
    outcomes = [
        Outcome(record, ProducerRecord("out", Outgoing(b"k", b"v", [], 0), record.partition, record.offset))
        for record in records
    ]
    return Part(assignment, records, [], 0, outcomes)


async def published(pipeline: Pipeline, *parts: Part) -> None:
    stages = Stages()
    unused: Any = None
    stages.encoded.put_nowait(MicroBatch(list(parts), unused))
    stages.encoded.put_nowait(None)
    await asyncio.wait_for(pipeline._publish(stages), 5)


async def test_what_is_published_is_acknowledged() -> None:
    source, sink = FakeSource(), FakeSink()
    assignment = Assignment(TopicPartition("t", 0))
    await published(piped(source, sink), part_of(assignment, 10))
    assert sink.published == [(0, offset) for offset in range(10)]
    assert source.acknowledged == [(assignment, 10)]


async def test_the_slices_of_a_partition_that_goes_meanwhile_are_not_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its next owner has them already, perhaps; the others' go on."""
    monkeypatch.setattr(module, "RECORDS_PER_PUBLISH", 4)
    source, sink = FakeSource(), FakeSink()
    going, staying = Assignment(TopicPartition("t", 0)), Assignment(TopicPartition("t", 1))
    sink.after_first = lambda: setattr(going, "is_owned", False)
    await published(piped(source, sink), part_of(going, 10), part_of(staying, 3))
    assert sink.published == [(0, offset) for offset in range(4)] + [(1, offset) for offset in range(3)]


async def test_a_partition_that_goes_before_anything_is_published_is_dropped() -> None:
    """What was not published cannot be published twice."""
    source, sink = FakeSource(), FakeSink()
    going, staying = Assignment(TopicPartition("t", 0)), Assignment(TopicPartition("t", 1))
    pipeline = piped(source, sink)
    pipeline._turn_budget = FakeTurnBudget(lambda: setattr(going, "is_owned", False))
    await published(pipeline, part_of(going, 10), part_of(staying, 3))
    assert sink.published == [(1, offset) for offset in range(3)]
    assert (source.acknowledged, source.dropped) == ([(staying, 3)], [going])


@pytest.mark.parametrize("is_draining", [True, False])
async def test_what_was_taken_is_finished_in_a_drain_even_where_its_partition_is_about_to_go(is_draining: bool) -> None:
    source, scored, stages = FakeSource(), [], Stages(tokenized=asyncio.Queue(), scored=asyncio.Queue())
    pipeline = piped(source, FakeSink())

    async def score(job: Any) -> None:
        scored.append(job)

    pipeline._inference.score = score  # type: ignore[method-assign, assignment]
    going, gone = Assignment(TopicPartition("t", 0), accepts=False), Assignment(TopicPartition("t", 1), is_owned=False)
    gone.accepts = False
    job: Any = object()
    stages.tokenized.put_nowait(MicroBatch([part_of(going, 3), part_of(gone, 3)], job))
    stages.tokenized.put_nowait(None)
    if is_draining:
        pipeline.drain()
    await asyncio.wait_for(pipeline._score(stages), 5)
    assert source.dropped == ([gone] if is_draining else [going, gone])
    assert scored == ([job] if is_draining else [])


async def test_every_stage_asks_before_it_handles_records() -> None:
    pipeline = piped(FakeSource(), FakeSink())
    turn_budget = pipeline._turn_budget = FakeTurnBudget()
    part = part_of(Assignment(TopicPartition("t", 0)), 1_000)
    await pipeline._decoded([(part.assignment, part.records)])
    assert turn_budget.asked == [512, 488]
    turn_budget.asked.clear()
    await published(pipeline, part)
    assert turn_budget.asked == [1_000, 1_000], "to publish, and to count"


async def test_a_refused_rounds_dead_letters_are_not_written_in_one_go() -> None:
    class Refusing(FakeSink):
        async def publish(self, producer_records: Sequence[ProducerRecord]) -> list[Reason | None]:
            await super().publish(producer_records)
            return [
                "result_too_large" if producer_record.topic == "out" else None for producer_record in producer_records
            ]

    sink = Refusing()
    pipeline = piped(FakeSource(), sink)
    turn_budget = pipeline._turn_budget = FakeTurnBudget()
    await published(pipeline, part_of(Assignment(TopicPartition("t", 0)), 1_000))
    assert turn_budget.asked == [1_000, 512, 488, 1_000], "to publish, to write the letters, and to count"
    assert sink.published == [(0, offset) for offset in range(1_000)] * 2


class NotingGauge(DeadLetterLimit):
    def __init__(self) -> None:
        super().__init__(limit=0.5, window=10_000)
        self.looked_at: list[tuple[int, dict[Reason, int]]] = []

    def look_at(self, records: int, reasons: Mapping[Reason, int]) -> None:
        self.looked_at.append((records, dict(reasons)))


def scored(offsets: range) -> MicroBatch:
    """Where the records at even offsets cannot be decoded, and the others cannot be scored."""
    records = [Record("t", 0, offset, 0, None, b"", ()) for offset in offsets]
    decoded: list[Decoded] = [
        Failure("decode", "invalid_json", "") if n % 2 == 0 else Event(str(n), "text") for n in offsets
    ]
    job: Any = SimpleNamespace(answers=["no answer"] * sum(n % 2 for n in offsets), truncated=[False] * len(offsets))
    job.model = SimpleNamespace(name="m")
    return MicroBatch([Part(Assignment(TopicPartition("t", 0)), records, decoded, 0)], job)


@pytest.mark.parametrize("which", ["_flood", "_flood_of_published"])
async def test_records_that_are_read_again_count_once_towards_a_flood(which: str) -> None:
    """Their micro-batches are cut elsewhere the second time, and they may have been published without being committed."""
    pipeline, stages = piped(FakeSource(), FakeSink()), Stages(scored=asyncio.Queue(), encoded=asyncio.Queue())
    gauge = NotingGauge()
    setattr(pipeline, which, gauge)
    pipeline._refusals.note({"invalid_timestamp": 1})  # from then on what is published is looked at, too
    for offsets in (range(10), range(3, 14), range(4, 9)):
        stages.scored.put_nowait(scored(offsets))
        stages.scored.put_nowait(None)
        await asyncio.wait_for(pipeline._encode(stages), 5)
        await asyncio.wait_for(pipeline._publish(stages), 5)
        stages.encoded.get_nowait()  # None, which stays
    both = ("invalid_json", "inference_failed")
    assert gauge.looked_at == [(10, dict.fromkeys(both, 5)), (4, dict.fromkeys(both, 2)), (0, {})]


@pytest.mark.parametrize("stage", ["decode", "publish"])
async def test_what_was_judged_before_it_was_published_is_not_judged_again(stage: Stage) -> None:
    """Here the records of the micro-batches that were looked at come in another order."""
    pipeline = piped(FakeSource(), FakeSink())
    pipeline._flood_of_published = DeadLetterLimit(limit=0.5, window=10)
    part = part_of(Assignment(TopicPartition("t", 0)), 10)
    for outcome in part.outcomes:
        outcome.failure = Failure(stage, "invalid_timestamp", "")
    await published(pipeline, part)
    assert pipeline._flooded.is_set() == (stage == "publish")


async def test_garbage_is_looked_for_where_few_records_are_held_and_as_long_as_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = FakeSource()
    pipeline = piped(source, FakeSink())
    quiet: list[bool] = []
    is_left = False

    async def collect(is_quiet: Callable[[], bool]) -> None:
        nonlocal is_left
        for source.held in (0, module.FEW, module.FEW + 1):
            quiet.append(is_quiet())
        pipeline.drain()
        try:
            await asyncio.Event().wait()
        finally:
            is_left = True

    monkeypatch.setattr(module.garbage, "collect", collect)
    await asyncio.wait_for(pipeline.run(), 5)
    assert quiet == [True, True, False]
    assert is_left


# When something breaks.


async def never() -> None:
    await asyncio.Event().wait()


async def breaks() -> None:
    raise RuntimeError


def breaks_later(stages: Stages) -> Callable[[], Awaitable[None]]:
    async def work() -> None:
        await stages.scored.get()
        raise RuntimeError

    return work


@pytest.mark.parametrize("is_later", [False, True])
async def test_what_was_handed_over_before_a_stage_broke_is_committed(is_later: bool) -> None:
    """Such as all before a flood, whether encoding has met it already or does so among the last ones."""
    transactions, stages = FakeTransactions(), Stages()
    pipeline = piped(FakeSource(), FakeSink(), transactions)
    works: dict[str, Callable[[], Any]] = {
        "tokenize": never,
        "score": never,
        "encode": breaks_later(stages) if is_later else breaks,
        "publish": lambda: pipeline._publish(stages),
    }
    tasks = {name: asyncio.create_task(work()) for name, work in works.items()}
    await asyncio.sleep(0.01)
    started = time.monotonic()
    await pipeline._finish_scored(tasks, stages, started + 60)
    assert transactions.is_finished
    for task in tasks.values():
        with contextlib.suppress(RuntimeError, asyncio.CancelledError):
            await asyncio.wait_for(task, 5)
