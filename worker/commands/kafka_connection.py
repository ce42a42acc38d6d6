"""How commands connect to Kafka, by the settings that they share."""

import ssl

from worker.commands.secret_values import secret_value
from worker.kafka.connection import Connection, tls_context
from worker.runtime.file_value import FileValue, present
from worker.settings.shared import ConnectionSettings
from worker.settings.sources import secret_file
from worker.settings.values import split_names


def kafka_connection(settings: ConnectionSettings) -> Connection:
    """Reads certificates; connects to nothing. Raises WrongSetting."""
    return Connection(
        bootstrap_servers=split_names(settings.bootstrap_servers),
        client_id=settings.client_id,
        request_timeout_ms=settings.request_timeout_ms,
        security_protocol=settings.security_protocol,
        sasl_mechanism=settings.sasl_mechanism,
        sasl_username=settings.sasl_username,
        sasl_password=secret_value(settings, "sasl_password"),
        ssl_context=_tls(settings) if settings.security_protocol.endswith("SSL") else None,
    )


def _tls(settings: ConnectionSettings) -> FileValue[ssl.SSLContext]:
    key_password = secret_value(settings, "ssl_key_password")
    named = [settings.ssl_cafile, settings.ssl_certfile, settings.ssl_keyfile, secret_file("ssl_key_password")]
    return FileValue(
        lambda: tls_context(settings.ssl_cafile, settings.ssl_certfile, settings.ssl_keyfile, present(key_password)),
        [file for file in named if file],
    )
