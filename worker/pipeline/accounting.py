"""Counts what has been delivered, and ends the worker where too many results have been refused."""

import asyncio
import copy
import logging
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Final

from worker.core.dead_letter_limit import DeadLetterLimit, TooManyDeadLetters
from worker.kafka.delivery import Outcome, Skipped
from worker.kafka.refusals import RefusalLog
from worker.kafka.topics import NO_LIMIT
from worker.reasons import Reason
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

TOO_OLD_RECORDS: Final = 100  # one after the other: then the log says that nothing is scored
TOO_OLD_AGAIN_S: Final = 600.0  # it says so again after this time at the earliest


class Accounting:
    """Turns delivered outcomes into metrics, and checks them against the limit on dead letters.

    The delivery calls ``count``. ``watch`` is called with the same outcomes; the console shows them.
    """

    def __init__(
        self,
        *,
        dead_letter_limit: DeadLetterLimit,
        metrics: Metrics,
        output_topic: str,
        retention_ms: int = NO_LIMIT,
        watch: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
    ) -> None:
        self._limit = copy.deepcopy(dead_letter_limit)
        self._metrics = metrics
        self._output_topic = output_topic
        self._retention_s = retention_ms / 1000
        self._watch = watch
        self._refusals = RefusalLog(output_topic)
        self._exceeded = asyncio.Event()
        self._error: TooManyDeadLetters | None = None
        self._too_old = 0  # records one after the other, up to the newest
        self._too_old_told_at = -math.inf
        self._counted: dict[Hashable, int] = {}  # by partition, the offset up to which the limit has looked

    async def raise_when_exceeded(self) -> None:
        """Waits until refused results have reached the limit on dead letters; then raises TooManyDeadLetters.

        Whether a result is refused is known only after publishing, when its dead letter is acknowledged already.
        """
        await self._exceeded.wait()
        assert self._error
        raise self._error

    def _look_at_published(self, outcomes: Sequence[Outcome], is_refused: bool) -> None:
        """Counts published outcomes towards the limit on dead letters.

        Only refused results can exceed it here: all other failures were counted before they were published.
        """
        new: list[Outcome] = []
        for tp, run in groupby(outcomes, key=attrgetter("record.topic", "record.partition")):
            some, counted = list(run), self._counted.get(tp, 0)
            new += some[bisect_left(some, counted, key=attrgetter("record.offset")) :]
            self._counted[tp] = max(counted, some[-1].record.offset + 1)
        try:
            self._limit.observe(len(new), Counter(o.failure.reason for o in new if o.failure))
        except TooManyDeadLetters as error:
            if is_refused:
                self._error = error
                self._exceeded.set()

    def count(self, outcomes: Sequence[Outcome], now: float) -> None:
        """Counts outcomes that have been acknowledged at ``now``, in s since 1970."""
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
            skipped = [outcome.reason for outcome in others if isinstance(outcome, Skipped)]
            self._metrics.skipped(skipped)
            self._note_too_old(skipped.count("too_old"), len(outcomes), now)
            self._metrics.tombstones.inc(sum(o.producer_record is not None and o.failure is None for o in others))
        else:
            self._too_old = 0
        self._refusals.note(refused)
        if self._refusals.is_active:  # else all failures were counted before they were published
            self._look_at_published(outcomes, bool(refused))
        self._metrics.consumed([outcome.record.topic for outcome in outcomes])
        self._watch(outcomes)

    def _note_too_old(self, too_old: int, outcomes: int, now: float) -> None:
        self._too_old = self._too_old + too_old if too_old == outcomes else 0
        if self._too_old >= TOO_OLD_RECORDS and now - self._too_old_told_at >= TOO_OLD_AGAIN_S:
            self._too_old_told_at = now
            log.warning(
                "the newest records are all older than max_age_s and are not scored: after an outage this passes, else this "
                "machine's clock or the records' timestamps are wrong",
                extra={"records": self._too_old},
            )

    def _tell_of_retention(self, age_s: float) -> None:
        log.warning(
            "a result is older than its topic keeps records: Kafka may delete it before anyone reads it; set "
            "result_timestamp to now, or raise the topic's retention.ms",
            extra={"topic": self._output_topic, "age_s": round(age_s), "retention_s": round(self._retention_s)},
        )
        self._retention_s = math.inf  # once is enough
