"""Where settings come from, what each is without being set, and what is said of a wrong one."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from worker.commands.secret_values import secret_value
from worker.errors import WrongSetting
from worker.runtime.file_value import FileValue
from worker.settings.base import SECRETS
from worker.settings.commands import ClassifySettings, DemoSettings, EvaluateSettings, ReplaySettings
from worker.settings.run import RunSettings
from worker.settings.sources import load, secret_in, unknown_variables
from worker.settings.values import moment_ms, split_names, text_fields

OAUTH = ["--security-protocol", "SASL_SSL", "--sasl-mechanism", "OAUTHBEARER"]
NO_URLS = (
    "id.example.com/token", "ftp://id.example.com", "https://", "https://u:p@id.example.com/", "https://id.example.com/#a",
    "https://id.example.com:99999/", "https://[::1/", "https://id.example.com/a b",
)  # fmt: skip
NO_EXTENSIONS = ("a", "auth=b", "a1=b", "a=ж", ",", "a-b=c")
ENDPOINT = ["--oauth-token-url", "https://id.example.com/token", "--oauth-client-id", "me"]
MSK = ["--security-protocol", "SASL_SSL", "--sasl-mechanism", "AWS_MSK_IAM"]
SASL = ["--security-protocol", "SASL_SSL", "--sasl-mechanism", "PLAIN", "--sasl-username", "u"]
TLS = ["--security-protocol", "SSL"]
REGISTRY = ["--schema-registry-url", "http://registry:8081"]
AVRO = ["--output-format", "avro", *REGISTRY]
SECRET = "hunter2-correct-horse"
TABLE = {
    "bootstrap_servers": "localhost:9092",
    "input_topics": "texts",
    "input_pattern": None,
    "output_topic": "sentiment",
    "dead_letter_topic": "sentiment.dead-letter",
    "group_id": "sentiment-worker",
    "group_instance_id": None,
    "client_id": "sentiment-worker",
    "auto_offset_reset": "earliest",
    "isolation_level": "read_committed",
    "delivery": "at-least-once",
    "transaction_ms": 100,
    "input_format": "json",
    "output_mode": "result",
    "output_format": "json",
    "schema_auto_register": True,
    "tracing": "off",
    "text_field": "text",
    "id_field": "id",
    "max_text_chars": 100_000,
    "compression_type": "none",
    "max_batch_texts": "auto",
    "max_batch_tokens": "auto",
    "cuda_pass": "padded",
    "linger_ms": 10,
    "model": "cointegrated/rubert-tiny-sentiment-balanced",
    "revision": None,
    "activation": "auto",
    "label_scores": None,
    "model_labels": None,
    "threshold": None,
    "normalize": "nfc",
    "device": "auto",
    "dtype": "auto",
    "backend": "auto",
    "cpu_threads": "auto",
    "cache_size": 65_536,
    "dead_letter_limit": 0.5,
    "dead_letter_window": 1_000,
    "inference_timeout_s": 60,
    "drain_timeout_s": 20,
    "http_host": "127.0.0.1",
    "http_port": 8080,
    "http_token": None,
    "http_token_for": "changes",
    "console_texts": False,
    "security_protocol": "PLAINTEXT",
    "sasl_mechanism": None,
    "sasl_username": None,
    "sasl_password": None,
    "schema_registry_url": None,
    "schema_registry_user": None,
    "schema_registry_password": None,
    "schema_registry_token": None,
    "schema_registry_ca_file": None,
    "ssl_cafile": None,
    "ssl_certfile": None,
    "ssl_keyfile": None,
    "ssl_key_password": None,
    "session_timeout_ms": 45_000,
    "request_timeout_ms": 30_000,
    "log_level": "info",
    "log_format": "auto",
}
NOT_IN_THE_TABLE = {
    "dead_letter_limit", "dead_letter_window", "config", "fetch_max_wait_ms", "console_texts", "max_unpacked_bytes",
    "result_timestamp", "on_null_text", "http_names", "long_text", "max_windows", "max_age_s", "since", "until",
    "oauth_token_url", "oauth_client_id", "oauth_client_secret", "oauth_scope", "oauth_audience", "oauth_ca_file",
    "oauth_token_file", "oauth_extensions",
    "client_rack",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("WORKER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], list[str]]:
    """The flags that read a file of these lines."""

    def write(text: str) -> list[str]:
        path = tmp_path / "worker.toml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


def run_settings(*argv: str) -> RunSettings:
    return load(RunSettings, argv, "sentiment-worker run")


def refusal(*argv: str) -> str:
    """The one sentence of what is wrong."""
    with pytest.raises(WrongSetting) as wrong:
        run_settings(*argv)
    sentence = str(wrong.value)
    assert sentence
    assert "\n" not in sentence
    assert wrong.value.__cause__ is None
    return sentence


# --- Defaults ---


@pytest.fixture(scope="module")
def unset() -> RunSettings:
    """The settings where none is given."""
    return load(RunSettings, [], "sentiment-worker run", {})


@pytest.mark.parametrize(("name", "default"), TABLE.items())
def test_defaults_are_those_of_the_contract(unset: RunSettings, name: str, default: object) -> None:
    assert getattr(unset, name) == default


def test_there_is_no_setting_beside_the_contract() -> None:
    assert set(RunSettings.model_fields) == set(TABLE) | NOT_IN_THE_TABLE


def test_help_shows_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_settings("--help")
    assert end.value.code == 0
    _, listed = capsys.readouterr().out.split("options:")
    shown = re.sub(r"-\n\s+", "-", listed)  # argparse breaks lines at hyphens
    options = re.split(r"\n  (?=--)", shown)
    described = {
        option.split()[0].rstrip(","): " ".join(option.split()) for option in options if option.startswith("--")
    }
    for name, default in TABLE.items():
        flag = "--" + name.replace("_", "-")
        if name in SECRETS:
            assert flag not in described
            assert f"WORKER_{name.upper()}_FILE" in "".join(listed.split())
        else:
            assert default is None or described[flag].endswith(f"(default: {default})"), described[flag]
            assert "(default: " in described[flag]


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("linger-ms", "ms"),
        ("session-timeout-ms", "ms"),
        ("request-timeout-ms", "ms"),
        ("inference-timeout-s", "s"),
        ("drain-timeout-s", "s"),
        ("max-text-chars", "characters"),
        ("max-batch-tokens", "tokens"),
        ("cache-size", "texts"),
    ],
)
def test_help_tells_the_unit(name: str, unit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_settings("--help")
    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    (described,) = re.findall(rf"--{name} .*?\(default", text)
    assert re.search(rf"\b{unit}\b", described.split(maxsplit=2)[2])


# --- Precedence ---


def test_a_flag_goes_before_a_variable_before_the_file(
    toml: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toml("linger_ms = 1\nmax_batch_texts = 1\ngroup_id = 'from file'\n")
    monkeypatch.setenv("WORKER_LINGER_MS", "2")
    monkeypatch.setenv("WORKER_MAX_BATCH_TEXTS", "2")
    settings = run_settings(*config, "--linger-ms", "3")
    assert (settings.linger_ms, settings.max_batch_texts, settings.group_id) == (3, 2, "from file")
    assert run_settings("--linger-ms=3").linger_ms == 3


def test_a_variable_names_the_file_and_a_flag_names_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "1.toml", tmp_path / "2.toml"
    first.write_text("linger_ms = 1")
    second.write_text("linger_ms = 2")
    monkeypatch.setenv("WORKER_CONFIG", str(first))
    assert run_settings().linger_ms == 1
    assert run_settings("--config", str(second)).linger_ms == 2
    assert run_settings(f"--config={second}").linger_ms == 2


def test_a_file_lists_names_as_toml_does(toml: Callable[[str], list[str]]) -> None:
    settings = run_settings(*toml('input_topics = ["a", "b"]\nbootstrap_servers = ["h:1", "i:2"]\ncpu_threads = 2'))
    assert split_names(settings.input_topics) == ("a", "b")
    assert split_names(settings.bootstrap_servers) == ("h:1", "i:2")
    assert settings.cpu_threads == 2


def test_a_file_lists_sources_as_toml_does(toml: Callable[[str], list[str]]) -> None:
    settings = load(EvaluateSettings, toml('source = ["a=a,b.csv", "b=c.csv"]'), "sentiment-worker evaluate")
    assert settings.source == ["a=a,b.csv", "b=c.csv"]


@pytest.mark.parametrize(
    ("value", "others", "by_topic"),
    [
        ("body", "body", {}),
        ("reviews=body", "text", {"reviews": "body"}),
        (" a.b=data.text , posts = text,body ", "body", {"a.b": "data.text", "posts": "text"}),
    ],
)
def test_text_fields_are_by_topic(value: str, others: str, by_topic: dict[str, str]) -> None:
    assert text_fields(value) == (others, by_topic)


@pytest.mark.parametrize(
    ("pattern", "name", "is_read"),
    [
        ("feed.*", "feed.ru", True),
        ("feed", "feed.ru", False),
        ("feed", "my.feed", False),
        ("a|feed", "my.feed", False),
        ("(?i:FEED)", "feed", True),
    ],
)
def test_a_pattern_is_of_whole_names(pattern: str, name: str, is_read: bool) -> None:
    settings = load(RunSettings, ["--input-pattern", pattern], "run")
    assert settings.reads(name) == is_read
    assert (settings.input_topics, settings.topics) == (None, ())


def test_names_are_split_at_commas() -> None:
    assert split_names(" a, b ,,c ") == ("a", "b", "c")


def test_settings_do_not_change_once_read() -> None:
    settings = run_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.linger_ms = 5


def test_an_unknown_variable_is_only_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORKER_PORT", "WORKER_LINGERMS", "WORKER_GROUP_ID_FILE"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:80")
    assert run_settings() == RunSettings()
    assert [sentence.split()[2] for sentence in unknown_variables(RunSettings)] == [
        "WORKER_GROUP_ID_FILE", "WORKER_LINGERMS", "WORKER_PORT",
    ]  # fmt: skip


def test_variables_are_named_in_capitals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("worker_linger_ms", "7")
    monkeypatch.setenv("WORKER_Max_Batch_Texts", "7")
    assert run_settings() == RunSettings()
    assert unknown_variables(RunSettings) == [
        "the variable WORKER_Max_Batch_Texts sets nothing; perhaps WORKER_MAX_BATCH_TEXTS is meant"
    ]


def test_variables_come_from_where_the_caller_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_LINGER_MS", "7")
    assert load(RunSettings, [], "run", {}).linger_ms == 10
    assert load(RunSettings, [], "run", {"WORKER_LINGER_MS": "8"}).linger_ms == 8


def test_a_variable_holds_one_word_of_a_list() -> None:
    settings = load(EvaluateSettings, [], "evaluate", {"WORKER_SOURCE": "a=a,b.csv"})
    assert settings.source == ["a=a,b.csv"]


def test_null_is_a_word_like_others() -> None:
    assert run_settings("--revision", "null").revision == "null"


def test_known_variables_are_not_listed() -> None:
    known = {"WORKER_" + name.upper(): "" for name in RunSettings.model_fields}
    files = {f"WORKER_{name.upper()}_FILE": "" for name in SECRETS}
    assert unknown_variables(RunSettings, {**known, **files, "PATH": "", "MY_WORKER_X": ""}) == []


# --- Wrong settings ---

WRONG: list[tuple[str, str, str]] = [  # setting, value, what would be right
    ("bootstrap_servers", "localhost", "host:port"),
    ("bootstrap_servers", "a:1,b", "host:port"),
    ("bootstrap_servers", ":9092", "host:port"),
    ("bootstrap_servers", "a:0", "host:port"),
    ("bootstrap_servers", "a:65536", "host:port"),
    ("bootstrap_servers", "http://a:x", "host:port"),
    ("bootstrap_servers", "a b:9092", "host:port"),
    ("bootstrap_servers", "a/b:9092", "host:port"),
    ("bootstrap_servers", "PLAINTEXT://a:9092", "host:port without PLAINTEXT://; security_protocol says which"),
    ("bootstrap_servers", "a:1,SASL_SSL://b:9093", "host:port without SASL_SSL://; security_protocol says which"),
    ("bootstrap_servers", "a:1, b:1, A:1", "name each one once, and a:1 is there twice"),
    ("bootstrap_servers", "a:９０９２", "host:port"),
    ("bootstrap_servers", "kafka..svc:9092", "host:port"),
    ("http_host", "http://localhost", "host's name or address"),
    ("http_host", "x" * 64, "host's name or address"),
    ("cpu_threads", "99999999999", "less than or equal to 1024"),
    ("session_timeout_ms", "99999999999", "less than or equal to 2147483647"),
    ("input_topics", ",", "at least one"),
    ("input_topics", "a,b c", "letters, digits, dots"),
    ("input_topics", "a, b,a", "name each one once, and a is there twice"),
    ("output_topic", "тексты", "letters, digits, dots"),
    ("output_topic", "..", "letters, digits, dots"),
    ("output_topic", "x" * 250, "1 to 249"),
    ("dead_letter_topic", "a b", "letters, digits, dots"),
    ("auto_offset_reset", "none", "'earliest' or 'latest'"),
    ("isolation_level", "serializable", "'read_committed' or 'read_uncommitted'"),
    ("delivery", "at-most-once", "'at-least-once'"),
    ("group_instance_id", "member/1", "no slash"),
    ("input_format", "xml", "json, text or avro"),
    ("input_format", "json,text", "one format for all topics"),
    ("schema_registry_url", "registry:8081", "an address such as https://registry:8081"),
    ("schema_registry_url", "https://registry/?a=b", "no user, query or fragment"),
    ("tracing", "on", "'off' or 'otel'"),
    ("output_format", "protobuf", "'json', 'cloudevents' or 'avro'"),
    ("output_mode", "both", "'result' or 'enrich'"),
    ("input_pattern", "(", "a regular expression of Python's, and missing )"),
    ("input_pattern", "a)|(b", "a regular expression"),
    ("text_field", "a..b", "dotted path"),
    ("text_field", "texts=", "dotted path"),
    ("text_field", "text topic=a", "letters, digits, dots"),
    ("text_field", "a,b", "topic=path for each"),
    ("text_field", "texts=a,texts=b", "each topic once"),
    ("max_text_chars", "0", "greater than or equal to 1"),
    ("compression_type", "brotli", "'gzip'"),
    ("max_batch_texts", "0", "greater than or equal to 1 or it should be 'auto'"),
    ("max_batch_texts", "100001", "less than or equal to 100000 or it should be 'auto'"),
    ("max_batch_texts", "many", "a whole number or it should be 'auto'"),
    ("max_batch_texts", "1.5", "a whole number or it should be 'auto'"),
    ("max_batch_tokens", "0", "greater than or equal to 1 or it should be 'auto'"),
    ("max_batch_tokens", "many", "a whole number or it should be 'auto'"),
    ("linger_ms", "-1", "greater than or equal to 0"),
    ("linger_ms", "60001", "less than or equal to 60000"),
    ("linger_ms", "soon", "a number"),
    ("transaction_ms", "-1", "greater than or equal to 0"),
    ("transaction_ms", "3334", "less than or equal to 3333"),
    ("linger_ms", "nan", "it should be a finite number"),
    ("http_names", "a.example, b.example,A.example", "name each one once, and a.example is there twice"),
    ("activation", "relu", "'auto', 'sigmoid' or 'softmax'"),
    ("activation", "tanh", "'auto', 'sigmoid' or 'softmax'"),
    ("model_labels", "negative", "LABEL=NAME for each label that has another name"),
    (
        "model_labels",
        "a=b=c",
        "a backslash before a comma, an equals sign or a backslash within a name, and 'a=b=c' is no",
    ),
    ("model_labels", "a=", "and 'a=' is no pair"),
    ("model_labels", "a= ,b=c", "and 'a=' is no pair"),
    ("model_labels", "a\\b=c", "is no pair"),
    ("model_labels", ",", "LABEL=NAME for each label"),
    ("model_labels", "a=x, a=y", "name each one once, and a is there twice"),
    ("model_labels", "a=x,b=x", "name each one once, and x is there twice"),
    ("label_scores", "a", "LABEL=WEIGHT for each label that counts"),
    ("label_scores", "a=1,a=2", "name each one once, and a is there twice"),
    ("label_scores", "a=1,b=high", "a finite number, such as -0.5, and high is not one"),
    ("label_scores", "a=nan", "a finite number, such as -0.5, and nan is not one"),
    ("label_scores", "a=-inf", "a finite number, such as -0.5, and -inf is not one"),
    ("threshold", "1.5", "less than or equal to 1"),
    ("threshold", "-0.1", "greater than or equal to 0"),
    ("threshold", "half", "a number"),
    ("device", "tpu", "auto, cpu, cuda or cuda:N"),
    ("dtype", "int4", "'float32'"),
    ("backend", "tf", "'torch' or 'onnx'"),
    ("cpu_threads", "0", "greater than or equal to 1 or it should be 'auto'"),
    ("cache_size", "-1", "greater than or equal to 0"),
    ("inference_timeout_s", "0", "greater than 0"),
    ("inference_timeout_s", "nan", "a finite number"),
    ("drain_timeout_s", "-5", "greater than 0"),
    ("drain_timeout_s", "inf", "a finite number"),
    ("http_names", "worker.example:8080", "hosts without a port"),
    ("http_names", "https://worker.example", "hosts without a port"),
    ("http_names", "*", "hosts without a port"),
    ("http_port", "65536", "less than or equal to 65535"),
    ("http_port", "true", "a whole number, not true"),
    ("linger_ms", "false", "a number, not false"),
    ("cpu_threads", "true", "a whole number, not true or it should be 'auto'"),
    ("console_texts", "perhaps", "true or false"),
    ("http_token_for", "nothing", "'changes' or 'all'"),
    ("session_timeout_ms", "10", "greater than or equal to 1000"),
    ("request_timeout_ms", "10", "greater than or equal to 1000"),
    ("fetch_max_wait_ms", "0", "greater than or equal to 1"),
    ("security_protocol", "TLS", "'SASL_SSL'"),
    ("sasl_mechanism", "GSSAPI", "'SCRAM-SHA-256'"),
    ("log_level", "loud", "'info'"),
    ("log_format", "xml", "'console'"),
]


@pytest.mark.parametrize(("name", "value", "right"), WRONG)
def test_a_wrong_setting_is_named_with_what_was_wrong_and_what_would_be_right(
    name: str, value: str, right: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = "--" + name.replace("_", "-")
    monkeypatch.setenv("WORKER_" + name.upper(), value)
    sentence = refusal()
    assert sentence.startswith(f"{name} = {value!r} is wrong: it should ")
    assert right in sentence
    assert sentence.endswith(f"(flag {flag}, variable WORKER_{name.upper()})")
    monkeypatch.delenv("WORKER_" + name.upper())
    if RunSettings.model_fields[name].annotation is not bool:
        assert refusal(f"{flag}={value}") == sentence


def test_a_wrong_setting_in_the_file_is_named_too(toml: Callable[[str], list[str]]) -> None:
    assert refusal(*toml("linger_ms = -1")).startswith("linger_ms = -1 is wrong: it should be greater than or equal")
    assert refusal(*toml("group_id = 5")).startswith("group_id = 5 is wrong: it should be text")
    assert refusal(*toml("linger_ms = {a = 1}")).startswith("linger_ms = {'a': 1} is wrong: it should be a number")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--output-mode", "enrich", "--input-format", "text"], ["output_mode enrich", "input_format json"]),
        (
            ["--output-mode", "enrich", "--input-format", "texts=avro", *REGISTRY],
            ["output_mode enrich", "input_format json"],
        ),
        (["--input-format", "texts=avro"], ["input_format avro", "schema_registry_url"]),
        (["--input-format", "other=text"], ["input_format", "the topic other"]),
        (["--schema-registry-user", "a"], ["schema_registry_user", "schema_registry_url"]),
        ([*REGISTRY, "--schema-registry-user", "a"], ["schema_registry_user", "schema_registry_password"]),
        ([*REGISTRY, "--schema-registry-user", "a:b"], ["schema_registry_user", "no colon"]),
        ([*REGISTRY, "--schema-registry-ca-file", __file__], ["schema_registry_ca_file", "https://"]),
        (
            ["--delivery", "exactly-once", "--isolation-level", "read_uncommitted"],
            ["delivery exactly-once", "isolation_level read_committed"],
        ),
        (["--input-topics", "a, b", "--output-topic", "b"], ["output_topic", "input_topics", "another topic"]),
        (["--output-mode", "enrich", "--output-format", "cloudevents"], ["output_format", "output_mode result"]),
        (["--output-format", "avro"], ["output_format avro", "schema_registry_url"]),
        ([*AVRO, "--output-mode", "enrich"], ["output_mode enrich", "output_format json"]),
        (["--input-pattern", "sent.*", "--dead-letter-topic", "d"], ["output_topic", "'sent.*'", "another topic"]),
        (["--input-pattern", ".*dead.*"], ["dead_letter_topic", "input_pattern", "another topic"]),
        (["--input-pattern", "a", "--input-topics", "b"], ["input_topics and input_pattern", "one of them"]),
        (["--text-field", "posts=body"], ["text_field", "posts", "not one of the input's"]),
        (["--dead-letter-topic", "texts"], ["dead_letter_topic", "input_topics", "another topic"]),
        (["--security-protocol", "SASL_PLAINTEXT"], ["sasl_mechanism", "security_protocol", "set both or neither"]),
        (["--sasl-mechanism", "PLAIN"], ["sasl_mechanism", "security_protocol", "set both or neither"]),
        (SASL[:4], ["sasl_mechanism", "sasl_username", "WORKER_SASL_PASSWORD"]),
        (SASL, ["sasl_password", "WORKER_SASL_PASSWORD"]),
        (["--security-protocol", "SSL", "--ssl-keyfile", __file__], ["ssl_keyfile", "ssl_certfile"]),
        (["--ssl-certfile", __file__], ["ssl_certfile", "security_protocol SSL", "nothing is encrypted"]),
        (["--http-token-for", "all"], ["http_token_for all", "WORKER_HTTP_TOKEN_FILE"]),
        (["--sasl-username", "u"], ["sasl_username", "sasl_mechanism"]),
        (["--model", "builtin", "--revision", "v2"], ["revision", "builtin"]),
        (["--model", "./model", "--revision", "v2"], ["revision", "./model"]),
        (["--fetch-max-wait-ms", "30000"], ["fetch_max_wait_ms", "request_timeout_ms"]),
        (OAUTH, ["OAUTHBEARER needs oauth_token_file", "oauth_token_url", "WORKER_OAUTH_CLIENT_SECRET"]),
        ([*OAUTH, *ENDPOINT], ["OAUTHBEARER needs oauth_token_file", "WORKER_OAUTH_CLIENT_SECRET"]),
        (
            [*OAUTH, *ENDPOINT, "--oauth-token-file", __file__],
            ["oauth_token_url and oauth_token_file: set one of them"],
        ),
        ([*OAUTH, "--oauth-token-file", __file__, "--oauth-scope", "s"], ["oauth_scope goes with oauth_token_url"]),
        (
            [*OAUTH, "--oauth-token-file", __file__, "--sasl-username", "u"],
            ["sasl_username goes with sasl_mechanism PLAIN"],
        ),
        (["--oauth-scope", "s"], ["oauth_scope goes with sasl_mechanism OAUTHBEARER"]),
        ([*SASL, "--oauth-token-file", __file__], ["oauth_token_file goes with sasl_mechanism OAUTHBEARER"]),
        (["--sasl-mechanism", "OAUTHBEARER"], ["sasl_mechanism", "security_protocol", "set both or neither"]),
        ([*MSK, "--oauth-token-file", __file__], ["oauth_token_file goes with sasl_mechanism OAUTHBEARER"]),
        (["--security-protocol", "SASL_PLAINTEXT", *MSK[2:]], ["AWS_MSK_IAM goes with security_protocol SASL_SSL"]),
    ],
)
def test_settings_that_do_not_go_together_are_named(argv: list[str], parts: list[str]) -> None:
    sentence = refusal(*argv)
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--nosuch", "1"], "--nosuch"),
        (["--nosuch=1"], "--nosuch"),
        (["--linger_ms", "1"], "--linger_ms"),
        (["--linger", "1"], "--linger"),
        (["stray"], "a word that is no flag"),
        (["--linger-ms"], "--linger-ms needs a value"),
    ],
)
def test_an_unknown_flag_is_an_error_that_says_where_flags_are_listed(argv: list[str], part: str) -> None:
    sentence = refusal(*argv)
    assert part in sentence
    assert "`sentiment-worker run --help`" in sentence


@pytest.mark.parametrize("line", ["nosuch = 1", "linger-ms = 1", "[kafka]\ngroup_id = 'x'", "config = 'other.toml'"])
def test_an_unknown_key_of_the_file_is_an_error(line: str, toml: Callable[[str], list[str]]) -> None:
    argv = toml(line)
    sentence = refusal(*argv)
    assert re.match(r"config: \S+ sets (nosuch|linger-ms|kafka|config), which is no setting", sentence)
    assert argv[1] in sentence


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("linger-ms = 1", "perhaps linger_ms is meant"),
        ("LINGER_MS = 1", "perhaps linger_ms is meant"),
        ("http_tokn = 'x'", "http_token is a secret: set WORKER_HTTP_TOKEN or WORKER_HTTP_TOKEN_FILE"),
        ("max_batch_text = 1", "perhaps max_batch_texts is meant"),
        ("[kafka]\ngroup_id = 'x'", "settings stand at the top of the file, in no table"),
        ("nosuch = 1", "`sentiment-worker run --help` lists them"),
    ],
)
def test_an_unknown_key_of_the_file_is_told_what_to_write(
    line: str, hint: str, toml: Callable[[str], list[str]]
) -> None:
    assert refusal(*toml(line)).endswith(f"; {hint}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("http_port = true", "it should be a whole number, not true"),
        ("linger_ms = false", "it should be a number, not false"),
        ("cpu_threads = true", "it should be a whole number, not true or it should be 'auto'"),
        ("group_id = true", "group_id = true is wrong: it should be text"),
        ("delivery = true", "it should be 'at-least-once' or 'exactly-once'"),
        ("ssl_cafile = 5", "it should be a path"),
    ],
)
def test_true_and_false_are_no_numbers_and_no_text(line: str, words: str, toml: Callable[[str], list[str]]) -> None:
    assert words in refusal(*toml(line))


# --- Empty values, and control characters ---

ONE_OF_EACH_KIND = ("group_id", "input_pattern", "ssl_cafile", "linger_ms", "cpu_threads", "sasl_mechanism", "device")


def test_empty_variables_set_nothing() -> None:
    names = RunSettings.model_fields.keys() - set(SECRETS)
    assert load(RunSettings, [], "run", {f"WORKER_{name.upper()}": "" for name in names}) == RunSettings()


@pytest.mark.parametrize(
    ("value", "words"), [("", "it should not be empty"), ("1\r", "end with a carriage return (CR)")]
)
def test_no_setting_takes_an_empty_value_or_one_with_a_carriage_return(value: str, words: str) -> None:
    with pytest.raises(ValidationError) as wrong:
        RunSettings(**dict.fromkeys(RunSettings.model_fields, value))
    refused = {error["loc"][0] for error in wrong.value.errors() if words in error["msg"]}
    assert refused == RunSettings.model_fields.keys()


def test_an_empty_variable_leaves_what_the_file_says(toml: Callable[[str], list[str]]) -> None:
    settings = load(RunSettings, toml("group_id = 'mine'"), "run", {"WORKER_GROUP_ID": "", "WORKER_CONFIG": ""})
    assert settings.group_id == "mine"


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_an_empty_flag_is_told_in_the_same_words_whatever_it_is(name: str) -> None:
    assert refusal(f"--{name.replace('_', '-')}=").startswith(f"{name} = '' is wrong: it should not be empty")


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("content", ["", "\n", "\r\n"])
def test_an_empty_secret_is_a_wrong_setting(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(content.encode())
    variable = f"WORKER_{name.upper()}"
    for environ in ({variable: ""}, {f"{variable}_FILE": str(tmp_path / "secret")}):
        with pytest.raises(WrongSetting, match=f"^{name} is wrong: it should not be empty .variable {variable} or"):
            load(RunSettings, [], "run", environ)
    with pytest.raises(WrongSetting, match=f"^{variable}_FILE = '' is wrong: it should not be empty"):
        load(RunSettings, [], "run", {f"{variable}_FILE": ""})


@pytest.mark.parametrize("name", [*ONE_OF_EACH_KIND, "config", "console_texts", "http_token", "http_token_file"])
def test_a_carriage_return_at_the_end_of_a_variable_is_named_as_what_it_is(name: str) -> None:
    with pytest.raises(WrongSetting) as wrong:
        load(RunSettings, [], "run", {f"WORKER_{name.upper()}": "1\r"})
    assert "it should not end with a carriage return (CR), as the lines of a Windows text file do" in str(wrong.value)
    assert str(wrong.value).lower().startswith((f"{name} ", f"worker_{name} "))


@pytest.mark.parametrize("control", ["\n", "\t", "\x00", "\x1b", "\x7f", "\x9b", "\u2028"])
def test_control_characters_are_refused_in_every_text(control: str, toml: Callable[[str], list[str]]) -> None:
    for name in ("group_id", "input_topics", "ssl_cafile"):
        sentence = refusal(f"--{name.replace('_', '-')}=a{control}b")
        assert f"no control characters, and character 2 is {control!a}" in sentence
        assert sentence.isprintable()
    escaped = f"\\u{ord(control):04x}"
    assert "no control characters" in refusal(*toml(f'group_id = "a{escaped}b"'))
    with pytest.raises(WrongSetting, match="no control characters"):
        load(EvaluateSettings, ["--source", f"a=b{control}c"], "evaluate")


@pytest.mark.parametrize("name", ["group_id", "client_id", "model", "ssl_cafile", "config", "sasl_password_file"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("sentiment-worker ", r"it should not end with white space, and this is ' '"),
        ("\xa0a", r"it should not begin with white space, and this is '\xa0'"),
        ("a\ufeff", r"it should have no invisible characters, and character 2 is '\ufeff'"),
        ("a\u202eb", r"it should have no invisible characters, and character 2 is '\u202e'"),
    ],
)
def test_what_does_not_show_is_refused_in_every_name(name: str, value: str, words: str) -> None:
    with pytest.raises(WrongSetting, match=re.escape(words)) as wrong:
        load(RunSettings, [], "run", {f"WORKER_{name.upper()}": value})
    assert str(wrong.value).isprintable()


def test_what_does_not_show_may_be_in_patterns_texts_and_between_the_names_of_a_list() -> None:
    variables = {"WORKER_INPUT_PATTERN": "texts|a\u200cb ", "WORKER_BOOTSTRAP_SERVERS": "a:1 , b:1"}
    assert load(RunSettings, [], "run", variables).input_pattern == "texts|a\u200cb "
    assert load(RunSettings, ["--input-topics", "a, b ,c"], "run").topics == ("a", "b", "c")
    texts = [" хорошо\ufeff ", "\u202e"]
    assert load(ClassifySettings, texts, "classify").texts == texts


def test_a_secret_with_a_control_character_is_not_repeated() -> None:
    with pytest.raises(WrongSetting) as wrong:
        load(RunSettings, [], "run", {"WORKER_SASL_PASSWORD": f"{SECRET}\x00"})
    assert "no control characters" in str(wrong.value)
    assert SECRET not in str(wrong.value)


# --- Names that are nearly right ---


@pytest.mark.parametrize("kind", [RunSettings, ReplaySettings, ClassifySettings, EvaluateSettings, DemoSettings])
def test_a_flag_is_itself_in_one_case_alone(kind: Any) -> None:
    for name, field in kind.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if name not in (*SECRETS, "texts"):
            for written in (flag.upper(), flag.title(), "--" + name + "s"):
                with pytest.raises(WrongSetting) as wrong:
                    load(kind, [written] if field.annotation is bool else [written, "1"], "sentiment-worker it")
                assert str(wrong.value).startswith(
                    f"{written} is no flag; perhaps {flag} is meant; `sentiment-worker it"
                )


@pytest.mark.parametrize("written", ["--CONFIG", "--Config", "--confg"])
def test_a_config_that_is_misspelt_is_not_ignored(written: str, toml: Callable[[str], list[str]]) -> None:
    _, path = toml("linger_ms = 1")
    for argv in ([f"{written}={path}"], [written, path]):
        assert refusal(*argv).startswith(f"{written} is no flag; perhaps --config is meant")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("hunter2", "the command line has a word that is no flag; `run --help`"),
        ("-phunter2", "the command line has a word that is no flag; `run --help`"),
        ("--http-token:hunter2", "http_token is a secret: set WORKER_HTTP_TOKEN or"),
        ("--nosuch:hunter2", "--nosuch is no flag; `run --help`"),
    ],
)
def test_a_word_that_is_no_flag_is_not_repeated(written: str, said: str) -> None:
    with pytest.raises(WrongSetting) as wrong:
        load(RunSettings, [written], "run")
    assert said in str(wrong.value)
    assert "hunter" not in str(wrong.value)


@pytest.mark.parametrize("kind", [RunSettings, ClassifySettings, EvaluateSettings])
@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_no_flag_in_any_case(kind: Any, name: str) -> None:
    flag = "--" + name.replace("_", "-")
    for written in (flag, flag.upper(), flag.title(), "--" + name, flag[:-1]):
        for argv in ([f"{written}={SECRET}"], [written, SECRET]):
            with pytest.raises(WrongSetting) as wrong:
                load(kind, argv, "sentiment-worker it")
            assert f"{name} is a secret: set WORKER_{name.upper()} or WORKER_{name.upper()}_FILE" in str(wrong.value)
            assert SECRET not in str(wrong.value)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("WORKER_LINGERMS", "WORKER_LINGER_MS"),
        ("WORKER_Linger_Ms", "WORKER_LINGER_MS"),
        ("WORKER_GROUP-ID", "WORKER_GROUP_ID"),
        ("WORKER_HTTP_TOKN", "WORKER_HTTP_TOKEN"),
        ("WORKER_SASL_PASWORD_FILE", "WORKER_SASL_PASSWORD_FILE"),
        ("WORKER_CONFG", "WORKER_CONFIG"),
        ("WORKER_SERVICE_HOST", None),
        ("WORKER_PORT_8080_TCP_ADDR", None),
    ],
)
def test_a_variable_that_is_misspelt_is_told_with_the_nearest_name(variable: str, meant: str | None) -> None:
    (sentence,) = unknown_variables(RunSettings, {variable: SECRET})
    assert sentence == f"the variable {variable} sets nothing" + (f"; perhaps {meant} is meant" if meant else "")


def test_the_name_of_a_variable_is_safe_to_print() -> None:
    (sentence,) = unknown_variables(RunSettings, {"WORKER_\x1b[31m\n": "1"})
    assert sentence == r"the variable WORKER_\u001b[31m\n sets nothing"


def test_help_is_shown_whatever_the_file_and_the_variables_hold(capsys: pytest.CaptureFixture[str]) -> None:
    for environ in ({"WORKER_CONFIG": "/nowhere"}, {"WORKER_LINGER_MS": "soon"}):
        with pytest.raises(SystemExit):
            load(RunSettings, ["--help"], "sentiment-worker run", environ)
        assert "--linger-ms" in capsys.readouterr().out


def test_the_last_of_a_flags_values_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "1.toml", tmp_path / "2.toml"
    first.write_text("linger_ms = 1")
    second.write_text("linger_ms = 2")
    settings = run_settings("--group-id", "a", "--config", str(first), f"--config={second}", "--group-id=b")
    assert (settings.group_id, settings.linger_ms, settings.config) == ("b", 2, second)


def test_what_stands_where_a_value_does_is_no_flag() -> None:
    assert classify_texts("--device", "cpu", "--", "--config", "nowhere") == ["--config", "nowhere"]
    assert run_settings("--group-id", "-5").group_id == "-5"
    assert refusal("--group-id", "--linger-ms", "5").startswith("--group-id needs a value; `sentiment-worker run")
    assert refusal("--console-texts=yes").startswith("--console-texts takes no value")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, toml: Callable[[str], list[str]]) -> None:
    missing = str(tmp_path / "missing.toml")
    assert refusal("--config", missing) == (
        f"config: {missing} cannot be read (No such file or directory); it should be a TOML file"
    )
    assert "it should be a TOML file" in refusal("--config", str(tmp_path))
    assert "is not valid TOML" in refusal(*toml("linger_ms = "))
    for content in (b"group_id = '\xff'", "group_id = 'a'".encode("utf-16")):
        (tmp_path / "worker.toml").write_bytes(content)
        assert refusal("--config", str(tmp_path / "worker.toml")).endswith(
            "is not in UTF-8, as TOML has to be; save it in that encoding"
        )


def test_right_settings_at_their_bounds_are_taken() -> None:
    settings = run_settings(
        "--linger-ms=0", "--http-port=0", "--cache-size=0", "--max-batch-texts=1", "--max-batch-tokens=1",
        "--bootstrap-servers=[::1]:9092, b:65535", "--device=cuda:1", "--text-field=a.b.c",
    )  # fmt: skip
    assert (settings.linger_ms, settings.http_port, settings.max_batch_tokens) == (0, 0, 1)
    assert split_names(settings.bootstrap_servers) == ("[::1]:9092", "b:65535")


# --- Secrets ---


def test_a_secret_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_SASL_PASSWORD", SECRET)
    settings = run_settings(*SASL)
    assert settings.sasl_password is not None
    assert settings.sasl_password.get_secret_value() == SECRET


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], ""),
        (["--oauth-ca-file", __file__], ""),
        (["--oauth-extensions", "logicalCluster=lkc-1,identityPoolId=pool 2"], ""),
        (
            ["--oauth-ca-file", __file__, "--oauth-token-url", "http://id.example.com"],
            "oauth_ca_file goes with an oauth_token_url that begins with https:",
        ),
        *((["--oauth-token-url", url], "it should be a URL such as") for url in NO_URLS),
        *((["--oauth-extensions", word], "it should be NAME=VALUE, separated by commas") for word in NO_EXTENSIONS),
        (["--oauth-extensions", "a=b,a=c"], "it should name each extension once"),
    ],
)
def test_settings_of_a_token_endpoint(more: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_OAUTH_CLIENT_SECRET", SECRET)
    argv = [*OAUTH, *ENDPOINT, *more]
    if not words:
        assert run_settings(*argv).oauth_client_id == "me"
        return
    sentence = refusal(*argv)
    assert words in sentence
    assert SECRET not in sentence


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
@pytest.mark.parametrize("name", ["sasl_password", "ssl_key_password", "oauth_client_secret"])
def test_a_secret_comes_from_a_file_without_its_line_ending(
    name: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_bytes(f" {SECRET} {ending}".encode())
    monkeypatch.setenv(f"WORKER_{name.upper()}_FILE", str(tmp_path / "secret"))
    assert getattr(run_settings(), name).get_secret_value() == f" {SECRET} "


def test_a_token_comes_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(SECRET + "\n")
    monkeypatch.setenv("WORKER_HTTP_TOKEN_FILE", str(tmp_path / "token"))
    settings = run_settings("--http-token-for", "all")
    assert settings.http_token is not None
    assert settings.http_token.get_secret_value() == SECRET


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_read_again_from_its_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    monkeypatch.setenv(f"WORKER_{name.upper()}_FILE", str(file))
    value = secret_value(run_settings(), name)
    assert isinstance(value, FileValue)
    assert value.value == SECRET
    file.write_text("another-correct-horse\n")
    assert value.value == "another-correct-horse"
    for wrong in ("", "two\nlines of a password"):
        file.write_text(wrong)
        assert value.value == "another-correct-horse"


def test_a_secret_of_a_variable_is_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert secret_value(run_settings(), "http_token") is None
    monkeypatch.setenv("WORKER_HTTP_TOKEN", SECRET)
    assert secret_value(run_settings(), "http_token") == SECRET


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("http_token", "short", "http_token is wrong: it should be 16 or more letters"),
        ("http_token", "", "WORKER_HTTP_TOKEN_FILE: what {} holds is wrong: it should not be empty"),
        ("sasl_password", "tab\there", "WORKER_SASL_PASSWORD_FILE: what {} holds is wrong: it should have no control"),
        ("sasl_password", None, "WORKER_SASL_PASSWORD_FILE: {} cannot be read"),
    ],
)
def test_a_file_that_no_longer_holds_a_secret_is_named(
    name: str, content: str | None, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
    with pytest.raises(WrongSetting) as refused:
        secret_in(RunSettings, name, file)
    assert str(refused.value).startswith(words.format(file))
    assert not content or content not in str(refused.value)


@pytest.mark.parametrize("token", ["short", "x" * 15, "пароль" * 5, "two words and more", "x" * 1_025])
def test_a_token_that_no_header_can_hold_or_that_can_be_guessed(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_HTTP_TOKEN", token)
    sentence = refusal()
    assert sentence.startswith("http_token is wrong: it should be 16 or more letters")
    assert "flag" not in sentence
    assert token not in sentence


@pytest.mark.parametrize("name", [*SECRETS, *(name for name in RunSettings.model_fields if name.endswith("file"))])
def test_every_file_has_to_be_there_at_the_start(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "nowhere"
    if name in SECRETS:
        monkeypatch.setenv(f"WORKER_{name.upper()}_FILE", str(missing))
        assert refusal() == f"WORKER_{name.upper()}_FILE: {missing} cannot be read; it should be a file with the secret"
    else:
        sentence = refusal(f"--{name.replace('_', '-')}={missing}")
        assert sentence.startswith(f"{name} = '{missing}' is wrong: it should be a ")
        assert "that is there at the start" in sentence


@pytest.mark.parametrize("name", ["ssl_cafile", "oauth_token_file"])
def test_a_file_that_cannot_be_looked_for_is_refused_by_its_settings_name(name: str) -> None:
    """As in a folder that this user may not enter; root may enter all, so here it is a name that no file can have."""
    sentence = refusal(f"--{name.replace('_', '-')}={'a' * 5_000}")
    assert sentence.startswith(f"{name} = ")
    assert "that is there at the start" in sentence


def test_a_secret_given_twice_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_SASL_PASSWORD_FILE", str(tmp_path / "nowhere"))
    monkeypatch.setenv("WORKER_SASL_PASSWORD", SECRET)
    sentence = refusal(*SASL)
    assert "WORKER_SASL_PASSWORD and WORKER_SASL_PASSWORD_FILE are both set" in sentence
    assert SECRET not in sentence


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_refused_as_a_flag_and_in_the_file(name: str, toml: Callable[[str], list[str]]) -> None:
    flag = "--" + name.replace("_", "-")
    for argv in ([flag, SECRET], [f"{flag}={SECRET}"], toml(f"{name} = '{SECRET}'")):
        sentence = refusal(*SASL, *argv)
        assert name in sentence
        assert f"set WORKER_{name.upper()} or WORKER_{name.upper()}_FILE" in sentence
        assert SECRET not in sentence


@pytest.mark.parametrize(
    "argv",
    [
        [f"--sasl_password={SECRET}"],
        ["--sasl_password", SECRET],
        ["--sasl-passwor", SECRET],
        [f"--sasl-passwor={SECRET}"],
    ],
)
def test_a_secret_behind_a_flag_that_is_none_is_not_printed(argv: list[str]) -> None:
    sentence = refusal(*argv)
    assert SECRET not in sentence
    assert "sasl" in sentence


@pytest.mark.parametrize("source", ["variable", "file"])
def test_a_secret_is_never_printed(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text(SECRET)
    for name in SECRETS:
        value = {"": SECRET} if source == "variable" else {"_FILE": str(tmp_path / "secret")}
        for ending, content in value.items():
            monkeypatch.setenv(f"WORKER_{name.upper()}{ending}", content)
    settings = run_settings(*SASL)
    for shown in (repr(settings), str(settings), repr(settings.model_dump()), settings.model_dump_json()):
        assert SECRET not in shown
    for wrong in (["--linger-ms", "-1"], ["--nosuch"], ["--output-topic", "texts"], ["--ssl-keyfile", "nowhere"]):
        assert SECRET not in refusal(*SASL, *wrong)


def test_a_password_in_the_registrys_address_is_refused_and_not_printed() -> None:
    for url in (f"https://u:{SECRET}@registry", f"ftp://u:{SECRET}@registry", f"https://u:{SECRET}@registry:99999/a"):
        sentence = refusal("--schema-registry-url", url)
        assert "schema_registry_url" in sentence
        assert SECRET not in sentence


def test_a_login_to_a_registry_without_encryption_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_SCHEMA_REGISTRY_TOKEN", SECRET)
    (doubt,) = run_settings(*REGISTRY).exposures()
    assert "reads the token" in doubt
    assert not list(run_settings("--schema-registry-url", "https://registry:8081").exposures())


# --- The other commands ---


def classify_texts(*argv: str) -> list[str]:
    return load(ClassifySettings, argv, "sentiment-worker classify").texts


@pytest.mark.parametrize(
    "texts",
    [
        ["плохо"],
        ["-"],
        ["да", "нет"],
        ["Хорошо, но дорого"],
        ['Не "очень", но [ладно'],
        ['"в кавычках"'],
        ["[в скобках]"],
        ['{"text": "нет"}'],
        ["null"],
        ["", "  ", " с краёв "],
        ["-5"],
        ["две\nстроки", "\\n"],
    ],
)
def test_texts_to_classify_are_taken_as_they_are(texts: list[str]) -> None:
    assert classify_texts("--device", "cpu", *texts) == texts


def test_a_text_that_looks_like_a_flag_goes_behind_two_dashes() -> None:
    assert classify_texts("--device", "cpu", "--", "--да, нет", "-h") == ["--да, нет", "-h"]


def test_sources_to_evaluate_are_taken_as_they_are() -> None:
    argv = ["--source", "a=a, b.csv", "--source", 'b="c".csv', "--label-map", "a:[x, y]=neutral"]
    settings = load(EvaluateSettings, argv, "sentiment-worker evaluate")
    assert settings.source == ["a=a, b.csv", 'b="c".csv']
    assert settings.label_map == ["a:[x, y]=neutral"]


def test_a_label_is_mapped_once() -> None:
    argv = ["--source", "a=b.csv", "--label-map", "a:1=neutral", "--label-map", "a:1=positive"]
    with pytest.raises(WrongSetting, match="it should name each one once, and a:1 is there twice"):
        load(EvaluateSettings, argv, "sentiment-worker evaluate")


@pytest.mark.parametrize("kind", [ClassifySettings, EvaluateSettings, DemoSettings])
def test_every_command_has_its_help(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load(kind, ["--help"], "sentiment-worker it")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: sentiment-worker it ")


# --- Replay ---


def replay_settings(*argv: str) -> ReplaySettings:
    return load(ReplaySettings, argv, "sentiment-worker replay")


@pytest.mark.parametrize("limit", ["-0.1", "1.1", "half"])
def test_a_dead_letter_limit_is_a_share(limit: str) -> None:
    assert refusal("--dead-letter-limit", limit).startswith("dead_letter_limit")


def test_a_replay_reads_the_workers_file(toml: Callable[[str], list[str]]) -> None:
    flags = toml('group_id = "mine"\nbootstrap_servers = "kafka:9092"\nmax_batch_texts = 7')
    settings = replay_settings(*flags, "--reason", "too_large", "--reason", "empty_text", "--dry-run")
    assert (settings.group_id, settings.bootstrap_servers) == ("mine", "kafka:9092")
    assert (settings.reason, settings.dry_run) == (["too_large", "empty_text"], True)
    with pytest.raises(WrongSetting, match="sets max_batch_text,"):
        replay_settings(*toml("max_batch_text = 7"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--reason", "too_big"), "reason = ['too_big'] is wrong: it should be one of invalid_json, "),
        (("--reason", "too_large", "--reason", "too_large"), "each one once, and too_large is there twice"),
        (("--since", "yesterday"), "2026-11-23T10:00Z, or how long ago"),
        (("--since", "1h", "--until", "2h"), "since should be before until"),
        (("--group-id", "g", "--replay-group-id", "g"), "replay_group_id is the workers' group_id"),
        (("--sasl-mechanism", "PLAIN"), "security_protocol"),
    ],
)
def test_a_wrong_replay_is_refused_in_a_sentence(argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(WrongSetting, match=re.escape(words)):
        replay_settings(*argv)


def test_moments_are_in_utc_or_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    ten = 1_795_428_000_000
    for written in ("2026-11-23T10:00Z", "2026-11-23T10:00", "2026-11-23 13:00+03:00"):
        assert moment_ms(written) == ten
    monkeypatch.setattr(time, "time", lambda: ten / 1000)
    assert [moment_ms(ago) for ago in ("90s", "30m", "2h", "7d")] == [
        ten - seconds * 1000 for seconds in (90, 1_800, 7_200, 604_800)
    ]
    assert [moment_ms(long_ago) for long_ago in ("99999d", "1900-01-01", "1969-12-31T23:59:59.999Z")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--until", "now"), "until needs a group_id of its own, which no other worker has used"),
        (("--until", "tomorrow"), "it should be now, or a time that has passed, such as 2026-11-23T10:00Z"),
        (("--until", "9999-01-01"), "it should be now, or a time that has passed"),
        (("--until", "2h"), "it should be now, or a time that has passed"),
        (
            ("--group-id", "g", "--until", "now", "--auto-offset-reset", "latest"),
            "until needs auto_offset_reset earliest",
        ),
        (("--group-id", "g", "--until", "2025-01-01", "--since", "2025-01-01"), "since should be before until"),
        (("--since", "yesterday"), "2026-11-23T10:00Z, or how long ago"),
        (
            ("--group-id", "g", "--until", "2025-01-01", "--max-age-s", "300"),
            "max_age_s would skip every record before until",
        ),
        (("--max-age-s", "0"), "max_age_s = '0' is wrong: it should be greater than 0"),
        (("--max-age-s", "old"), "max_age_s = 'old' is wrong: it should be a number"),
    ],
)
def test_a_wrong_span_or_age_is_refused_in_a_sentence(argv: tuple[str, ...], words: str) -> None:
    assert words in refusal(*argv)


def test_a_run_has_an_end_in_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--group-id", "g", "--since", "2025-01-01")
    assert run_settings(*given, "--until", "2025-01-01T00:00:01Z").until_ms == 1_735_689_601_000
    assert run_settings(*given, "--until", "now").until_ms is None
    assert run_settings("--since", "7d").since == "7d"
    monkeypatch.setenv("WORKER_GROUP_ID", "g")
    assert run_settings("--until", "now").until == "now"


# --- What is left open ---

TOKEN = {"WORKER_HTTP_TOKEN": "a-token-of-nobody-here"}
LOGIN = {"WORKER_SASL_USERNAME": "worker", "WORKER_SASL_PASSWORD": "hunter2"}
OPEN = ("--http-host=0.0.0.0",)
PLAIN = ("--security-protocol=SASL_PLAINTEXT", "--sasl-mechanism=PLAIN")
SCRAM = ("--security-protocol=SASL_PLAINTEXT", "--sasl-mechanism=SCRAM-SHA-512")
BY_TOKEN = ("--security-protocol=SASL_PLAINTEXT", "--sasl-mechanism=OAUTHBEARER", f"--oauth-token-file={__file__}")
ASKING = ("--security-protocol=SASL_SSL", "--sasl-mechanism=OAUTHBEARER", "--oauth-client-id=me")
CLIENT = {"WORKER_OAUTH_CLIENT_SECRET": "hunter2"}


@pytest.mark.parametrize(
    ("flags", "variables", "told"),
    [
        ((), {}, []),
        (("--http-host=::1",), {}, []),
        (("--http-host=localhost",), {}, []),
        (OPEN, {}, ["without a token"]),
        (("--http-host=worker.example",), {}, ["without a token"]),
        (OPEN, TOKEN, ["without a token with http_token_for changes"]),
        ((*OPEN, "--http-token-for=all"), TOKEN, []),
        ((*OPEN, "--console-texts"), TOKEN, ["results with their texts"]),
        ((*OPEN, "--console-texts", "--http-token-for=all"), TOKEN, []),
        (PLAIN, LOGIN, ["reads the password and every record"]),
        (SCRAM, LOGIN, ["reads every record"]),
        (BY_TOKEN, {}, ["reads the token and every record"]),
        ((*ASKING, "--oauth-token-url=http://id/t"), CLIENT, ["reads the client's secret and its tokens; use https"]),
        ((*ASKING, "--oauth-token-url=https://id/t"), CLIENT, []),
        (("--security-protocol=SASL_SSL", "--sasl-mechanism=PLAIN"), LOGIN, []),
        ((*PLAIN, *OPEN), LOGIN, ["use SASL_SSL", "http_token_for=all"]),
    ],
)
def test_what_is_left_open_to_others_is_told(
    flags: tuple[str, ...], variables: dict[str, str], told: list[str]
) -> None:
    said = list(load(RunSettings, flags, "run", variables).exposures())
    assert len(said) == len(told)
    assert all(part in sentence for part, sentence in zip(told, said, strict=True))
    assert "hunter2" not in repr(said)
