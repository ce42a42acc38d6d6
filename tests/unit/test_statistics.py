"""The last minutes in numbers, from metrics that count as the pipeline does."""

import numpy as np
import pytest

from worker.telemetry.metrics import Metrics
from worker.telemetry.statistics import HISTORY_S, RollingStatistics, quantile


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("test")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def statistics(metrics: Metrics, clock: Clock) -> RollingStatistics:
    return RollingStatistics(metrics, clock=clock, now=clock)


def test_a_steady_stream_is_its_rate(metrics: Metrics, clock: Clock, statistics: RollingStatistics) -> None:
    for _ in range(30):
        clock.now += 1
        metrics.consumed(["texts"] * 40)
        metrics.published(["negative"] * 10 + ["positive"] * 30, [-0.5] * 10 + [0.9] * 30, [0.02] * 40)
        sample = statistics.sample()
    assert sample.events_per_s == 40
    assert sample.labels == {"negative": 10, "positive": 30}, "labels without a result are left out"
    assert sample.score == pytest.approx(0.55)
    assert sample.p50_ms is not None
    assert sample.p95_ms is not None
    assert 10 < sample.p50_ms < sample.p95_ms <= 25
    assert sample.at == 1_030


def test_what_was_long_ago_is_forgotten(metrics: Metrics, clock: Clock, statistics: RollingStatistics) -> None:
    metrics.consumed(["texts"])
    metrics.published(["neutral"], [0.0], [5.0])
    for _ in range(20):
        clock.now += 1
        sample = statistics.sample()
    assert (sample.events_per_s, sample.labels, sample.score, sample.p50_ms) == (0, {}, None, None)


def test_the_mean_is_of_those_that_have_a_score(metrics: Metrics, clock: Clock, statistics: RollingStatistics) -> None:
    metrics.set_labels(["toxic", "insult"])
    metrics.published(["toxic", "insult"], [None, None], [])
    clock.now += 1
    sample = statistics.sample()
    assert (sample.score, sample.labels) == (None, {"toxic": 1, "insult": 1})
    assert statistics.labels() == ["toxic", "insult"]
    metrics.set_labels(["negative", "neutral", "positive"])
    metrics.published(["toxic", "positive"], [None, 0.5], [])
    clock.now += 1
    sample = statistics.sample()
    assert sample.score == 0.5
    assert sample.labels == {"toxic": 1, "insult": 0.5, "positive": 0.5}, "a second ago the model had other labels"


def test_lag_is_the_sum_of_records_and_the_oldest_age(
    metrics: Metrics, clock: Clock, statistics: RollingStatistics
) -> None:
    clock.now += 1
    assert statistics.sample()[2:4] == (None, None), "no partition, no lag"
    metrics.lag("texts", 0, 10, 1.5)
    metrics.lag("texts", 1, 5, 7.25)
    clock.now += 1
    assert statistics.sample()[2:4] == (15, 7.2)


def test_lag_is_not_known_while_that_of_one_partition_is_not(
    metrics: Metrics, clock: Clock, statistics: RollingStatistics
) -> None:
    metrics.assigned_partitions.set(2)
    metrics.lag("texts", 0, 10, 1.5)
    clock.now += 1
    assert statistics.sample()[2:4] == (None, None)
    clock.now += 1
    statistics.sample()
    assert statistics.lag() == {"unknown": 1, "since": 1_001, "known": 10}
    assert statistics.partitions() == ""
    metrics.lag("texts", 1, 5, 7.25)
    clock.now += 1
    assert statistics.sample()[2:4] == (15, 7.2)
    assert statistics.lag() == {"unknown": 0, "since": None, "known": 15}
    assert statistics.partitions() == "texts 0–1"


def test_partitions_are_told_by_topic_in_runs(metrics: Metrics, clock: Clock, statistics: RollingStatistics) -> None:
    for topic, partition in (("b", 7), ("a", 10), ("a", 2), ("a", 3), ("a", 4), ("b", 0)):
        metrics.lag(topic, partition, 0, 0)
    clock.now += 1
    statistics.sample()
    assert statistics.partitions() == "a 2–4, 10; b 0, 7"


def test_the_history_is_bounded(clock: Clock, statistics: RollingStatistics) -> None:
    for _ in range(HISTORY_S + 50):
        clock.now += 1
        statistics.sample()
    assert len(statistics.history) == HISTORY_S
    assert statistics.history[-1].at == int(clock.now)


def test_stages_are_means_of_the_last_seconds(metrics: Metrics, statistics: RollingStatistics) -> None:
    metrics.stage_seconds["forward"].observe(100)
    statistics.stages_ms()
    for seconds in (0.010, 0.030):
        metrics.stage_seconds["forward"].observe(seconds)
    stages = statistics.stages_ms()
    assert stages["forward"] == 20
    assert stages["publish"] is None


def test_dead_letters_are_counted_by_reason(metrics: Metrics, statistics: RollingStatistics) -> None:
    metrics.dead_lettered([("decode", "invalid_json"), ("decode", "invalid_json"), ("infer", "inference_failed")])
    assert statistics.dead_letters() == {"invalid_json": 2, "inference_failed": 1}
    assert statistics.counts()["dead_letters"] == 3


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [([0, 0, 0], 0.5, None), ([4, 0, 0], 0.5, 5.0), ([0, 10, 0], 0.5, 15.0), ([1, 1, 8], 0.95, 20.0)],
)
def test_quantiles_are_even_within_a_bucket(counts: list[int], share: float, expected: float | None) -> None:
    assert quantile(np.array([10.0, 20.0]), np.array(counts), share) == expected
