"""How commands reach the schema registry, by the settings that they share."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from worker.registry.client import SchemaRegistry
from worker.settings.schema_registry import SchemaRegistrySettings
from worker.settings.sentences import variable_of
from worker.settings.values import revealed


def schema_registry(
    settings: SchemaRegistrySettings, environ: Mapping[str, str] = os.environ
) -> SchemaRegistry | None:
    """The registry that the settings name; None where they name none. Reads certificates, and connects to nothing.

    A token that comes from a file is read again for each request: something else renews it there. Raises WrongSetting.
    """
    if settings.schema_registry_url is None:
        return None
    token: str | Callable[[], str] | None = revealed(settings.schema_registry_token)
    path = environ.get(f"{variable_of('schema_registry_token')}_FILE")
    if token is not None and path:
        token = _newest(token, Path(path))
    return SchemaRegistry(
        settings.schema_registry_url,
        user=settings.schema_registry_user,
        password=revealed(settings.schema_registry_password),
        token=token,
        ca_file=settings.schema_registry_ca_file,
    )


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
