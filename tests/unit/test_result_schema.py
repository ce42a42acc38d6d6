"""The schema of results is registered, or looked up; a registry that is away is waited for, and a refusal is a sentence."""

import asyncio
import json

import pytest

from tests.support.fake_registry import FakeRegistry, fake_registry
from worker.commands.result_schema import state_of_schema, wait_for_schema_id
from worker.core.schemas import result_avro_schema
from worker.errors import WrongSetting
from worker.registry.client import SchemaRegistry
from worker.telemetry.health import Health

SUBJECT = "sentiment-value"


async def asked(fake: FakeRegistry, *, auto_register: bool = True, health: Health | None = None) -> int:
    async with SchemaRegistry(fake.url, user="u", password="hunter2") as registry:
        return await wait_for_schema_id(registry, "sentiment", auto_register=auto_register, health=health or Health())


async def test_the_schema_is_registered_once_under_the_topics_subject() -> None:
    async with fake_registry() as fake:
        first = await asked(fake)
        assert await asked(fake) == first
        assert fake.subjects == {SUBJECT: [first]}
        assert json.loads(fake.schemas[first]["schema"]) == result_avro_schema()
        assert await asked(fake, auto_register=False) == first


async def test_nothing_is_registered_where_that_is_switched_off() -> None:
    async with fake_registry() as fake:
        with pytest.raises(WrongSetting, match=rf"not registered under {SUBJECT}.*schema result --format avro"):
            await asked(fake, auto_register=False)
        fake.add(5, '"string"', subject=SUBJECT)
        with pytest.raises(WrongSetting, match=SUBJECT):
            await asked(fake, auto_register=False)
        assert fake.subjects == {SUBJECT: [5]}


@pytest.mark.parametrize(("status", "code"), [(409, 409), (422, 42201)])
async def test_a_schema_that_is_refused_ends_the_start(status: int, code: int) -> None:
    async with fake_registry() as fake:
        fake.refusal = (status, {"error_code": code, "message": "no,\nnot so"})
        with pytest.raises(WrongSetting, match=rf"{SUBJECT}.*no, not so") as refused:
            await asked(fake)
        assert "\n" not in str(refused.value)


async def test_credentials_that_are_refused_end_the_start_and_are_not_told() -> None:
    async with fake_registry() as fake:
        fake.authorization = "Basic other"
        with pytest.raises(WrongSetting, match="credentials") as refused:
            await asked(fake)
        assert "hunter2" not in str(refused.value)
        assert SUBJECT in str(refused.value), "they have to be allowed to register, too"
        with pytest.raises(WrongSetting, match="credentials"):
            await asked(fake, auto_register=False)


async def test_a_registry_that_is_away_is_waited_for_and_the_reason_told() -> None:
    health = Health()
    async with fake_registry() as fake:
        fake.refusal = (503, {"error_code": 50301, "message": "starting"})
        waiting = asyncio.create_task(asked(fake, health=health))
        async with asyncio.timeout(60):
            while health.why_not_ready() is None:  # noqa: ASYNC110 - health tells nobody
                await asyncio.sleep(0.01)
        assert "starting" in (health.why_not_ready() or "")
        assert not waiting.done()
        fake.refusal = None
        async with asyncio.timeout(60):
            assert await waiting == 1
        assert health.why_not_ready() is None


async def test_check_is_told_and_registers_nothing() -> None:
    async with fake_registry() as fake, SchemaRegistry(fake.url) as registry:

        async def told(auto_register: bool = True) -> tuple[str, int, str]:
            verdict, sentence, code = await state_of_schema(registry, "sentiment", auto_register=auto_register)
            return verdict, code, sentence

        verdict, code, sentence = await told()
        assert (verdict, code) == ("ok", 0)
        assert f"{SUBJECT} does not have the schema" in sentence
        verdict, code, sentence = await told(auto_register=False)
        assert (verdict, code) == ("fail", 2)
        assert f"not registered under {SUBJECT}" in sentence
        assert not fake.subjects
        id = await asked(fake)
        for auto_register in (True, False):
            assert await told(auto_register) == ("ok", 0, f"{SUBJECT} has the schema of results, with the id {id}")
        fake.authorization = "Basic other"
        assert (await told())[:2] == ("fail", 2)
        fake.authorization, fake.refusal = None, (503, {})
        assert (await told())[:2] == ("fail", 1)
