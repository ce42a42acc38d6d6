"""aiokafka's clients: makes one for administration, and stops any of them within a deadline."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient

from worker.kafka.aiokafka_compat.connections import end_remains
from worker.kafka.aiokafka_compat.metadata import use_topics
from worker.kafka.connection import UNREACHABLE, Connection
from worker.runtime.tasks import cancel_all, within

log = logging.getLogger(__name__)

CLOSE_S: Final = 5.0


def admin_client(connection: Connection, names: Iterable[str]) -> AIOKafkaAdminClient:
    """An admin client, not started. While a broker is away it asks for these topics alone, not for all of the cluster."""
    client = AIOKafkaAdminClient(**connection.options())
    if names := set(names):
        use_topics(client, names)
    return client


async def stop_client(client: Any, what: str, timeout_s: float) -> None:
    """Stops a consumer or producer within ``timeout_s``, and ends the tasks and connections it leaves. Raises nothing.

    ``what`` names it in the log.
    """
    # A task of its own, because aiokafka's stop can raise the CancelledError of its inner tasks.
    stopping = asyncio.create_task(client.stop())
    try:
        await asyncio.wait({stopping}, timeout=timeout_s)
        if not stopping.done():
            log.warning("the %s did not stop in time", what)
        elif not stopping.cancelled() and stopping.exception():
            log.warning("stopping the %s failed", what, extra={"error": type(stopping.exception()).__name__})
    finally:
        await cancel_all([stopping])
        await end_remains(client)


async def close_admin(client: AIOKafkaAdminClient) -> None:
    """Closes an admin client, within CLOSE_S. Raises nothing of Kafka's."""
    try:
        await within(CLOSE_S, client.close())
    except UNREACHABLE:
        await end_remains(client)
