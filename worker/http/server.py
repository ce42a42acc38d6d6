"""The HTTP side: /metrics, /livez and /readyz. Served from before the model loads, until the very end."""

from collections.abc import Iterable
from typing import Protocol

from aiohttp import web

from worker.http.access import Guard
from worker.printable import printable
from worker.telemetry.health import Health
from worker.telemetry.metrics import CONTENT_TYPE, Metrics


class Part(Protocol):
    """Something with pages of its own."""

    def add_to(self, app: web.Application) -> None: ...


class Monitor:
    """Answers what ``guard`` lets through, on its host and ``port`` (0: any free port; ``port`` then says which)."""

    def __init__(
        self, health: Health, metrics: Metrics, guard: Guard, *, port: int, parts: Iterable[Part] = ()
    ) -> None:
        self.port = port
        self._guard = guard
        self._health = health
        self._metrics = metrics
        app = self._app = guard.application(metrics)
        app.router.add_get("/metrics", self._answer_metrics)
        app.router.add_get("/livez", self._answer_livez)
        app.router.add_get("/readyz", self._answer_readyz)
        for part in parts:
            part.add_to(app)
        metrics.ready.set_function(lambda: float(health.why_not_ready() is None))

    async def start(self) -> None:
        """Begins to answer. Raises OSError where the address is taken or not this machine's."""
        self.port = await self._guard.listen(self._app, self.port)

    async def stop(self) -> None:
        await self._guard.close()

    async def _answer_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _answer_livez(self, _: web.Request) -> web.Response:
        return _verdict("alive", self._health.why_not_alive())

    async def _answer_readyz(self, _: web.Request) -> web.Response:
        return _verdict("ready", self._health.why_not_ready())


def _verdict(good: str, trouble: str | None) -> web.Response:
    return web.Response(text=(printable(trouble) if trouble else good) + "\n", status=503 if trouble else 200)
