"""How commands connect to Kafka, by the settings that they share."""

from worker.kafka.connection import Connection, tls_context
from worker.settings.shared import ConnectionSettings
from worker.settings.values import revealed, split_names


def kafka_connection(settings: ConnectionSettings) -> Connection:
    """Reads certificates; connects to nothing. Raises WrongSetting."""
    context = None
    if settings.security_protocol.endswith("SSL"):
        password = revealed(settings.ssl_key_password)
        context = tls_context(settings.ssl_cafile, settings.ssl_certfile, settings.ssl_keyfile, password)
    return Connection(
        bootstrap_servers=split_names(settings.bootstrap_servers),
        client_id=settings.client_id,
        request_timeout_ms=settings.request_timeout_ms,
        security_protocol=settings.security_protocol,
        sasl_mechanism=settings.sasl_mechanism,
        sasl_username=settings.sasl_username,
        sasl_password=revealed(settings.sasl_password),
        ssl_context=context,
    )
