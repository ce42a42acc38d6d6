"""Tokens to log in with: from an endpoint, a file and AWS's signer; renewed, shared, waited for, and never shown."""

import asyncio
import base64
import json
import logging
import math
import os
import sys
import threading
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from aiokafka.conn import OAuthAuthenticator
from aiokafka.errors import SaslAuthenticationFailed

from tests.support.secure import Authority
from worker.commands.kafka_connection import kafka_connection
from worker.errors import WrongSetting
from worker.kafka import aiokafka_compat  # noqa: F401 - changes the authenticator
from worker.kafka.connection import Connection
from worker.kafka.diagnosis import why_unreachable
from worker.kafka.oauth import Token, TokenProvider, TokenRefused, TokenUnavailable, claims
from worker.kafka.oauth_sources import ClientCredentials, MskSigner, TokenFile, msk_region
from worker.settings.run import RunSettings
from worker.settings.sources import load

SECRET = "secret: of 100 % ünusual signs+"
MSK = "b-1.demo.abc123.c2.kafka.eu-west-1.amazonaws.com:9098"


def web_token(**said: object) -> str:
    """A JSON Web Token that nobody has signed."""
    parts = ({"alg": "none"}, said)
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + "."


# --- The token that clients share ---


class Source:
    """Gives what a test says, and counts how often it was asked."""

    advice = "look there"

    def __init__(self) -> None:
        self.asked = 0
        self.answer: Callable[[], Awaitable[Token]] = self.numbered

    async def numbered(self) -> Token:
        return Token.lasting(f"token-{self.asked}", 100)

    async def failing(self) -> Token:
        raise TokenUnavailable("nobody answers")

    async def refusing(self) -> Token:
        raise TokenRefused("go away")

    async def hanging(self) -> Token:
        await asyncio.Event().wait()
        raise AssertionError

    async def fetch(self) -> Token:
        self.asked += 1
        return await self.answer()


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Given:
    """A provider, its source, its clock, and what it has told."""

    def __init__(self) -> None:
        self.source, self.clock = Source(), Clock()
        self.told: list[str] = []
        self.provider = TokenProvider(self.source, tell=self.told.append, clock=self.clock)

    async def after(self, seconds: float) -> str:
        self.clock.now += seconds
        return await self.provider.token()


@pytest.fixture
async def given() -> Given:
    return Given()


async def test_all_who_ask_share_one_token(given: Given) -> None:
    tokens = await asyncio.gather(*(given.provider.token() for _ in range(50)))
    assert set(tokens) == {"token-1"}
    assert await given.after(79) == "token-1"
    assert given.source.asked == 1


async def test_it_is_renewed_before_it_ends(given: Given) -> None:
    assert await given.after(0) == "token-1"
    assert await given.after(81) == "token-2"


async def test_while_the_next_one_does_not_come_the_present_one_is_given(given: Given) -> None:
    await given.after(0)
    given.source.answer = given.source.hanging
    assert await asyncio.wait_for(given.after(85), 60) == "token-1"
    given.source.answer = given.source.numbered
    given.provider._renewal.cancel()  # type: ignore[union-attr]


async def test_a_failure_is_no_trouble_until_the_token_ends(given: Given, caplog: pytest.LogCaptureFixture) -> None:
    await given.after(0)
    given.source.answer = given.source.failing
    assert await given.after(85) == "token-1"
    assert [record.getMessage() for record in caplog.records] == ["the OAuth token cannot be renewed: nobody answers"]
    with pytest.raises(TokenUnavailable, match="nobody answers"):
        await given.after(14.5)
    assert [*filter(None, given.told)] == ["nobody answers"]
    given.source.answer = given.source.numbered
    assert await given.after(5) == f"token-{given.source.asked}"
    assert given.told[-1] == ""


async def test_a_source_that_fails_is_asked_ever_more_seldom(given: Given) -> None:
    """However often aiokafka asks, which is hundreds of times in an outage."""
    given.source.answer = given.source.failing
    for _ in range(6_000):
        with pytest.raises(TokenUnavailable):
            await given.after(0.01)
    assert 12 <= given.source.asked <= 18


async def test_a_fault_that_nobody_foresaw_is_told_and_not_repeated_all_the_time(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    """Its words may hold anything, and are not shown."""

    async def faulty() -> Token:
        raise ValueError(SECRET)

    given.source.answer = faulty
    for _ in range(100):
        with pytest.raises(TokenUnavailable, match=r"no token can be had .ValueError.; look there"):
            await given.after(0.01)
    assert given.source.asked <= 5
    assert SECRET not in caplog.text + "".join(given.told)


def test_a_token_is_not_shown() -> None:
    assert SECRET not in repr(Token.lasting(SECRET, 10))


async def test_whoever_asks_meanwhile_is_told_what_the_source_said(given: Given) -> None:
    given.source.answer = given.source.refusing
    for _ in range(2):
        with pytest.raises(TokenRefused, match="go away"):
            await given.after(0.1)
    assert given.source.asked == 1


async def test_one_that_gives_up_waiting_does_not_take_the_token_from_others(given: Given) -> None:
    ready = asyncio.Event()

    async def late() -> Token:
        await ready.wait()
        return Token.lasting("late", 100)

    given.source.answer = late
    first, second = (asyncio.create_task(given.provider.token()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    ready.set()
    assert await second == "late"
    assert given.source.asked == 1


async def test_a_token_that_a_broker_refuses_is_replaced_though_not_at_every_refusal(given: Given) -> None:
    await given.after(0)
    given.provider.reject()
    assert await given.after(1) == "token-1"
    assert await given.after(4.5) == "token-2"
    for _ in range(100):
        given.provider.reject()
        await given.after(0.01)
    assert given.source.asked == 2


@pytest.mark.parametrize("life_s", [0.0, 0.01, 0.5, 2.0])
async def test_a_token_that_lasts_for_no_time_is_not_fetched_all_the_time(given: Given, life_s: float) -> None:
    async def short() -> Token:
        return Token.lasting("short", life_s)

    given.source.answer = short
    for _ in range(100):
        try:
            assert await given.after(0.01) == "short"
        except TokenUnavailable:
            assert life_s < 0.5
    assert given.source.asked <= 5


# --- What a broker says ---


class Answering:
    """The part of a provider that an authenticator uses."""

    async def token(self) -> str:
        return "abc"

    def extensions(self) -> dict[str, str]:
        return {"logicalCluster": "lkc-1", "identityPoolId": "pool-2"}


async def test_a_broker_that_refuses_the_token_is_understood() -> None:
    authenticator = OAuthAuthenticator(sasl_oauth_token_provider=Answering())
    message, _ = await authenticator.step(None)
    assert message == b"n,,\x01auth=Bearer abc\x01logicalCluster=lkc-1\x01identityPoolId=pool-2\x01\x01"
    for answer in (b'{"status":"invalid_token"}', b"\x01", b"[]", b"{}"):
        with pytest.raises(SaslAuthenticationFailed, match="invalid_token" if b"status" in answer else "refused"):
            await authenticator.step(answer)
    assert await authenticator.step(b"") is None


async def test_a_refusal_tells_what_the_token_is_for_and_not_the_token(given: Given) -> None:
    token = web_token(iss="https://id", aud=["a", "b\x1b"], sub="me", exp=1, email="private@example.com")

    async def named() -> Token:
        return Token.lasting(token, 100)

    given.source.answer = named
    await given.after(0)
    sentence = given.provider.refusal("broker:1", "invalid_token\n" + "x" * 1_000)
    assert sentence.startswith("the broker broker:1 refuses the token (invalid_token\\n")
    assert sentence.endswith("; it has iss https://id, aud ['a', 'b\\x1b'], sub me); look there")
    assert token not in sentence
    assert "private" not in sentence
    assert len(sentence) < 600


@pytest.mark.parametrize("token", ["", "a.b.c", "a", "a.!.c", "..", f"a.{base64.urlsafe_b64encode(b'[1]').decode()}.c"])
def test_other_tokens_say_nothing(token: str) -> None:
    assert claims(token) == {}


# --- From an endpoint ---


class Endpoint:
    """A token endpoint that answers as a test says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status = 200
        self.answer: Any = {"access_token": "of-the-endpoint", "expires_in": 60}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.silent = False

    async def serve(self, request: web.Request) -> web.Response:
        form = {name: str(value) for name, value in (await request.post()).items()}
        self.asked.append((request.headers.get("Authorization", ""), form))
        if self.silent:
            await asyncio.Event().wait()
        if isinstance(self.answer, bytes):
            return web.Response(status=self.status, body=self.answer)
        headers = {"Location": "http://127.0.0.1:1/elsewhere"} if 300 <= self.status < 400 else None
        return web.json_response(self.answer, status=self.status, headers=headers)


@pytest.fixture
async def endpoint() -> AsyncIterator[tuple[Endpoint, str]]:
    endpoint = Endpoint()
    application = web.Application()
    application.router.add_post("/token", endpoint.serve)
    server = TestServer(application, host="127.0.0.1")
    await server.start_server()
    yield endpoint, str(server.make_url("/token"))
    await server.close()


def credentials(url: str, **options: Any) -> ClientCredentials:
    return ClientCredentials(url, "id:1", lambda: SECRET, **options)


async def test_id_and_secret_are_sent_as_the_standard_says(endpoint: tuple[Endpoint, str]) -> None:
    served, url = endpoint
    token = await credentials(url, scope="a b", audience="kafka").fetch()
    assert token == ("of-the-endpoint", 48, 60)
    ((login, form),) = served.asked
    assert form == {"grant_type": "client_credentials", "scope": "a b", "audience": "kafka"}
    sent = base64.b64decode(login.removeprefix("Basic ")).decode()
    assert sent == "id%3A1:secret%3A+of+100+%25+%C3%BCnusual+signs%2B"
    await credentials(url).fetch()
    assert served.asked[1][1] == {"grant_type": "client_credentials"}


async def test_a_proxy_is_taken_from_the_environment(
    endpoint: tuple[Endpoint, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served, url = endpoint
    (tmp_path / "netrc").write_text("default login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", url.removesuffix("/token"))
    assert (await credentials("http://id.invalid/token").fetch()).value == "of-the-endpoint"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert (await credentials(url).fetch()).value == "of-the-endpoint"
    assert len(served.asked) == 2


@pytest.mark.parametrize(
    ("answer", "life_s"),
    [
        ({"access_token": "t", "expires_in": "90"}, 90),
        ({"access_token": "t"}, 300),
        ({"access_token": "t", "expires_in": None}, 300),
        ({"access_token": "t", "expires_in": [1]}, 300),
        ({"access_token": "t", "expires_in": -1}, 300),
        ({"access_token": web_token(exp=1)}, 300),
        ({"access_token": web_token(exp="soon")}, 300),
    ],
)
async def test_how_long_a_token_lasts(endpoint: tuple[Endpoint, str], answer: dict[str, Any], life_s: float) -> None:
    served, url = endpoint
    served.answer = answer
    assert (await credentials(url).fetch()).ends_in_s == pytest.approx(life_s, abs=60)


async def test_a_token_that_says_when_it_ends_lasts_until_then(endpoint: tuple[Endpoint, str]) -> None:
    served, url = endpoint
    served.answer = {"access_token": web_token(exp=time.time() + 500)}
    assert (await credentials(url).fetch()).ends_in_s == pytest.approx(500, abs=60)


@pytest.mark.parametrize(
    ("status", "answer", "kind", "words"),
    [
        (401, {"error": "invalid_client", "error_description": "No"}, TokenRefused, "(status 401: invalid_client: No)"),
        (400, {"error": "invalid_scope"}, TokenRefused, "check oauth_scope"),
        (400, {"error": "unauthorized_client"}, TokenRefused, "whether the client is enabled"),
        (400, {"error": "invalid_target"}, TokenRefused, "oauth_audience"),
        (403, b"<html>", TokenRefused, "(status 403); check"),
        (404, b"", TokenRefused, "there is no token endpoint at"),
        (302, {}, TokenRefused, "(status 302); check oauth_token_url"),
        (200, {"token": "x"}, TokenRefused, "answers without an access_token"),
        (200, b"<html>", TokenRefused, "answers without an access_token"),
        (200, {"access_token": "two words"}, TokenRefused, "answers without an access_token"),
        (500, {"error": "invalid_client"}, TokenUnavailable, "gives no token at present (status 500"),
        (503, b"", TokenUnavailable, "gives no token at present (status 503)"),
        (429, {}, TokenUnavailable, "gives no token at present (status 429)"),
        (400, {"error": "temporarily_unavailable"}, TokenUnavailable, "gives no token at present"),
        (401, {"error": "invalid_client", "error_description": f"not {SECRET}\n"}, TokenRefused, ": invalid_client);"),
    ],
)
async def test_what_an_endpoint_answers_instead_of_a_token(
    endpoint: tuple[Endpoint, str], status: int, answer: Any, kind: type[TokenUnavailable], words: str
) -> None:
    served, url = endpoint
    served.status, served.answer = status, answer
    with pytest.raises(TokenUnavailable) as failure:
        await credentials(url).fetch()
    assert type(failure.value) is kind
    assert words in str(failure.value)
    assert SECRET not in str(failure.value)
    assert "\n" not in str(failure.value)


async def test_an_endpoint_that_cannot_be_reached_is_waited_for(
    endpoint: tuple[Endpoint, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, url = endpoint
    served.silent = True
    for nowhere, seconds, words in (
        ("http://127.0.0.1:1/", 60, r"cannot be reached \(.*refused"),
        ("http://nowhere.invalid/", 60, r"http://nowhere.invalid/ cannot be reached \("),
        (url, 0.3, "no answer within 0.3 s"),
        (url.replace("http:", "https:"), 60, "cannot be reached"),
    ):
        monkeypatch.setattr("worker.kafka.oauth_sources.FETCH_S", seconds)
        with pytest.raises(TokenUnavailable, match=words) as failure:
            await credentials(nowhere).fetch()
        assert type(failure.value) is TokenUnavailable


async def test_the_certificate_of_an_endpoint_is_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import ssl

    authority, other = Authority(tmp_path, "authority"), Authority(tmp_path, "other")
    certificate, key = authority.issue("endpoint", ["127.0.0.1"])
    (tmp_path / "chain.pem").write_text(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "chain.pem")
    served = Endpoint()
    application = web.Application()
    application.router.add_post("/token", served.serve)
    server = TestServer(application, host="127.0.0.1", scheme="https")
    await server.start_server(ssl=context)
    url = str(server.make_url("/token"))
    try:
        for wrong in (None, other.cafile):
            with pytest.raises(
                TokenRefused, match=r"the certificate of the token endpoint .* is refused .*oauth_ca_file"
            ):
                await credentials(url, ca_file=wrong).fetch()
        assert served.asked == []
        changing = tmp_path / "changing.pem"
        changing.write_bytes(authority.cafile.read_bytes())
        source = credentials(url, ca_file=changing)
        assert (await source.fetch()).value == "of-the-endpoint"
        changing.write_text("no certificate")
        assert (await source.fetch()).value == "of-the-endpoint"
        assert [f"oauth_ca_file {changing} cannot be used" in record.getMessage() for record in caplog.records] == [
            True
        ]
        changing.write_bytes(other.cafile.read_bytes())
        with pytest.raises(TokenRefused, match=r"the certificate of the token endpoint .* is refused"):
            await source.fetch()
    finally:
        await server.close()
    with pytest.raises(WrongSetting, match=r"oauth_ca_file .* cannot be used: it should be a PEM file"):
        credentials(url, ca_file=tmp_path / "nowhere")


# --- From a file ---


async def test_a_file_is_read_again_when_it_changes(tmp_path: Path, given: Given) -> None:
    file = tmp_path / "token"
    given.provider = TokenProvider(TokenFile(file), clock=given.clock)
    file.write_text("first\n")
    assert await given.after(0) == "first"
    file.write_text("\ufeffsecond")
    assert await given.after(1) == "second"
    left = web_token(exp=time.time() + 50)
    file.write_text(left)
    assert await given.after(1) == left
    file.unlink()
    assert await given.after(1) == left  # it is good until it ends
    with pytest.raises(TokenUnavailable, match=r"cannot be read .No such file or directory.; waiting"):
        await given.after(60)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "should hold one token and nothing else"),
        ("two tokens", "should hold one token and nothing else"),
        ("ключ", "should hold one token and nothing else"),
        (
            web_token(exp=1_700_000_000),
            "holds a token that expired at 2023-11-14T22:13:20.000Z; waiting for the next one",
        ),
        (web_token(exp=-1e300), "holds a token that expired at 1970-01-01T00:00:00.000Z"),
    ],
)
async def test_a_file_without_a_token_is_waited_for(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "token").write_text(content)
    with pytest.raises(TokenUnavailable, match=words) as failure:
        await TokenFile(tmp_path / "token").fetch()
    assert not content or content not in str(failure.value)


async def test_a_file_that_cannot_be_read_in_time_takes_one_thread_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a file server that is away. Threads of asyncio's own are few, and find addresses too."""
    monkeypatch.setattr("worker.kafka.oauth_sources.FETCH_S", 0.02)
    os.mkfifo(tmp_path / "token")
    source, before = TokenFile(tmp_path / "token"), threading.active_count()
    for _ in range(5):
        with pytest.raises(TokenUnavailable, match=r"cannot be read within 0.02 s"):
            await source.fetch()
    blocked = threading.active_count() - before
    for _ in range(blocked):
        (tmp_path / "token").write_text("late")
    assert blocked == 1


async def test_a_token_that_does_not_say_when_it_ends(
    tmp_path: Path, given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    """It is given for ever, and whether its file can be read is told all the same."""
    file = tmp_path / "token"
    file.write_text("opaque")
    assert await TokenFile(file).fetch() == ("opaque", 0, math.inf)
    given.provider = TokenProvider(TokenFile(file), clock=given.clock)
    assert await given.after(0) == "opaque"
    file.unlink()
    assert [await given.after(1) for _ in range(3)] == ["opaque"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        f"the OAuth token cannot be renewed: oauth_token_file {file} cannot be read (No such file or directory); "
        "waiting for a token in it"
    ]


# --- From AWS's signer ---


@pytest.mark.parametrize(
    ("server", "region"),
    [
        (MSK, "eu-west-1"),
        ("b-2-public.demo.abc123.c2.kafka.us-gov-west-1.amazonaws.com:9198", "us-gov-west-1"),
        ("boot-abc.c1.kafka-serverless.us-east-1.amazonaws.com:9098", "us-east-1"),
        ("B-1.demo.abc123.c2.KAFKA.cn-north-1.amazonaws.com.cn:9098", "cn-north-1"),
    ],
)
def test_the_region_is_in_the_brokers_address(server: str, region: str) -> None:
    assert msk_region([server, server]) == region


@pytest.mark.parametrize("servers", [["localhost:9092"], [MSK, "kafka:9092"], [MSK, MSK.replace("west", "north")]])
def test_addresses_without_one_region_are_refused(servers: list[str]) -> None:
    with pytest.raises(WrongSetting, match="bootstrap_servers should be brokers of Amazon MSK in one region"):
        msk_region(servers)


@pytest.fixture
def signer(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A stand-in for AWS's signer. The real one is used where it is installed, below."""
    provider = types.SimpleNamespace(
        generate_auth_token=lambda region: (f"signed-{region}", (time.time() + 900) * 1000)
    )
    module = types.SimpleNamespace(MSKAuthTokenProvider=provider)
    monkeypatch.setitem(sys.modules, "aws_msk_iam_sasl_signer", module)
    return provider


async def test_a_signed_token(signer: types.SimpleNamespace) -> None:
    token = await MskSigner([MSK]).fetch()
    assert token.value == "signed-eu-west-1"
    assert token.ends_in_s == pytest.approx(900, abs=60)


async def test_credentials_that_aws_does_not_give_are_waited_for(
    signer: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(region: str) -> tuple[str, int]:
        raise AttributeError("'NoneType' object has no attribute 'access_key'")

    signer.generate_auth_token = fail
    with pytest.raises(TokenUnavailable, match=r"AWS gives no credentials .AttributeError.; check this process's role"):
        await MskSigner([MSK]).fetch()

    def expired(region: str) -> tuple[str, int]:
        raise RuntimeError("Credentials were refreshed, but the refreshed credentials are still expired.")

    signer.generate_auth_token = expired
    with pytest.raises(TokenUnavailable, match=r"AWS gives no credentials .RuntimeError.; check this process's role"):
        await MskSigner([MSK]).fetch()
    monkeypatch.setattr("worker.kafka.oauth_sources.FETCH_S", 0.1)
    is_over = threading.Event()
    signer.generate_auth_token = lambda region: is_over.wait(60)
    with pytest.raises(TokenUnavailable, match=r"AWS has given no credentials within 0.1 s"):
        await MskSigner([MSK]).fetch()
    is_over.set()


def test_without_the_extra_it_says_which_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aws_msk_iam_sasl_signer", None)
    with pytest.raises(WrongSetting, match=r"needs the extra aws: pip install 'sentiment-worker\[aws\]'"):
        MskSigner([MSK])


async def test_a_token_of_aws_own_signer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aws_msk_iam_sasl_signer", reason="the extra aws is not installed")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    token = await MskSigner([MSK]).fetch()
    url = base64.urlsafe_b64decode(token.value + "=" * (-len(token.value) % 4)).decode()
    assert url.startswith("https://kafka.eu-west-1.amazonaws.com/?Action=kafka-cluster%3AConnect")
    assert "AKIDEXAMPLE" in url
    assert token.ends_in_s == pytest.approx(900, abs=60)


# --- Settings become a connection ---

OAUTH = ("--security-protocol=SASL_PLAINTEXT", "--sasl-mechanism=OAUTHBEARER")


def settings(*arguments: str, **variables: str) -> RunSettings:
    return load(RunSettings, [*OAUTH, *arguments], "run", variables)


async def test_settings_become_a_connection_whose_clients_share_a_token(endpoint: tuple[Endpoint, str]) -> None:
    served, url = endpoint
    flags = (f"--oauth-token-url={url}", "--oauth-client-id=id:1", "--oauth-extensions=logicalCluster=lkc-1,a=b")
    connection = kafka_connection(settings(*flags, "--oauth-scope=s", WORKER_OAUTH_CLIENT_SECRET=SECRET))
    options = connection.options()
    provider = options["sasl_oauth_token_provider"]
    assert options["sasl_mechanism"] == "OAUTHBEARER"
    assert provider is connection.options()["sasl_oauth_token_provider"]
    assert await provider.token() == "of-the-endpoint"
    assert provider.extensions() == {"logicalCluster": "lkc-1", "a": "b"}
    assert served.asked[0][1]["scope"] == "s"
    assert SECRET not in repr(connection)


async def test_msk_logs_in_by_oauthbearer(signer: types.SimpleNamespace) -> None:
    given = load(
        RunSettings,
        [f"--bootstrap-servers={MSK}", "--security-protocol=SASL_SSL", "--sasl-mechanism=AWS_MSK_IAM"],
        "run",
        {},
    )
    options = kafka_connection(given).options()
    assert options["sasl_mechanism"] == "OAUTHBEARER"
    assert await options["sasl_oauth_token_provider"].token() == "signed-eu-west-1"


async def test_why_no_broker_can_be_used_begins_with_the_token(given: Given) -> None:
    """Which nobody needs a broker for."""
    connection = Connection(("127.0.0.1:1",), sasl_mechanism="OAUTHBEARER", token_provider=given.provider)
    given.source.answer = given.source.failing
    assert await why_unreachable(connection) == "nobody answers"
    given.clock.now += 10
    given.source.answer = given.source.refusing
    with pytest.raises(WrongSetting, match="go away"):
        await why_unreachable(connection)
    given.clock.now += 10
    given.source.answer = given.source.numbered
    assert "127.0.0.1:1 refuses connections" in await why_unreachable(connection)


def test_what_the_signer_of_aws_logs_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It writes signatures at debug."""
    from worker.telemetry import logs

    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        logs.configure("debug", "json")
        assert not logging.getLogger("botocore.auth").isEnabledFor(logging.DEBUG)
    finally:
        root.handlers[:], root.level = before
