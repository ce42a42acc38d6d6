"""Writes docs/settings.md, docs/metrics.md and docs/schemas from what the package has of them: `make docs`."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, get_origin

from pydantic import AfterValidator, SecretStr, TypeAdapter
from pydantic.fields import FieldInfo

from worker.core.schemas import SCHEMAS, indented
from worker.settings.base import PREFIX, SECRETS, Settings
from worker.settings.commands import (
    BenchSettings,
    ClassifySettings,
    DemoSettings,
    EvaluateSettings,
    ReplaySettings,
    SchemaSettings,
    TrainSettings,
)
from worker.settings.run import RunSettings
from worker.telemetry.metrics import IN_FORCE, MAX_LABELS, OTHER, Metrics
from worker.telemetry.metrics import PREFIX as METRIC

FOLDER: Final = Path(__file__).parent
NOTE: Final = "<!-- Written by `make docs` from {source}: change that, and what docs/reference.py says, not this. -->"
NONE: Final = "–"

SETTINGS_HEAD: Final = """# Settings

Each setting has one name, which makes its flag, its variable and its key in a file of settings (TOML):

```sh
sentiment-worker run --max-batch-texts 256
WORKER_MAX_BATCH_TEXTS=256 sentiment-worker run
echo 'max_batch_texts = 256' >worker.toml && sentiment-worker run --config worker.toml
```

A flag goes before a variable, a variable before the file. `WORKER_CONFIG` can name the file too. An unknown flag or key is
an error; an unknown `WORKER_…` variable is a warning, for Kubernetes sets some of its own; either names the setting that is
most like it. Names are written as here, in this case. A wrong value ends the start with exit code 2 and a sentence.
`run --help` shows flags, defaults and meanings in a terminal.

An empty variable (`${X:-}` in a compose file) sets nothing, but an empty secret, or an empty file for one, is an error. So is
an empty flag or key. No setting takes control characters, such as the carriage
return that a Windows text file leaves at the end of each line, and no name or path takes white space at its ends or invisible
characters. A list (topics, brokers, reasons) names each thing once.

The secrets (`http_token`, `oauth_client_secret`, `sasl_password`, `schema_registry_password`, `schema_registry_token`, `ssl_key_password`) have no flag, for other users of a machine see flags, and are refused
in the file of settings. They come from their variable, or from the file that the variable ending in `_FILE` names, which is
[read again when it changes](operating.md#passwords-and-certificates-that-change). They are never printed.
"""

# In the order in which somebody sets up a worker.
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "Brokers": ("bootstrap_servers", "client_id", "client_rack", "request_timeout_ms", "fetch_max_wait_ms"),
    "Login and encryption": (
        "security_protocol",
        "sasl_mechanism",
        "sasl_username",
        "sasl_password",
        "ssl_cafile",
        "ssl_certfile",
        "ssl_keyfile",
        "ssl_key_password",
        "oauth_token_url",
        "oauth_client_id",
        "oauth_client_secret",
        "oauth_scope",
        "oauth_audience",
        "oauth_ca_file",
        "oauth_token_file",
        "oauth_extensions",
    ),
    "Schema registry": (
        "schema_registry_url",
        "schema_registry_user",
        "schema_registry_password",
        "schema_registry_token",
        "schema_registry_ca_file",
        "schema_auto_register",
    ),
    "Topics and group": (
        "input_topics",
        "input_pattern",
        "output_topic",
        "dead_letter_topic",
        "group_id",
        "group_instance_id",
        "session_timeout_ms",
        "auto_offset_reset",
        "since",
        "until",
        "isolation_level",
    ),
    "Delivery": ("delivery", "transaction_ms", "drain_timeout_s", "dead_letter_limit", "dead_letter_window"),
    "Events and results": (
        "input_format",
        "text_field",
        "on_null_text",
        "max_age_s",
        "id_field",
        "max_text_chars",
        "output_mode",
        "output_format",
        "result_timestamp",
        "compression_type",
    ),
    "Model": (
        "model",
        "revision",
        "model_labels",
        "label_scores",
        "activation",
        "threshold",
        "normalize",
        "long_text",
        "max_windows",
        "device",
        "dtype",
        "backend",
        "cpu_threads",
        "inference_timeout_s",
    ),
    "Batches": (
        "max_batch_texts",
        "linger_ms",
        "max_batch_tokens",
        "cuda_pass",
        "cache_size",
        "max_unpacked_bytes",
    ),
    "HTTP and console": ("http_host", "http_port", "http_names", "http_token", "http_token_for", "console_texts"),
    "Logs, traces and settings": ("log_level", "log_format", "tracing", "config"),
}
OTHERS: Final = "Others"
UNITS: Final = {  # by a setting's name, or how it ends
    "max_batch_texts": "records",
    "_ms": "ms",
    "_s": "s",
    "_bytes": "bytes",
    "_chars": "characters",
    "_texts": "texts",
    "_tokens": "tokens",
    "_threads": "threads",
    "_window": "records",
    "_windows": "windows",
    "_size": "texts",
    "_limit": "share",
    "_masking": "share",
    "seconds": "s",
    "rate": "events/s",
    "threads": "threads",
}
KINDS: Final[dict[str, type[Settings]]] = {
    "check": RunSettings,
    "replay": ReplaySettings,
    "classify": ClassifySettings,
    "bench": BenchSettings,
    "evaluate": EvaluateSettings,
    "train": TrainSettings,
    "schema": SchemaSettings,
    "demo": DemoSettings,
}
WRONG: Final = ".."  # for each text that has to be something: its validator says what
PLAIN: Final = {"string": "text", "integer": "whole number", "number": "number", "path": "path"}

METRICS_HEAD: Final = """# Metrics

`/metrics` serves these in Prometheus' text format, beside those of the process, Python and its garbage collector
(`process_…`, `python_…`). All names begin with `sentiment_worker_`. Times are in seconds since 1970 or in seconds, sizes in
bytes. A partition's series go when the partition is given up. Counters count what has been acknowledged by Kafka, with
`delivery=exactly-once` what has been committed. Series with a closed list of labels are there from the start, at 0.

The dashboard in `deploy/grafana` shows each of them; [what each alert means](operating.md#alerts) is in the operating guide.
"""

# In the order in which an operator asks. How to read each; what it is, its type, labels and buckets come from the code.
READING: Final[dict[str, dict[str, str]]] = {
    "Is it working?": {
        "ready": "0: ask `/readyz` for the reason. The sum over all workers is how many take part.",
        "assigned_partitions": "0 on a ready worker: it is a spare, for there are more workers than partitions. The sum has to be "
        "the number of input partitions.",
        "records_consumed_total": "`rate()` of it is the throughput. It is the sum of results, dead letters, tombstones and "
        "skipped records.",
        "results_published_total": "`rate()` by `label` is the mix of labels; its sum is the results per second. A series that no "
        "longer rises may be of a label that only the model before the last reload has.",
        "inference_last_success_timestamp_seconds": 'Old while `queue_depth{stage="tokenized"}` is above 0: inference is '
        "stuck. Old without waiting texts: there is nothing to do, or the cache answers all.",
    },
    "Does it keep up?": {
        "consumer_lag_records": "Refreshed each second; no series while the end is not known. Growing: more events arrive than are scored. One partition alone: a "
        "hot key, or a stuck worker. Under read_committed the end is the last stable offset.",
        "consumer_lag_seconds": "How late results are, and so what to alert on. 0 when nothing waits, and until the first "
        "record that waits has been read. Timestamps more than a year old or in the future are ignored.",
        "queue_depth": "Which stage is slow. `tokenized` above 0 most of the time: the model; `scored`: publishing, before which up to "
        "four more micro-batches wait encoded; `gather` alone: the tokenizer. `gather` is full at twice `max_batch_texts`.",
        "end_to_end_seconds": "`histogram_quantile()` of it is the latency. It holds the time that an event waited in Kafka, "
        "and the difference between the producer's clock and this one.",
        "implausible_timestamps_total": "Above 0: a producer writes seconds or microseconds for milliseconds, its clock or this one is wrong, "
        "or the events are that old. Up to 1 s ahead is taken for two clocks that differ.",
        "stage_seconds": "Where the time goes. `wait` is the linger, longer where the stages after it are busy; `forward` is "
        "the model.",
    },
    "Are the batches full?": {
        "batch_texts": "Small at full load on a GPU: `max_batch_tokens` or `max_batch_texts` is too low. On a CPU passes are short: one "
        "ends where its padding would cost more than the next pass.",
        "batch_tokens": "On a GPU near `max_batch_tokens` at full load; far below it when there is little to do, and on a CPU. "
        "The padding to which a GPU's passes are rounded up is not counted.",
        "batch_padding_ratio": "Arithmetic that is lost to padding. Texts are sorted by length, so it is small where there is "
        "enough to sort; 0 for a GPU's passes without padding (`cuda_pass`).",
        "cache_hits_total": "Divided by `records_consumed_total`: the share of texts that need no model.",
    },
    "Do the texts suit the model?": {
        "texts_truncated_total": "Divided by the number of results: the share of texts that are scored only in part. If it is high "
        "with `long_text=truncate`, set `long_text=windows`; with `windows`, raise `max_windows`.",
        "tokens_total": "Texts that the cache answers are not counted, nor is the part of a text that is cut off.",
        "unknown_tokens_total": "Divided by `tokens_total`: the share of unknown tokens. If it rises, texts come in a language or "
        "script that the model does not know; if it is high from the start, the tokenizer may be the wrong one. It is always 0 for "
        "tokenizers that know every byte.",
    },
    "What do people say?": {
        "score": "Has no sum, for a sum that goes down would look like a restart. The dashboard takes the mean from "
        "the buckets. Results whose score is null are not counted.",
    },
    "What goes wrong?": {
        "dead_letters_total": "Stage `decode`: the producer or `text_field` is wrong; `infer`: the model fails; `publish`: "
        "the output topic refuses the result.",
        "tombstones_total": "A null with a key deletes in a compacted topic, so it goes on as it is.",
        "records_skipped_total": "`null`: somebody sends nulls without a key, which mean nothing, or null texts with "
        "`on_null_text=skip`. `too_old`: the worker is behind by more than `max_age_s`, or a clock is wrong.",
        "rebalances_total": "Each stops the whole group for a moment. A rolling update makes two for each worker.",
        "offset_resets_total": "Above 0: events were deleted before they were read, or an input topic was deleted and created again. See the log.",
        "duplicates_possible_total": "That many results may be there twice, besides those of killed processes, which count nothing. With exactly-once always 0.",
        "http_refusals_total": "`wrong_token`: somebody guesses, or has an old one; the log says who. `host`: a name that is "
        "not in `http_names`. `cross_site`: another site's page in somebody's browser. `no_token`: none was given; each "
        "browser begins so.",
        "kafka_errors_total": "A few at a broker's restart are normal. A steady rate is not; the log says why, once.",
    },
    "What is in use?": {
        "model_info": "Always 1; its labels are named as the settings, and say what `auto` has chosen. "
        "Two values of `revision` in a group: a reload is half done.",
        "http_changes_total": "Each has a line in the log that says who asked.",
        "model_reloads_total": "`failed` above 0: the old model goes on, and the log says why.",
        "inference_device_memory_bytes": "Of a GPU that several processes share, each shows its own.",
        "build_info": "Always 1; the label `version` says which.",
    },
}
METRICS: Final = Metrics("version")
MODELS_LABELS: Final = f"those of the model; where it has more than {MAX_LABELS}, the first {MAX_LABELS} and `{OTHER}`"
FREE_LABELS: Final = ("topic", "partition", "model", "revision", *IN_FORCE, "version")


def built() -> dict[Path, str]:
    """The text of each file that is generated."""
    return {FOLDER / "settings.md": settings_page(), FOLDER / "metrics.md": metrics_page(), **schemas()}


def schemas() -> dict[Path, str]:
    endings = {"json": "schema.json", "avro": "avsc"}
    return {
        FOLDER / "schemas" / f"{record}.{endings[format]}": indented(schema())
        for (record, format), schema in SCHEMAS.items()
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def code(*words: object) -> str:
    return ", ".join(f"`{word}`" for word in words)


# Settings.


def settings_page() -> str:
    parts = [NOTE.format(source="worker/settings"), SETTINGS_HEAD]
    for title, names in groups().items():
        parts += [f"## {title}\n", setting_table(RunSettings, names)]
    parts.append("## Other commands\n")
    for command, kind in KINDS.items():
        parts += [f"### {command}\n", *command_section(kind)]
    return "\n".join(parts)


def groups() -> dict[str, tuple[str, ...]]:
    """The settings of ``run``, by title; those that nobody has put into a group come last."""
    grouped = {name for names in GROUPS.values() for name in names}
    others = tuple(name for name in RunSettings.model_fields if name not in grouped)
    return {**GROUPS, **({OTHERS: others} if others else {})}


def command_section(kind: type[Settings]) -> list[str]:
    if kind is RunSettings:
        return ["Takes the settings of `run`.\n"]
    common = [name for name in kind.model_fields if _is_the_same(kind, name)]
    own = [name for name in kind.model_fields if name not in common]
    others = [name for name in common if name != "config"]
    shared = [f"Of the settings above: {code(*others)}.\n"] if others else []
    return [*shared, setting_table(kind, own)]


def _is_the_same(kind: type[Settings], name: str) -> bool:
    ours, theirs = kind.model_fields[name], RunSettings.model_fields.get(name)
    return theirs is not None and ours.default == theirs.default and ours.description == theirs.description


def setting_table(kind: type[Settings], names: Iterable[str]) -> str:
    head = ("setting", "flag, variable", "default", "unit", "allowed", "what it does")
    return table(head, (setting_row(name, kind.model_fields[name]) for name in names))


def setting_row(name: str, field: FieldInfo) -> tuple[str, ...]:
    return (
        code(name),
        set_by(name, field),
        default(field),
        unit(name, field),
        allowed(field),
        field.description or secret(name),
    )


def set_by(name: str, field: FieldInfo) -> str:
    variable = PREFIX + name.upper()
    if name in SECRETS:
        return code(variable, variable + "_FILE")
    words = {"texts": "TEXT …", "record": "RECORD"}
    return code(words.get(name) or f"--{(field.alias or name).replace('_', '-')}", variable)


def secret(name: str) -> str:
    return {
        "http_token": "a token for the HTTP server, sent as `Authorization: Bearer …`",
        "sasl_password": "the password of `sasl_username`",
        "schema_registry_password": "the password of `schema_registry_user`",
        "schema_registry_token": "a bearer token for the schema registry, sent as `Authorization: Bearer …`",
        "oauth_client_secret": "the secret of `oauth_client_id`",
        "ssl_key_password": "the password of `ssl_keyfile`, if it has one",
    }[name]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "has to be given"
    if isinstance(field.default, bool):
        return code(str(field.default).lower())
    return NONE if field.default in (None, []) else code(field.default)


def unit(name: str, field: FieldInfo) -> str:
    kinds = {kind for choice in _choices(field) if (kind := choice.get("type"))}
    if not kinds & {"integer", "number"}:
        return NONE
    return next((word for end, word in UNITS.items() if name == end or (end[0] == "_" and name.endswith(end))), NONE)


def allowed(field: FieldInfo) -> str:
    """In words, by the field's own schema and validators."""
    words = [word for choice in _choices(field) for word in _allowed(choice, field)]
    return " or ".join(dict.fromkeys(words))


def _choices(field: FieldInfo) -> list[dict[str, Any]]:
    schema = TypeAdapter(field.rebuild_annotation()).json_schema()
    choices: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return [choice for choice in choices if choice.get("type") != "null"]


def _allowed(choice: dict[str, Any], field: FieldInfo) -> list[str]:
    if "const" in choice or "enum" in choice:
        return [code(*choice.get("enum", [choice.get("const")]))]
    if choice["type"] == "boolean":
        return [code("true", "false")]
    if choice["type"] in ("integer", "number"):
        return [_range(choice)]
    if "pattern" in choice:
        return [code("auto", "cpu", "cuda", "cuda:N")]  # the one pattern that there is
    return [_requirement(field) or PLAIN["path" if choice.get("format") == "path" else "string"]]


def _requirement(field: FieldInfo) -> str:
    """What the field's own validator asks for; it takes a text, a list of them or a secret."""
    kinds = ([WRONG],) if get_origin(field.annotation) is list else (WRONG, SecretStr(WRONG))
    for validator, wrong in itertools.product(_validators(field), kinds):
        with contextlib.suppress(TypeError, AttributeError):  # it takes another kind
            try:
                validator(wrong)
            except ValueError as error:
                return str(error).removeprefix("it should be ").removesuffix(f", and {WRONG!r} is no pair")
    return ""


def _validators(field: FieldInfo) -> list[Callable[[Any], Any]]:
    validators = [item for item in field.metadata if isinstance(item, AfterValidator)]
    for argument in getattr(field.annotation, "__args__", ()):
        validators += [item for item in getattr(argument, "__metadata__", ()) if isinstance(item, AfterValidator)]
    return [item.func for item in validators]  # type: ignore[misc]


def _range(choice: dict[str, Any]) -> str:
    least, above = choice.get("minimum"), choice.get("exclusiveMinimum")
    most, below = choice.get("maximum"), choice.get("exclusiveMaximum")
    if least is not None and most is not None:
        return f"{least:,} to {most:,}"
    low = f"{least:,} or more" if least is not None else f"above {above:,}" if above is not None else ""
    high = f"at most {most:,}" if most is not None else f"below {below:,}" if below is not None else ""
    return ", ".join(part for part in (low, high) if part) or PLAIN[choice["type"]]


# Metrics.


def metrics_page() -> str:
    parts = [NOTE.format(source="worker/telemetry/metrics.py"), METRICS_HEAD]
    families = metric_rows()
    for title, names in sections(families).items():
        parts += [
            f"## {title}\n",
            table(("metric", "type", "what it is", "how to read it"), (families[n] for n in names)),
        ]
    parts += ["## Labels\n", table(("label", "of", "values"), label_rows()), "## Buckets\n"]
    parts.append(table(("histogram", "upper bounds"), bucket_rows()))
    return "\n".join(parts)


def sections(families: Iterable[str]) -> dict[str, list[str]]:
    known = {name for names in READING.values() for name in names}
    others = [name for name in families if name not in known]
    return {**{title: list(names) for title, names in READING.items()}, **({OTHERS: others} if others else {})}


def metric_rows() -> dict[str, tuple[str, str, str, str]]:
    """A row for each metric, by its name without the prefix."""
    reading = {name: text for names in READING.values() for name, text in names.items()}
    rows = {}
    for family in _families():
        name = _name(family)
        labels = _labels(family)
        shown = f"`{name}`" if not labels else f"`{name}{{{', '.join(labels)}}}`"
        rows[name] = (shown, family.type, family.documentation, reading.get(name, NONE))
    return rows


def label_rows() -> list[tuple[str, str, str]]:
    users: dict[str, dict[str, list[str]]] = {}
    for family in _families():
        for label in _labels(family):
            values = dict.fromkeys(sample.labels[label] for sample in family.samples)
            users.setdefault(label, {})[_name(family)] = list(values)
    rows = []
    for label, metrics in users.items():
        for values in dict.fromkeys(tuple(sorted(each)) for each in metrics.values()):
            of = [name for name, each in metrics.items() if tuple(sorted(each)) == values]
            is_free = label in FREE_LABELS or not values
            words = "any" if is_free else MODELS_LABELS if label == "label" else code(*metrics[of[0]])
            rows.append((code(label), code(*of), words))
    return rows


def bucket_rows() -> list[tuple[str, str]]:
    rows = []
    for family in _families():
        if family.type == "histogram":
            bounds = dict.fromkeys(sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket"))
            rows.append((code(_name(family)), ", ".join(f"{float(bound):g}" for bound in bounds if bound != "+Inf")))
    return rows


def _families() -> list[Any]:
    families = METRICS._registry.collect()
    return sorted(
        (family for family in families if family.name.startswith(METRIC)), key=lambda family: str(family.name)
    )


def _name(family: Any) -> str:
    return str(family.name).removeprefix(METRIC) + ("_total" if family.type == "counter" else "")


def _labels(family: Any) -> list[str]:
    """The names of a metric's labels; from its collector, for a metric may have no series yet."""
    collectors = METRICS._registry._collector_to_names
    (names,) = [getattr(each, "_labelnames", ()) for each in collectors if getattr(each, "_name", "") == family.name]
    return list(names)


if __name__ == "__main__":
    for path, text in built().items():
        path.write_text(text, encoding="utf-8")
