"""How commands reach the schema registry, by the settings that they share."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from worker.errors import UserError
from worker.registry.client import RegistryError, RegistryRefused, SchemaRegistry
from worker.settings.schema_registry import SchemaRegistrySettings
from worker.settings.sentences import variable_of
from worker.settings.values import revealed


def schema_registry(settings: SchemaRegistrySettings, environ: Mapping[str, str] = os.environ) -> SchemaRegistry | None:
    """The registry that the settings name; None where they name none. Reads certificates, and connects to nothing.

    A token that comes from a file is read again for each request: something else renews it there. Raises WrongSetting.
    """
    if settings.schema_registry_url is None:
        return None
    token = revealed(settings.schema_registry_token)
    path = environ.get(f"{variable_of('schema_registry_token')}_FILE")
    return SchemaRegistry(
        settings.schema_registry_url,
        user=settings.schema_registry_user,
        password=revealed(settings.schema_registry_password),
        token=_newest(token, Path(path)) if token and path else token,
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


def _newest(first: str, path: Path) -> Callable[[], str]:
    """A function that reads the token in a file; while that cannot be read, it answers what it read last."""
    last = first

    def read() -> str:
        nonlocal last
        try:
            last = path.read_text(encoding="utf-8-sig").rstrip("\r\n") or last
        except (OSError, UnicodeDecodeError):
            return last
        return last

    return read
