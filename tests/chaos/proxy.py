"""A TCP proxy that can delay, swallow, cut and refuse: the network between a worker and its broker."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Final

CHUNK: Final = 65_536
RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER that makes a close a reset


class Proxy:
    """Leads from a port of the loopback to `target`. It runs on a thread of its own; every method may be called from any.

    `set` holds until the next `set`: `delay_s` for each chunk on its way; `swallows`: connections stay open, and nothing
    gets through; `refuses`: connections are reset, and new ones too.
    """

    def __init__(self, port: int, target: str) -> None:
        self.port = port
        host, _, target_port = target.rpartition(":")
        self._target = host, int(target_port)
        self._delay_s = 0.0
        self._refuses = False
        self._passes = asyncio.Event()
        self._passes.set()
        self._cut_next = False
        self.bytes_back = 0  # what has come from the target, ever
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: asyncio.Server = self._call(self._listen)

    def set(self, *, delay_s: float = 0.0, swallows: bool = False, refuses: bool = False) -> None:
        async def change() -> None:
            self._delay_s, self._refuses = delay_s, refuses
            if swallows:
                self._passes.clear()
            else:
                self._passes.set()
            if refuses:
                self._reset_all()

        self._call(change)

    def reset(self) -> None:
        """Every connection ends with a reset."""

        async def reset() -> None:
            self._reset_all()

        self._call(reset)

    def cut(self) -> None:
        """The next chunk is cut in half, and its connection reset."""

        async def cut() -> None:
            self._cut_next = True

        self._call(cut)

    def move(self, port: int) -> None:
        """Leads from another port; nobody is let in at the one before, and whoever was in is out."""

        async def move() -> asyncio.Server:
            self._server.close()
            self._reset_all()
            self.port = port
            return await self._listen()

        self._server = self._call(move)

    def close(self) -> None:
        async def close() -> None:
            self._server.close()
            self._reset_all()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

        self._call(close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, function: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result(60)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    def _reset_all(self) -> None:
        for pair in self._pairs:
            for writer in pair:
                reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._refuses:
                raise ConnectionRefusedError
            there, back = await asyncio.open_connection(*self._target)
        except OSError:
            reset(writer)
            return
        pair = (writer, back)
        self._pairs.add(pair)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, back))
                group.create_task(self._pump(there, writer, is_back=True))
        except* OSError:
            pass
        finally:
            self._pairs.discard(pair)
            for each in pair:
                reset(each)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_back: bool = False) -> None:
        while chunk := await reader.read(CHUNK):
            self.bytes_back += len(chunk) if is_back else 0
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            await self._passes.wait()
            if self._cut_next:
                self._cut_next = False
                writer.write(chunk[: len(chunk) // 2])
                raise ConnectionResetError
            writer.write(chunk)
            await writer.drain()
        raise ConnectionAbortedError  # the other direction ends with this one


def reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
