"""Replaces the checkpoint in use by another one without a restart, on POST /reload or a signal."""

import asyncio
import logging
import time
from collections.abc import Callable

from aiohttp import web

from worker.errors import UserError
from worker.pipeline.inference import Inference
from worker.pipeline.model_runner import Model
from worker.printable import printable
from worker.runtime.memory import is_out_of_memory
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

Loader = Callable[[Model], Model]
"""Takes the model in use and returns the new one. Blocks for as long as loading takes."""


class ReloadRefused(Exception):
    """No reload was begun; the message says why."""


class ReloadFailed(Exception):
    """The model in use stays; the message says why."""


class Reloader:
    """Reloads one model at a time. Use it from the event loop that inference works on.

    ``load`` runs on a thread of its own. ``on_reloaded`` is called with the new model once it is in use.
    """

    def __init__(
        self, inference: Inference, metrics: Metrics, load: Loader, on_reloaded: Callable[[Model], None]
    ) -> None:
        self._inference = inference
        self._metrics = metrics
        self._load = load
        self._on_reloaded = on_reloaded
        self._running: asyncio.Task[Model] | None = None

    @property
    def model_name(self) -> str | None:
        """``name@revision`` of the model in use; None before the first is loaded."""
        return self._inference.model.name if self._inference.is_loaded else None

    def add_to(self, app: web.Application) -> None:
        """POST /reload. The application decides who may ask for it."""
        app.router.add_post("/reload", self._answer)

    async def reload(self) -> Model:
        """Returns the new model once records are scored with it: after seconds, or as long as a download takes.

        Raises ReloadRefused, ReloadFailed. Where the caller is cancelled, the reload goes on.
        """
        if not self._inference.is_loaded:
            raise ReloadRefused("the first model is still loading")
        if self._running:
            raise ReloadRefused("a reload is under way")
        self._running = asyncio.create_task(self._reload(self._inference.model))
        self._running.add_done_callback(self._ended)
        return await asyncio.shield(self._running)

    async def reload_or_log(self) -> None:
        """The same for a signal's handler, which has nobody to tell. Never raises."""
        try:
            await self.reload()
        except ReloadRefused as error:
            log.warning("no reload: %s", error)
        except ReloadFailed:
            pass  # it is logged already

    async def _answer(self, _: web.Request) -> web.Response:
        before = self.model_name
        try:
            model = await self.reload()
        except ReloadRefused as error:
            return web.Response(text=f"no reload: {error}\n", status=409)
        except ReloadFailed as error:
            return web.Response(text=f"{before} stays in use: {error}\n", status=500)
        return web.Response(text=f"{model.name} is in use\n")

    def _ended(self, task: "asyncio.Task[Model]") -> None:
        self._running = None
        if not task.cancelled():
            task.exception()  # retrieved, for perhaps nobody waits for it any more

    async def _reload(self, old: Model) -> Model:
        log.info("reloading the model", extra={"in_use": old.name})
        started = time.monotonic()
        try:
            model = await self._inference.reload(lambda: self._load(old))
        except Exception as error:  # noqa: BLE001 - whatever a checkpoint or torch raises, the old one goes on
            self._metrics.reloads.labels("failed").inc()
            reason = _reason(error)
            log.error("the model is not reloaded: %s", reason, extra={"in_use": old.name})
            raise ReloadFailed(reason) from None
        self._metrics.reloads.labels("done").inc()
        self._on_reloaded(model)
        log.info("reloaded the model", extra={"after_s": round(time.monotonic() - started, 1), "before": old.name})
        return model


def _reason(error: Exception) -> str:
    """Why a reload failed, in one line. Loading sees no records, so no library's message can hold a text of one."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return "there is not enough memory for a second model beside the one in use"
    words = str(error).strip().splitlines()
    return printable(f"{type(error).__name__}: {words[0][:300]}") if words else type(error).__name__
