"""How clients connect to the brokers, and say that no broker can be used."""

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiokafka.errors import KafkaError
from aiokafka.helpers import create_ssl_context

from worker.errors import WrongSetting
from worker.runtime.file_value import FileValue

if TYPE_CHECKING:
    from worker.kafka.oauth import TokenProvider

UNREACHABLE: Final = (KafkaError, OSError, asyncio.TimeoutError)


@dataclass(frozen=True)
class Connection:
    """How every client of this process connects. ``request_timeout_ms`` is the deadline of one request.

    A FileValue is asked for its value by each new connection.
    """

    bootstrap_servers: tuple[str, ...]
    client_id: str = "sentiment-worker"
    request_timeout_ms: int = 30_000
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str | None = None
    sasl_username: str | None = None
    sasl_password: str | FileValue[str] | None = field(default=None, repr=False)
    ssl_context: ssl.SSLContext | FileValue[ssl.SSLContext] | None = field(default=None, repr=False)
    token_provider: "TokenProvider | None" = field(default=None, repr=False)  # with sasl_mechanism OAUTHBEARER

    @property
    def request_timeout_s(self) -> float:
        return self.request_timeout_ms / 1000

    def options(self) -> dict[str, Any]:
        """Keyword arguments for aiokafka's clients."""
        options: dict[str, Any] = {
            "bootstrap_servers": list(self.bootstrap_servers),
            "client_id": self.client_id,
            "request_timeout_ms": self.request_timeout_ms,
            "security_protocol": self.security_protocol,
            "ssl_context": self.ssl_context,
        }
        if self.sasl_mechanism:
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self.sasl_password,
                "sasl_oauth_token_provider": self.token_provider,
            }
        return options


def tls_context(
    cafile: Path | None, certfile: Path | None, keyfile: Path | None, password: str | None
) -> ssl.SSLContext:
    """A TLS context that checks the brokers' certificates and names. Raises WrongSetting."""
    certificates = "it should be a PEM file of certificates (-----BEGIN CERTIFICATE-----)"
    with _refusing("ssl_cafile", cafile, certificates):
        context: ssl.SSLContext = create_ssl_context(cafile=cafile)
    if certfile:
        with _refusing("ssl_certfile", certfile, certificates):
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certfile)
        key = "it should be a PEM file with the key of ssl_certfile, and WORKER_SSL_KEY_PASSWORD that key's password, if any"
        with _refusing("ssl_keyfile" if keyfile else "ssl_certfile", keyfile or certfile, key):
            context.load_cert_chain(certfile, keyfile, password or "")  # with None OpenSSL would ask on the terminal
    return context


@contextlib.contextmanager
def _refusing(name: str, file: Path | None, wanted: str) -> Iterator[None]:
    """Raises WrongSetting where a TLS file cannot be used: OpenSSL's messages name neither the file nor what is wrong."""
    try:
        yield
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        unreadable = not isinstance(error, ssl.SSLError) and isinstance(error, OSError)
        why = f"cannot be read ({error.strerror})" if unreadable else "cannot be used"  # type: ignore[union-attr]
        raise WrongSetting(f"{name} {file} {why}: {wanted}") from None


def error_name(error: BaseException) -> str:
    """The class of an error; that of its cause where aiokafka has made a KafkaError of it, which says nothing."""
    known = error.__cause__ if type(error) is KafkaError else None
    return type(known or error).__name__


def unreachable(connection: Connection, error: BaseException, why: str = "") -> str:
    """A sentence for the log: no broker can be used at the moment. ``why`` is what ``why_unreachable`` has found."""
    if why:
        return f"waiting for Kafka: {why}"
    return f"waiting for Kafka at {','.join(connection.bootstrap_servers)} ({error_name(error)})"
