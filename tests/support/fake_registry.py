"""A schema registry in this process, for tests of what a real one does seldom: it keeps schemas in memory, and may fail."""

import asyncio
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

from aiohttp import web
from aiohttp.test_utils import TestServer

NO_SUCH = {40401: "Subject not found", 40402: "Version not found", 40403: "Schema not found"}


class FakeRegistry:
    """`requests` counts the paths that were asked for. `refusal` is a status and a body that answer everything else.

    `authorization` is the header that each request has to have; None where nobody logs in.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: Counter[str] = Counter()
        self.refusal: tuple[int, Any] | None = None
        self.authorization: str | None = None
        self.schemas: dict[int, dict[str, Any]] = {}
        self.subjects: dict[str, list[int]] = {}
        self.answers = asyncio.Event()  # a request waits until it is set
        self.answers.set()

    def add(self, id: int, schema: object, type: str = "AVRO", subject: str | None = None, **fields: Any) -> bytes:
        """Registers a schema by hand. Returns what Confluent's serializers put in front of a value with this schema."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        self.schemas[id] = {"schema": text, **({} if type == "AVRO" else {"schemaType": type}), **fields}
        self.subjects.setdefault(subject or f"subject-{id}", []).append(id)
        return b"\0" + id.to_bytes(4, "big")

    async def _answer(self, request: web.Request) -> web.Response:
        path = request.raw_path.partition("?")[0]
        self.requests[path] += 1
        await self.answers.wait()
        if self.authorization is not None and request.headers.get("Authorization") != self.authorization:
            return web.json_response({"error_code": 401, "message": "Unauthorized"}, status=401)
        if self.refusal:
            status, body = self.refusal
            return web.Response(status=status, body=body if isinstance(body, bytes) else json.dumps(body).encode())
        return self._found(request.method, [unquote(part) for part in path.strip("/").split("/")], await request.text())

    def _found(self, method: str, path: list[str], body: str) -> web.Response:
        match method, path:
            case "GET", ["schemas", "types"]:
                return web.json_response(["JSON", "PROTOBUF", "AVRO"])
            case "GET", ["schemas", "ids", id]:
                return web.json_response(self.schemas[int(id)]) if int(id) in self.schemas else _no_such(40403)
            case "GET", ["subjects", subject, "versions", version]:
                ids = self.subjects.get(subject)
                if ids is None:
                    return _no_such(40401)
                if int(version) > len(ids):
                    return _no_such(40402)
                return web.json_response(
                    {"subject": subject, "version": int(version), **self.schemas[ids[int(version) - 1]]}
                )
            case "POST", ["subjects", subject, *rest]:
                given = json.loads(body)
                has = [id for id in self.subjects.get(subject, ()) if self.schemas[id] == given]
                if not has and rest == ["versions"]:
                    has = [max(self.schemas, default=0) + 1]
                    self.schemas[has[0]] = given
                    self.subjects.setdefault(subject, []).append(has[0])
                if not has:
                    return _no_such(40403 if subject in self.subjects else 40401)
                return web.json_response({"id": has[0]})
        return web.json_response({"error_code": 404, "message": "HTTP 404 Not Found"}, status=404)


def _no_such(code: int) -> web.Response:
    return web.json_response({"error_code": code, "message": NO_SUCH[code]}, status=404)


@asynccontextmanager
async def fake_registry(certificate: ssl.SSLContext | None = None) -> AsyncIterator[FakeRegistry]:
    """With a certificate it speaks TLS."""
    registry = FakeRegistry()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", registry._answer)
    server = TestServer(app, host="127.0.0.1")
    await server.start_server(ssl=certificate)
    async with server:
        registry.url = str(server.make_url("/")).rstrip("/")
        yield registry
