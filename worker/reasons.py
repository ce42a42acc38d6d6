"""Why a record becomes a dead letter, or is skipped: closed lists that headers, metrics, settings and documents share."""

from typing import Literal

Reason = Literal[
    "invalid_json",
    "invalid_utf8",
    "not_an_object",
    "missing_text",
    "text_not_string",
    "empty_text",
    "too_large",
    "field_exists",
    "invalid_cloudevent",
    "unknown_schema",
    "invalid_avro",
    "inference_failed",
    "invalid_timestamp",
    "result_too_large",
    "key_required",
]
SkipReason = Literal["null", "too_old"]
