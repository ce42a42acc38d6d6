"""Every metric by the name operators know it by, and series that come and go."""

import re
from typing import get_args

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from worker.core.sentiment import LABELS
from worker.reasons import Reason
from worker.telemetry.metrics import CONTENT_TYPE, IN_FORCE, PREFIX, QUEUES, STAGES, Metrics

NAMES = {  # name without prefix: type, labels
    "records_consumed_total": ("counter", {"topic"}),
    "results_published_total": ("counter", {"label"}),
    "dead_letters_total": ("counter", {"stage", "reason"}),
    "tombstones_total": ("counter", set()),
    "records_skipped_total": ("counter", {"reason"}),
    "score": ("histogram", set()),
    "batch_texts": ("histogram", set()),
    "batch_tokens": ("histogram", set()),
    "batch_padding_ratio": ("histogram", set()),
    "stage_seconds": ("histogram", {"stage"}),
    "end_to_end_seconds": ("histogram", set()),
    "implausible_timestamps_total": ("counter", set()),
    "queue_depth": ("gauge", {"stage"}),
    "consumer_lag_records": ("gauge", {"topic", "partition"}),
    "consumer_lag_seconds": ("gauge", {"topic", "partition"}),
    "assigned_partitions": ("gauge", set()),
    "rebalances_total": ("counter", set()),
    "offset_resets_total": ("counter", set()),
    "duplicates_possible_total": ("counter", set()),
    "kafka_errors_total": ("counter", {"operation"}),
    "inference_last_success_timestamp_seconds": ("gauge", set()),
    "inference_device_memory_bytes": ("gauge", set()),
    "texts_truncated_total": ("counter", set()),
    "tokens_total": ("counter", set()),
    "unknown_tokens_total": ("counter", set()),
    "cache_hits_total": ("counter", set()),
    "ready": ("gauge", set()),
    "model_reloads_total": ("counter", {"outcome"}),
    "http_refusals_total": ("counter", {"reason"}),
    "http_changes_total": ("counter", set()),
    "model_info": ("gauge", {"model", "revision", *IN_FORCE}),
    "build_info": ("gauge", {"version"}),
}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2.3")


def families(metrics: Metrics) -> dict[str, Metric]:
    """What /metrics tells of the worker itself, by full name without prefix, as a scraper reads it."""
    read = text_string_to_metric_families(metrics.text().decode())
    own = {family.name.removeprefix(PREFIX): family for family in read if family.name.startswith(PREFIX)}
    return {name + "_total" * (family.type == "counter"): family for name, family in own.items()}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """One series, None where there is none."""
    read = text_string_to_metric_families(metrics.text().decode())
    found = [each.value for family in read for each in family.samples if (each.name, each.labels) == (name, labels)]
    assert len(found) <= 1
    return found[0] if found else None


def own(metrics: Metrics, name: str, **labels: str) -> float | None:
    return value(metrics, "sentiment_worker_" + name, **labels)


def use_all(metrics: Metrics) -> None:
    """Gives every metric with labels a series."""
    metrics.records_consumed.labels("texts").inc()
    metrics.lag("texts", 0, 1, 2.0)
    metrics.kafka_errors.labels("commit").inc()
    metrics.set_model("m", "r", dict.fromkeys(IN_FORCE, "x"))


def test_the_metrics_are_those_of_the_contract(metrics: Metrics) -> None:
    use_all(metrics)
    described = {
        name: (family.type, set(family.samples[0].labels) - {"le"})
        for name, family in families(metrics).items()
        if not name.endswith("_created")
    }
    assert described == NAMES
    assert PREFIX == "sentiment_worker_"


def test_every_metric_says_what_it_is(metrics: Metrics) -> None:
    assert all(
        len(family.documentation) > 5 for name, family in families(metrics).items() if not name.endswith("_created")
    )


def test_the_process_and_python_are_measured_too(metrics: Metrics) -> None:
    text = metrics.text().decode()
    for name in ("process_resident_memory_bytes", "process_cpu_seconds_total", "python_info", "python_gc_collections"):
        assert re.search(f"^{name}", text, re.MULTILINE)
    assert CONTENT_TYPE.startswith("text/plain")


def test_two_workers_in_one_process_share_nothing(metrics: Metrics) -> None:
    other = Metrics("2")
    metrics.tombstones.inc()
    assert own(other, "tombstones_total") == 0
    assert own(other, "build_info", version="2") == 1


def test_a_partitions_series_go_when_it_is_forgotten(metrics: Metrics) -> None:
    metrics.lag("texts", 0, 5, 1.5)
    metrics.lag("texts", 1, 6, 2.5)
    metrics.lag("other", 0, 7, 3.5)
    assert own(metrics, "consumer_lag_records", topic="texts", partition="0") == 5
    assert own(metrics, "consumer_lag_seconds", topic="texts", partition="0") == 1.5
    metrics.forget_partition("texts", 0)
    metrics.forget_partition("texts", 0)
    metrics.forget_partition("texts", 99)
    for name, left in (("consumer_lag_records", [6, 7]), ("consumer_lag_seconds", [2.5, 3.5])):
        assert own(metrics, name, topic="texts", partition="0") is None
        assert own(metrics, name, topic="texts", partition="1") == left[0]
        assert own(metrics, name, topic="other", partition="0") == left[1]


def test_counters_with_closed_labels_begin_at_zero(metrics: Metrics) -> None:
    assert [own(metrics, "results_published_total", label=label) for label in LABELS] == [0, 0, 0]
    stages = dict.fromkeys(get_args(Reason), "decode")
    stages |= {
        "inference_failed": "infer",
        "invalid_timestamp": "publish",
        "result_too_large": "publish",
        "key_required": "publish",
    }
    for reason, stage in stages.items():
        assert own(metrics, "dead_letters_total", stage=stage, reason=reason) == 0
    assert len(
        [sample for sample in families(metrics)["dead_letters_total"].samples if sample.name.endswith("_total")]
    ) == len(get_args(Reason))


def test_stages_and_queues_have_their_series_from_the_start(metrics: Metrics) -> None:
    assert STAGES == ("wait", "tokenize", "forward", "publish", "commit")
    assert [own(metrics, "stage_seconds_count", stage=stage) for stage in STAGES] == [0] * len(STAGES)
    assert [own(metrics, "queue_depth", stage=stage) for stage in QUEUES] == [0] * len(QUEUES)


def test_a_device_batch_is_measured_with_its_padding(metrics: Metrics) -> None:
    metrics.device_batch([10, 6, 4], is_padded=True)
    assert own(metrics, "batch_texts_sum") == 3
    assert own(metrics, "batch_tokens_sum") == 30
    assert own(metrics, "batch_padding_ratio_sum") == pytest.approx(1 / 3)


def test_a_device_batch_without_padding_has_none(metrics: Metrics) -> None:
    metrics.device_batch([10, 6, 4], is_padded=False)
    assert own(metrics, "batch_tokens_sum") == 20
    assert own(metrics, "batch_padding_ratio_sum") == 0


def test_results_are_counted_by_label_with_score_and_time(metrics: Metrics) -> None:
    metrics.published(["negative", "positive", "negative"], [-0.95, 0.55, -0.85], [0.02, 0.03, 20.0])
    assert [own(metrics, "results_published_total", label=label) for label in LABELS] == [2, 0, 1]
    assert own(metrics, "score_count") == 3
    assert own(metrics, "score_bucket", le="-0.8") == 2
    assert own(metrics, "end_to_end_seconds_count") == 3
    assert own(metrics, "end_to_end_seconds_sum") == pytest.approx(20.05)
    assert own(metrics, "end_to_end_seconds_bucket", le="0.05") == 2


def test_ages_that_cannot_be_right_are_counted_apart(metrics: Metrics) -> None:
    metrics.published(["neutral"] * 5, [0.0] * 5, [1.5, 1_795_426_205.0, -7_200.0, -0.5, 366 * 86_400.0])
    assert own(metrics, "implausible_timestamps_total") == 3
    assert own(metrics, "end_to_end_seconds_count") == 2
    assert own(metrics, "end_to_end_seconds_sum") == 1.5


@pytest.mark.parametrize("score", [-1.0, 0.0, 1.0])
def test_every_score_has_a_bucket_of_its_own_end(score: float, metrics: Metrics) -> None:
    metrics.published(["neutral"], [score], [])
    assert own(metrics, "score_bucket", le=str(score)) == 1
    assert own(metrics, "score_bucket", le="1.0") == 1


def test_dead_letters_are_counted_by_stage_and_reason(metrics: Metrics) -> None:
    metrics.dead_lettered([("decode", "empty_text"), ("infer", "inference_failed"), ("decode", "empty_text")])
    assert own(metrics, "dead_letters_total", stage="decode", reason="empty_text") == 2
    assert own(metrics, "dead_letters_total", stage="infer", reason="inference_failed") == 1


def test_inference_says_when_it_last_answered(metrics: Metrics) -> None:
    metrics.inference_succeeded(1_795_428_000.5, 4096)
    assert own(metrics, "inference_last_success_timestamp_seconds") == 1_795_428_000.5
    assert own(metrics, "inference_device_memory_bytes") == 4096


def by_label(metrics: Metrics) -> dict[str, float]:
    family = next(each for each in metrics._registry.collect() if each.name.endswith("results_published"))
    return {sample.labels["label"]: sample.value for sample in family.samples}


def test_series_are_those_of_the_models_labels(metrics: Metrics) -> None:
    metrics.set_labels(["1 star", "5 stars"])
    assert by_label(metrics) == {"1 star": 0, "5 stars": 0}, "nothing was published with those of the start"
    metrics.published(["1 star", "1 star"], [None, None], [])
    metrics.set_labels(["toxic", "insult"])
    metrics.published(["toxic", "5 stars"], [0.5, None], [])
    assert by_label(metrics) == {"1 star": 2, "toxic": 1, "insult": 0, "5 stars": 1}, "one was still on its way"
    assert own(metrics, "score_count") == 1, "what has no score is not in the histogram"


def test_at_most_64_labels_have_a_series_of_their_own(metrics: Metrics) -> None:
    labels = [f"label {number}" for number in range(100)]
    metrics.set_labels(labels)
    metrics.published(labels, [None] * 100, [])
    assert by_label(metrics) == {**dict.fromkeys(labels[:64], 1), "other": 36}
    assert metrics.shown_labels == [*labels[:64], "other"]
    metrics.set_labels(["other", *labels])
    assert metrics.shown_labels == ["other", *labels[:63]], "a label of this name shares its series, and is there once"
