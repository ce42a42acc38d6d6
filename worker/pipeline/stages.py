"""The stages and the queues between them: gather → tokenize → network → publish → commit; start, drain, stop.

Every consumed record travels in its micro-batch, tombstones and records that cannot be decoded too, so that none is
overtaken. A queue holds one micro-batch, the last a few; a full one is backpressure all the way to Kafka.
"""

import asyncio
import contextlib
import copy
import logging
import math
import operator
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress, groupby, repeat
from operator import attrgetter
from typing import Any, Final, cast

from worker.core.dead_letter_limit import DeadLetterLimit, TooManyDeadLetters
from worker.core.events import (
    Decoded,
    Decoder,
    Encoder,
    Event,
    Failure,
    Null,
    Outgoing,
    dead_letter,
    iso_time,
    rows,
    smaller_dead_letters,
)
from worker.core.sentiment import Sentiment
from worker.kafka.connection import NO_LIMIT
from worker.kafka.exactly_once import Transactions
from worker.kafka.reader import Record
from worker.kafka.sink import RECORDS_PER_PUBLISH, ProducerRecord, RefusalLog, Sink
from worker.kafka.source import Assignment, Chunk, Source
from worker.pipeline.inference import Inference, Job
from worker.reasons import Reason
from worker.runtime import garbage_collection as garbage
from worker.runtime.loop_budget import SLICE, TurnBudget
from worker.runtime.tasks import cancelled
from worker.telemetry.metrics import Metrics
from worker.telemetry.tracing import Batch, Tracing

log = logging.getLogger(__name__)

FEW: Final = 1_000  # records: to look through what belongs to them takes some milliseconds
ENCODED: Final = 4  # micro-batches that may wait for those before them to be acknowledged, and go as one then
LAST_WORDS_S: Final = 5.0  # to publish, commit and leave the group when something has gone wrong for good


class DrainTimeout(Exception):
    """What was in flight could not be finished in time; the message says how much. Nothing of it was committed."""


class DeadLetterRefused(Exception):
    """The dead-letter topic takes a record in no form; the message says where the record is."""


@dataclass(slots=True)
class Part:
    """The records of one assignment in a micro-batch. ``first_text`` is where their texts begin in its job."""

    assignment: Assignment
    records: Sequence[Record]
    decoded: list[Decoded]
    first_text: int
    outcomes: "list[Outcome]" = field(default_factory=list)  # once they are scored


@dataclass(slots=True)
class MicroBatch:
    parts: list[Part]
    job: Job
    trace: Batch | None = None

    def __len__(self) -> int:
        return sum(len(part.records) for part in self.parts)

    def failures(self) -> Counter[Reason]:
        """Why how many of its records cannot be scored."""
        reasons: Counter[Reason] = Counter()
        for part in self.parts:
            texts = len(part.decoded)
            if set(map(type, part.decoded)) != {Event}:
                reasons.update(decoded.reason for decoded in part.decoded if isinstance(decoded, Failure))
                texts = sum(isinstance(decoded, Event) for decoded in part.decoded)
            answers = self.job.answers[part.first_text : part.first_text + texts]
            if set(map(type, answers)) != {Sentiment}:
                reasons["inference_failed"] += sum(not isinstance(answer, Sentiment) for answer in answers)
        return +reasons

    def beyond(self, seen: dict[Hashable, int]) -> "MicroBatch":
        """What of it lies beyond the offsets that ``seen`` has by partition, and moves them on.

        The rest is read again, after an abort or when the group was joined anew.
        """
        parts = []
        for part in self.parts:
            tp, next_offset = part.assignment.tp, part.records[-1].offset + 1
            first = bisect_left(part.records, seen.get(tp, 0), key=lambda record: record.offset)
            seen[tp] = max(next_offset, seen.get(tp, 0))
            texts = sum(type(decoded) is Event for decoded in part.decoded[:first])
            if first < len(part.records):
                parts.append(Part(part.assignment, part.records[first:], part.decoded[first:], part.first_text + texts))
        return MicroBatch(parts, self.job)


@dataclass(slots=True)
class Outcome:
    """What becomes of one record: something to publish, or nothing; why, if it failed; and what to count."""

    record: Record
    producer_record: ProducerRecord | None
    failure: Failure | None = None
    sentiment: Sentiment | None = None


@dataclass(slots=True)
class Stages:
    """The queues between the stages; None in one of them: that was all."""

    tokenized: asyncio.Queue[MicroBatch | None] = field(default_factory=lambda: asyncio.Queue(1))
    scored: asyncio.Queue[MicroBatch | None] = field(default_factory=lambda: asyncio.Queue(1))
    encoded: asyncio.Queue[MicroBatch | None] = field(default_factory=lambda: asyncio.Queue(ENCODED))


class Pipeline:
    """Moves records from source through inference to sink. ``run`` until ``drain`` is called, or something breaks.

    After a revocation, records that have not reached the network go no further; those past it are published while their
    partition is still this process's.
    """

    def __init__(
        self,
        *,
        source: Source,
        decoder: Decoder,
        inference: Inference,
        encoder: Encoder,
        sink: Sink,
        flood: DeadLetterLimit,
        turn_budget: TurnBudget,
        metrics: Metrics,
        output_topic: str,
        dead_letter_topic: str,
        version: str,
        drain_timeout_s: float = 20,
        retention_ms: int = NO_LIMIT,
        transactions: Transactions | None = None,
        tracing: Tracing | None = None,
        watch: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
        watch_topics: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._source = source
        self._decoder = decoder
        self._inference = inference
        self._encoder = encoder
        self._sink = sink
        self._flood = flood
        self._turn_budget = turn_budget
        self._metrics = metrics
        self._output_topic = output_topic
        self._dead_letter_topic = dead_letter_topic
        self._version = version
        self._drain_timeout_s = drain_timeout_s
        self._retention_s = retention_ms / 1000
        self._transactions = transactions
        self._tracing = tracing
        self._watch = watch
        self._watch_topics = watch_topics
        self._refusals = RefusalLog(output_topic)
        self._flood_of_published = copy.deepcopy(flood)
        self._flooded = asyncio.Event()
        self._published_flood: TooManyDeadLetters | None = None
        self._draining = asyncio.Event()
        self._seen: dict[Hashable, int] = {}  # by partition, the offset up to which the flood gauge has looked
        self._counted: dict[Hashable, int] = {}  # the same of the gauge of what is published
        if transactions:
            transactions.serve(source, self._deliver, self._count)

    def drain(self) -> None:
        """Stops taking records; ``run`` ends when what is in flight is published and committed. Answers at once."""
        self._draining.set()
        self._source.stop_taking()

    async def run(self) -> None:
        """Works until drained. Raises DrainTimeout, InferenceLost, UnreadableRecord, Standstill, TopicRecreated,
        WrongSetting, DeadLetterRefused, TooManyDeadLetters.

        However it ends, what has been acknowledged is committed and the group is left.
        """
        stages = Stages()
        tasks = {
            "consume": asyncio.create_task(self._source.run()),
            "watch": asyncio.create_task(self._inference.watch()),
            "tokenize": asyncio.create_task(self._tokenize(stages)),
            "score": asyncio.create_task(self._score(stages)),
            "encode": asyncio.create_task(self._encode(stages)),
            "publish": asyncio.create_task(self._publish(stages)),
            "flood": asyncio.create_task(self._raise_flood()),
            "garbage": asyncio.create_task(garbage.collect(self._is_quiet)),
        }
        if self._transactions:
            tasks["transactions"] = asyncio.create_task(self._transactions.watch())
        if self._watch_topics:
            tasks["topics"] = asyncio.create_task(self._watch_topics())
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({draining, *tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
            broken = _first_error(tasks.values()) or self._first_end(tasks)
            deadline = time.monotonic() + (LAST_WORDS_S if broken else self._drain_timeout_s)
            if broken:
                self._source.stop_taking()
                await self._finish_scored(tasks, stages, deadline)
            else:
                broken = await self._finish(tasks, deadline)
            uncommitted = await self._source.close(max(1.0, deadline - time.monotonic()))
            if uncommitted and not broken:
                broken = DrainTimeout(
                    f"{uncommitted} records were taken and could not be committed; they are read again"
                )
            await self._sink.close(max(1.0, deadline - time.monotonic()))
            if self._transactions:
                await self._transactions.close(max(1.0, deadline - time.monotonic()))
        finally:
            await cancelled([draining, *tasks.values()])
        if broken:
            raise broken

    def _is_quiet(self) -> bool:
        return self._source.records_held() <= FEW

    # Endings.

    def _first_end(self, tasks: dict[str, asyncio.Task[None]]) -> BaseException | None:
        """None ends by itself before the drain; one that does, by a stray cancel, must not look like one."""
        ended = [name for name, task in tasks.items() if task.done()]
        return RuntimeError(f"ended by itself: {', '.join(ended)}") if ended and not self._draining.is_set() else None

    async def _finish(self, tasks: dict[str, asyncio.Task[None]], deadline: float) -> BaseException | None:
        """Lets the stages run empty. Answers with what went wrong, if anything did."""
        stages = [tasks[name] for name in ("tokenize", "score", "encode", "publish")]
        timeout_s = max(0.0, deadline - time.monotonic())
        await asyncio.wait(stages, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        broken = _first_error(stages)
        if broken is None and not all(task.done() for task in stages):
            return DrainTimeout(
                f"what was in flight ({self._source.records_held()} records) could not be finished within drain_timeout_s = "
                f"{self._drain_timeout_s:g}; it was not committed, and is read again"
            )
        return broken

    async def _finish_scored(self, tasks: dict[str, asyncio.Task[None]], stages: Stages, deadline: float) -> None:
        """Publishes what inference has finished, and nothing that it has not."""
        await cancelled([tasks["tokenize"], tasks["score"]])
        encode, publish = tasks["encode"], tasks["publish"]
        with contextlib.suppress(Exception):  # what is broken is known
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                if not encode.done():
                    putting = asyncio.create_task(stages.scored.put(None))
                    await asyncio.wait({encode, publish, putting}, return_when=asyncio.FIRST_EXCEPTION)
                if encode.done() and encode.exception() and not publish.done():
                    putting = asyncio.create_task(stages.encoded.put(None))
                    await asyncio.wait({publish, putting}, return_when=asyncio.FIRST_EXCEPTION)
                await asyncio.wait({publish} if encode.done() else {encode, publish})
                if self._transactions:  # what was handed over before it broke
                    await self._transactions.finish()

    # Stages.

    async def _tokenize(self, stages: Stages) -> None:
        asked_at = time.time_ns()
        while (chunks := await self._source.next_batch()) is not None:
            trace = None
            if self._tracing:
                trace = self._tracing.received((record for _, records in chunks for record in records), asked_at)
            parts, texts = await self._decoded(chunks)
            batch = MicroBatch(parts, await self._inference.tokenize(texts), trace)
            self._metrics.queue_depth["tokenized"].inc(len(batch))
            await stages.tokenized.put(batch)
            asked_at = time.time_ns()
        await stages.tokenized.put(None)

    async def _score(self, stages: Stages) -> None:
        while (batch := await stages.tokenized.get()) is not None:
            self._metrics.queue_depth["tokenized"].dec(len(batch))
            # In a drain what was taken is finished also where its partition is about to go.
            stays = operator.attrgetter("is_owned" if self._draining.is_set() else "accepts")
            self._drop(batch, [part for part in batch.parts if not stays(part.assignment)])
            if not batch.parts:
                continue
            await self._inference.score(batch.job)
            self._metrics.queue_depth["scored"].inc(len(batch))
            await stages.scored.put(batch)
        await stages.scored.put(None)

    async def _encode(self, stages: Stages) -> None:
        """Encodes beside publishing: what is ready when a micro-batch has been acknowledged goes out as one.

        With transactions they take over from here.
        """
        while (batch := await stages.scored.get()) is not None:
            self._metrics.queue_depth["scored"].dec(len(batch))
            self._drop(batch, [part for part in batch.parts if not part.assignment.is_owned])
            if not batch.parts:
                continue
            failures, new = batch.failures(), batch.beyond(self._seen)
            self._flood.look_at(len(new), failures if len(new) == len(batch) else new.failures())
            for part in batch.parts:
                async for outcomes in self._outcomes(part, batch.job):
                    if self._transactions:  # which count and acknowledge them once they are committed
                        await self._transactions.put(part.assignment, outcomes)
                    else:
                        part.outcomes += outcomes
            if self._tracing and batch.trace:
                done = [record for part in batch.parts for record in part.records]
                self._tracing.processed(batch.trace, done, failures.total())
            if not self._transactions:
                await stages.encoded.put(batch)
        if self._transactions:
            await self._transactions.finish()
        await stages.encoded.put(None)

    async def _publish(self, stages: Stages) -> None:
        while batches := await _all_there_is(stages.encoded):
            for batch in batches:
                self._drop(batch, [part for part in batch.parts if not part.assignment.is_owned])
            started = time.monotonic()
            parts = [part for batch in batches for part in batch.parts]
            begun: set[int] = set()  # parts of which something is published
            for some in _slices(parts):
                await self._turn_budget.before(sum(len(outcomes) for _, outcomes in some))
                owned = [(part, outcomes) for part, outcomes in some if part.assignment.is_owned]
                begun.update(id(part) for part, _ in owned)
                outcomes = [outcome for _, of_part in owned for outcome in of_part]
                await self._deliver(outcomes, self._sink)
                now = time.time()
                await self._turn_budget.before(len(outcomes))
                self._count(outcomes, now)
            self._metrics.stage_seconds["publish"].observe(time.monotonic() - started)
            for part in parts:
                if id(part) in begun:
                    self._source.acknowledge(part.assignment, part.records[-1].offset + 1, len(part.records))
                else:
                    self._source.drop(part.assignment, len(part.records))

    def _drop(self, batch: MicroBatch, parts: list[Part]) -> None:
        for part in parts:
            batch.parts.remove(part)
            self._source.drop(part.assignment, len(part.records))

    # What becomes of a record.

    async def _decoded(self, chunks: list[Chunk]) -> tuple[list[Part], list[str]]:
        parts: list[Part] = []
        texts: list[str] = []
        for assignment, records in chunks:
            decoded: list[Decoded] = []
            async for some in self._turn_budget.slices(records):
                decoded += self._decoder.decode_all(some)
            parts.append(Part(assignment, records, decoded, len(texts)))
            texts += [event.text for event in decoded if type(event) is Event]
        return parts, texts

    async def _outcomes(self, part: Part, job: Job) -> AsyncIterator[list[Outcome]]:
        """By slices of at most SLICE records."""
        processed_at = iso_time(time.time() * 1000)
        first_text = part.first_text
        for begin in range(0, len(part.records), SLICE):
            records, decoded = part.records[begin : begin + SLICE], part.decoded[begin : begin + SLICE]
            await self._turn_budget.before(len(records))
            events = cast("list[Event]", decoded)
            if set(map(type, decoded)) == {Event}:
                yield self._results(records, events, job, first_text, processed_at)
            else:
                are_events = [type(event) is Event for event in decoded]
                events = list(compress(events, are_events))
                of_events = list(compress(records, are_events))
                results = iter(self._results(of_events, events, job, first_text, processed_at))
                yield [
                    next(results) if is_event else self._without_text(record, event)  # type: ignore[arg-type]
                    for record, event, is_event in zip(records, decoded, are_events, strict=True)
                ]
            first_text += len(events)

    def _without_text(self, record: Record, decoded: Failure | Null) -> Outcome:
        if isinstance(decoded, Failure):
            return self._dead_letter(record, decoded)
        is_sent = decoded is Null.TOMBSTONE
        return Outcome(record, self._parcel(record, self._encoder.tombstone(record)) if is_sent else None)

    def _results(
        self, records: Sequence[Record], events: list[Event], job: Job, first_text: int, processed_at: str
    ) -> list[Outcome]:
        end = first_text + len(events)
        answers, truncated = job.answers[first_text:end], job.truncated[first_text:end]
        if set(map(type, answers)) == {Sentiment}:
            sentiments = cast("list[Sentiment]", answers)
            results = self._encoder.encode(records, events, sentiments, truncated, job.model.name, processed_at)
            if set(map(type, results)) == {Outgoing}:
                producer_records = rows(
                    ProducerRecord,
                    repeat(self._output_topic),
                    results,
                    repeat(records[0].partition),
                    [record.offset for record in records],
                )
                return list(map(Outcome, records, producer_records, repeat(None), sentiments))
        else:
            are_scored = [type(answer) is Sentiment for answer in answers]
            encoded = iter(
                self._encoder.encode(
                    list(compress(records, are_scored)),
                    list(compress(events, are_scored)),
                    list(compress(answers, are_scored)),  # type: ignore[arg-type]
                    list(compress(truncated, are_scored)),
                    job.model.name,
                    processed_at,
                )
            )
            results = [
                next(encoded) if is_scored else Failure("infer", "inference_failed", str(answer or "no answer"))
                for answer, is_scored in zip(answers, are_scored, strict=True)
            ]
        return [
            self._dead_letter(record, result)
            if type(result) is Failure
            else Outcome(record, self._parcel(record, result), None, answer)  # type: ignore[arg-type]
            for record, result, answer in zip(records, results, answers, strict=True)
        ]

    def _dead_letter(self, record: Record, failure: Failure) -> Outcome:
        return Outcome(record, self._letter(record, dead_letter(record, failure, self._version)), failure)

    def _parcel(self, record: Record, outgoing: Outgoing) -> ProducerRecord:
        return ProducerRecord(self._output_topic, outgoing, record.partition, record.offset)

    def _letter(self, record: Record, outgoing: Outgoing) -> ProducerRecord:
        return ProducerRecord(self._dead_letter_topic, outgoing, record.partition, record.offset)

    # Delivery.

    async def _deliver(self, outcomes: Sequence[Outcome], sink: Sink) -> None:
        """Publishes what there is to publish. What the output topic refuses goes on as a dead letter."""
        refused = await self._send([outcome for outcome in outcomes if outcome.producer_record], sink)
        if not refused:
            return
        async for some in self._turn_budget.slices(refused):
            for outcome, reason in some:
                if outcome.failure is None:
                    outcome.failure = Failure("publish", reason, f"the topic {self._output_topic} refuses the result")
                    outcome.sentiment = None
                    letter = dead_letter(outcome.record, outcome.failure, self._version)
                    outcome.producer_record = self._letter(outcome.record, letter)
        refused = await self._send([outcome for outcome, _ in refused], sink)
        for size in range(2):
            self._refuse_unless(refused, "result_too_large")
            async for some in self._turn_budget.slices(refused):
                for outcome, _ in some:
                    if outcome.failure:
                        smaller = smaller_dead_letters(outcome.record, outcome.failure, self._version)[size]
                        outcome.producer_record = self._letter(outcome.record, smaller)
            refused = await self._send([outcome for outcome, _ in refused], sink)
        self._refuse_unless(refused, None)

    def _refuse_unless(self, refused: list[tuple[Outcome, Reason]], expected: Reason | None) -> None:
        """Raises DeadLetterRefused for the first dead letter that the topic refuses for another reason."""
        for outcome, reason in refused:
            if reason == expected:
                continue
            record = outcome.record
            advice = {
                "result_too_large": "raise its max.message.bytes",
                "invalid_timestamp": "compare this machine's clock with the broker's",
                "key_required": "set its cleanup.policy to delete",
            }
            raise DeadLetterRefused(
                f"the topic {self._dead_letter_topic} takes the dead letter of {record.topic}-{record.partition} at offset "
                f"{record.offset} in no form ({reason}); {advice.get(reason, 'see the broker')}"
            )

    async def _send(self, outcomes: list[Outcome], sink: Sink) -> list[tuple[Outcome, Reason]]:
        if not outcomes:
            return []
        began_at = time.time_ns()
        answers = await sink.publish([outcome.producer_record for outcome in outcomes])  # type: ignore[misc]
        if self._tracing:
            self._tell_of_sent(self._tracing, outcomes, began_at)
        if not any(answers):
            return []
        return [(outcome, reason) for outcome, reason in zip(outcomes, answers, strict=True) if reason]

    def _tell_of_sent(self, tracing: Tracing, outcomes: list[Outcome], began_at: int) -> None:
        for topic, are_letters in ((self._output_topic, False), (self._dead_letter_topic, True)):
            records = [outcome.record for outcome in outcomes if (outcome.failure is not None) == are_letters]
            if records:
                tracing.sent(topic, records, began_at)

    async def _raise_flood(self) -> None:
        """What the output refuses is known once it is published: it is acknowledged, and ends the worker from here."""
        await self._flooded.wait()
        assert self._published_flood
        raise self._published_flood

    def _look_at_published(self, outcomes: Sequence[Outcome], is_refused: bool) -> None:
        """Judges only where results are refused: the other failures were judged before they were published."""
        new: list[Outcome] = []
        for tp, run in groupby(outcomes, key=attrgetter("record.topic", "record.partition")):
            some, counted = list(run), self._counted.get(tp, 0)
            new += some[bisect_left(some, counted, key=attrgetter("record.offset")) :]
            self._counted[tp] = max(counted, some[-1].record.offset + 1)
        try:
            self._flood_of_published.look_at(len(new), Counter(o.failure.reason for o in new if o.failure))
        except TooManyDeadLetters as flood:
            if is_refused:
                self._published_flood = flood
                self._flooded.set()

    def _count(self, outcomes: Sequence[Outcome], now: float) -> None:
        """What has been acknowledged, and when, in s since 1970."""
        sentiments = [outcome.sentiment for outcome in outcomes if outcome.sentiment]
        if sentiments:
            labels, scores, _ = zip(*sentiments, strict=True)
            timestamps = [outcome.record.timestamp for outcome in outcomes if outcome.sentiment]
            ages = [now - timestamp / 1000 for timestamp in timestamps if timestamp is not None and timestamp >= 0]
            self._metrics.published(labels, scores, ages)
            if ages and max(ages) > self._retention_s:
                self._tell_of_retention(max(ages))
        refused: Counter[Reason] = Counter()
        if len(sentiments) < len(outcomes):
            others = [outcome for outcome in outcomes if not outcome.sentiment]
            self._metrics.dead_lettered([(o.failure.stage, o.failure.reason) for o in others if o.failure])
            for outcome in others:
                if outcome.failure and outcome.failure.stage == "publish":
                    refused[outcome.failure.reason] += 1
            self._metrics.records_skipped.inc(sum(outcome.producer_record is None for outcome in others))
            self._metrics.tombstones.inc(sum(o.producer_record is not None and o.failure is None for o in others))
        self._refusals.note(refused)
        if self._refusals.is_active:  # while nothing is refused all was judged before it was published
            self._look_at_published(outcomes, bool(refused))
        self._metrics.consumed([outcome.record.topic for outcome in outcomes])
        self._watch(outcomes)

    def _tell_of_retention(self, age_s: float) -> None:
        log.warning(
            "a result is older than its topic keeps records: Kafka may delete it before anyone reads it; set "
            "result_timestamp to now, or raise the topic's retention.ms",
            extra={"topic": self._output_topic, "age_s": round(age_s), "retention_s": round(self._retention_s)},
        )
        self._retention_s = math.inf  # once is enough


async def _all_there_is(queue: "asyncio.Queue[MicroBatch | None]") -> list[MicroBatch]:
    """Waits for one; nothing once None has been taken, which stays for the next call."""
    batches: list[MicroBatch] = []
    while not batches or not queue.empty():
        batch = await queue.get()
        if batch is None:
            queue.put_nowait(None)
            break
        batches.append(batch)
    return batches


def _slices(parts: Sequence[Part]) -> Iterator[list[tuple[Part, list[Outcome]]]]:
    """The parts' outcomes, in order, by slices of RECORDS_PER_PUBLISH records."""
    some: list[tuple[Part, list[Outcome]]] = []
    room = RECORDS_PER_PUBLISH
    for part in parts:
        begin = 0
        while begin < len(part.outcomes):
            taken = part.outcomes[begin : begin + room]
            some.append((part, taken))
            begin += len(taken)
            room -= len(taken)
            if not room:
                yield some
                some, room = [], RECORDS_PER_PUBLISH
    if some:
        yield some


def _first_error(tasks: Any) -> BaseException | None:
    for task in tasks:
        if task.done() and not task.cancelled() and task.exception():
            error: BaseException = task.exception()
            return error
    return None
