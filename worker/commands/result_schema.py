"""The schema of results in the registry: registered or looked up by a worker, and looked up by ``check``."""

import logging
from typing import Final, Literal

import orjson

from worker.core.schemas import result_avro_schema
from worker.errors import WrongSetting
from worker.registry.client import (
    RegistryError,
    RegistryRefused,
    RegistryUnavailable,
    SchemaRefused,
    SchemaRegistry,
    SchemaUnknown,
)
from worker.runtime.backoff import Backoff
from worker.telemetry.health import Health

log = logging.getLogger(__name__)

SCHEMA: Final = orjson.dumps(result_avro_schema()).decode()


def subject_of(output_topic: str) -> str:
    """The subject under which clients of a registry look for the schema of a topic's values, unless told otherwise."""
    return f"{output_topic}-value"


async def wait_for_schema_id(
    registry: SchemaRegistry, output_topic: str, *, auto_register: bool, health: Health
) -> int:
    """The id of the schema of results, which is registered if ``auto_register`` is True, and else only looked up.

    Waits for a registry that does not answer, and tells ``health`` so. Raises WrongSetting where the registry refuses the
    credentials or the schema, or does not have the schema that it should have.
    """
    backoff = Backoff()
    while True:
        try:
            id = await _schema_id(registry, subject_of(output_topic), auto_register=auto_register)
        except RegistryUnavailable as error:
            health.failing("registry", f"{error}; waiting for it", who=SCHEMA)
            await backoff.wait()
        else:
            health.working("registry", who=SCHEMA)
            log.info(
                "the schema registry has the schema of results",
                extra={"subject": subject_of(output_topic), "schema_id": id},
            )
            return id


async def state_of_schema(
    registry: SchemaRegistry, output_topic: str, *, auto_register: bool
) -> tuple[Literal["ok", "fail"], str, int]:
    """Whether the registry has the schema of results, or lacks one that it may lack; a sentence; the exit code of ``check``.

    It registers nothing, and raises nothing.
    """
    subject = subject_of(output_topic)
    try:
        id = await registry.lookup(subject, SCHEMA)
    except SchemaUnknown as error:
        if auto_register:
            return "ok", f"{subject} does not have the schema of results yet: a worker registers it", 0
        return "fail", _not_registered(subject, error), WrongSetting.exit_code
    except RegistryRefused as error:
        return "fail", str(error), WrongSetting.exit_code
    except RegistryError as error:
        return "fail", str(error), 1
    return "ok", f"{subject} has the schema of results, with the id {id}", 0


async def _schema_id(registry: SchemaRegistry, subject: str, *, auto_register: bool) -> int:
    """Raises WrongSetting, and RegistryUnavailable."""
    try:
        return await (registry.register if auto_register else registry.lookup)(subject, SCHEMA)
    except RegistryRefused as error:
        also = f", and register one under {subject}" if auto_register else ""
        raise WrongSetting(f"{error}{also}") from None
    except SchemaRefused as error:
        raise WrongSetting(
            f"the schema of results does not fit the subject {subject}: {error}; name another output_topic, or change what "
            "the registry has under this one"
        ) from None
    except SchemaUnknown as error:
        raise WrongSetting(_not_registered(subject, error)) from None


def _not_registered(subject: str, error: SchemaUnknown) -> str:
    return (
        f"the schema of results is not registered under {subject}: {error}; register what `sentiment-worker schema result "
        "--format avro` prints, or let the worker do it by schema_auto_register"
    )
