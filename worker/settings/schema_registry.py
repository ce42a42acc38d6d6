"""The options for a schema registry."""

from collections.abc import Iterator
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_settings import CliSuppress

from worker.settings.base import Settings
from worker.settings.types import HOST, PemFile


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        is_right = parts.scheme in ("http", "https") and HOST.fullmatch(parts.hostname or "") and parts.port != 0
    except ValueError:  # of a port that is no number, or of brackets
        is_right = False
    if not is_right:
        raise ValueError("it should be an address such as https://registry:8081")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            "it should have no user, query or fragment; schema_registry_user and schema_registry_password are for the login"
        )
    return value


Url = Annotated[str, AfterValidator(_url)]


class SchemaRegistrySettings(Settings):
    """How to reach a schema registry."""

    schema_registry_url: Url | None = Field(
        None,
        description="schema registry, by Confluent's interface: the address that its paths, such as /subjects, begin at. "
        "Avro needs it, and input_format json then leaves out Confluent's framing in front of the JSON",
    )
    schema_registry_user: str | None = Field(
        None,
        description="who logs in to the schema registry; the password is in WORKER_SCHEMA_REGISTRY_PASSWORD or the file "
        "WORKER_SCHEMA_REGISTRY_PASSWORD_FILE names; a token instead of both is in WORKER_SCHEMA_REGISTRY_TOKEN or the file "
        "WORKER_SCHEMA_REGISTRY_TOKEN_FILE names",
    )
    schema_registry_password: CliSuppress[SecretStr | None] = None
    schema_registry_token: CliSuppress[SecretStr | None] = None
    schema_registry_ca_file: PemFile | None = Field(
        None, description="authorities that sign the schema registry's certificate, PEM; default: the system's"
    )

    @model_validator(mode="after")
    def _logs_in_one_way(self) -> Self:
        if not self.schema_registry_url:  # secrets alone are no fault: several commands may share an environment
            for name in ("schema_registry_user", "schema_registry_ca_file"):
                if getattr(self, name):
                    raise ValueError(f"{name} goes with schema_registry_url; set it, too")
            return self
        if ":" in (self.schema_registry_user or ""):
            raise ValueError("schema_registry_user should have no colon, which stands between user and password")
        if (self.schema_registry_user is None) != (self.schema_registry_password is None):
            raise ValueError(
                "schema_registry_user goes with schema_registry_password, from WORKER_SCHEMA_REGISTRY_PASSWORD or …_FILE: "
                "set both or neither"
            )
        if self.schema_registry_user and self.schema_registry_token:
            raise ValueError("schema_registry_user and schema_registry_token: set one of them, not both")
        if self.schema_registry_ca_file and not self.schema_registry_url.startswith("https:"):
            raise ValueError("schema_registry_ca_file goes with a schema_registry_url that begins with https://")
        return self

    def registry_exposures(self) -> Iterator[str]:
        """A sentence if these settings let others read the registry's credentials."""
        url = self.schema_registry_url or ""
        if url.startswith("http:") and (self.schema_registry_user or self.schema_registry_token):
            what = "token" if self.schema_registry_token else "password"
            yield (
                f"nothing is encrypted with schema_registry_url {url}: whoever is on the way to the registry reads the "
                f"{what}; use https"
            )
