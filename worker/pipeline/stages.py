"""The stages and the queues between them: gather → tokenize → forward → encode → deliver; start, drain, stop.

Every consumed record travels in its micro-batch, tombstones and records that cannot be decoded too, so that none is
overtaken. A queue holds one micro-batch; a full one is backpressure all the way to Kafka.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from worker.core.dead_letter_limit import DeadLetterLimit
from worker.kafka.assignment import Assignment
from worker.kafka.delivery import Delivery
from worker.kafka.source import Source
from worker.pipeline.accounting import Accounting
from worker.pipeline.inference import Inference
from worker.pipeline.input_schemas import InputSchemas
from worker.pipeline.micro_batch import MicroBatch, Part
from worker.pipeline.outcomes import Outcomes
from worker.pipeline.publishing import Publishing
from worker.printable import counted
from worker.runtime import garbage_collection
from worker.runtime.tasks import cancel_all
from worker.telemetry.metrics import Metrics
from worker.telemetry.tracing import Tracing

FEW: Final = 1_000  # records; a garbage collection beside so few takes some milliseconds
AFTER_ERROR_S: Final = 5.0  # to publish, commit and leave the group when something has gone wrong for good


class DrainTimeout(Exception):
    """What was in flight could not be finished in time; the message says how much. Nothing of it was committed."""


@dataclass(slots=True)
class Queues:
    """The queues between the stages. A None in a queue says that nothing more comes."""

    tokenized: asyncio.Queue[MicroBatch | None] = field(default_factory=lambda: asyncio.Queue(1))
    scored: asyncio.Queue[MicroBatch | None] = field(default_factory=lambda: asyncio.Queue(1))


class Pipeline:
    """Moves records from source through inference to delivery. ``run`` works until ``drain`` is called or a part fails.

    After a revocation, records that have not reached the model go no further; those past it are published while their
    partition is still this process's.
    """

    def __init__(
        self,
        *,
        source: Source,
        inference: Inference,
        outcomes: Outcomes,
        publishing: Publishing,
        accounting: Accounting,
        delivery: Delivery,
        dead_letter_limit: DeadLetterLimit,
        metrics: Metrics,
        drain_timeout_s: float = 20,
        tracing: Tracing | None = None,
        watch_topics: Callable[[], Coroutine[Any, Any, None]] | None = None,
        schemas: InputSchemas | None = None,
    ) -> None:
        self._source = source
        self._inference = inference
        self._outcomes = outcomes
        self._accounting = accounting
        self._delivery = delivery
        self._dead_letter_limit = dead_letter_limit
        self._metrics = metrics
        self._drain_timeout_s = drain_timeout_s
        self._tracing = tracing
        self._watch_topics = watch_topics
        self._schemas = schemas
        self._draining = asyncio.Event()
        self._seen: dict[Hashable, int] = {}  # by partition, the offset up to which the dead-letter limit has looked
        delivery.serve(source, publishing.publish, accounting.count)

    def drain(self) -> None:
        """Stops taking records; ``run`` ends when what is in flight is published and committed. Answers at once."""
        self._draining.set()
        self._source.stop_taking()

    async def run(self) -> None:
        """Works until drained. Raises DrainTimeout, FatalInferenceError, UnreadableRecord, Standstill, TopicRecreated,
        WrongSetting, DeadLetterRefused, TooManyDeadLetters.

        However it ends, what has been acknowledged is committed and the group is left.
        """
        queues = Queues()
        tasks = self._begin(queues)
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({draining, *tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
            broken = _first_error(tasks.values()) or self._first_end(tasks)
            deadline = time.monotonic() + (AFTER_ERROR_S if broken else self._drain_timeout_s)
            if broken:
                self._source.stop_taking()
                await self._finish_scored(tasks, queues, deadline)
            else:
                broken = await self._finish(tasks, deadline)
            uncommitted = await self._source.close(max(1.0, deadline - time.monotonic()))
            if uncommitted and not broken:
                broken = DrainTimeout(
                    f"{counted(uncommitted, 'record')} could not be committed, and will be read again"
                )
            await self._delivery.close(max(1.0, deadline - time.monotonic()))
        finally:
            await cancel_all([draining, *tasks.values()])
        if broken:
            raise broken

    def _begin(self, queues: "Queues") -> dict[str, asyncio.Task[None]]:
        """The tasks of all stages, by their names."""
        tasks = {
            "consume": asyncio.create_task(self._source.run()),
            "watch": asyncio.create_task(self._inference.watch()),
            "tokenize": asyncio.create_task(self._tokenize(queues)),
            "forward": asyncio.create_task(self._forward(queues)),
            "encode": asyncio.create_task(self._encode(queues)),
            "deliver": asyncio.create_task(self._delivery.run()),
            "limit": asyncio.create_task(self._accounting.raise_when_exceeded()),
            "garbage collection": asyncio.create_task(
                garbage_collection.collect(lambda: self._source.records_held() <= FEW)
            ),
        }
        if self._watch_topics:
            tasks["topics"] = asyncio.create_task(self._watch_topics())
        return tasks

    # Endings.

    def _first_end(self, tasks: dict[str, asyncio.Task[None]]) -> BaseException | None:
        """The error if a task has ended before the drain although it should not; without one, it would look like a drain."""
        ended = [name for name, task in tasks.items() if task.done()]
        return RuntimeError(f"ended by itself: {', '.join(ended)}") if ended and not self._draining.is_set() else None

    async def _finish(self, tasks: dict[str, asyncio.Task[None]], deadline: float) -> BaseException | None:
        """Lets the stages run empty. Answers with what went wrong, if anything did."""
        stages = [tasks[name] for name in ("tokenize", "forward", "encode", "deliver")]
        timeout_s = max(0.0, deadline - time.monotonic())
        await asyncio.wait(stages, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        broken = _first_error(stages)
        if broken is None and not all(task.done() for task in stages):
            return DrainTimeout(
                f"what was in flight ({counted(self._source.records_held(), 'record')}) could not be finished within "
                f"drain_timeout_s = {self._drain_timeout_s:g}; it was not committed, and is read again"
            )
        return broken

    async def _finish_scored(self, tasks: dict[str, asyncio.Task[None]], queues: Queues, deadline: float) -> None:
        """Delivers what inference has finished, and nothing that it has not."""
        await cancel_all([tasks["tokenize"], tasks["forward"]])
        encode, deliver = tasks["encode"], tasks["deliver"]
        with contextlib.suppress(Exception):  # what is broken is known
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                if not encode.done():
                    putting = asyncio.create_task(queues.scored.put(None))
                    await asyncio.wait({encode, deliver, putting}, return_when=asyncio.FIRST_EXCEPTION)
                self._delivery.finish()  # also where encoding broke: what was handed over before is delivered
                await asyncio.wait({encode, deliver}, return_when=asyncio.FIRST_EXCEPTION)
                await asyncio.wait({deliver})

    # Stages.

    async def _tokenize(self, queues: Queues) -> None:
        asked_at = time.time_ns()
        while (chunks := await self._source.next_batch()) is not None:
            trace = None
            if self._tracing:
                trace = self._tracing.received((record for _, records in chunks for record in records), asked_at)
            if self._schemas:
                chunks = await self._schemas.fetched(chunks, self._source.drop, self._draining)
            parts, texts = await self._outcomes.decoded(chunks)
            batch = MicroBatch(parts, await self._inference.tokenize(texts), trace)
            self._metrics.queue_depth["tokenized"].inc(len(batch))
            await queues.tokenized.put(batch)
            asked_at = time.time_ns()
        await queues.tokenized.put(None)

    async def _forward(self, queues: Queues) -> None:
        while (batch := await queues.tokenized.get()) is not None:
            self._metrics.queue_depth["tokenized"].dec(len(batch))
            self._drop(batch, [part for part in batch.parts if not self._stays(part.assignment)])
            if not batch.parts:
                continue
            await self._inference.forward(batch.job)
            self._metrics.queue_depth["scored"].inc(len(batch))
            await queues.scored.put(batch)
        await queues.scored.put(None)

    async def _encode(self, queues: Queues) -> None:
        while (batch := await queues.scored.get()) is not None:
            self._metrics.queue_depth["scored"].dec(len(batch))
            self._drop(batch, [part for part in batch.parts if not part.assignment.is_owned])
            if not batch.parts:
                continue
            failures, new = batch.failures(), batch.beyond(self._seen)
            self._dead_letter_limit.observe(len(new), failures if len(new) == len(batch) else new.failures())
            made = [
                (part.assignment, some) for part in batch.parts async for some in self._outcomes.of(part, batch.job)
            ]
            if self._tracing and batch.trace:
                done = [record for part in batch.parts for record in part.records]
                self._tracing.processed(batch.trace, done, failures.total())
            for assignment, outcomes in made:
                await self._delivery.put(assignment, outcomes)
        self._delivery.finish()

    def _stays(self, assignment: Assignment) -> bool:
        """Whether records may enter the model. In a drain also where their partition is about to go, up to a drop."""
        is_finished = self._draining.is_set() and assignment.is_owned and not assignment.has_dropped
        return assignment.accepts or is_finished

    def _drop(self, batch: MicroBatch, parts: list[Part]) -> None:
        for part in parts:
            batch.parts.remove(part)
            self._source.drop(part.assignment, len(part.records))


def _first_error(tasks: Iterable[asyncio.Task[None]]) -> BaseException | None:
    for task in tasks:
        if task.done() and not task.cancelled() and task.exception():
            return task.exception()
    return None
