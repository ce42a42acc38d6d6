"""Where tokens come from: an OIDC provider's token endpoint, a file that something else renews, the signer of AWS."""

import contextlib
import math
import os
import re
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote_plus, urlsplit
from urllib.request import getproxies, proxy_bypass

import orjson
from aiohttp import (
    ClientConnectorCertificateError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    encode_basic_auth,
)

from worker.core.timestamps import iso_time
from worker.errors import WrongSetting
from worker.kafka.oauth import MOST_CHARACTERS, Token, TokenRefused, TokenUnavailable, end_of
from worker.printable import printable
from worker.runtime.file_value import FileValue
from worker.runtime.tasks import within
from worker.runtime.threads import SerialExecutor

FETCH_S: Final = 10.0
UNKNOWN_LIFE_S: Final = 300.0  # of a token that does not say when it ends
MOST_BYTES: Final = 1 << 20  # of an answer
WHOLE_TOKEN: Final = re.compile(r"[!-~]+")
PASSING: Final = (408, 425, 429)  # statuses below 500 that ask to try again
PASSING_ERRORS: Final = ("temporarily_unavailable", "server_error", "slow_down")  # of OAuth, with any status
MSK_REGION: Final = re.compile(r"\.kafka(?:-serverless)?\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?:[0-9]+")


class ClientCredentials:
    """OAuth's client credentials grant (RFC 6749, section 4.4), with id and secret as HTTP Basic (section 2.3.1).

    ``secret`` is called for each token. ``ca_file`` has the authorities that sign the endpoint's certificate, and is read
    again when it changes; None takes the system's. Proxies are taken from the environment (HTTPS_PROXY, NO_PROXY). Raises
    WrongSetting where ``ca_file`` cannot be used.
    """

    advice = "check that the broker trusts this issuer, and oauth_scope, oauth_audience and oauth_extensions"

    def __init__(
        self,
        url: str,
        client_id: str,
        secret: Callable[[], str],
        *,
        scope: str | None = None,
        audience: str | None = None,
        ca_file: Path | None = None,
    ) -> None:
        self._url = url
        self._client_id = client_id
        self._secret = secret
        self._tls = FileValue(lambda: _trusting(ca_file), [ca_file]) if ca_file else None
        wanted = {"grant_type": "client_credentials", "scope": scope, "audience": audience}
        self._form = {name: value for name, value in wanted.items() if value}

    async def fetch(self) -> Token:
        """Asks the endpoint for a token, within FETCH_S. Raises TokenUnavailable and TokenRefused."""
        secret = self._secret()
        try:
            status, answer = await self._answer(encode_basic_auth(quote_plus(self._client_id), quote_plus(secret)))
        except ClientConnectorCertificateError as error:
            why = getattr(error.certificate_error, "verify_message", "") or type(error.certificate_error).__name__
            raise TokenRefused(
                f"the certificate of the token endpoint {self._url} is refused ({why}); check oauth_ca_file, which names "
                "the authorities that are trusted, and the name in oauth_token_url"
            ) from None
        except (ClientError, OSError, TimeoutError) as error:
            raise TokenUnavailable(f"the token endpoint {self._url} cannot be reached ({_why(error)})") from None
        if status == 200:
            return self._token(answer)
        raise self._failure(status, answer, secret)

    async def _answer(self, login: str) -> tuple[int, Mapping[str, Any]]:
        """Status and JSON object of the answer; an empty object where it is none."""
        session = ClientSession(timeout=ClientTimeout(total=FETCH_S))
        headers = {"Accept": "application/json", "Authorization": login}
        async with (
            session,
            session.post(
                self._url,
                data=self._form,
                headers=headers,
                proxy=_proxy(self._url),
                ssl=self._tls.value if self._tls else True,
                allow_redirects=False,
            ) as response,
        ):
            body = await _body(response)
        with contextlib.suppress(orjson.JSONDecodeError):
            answer = orjson.loads(body)
            if isinstance(answer, dict):
                return response.status, answer
        return response.status, {}

    def _token(self, answer: Mapping[str, Any]) -> Token:
        value = answer.get("access_token")
        if not isinstance(value, str) or not WHOLE_TOKEN.fullmatch(value):
            raise TokenRefused(f"{self._url} answers without an access_token; check oauth_token_url")
        try:
            life_s = float(answer.get("expires_in") or math.nan)
        except (TypeError, ValueError):
            life_s = math.nan
        if not life_s > 0:
            life_s = max(0.0, (end_of(value) or 0.0) - time.time()) or UNKNOWN_LIFE_S
        return Token.lasting(value, life_s)

    def _failure(self, status: int, answer: Mapping[str, Any], secret: str) -> TokenUnavailable:
        """What an answer without a token means, with the words of OAuth (RFC 6749, section 5.2) where it has them."""
        words = [
            f"status {status}",
            *(str(answer[name]) for name in ("error", "error_description") if answer.get(name)),
        ]
        said = printable(": ".join(word for word in words if secret not in word))[:MOST_CHARACTERS]
        error = answer.get("error")
        if status >= 500 or status in PASSING or error in PASSING_ERRORS:
            return TokenUnavailable(f"the token endpoint {self._url} gives no token at present ({said})")
        if status not in (400, 401, 403):
            return TokenRefused(f"there is no token endpoint at {self._url} ({said}); check oauth_token_url")
        check = "oauth_client_id, WORKER_OAUTH_CLIENT_SECRET, oauth_scope and oauth_audience"
        if error in ("invalid_client", "unauthorized_client"):
            check = "oauth_client_id and WORKER_OAUTH_CLIENT_SECRET, and whether the client is enabled"
        elif error == "invalid_scope":
            check = "oauth_scope"
        return TokenRefused(
            f"the token endpoint {self._url} refuses oauth_client_id {self._client_id!r} ({said}); check {check}"
        )


def _trusting(ca_file: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ValueError):  # an SSLError is an OSError
        raise WrongSetting(
            f"oauth_ca_file {ca_file} cannot be used: it should be a PEM file of certificates "
            "(-----BEGIN CERTIFICATE-----)"
        ) from None


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for an address. aiohttp by itself would take logins from ~/.netrc, too."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


async def _body(response: ClientResponse) -> bytes:
    """At most MOST_BYTES and a little more of the answer."""
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MOST_BYTES:
            break
    return body


def _why(error: BaseException) -> str:
    """What is wrong with a connection, in a few words."""
    if isinstance(error, TimeoutError):
        return f"no answer within {FETCH_S:g} s"
    known = getattr(error, "os_error", error)
    number = getattr(known, "errno", None) or 0
    return os.strerror(number) if number > 0 else str(getattr(known, "strerror", None) or type(known).__name__)


class TokenFile:
    """A file with a token, which something else renews. It is read for each new connection, on a thread of its own."""

    advice = "check that the broker trusts this issuer and audience, and oauth_extensions"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread: SerialExecutor | None = None

    async def fetch(self) -> Token:
        """Reads the token. Raises TokenUnavailable: whoever writes the file may be about to."""
        where = f"oauth_token_file {self._path}"
        self._thread = self._thread or SerialExecutor("token-file")
        try:
            value = (await within(FETCH_S, self._thread.call(self._path.read_text, "utf-8-sig"))).strip()
        except TimeoutError:
            raise TokenUnavailable(f"{where} cannot be read within {FETCH_S:g} s") from None
        except (OSError, UnicodeDecodeError) as error:
            raise TokenUnavailable(f"{where} cannot be read ({_why(error)}); waiting for a token in it") from None
        if not WHOLE_TOKEN.fullmatch(value):
            raise TokenUnavailable(f"{where} should hold one token and nothing else; waiting for that")
        ends_at = end_of(value)
        ends_in_s = math.inf if ends_at is None else ends_at - time.time()
        if ends_at is not None and ends_in_s <= 0:
            when = iso_time(max(0.0, 1000 * ends_at))
            raise TokenUnavailable(f"{where} holds a token that expired at {when}; waiting for the next one")
        return Token(value, 0, ends_in_s)


class MskSigner:
    """Tokens that AWS's own signer makes from the credentials that botocore finds, for brokers of Amazon MSK.

    Raises WrongSetting where the signer is not installed, and where the brokers' addresses name no region.
    """

    advice = "check the IAM policy of these credentials: it should allow kafka-cluster:Connect to this cluster"

    def __init__(self, servers: Iterable[str]) -> None:
        self.region = msk_region(servers)
        try:
            from aws_msk_iam_sasl_signer import MSKAuthTokenProvider  # noqa: PLC0415 - an extra of 35 MB
        except ImportError:
            raise WrongSetting(
                "sasl_mechanism AWS_MSK_IAM needs the extra aws: pip install 'sentiment-worker[aws]'"
            ) from None
        self._sign: Callable[[str], tuple[str, int]] = MSKAuthTokenProvider.generate_auth_token
        self._thread: SerialExecutor | None = None

    async def fetch(self) -> Token:
        """Signs on a thread of its own, because credentials may come from the network. Raises TokenUnavailable."""
        self._thread = self._thread or SerialExecutor("msk-signer")
        try:
            value, ends_ms = await within(FETCH_S, self._thread.call(self._sign, self.region))
        except TimeoutError:
            raise TokenUnavailable(f"AWS has given no credentials within {FETCH_S:g} s") from None
        except Exception as error:  # noqa: BLE001 - credentials come in many ways, programs among them
            raise TokenUnavailable(
                f"AWS gives no credentials ({type(error).__name__}); check this process's role, or AWS's variables and files"
            ) from None
        return Token.lasting(value, ends_ms / 1000 - time.time())


def msk_region(servers: Iterable[str]) -> str:
    """The region in the addresses of Amazon MSK's brokers. Raises WrongSetting."""
    regions = {found[1] if (found := MSK_REGION.search(server.lower())) else "" for server in servers}
    if len(regions) != 1 or "" in regions:
        raise WrongSetting(
            "bootstrap_servers should be brokers of Amazon MSK in one region, such as "
            "b-1.name.abc123.c2.kafka.eu-west-1.amazonaws.com:9098, for sasl_mechanism AWS_MSK_IAM"
        )
    return regions.pop()
