"""A client of a schema registry, by the REST interface of Confluent's, which others (Apicurio, Karapace, Redpanda) have too.

https://docs.confluent.io/platform/current/schema-registry/develop/api.html
"""

import asyncio
import ssl
from pathlib import Path
from typing import Any, Final, NamedTuple, Self
from urllib.parse import quote

import aiohttp
import orjson
from yarl import URL

from worker.core.framing import MAX_ID
from worker.errors import WrongSetting
from worker.runtime.file_value import FileValue, present

MAX_ANSWER_BYTES: Final = 8 * 2**20
MAX_REFERENCES: Final = 256  # of one schema, those of its references included
MAX_MESSAGE_CHARS: Final = 300  # of what the registry says of an error
CONTENT_TYPE: Final = "application/vnd.schemaregistry.v1+json"
NO_SCHEMA: Final = frozenset({40401, 40402, 40403})  # the error codes for no such subject, version and id


class RegistryError(Exception):
    """The registry did not do what it was asked for; the message is one sentence without credentials."""


class SchemaUnknown(RegistryError):
    """The registry works, and has no such schema, subject or version."""


class RegistryUnavailable(RegistryError):
    """The registry does not answer, or not as a registry does. To ask again later may help."""


class RegistryRefused(RegistryError):
    """The registry refuses the credentials, or does not let them do this (401, 403); or its certificate is refused."""


class SchemaRefused(RegistryError):
    """The registry refuses a schema: it is invalid (422), or not compatible with the subject's others (409)."""


class RegisteredSchema(NamedTuple):
    """A schema as it is registered.

    ``references`` has the text of each schema that it refers to, directly or through others: those that are referred to
    come before those that refer to them.
    """

    id: int
    type: str  # AVRO, JSON, PROTOBUF, or whatever else a registry has
    text: str
    references: tuple[str, ...] = ()


class SchemaRegistry:
    """Asks one registry. Use it from the event loop that it was first used in, and close it there.

    ``url`` is the address that the paths of the interface begin at, such as ``https://registry:8081``. Either ``user`` and
    ``password`` log in, or ``token`` (OAuth's, or another bearer token). ``ca_file`` has the authorities that sign the
    registry's certificate (PEM; default: the system's). What is in files is read again before a request if it has changed.
    ``timeout_s`` is the deadline of each request. The client neither retries nor caches nor logs.

    Raises WrongSetting where ``ca_file`` cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        user: str | None = None,
        password: str | FileValue[str] | None = None,
        token: str | FileValue[str] | None = None,
        ca_file: str | Path | None = None,
        timeout_s: float = 10,
    ) -> None:
        self.url = url.rstrip("/")
        self._user = user
        self._password = password
        self._token = token
        self._ssl = FileValue(lambda: _ssl_context(ca_file), [Path(ca_file)]) if ca_file else None
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def schema(self, schema_id: int) -> RegisteredSchema:
        """The schema with this id, whatever its subject, and what it refers to. Raises RegistryError."""
        if not 0 <= schema_id <= MAX_ID:  # a registry would answer as if the path were none of its own
            raise SchemaUnknown(f"the schema registry has no schema with the id {schema_id}: ids end at {MAX_ID}")
        answer = await self._request("GET", f"/schemas/ids/{schema_id}")
        references: list[str] = []
        await self._resolve(answer, references, set())
        text, type = _field(answer, "schema", str), answer.get("schemaType") or "AVRO"
        return RegisteredSchema(schema_id, type, text, tuple(references))

    async def register(self, subject: str, text: str) -> int:
        """Registers an Avro schema under a subject, and returns its id; the one that it has, if it is there already.

        Raises RegistryError.
        """
        answer = await self._request("POST", f"/subjects/{_quoted(subject)}/versions", _body(text))
        return int(_field(answer, "id", int))

    async def lookup(self, subject: str, text: str) -> int:
        """The id that an Avro schema has under a subject. Raises SchemaUnknown where it has none, and RegistryError."""
        answer = await self._request("POST", f"/subjects/{_quoted(subject)}", _body(text))
        return int(_field(answer, "id", int))

    async def check(self) -> None:
        """Asks for something that every registry has, with the credentials. Raises RegistryError."""
        await self._request("GET", "/schemas/types")

    async def close(self) -> None:
        """Ends its connections. It may be called several times."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _resolve(self, answer: dict[str, Any], texts: list[str], seen: set[tuple[str, int]]) -> None:
        """Adds to ``texts`` that of each schema that an answer's schema refers to, after those that it refers to."""
        for reference in answer.get("references") or ():
            place = (_field(reference, "subject", str), _field(reference, "version", int))
            if place in seen:
                continue
            seen.add(place)
            if len(seen) > MAX_REFERENCES:
                raise SchemaUnknown(f"a schema has more than {MAX_REFERENCES} references, which are not all read")
            path = f"/subjects/{_quoted(place[0])}/versions/{place[1]}?deleted=true"
            referred = await self._request("GET", path)
            await self._resolve(referred, texts, seen)
            texts.append(_field(referred, "schema", str))

    async def _request(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        headers = {"Accept": f"{CONTENT_TYPE}, application/json"}
        if self._user is not None:
            headers["Authorization"] = aiohttp.encode_basic_auth(
                self._user, present(self._password) or "", encoding="utf-8"
            )
        elif self._token is not None:
            headers["Authorization"] = f"Bearer {present(self._token)}"
        if body is not None:
            headers["Content-Type"] = CONTENT_TYPE
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=self._timeout, connector=aiohttp.TCPConnector(limit=8), cookie_jar=aiohttp.DummyCookieJar()
            )
        url = URL(self.url + path, encoded=True)
        try:
            async with self._session.request(
                method,
                url,
                data=body,
                headers=headers,
                ssl=self._ssl.value if self._ssl else True,
                allow_redirects=False,
            ) as response:
                content = await _read(response)
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
            raise RegistryRefused(
                f"there is no TLS with the schema registry at {self.url} ({_cause(error)}); schema_registry_ca_file should "
                "name the authorities that have signed its certificate, and an address without TLS begin with http://"
            ) from None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise RegistryUnavailable(f"the schema registry at {self.url} does not answer ({_cause(error)})") from None
        return self._answer(response.status, response.reason or "", content)

    def _answer(self, status: int, reason: str, content: bytes) -> dict[str, Any]:
        """What a registry's answer holds. Raises RegistryError for one that is no success."""
        try:
            answer = orjson.loads(content)
        except orjson.JSONDecodeError:
            answer = None
        fields: dict[str, Any] = answer if isinstance(answer, dict) else {}
        if status == 200 and answer is not None:
            return fields
        code = fields.get("error_code")
        said = " ".join(str(fields.get("message") or reason).split())[:MAX_MESSAGE_CHARS]
        where = f"the schema registry at {self.url}"
        if status in (401, 403):
            raise RegistryRefused(
                f"{where} refuses the credentials ({status} {said}); set schema_registry_user and schema_registry_password, "
                "or schema_registry_token, to ones that may read its schemas"
            )
        if status == 404 and code in NO_SCHEMA:
            raise SchemaUnknown(f"{where} has no such schema ({code} {said})")
        if status in (409, 422):
            raise SchemaRefused(f"{where} refuses the schema ({code or status} {said})")
        if status in (200, 404) or 300 <= status < 400:
            raise RegistryUnavailable(
                f"what answers at {self.url} is no schema registry ({status} {said}); schema_registry_url should be the "
                "address that its paths, such as /subjects, begin at"
            )
        raise RegistryUnavailable(f"{where} answers with {status} {said}")


def _ssl_context(ca_file: str | Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one
        why = "it holds no certificates in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise WrongSetting(f"schema_registry_ca_file: {ca_file} cannot be used ({why})") from None


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The whole body. Raises ValueError where it is longer than any schema, packed or not."""
    parts, size = list[bytes](), 0
    async for part in response.content.iter_chunked(2**16):
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise ValueError(f"its answer is longer than {MAX_ANSWER_BYTES >> 20} MiB")
    return b"".join(parts)


def _body(text: str) -> bytes:
    """A schema as the interface takes it, which is Avro where no type is named."""
    return orjson.dumps({"schema": text})


def _field(answer: Any, name: str, kind: type) -> Any:
    value = answer.get(name) if isinstance(answer, dict) else None
    if type(value) is not kind:
        raise RegistryUnavailable(f"the schema registry answers without a field {name}, or with another type of it")
    return value


def _quoted(subject: str) -> str:
    return quote(subject, safe="")


def _cause(error: BaseException) -> str:
    """What went wrong on the way, in few words: an address, a certificate, time."""
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return str(error.certificate_error)
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.strerror or type(error.os_error).__name__
    return str(error) or type(error).__name__
