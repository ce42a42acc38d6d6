"""What becomes of a record: decoded, then a result, a dead letter, or nothing to publish."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from itertools import compress, repeat
from typing import Final, cast

from worker.core.dead_letters import dead_letter
from worker.core.decoder import Decoder
from worker.core.encoder import Encoder
from worker.core.events import Decoded, Event, Failure, Null, Outgoing, Record, TooOld, named_tuples
from worker.core.max_age import MaxAge
from worker.core.sentiment import Sentiment
from worker.core.timestamps import iso_time
from worker.kafka.assignment import Chunk
from worker.kafka.delivery import Outcome, Skipped
from worker.kafka.producer_records import ProducerRecord
from worker.pipeline.inference_job import Job
from worker.pipeline.micro_batch import Part
from worker.runtime.loop_budget import SLICE, TurnBudget

AVRO_BYTES: Final = 2**18  # of values that are decoded in one turn of the event loop, at up to 0.2 µs a byte


class Outcomes:
    """Decodes records, and makes outcomes of them once they are scored.

    It lets the event loop run other tasks in between where there are many records. With ``max_age``, records that are older
    than it says are neither decoded nor scored.
    """

    def __init__(
        self,
        decoder: Decoder,
        encoder: Encoder,
        *,
        output_topic: str,
        dead_letter_topic: str,
        version: str,
        turn_budget: TurnBudget,
        max_age: MaxAge | None = None,
    ) -> None:
        self._decoder = decoder
        self._max_age = max_age
        self._encoder = encoder
        self._output_topic = output_topic
        self._dead_letter_topic = dead_letter_topic
        self._version = version
        self._turn_budget = turn_budget

    async def decoded(self, chunks: list[Chunk]) -> tuple[list[Part], list[str]]:
        """A part for each chunk, with its records decoded; and the texts of all parts' events, in order."""
        parts: list[Part] = []
        texts: list[str] = []
        for assignment, records in chunks:
            decoded: list[Decoded] = []
            decode = self._decoder.decode_all
            if self._max_age:
                decode = partial(self._max_age.decode_all, new_from=assignment.new_from(self._max_age.seconds))
            async for some in self._turn_budget.slices(records):
                for few in _by_size(some) if self._decoder.reads_avro else [some]:
                    decoded += decode(few)
                    if len(few) < len(some):
                        await asyncio.sleep(0)
            parts.append(Part(assignment, records, decoded, len(texts)))
            texts += [event.text for event in decoded if type(event) is Event]
        return parts, texts

    async def of(self, part: Part, job: Job) -> AsyncIterator[list[Outcome]]:
        """The outcomes of the records of a part, in order, in slices of at most SLICE."""
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

    def _without_text(self, record: Record, decoded: Failure | Null | TooOld) -> Outcome:
        if isinstance(decoded, Failure):
            return self._dead_letter(record, decoded)
        if decoded is not Null.TOMBSTONE:
            return Skipped(record, None, reason="null" if decoded is Null.SKIPPED else "too_old")
        return Outcome(record, _producer_record(self._output_topic, record, self._encoder.tombstone(record)))

    def _results(
        self, records: Sequence[Record], events: list[Event], job: Job, first_text: int, processed_at: str
    ) -> list[Outcome]:
        end = first_text + len(events)
        answers, truncated = job.answers[first_text:end], job.truncated[first_text:end]
        windows = job.windows and job.windows[first_text:end]
        model = job.model
        encode = partial(self._encoder.encode, model=model.name, processed_at=processed_at, labels=model.labels)
        if set(map(type, answers)) == {Sentiment}:
            sentiments = cast("list[Sentiment]", answers)
            results = encode(records, events, sentiments, truncated, windows=windows)
            if set(map(type, results)) == {Outgoing}:
                topic, partition = repeat(self._output_topic), repeat(records[0].partition)
                offsets = [record.offset for record in records]
                producer_records = named_tuples(ProducerRecord, topic, results, partition, offsets)
                return list(map(Outcome, records, producer_records, repeat(None), sentiments))
        else:
            are_scored = [type(answer) is Sentiment for answer in answers]
            encoded = iter(
                encode(
                    list(compress(records, are_scored)),
                    list(compress(events, are_scored)),
                    list(compress(answers, are_scored)),  # type: ignore[arg-type]
                    list(compress(truncated, are_scored)),
                    windows=windows and list(compress(windows, are_scored)),
                )
            )
            results = [
                next(encoded) if is_scored else Failure("infer", "inference_failed", str(answer or "no answer"))
                for answer, is_scored in zip(answers, are_scored, strict=True)
            ]
        return [
            self._dead_letter(record, result)
            if type(result) is Failure
            else Outcome(record, _producer_record(self._output_topic, record, result), None, answer)  # type: ignore[arg-type]
            for record, result, answer in zip(records, results, answers, strict=True)
        ]

    def _dead_letter(self, record: Record, failure: Failure) -> Outcome:
        letter = dead_letter(record, failure, self._version)
        return Outcome(record, _producer_record(self._dead_letter_topic, record, letter), failure)


def _by_size(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """The records in order, in slices whose values have at most AVRO_BYTES together, or of one record that has more."""
    begin = size = 0
    for at, record in enumerate(records):
        size += len(record.value or b"")
        if size > AVRO_BYTES and at > begin:
            yield records[begin:at]
            begin, size = at, len(record.value or b"")
    yield records[begin:]


def _producer_record(topic: str, record: Record, outgoing: Outgoing) -> ProducerRecord:
    return ProducerRecord(topic, outgoing, record.partition, record.offset)
