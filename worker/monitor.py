"""The HTTP side: /metrics, /livez and /readyz. Served from before the model loads, until the very end."""

from aiohttp import web

from worker.health import Health
from worker.metrics import CONTENT_TYPE, Metrics


class Monitor:
    """Answers GET and HEAD alone, on ``host``:``port`` (0: any free port; ``port`` then says which)."""

    def __init__(self, health: Health, metrics: Metrics, *, host: str, port: int) -> None:
        self.port = port
        self._host = host
        self._health = health
        self._metrics = metrics
        app = web.Application()
        app.router.add_get("/metrics", self._answer_metrics)
        app.router.add_get("/livez", self._answer_livez)
        app.router.add_get("/readyz", self._answer_readyz)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        metrics.ready.set_function(lambda: float(health.why_not_ready() is None))

    async def start(self) -> None:
        """Begins to answer. Raises OSError where the address is taken or not this machine's."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self.port, shutdown_timeout=1)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _answer_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _answer_livez(self, _: web.Request) -> web.Response:
        return _verdict("alive", self._health.why_not_alive())

    async def _answer_readyz(self, _: web.Request) -> web.Response:
        return _verdict("ready", self._health.why_not_ready())


def _verdict(good: str, trouble: str | None) -> web.Response:
    return web.Response(text=(trouble or good) + "\n", status=503 if trouble else 200)
