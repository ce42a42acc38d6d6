"""How commands reach the schema registry, by the settings that they share."""

from collections.abc import AsyncIterator

from worker.commands.finding import Finding, wrong_setting
from worker.commands.result_schema import state_of_schema
from worker.commands.secret_values import secret_value
from worker.errors import WrongSetting
from worker.registry.client import RegistryError, RegistryRefused, SchemaRegistry
from worker.settings.run import RunSettings
from worker.settings.schema_registry import SchemaRegistrySettings


def schema_registry(settings: SchemaRegistrySettings) -> SchemaRegistry | None:
    """The registry that the settings name; None where they name none. Reads certificates, and connects to nothing.

    Raises WrongSetting.
    """
    if settings.schema_registry_url is None:
        return None
    return SchemaRegistry(
        settings.schema_registry_url,
        user=settings.schema_registry_user,
        password=secret_value(settings, "schema_registry_password"),
        token=secret_value(settings, "schema_registry_token"),
        ca_file=settings.schema_registry_ca_file,
    )


async def registry_findings(settings: RunSettings) -> AsyncIterator[Finding]:
    """How the registry is, and whether it has the schema of results where those are Avro; nothing where none is named."""
    try:
        registry = schema_registry(settings)
    except WrongSetting as error:
        yield wrong_setting("registry", error)
        return
    if registry is None:
        return
    async with registry:
        try:
            await registry.check()
        except RegistryError as error:
            yield Finding("registry", "fail", str(error), 2 if isinstance(error, RegistryRefused) else 1)
            return
        yield Finding("registry", "ok", f"{registry.url} answers")
        if settings.output_format == "avro":
            told = await state_of_schema(registry, settings.output_topic, auto_register=settings.schema_auto_register)
            yield Finding("schema", *told)
