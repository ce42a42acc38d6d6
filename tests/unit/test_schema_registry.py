"""The client of a schema registry, and what is done where it knows nothing, or does not answer."""

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.avro import REVIEW, record, review, string
from tests.support.events import TEN, FakeRecord
from tests.support.fake_registry import FakeRegistry, fake_registry
from tests.support.secure import Authority
from worker.commands.finding import Finding
from worker.commands.schema_registry import registry_findings, schema_registry
from worker.core.decoder import Decoder
from worker.core.events import Event
from worker.core.framing import frame
from worker.errors import WrongSetting
from worker.kafka.assignment import Assignment
from worker.pipeline.input_schemas import InputSchemas
from worker.registry import schema_fetcher
from worker.registry.client import (
    MAX_ANSWER_BYTES,
    RegistryRefused,
    RegistryUnavailable,
    SchemaRefused,
    SchemaRegistry,
    SchemaUnknown,
)
from worker.registry.schema_fetcher import MAX_RETRIED, MAX_UNKNOWN, UNKNOWN_S, SchemaFetcher
from worker.runtime.backoff import LONGEST_BACKOFF_S
from worker.settings.run import RunSettings
from worker.settings.sources import load
from worker.telemetry.health import Health

SECRET = "geheim-0123456789"


@pytest.fixture
async def fake() -> AsyncIterator[FakeRegistry]:
    async with fake_registry() as fake:
        yield fake


@pytest.fixture
async def registry(fake: FakeRegistry) -> AsyncIterator[SchemaRegistry]:
    async with SchemaRegistry(fake.url, timeout_s=5) as registry:
        yield registry


# --- The client ---


async def test_a_schema_is_found_by_its_id_with_what_it_refers_to(fake: FakeRegistry, registry: SchemaRegistry) -> None:
    fake.add(1, record("Author", name="string"), subject="authors")
    authors = [{"name": "Author", "subject": "authors", "version": 1}]
    fake.add(2, record("Body", text="string", author="Author"), subject="a/b", references=authors)
    fake.add(3, record("Outer", body="Body"), references=[{"name": "Body", "subject": "a/b", "version": 1}, *authors])
    schema = await registry.schema(3)
    assert (schema.id, schema.type) == (3, "AVRO")
    assert [schema.text, *schema.references] == [fake.schemas[id]["schema"] for id in (3, 1, 2)]
    fake.add(4, {"type": "object"}, type="JSON")
    assert (await registry.schema(4)).type == "JSON"


async def test_references_in_a_circle_end(fake: FakeRegistry, registry: SchemaRegistry) -> None:
    fake.add(1, '"B"', subject="a", references=[{"name": "B", "subject": "b", "version": 1}])
    fake.add(2, '"A"', subject="b", references=[{"name": "A", "subject": "a", "version": 1}])
    assert set((await registry.schema(1)).references) == {'"A"', '"B"'}


async def test_schemas_are_registered_once_and_looked_up(fake: FakeRegistry, registry: SchemaRegistry) -> None:
    with pytest.raises(SchemaUnknown):
        await registry.lookup("топик/value", '"string"')
    id = await registry.register("топик/value", '"string"')
    assert await registry.register("топик/value", '"string"') == id == await registry.lookup("топик/value", '"string"')
    with pytest.raises(SchemaUnknown):
        await registry.lookup("топик/value", '"long"')
    assert list(fake.subjects) == ["топик/value"]
    assert fake.schemas[id] == {"schema": '"string"'}


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, {"error_code": 40403, "message": "no"}, SchemaUnknown),
        (404, {"error_code": 404, "message": "HTTP 404 Not Found"}, RegistryUnavailable),
        (404, b"<html>", RegistryUnavailable),
        (401, b"", RegistryRefused),
        (403, {"error_code": 40301}, RegistryRefused),
        (409, {"error_code": 409, "message": "incompatible"}, SchemaRefused),
        (422, {"error_code": 42201, "message": "invalid"}, SchemaRefused),
        (429, b"", RegistryUnavailable),
        (500, {"error_code": 50001, "message": "x\ny" * 9999}, RegistryUnavailable),
        (302, b"", RegistryUnavailable),
        (200, b"<html>", RegistryUnavailable),
        (200, [], RegistryUnavailable),
        (200, {"schema": 7}, RegistryUnavailable),
        (200, {"schema": "x", "references": [{"name": "a"}]}, RegistryUnavailable),
        (200, b" " * (MAX_ANSWER_BYTES + 1), RegistryUnavailable),
    ],
)
async def test_each_answer_has_its_error(
    status: int, body: Any, error: type[Exception], fake: FakeRegistry, registry: SchemaRegistry
) -> None:
    fake.refusal = (status, body)
    with pytest.raises(error) as raised:
        await registry.schema(1)
    assert 10 < len(str(raised.value)) < 700
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("id", [-1, 2**31])
async def test_no_registry_is_asked_for_an_id_that_none_has(
    id: int, fake: FakeRegistry, registry: SchemaRegistry
) -> None:
    with pytest.raises(SchemaUnknown):
        await registry.schema(id)
    assert not fake.requests


async def test_a_registry_that_is_away_or_silent_is_unavailable(fake: FakeRegistry) -> None:
    async with SchemaRegistry("http://127.0.0.1:1") as nobody:
        with pytest.raises(RegistryUnavailable, match="does not answer"):
            await nobody.schema(1)
    fake.answers.clear()
    async with SchemaRegistry(fake.url, timeout_s=0.1) as impatient:
        with pytest.raises(RegistryUnavailable, match="no answer in time"):
            await impatient.schema(1)
    fake.answers.set()


async def test_it_logs_in_by_name_or_by_a_token_that_may_change(
    fake: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add(1, REVIEW)
    fake.authorization = "Basic " + base64.b64encode(f"алиса:{SECRET}".encode()).decode()
    async with SchemaRegistry(fake.url, user="алиса", password=SECRET) as registry:
        await registry.check()
        assert (await registry.schema(1)).id == 1
        assert SECRET not in repr(registry)
    path = tmp_path / "token"
    path.write_text("one\n")
    monkeypatch.setenv("WORKER_SCHEMA_REGISTRY_TOKEN_FILE", str(path))
    renewed = schema_registry(load(RunSettings, ["--schema-registry-url", fake.url], "run"))
    assert renewed
    async with renewed as registry:
        for token in ("one", "second"):  # of another size, as the time of a file may be too coarse
            path.write_text(token)
            fake.authorization = f"Bearer {token}"
            await registry.check()
        path.unlink()
        await registry.check()
        fake.authorization = "Bearer three"
        with pytest.raises(RegistryRefused, match="schema_registry_token") as refused:
            await registry.check()
    assert "second" not in str(refused.value)


async def test_a_file_of_authorities_that_is_none_is_a_wrong_setting(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("no certificate")
    with pytest.raises(WrongSetting, match="schema_registry_ca_file"):
        SchemaRegistry("https://registry", ca_file=path)


async def test_its_certificate_is_checked_by_authorities_that_may_be_replaced(tmp_path: Path) -> None:
    one, other = Authority(tmp_path, "one"), Authority(tmp_path, "other")
    files = tmp_path / "registry.crt", tmp_path / "registry.key"
    for file, pem in zip(files, one.issue("registry", ["127.0.0.1"]), strict=True):
        file.write_text(pem)
    certificate = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.load_cert_chain(*files)
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(other.cafile.read_bytes())
    async with fake_registry(certificate) as fake, SchemaRegistry(fake.url, ca_file=ca_file) as registry:
        with pytest.raises(RegistryRefused, match="schema_registry_ca_file"):
            await registry.check()
        ca_file.write_bytes(other.cafile.read_bytes() + one.cafile.read_bytes())
        await registry.check()
        async with SchemaRegistry(fake.url) as by_the_systems:
            with pytest.raises(RegistryRefused, match="certificate verify failed"):
                await by_the_systems.check()
    async with fake_registry() as plain, SchemaRegistry(plain.url.replace("http:", "https:")) as registry:
        with pytest.raises(RegistryRefused, match="http://"):
            await registry.check()


async def test_check_says_how_the_registry_is(fake: FakeRegistry, tmp_path: Path) -> None:
    async def findings(*flags: str) -> list[Finding]:
        return [each async for each in registry_findings(load(RunSettings, flags, "run", {}))]

    given = "--schema-registry-url", fake.url
    assert await findings() == []
    assert await findings(*given) == [Finding("registry", "ok", f"{fake.url} answers")]
    _, schema = await findings(*given, "--output-format=avro")
    assert (schema.subject, schema.verdict) == ("schema", "ok")
    fake.authorization = "Bearer x"
    (refused,) = await findings(*given, "--output-format=avro")
    assert (refused.verdict, refused.exit_code) == ("fail", 2)
    assert "credentials" in refused.sentence
    (away,) = await findings("--schema-registry-url", "http://127.0.0.1:1")
    assert (away.verdict, away.exit_code) == ("fail", 1)
    path = tmp_path / "ca.pem"
    path.write_text("no certificate")
    (wrong,) = await findings("--schema-registry-url", "https://registry", "--schema-registry-ca-file", str(path))
    assert (wrong.verdict, wrong.exit_code) == ("fail", 2)


# --- Fetching, before records are decoded ---


class Clock:
    """Time that passes while somebody sleeps. `events` are called when their time has come."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.events: dict[float, Any] = {}

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        for at in [at for at in self.events if at <= self.now]:
            self.events.pop(at)()
        await asyncio.sleep(0)


class Fetching:
    """A fetcher on a clock of its own, and the decoder that it fetches for."""

    def __init__(self, registry: SchemaRegistry) -> None:
        self.clock, self.health = Clock(), Health()
        self.decoder = Decoder(input_format="avro")
        self.fetcher = SchemaFetcher(
            registry, self.decoder.schemas.add, self.health, clock=self.clock, sleep=self.clock.sleep,
            now=lambda: TEN / 1000 + self.clock.now - 1000,
        )  # fmt: skip

    async def fetch(self, *values: bytes) -> list[Any]:
        """What becomes of records with these values: their texts, or the reasons why they have none."""
        records = [FakeRecord(value) for value in values]
        if ids := self.decoder.missing_schemas(records):
            await self.fetcher.fetch(ids, records)
        found = self.decoder.decode_all(records)
        return [each.text if isinstance(each, Event) else each.reason for each in found]  # type: ignore[union-attr]


@pytest.fixture
def fetching(registry: SchemaRegistry) -> Fetching:
    return Fetching(registry)


async def test_each_schema_is_asked_for_once(fake: FakeRegistry, fetching: Fetching) -> None:
    one, two = fake.add(1, REVIEW), fake.add(2, record("R", text="string"))
    values = [one + review(1, "да"), two + string("нет"), one + review(2, "или")]
    for _ in range(3):
        assert await fetching.fetch(*values) == ["да", "нет", "или"]
    assert fake.requests == {"/schemas/ids/1": 1, "/schemas/ids/2": 1}


async def test_a_schema_that_cannot_be_read_is_told_and_kept_too(fake: FakeRegistry, fetching: Fetching) -> None:
    values = [fake.add(1, '"Unknown"') + b"x", fake.add(2, "{}", type="JSON") + b"{}"]
    for _ in range(2):
        assert await fetching.fetch(*values) == ["unknown_schema"] * 2
    assert fake.requests.total() == 2


async def test_an_id_that_the_registry_learns_within_30_s_is_found(fake: FakeRegistry, fetching: Fetching) -> None:
    fetching.clock.events[1000 + UNKNOWN_S - 1] = lambda: fake.add(7, REVIEW)
    assert await fetching.fetch(frame(7) + review(1, "да")) == ["да"]
    assert fake.requests["/schemas/ids/7"] < 15


async def test_an_id_that_it_does_not_learn_is_unknown_and_remembered_as_that(
    fake: FakeRegistry, fetching: Fetching
) -> None:
    assert await fetching.fetch(frame(7) + review(1, "да")) == ["unknown_schema"]
    assert fetching.clock.now == pytest.approx(1000 + UNKNOWN_S)
    asked = fake.requests["/schemas/ids/7"]
    assert await fetching.fetch(frame(7) + review(1, "да")) == ["unknown_schema"]
    assert (fetching.clock.now, fake.requests["/schemas/ids/7"]) == (pytest.approx(1000 + UNKNOWN_S), asked)
    fetching.clock.now += schema_fetcher.ASK_AGAIN_S
    fake.add(7, REVIEW)
    assert await fetching.fetch(frame(7) + review(1, "да")) == ["да"]


async def test_after_a_wait_in_vain_old_records_are_not_waited_for_again(
    fake: FakeRegistry, fetching: Fetching
) -> None:
    assert await fetching.fetch(frame(7) + b"x") == ["unknown_schema"]
    begun = fetching.clock.now
    assert await fetching.fetch(frame(8) + b"x") == ["unknown_schema"]
    assert fetching.clock.now == pytest.approx(begun), "the record is 30 s old by now"
    fetching.clock.now += schema_fetcher.IN_VAIN_S
    begun = fetching.clock.now
    assert await fetching.fetch(frame(9) + b"x") == ["unknown_schema"]
    assert fetching.clock.now == pytest.approx(begun + UNKNOWN_S)


async def test_after_a_wait_in_vain_neither_other_records_nor_a_wrong_clock_buy_time(
    fake: FakeRegistry, fetching: Fetching
) -> None:
    one = fake.add(1, REVIEW)
    await fetching.fetch(frame(7) + b"x")
    begun, now_ms = fetching.clock.now, TEN + 1000 * round(UNKNOWN_S)
    old, ahead = FakeRecord(frame(8) + b"x"), FakeRecord(frame(9) + b"x", timestamp=now_ms + 3_600_000)
    young = FakeRecord(one + review(1, "да"), timestamp=now_ms)
    await fetching.fetcher.fetch({8, 9}, [young, old, ahead])
    assert fetching.clock.now == begun
    await fetching.fetcher.fetch({10}, [old, FakeRecord(frame(10) + b"x", timestamp=now_ms - 20_000)])
    assert fetching.clock.now == pytest.approx(begun + UNKNOWN_S - 20)


async def test_random_bytes_are_not_waited_for_and_take_a_bounded_memory(
    fake: FakeRegistry, fetching: Fetching
) -> None:
    begun = fetching.clock.now
    for first in range(0, 3 * MAX_UNKNOWN, MAX_RETRIED + 4):
        await fetching.fetch(*(frame(id) + b"x" for id in range(first, first + MAX_RETRIED + 4)))
    assert fetching.clock.now == begun
    assert max(fake.requests.values()) == 1
    assert len(fetching.fetcher._unknown) == MAX_UNKNOWN


@pytest.mark.parametrize("refusal", [(503, b""), (401, b""), (422, b"")])
async def test_a_registry_that_does_not_answer_is_waited_for(
    refusal: tuple[int, bytes], fake: FakeRegistry, fetching: Fetching
) -> None:
    one = fake.add(1, REVIEW)
    fake.refusal = refusal
    reasons: list[str | None] = []
    fetching.clock.events[1500.0] = lambda: reasons.append(fetching.health.why_not_ready())
    fetching.clock.events[1600.0] = lambda: setattr(fake, "refusal", None)
    assert await fetching.fetch(one + review(1, "да")) == ["да"]
    assert fetching.clock.now < 1600 + 2 * LONGEST_BACKOFF_S
    (reason,) = reasons
    assert reason is not None
    assert reason.startswith("registry: ")
    assert fetching.health.why_not_ready() is None


async def test_at_the_start_it_is_waited_for_and_a_refusal_is_raised(fake: FakeRegistry, fetching: Fetching) -> None:
    fake.refusal = (500, b"")
    fetching.clock.events[1100.0] = lambda: setattr(fake, "refusal", (401, b""))
    with pytest.raises(RegistryRefused):
        await fetching.fetcher.check()


# --- Beside revocations ---


async def test_who_no_longer_waits_for_the_registry_is_ready_and_says_of_no_recovery(
    fake: FakeRegistry, fetching: Fetching, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fake.refusal = (503, b"")
    waiting = asyncio.create_task(fetching.fetch(frame(1) + b"x"))
    await until(lambda: not fetching.health.is_working("registry"))
    waiting.cancel()
    await asyncio.wait({waiting})
    assert fetching.health.why_not_ready() is None
    assert "recovered" not in caplog.text, "it is still away"


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - neither side has an event for it
            await asyncio.sleep(0.01)


async def test_a_partition_that_is_revoked_while_the_registry_is_away_is_dropped(
    fake: FakeRegistry, registry: SchemaRegistry
) -> None:
    one = fake.add(1, REVIEW)
    decoder, health = Decoder(input_format="avro"), Health()
    schemas = InputSchemas(decoder, SchemaFetcher(registry, decoder.schemas.add, health))
    fake.answers.clear()
    first, second = (Assignment(("t", number), None) for number in (0, 1))  # type: ignore[arg-type]
    owners = first, second, first
    chunks: Any = [(each, [FakeRecord(one + review(1, "да")) for _ in range(at)]) for at, each in enumerate(owners, 1)]
    dropped: list[tuple[Assignment, int]] = []
    waiting = asyncio.create_task(schemas.fetched(chunks, lambda *drop: dropped.append(drop), asyncio.Event()))
    await until(lambda: fake.requests)
    first.accepts = False
    await until(lambda: dropped)
    assert dropped == [(first, 1)]
    fake.answers.set()
    assert await waiting == chunks[1:2]
    assert dropped == [(first, 1), (first, 3)], "what lies behind it would be committed past it"


@pytest.mark.parametrize("refusal", [(503, b""), None], ids=["away", "lags behind"])
async def test_a_drain_does_not_wait_until_a_registry_has_what_it_lacks(
    refusal: tuple[int, bytes] | None, fake: FakeRegistry, registry: SchemaRegistry
) -> None:
    known, unknown = fake.add(1, REVIEW) + review(1, "да"), frame(2) + review(1, "да")
    decoder, draining = Decoder(input_format="avro"), asyncio.Event()
    fetcher = SchemaFetcher(registry, decoder.schemas.add, Health())
    await fetcher.fetch({1}, [])
    fake.refusal = refusal
    first, second, third = (Assignment(("t", number), None) for number in range(3))  # type: ignore[arg-type]
    values = (first, unknown), (second, known), (first, known), (third, frame(3) + review(1, "да"))
    chunks: Any = [(each, [FakeRecord(value)] * count) for count, (each, value) in enumerate(values, 1)]
    dropped: list[tuple[Assignment, int]] = []

    def drop(assignment: Assignment, records: int) -> None:
        assignment.has_dropped = True
        dropped.append((assignment, records))

    waiting = asyncio.create_task(InputSchemas(decoder, fetcher).fetched(chunks, drop, draining))
    await until(lambda: fetcher.is_retrying)
    draining.set()
    assert await waiting == chunks[1:2]
    assert dropped == [(first, 1), (first, 3), (third, 4)], "what lies behind it would be committed past it"
    assert not fake.requests["/schemas/ids/3"], "it is not asked anew for each partition"


async def test_a_revocation_in_a_drain_gives_up_its_own_partition_alone(fake: FakeRegistry) -> None:
    decoder, draining = Decoder(input_format="avro"), asyncio.Event()
    record = FakeRecord(fake.add(1, REVIEW) + review(1, "да"))
    chunks: Any = [(Assignment(("t", number), None), [record]) for number in range(2)]  # type: ignore[arg-type]
    fake.answers.clear()
    draining.set()
    dropped: list[Assignment] = []
    async with SchemaRegistry(fake.url, timeout_s=300) as registry:
        schemas = InputSchemas(decoder, SchemaFetcher(registry, decoder.schemas.add, Health()))
        waiting = asyncio.create_task(schemas.fetched(chunks, lambda each, _: dropped.append(each), draining))
        await until(lambda: fake.requests)
        chunks[0][0].accepts = False
        await until(lambda: dropped)
        fake.answers.set()
        assert await waiting == chunks[1:]


async def test_a_drain_waits_for_a_registry_that_is_answering(fake: FakeRegistry, registry: SchemaRegistry) -> None:
    decoder, draining = Decoder(input_format="avro"), asyncio.Event()
    schemas = InputSchemas(decoder, SchemaFetcher(registry, decoder.schemas.add, Health()))
    chunks: Any = [(Assignment(("t", 0), None), [FakeRecord(fake.add(1, REVIEW) + review(1, "да"))])]  # type: ignore[arg-type]
    draining.set()
    assert await schemas.fetched(chunks, lambda *_: None, draining) == chunks
