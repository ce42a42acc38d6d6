"""The group's committed offsets, from which partitions are read."""

import asyncio
import time
from typing import Final

from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from worker.errors import WrongSetting
from worker.kafka.aiokafka_compat.group import RETRY_S
from worker.kafka.assignment import partition_names
from worker.kafka.group_consumer import GroupConsumer
from worker.kafka.transactional_sink import NEEDS_2_5
from worker.runtime.tasks import within
from worker.telemetry.health import Health

LONG_S: Final = 5.0  # an open transaction that holds an offset for longer is reported


class CommittedOffsets:
    """Reads committed offsets, those of all callers at a time by one request: a thousand partitions may begin at once.

    With ``require_stable`` an offset that an open transaction may still change is waited for.
    """

    def __init__(
        self, consumer: GroupConsumer, *, require_stable: bool, request_timeout_s: float, health: Health
    ) -> None:
        self._consumer = consumer
        self._require_stable = require_stable
        self._request_timeout_s = request_timeout_s
        self._health = health
        self._callers: dict[asyncio.Future[OffsetAndMetadata], TopicPartition] = {}
        self._asking: asyncio.Task[None] | None = None

    async def of(self, tp: TopicPartition) -> OffsetAndMetadata:
        """A partition's committed offset and its metadata; a negative offset for none.

        Raises what is in UNREACHABLE, and WrongSetting where the brokers cannot tell which offsets are stable.
        """
        answer = asyncio.get_running_loop().create_future()
        self._callers[answer] = tp
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        try:
            return await answer
        finally:
            self._callers.pop(answer, None)

    async def _ask(self) -> None:
        """Asks until no caller waits. A caller takes no answer to a request from before its call: it may be out of date."""
        unstable_since = None
        while asking := dict(self._callers):
            answers = await self._answers(tuple(set(asking.values())))
            for caller, tp in asking.items():
                if tp in answers and not caller.done():
                    del self._callers[caller]
                    _set(caller, answers[tp])
            unstable = {tp for caller, tp in asking.items() if caller in self._callers}
            if not unstable:
                unstable_since = None
                self._health.working("takeover", self)
                continue
            unstable_since = unstable_since or time.monotonic()
            if time.monotonic() - unstable_since > LONG_S:
                self._health.failing(
                    "takeover",
                    f"waiting for the end of a transaction that another process has left open: {partition_names(unstable)}",
                    self,
                )
            await asyncio.sleep(RETRY_S)
        self._health.working("takeover", self)

    async def _answers(self, asked: tuple[TopicPartition, ...]) -> dict[TopicPartition, OffsetAndMetadata | Exception]:
        try:
            return await within(
                self._request_timeout_s,
                self._consumer.live.committed_offsets(asked, require_stable=self._require_stable),
            )
        except NotImplementedError:
            return dict.fromkeys(asked, WrongSetting(f"{NEEDS_2_5}; older than that: the group's coordinator"))
        except Exception as error:  # noqa: BLE001 - the callers decide
            return dict.fromkeys(asked, error)


def _set(caller: asyncio.Future[OffsetAndMetadata], answer: OffsetAndMetadata | Exception) -> None:
    if isinstance(answer, Exception):
        caller.set_exception(answer)
    else:
        caller.set_result(answer)
