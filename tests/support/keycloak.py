"""Keycloak, an OIDC provider, on this machine's Java, and a Kafka with a listener that takes its tokens."""

import json
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.broker import Extras, JavaBroker, free_port, started
from tests.support.component import ServiceProcess, UnavailableError
from tests.support.maven import kept, unpacked
from tests.support.waiting import wait_for

VERSION: Final = "26.7.3"
REALM: Final = "kafka"
AUDIENCE: Final = "kafka"  # of the tokens that the broker takes
ADMIN: Final = {"KC_BOOTSTRAP_ADMIN_USERNAME": "admin", "KC_BOOTSTRAP_ADMIN_PASSWORD": "admin"}
HEAP: Final = "-Xms64m -Xmx384m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:MaxMetaspaceSize=256m"
START_SECONDS: Final = 300
SECRET: Final = "secret-of-the-client-0123456789"


class Keycloak:
    """A running server, and the one realm in it, whose clients log in by id and SECRET."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("java") is None:
            raise UnavailableError("there is no java")
        self.port, management = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.issuer = f"{self.url}/realms/{REALM}"
        self.token_path = f"/realms/{REALM}/protocol/openid-connect/token"
        self.keys_url = f"{self.issuer}/protocol/openid-connect/certs"
        self._health = f"http://127.0.0.1:{management}/health/ready"
        options = {
            "http-enabled": "true", "http-host": "127.0.0.1", "http-port": self.port, "http-management-port": management,
            "hostname": self.url, "hostname-strict": "false", "cache": "local",
        }  # fmt: skip
        flags = [f"--{name}={value}" for name, value in options.items()]
        command = [built() / "bin" / "kc.sh", "start", "--optimized", *flags]
        self._process = ServiceProcess(command, folder / "keycloak.log", {**ADMIN, "JAVA_OPTS": HEAP})

    def wait_until_up(self) -> None:
        wait_for(lambda: self._process.alive() and self._is_up(), "Keycloak to start", START_SECONDS, every=0.5)

    def _is_up(self) -> bool:
        try:
            return bool(urllib.request.urlopen(self._health, timeout=5).status == 200)
        except OSError:
            return False

    def close(self) -> None:
        self._process.stop()

    def create_realm(self, lifetime_s: int, clients: dict[str, str]) -> None:
        """A realm whose tokens last so long, and its clients, each with the audience that its tokens have."""
        self._ask(
            "POST",
            "/admin/realms",
            {
                "realm": REALM,
                "enabled": True,
                "sslRequired": "none",
                "accessTokenLifespan": lifetime_s,
                "clients": [_client(name, audience) for name, audience in clients.items()],
            },
        )

    def enable(self, client_id: str, enabled: bool) -> None:
        """A client that is not enabled gets no more tokens; those that it has stay good until they end."""
        path = f"/admin/realms/{REALM}/clients"
        (client,) = self._ask("GET", f"{path}?clientId={client_id}")
        self._ask("PUT", f"{path}/{client['id']}", {"clientId": client_id, "enabled": enabled})

    def token(self, client_id: str) -> str:
        """A token as that client gets it."""
        form = {"grant_type": "client_credentials", "client_id": client_id, "client_secret": SECRET}
        return str(_answer(self.url + self.token_path, urllib.parse.urlencode(form).encode())["access_token"])

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        form = {"grant_type": "password", "client_id": "admin-cli", "username": "admin", "password": "admin"}
        login = f"{self.url}/realms/master/protocol/openid-connect/token"
        token = _answer(login, urllib.parse.urlencode(form).encode())["access_token"]
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        content = None if body is None else json.dumps(body).encode()
        return _answer(self.url + path, content, method=method, headers=headers)


def _answer(url: str, content: bytes | None, **request: Any) -> Any:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content, **request), timeout=30) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"Keycloak answers {url} with {error.code}: {error.read()!r}") from None
    return json.loads(body) if body else None


def _client(name: str, audience: str) -> dict[str, object]:
    mapper = {
        "name": "audience",
        "protocol": "openid-connect",
        "protocolMapper": "oidc-audience-mapper",
        "config": {"included.custom.audience": audience, "access.token.claim": "true"},
    }
    return {
        "clientId": name,
        "secret": SECRET,
        "publicClient": False,
        "serviceAccountsEnabled": True,
        "standardFlowEnabled": False,
        "protocolMappers": [mapper],
    }


def built() -> Path:
    """The server's folder, in the user's cache; fetched and built there once."""

    def build(folder: Path) -> None:
        (unpacked_folder,) = unpacked(f"org.keycloak:keycloak-quarkus-dist:{VERSION}:tar.gz").iterdir()
        shutil.copytree(unpacked_folder, folder)
        command = [folder / "bin" / "kc.sh", "build", "--db=dev-mem", "--health-enabled=true"]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode:
            raise UnavailableError(f"Keycloak cannot be built: {(done.stdout + done.stderr)[-500:]}")

    return kept(f"keycloak-{VERSION}", build)


@contextmanager
def running_keycloak() -> Iterator[Keycloak]:
    """Raises UnavailableError where it cannot be had."""
    with tempfile.TemporaryDirectory(prefix="keycloak-for-tests-") as folder:
        keycloak = Keycloak(Path(folder))
        try:
            keycloak.wait_until_up()
            yield keycloak
        finally:
            keycloak.close()


class OAuthBroker(JavaBroker):
    """A broker that also listens at `entrance`, for tokens of one audience, and ends a connection after `session_s`.

    At its plain listener the tests' own client may do everything. Raises UnavailableError where there is no Java.
    """

    def __init__(self, keycloak: Keycloak, session_s: float) -> None:
        port = free_port()
        self.entrance = f"127.0.0.1:{port}"
        self._allowed = f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={keycloak.keys_url}"
        package = "org.apache.kafka.common.security.oauthbearer"
        login = {
            "sasl.enabled.mechanisms": "OAUTHBEARER",
            "oauthbearer.sasl.jaas.config": f"{package}.OAuthBearerLoginModule required;",
            "oauthbearer.sasl.server.callback.handler.class": f"{package}.OAuthBearerValidatorCallbackHandler",
            "oauthbearer.connections.max.reauth.ms": f"{session_s * 1000:.0f}",
            "sasl.oauthbearer.jwks.endpoint.url": keycloak.keys_url,
            "sasl.oauthbearer.expected.audience": AUDIENCE,
            "sasl.oauthbearer.expected.issuer": keycloak.issuer,
        }
        properties = {f"listener.name.oauth.{name}": value for name, value in login.items()}
        super().__init__(Extras(listeners={"OAUTH": ("SASL_PLAINTEXT", port)}, properties=properties))

    def _launch(self) -> None:
        """The broker fetches keys from addresses alone that are allowed to its virtual machine."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JAVA_TOOL_OPTIONS", f"{os.environ.get('JAVA_TOOL_OPTIONS', '')} {self._allowed}".strip())
            super()._launch()


@contextmanager
def running_broker(keycloak: Keycloak, session_s: float) -> Iterator[OAuthBroker]:
    broker = OAuthBroker(keycloak, session_s)
    started(broker)
    try:
        yield broker
    finally:
        broker.close()
