"""Writes sentiment-worker.json, Grafana's dashboard: rows in the order in which an operator asks.

`make dashboard`, or `python -m deploy.grafana.dashboard`. Needs the extra `deploy`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.models.dashboard import DataSourceRef, Threshold, ThresholdsMode, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.layout import STAT_HEIGHT, WIDTH, board, in_json, lines, stacked_by_label

FILE: Final = Path(__file__).with_name("sentiment-worker.json")
SOURCE: Final = DataSourceRef(type_val="prometheus", uid="$datasource")
CHART_HEIGHT: Final = 8

Queries = Mapping[str, str]  # legend → expression
Panel = stat.Panel | timeseries.Panel | heatmap.Panel


def metric(name: str, *matchers: str) -> str:
    """A metric of the workers that are chosen on top of the dashboard."""
    chosen = ('job=~"$job"', 'instance=~"$instance"')
    return f"sentiment_worker_{name}{{{', '.join((*chosen, *matchers))}}}"


def rate(name: str, *matchers: str) -> str:
    return f"rate({metric(name, *matchers)}[$__rate_interval])"


def total(expression: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"


def quantile(share: float, name: str, *by: str) -> str:
    return f"histogram_quantile({share}, {total(rate(f'{name}_bucket'), 'le', *by)})"


def mean(name: str, *by: str) -> str:
    return f"{total(rate(f'{name}_sum'), *by)} / {total(rate(f'{name}_count'), *by)}"


# The score's buckets are 0.1 wide from -1 to 1, and their mean is 1 minus the area under the cumulated shares: summed
# over the buckets' upper bounds, less half a bucket. The metric has no sum, for one that goes down looks like a restart.
BELOW_THE_LAST: Final = 'le!~"1[.]0|[+]Inf"'
IN_TIME: Final = 'le="5.0"'
MEAN_SCORE: Final = f"0.95 - 0.1 * {total(rate('score_bucket', BELOW_THE_LAST))} / {total(rate('score_count'))}"
LATE: Final = f"1 - {total(rate('end_to_end_seconds_bucket', IN_TIME))} / {total(rate('end_to_end_seconds_count'))}"
CHOSEN_START: Final = metric("ready").replace("sentiment_worker_ready", "process_start_time_seconds")
DEAD_LETTER_SHARE: Final = f"{total(rate('dead_letters_total'))} / {total(rate('records_consumed_total'))}"


def target(legend: str, expression: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).legend_format(legend).datasource(SOURCE)


def limits(*steps: tuple[float, str], below: str = "green") -> dashboard.ThresholdsConfig:
    """Each colour from its value up, and ``below`` under the first."""
    colours = [Threshold(color=below), *(Threshold(value=value, color=colour) for value, colour in steps)]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(colours)


def number(
    title: str, unit: str, expression: str, says: str, thresholds: dashboard.ThresholdsConfig | None = None
) -> stat.Panel:
    return (
        stat.Panel()
        .title(title)
        .description(says)
        .unit(unit)
        .datasource(SOURCE)
        .thresholds(thresholds or limits())
        .height(STAT_HEIGHT)
        .span(WIDTH // 6)
        .with_target(target("", expression))
    )


def chart(title: str, unit: str, queries: Queries, says: str, *, third: bool = False) -> timeseries.Panel:
    span = WIDTH // 3 if third else WIDTH // 2
    panel = lines(title, unit, says).datasource(SOURCE).min(0).height(CHART_HEIGHT).span(span)
    for legend, expression in queries.items():
        panel = panel.with_target(target(legend, expression))
    return panel


def is_it_working() -> Sequence[stat.Panel]:
    return (
        number(
            "Workers ready",
            "none",
            total(metric("ready")),
            "Of those that are scraped.",
            limits((1, "green"), below="red"),
        ),
        number(
            "Events per second",
            "short",
            total(rate("records_consumed_total")),
            "Done: a result, a dead letter, a tombstone.",
        ),
        number(
            "Lag",
            "short",
            total(metric("consumer_lag_records")),
            "Events that are not done.",
            limits((10_000, "orange")),
        ),
        number(
            "Oldest event not done",
            "s",
            f"max({metric('consumer_lag_seconds')})",
            "Over all partitions.",
            limits((10, "orange"), (60, "red")),
        ),
        number(
            "Later than 5 s",
            "percentunit",
            LATE,
            "Share of the results; the objective allows 1 %.",
            limits((0.01, "orange"), (0.06, "red")),
        ),
        number(
            "Dead letters",
            "percentunit",
            DEAD_LETTER_SHARE,
            "Share of the events.",
            limits((0.01, "orange"), (0.1, "red")),
        ),
    )


def does_it_keep_up() -> Sequence[timeseries.Panel]:
    return (
        chart(
            "Throughput",
            "short",
            {
                "events": total(rate("records_consumed_total")),
                "results": total(rate("results_published_total")),
                "dead letters": total(rate("dead_letters_total")),
                "tombstones": total(rate("tombstones_total")),
                "skipped": total(rate("records_skipped_total")),
            },
            "Per second. Events = results + dead letters + tombstones + skipped.",
        ),
        chart(
            "Throughput of each worker",
            "short",
            {"{{instance}}": total(rate("records_consumed_total"), "instance")},
            "Events per second. One far below the others has few partitions, or a slow device.",
        ),
        chart(
            "Lag in records",
            "short",
            {
                "{{topic}} {{partition}}": total(metric("consumer_lag_records"), "topic", "partition"),
            },
            "End offset minus the next offset to commit, by partition.",
        ),
        chart(
            "Lag in seconds",
            "s",
            {
                "{{topic}} {{partition}}": f"max by (topic, partition) ({metric('consumer_lag_seconds')})",
            },
            "Age of the oldest event that is not done, by partition.",
        ),
    )


def how_late() -> Sequence[timeseries.Panel]:
    return (
        chart(
            "End to end",
            "s",
            {
                "p50": quantile(0.5, "end_to_end_seconds"),
                "p95": quantile(0.95, "end_to_end_seconds"),
                "p99": quantile(0.99, "end_to_end_seconds"),
            },
            "From an event's timestamp to its acknowledged result.",
        ),
        chart(
            "Stage times, p95",
            "s",
            {"{{stage}}": quantile(0.95, "stage_seconds", "stage")},
            "Of a micro-batch. The stages overlap: the slowest one, not their sum, is the limit.",
        ),
        chart(
            "Records waiting before each stage",
            "short",
            {"{{stage}}": total(metric("queue_depth"), "stage")},
            "The stage after the last full queue is the slow one: gather → tokenize → forward → publish.",
            third=True,
        ),
        chart("Stage times, mean", "s", {"{{stage}}": mean("stage_seconds", "stage")}, "Of a micro-batch.", third=True),
        chart(
            "Answered from the cache",
            "percentunit",
            {
                "share": f"{total(rate('cache_hits_total'))} / {total(rate('records_consumed_total'))}",
            },
            "Repeated texts, as a share of the events.",
            third=True,
        ),
    )


def how_full() -> Sequence[timeseries.Panel]:
    return (
        chart(
            "Texts in a device batch",
            "short",
            {
                "p50": quantile(0.5, "batch_texts"),
                "p95": quantile(0.95, "batch_texts"),
                "mean": mean("batch_texts"),
            },
            "One pass of the model.",
            third=True,
        ),
        chart(
            "Tokens in a device batch",
            "short",
            {
                "p50": quantile(0.5, "batch_tokens"),
                "p95": quantile(0.95, "batch_tokens"),
                "mean": mean("batch_tokens"),
            },
            "Padding included.",
            third=True,
        ),
        chart(
            "Padding",
            "percentunit",
            {
                "p50": quantile(0.5, "batch_padding_ratio"),
                "p95": quantile(0.95, "batch_padding_ratio"),
                "mean": mean("batch_padding_ratio"),
            },
            "Share of a device batch that is no text.",
            third=True,
        ),
        chart(
            "Do the texts suit the model?",
            "percentunit",
            {
                "texts cut": f"{total(rate('texts_truncated_total'))} / {total(rate('results_published_total'))}",
                "unknown tokens": f"{total(rate('unknown_tokens_total'))} / {total(rate('tokens_total'))}",
            },
            "Texts of which a part was not scored, and tokens that the tokenizer does not know.",
            third=True,
        ),
    )


def what_do_people_say() -> Sequence[Panel]:
    mix = chart(
        "Label mix",
        "percentunit",
        {"{{label}}": total(rate("results_published_total"), "label")},
        "Share of each label.",
        third=True,
    )
    score = chart(
        "Mean score",
        "short",
        {"score": MEAN_SCORE},
        "From −1, negative, to 1, positive; from buckets, right to 0.05. Empty where no label has a weight (label_scores).",
        third=True,
    )
    spread = (
        heatmap.Panel()
        .title("Scores")
        .description("How many results have which score.")
        .datasource(SOURCE)
        .height(CHART_HEIGHT)
        .span(WIDTH // 3)
        .with_target(target("{{le}}", total(rate("score_bucket"), "le")).format(PromQueryFormat.HEATMAP))
    )
    return stacked_by_label(mix).max(1), score.min(-1).max(1).decimals(2), spread


def what_goes_wrong() -> Sequence[timeseries.Panel]:
    return (
        chart(
            "Dead letters by reason",
            "short",
            {
                "{{stage}}: {{reason}}": total(rate("dead_letters_total"), "stage", "reason"),
                "results with an implausible timestamp": total(rate("implausible_timestamps_total")),
            },
            "Per second. decode is the producer's, infer the model's, publish the output topic's. Implausible: more than a "
            "year old or in the future.",
        ),
        chart(
            "Rebalances",
            "short",
            {"{{instance}}": total(f"increase({metric('rebalances_total')}[$__rate_interval])", "instance")},
            "Assignments received. One for each worker that comes, goes or restarts.",
        ),
        chart(
            "Failed operations on Kafka",
            "short",
            {"{{operation}}": total(rate("kafka_errors_total"), "operation")},
            "Per second. Each is tried again.",
            third=True,
        ),
        chart(
            "Assigned partitions",
            "short",
            {"{{instance}}": total(metric("assigned_partitions"), "instance")},
            "Together as many as the input topics have.",
            third=True,
        ),
        chart(
            "Lost offsets, possible duplicates",
            "short",
            {
                "offset resets": total(f"increase({metric('offset_resets_total')}[$__rate_interval])"),
                "possible duplicates": total(f"increase({metric('duplicates_possible_total')}[$__rate_interval])"),
            },
            "Both should be 0 but for crashes.",
            third=True,
        ),
        chart(
            "Restarts",
            "short",
            {"{{instance}}": f"changes({CHOSEN_START}[$__rate_interval])"},
            "Of a process at the same address. Its log's last line and its exit code say why.",
        ),
        chart(
            "HTTP requests refused, and changes accepted",
            "short",
            {
                "{{reason}}": total(f"increase({metric('http_refusals_total')}[$__rate_interval])", "reason"),
                "changes accepted": total(f"increase({metric('http_changes_total')}[$__rate_interval])"),
            },
            "The log says who asked.",
        ),
    )


def what_does_it_use() -> Sequence[timeseries.Panel]:
    process = '{job=~"$job", instance=~"$instance"}'
    return (
        chart(
            "Device memory",
            "bytes",
            {"{{instance}}": metric("inference_device_memory_bytes")},
            "0 on a CPU.",
            third=True,
        ),
        chart("Memory", "bytes", {"{{instance}}": f"process_resident_memory_bytes{process}"}, "Resident.", third=True),
        chart(
            "CPU",
            "short",
            {"{{instance}}": f"rate(process_cpu_seconds_total{process}[$__rate_interval])"},
            "Cores in use.",
            third=True,
        ),
        chart(
            "Seconds since the model last answered",
            "s",
            {
                "{{instance}}": f"time() - {metric('inference_last_success_timestamp_seconds')}",
            },
            "Grows where no text comes, too.",
            third=True,
        ),
        chart(
            "Models",
            "short",
            {
                "{{model}}@{{revision}} {{device}} {{dtype}}": total(
                    metric("model_info"), "model", "revision", "device", "dtype"
                ),
            },
            "Workers with each model.",
            third=True,
        ),
        chart(
            "Versions and reloads",
            "short",
            {
                "{{version}}": total(metric("build_info"), "version"),
                "reload {{outcome}}": total(f"increase({metric('model_reloads_total')}[$__rate_interval])", "outcome"),
            },
            "Workers of each version; checkpoints loaded in the place of another.",
            third=True,
        ),
    )


ROWS: Final[Mapping[str, Callable[[], Sequence[Panel]]]] = {
    "Is it working?": is_it_working,
    "Does it keep up?": does_it_keep_up,
    "How late are the results, and where does the time go?": how_late,
    "Are the device batches full?": how_full,
    "What do people say?": what_do_people_say,
    "What goes wrong?": what_goes_wrong,
    "What does it use?": what_does_it_use,
}


def choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .all_value(".*")
        .multi(True)
    )


def built() -> str:
    """The dashboard as JSON."""
    made = (
        board("sentiment-worker", "prometheus")
        .description("Kafka → sentiment → Kafka: is it working, does it keep up, what do people say.")
        .tags(["sentiment-worker", "kafka"])
        .refresh("10s")
        .time("now-1h", "now")
        .with_variable(choice("job", "Job", "label_values(sentiment_worker_ready, job)"))
        .with_variable(choice("instance", "Worker", 'label_values(sentiment_worker_ready{job=~"$job"}, instance)'))
    )
    return in_json(made, ROWS)


if __name__ == "__main__":
    FILE.write_text(built(), encoding="utf-8")
