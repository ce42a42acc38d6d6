"""A Kafka that demands credentials, certificates and permissions, and an authority that makes the certificates."""

import datetime
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from confluent_kafka import KafkaException
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.support.broker import Broker, Extras, free_port
from tests.support.waiting import wait_for

HOST: Final = "127.0.0.1"
USER: Final = "worker-of-tests"
PASSWORD: Final = "correct-horse-battery-staple"
CERTIFIED: Final = "certified"  # the common name in the client's certificate
SCRAM: Final = {
    "SCRAM-SHA-256": ScramMechanism.SCRAM_SHA_256,
    "SCRAM-SHA-512": ScramMechanism.SCRAM_SHA_512,
}
LISTENERS: Final = {
    "LOGIN": "SASL_SSL",
    "OPENLOGIN": "SASL_PLAINTEXT",
    "ONLYPLAIN": "SASL_PLAINTEXT",
    "TLS": "SSL",
    "MUTUAL": "SSL",
    "MISNAMED": "SSL",
    "EXPIRED": "SSL",
}


class Authority:
    """Issues certificates, as PEM; its own is in `cafile`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        self._certificate = self._signed(self._name, self._key, [], days=1, is_authority=True)
        self.cafile = folder / f"{name}.pem"
        self.cafile.write_bytes(self._certificate.public_bytes(Encoding.PEM))

    def issue(self, name: str, hosts: Iterable[str] = (), *, days: int = 1) -> tuple[str, str]:
        """Certificate and key; with negative `days` it ended so long ago."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(_named(name), key, hosts, days=days)
        return certificate.public_bytes(Encoding.PEM).decode(), _pem(key)

    def issue_files(self, name: str, *, days: int = 1, password: str | None = None) -> tuple[Path, Path]:
        """The same, as files."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(_named(name), key, (), days=days)
        certfile, keyfile = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        certfile.write_bytes(certificate.public_bytes(Encoding.PEM))
        keyfile.write_text(_pem(key, password))
        keyfile.chmod(0o600)
        return certfile, keyfile

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        hosts: Iterable[str],
        *,
        days: int,
        is_authority: bool = False,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        end = now + datetime.timedelta(days=days)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, end) - datetime.timedelta(days=1))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            # From 3.13 on Python takes no issued certificate without this, nor an authority without the next two.
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if is_authority:
            signing = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
            builder = builder.add_extension(signing, critical=True).add_extension(identifier, critical=False)
        names = [_general_name(host) for host in hosts]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey, password: str | None = None) -> str:
    encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption).decode()


@dataclass(frozen=True)
class Security:
    """What the broker is started with."""

    authority: Authority
    extras: Extras

    @classmethod
    def made(cls, folder: Path) -> "Security":
        authority = Authority(folder, "authority")
        properties = {
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",  # the tests' own client, on the plain listener
            "sasl.enabled.mechanisms": ",".join(["PLAIN", *SCRAM]),
            **_login("login"),
            **_login("openlogin"),
            **_login("onlyplain"),
            "listener.name.onlyplain.sasl.enabled.mechanisms": "PLAIN",
            **_tls(authority, "login", authority.issue("broker", [HOST])),
            **_tls(authority, "tls", authority.issue("broker", [HOST])),
            **_tls(authority, "mutual", authority.issue("broker", [HOST])),
            **_tls(authority, "misnamed", authority.issue("broker", ["another.example"])),
            **_tls(authority, "expired", authority.issue("broker", [HOST], days=-1)),
            "listener.name.mutual.ssl.client.auth": "required",
            "listener.name.mutual.ssl.principal.mapping.rules": "RULE:^CN=(.*?)$/$1/,DEFAULT",
        }
        listeners = {name: (protocol, free_port()) for name, protocol in LISTENERS.items()}
        return cls(authority, Extras(listeners=listeners, properties=properties))


def _login(listener: str) -> dict[str, str]:
    scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    plain = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'
    modules = {"plain": plain, **{mechanism.lower(): scram for mechanism in SCRAM}}
    return {f"listener.name.{listener}.{name}.sasl.jaas.config": module for name, module in modules.items()}


def _tls(authority: Authority, listener: str, issued: tuple[str, str]) -> dict[str, str]:
    certificate, key = issued
    pems = {
        "keystore.certificate.chain": certificate,
        "keystore.key": key,
        "truststore.certificates": authority.cafile.read_text(),
    }
    prefix = f"listener.name.{listener}.ssl"
    kinds = {f"{prefix}.keystore.type": "PEM", f"{prefix}.truststore.type": "PEM"}
    return kinds | {f"{prefix}.{name}": pem.replace("\n", "\\n") for name, pem in pems.items()}


class SecureKafka:
    """The running broker: where its listeners are, and who may do what.

    What is changed holds when a method returns: the controller answers a moment before the broker knows of it.
    """

    def __init__(self, broker: Broker, security: Security) -> None:
        self.bootstrap = broker.bootstrap
        self.authority = security.authority
        self._host = broker.bootstrap.rpartition(":")[0]
        self._listeners = security.extras.listeners
        self._admin = AdminClient({"bootstrap.servers": broker.bootstrap, "log_level": 0})
        self.set_password(PASSWORD)

    def set_password(self, password: str) -> None:
        """Of USER, for logins by SCRAM."""
        for mechanism in SCRAM.values():
            secret = UserScramCredentialUpsertion(USER, ScramCredentialInfo(mechanism, 4096), password.encode())
            self._admin.alter_user_scram_credentials([secret])[USER].result(30)
        for mechanism in SCRAM:
            wait_for(lambda mechanism=mechanism: self._lets_in(mechanism, password), f"the password by {mechanism}")  # type: ignore[misc]

    def _lets_in(self, mechanism: str, password: str) -> bool:
        login = {"sasl.mechanism": mechanism, "sasl.username": USER, "sasl.password": password}
        address = {"bootstrap.servers": self.address("OPENLOGIN"), "security.protocol": "SASL_PLAINTEXT"}
        try:
            AdminClient({**address, **login, "log_level": 0}).list_topics(timeout=5)
        except KafkaException:
            return False
        return True

    def address(self, listener: str) -> str:
        """Of a listener by its name; of the plain one without."""
        if not listener:
            return self.bootstrap
        return f"{self._host}:{self._listeners[listener][1]}"

    def allow(self, user: str, kind: ResourceType, name: str, *operations: AclOperation) -> None:
        bindings = [self._binding(user, kind, name, operation) for operation in operations]
        for done in self._admin.create_acls(bindings).values():
            done.result(30)
        wait_for(lambda: set(bindings) <= set(self._permissions(user)), f"what {user} may do now")

    def forbid_all(self, user: str) -> None:
        """Takes every permission away again."""
        for done in self._admin.delete_acls([self._everything(user)]).values():
            done.result(30)
        wait_for(lambda: not self._permissions(user), f"{user} to have no permission")

    def _permissions(self, user: str) -> list[AclBinding]:
        found: list[AclBinding] = self._admin.describe_acls(self._everything(user)).result(30)
        return found

    @staticmethod
    def _everything(user: str) -> AclBindingFilter:
        kinds = ResourceType.ANY, None, ResourcePatternType.ANY
        return AclBindingFilter(*kinds, f"User:{user}", None, AclOperation.ANY, AclPermissionType.ANY)

    @staticmethod
    def _binding(user: str, kind: ResourceType, name: str, operation: AclOperation) -> AclBinding:
        pattern, allow = ResourcePatternType.LITERAL, AclPermissionType.ALLOW
        return AclBinding(kind, name, pattern, f"User:{user}", "*", operation, allow)
