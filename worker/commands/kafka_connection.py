"""How commands connect to Kafka, by the settings that they share."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from worker.kafka.connection import Connection, tls_context
from worker.settings.oauth import BY_TOKEN
from worker.settings.shared import ConnectionSettings
from worker.settings.values import pairs, revealed, split_names

if TYPE_CHECKING:
    from worker.kafka.oauth import TokenProvider, TokenSource


def kafka_connection(settings: ConnectionSettings, tell: Callable[[str], None] = lambda _: None) -> Connection:
    """Reads certificates; connects to nothing. Raises WrongSetting.

    ``tell`` is told why nobody can log in where logins are by token, and an empty text once they can.
    """
    context = None
    if settings.security_protocol.endswith("SSL"):
        password = revealed(settings.ssl_key_password)
        context = tls_context(settings.ssl_cafile, settings.ssl_certfile, settings.ssl_keyfile, password)
    by_token = settings.sasl_mechanism in BY_TOKEN
    return Connection(
        bootstrap_servers=split_names(settings.bootstrap_servers),
        client_id=settings.client_id,
        request_timeout_ms=settings.request_timeout_ms,
        security_protocol=settings.security_protocol,
        sasl_mechanism="OAUTHBEARER" if by_token else settings.sasl_mechanism,
        sasl_username=settings.sasl_username,
        sasl_password=revealed(settings.sasl_password),
        ssl_context=context,
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
    return ClientCredentials(
        settings.oauth_token_url or "",
        settings.oauth_client_id or "",
        lambda: revealed(settings.oauth_client_secret) or "",
        scope=settings.oauth_scope,
        audience=settings.oauth_audience,
        ca_file=settings.oauth_ca_file,
    )
