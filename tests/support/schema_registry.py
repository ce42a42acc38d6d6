"""A real schema registry with Confluent's interface: Apicurio Registry, on this machine's Java."""

import json
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.support.broker import free_port
from tests.support.component import ServiceProcess, UnavailableError
from tests.support.maven import unpacked
from tests.support.waiting import wait_for

ARTEFACT: Final = "io.apicurio:apicurio-registry-app:3.3.3:tar.gz:all"
JAVA: Final = 21  # or later
HEAP: Final = ("-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
START_SECONDS: Final = 120


class Registry:
    """A running registry. `url` is the address that the paths of the interface begin at.

    With `users`, names with their passwords, each request has to log in as one of them. Its schemas are in memory.
    """

    def __init__(self, folder: Path, users: Mapping[str, str] | None = None) -> None:
        self.port, management = free_port(), free_port()
        self.path = "/apis/ccompat/v7"
        self.url = f"http://127.0.0.1:{self.port}{self.path}"
        self._health = f"http://127.0.0.1:{management}/health/ready"
        options = {
            "quarkus.http.host": "127.0.0.1", "quarkus.http.port": self.port,
            "quarkus.management.host": "127.0.0.1", "quarkus.management.port": management, **_logins(users or {}),
        }  # fmt: skip
        (jar,) = unpacked(ARTEFACT).rglob("quarkus-run.jar")
        flags = [f"-D{name}={value}" for name, value in options.items()]
        self._process = ServiceProcess([java(JAVA), *HEAP, *flags, "-jar", jar], folder / "registry.log")

    def wait_until_up(self) -> None:
        wait_for(lambda: self._process.alive() and self._is_up(), "the schema registry to start", START_SECONDS)

    def _is_up(self) -> bool:
        try:
            return bool(urllib.request.urlopen(self._health, timeout=5).status == 200)
        except OSError:
            return False

    def register(self, subject: str, schema: object, type: str = "AVRO", **fields: Any) -> int:
        """Registers a schema, and returns its id."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        body = json.dumps({"schema": text, "schemaType": type, **fields}).encode()
        headers = {"Content-Type": "application/vnd.schemaregistry.v1+json"}
        request = urllib.request.Request(f"{self.url}/subjects/{subject}/versions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(json.load(answer)["id"])
        except urllib.error.HTTPError as error:
            raise AssertionError(f"the registry answers with {error.code}: {error.read()!r}") from None

    def close(self) -> None:
        self._process.stop()


def _logins(users: Mapping[str, str]) -> dict[str, object]:
    if not users:
        return {}
    embedded = "quarkus.security.users.embedded"
    return {
        "quarkus.http.auth.basic": "true",
        f"{embedded}.plain-text": "true",
        **{f"{embedded}.users.{name}": password for name, password in users.items()},
        **{f"{embedded}.roles.{name}": "sr-admin" for name in users},
        "quarkus.http.auth.permission.all.paths": "/apis/*",
        "quarkus.http.auth.permission.all.policy": "authenticated",
    }


def java(least: int) -> Path:
    """The program of a Java of this version or a later one. Raises UnavailableError."""
    home, found = os.environ.get("JAVA_HOME"), shutil.which("java")
    homes = [Path(home)] if home else []
    homes += [Path(found).resolve().parents[1]] if found else []
    for each in [*homes, *sorted(Path("/usr/lib/jvm").glob("*"))]:
        release = each / "release"
        version = re.search(r'JAVA_VERSION="(\d+)', release.read_text()) if release.is_file() else None
        if version and int(version[1]) >= least:
            return each / "bin" / "java"
    raise UnavailableError(f"there is no Java {least} or later, in JAVA_HOME, on the path or in /usr/lib/jvm")


@contextmanager
def running_registry(users: Mapping[str, str] | None = None) -> Iterator[Registry]:
    """Raises UnavailableError where it cannot be had."""
    with tempfile.TemporaryDirectory(prefix="registry-for-tests-") as folder:
        registry = Registry(Path(folder), users)
        try:
            registry.wait_until_up()
            yield registry
        finally:
            registry.close()
