"""What answers at an address that should be a broker's: with raw requests, because aiokafka does not tell."""

import asyncio
import socket
import ssl
from enum import Enum
from typing import Any, Final

from worker.runtime.tasks import within

ANSWER_S: Final = 2.0  # for the first answer, and for what a broker has against the client's certificate
CORRELATION: Final = bytes.fromhex("00737765")
HELLO: Final = bytes.fromhex("0000000e 0012 0000".replace(" ", "")) + CORRELATION + bytes.fromhex("0004 74657374")
"""An ApiVersions request."""
HTTP_REQUEST: Final = b"GET / HTTP/1.0\r\n\r\n"
TLS_ALERT: Final = b"\x15\x03"


class Listener(Enum):
    """What answers at an address; the value ends a sentence that begins with the address."""

    KAFKA = "speaks Kafka"
    TLS = "wants TLS"
    NO_TLS = "does not speak TLS"
    HTTP = "speaks HTTP, not Kafka"
    SILENT = "accepts connections and does not answer: it hangs, is still starting, or is no broker"
    CLOSING = "accepts connections and ends them at once: it is still starting, or is no broker"
    OTHER = "answers in another protocol than Kafka's"
    UNKNOWN = "has a host name that this machine cannot resolve"
    REFUSED = "refuses connections: nothing listens there"
    NOWHERE = "cannot be reached: no route leads there, or a firewall drops what is sent"


Connected = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def listener_at(
    host: str, port: int, context: ssl.SSLContext | None, timeout_s: float
) -> Listener | ssl.SSLError:
    """What is at an address, by TLS where there is a ``context``; an SSLError where TLS with it fails.

    Takes ``timeout_s`` for each connection and a few seconds for answers. Raises nothing.
    """
    try:
        answer = await _answer(host, port, context, timeout_s, HELLO)
        if context and answer == b"":
            raise ConnectionResetError
    except ssl.SSLEOFError:
        return Listener.NO_TLS
    except ssl.SSLError as error:
        if error.reason not in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            return error
        return await _without_kafka(host, port, None, timeout_s, Listener.NO_TLS)
    except socket.gaierror:
        return Listener.UNKNOWN
    except ConnectionRefusedError:
        return Listener.REFUSED
    except ConnectionResetError:
        return await _tls_refusal(host, port, context, timeout_s) if context else Listener.CLOSING
    except TimeoutError:
        plain = await listener_at(host, port, None, timeout_s) if context else Listener.NOWHERE
        return Listener.NO_TLS if plain is Listener.KAFKA else plain
    except OSError:
        return Listener.NOWHERE
    if answer is not None and answer[4 : 4 + len(CORRELATION)] == CORRELATION:
        return Listener.KAFKA
    if answer and answer.startswith(TLS_ALERT):
        return Listener.TLS
    otherwise = Listener.SILENT if answer is None else Listener.OTHER if answer else Listener.CLOSING
    return await _without_kafka(host, port, context, timeout_s, otherwise)


async def _tls_refusal(host: str, port: int, context: ssl.SSLContext, timeout_s: float) -> Listener | ssl.SSLError:
    """Why a broker ends TLS. Sends no request, because one that is not read any more can lose the alert that says why."""
    try:
        await _answer(host, port, context, timeout_s, b"")
    except (ssl.SSLEOFError, TimeoutError):
        return Listener.NO_TLS
    except ssl.SSLError as error:
        return error
    except OSError:
        return Listener.NO_TLS
    return Listener.CLOSING


async def _without_kafka(
    host: str, port: int, context: ssl.SSLContext | None, timeout_s: float, otherwise: Listener
) -> Listener:
    try:
        answer = await _answer(host, port, context, timeout_s, HTTP_REQUEST)
    except (OSError, TimeoutError):
        return otherwise
    return Listener.HTTP if answer and answer.startswith(b"HTTP/") else otherwise


async def _answer(
    host: str, port: int, context: ssl.SSLContext | None, timeout_s: float, request: bytes
) -> bytes | None:
    """The first bytes of the answer; empty where the connection is closed instead, None where nothing comes in time.

    Raises OSError, and TimeoutError where no connection can be made.
    """
    reader, writer = await within(timeout_s, _connected(host, port, context))
    try:
        writer.write(request)
        return await within(min(ANSWER_S, timeout_s), reader.read(512))
    except TimeoutError:
        return None
    finally:
        writer.close()


async def _connected(host: str, port: int, context: ssl.SSLContext | None) -> Connected:
    """Connects to the first of the host's addresses that works. Raises what the last one has raised."""
    addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    named: dict[str, Any] = {"ssl": context, "server_hostname": host} if context else {}
    for position, (*_, address) in enumerate(addresses, 1):
        try:
            return await asyncio.open_connection(str(address[0]), port, **named)
        except ssl.SSLError:
            raise
        except OSError:
            if position == len(addresses):
                raise
    raise socket.gaierror


def tls_sentence(broker: str, error: ssl.SSLError) -> str:
    """What is wrong with TLS at a broker, and what to check, as a sentence."""
    verdict = getattr(error, "verify_message", None)
    _, is_alert, alert = (error.reason or "").partition("ALERT_")
    said = alert.replace("_", " ").lower()
    if is_alert and ("certificate" in said or said == "unknown ca"):
        return (
            f"the broker {broker} refuses this client's certificate, or that it has none ({said}); check ssl_certfile and "
            "ssl_keyfile, and that the broker trusts who issued them"
        )
    reason = verdict.rstrip(".") if verdict else said or error.reason or "TLS fails"
    return (
        f"the broker {broker} cannot be talked to by TLS: {reason}; check security_protocol, ssl_cafile and the broker's "
        "name"
    )
