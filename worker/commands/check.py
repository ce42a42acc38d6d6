"""``sentiment-worker check``: whether settings, model, brokers and machine are fit for ``run``. It only asks."""

import asyncio
import errno
import http.client
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from worker.commands.check_kafka import kafka_findings
from worker.commands.finding import Finding, wrong_setting
from worker.commands.kafka_connection import kafka_connection
from worker.commands.schema_registry import registry_findings
from worker.core.sentiment import CARD
from worker.errors import UserError, WrongSetting
from worker.http.server import SERVER
from worker.model.labels import listed
from worker.settings.run import RunSettings
from worker.settings.values import is_folder
from worker.telemetry.tracing import refuse_without_the_extra

FREE_BYTES: Final = 1 << 30  # for a checkpoint of the hub
ANSWER_S: Final = 2.0  # for whoever has the HTTP port


def run(settings: RunSettings) -> int:
    """Prints a line for each thing that it looks at, as soon as it is known. Blocks, as long as loading a model takes.

    Returns the exit code: 0 where nothing fails, 2 where a setting is wrong, credentials among them, else 1.
    """
    return asyncio.run(_run(settings))


def refused(error: WrongSetting) -> int:
    """Prints a line for each wrong setting, in place of ``run``, which needs settings that are valid. Returns 2."""
    return max(_printed(Finding("settings", "fail", sentence, error.exit_code)) for sentence in error.sentences)


async def _run(settings: RunSettings) -> int:
    return max([_printed(finding) async for finding in _findings(settings)])


def _printed(finding: Finding) -> int:
    sys.stdout.write(f"{finding}\n")
    sys.stdout.flush()
    return finding.exit_code if finding.verdict == "fail" else 0


async def _findings(settings: RunSettings) -> AsyncIterator[Finding]:
    connection = None
    wrong = []
    try:
        connection = kafka_connection(settings)
    except WrongSetting as error:
        wrong.append(wrong_setting("settings", error))
    try:
        if settings.tracing == "otel":
            refuse_without_the_extra()
    except WrongSetting as error:
        wrong.append(wrong_setting("settings", error))
    for finding in wrong or [Finding("settings", "ok", "they are valid, and fit together")]:
        yield finding
    for doubt in settings.exposures():
        yield Finding("security", "warn", doubt)
    yield _disk(settings.model)
    yield await asyncio.to_thread(_port, settings.http_host, settings.http_port)
    yield await asyncio.to_thread(_model, settings)
    async for finding in registry_findings(settings):
        yield finding
    if connection:
        async for finding in kafka_findings(settings, connection):
            yield finding


# The machine.


def _disk(model: str) -> Finding:
    """Whether the folder for checkpoints of the hub can be written and has room, where the model comes from there."""
    if model == "builtin" or is_folder(model):
        return Finding("disk", "ok", "nothing is written to disk: the model does not come from the hub")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface")  # as huggingface_hub has it
    folder = next(each for each in (home, *home.parents) if each.exists())
    free = shutil.disk_usage(folder).free
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        advice = "set HF_HOME to a folder that can be, or no checkpoint of the hub can be fetched"
        return Finding("disk", "warn", f"the cache folder {home} cannot be written ({error.strerror}); {advice}")
    if free < FREE_BYTES:
        return Finding("disk", "warn", f"{home} has {free >> 20} MiB left; a checkpoint of the hub may want 1 GiB")
    return Finding("disk", "ok", f"{home} can be written and has {free >> 30} GiB left")


def _port(host: str, port: int) -> Finding:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _is_a_worker(host, port):
            taken = "is a sentiment-worker's that runs; one more on this machine needs another http_port"
            return Finding("http", "warn", f"{host}:{port} {taken}")
        return Finding("http", "fail", f"cannot listen on {host}:{port} ({error.strerror}); set http_host or http_port")
    return Finding("http", "ok", f"{host}:{port} is free")


def _is_a_worker(host: str, port: int) -> bool:
    """Whether a sentiment-worker answers there, be it alive or not."""
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().getheader("Server") == SERVER
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _model(settings: RunSettings) -> Finding:
    from worker.commands.load_model import load_from_settings  # noqa: PLC0415 - the model takes longer than the lines before it

    try:
        model = load_from_settings(settings)
    except UserError as error:  # brokers and topics are worth a look all the same
        return Finding("model", "fail", str(error), error.exit_code)
    sentiment = model.score(["Хорошо, спасибо."])[0].sentiment
    if sentiment is None:
        return Finding(
            "model", "fail", f"{model.name} does not score a plain text with finite numbers; use another model"
        )
    if model.warning:
        return Finding("model", "warn", model.warning)
    labels = "" if model.labels == CARD else f"; labels: {listed(model.labels.names)}, by {model.labels.activation}"
    return Finding("model", "ok", f"{model.name} on {model.device}, {model.dtype}{labels}")
