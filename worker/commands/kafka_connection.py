"""How commands connect to Kafka, by the settings that they share."""

import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING

from worker.commands.secret_values import secret_value
from worker.kafka.connection import Connection, tls_context
from worker.runtime.file_value import FileValue, present
from worker.settings.oauth import BY_TOKEN
from worker.settings.shared import ConnectionSettings
from worker.settings.sources import secret_file
from worker.settings.values import pairs, split_names

if TYPE_CHECKING:
    from worker.kafka.oauth import TokenProvider, TokenSource


def kafka_connection(settings: ConnectionSettings, tell: Callable[[str], None] = lambda _: None) -> Connection:
    """Reads certificates; connects to nothing. Raises WrongSetting.

    Where logins are by token, ``tell`` is called with the reason why nobody can log in, and with "" once they can.
    """
    by_token = settings.sasl_mechanism in BY_TOKEN
    return Connection(
        bootstrap_servers=split_names(settings.bootstrap_servers),
        client_id=settings.client_id,
        request_timeout_ms=settings.request_timeout_ms,
        security_protocol=settings.security_protocol,
        sasl_mechanism="OAUTHBEARER" if by_token else settings.sasl_mechanism,
        sasl_username=settings.sasl_username,
        sasl_password=secret_value(settings, "sasl_password"),
        ssl_context=_tls(settings) if settings.security_protocol.endswith("SSL") else None,
        token_provider=_token_provider(settings, tell) if by_token else None,
    )


def _token_provider(settings: ConnectionSettings, tell: Callable[[str], None]) -> "TokenProvider":
    """One for all clients of the process. Raises WrongSetting."""
    from worker.kafka.oauth import TokenProvider  # noqa: PLC0415 - for logins by token alone

    extensions = dict(pairs(settings.oauth_extensions or ""))
    return TokenProvider(_token_source(settings), extensions=extensions, tell=tell)


def _token_source(settings: ConnectionSettings) -> "TokenSource":
    from worker.kafka.oauth_sources import ClientCredentials, MskSigner, TokenFile  # noqa: PLC0415 - as above

    if settings.sasl_mechanism == "AWS_MSK_IAM":
        return MskSigner(split_names(settings.bootstrap_servers))
    if settings.oauth_token_file:
        return TokenFile(settings.oauth_token_file)
    secret = secret_value(settings, "oauth_client_secret")
    return ClientCredentials(
        settings.oauth_token_url or "",
        settings.oauth_client_id or "",
        lambda: present(secret) or "",
        scope=settings.oauth_scope,
        audience=settings.oauth_audience,
        ca_file=settings.oauth_ca_file,
    )


def _tls(settings: ConnectionSettings) -> FileValue[ssl.SSLContext]:
    key_password = secret_value(settings, "ssl_key_password")
    named = [settings.ssl_cafile, settings.ssl_certfile, settings.ssl_keyfile, secret_file("ssl_key_password")]
    return FileValue(
        lambda: tls_context(settings.ssl_cafile, settings.ssl_certfile, settings.ssl_keyfile, present(key_password)),
        [file for file in named if file],
    )
