"""The worker's last minutes for the console: its metrics, read once a second, as rates, shares and quantiles."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter, Gauge, Histogram

from worker.telemetry.metrics import QUEUES, STAGES, Metrics

HISTORY_S: Final = 300
RATE_S: Final = 5  # seconds that a rate is taken over, because micro-batches come in lumps
WINDOW_S: Final = 10  # seconds that a quantile, a share or a mean is taken over


class Sample(NamedTuple):
    """One second. A value is None where there was nothing to measure: no result, or no partition."""

    at: int
    """Seconds since 1970."""
    events_per_s: float
    lag_records: float | None
    """Also None while the lag of a partition is not known; so is the next one."""
    lag_s: float | None
    p50_ms: float | None
    p95_ms: float | None
    score: float | None
    """The mean of the results that have one."""
    labels: dict[str, float]
    """Results a second of each label; those without any are left out."""


class _Totals(NamedTuple):
    at: float
    consumed: float
    labels: dict[str, float]
    scored: int
    scores: float
    latencies: NDArray[np.int64]


class RollingStatistics:
    """Use it from the event loop; nothing blocks. ``clock`` in seconds, ``now`` in seconds since 1970."""

    def __init__(
        self, metrics: Metrics, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._now = now
        self._totals = deque([self._read()], maxlen=WINDOW_S + 1)
        self._stages: deque[dict[str, tuple[float, float]]] = deque(maxlen=WINDOW_S + 1)
        self._lags: list[tuple[str, int, float]] = []  # topic, partition, records
        self._unknown = 0  # partitions whose lag is not known
        self._unknown_since: int | None = None
        self.history: deque[Sample] = deque(maxlen=HISTORY_S)

    def sample(self) -> Sample:
        """Reads the metrics, once a second. Takes a tenth of a millisecond, more with hundreds of partitions."""
        new = self._read()
        self._totals.append(new)
        recent = self._totals[max(0, len(self._totals) - 1 - RATE_S)]
        old = self._totals[0]
        scored = new.scored - old.scored
        bounds = 1000 * self._metrics.end_to_end_seconds.read()[0]
        latencies = new.latencies - old.latencies
        self._read_lags()
        is_known = self._lags and not self._unknown
        rates = {label: (count - old.labels.get(label, 0)) / (new.at - old.at) for label, count in new.labels.items()}
        sample = Sample(
            int(self._now()),
            round((new.consumed - recent.consumed) / (new.at - recent.at), 1),
            self._known_lag() if is_known else None,
            _rounded(max(_values(self._metrics.lag_seconds), default=None)) if is_known else None,
            _rounded(quantile(bounds, latencies, 0.5)),
            _rounded(quantile(bounds, latencies, 0.95)),
            _rounded((new.scores - old.scores) / scored if scored else None, 3),
            {label: round(rate, 2) for label, rate in rates.items() if rate},
        )
        self.history.append(sample)
        return sample

    def _read_lags(self) -> None:
        """Reads the lags that have a series; those that are not known have none."""
        samples = [sample for family in self._metrics.lag_records.collect() for sample in family.samples]
        self._lags = [(s.labels["topic"], int(s.labels["partition"]), s.value) for s in samples]
        self._unknown = max(0, int(_values(self._metrics.assigned_partitions)[0]) - len(self._lags))
        if not self._unknown:
            self._unknown_since = None
        elif self._unknown_since is None:
            self._unknown_since = int(self._now())

    def _known_lag(self) -> float:
        return sum(records for _, _, records in self._lags)

    def lag(self) -> dict[str, float | None]:
        """At the last sample: of how many partitions the lag is not known, since when, and the sum of the other lags."""
        return {"unknown": self._unknown, "since": self._unknown_since, "known": self._known_lag()}

    def partitions(self) -> str:
        """This process's partitions by topic, such as ``texts 0–3, 5``; empty while the lag of one is not known."""
        by_topic: dict[str, list[int]] = {}
        for topic, partition, _ in sorted(self._lags) if not self._unknown else ():
            by_topic.setdefault(topic, []).append(partition)
        return "; ".join(f"{topic} {ranges(numbers)}" for topic, numbers in by_topic.items())

    def stages_ms(self) -> dict[str, float | None]:
        """The mean time of a micro-batch in each stage over the last WINDOW_S calls, which are a second apart."""
        new = dict.fromkeys(STAGES, (0.0, 0.0))
        for stage, histogram in self._metrics.stage_seconds.items():
            new[stage] = _sum_and_count(histogram)
        self._stages.append(new)
        old = self._stages[0]
        means = {
            stage: (total - old[stage][0]) / (count - old[stage][1]) if count > old[stage][1] else None
            for stage, (total, count) in new.items()
        }
        return {stage: _rounded(None if mean is None else 1000 * mean) for stage, mean in means.items()}

    def queues(self) -> dict[str, float]:
        return {queue: _values(self._metrics.queue_depth[queue])[0] for queue in QUEUES}

    def dead_letters(self) -> dict[str, float]:
        """By reason, since the start; reasons that never occurred are left out."""
        samples = [sample for family in self._metrics.dead_letters.collect() for sample in family.samples]
        return {sample.labels["reason"]: sample.value for sample in samples if sample.value}

    def counts(self) -> dict[str, float]:
        """Since the start: what became of the records, and other totals."""
        metrics = self._metrics
        return {
            "consumed": sum(_values(metrics.records_consumed)),
            "results": sum(_values(metrics.results_published)),
            "dead_letters": sum(_values(metrics.dead_letters)),
            "tombstones": sum(_values(metrics.tombstones)),
            "skipped": sum(_values(metrics.records_skipped)),
            "partitions": sum(_values(metrics.assigned_partitions)),
            "rebalances": sum(_values(metrics.rebalances)),
            "cache_hits": sum(_values(metrics.cache_hits)),
        }

    def labels(self) -> list[str]:
        """The labels of the model in use that have a series each, in its order; ``other`` at the end where it has more."""
        return self._metrics.shown_labels

    def model(self) -> dict[str, str]:
        """The labels of the model in use; empty while the first is loading."""
        samples = [sample for family in self._metrics.model_info.collect() for sample in family.samples]
        return dict(samples[-1].labels) if samples else {}

    def _read(self) -> _Totals:
        metrics = self._metrics
        samples = [sample for family in metrics.results_published.collect() for sample in family.samples]
        labels = {sample.labels["label"]: sample.value for sample in samples}
        _, latencies, _ = metrics.end_to_end_seconds.read()
        _, scored, scores = metrics.score.read()
        consumed = sum(_values(metrics.records_consumed))
        return _Totals(self._clock(), consumed, labels, int(scored.sum()), scores, latencies.copy())


def quantile(bounds: NDArray[np.float64], counts: NDArray[np.int64], share: float) -> float | None:
    """A quantile of values counted in buckets, as Prometheus estimates it: values spread evenly within their bucket.

    At most the last bound; None where there are no values.
    """
    total = int(counts.sum())
    if not total:
        return None
    cumulated = counts.cumsum()
    place = int(cumulated.searchsorted(share * total))
    if place >= len(bounds):
        return float(bounds[-1])
    below = float(bounds[place - 1]) if place else 0.0
    before = float(cumulated[place] - counts[place])
    return below + (float(bounds[place]) - below) * (share * total - before) / float(counts[place])


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in few words: ``0–3, 5``."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _values(metric: Counter | Gauge) -> list[float]:
    return [sample.value for family in metric.collect() for sample in family.samples]


def _sum_and_count(histogram: Histogram) -> tuple[float, float]:
    found = {sample.name[-4:]: sample.value for family in histogram.collect() for sample in family.samples}
    return found["_sum"], found["ount"]


def _rounded(number: float | None, digits: int = 1) -> float | None:
    return None if number is None or not math.isfinite(number) else round(number, digits)
