"""Fetches the schemas that records name, before the records are decoded; waits for a registry that does not answer."""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

from worker.core.events import Record
from worker.core.framing import FRAME_BYTES, frame
from worker.registry.client import (
    RegistryError,
    RegistryUnavailable,
    SchemaRegistry,
    SchemaUnknown,
)
from worker.runtime.backoff import Backoff
from worker.telemetry.health import Health

log = logging.getLogger(__name__)

HEALTH_PART: Final = "registry"
UNKNOWN_S: Final = 30.0  # so long an unknown id is asked for again: registries lag behind producers
IN_VAIN_S: Final = 600.0  # after a wait in vain; until then only young records are waited for
MAX_RETRIED: Final = 16  # ids of one partition's records; where there are more, the ids are random bytes
MAX_UNKNOWN: Final = 1_000  # ids that are remembered as unknown, of those that were asked for last
ASK_AGAIN_S: Final = 10.0  # an id that is remembered as unknown is asked for again after this time

Add = Callable[[int, str, str, Sequence[str]], None]


class SchemaFetcher:
    """Asks the registry for schemas by their ids, one after the other, and gives those that it has to ``add``.

    ``is_retrying`` says whether a request has failed, or an id is unknown, so that the registry is being asked again.

    The event loop uses it. ``clock`` counts s from anywhere, ``now`` from 1970, as the timestamps of records do.
    """

    def __init__(
        self,
        registry: SchemaRegistry,
        add: Add,
        health: Health,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._registry = registry
        self._add = add
        self._health = health
        self._clock = clock
        self._now = now
        self._sleep = sleep
        self._unknown: OrderedDict[int, float] = OrderedDict()  # ids, and when to ask for them again
        self._in_vain_until = -math.inf
        self.is_retrying = False

    async def check(self) -> None:
        """Waits until the registry answers. Raises RegistryRefused where it refuses the credentials."""
        backoff = Backoff(self._sleep)
        while True:
            try:
                await self._registry.check()
            except RegistryUnavailable as error:
                await self._wait(backoff, error)
            else:
                self._answered()
                return

    async def fetch(self, ids: Collection[int], records: Sequence[Record]) -> None:
        """Asks the registry for each of ``ids``, which ``records`` name; for those that it lacks again, for up to UNKNOWN_S.

        While the registry does not answer, or refuses the credentials, health says so, and it is asked again and again. The
        caller may cancel this at any moment.
        """
        try:
            lacking = [id for id in sorted(ids) if self._is_due(id) and not await self._is_found(id)]
            new = {id for id in lacking if id not in self._unknown}
            if 0 < len(new) <= MAX_RETRIED:
                found = new.difference(await self._still_lacking(sorted(new), self._patience_s(new, records)))
                lacking = [id for id in lacking if id not in found]
            for id in lacking:
                self._remember(id)
        finally:  # where this is cancelled, the registry may still be away
            self.is_retrying = False
            self._health.not_needed(HEALTH_PART)

    def _is_due(self, id: int) -> bool:
        return self._clock() >= self._unknown.get(id, -math.inf)

    def _remember(self, id: int) -> None:
        """Notes that the registry lacks this id; forgets the one for which it was asked longest ago, if there are many."""
        self._unknown[id] = self._clock() + ASK_AGAIN_S
        self._unknown.move_to_end(id)
        if len(self._unknown) > MAX_UNKNOWN:
            self._unknown.popitem(last=False)

    async def _is_found(self, id: int) -> bool:
        """Whether the registry has the schema, which is then added. Waits until it has answered."""
        backoff = Backoff(self._sleep)
        while True:
            try:
                schema = await self._registry.schema(id)
            except SchemaUnknown:
                self._answered()
                return False
            except RegistryError as error:
                await self._wait(backoff, error)
            else:
                self._answered()
                self._unknown.pop(id, None)
                self._add(id, schema.type, schema.text, schema.references)
                return True

    async def _still_lacking(self, ids: list[int], patience_s: float) -> list[int]:
        """Asks for unknown ids again for so long; returns those that stay unknown."""
        until, backoff = self._clock() + patience_s, Backoff(self._sleep)
        if patience_s > 0:
            log.warning(
                "the schema registry does not know the schemas of records; it is asked again, as it may lag behind",
                extra={"ids": ids, "at_most_s": round(patience_s)},
            )
        while ids and (left_s := until - self._clock()) > 0:
            self.is_retrying = True
            await backoff.wait(left_s)
            ids = [id for id in ids if not await self._is_found(id)]
        if ids and patience_s > 0:
            self._in_vain_until = self._clock() + IN_VAIN_S
        return ids

    def _patience_s(self, ids: Collection[int], records: Sequence[Record]) -> float:
        """How long unknown ids are asked for again.

        Where that was in vain lately, only until the youngest record that names one is UNKNOWN_S old: else a producer that
        writes random bytes now and then would hold up everything for UNKNOWN_S each time. Timestamps are the producer's: one
        that lies ahead by UNKNOWN_S gets no time either.
        """
        if self._clock() >= self._in_vain_until:
            return UNKNOWN_S
        frames, now = set(map(frame, ids)), self._now()
        named = [record.timestamp or 0 for record in records if (record.value or b"")[:FRAME_BYTES] in frames]
        return max(0.0, UNKNOWN_S - min((abs(now - ms / 1000) for ms in named), default=UNKNOWN_S))

    def _answered(self) -> None:
        self.is_retrying = False
        self._health.working(HEALTH_PART)

    async def _wait(self, backoff: Backoff, error: RegistryError) -> None:
        """Reports what the registry fails with, and waits."""
        self.is_retrying = True
        self._health.failing(HEALTH_PART, str(error))
        await backoff.wait()
