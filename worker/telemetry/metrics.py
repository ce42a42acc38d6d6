"""Every metric of the worker. Cheap, safe from any thread, and nothing here blocks."""

import contextlib
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from worker.core.events import Stage
from worker.core.sentiment import LABELS
from worker.core.timestamps import MAX_AGE_S, MAX_CLOCK_SKEW_S
from worker.reasons import Reason, SkipReason

PREFIX = "sentiment_worker_"
STAGES = ("wait", "tokenize", "forward", "publish", "commit")
QUEUES = ("gather", "tokenized", "scored")
Refusal = Literal["no_token", "wrong_token", "host", "cross_site"]
OPERATIONS = ("connect", "consume", "read", "publish", "commit", "transaction", "lag")
# Settings whose values are labels of model_info.
IN_FORCE = ("device", "dtype", "backend", "cpu_threads", "max_batch_tokens", "max_batch_texts")
MAX_LABELS = 64  # of a model that have a series each; results with another label are counted under OTHER
OTHER = "other"
CONTENT_TYPE = CONTENT_TYPE_LATEST

disable_created_metrics()  # type: ignore[no-untyped-call]  # they are one more series for each counter, which nobody reads


class BatchHistogram(Collector):
    """A histogram that takes many values at once, for a fraction of what they would cost one by one."""

    def __init__(self, name: str, text: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._bounds = np.array(bounds, dtype=float)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0
        registry.register(self)

    def observe(self, values: Sequence[float] | NDArray[np.float64]) -> None:
        values = np.asarray(values, dtype=float)
        places = self._bounds.searchsorted(values)
        counts = self._counts + np.bincount(places, minlength=len(self._counts))
        self._counts, self._sum = counts, self._sum + float(values.sum())  # not in place: another thread may be reading

    def read(self) -> tuple[NDArray[np.float64], NDArray[np.int64], float]:
        """The buckets' upper bounds, the number of values in each and one more for those above all bounds, and the sum."""
        return self._bounds, self._counts, self._sum

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """A histogram of values that may be negative has no sum: where that goes down, rate() would see a restart."""
        family = HistogramMetricFamily(self._name, self._text)
        cumulated = self._counts.cumsum().tolist()
        for bound, count in zip([*map(floatToGoString, self._bounds.tolist()), "+Inf"], cumulated, strict=True):
            family.add_sample(f"{self._name}_bucket", {"le": bound}, count)
        family.add_sample(f"{self._name}_count", {}, cumulated[-1])
        if self._bounds[0] >= 0:
            family.add_sample(f"{self._name}_sum", {}, self._sum)
        yield family


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_TOKENS = tuple(2**power for power in range(4, 18))


class Metrics:
    """The worker's metrics, and those of the process, Python and its garbage collector, in a registry of their own."""

    def __init__(self, version: str) -> None:
        registry = self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(PREFIX + name, text, labels, registry=registry)

        def batch_histogram(name: str, text: str, bounds: Sequence[float]) -> BatchHistogram:
            return BatchHistogram(PREFIX + name, text, bounds, registry)

        def histogram(name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
            return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=registry)

        self.records_consumed = counter(
            "records_consumed_total", "Input records whose outcome has been acknowledged", ["topic"]
        )
        self.results_published = counter("results_published_total", "Results acknowledged by Kafka", ["label"])
        self.dead_letters = counter("dead_letters_total", "Dead letters acknowledged by Kafka", ["stage", "reason"])
        self.tombstones = counter("tombstones_total", "Nulls with a key, forwarded")
        self.records_skipped = counter(
            "records_skipped_total",
            "Nulls without a key, null texts with on_null_text=skip (null), and records older than max_age_s (too_old)",
            ["reason"],
        )
        self.score = batch_histogram("score", "Scores of the results, -1 to 1", [step / 10 for step in range(-10, 11)])
        self.batch_texts = histogram("batch_texts", "Texts, or windows of texts, in one pass of the model", _COUNTS)
        self.batch_tokens = histogram("batch_tokens", "Tokens in one pass of the model, padding included", _TOKENS)
        self.batch_padding_ratio = histogram(
            "batch_padding_ratio", "Share of padding in one pass of the model", [step / 20 for step in range(20)]
        )
        stage_seconds = histogram("stage_seconds", "Time of a micro-batch in each stage", _SECONDS, ["stage"])
        self.stage_seconds = {stage: stage_seconds.labels(stage) for stage in STAGES}
        self.end_to_end_seconds = batch_histogram(
            "end_to_end_seconds", "From the input record's timestamp to its acknowledged result", _SECONDS
        )
        self.implausible_timestamps = counter(
            "implausible_timestamps_total",
            "Results whose record is dated more than a year back or in the future: not in end_to_end_seconds",
        )
        queue_depth = gauge("queue_depth", "Records waiting before each stage", ["stage"])
        self.queue_depth = {stage: queue_depth.labels(stage) for stage in QUEUES}
        self.lag_records = gauge(
            "consumer_lag_records", "End offset minus the next offset to commit", ["topic", "partition"]
        )
        self.lag_seconds = gauge(
            "consumer_lag_seconds", "Age of the oldest record that is not committed", ["topic", "partition"]
        )
        self.assigned_partitions = gauge("assigned_partitions", "Partitions assigned to this process")
        self.rebalances = counter("rebalances_total", "Assignments received from the group")
        self.offset_resets = counter(
            "offset_resets_total", "Times an offset to resume from was gone, or of a topic deleted since"
        )
        self.duplicates_possible = counter(
            "duplicates_possible_total",
            "Records perhaps published twice: uncommitted when their partition was lost, or sent again in doubt",
        )
        self.kafka_errors = counter("kafka_errors_total", "Failed operations on Kafka", ["operation"])
        self.last_success = gauge("inference_last_success_timestamp_seconds", "When the model last answered")
        self.device_memory = gauge("inference_device_memory_bytes", "Device memory in use; 0 on CPU")
        self.texts_truncated = counter(
            "texts_truncated_total", "Texts of which a part was not scored, because they are too long"
        )
        self.tokens = counter("tokens_total", "Tokens of the texts that were tokenized, without special tokens")
        self.unknown_tokens = counter(
            "unknown_tokens_total", "Tokens counted in tokens_total that the tokenizer does not know"
        )
        self.cache_hits = counter(
            "cache_hits_total", "Texts answered without the model: scored before, or in the same micro-batch"
        )
        self.ready = gauge("ready", "1 when /readyz says ready")
        self.model_info = gauge(
            "model_info", "The loaded model, and what it runs with", ["model", "revision", *IN_FORCE]
        )
        self.reloads = counter("model_reloads_total", "Checkpoints loaded in the place of another", ["outcome"])
        self.http_refusals = counter(
            "http_refusals_total",
            "HTTP requests refused: with no token or a wrong one, for another host's name, by another site's page",
            ["reason"],
        )
        self.http_changes = counter("http_changes_total", "HTTP requests accepted that change something: reloads")
        gauge("build_info", "This build", ["version"]).labels(version).set(1)
        self.shown_labels: list[str] = []  # those that have a series each, of the model in use
        self._known_labels: set[str] = set()
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Creates series whose labels are known, because a rate over a series that appears later misses its first step."""
        self.set_labels(LABELS)
        for outcome in ("done", "failed"):
            self.reloads.labels(outcome)
        for refusal in get_args(Refusal):
            self.http_refusals.labels(refusal)
        for reason in get_args(Reason):
            self.dead_letters.labels(_STAGE_OF.get(reason, "decode"), reason)
        for skip_reason in get_args(SkipReason):
            self.records_skipped.labels(skip_reason)
        for operation in OPERATIONS:
            self.kafka_errors.labels(operation)

    def text(self) -> bytes:
        """All metrics in the format that ``CONTENT_TYPE`` names; takes a few milliseconds."""
        return generate_latest(self._registry)

    def device_batch(self, lengths: Sequence[int], *, is_padded: bool) -> None:
        """One pass of the model over texts of these lengths, in tokens; if it is padded, to the longest of them."""
        tokens = len(lengths) * max(lengths) if is_padded else sum(lengths)
        self.batch_texts.observe(len(lengths))
        self.batch_tokens.observe(tokens)
        self.batch_padding_ratio.observe(1 - sum(lengths) / tokens)

    def tokenized(self, tokens: int, unknown: int) -> None:
        """Texts of so many tokens have been tokenized; ``unknown`` of these are not in the vocabulary."""
        self.tokens.inc(tokens)
        self.unknown_tokens.inc(unknown)

    def inference_succeeded(self, now: float, memory_bytes: int) -> None:
        """The model has answered at ``now``, in seconds since 1970."""
        self.last_success.set(now)
        self.device_memory.set(memory_bytes)

    def set_model(self, name: str, revision: str, in_force: Mapping[str, str]) -> None:
        """The model in use from now on, with values for IN_FORCE. Removes the series of the model before."""
        self.model_info.clear()
        self.model_info.labels(name, revision, *(in_force[label] for label in IN_FORCE)).set(1)

    def set_labels(self, labels: Sequence[str]) -> None:
        """The labels of the model in use from now on, each with a series, from 0 on; those beyond MAX_LABELS share OTHER.

        The series of a label that only the model before has stays where it has counted results: it rises no more, and the
        sum over all labels stays the number of results.
        """
        beyond = [OTHER] if len(labels) > MAX_LABELS else []
        shown = list(dict.fromkeys([*labels[:MAX_LABELS], *beyond]))  # a label may itself be named so
        for family in self.results_published.collect():
            for sample in family.samples:
                if not sample.value and sample.labels["label"] not in shown:
                    self.results_published.remove(sample.labels["label"])
        for label in shown:
            self.results_published.labels(label)
        self._known_labels.update(shown)  # results of the model before may still be on their way
        self.shown_labels = shown

    def partitions(self) -> int:
        """How many partitions are assigned to this process."""
        return int(sum(sample.value for family in self.assigned_partitions.collect() for sample in family.samples))

    def consumed(self, topics: Iterable[str]) -> None:
        """The topics of records whose outcome has been acknowledged."""
        for topic, count in Tally(topics).items():
            self.records_consumed.labels(topic).inc(count)

    def published(self, labels: Iterable[str], scores: Sequence[float | None], seconds: Sequence[float]) -> None:
        """Acknowledged results: their labels, their scores or None, and the seconds since their records' timestamps.

        Seconds that cannot be right (see ``timestamps.age_s``) would spoil the sum for good, and are counted apart.
        """
        for label, count in Tally(labels).items():
            self.results_published.labels(label if label in self._known_labels else OTHER).inc(count)
        numbers = np.asarray(scores, dtype=float)  # None becomes NaN
        self.score.observe(numbers[~np.isnan(numbers)])
        ages = np.asarray(seconds, dtype=float)
        is_plausible = (ages >= -MAX_CLOCK_SKEW_S) & (ages <= MAX_AGE_S)
        self.implausible_timestamps.inc(len(ages) - int(is_plausible.sum()))
        self.end_to_end_seconds.observe(np.maximum(0.0, ages[is_plausible]))

    def dead_lettered(self, failures: Iterable[tuple[Stage, Reason]]) -> None:
        for (stage, reason), count in Tally(failures).items():
            self.dead_letters.labels(stage, reason).inc(count)

    def skipped(self, reasons: Iterable[SkipReason]) -> None:
        for reason, count in Tally(reasons).items():
            self.records_skipped.labels(reason).inc(count)

    def outcomes(self) -> dict[str, int]:
        """How many records were consumed since the start, and what became of them."""
        counters = {
            "consumed": self.records_consumed,
            "results": self.results_published,
            "dead_letters": self.dead_letters,
            "tombstones": self.tombstones,
            "skipped": self.records_skipped,
        }
        return {name: sum(int(s.value) for f in c.collect() for s in f.samples) for name, c in counters.items()}

    def lag(self, topic: str, partition: int, records: float, seconds: float) -> None:
        self.lag_records.labels(topic, partition).set(records)
        self.lag_seconds.labels(topic, partition).set(seconds)

    def forget_partition(self, topic: str, partition: int) -> None:
        """Removes the series of a partition that is no longer this process's."""
        for gauge in (self.lag_records, self.lag_seconds):
            with contextlib.suppress(KeyError):  # remove_by_labels would look through all series for each
                gauge.remove(topic, partition)


_STAGE_OF: dict[str, Stage] = {
    "inference_failed": "infer",
    "invalid_timestamp": "publish",
    "result_too_large": "publish",
    "key_required": "publish",
}
