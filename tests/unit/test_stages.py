"""What the pipeline does where something breaks, or a partition is lost, with stages that do what the test says."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition

from tests.support.events import FakeRecord
from tests.support.source import until
from worker.core.dead_letter_limit import DeadLetterLimit
from worker.core.decoder import Decoder
from worker.core.encoder import Encoder
from worker.core.events import Decoded, Event, Failure, Null, Outgoing, Stage, TooOld
from worker.core.sentiment import CARD
from worker.kafka import at_least_once
from worker.kafka.assignment import Assignment, Assignments
from worker.kafka.at_least_once import AtLeastOnce
from worker.kafka.delivery import Outcome
from worker.kafka.producer_records import ProducerRecord
from worker.kafka.reader import FetchedRecord
from worker.pipeline import stages as module
from worker.pipeline.accounting import Accounting
from worker.pipeline.micro_batch import MicroBatch, Part
from worker.pipeline.outcomes import AVRO_BYTES, Outcomes
from worker.pipeline.publishing import Publishing
from worker.pipeline.stages import Pipeline, Queues
from worker.reasons import Reason
from worker.runtime.loop_budget import TurnBudget
from worker.runtime.tasks import cancel_all
from worker.telemetry.health import Health
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


class WaitingSource(FakeSource):
    """Has no records until the end."""

    async def next_batch(self) -> None:
        await asyncio.Event().wait()


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


class FakeDelivery:
    """Delivers nothing, and notes that no more will be put."""

    def __init__(self) -> None:
        self.finished = asyncio.Event()

    def serve(self, *_: object) -> None: ...

    async def run(self) -> None:
        await self.finished.wait()

    def finish(self) -> None:
        self.finished.set()

    async def put(self, assignment: Assignment, outcomes: Sequence[Outcome]) -> None: ...

    async def close(self, _: float) -> None: ...


WHERE: Any = {"output_topic": "out", "dead_letter_topic": "dead", "version": "test"}


def pipeline_of(source: FakeSource, delivery: Any = None, limit: DeadLetterLimit | None = None) -> Pipeline:
    limit, budget = limit or DeadLetterLimit(limit=0, window=1), TurnBudget()
    return Pipeline(
        source=source,  # type: ignore[arg-type]
        inference=FakeInference(),  # type: ignore[arg-type]
        outcomes=Outcomes(Decoder(), Encoder(output_mode="result"), turn_budget=budget, **WHERE),
        publishing=Publishing(turn_budget=budget, **WHERE),
        accounting=Accounting(dead_letter_limit=limit, metrics=Metrics("test"), output_topic="out"),
        delivery=delivery or FakeDelivery(),
        dead_letter_limit=limit,
        metrics=Metrics("test"),
    )


def part_of(assignment: Assignment, count: int) -> Part:
    tp = assignment.tp
    records = [FetchedRecord(tp.topic, tp.partition, offset, 0, b"k", b"v", ()) for offset in range(count)]
    return Part(assignment, records, [], 0)


def outcomes_of(part: Part) -> list[Outcome]:
    return [
        Outcome(record, ProducerRecord("out", Outgoing(b"k", b"v", [], 0), record.partition, record.offset))
        for record in part.records
    ]


async def delivered(
    source: FakeSource, sink: FakeSink, *parts: Part, budget: TurnBudget | None = None, slice_of: int = 512
) -> None:
    """As the pipeline would: each part by slices, then no more."""
    budget = budget or TurnBudget()
    delivery = AtLeastOnce(
        sink,  # type: ignore[arg-type]
        capacity=10_000,
        turn_budget=budget,
        metrics=Metrics("test"),
        health=Health(),
    )
    limit = DeadLetterLimit(limit=0, window=1)
    accounting = Accounting(dead_letter_limit=limit, metrics=Metrics("test"), output_topic="out")
    delivery.serve(source, Publishing(turn_budget=budget, **WHERE).publish, accounting.count)  # type: ignore[arg-type]
    for part in parts:
        outcomes = outcomes_of(part)
        for begin in range(0, len(outcomes), slice_of):
            await delivery.put(part.assignment, outcomes[begin : begin + slice_of])
    delivery.finish()
    await asyncio.wait_for(delivery.run(), 30)


async def test_what_is_published_is_acknowledged() -> None:
    source, sink = FakeSource(), FakeSink()
    assignment = Assignment(TopicPartition("t", 0))
    await delivered(source, sink, part_of(assignment, 10))
    assert sink.published == [(0, offset) for offset in range(10)]
    assert source.acknowledged == [(assignment, 10)]


async def test_the_slices_of_a_partition_that_goes_meanwhile_are_not_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its next owner has them already, perhaps; the others' go on."""
    monkeypatch.setattr(at_least_once, "RECORDS_PER_PUBLISH", 4)
    source, sink = FakeSource(), FakeSink()
    going, staying = Assignment(TopicPartition("t", 0)), Assignment(TopicPartition("t", 1))
    sink.after_first = lambda: setattr(going, "is_owned", False)
    await delivered(source, sink, part_of(going, 10), part_of(staying, 3), slice_of=4)
    assert sink.published == [(0, offset) for offset in range(4)] + [(1, offset) for offset in range(3)]
    assert (source.acknowledged, source.dropped) == ([(going, 4), (staying, 3)], [going, going])


async def test_a_partition_that_goes_before_anything_is_published_is_dropped() -> None:
    """What was not published cannot be published twice."""
    source, sink = FakeSource(), FakeSink()
    going, staying = Assignment(TopicPartition("t", 0)), Assignment(TopicPartition("t", 1))
    budget = FakeTurnBudget(lambda: setattr(going, "is_owned", False))
    await delivered(source, sink, part_of(going, 10), part_of(staying, 3), budget=budget)
    assert sink.published == [(1, offset) for offset in range(3)]
    assert (source.acknowledged, source.dropped) == ([(staying, 3)], [going])


async def test_who_puts_waits_while_too_much_is_waiting() -> None:
    source, sink = FakeSource(), FakeSink()
    nothing: Any = None
    delivery = AtLeastOnce(
        sink,  # type: ignore[arg-type]
        capacity=10,
        turn_budget=TurnBudget(),
        metrics=Metrics("test"),
        health=Health(),
    )
    delivery.serve(source, nothing, nothing)  # type: ignore[arg-type]
    part = part_of(Assignment(TopicPartition("t", 0)), 10)
    await delivery.put(part.assignment, outcomes_of(part))
    putting = asyncio.create_task(delivery.put(part.assignment, outcomes_of(part)))
    await asyncio.sleep(0.01)
    assert not putting.done()
    running = asyncio.create_task(delivery.run())
    await asyncio.wait_for(putting, 30)
    await cancel_all([running])


@pytest.mark.parametrize("is_draining", [True, False])
async def test_what_was_taken_is_finished_in_a_drain_even_where_its_partition_is_about_to_go(is_draining: bool) -> None:
    source, scored, queues = FakeSource(), [], Queues(tokenized=asyncio.Queue(), scored=asyncio.Queue())
    pipeline = pipeline_of(source)

    async def forward(job: Any) -> None:
        scored.append(job)

    pipeline._inference.forward = forward  # type: ignore[method-assign, assignment]
    going, gone = Assignment(TopicPartition("t", 0), accepts=False), Assignment(TopicPartition("t", 1), is_owned=False)
    gone.accepts = False
    job: Any = object()
    queues.tokenized.put_nowait(MicroBatch([part_of(going, 3), part_of(gone, 3)], job))
    queues.tokenized.put_nowait(None)
    if is_draining:
        pipeline.drain()
    await asyncio.wait_for(pipeline._forward(queues), 30)
    assert source.dropped == ([gone] if is_draining else [going, gone])
    assert scored == ([job] if is_draining else [])


async def test_every_stage_asks_before_it_handles_records() -> None:
    budget = FakeTurnBudget()
    part = part_of(Assignment(TopicPartition("t", 0)), 1_000)
    outcomes = Outcomes(Decoder(), Encoder(output_mode="result"), turn_budget=budget, **WHERE)
    await outcomes.decoded([(part.assignment, list(part.records))])
    assert budget.asked == [512, 488]
    budget.asked.clear()
    await delivered(FakeSource(), FakeSink(), part, budget=budget)
    assert budget.asked == [1_000, 1_000], "to publish, and to count"


async def test_a_drain_finishes_nothing_behind_what_was_dropped() -> None:
    """A revocation has begun, and the drain begins before it ends: an offset behind the dropped records would lose them."""
    assignments = Assignments(Metrics("test"))
    source, scored, queues = FakeSource(), [], Queues(tokenized=asyncio.Queue(), scored=asyncio.Queue())
    source.drop = assignments.drop  # type: ignore[method-assign]
    pipeline = pipeline_of(source)

    async def forward(job: Any) -> None:
        scored.append(job)

    pipeline._inference.forward = forward  # type: ignore[method-assign, assignment]
    going, jobs = Assignment(TopicPartition("t", 0), accepts=False), (object(), object())
    running = asyncio.create_task(pipeline._forward(queues))
    queues.tokenized.put_nowait(MicroBatch([part_of(going, 3)], jobs[0]))  # type: ignore[arg-type]
    await until(lambda: going.under_way == -3)
    pipeline.drain()
    queues.tokenized.put_nowait(MicroBatch([part_of(going, 4)], jobs[1]))  # type: ignore[arg-type]
    queues.tokenized.put_nowait(None)
    await asyncio.wait_for(running, 30)
    assert (scored, going.under_way) == ([], -7)


async def test_who_waits_for_schemas_learns_of_the_drain_and_what_it_gives_up_goes_no_further() -> None:
    source, queues, batches = FakeSource(), Queues(), [[(Assignment(TopicPartition("t", 0)), [])], None]
    pipeline, waits = pipeline_of(source), asyncio.Event()

    async def next_batch() -> Any:
        return batches.pop(0)

    async def fetched(chunks: list[Any], drop: Any, draining: asyncio.Event) -> list[Any]:
        waits.set()
        await draining.wait()
        drop(chunks[0][0], 0)
        return []

    async def tokenize(texts: Sequence[str]) -> Any:
        return SimpleNamespace(texts=texts)

    source.next_batch = next_batch  # type: ignore[attr-defined]
    pipeline._schemas = SimpleNamespace(fetched=fetched)  # type: ignore[assignment]
    pipeline._inference.tokenize = tokenize  # type: ignore[method-assign, assignment]
    working = asyncio.gather(pipeline._tokenize(queues), pipeline._forward(queues))
    await asyncio.wait_for(waits.wait(), 30)
    pipeline.drain()
    await asyncio.wait_for(working, 30)
    assert (len(source.dropped), queues.scored.get_nowait(), queues.scored.empty()) == (1, None, True)


async def test_large_values_in_avro_are_not_decoded_in_one_go() -> None:
    """Each byte may be a field, and 512 records may have 100 kB each."""
    turns: list[int] = []

    class CountedDecoder(Decoder):
        def decode_all(self, records: Sequence[Any]) -> list[Any]:
            turns.append(sum(len(record.value) for record in records))
            asyncio.get_running_loop().call_soon(turns.append, 0)
            return super().decode_all(records)

    values = [b"x" * size for size in (10, 20, AVRO_BYTES, AVRO_BYTES + 1, 30, AVRO_BYTES - 30, 1)]
    records: Any = [FakeRecord(value) for value in values]
    decoder = CountedDecoder(input_format="avro")
    outcomes = Outcomes(decoder, Encoder(), turn_budget=TurnBudget(), **WHERE)
    (part,), _ = await outcomes.decoded([(Assignment(TopicPartition("t", 0)), records)])
    assert turns == [30, 0, AVRO_BYTES, 0, AVRO_BYTES + 1, 0, AVRO_BYTES, 0, 1, 0]
    assert part.decoded == decoder.decode_all(records)


async def test_a_refused_rounds_dead_letters_are_not_written_in_one_go() -> None:
    class Refusing(FakeSink):
        async def publish(self, producer_records: Sequence[ProducerRecord]) -> list[Reason | None]:
            await super().publish(producer_records)
            return [
                "result_too_large" if producer_record.topic == "out" else None for producer_record in producer_records
            ]

    sink, budget = Refusing(), FakeTurnBudget()
    await delivered(FakeSource(), sink, part_of(Assignment(TopicPartition("t", 0)), 1_000), budget=budget)
    assert budget.asked == [1_000, 512, 488, 1_000], "to publish, to write the letters, and to count"
    assert sink.published == [(0, offset) for offset in range(1_000)] * 2


class NotingLimit(DeadLetterLimit):
    def __init__(self) -> None:
        super().__init__(limit=0.5, window=10_000)
        self.looked_at: list[tuple[int, dict[Reason, int]]] = []

    def observe(self, records: int, reasons: Mapping[Reason, int]) -> None:
        self.looked_at.append((records, dict(reasons)))


def scored(offsets: range) -> MicroBatch:
    """Where the records at even offsets cannot be decoded, and the others cannot be scored."""
    records = [FetchedRecord("t", 0, offset, 0, None, b"", ()) for offset in offsets]
    decoded: list[Decoded] = [
        Failure("decode", "invalid_json", "") if n % 2 == 0 else Event(str(n), "text") for n in offsets
    ]
    job: Any = SimpleNamespace(
        answers=["no answer"] * sum(n % 2 for n in offsets), truncated=[False] * len(offsets), windows=None
    )
    job.model = SimpleNamespace(name="m", labels=CARD)
    return MicroBatch([Part(Assignment(TopicPartition("t", 0)), records, decoded, 0)], job)


BOTH = ("invalid_json", "inference_failed")


async def test_records_that_are_read_again_count_once_towards_the_limit() -> None:
    """Their micro-batches are cut elsewhere the second time."""
    limit = NotingLimit()
    pipeline, queues = pipeline_of(FakeSource(), limit=limit), Queues(scored=asyncio.Queue())
    for offsets in (range(10), range(3, 14), range(4, 9)):
        queues.scored.put_nowait(scored(offsets))
        queues.scored.put_nowait(None)
        await asyncio.wait_for(pipeline._encode(queues), 30)
    assert limit.looked_at == [(10, dict.fromkeys(BOTH, 5)), (4, dict.fromkeys(BOTH, 2)), (0, {})]


async def test_records_that_are_published_again_count_once_towards_the_limit() -> None:
    """They may have been published without being committed."""
    accounting = Accounting(dead_letter_limit=NotingLimit(), metrics=Metrics("test"), output_topic="out")
    accounting._refusals.note({"invalid_timestamp": 1})  # from then on what is published is looked at, too
    outcomes = Outcomes(Decoder(), Encoder(output_mode="result"), turn_budget=TurnBudget(), **WHERE)
    for offsets in (range(10), range(3, 14), range(4, 9)):
        batch = scored(offsets)
        accounting.count([outcome async for some in outcomes.of(batch.parts[0], batch.job) for outcome in some], 0.0)
    looked_at = accounting._limit.looked_at  # type: ignore[attr-defined]
    assert looked_at == [(10, dict.fromkeys(BOTH, 5)), (4, dict.fromkeys(BOTH, 2)), (0, {})]


def nothing_scored() -> Any:
    return SimpleNamespace(answers=[], truncated=[], windows=None, model=SimpleNamespace(name="m", labels=CARD))


async def test_what_is_too_old_is_counted_apart_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics("test")
    accounting = Accounting(dead_letter_limit=DeadLetterLimit(limit=0, window=1), metrics=metrics, output_topic="out")
    part = part_of(Assignment(TopicPartition("t", 0)), 60)
    part.decoded = [TooOld.WHEN_READ] * 59 + [Null.SKIPPED]
    outcomes = Outcomes(Decoder(), Encoder(output_mode="result"), turn_budget=TurnBudget(), **WHERE)
    made = [outcome async for some in outcomes.of(part, nothing_scored()) for outcome in some]
    assert all(outcome.producer_record is outcome.failure is None for outcome in made)
    for now in range(20):
        accounting.count(made, float(now))
    assert not caplog.messages, "there are others among them"
    for now in range(20):
        accounting.count(made[:59], float(now))
    (message,) = caplog.messages
    assert "all older than max_age_s" in message
    assert metrics.outcomes() == {
        "consumed": 20 * 119, "results": 0, "dead_letters": 0, "tombstones": 0, "skipped": 20 * 119
    }  # fmt: skip
    assert metrics.records_skipped.labels("null")._value.get() == 20


def test_of_what_is_too_old_the_limit_counts_what_was_so_when_it_was_written() -> None:
    part = part_of(Assignment(TopicPartition("t", 0)), 5)
    part.decoded = [TooOld.WHEN_READ, TooOld.WHEN_WRITTEN, TooOld.WHEN_WRITTEN, Null.TOMBSTONE, Null.SKIPPED]
    assert MicroBatch([part], nothing_scored()).failures() == {"too_old": 2}


@pytest.mark.parametrize("stage", ["decode", "publish"])
async def test_what_was_judged_before_it_was_published_is_not_judged_again(stage: Stage) -> None:
    """Here the records of the micro-batches that were looked at come in another order."""
    limit = DeadLetterLimit(limit=0.5, window=10)
    accounting = Accounting(dead_letter_limit=limit, metrics=Metrics("test"), output_topic="out")
    outcomes = outcomes_of(part_of(Assignment(TopicPartition("t", 0)), 10))
    for outcome in outcomes:
        outcome.failure = Failure(stage, "invalid_timestamp", "")
    accounting.count(outcomes, 0.0)
    assert accounting._exceeded.is_set() == (stage == "publish")


async def test_garbage_is_looked_for_where_few_records_are_held_and_as_long_as_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = FakeSource()
    pipeline = pipeline_of(source)
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

    monkeypatch.setattr(module.garbage_collection, "collect", collect)
    await asyncio.wait_for(pipeline.run(), 30)
    assert quiet == [True, True, False]
    assert is_left


# When something breaks.


async def never() -> None:
    await asyncio.Event().wait()


async def breaks() -> None:
    raise RuntimeError


def breaks_later(queues: Queues) -> Callable[[], Awaitable[None]]:
    async def work() -> None:
        await queues.scored.get()
        raise RuntimeError

    return work


@pytest.mark.parametrize("is_later", [False, True])
async def test_what_was_handed_over_before_a_stage_broke_is_delivered(is_later: bool) -> None:
    """Such as all before the dead-letter limit, whether encoding has met it already or does so among the last ones."""
    delivery, queues = FakeDelivery(), Queues()
    pipeline = pipeline_of(FakeSource(), delivery)
    works: dict[str, Callable[[], Any]] = {
        "tokenize": never,
        "forward": never,
        "encode": breaks_later(queues) if is_later else breaks,
        "deliver": delivery.run,
    }
    tasks = {name: asyncio.create_task(work()) for name, work in works.items()}
    await asyncio.sleep(0.01)
    await asyncio.wait_for(pipeline._finish_scored(tasks, queues, time.monotonic() + 60), 30)
    assert delivery.finished.is_set()
    for task in tasks.values():
        with contextlib.suppress(RuntimeError, asyncio.CancelledError):
            await asyncio.wait_for(task, 30)


async def test_a_delivery_that_is_cancelled_does_not_end_the_pipeline_before_its_time() -> None:
    """The source is closed all the same, which commits what is acknowledged and leaves the group."""

    class Cancelled(FakeDelivery):
        is_closed = False

        async def run(self) -> None:
            raise asyncio.CancelledError

        async def close(self, _: float) -> None:
            self.is_closed = True

    delivery = Cancelled()
    with pytest.raises(RuntimeError, match="ended by itself: deliver"):
        await asyncio.wait_for(pipeline_of(WaitingSource(), delivery).run(), 30)
    assert delivery.is_closed
