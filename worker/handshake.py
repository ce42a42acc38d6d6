"""Why a broker ends a connection before it has begun: asked again with as little as it takes, where aiokafka cannot tell."""

import asyncio
import ssl
from typing import Final

from worker.tasks import within

VERDICT_S: Final = (
    2.0  # for what a broker says right after the handshake: with TLS 1.3 it judges the client's certificate then
)
HELLO: Final = bytes.fromhex("0000000e 0012 0000 00000001 0004 74657374".replace(" ", ""))  # an ApiVersions request
TLS_ALERT: Final = b"\x15\x03"


async def tls_failure(
    host: str, port: int, context: ssl.SSLContext, timeout_s: float
) -> ssl.SSLError | ConnectionResetError | None:
    """What a broker has against this client's TLS, or the client against the broker's; None where neither says.

    SSLEOFError or ConnectionResetError: it ends the connection without a word, as one does that knows no TLS.
    """
    writer = None
    try:
        reader, writer = await within(timeout_s, asyncio.open_connection(host, port, ssl=context))
        await within(VERDICT_S, reader.read(1))
    except (ssl.SSLError, ConnectionResetError) as error:
        return error
    except (OSError, TimeoutError):
        return None
    finally:
        if writer:
            writer.close()
    return None


async def wants_tls(host: str, port: int, timeout_s: float) -> bool:
    """Whether a broker answers a plain request with an alert of TLS."""
    writer = None
    try:
        reader, writer = await within(timeout_s, asyncio.open_connection(host, port))
        writer.write(HELLO)
        return await within(VERDICT_S, reader.readexactly(len(TLS_ALERT))) == TLS_ALERT
    except (OSError, EOFError, TimeoutError):
        return False
    finally:
        if writer:
            writer.close()


def tls_sentence(broker: str, error: ssl.SSLError) -> str:
    """What is wrong, and what to check."""
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
