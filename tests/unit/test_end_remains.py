"""What is left of a client whose stop was cut short: which tasks end, and what of other tasks is not touched."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

from worker.kafka.aiokafka_compat.connections import end_remains


class Inner:
    def __init__(self) -> None:
        self._conns: dict[Any, Any] = {}

    async def synchronize(self) -> None:
        await asyncio.Event().wait()


class Client:
    def __init__(self) -> None:
        self._client = Inner()


async def generated() -> AsyncIterator[None]:
    await asyncio.Event().wait()
    yield


class Records:
    """Something to hold."""


async def test_methods_of_the_client_end_and_those_of_others_go_on() -> None:
    stopped, other = Client(), Client()
    ending = asyncio.create_task(stopped._client.synchronize())
    staying = [
        asyncio.create_task(other._client.synchronize()),
        asyncio.create_task(asks(stopped._client)),
        asyncio.create_task(anext(generated())),  # has no name
    ]
    await asyncio.sleep(0)
    await end_remains(stopped)
    assert ending.cancelled()
    assert not any(task.done() for task in staying)
    for task in staying:
        task.cancel()


async def asks(client: Inner) -> None:
    """Who called it waits for its answer, and is told by the client's end."""
    await client.synchronize()


async def test_what_other_tasks_have_let_go_is_not_kept() -> None:
    go_on = asyncio.Event()
    records = [Records()]
    held = weakref.ref(records[0])

    async def work() -> None:
        batch = records.pop()
        await go_on.wait()
        del batch
        await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await end_remains(Client())
    go_on.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
    assert held() is None
    task.cancel()
