"""The schema of results in the registry: registered, or looked up, before a worker with ``output_format=avro`` is ready."""

import logging

from worker.core.schemas import result_avro_schema
from worker.errors import WrongSetting
from worker.kafka.connection import Backoff
from worker.registry.client import RegistryRefused, RegistryUnavailable, SchemaRefused, SchemaRegistry, SchemaUnknown
from worker.telemetry.health import Health

import orjson

log = logging.getLogger(__name__)


def subject_of(output_topic: str) -> str:
    """The subject that clients of a registry look under for the schema of a topic's values, unless told otherwise."""
    return f"{output_topic}-value"


async def result_schema_id(
    registry: SchemaRegistry, output_topic: str, *, auto_register: bool, health: Health
) -> int:
    """The id of the schema of results, which is registered if ``auto_register`` is True, and else only looked up.

    Waits for a registry that does not answer, and tells ``health`` so. Raises WrongSetting where the registry refuses the
    credentials or the schema, or does not have the schema that it should have.
    """
    subject, text = subject_of(output_topic), orjson.dumps(result_avro_schema()).decode()
    backoff = Backoff()
    while True:
        try:
            id = await (registry.register if auto_register else registry.lookup)(subject, text)
        except RegistryUnavailable as error:
            health.failing("registry", f"{error}; waiting for it")
            await backoff.wait()
        except RegistryRefused as error:
            also = f", and register one under {subject}" if auto_register else ""
            raise WrongSetting(f"{error}{also}") from None
        except SchemaRefused as error:
            raise WrongSetting(
                f"the schema of results does not fit the subject {subject}: {error}; name another output_topic, or change "
                "what the registry has under this one"
            ) from None
        except SchemaUnknown as error:
            raise WrongSetting(
                f"the schema of results is not registered under {subject}: {error}; register what `sentiment-worker schema "
                "result --format avro` prints, or let the worker do it by schema_auto_register"
            ) from None
        else:
            health.working("registry")
            log.info("the schema of results is registered", extra={"subject": subject, "schema_id": id})
            return id
