"""Trace contexts in headers, and tracing that is switched off or not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.process import environment, forked_program
from worker.errors import WrongSetting
from worker.telemetry.tracing import Tracing, trace_context

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("value", "flags"),
    [(f"00-{TRACE}-{SPAN}-01", 1), (f"00-{TRACE}-{SPAN}-00", 0), (f"01-{TRACE}-{SPAN}-03-more", 3)],
)
def test_a_context_is_read(value: str, flags: int) -> None:
    headers = (("a", b"b"), ("traceparent", value.encode()))
    assert trace_context(headers) == (int(TRACE, 16), int(SPAN, 16), flags)


@pytest.mark.parametrize(
    "value",
    [
        None, b"", b"\xff", b"00", f"00-{TRACE}-{SPAN}".encode(), f"ff-{TRACE}-{SPAN}-01".encode(),
        f"00-{TRACE.upper()}-{SPAN}-01".encode(), f"00-{'0' * 32}-{SPAN}-01".encode(), f"00-{TRACE}-{'0' * 16}-01".encode(),
    ],
)  # fmt: skip
def test_a_context_that_is_none(value: bytes | None) -> None:
    assert trace_context((("traceparent", value),)) is None


def test_no_context() -> None:
    assert trace_context(()) is trace_context((("b3", b"1"),)) is None


def test_what_is_switched_off_is_not_imported() -> None:
    code = "import sys, worker.commands.run; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.exporter"])
def test_without_the_extra_it_says_what_to_install(command: str, missing: str, tmp_path: Path) -> None:
    done = forked_program(
        f"import sys; sys.modules['{missing}'] = None\n"
        "from worker.commands import check; check._model = lambda _: check.Finding('model', 'ok', 'not loaded')\n"
        f"from worker.cli import main; main(['{command}', '--tracing', 'otel', '--http-port', '0', '--log-format=console'])",
        tmp_path,
    )
    assert done.returncode == 2
    said = (done.stdout if command == "check" else done.stderr).strip()
    assert said.splitlines()[0 if command == "check" else -1].endswith(
        "tracing otel needs the extra otel: pip install 'sentiment-worker[otel]'"
    )


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_SPAN_LINK_COUNT_LIMIT", "many")]
)
def test_a_variable_that_cannot_be_used_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(WrongSetting, match=value):
        Tracing(group_id="g", client_id="c", version="1", environ={name: value})


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"])
@pytest.mark.parametrize("headers", ["Authorization: Bearer secret-token", "a=b, secret-token"])
def test_a_header_that_cannot_be_read_is_refused_without_its_words(name: str, headers: str) -> None:
    with pytest.raises(WrongSetting, match=f"{name} should be name=value") as refusal:
        Tracing(group_id="g", client_id="c", version="1", environ={name: headers})
    assert "secret-token" not in str(refusal.value)


def test_opentelemetry_prints_no_header_at_any_level(tmp_path: Path) -> None:
    """Its own check is stricter than ours, and it quotes what it refuses."""
    done = forked_program(
        "from worker.telemetry import logs; logs.configure('debug', 'json')\n"
        "from opentelemetry.util.re import parse_env_headers\n"
        "assert not parse_env_headers('a b=secret-token', liberal=True)",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "secret-token" not in done.stdout + done.stderr
