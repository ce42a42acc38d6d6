"""Holds micro-batches back until the schemas that their records name are known. Only where Avro is read."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from worker.core.decoder import Decoder
from worker.kafka.assignment import Assignment, Chunk
from worker.kafka.reader import FetchedRecord
from worker.registry.schema_fetcher import SchemaFetcher
from worker.runtime.tasks import cancel_all

LOOK_S: Final = 0.2  # how often a wait looks whether its partition was revoked


class InputSchemas:
    """Fetches what ``decoder`` lacks. The pipeline calls ``fetched`` with each micro-batch before it decodes it."""

    def __init__(self, decoder: Decoder, fetcher: SchemaFetcher) -> None:
        self._decoder = decoder
        self._fetcher = fetcher

    async def fetched(
        self, chunks: list[Chunk], drop: Callable[[Assignment, int], None], draining: asyncio.Event
    ) -> list[Chunk]:
        """The chunks whose schemas are known, or known to be unknown. Waits for the registry, in the order of the chunks.

        A chunk whose partition is revoked meanwhile is dropped, so that the revocation need not wait. Once ``draining`` is
        set, the registry is not asked again where it fails or lacks a schema: chunks that need one are dropped. Whatever is
        behind a dropped chunk in its partition is dropped, too, or its offsets would be committed past that chunk.
        """
        kept, is_given_up = [], False
        for assignment, records in chunks:
            ids = self._decoder.missing_schemas(records)
            is_known = not ids or (not is_given_up and await self._is_answered(ids, assignment, records, draining))
            # Only a drain gives up on a partition that is still read; the next request might wait for its timeout, too.
            is_given_up = is_given_up or (not is_known and assignment.accepts)
            if is_known and assignment.accepts and not assignment.has_dropped:
                kept.append((assignment, records))
            else:
                drop(assignment, len(records))
        return kept

    async def _is_answered(
        self, ids: set[int], assignment: Assignment, records: Sequence[FetchedRecord], draining: asyncio.Event
    ) -> bool:
        """Waits until the registry has answered. False where that is given up: at a revocation, or in a drain."""
        fetching = asyncio.create_task(self._fetcher.fetch(ids, records))
        try:
            while assignment.accepts and not fetching.done() and not (draining.is_set() and self._fetcher.is_retrying):
                await asyncio.wait({fetching}, timeout=LOOK_S)
            if fetching.done():
                fetching.result()
            return fetching.done()
        finally:
            await cancel_all([fetching])
