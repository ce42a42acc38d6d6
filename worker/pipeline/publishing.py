"""Publishes outcomes. A result that the output topic refuses becomes a dead letter, and a dead letter a smaller one."""

import time
from collections.abc import Sequence

from worker.core.dead_letters import dead_letter, smaller_dead_letters
from worker.core.events import Failure, Outgoing, Record
from worker.kafka.delivery import Outcome
from worker.kafka.producer_records import ProducerRecord
from worker.kafka.sink import Sink
from worker.reasons import Reason
from worker.runtime.loop_budget import TurnBudget
from worker.telemetry.tracing import Tracing


class DeadLetterRefused(Exception):
    """The dead-letter topic takes a record in no form; the message says where the record is. Exit code 1."""


class Publishing:
    """Publishes outcomes by any sink, for one caller of each sink at a time."""

    def __init__(
        self,
        *,
        output_topic: str,
        dead_letter_topic: str,
        version: str,
        turn_budget: TurnBudget,
        tracing: Tracing | None = None,
    ) -> None:
        self._output_topic = output_topic
        self._dead_letter_topic = dead_letter_topic
        self._version = version
        self._turn_budget = turn_budget
        self._tracing = tracing
        self._are_refused = False  # some of the outcomes that were published last

    async def publish(self, outcomes: Sequence[Outcome], sink: Sink) -> None:
        """Publishes N outcomes by ``sink``, and returns when every record is acknowledged; waits for brokers that are away.

        An outcome whose result the output topic refuses becomes a dead letter, in place. Raises DeadLetterRefused.
        """
        outcomes = [outcome for outcome in outcomes if outcome.producer_record]
        known = await self._known_refusals(outcomes, sink) if self._are_refused and outcomes else []
        await self._make_letters(known)  # else each of them would cost a second round of requests
        refused = await self._send(outcomes, sink)
        self._are_refused = bool(known or refused)
        if not refused:
            return
        await self._make_letters(refused)
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

    async def _known_refusals(self, outcomes: Sequence[Outcome], sink: Sink) -> list[tuple[Outcome, Reason]]:
        """Those that have not failed, and that the output topic is known to refuse."""
        reasons = await sink.known_refusals([outcome.producer_record for outcome in outcomes])  # type: ignore[misc]
        return [(outcome, reason) for outcome, reason in zip(outcomes, reasons, strict=True) if reason]

    async def _make_letters(self, refused: Sequence[tuple[Outcome, Reason]]) -> None:
        """Makes a dead letter of each outcome that is a result, or a tombstone."""
        async for some in self._turn_budget.slices(refused):
            for outcome, reason in some:
                if outcome.failure is None:
                    outcome.failure = Failure("publish", reason, f"the topic {self._output_topic} refuses the result")
                    outcome.sentiment = None
                    letter = dead_letter(outcome.record, outcome.failure, self._version)
                    outcome.producer_record = self._letter(outcome.record, letter)

    def _letter(self, record: Record, outgoing: Outgoing) -> ProducerRecord:
        return ProducerRecord(self._dead_letter_topic, outgoing, record.partition, record.offset)

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
