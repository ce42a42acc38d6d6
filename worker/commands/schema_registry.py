"""How commands reach the schema registry, by the settings that they share."""

from typing import Literal

from worker.commands.secret_values import secret_value
from worker.errors import UserError
from worker.registry.client import RegistryError, RegistryRefused, SchemaRegistry
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


async def registry_state(settings: SchemaRegistrySettings) -> tuple[Literal["ok", "fail"], str, int]:
    """How the registry is, for ``check``: a verdict, a sentence, and the exit code where it fails."""
    try:
        registry = schema_registry(settings)
        assert registry
        async with registry:
            await registry.check()
    except UserError as error:
        return "fail", str(error), error.exit_code
    except RegistryError as error:
        return "fail", str(error), 2 if isinstance(error, RegistryRefused) else 1
    return "ok", f"{registry.url} answers", 0
