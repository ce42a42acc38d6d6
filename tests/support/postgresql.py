"""A real PostgreSQL for the tests: this machine's, with a cluster of its own that keeps its data over a stop."""

import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.support.broker import free_port
from tests.support.component import ServiceProcess, UnavailableError
from tests.support.waiting import wait_for

USER = DATABASE = "sentiment"
SECONDS = 300


class PostgreSQL:
    """One server on 127.0.0.1, where everybody may do everything. UnavailableError where it is not installed."""

    def __init__(self) -> None:
        self._programs = {name: program(name) for name in ("initdb", "postgres", "psql")}
        self.port = free_port()
        self._home = Path(tempfile.mkdtemp(prefix="postgresql-for-tests-"))
        self._user = None
        if os.geteuid() == 0:  # PostgreSQL refuses to be run by root
            self._user = unprivileged_user()
            shutil.chown(self._home, self._user)
        self._call("initdb", "-D", self._data, "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
        self._process: ServiceProcess | None = None

    @property
    def _data(self) -> Path:
        return self._home / "data"

    def start(self) -> "PostgreSQL":
        """Blocks until it takes queries; the database is made the first time."""
        options = ("-D", self._data, "-p", self.port, "-h", "127.0.0.1", "-k", self._home)
        self._process = ServiceProcess([self._programs["postgres"], *options], self._home / "log", user=self._user)
        wait_for(lambda: self._alive() and self._answers(), "PostgreSQL to answer", 60)
        if not self.rows(f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'", "postgres"):
            self.run(f"CREATE DATABASE {DATABASE}", "postgres")
        return self

    def stop(self) -> None:
        """A fast shutdown: open connections are cut."""
        if self._process:
            self._process.stop(signal.SIGINT)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._home, ignore_errors=True)

    def run(self, sql: str, database: str = DATABASE, user: str = USER) -> str:
        """What psql prints, without headings; AssertionError with its message where the server refuses."""
        done = self._psql(sql, database, user)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def rows(self, query: str, database: str = DATABASE) -> list[dict[str, Any]]:
        """The rows of a query, times as ISO 8601."""
        found: list[dict[str, Any]] = json.loads(
            self.run(f"SELECT coalesce(json_agg(found), '[]') FROM ({query}) AS found", database)
        )
        return found

    def _answers(self) -> bool:
        return self._psql("SELECT 1", "postgres").returncode == 0

    def _alive(self) -> bool:
        return self._process is not None and self._process.alive()

    def _psql(self, sql: str, database: str, user: str = USER) -> "subprocess.CompletedProcess[str]":
        address = ("-h", "127.0.0.1", "-p", str(self.port), "-U", user, "-d", database)
        options = ("-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1")
        return subprocess.run(
            [self._programs["psql"], *address, *options],
            input=sql, capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip

    def _call(self, name: str, *arguments: object) -> None:
        command = [self._programs[name], *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self._home, user=self._user, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def program(name: str) -> str:
    """Where a program of PostgreSQL is: on the path, or where Debian puts it, the newest first. Raises UnavailableError."""
    debian = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]), reverse=True
    )
    found = shutil.which(name) or next(map(str, debian), None)
    if found is None:
        raise UnavailableError(f"{name} is not installed; Debian's package postgresql has it")
    return found


def unprivileged_user() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"
