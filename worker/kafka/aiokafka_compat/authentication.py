"""Logging in by a token: a refusal that aiokafka takes for a login. Upstream would have to read the broker's answer."""

from typing import Any

import orjson
from aiokafka.conn import AIOKafkaConnection, OAuthAuthenticator
from aiokafka.errors import SaslAuthenticationFailed

_step = OAuthAuthenticator.step
_handshake = AIOKafkaConnection._do_sasl_handshake


async def step(authenticator: OAuthAuthenticator, payload: bytes | None) -> tuple[bytes, bool] | None:
    """The next message to the broker, or None after a login. Raises SaslAuthenticationFailed where it refuses the token.

    It does so by an answer that is not empty, ``{"status":"invalid_token"}`` (RFC 7628, section 3.2.2), and waits for one
    more message before it fails. aiokafka takes any answer for a login, and what the client then asks for fails in other
    ways.
    """
    if authenticator._token_sent and payload:
        raise SaslAuthenticationFailed(_status(payload))
    message: tuple[bytes, bool] | None = await _step(authenticator, payload)
    return message


def _status(payload: bytes) -> str:
    try:
        return str(orjson.loads(payload)["status"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "refused"


async def handshake(connection: AIOKafkaConnection) -> None:
    """Logs in. Tells the provider of the token where the broker refuses it, so that the next one is fetched."""
    try:
        await _handshake(connection)
    except SaslAuthenticationFailed:
        provider: Any = connection._sasl_oauth_token_provider
        if provider is not None:
            provider.reject()
        raise


OAuthAuthenticator.step = step
AIOKafkaConnection._do_sasl_handshake = handshake
