"""Why the brokers cannot be used: which addresses fail, who gave them, and what to do, as a sentence."""

import asyncio
import ssl
from dataclasses import replace
from typing import Any, Final

from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    IllegalSaslStateError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.admin import SaslHandShakeRequest

from worker.errors import WrongSetting
from worker.kafka.aiokafka_compat.metadata import creating_no_topic
from worker.kafka.broker_probe import Listener, listener_at, tls_sentence
from worker.kafka.connection import UNREACHABLE, Connection
from worker.kafka.oauth import TokenRefused, TokenUnavailable
from worker.runtime.file_value import present
from worker.runtime.tasks import within

PROBE_S: Final = 5.0  # for a connection that only asks what is there
MOST_ADVERTISED: Final = 8  # brokers whose addresses are looked at
_ADVICE: Final = {
    Listener.UNKNOWN: "check its spelling and this machine's DNS",
    Listener.REFUSED: "check host and port, and whether the broker runs",
    Listener.NOWHERE: "check the address, and what is on the way to it",
    Listener.NO_TLS: "check whether security_protocol {protocol} is right for this port",
    Listener.HTTP: "check the port",
    Listener.SILENT: "check the port, and whether the broker is well",
    Listener.CLOSING: "check the port, and whether the broker is well",
}
_REFUSED_LOGIN = (
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    IllegalSaslStateError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)


async def why_unreachable(connection: Connection) -> str:
    """Which addresses fail, who gave them, and what to do, as a sentence; empty where all of them answer.

    Every address is asked as a client asks it, for aiokafka's own start says no more than "unable to bootstrap". Takes
    some seconds. Raises WrongSetting where a broker refuses login or certificate, or wants one, and where whoever issues
    tokens refuses to.
    """
    if fault := await _token_fault(connection):
        return fault
    hosts = [(host, port) for host, port, _ in collect_hosts(connection.bootstrap_servers, randomize=False)]
    answers = await asyncio.gather(*(_fault(connection, *each, "bootstrap_servers names it") for each in hosts))
    faults = list(filter(None, answers))
    for (host, port), fault in zip(hosts, answers, strict=True):
        if not fault:
            advertised = await _advertised(connection, host, port)
            others = [each for each in advertised if each[1:] not in hosts][:MOST_ADVERTISED]
            faults += filter(None, await asyncio.gather(*(_advertised_fault(connection, *each) for each in others)))
            break
    return "; ".join(faults)


async def _token_fault(connection: Connection) -> str:
    """Why there is no token to log in with; empty where there is one, or none is needed. Raises WrongSetting."""
    if connection.token_provider is None:
        return ""
    try:
        await connection.token_provider.token()
    except TokenRefused as refusal:
        raise WrongSetting(str(refusal.args[0])) from None
    except TokenUnavailable as failure:
        return str(failure.args[0])
    return ""


async def _advertised_fault(connection: Connection, node: int, host: str, port: int) -> str:
    giver = (
        f"broker {node} gives it as its advertised listener; if it is wrong, set advertised.listeners of that broker"
    )
    return await _fault(connection, host, port, giver)


async def _fault(connection: Connection, host: str, port: int, giver: str) -> str:
    """What is wrong with one address; nothing where a broker answers."""
    broker = f"{host}:{port}"
    context = present(connection.ssl_context)
    found = await listener_at(host, port, context, min(connection.request_timeout_s, PROBE_S))
    if isinstance(found, ssl.SSLError):
        raise WrongSetting(tls_sentence(broker, found))
    if found is Listener.TLS:
        raise WrongSetting(
            f"the broker {broker} wants TLS, and security_protocol is {connection.security_protocol}; it should be "
            "SSL or SASL_SSL"
        )
    if found is Listener.KAFKA:
        return ""
    advice = _ADVICE.get(found, "check host and port").format(protocol=connection.security_protocol)
    return f"{broker} {found.value} ({giver}); {advice}"


async def _advertised(connection: Connection, host: str, port: int) -> list[tuple[int, str, int]]:
    """Each broker's id, host and port as the broker at this address advertises them; none where it cannot be asked.

    Raises WrongSetting where it refuses login or certificate.
    """
    try:
        answer = await _answer(connection, host, port, creating_no_topic([]))
    except (IllegalSaslStateError, UnsupportedSaslMechanismError) as error:
        await _refuse_other_login(connection, host, port)
        raise WrongSetting(_login_sentence(connection, f"{host}:{port}", error)) from None
    except _REFUSED_LOGIN as error:
        raise WrongSetting(_login_sentence(connection, f"{host}:{port}", error)) from None
    except ssl.SSLError as error:
        raise WrongSetting(tls_sentence(f"{host}:{port}", error)) from None
    except UNREACHABLE:
        if not connection.sasl_mechanism:
            await _refuse_other_login(connection, host, port)
        return []
    return [(node, name, number) for node, name, number, *_ in answer.brokers]


async def _answer(connection: Connection, host: str, port: int, request: Any) -> Any:
    """What the broker at this address answers to a request, by a connection of its own."""
    options = connection.options()
    del options["bootstrap_servers"]
    connected = await within(connection.request_timeout_s, create_conn(host, port, **options))
    try:
        return await within(connection.request_timeout_s, connected.send(request))
    finally:
        connected.close()


async def _refuse_other_login(connection: Connection, host: str, port: int) -> None:
    """Raises WrongSetting where a login is set and the listener takes none, or the other way round, or takes another."""
    bare = connection.security_protocol.removeprefix("SASL_")
    anonymous = replace(connection, security_protocol=bare, sasl_mechanism=None)
    try:
        answer = await _answer(anonymous, host, port, SaslHandShakeRequest("PLAIN"))
    except UNREACHABLE:
        return
    broker = f"{host}:{port}"
    if answer.error_code not in (0, UnsupportedSaslMechanismError.errno):
        if connection.sasl_mechanism:
            raise WrongSetting(
                f"the broker {broker} takes no login at this listener, and security_protocol is "
                f"{connection.security_protocol}; set it to {bare}, or name the port of a listener with SASL"
            )
        return
    offered = ", ".join(answer.enabled_mechanisms)
    if not connection.sasl_mechanism:
        raise WrongSetting(
            f"the broker {broker} wants a login, and security_protocol is {bare}; set it to SASL_{bare}, and "
            f"sasl_mechanism to one that it offers ({offered})"
        )
    if connection.sasl_mechanism not in answer.enabled_mechanisms:
        raise WrongSetting(
            f"the broker {broker} does not offer sasl_mechanism {connection.sasl_mechanism}; it offers {offered}"
        )


def _login_sentence(connection: Connection, broker: str, error: BaseException) -> str:
    if connection.token_provider:
        return connection.token_provider.refusal(broker, str(error.args[0] if error.args else type(error).__name__))
    return (
        f"the broker {broker} refuses the login of sasl_username {connection.sasl_username!r} by "
        f"{connection.sasl_mechanism} ({type(error).__name__}); check the user, the password and the mechanism"
    )
