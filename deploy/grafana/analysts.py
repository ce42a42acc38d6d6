"""Writes sentiment-analysts.json: what people say, by topic and key, from the results in PostgreSQL.

`make dashboard`, or `python -m deploy.grafana.analysts`. Needs the extra `deploy`. The table and its indices are those of
deploy/recipes/postgresql/schema.sql.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from grafana_foundation_sdk.builders import dashboard, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models.dashboard import DataSourceRef, DynamicConfigValue, VariableRefresh

from deploy.grafana.layout import STAT_HEIGHT, WIDTH, board, in_json, lines, stacked_by_label

FILE: Final = Path(__file__).with_name("sentiment-analysts.json")
KIND: Final = "grafana-postgresql-datasource"
SOURCE: Final = DataSourceRef(type_val=KIND, uid="$datasource")
CHART_HEIGHT: Final = 9
MOST_SERIES: Final = 8
MOST_ROWS: Final = 50

Panel = stat.Panel | timeseries.Panel | table.Panel

# Grafana puts quotes around what somebody chose or typed (sqlstring), and doubles those within it.
CHOSEN: Final = "source_topic IN (${topic:sqlstring}) AND (${key:sqlstring} = '' OR record_key = ${key:sqlstring})"
IN_RANGE: Final = f"$__timeFilter(minute) AND {CHOSEN}"
DIMENSION: Final = "CASE ${by:sqlstring} WHEN 'topic' THEN source_topic ELSE coalesce(record_key, '(no key)') END"
SLICE: Final = "date_bin('$__interval', minute, timestamptz '2000-01-01 00:00:00+00')"
SHARE: Final = "avg((label = 'negative')::int)"


class Sql(Builder[Dataquery], Dataquery):
    """A query in SQL; the library has none for this data source."""

    def __init__(self, query: str, form: str) -> None:
        self._query = query
        self._form = form

    def build(self) -> Self:
        return self

    def to_json(self) -> dict[str, Any]:
        return {
            "datasource": SOURCE, "editorMode": "code", "format": self._form, "rawQuery": True, "rawSql": self._query,
            "refId": "A",
        }  # fmt: skip


def series_of_most(value: str) -> str:
    """A value over time for the topics or keys with the most results."""
    most = (
        f"SELECT {DIMENSION} AS dimension FROM sentiment WHERE {IN_RANGE} "
        f"GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT {MOST_SERIES}"
    )
    return (
        f"SELECT {SLICE} AS time, {DIMENSION} AS metric, {value} AS value FROM sentiment "
        f"WHERE {IN_RANGE} AND {DIMENSION} = ANY (ARRAY({most})) GROUP BY 1, 2 ORDER BY 1, 2"
    )


# A share's change between two slices of time counts as a jump from three standard errors on: by chance that is one of 370.
JUMPS: Final = f"""
WITH slices AS (
    SELECT
        {DIMENSION} AS dimension,
        date_bin(
            greatest('1 minute', ($__timeTo()::timestamptz - $__timeFrom()::timestamptz) / 24),
            minute, $__timeFrom()::timestamptz
        ) AS time,
        count(*)::float AS results,
        count(*) FILTER (WHERE label = 'negative')::float AS negative
    FROM sentiment WHERE {IN_RANGE} GROUP BY 1, 2
), pairs AS (
    SELECT *, lag(results) OVER earlier AS results_before, lag(negative) OVER earlier AS negative_before
    FROM slices WINDOW earlier AS (PARTITION BY dimension ORDER BY time)
), shares AS (
    SELECT
        *, negative / results AS share, negative_before / results_before AS share_before,
        (negative + negative_before) / (results + results_before) AS share_of_both
    FROM pairs WHERE results >= 30 AND results_before >= 30
)
SELECT time, dimension, share_before, share, share - share_before AS change, results FROM shares
WHERE abs(share - share_before) > 3 * sqrt(share_of_both * (1 - share_of_both) * (1 / results + 1 / results_before))
ORDER BY abs(share - share_before) DESC LIMIT {MOST_ROWS}
""".strip()


def number(title: str, unit: str, query: str, says: str) -> stat.Panel:
    return (
        stat.Panel()
        .title(title)
        .description(says)
        .unit(unit)
        .datasource(SOURCE)
        .height(STAT_HEIGHT)
        .span(WIDTH // 4)
        .with_target(Sql(query, "table"))
    )


def chart(title: str, unit: str, query: str, says: str, span: int = WIDTH // 2) -> timeseries.Panel:
    """A series for each value of the column `metric`, in slices of at least a minute."""
    panel = lines(title, unit, says).datasource(SOURCE).interval("1m").height(CHART_HEIGHT).span(span)
    return panel.with_target(Sql(query, "time_series"))


def listing(title: str, query: str, says: str, shares: Sequence[str] = (), span: int = WIDTH) -> table.Panel:
    """A table; columns in ``shares`` are shown as percentages."""
    panel = (
        table.Panel()
        .title(title)
        .description(says)
        .unit("short")
        .datasource(SOURCE)
        .height(CHART_HEIGHT)
        .span(span)
        .with_target(Sql(query, "table"))
    )
    for column in shares:
        panel = panel.override_by_name(column, [DynamicConfigValue("unit", "percentunit")])
    return panel


def at_a_glance() -> Sequence[stat.Panel]:
    now, before = "minute >= $__timeFrom()", "minute < $__timeFrom()"
    both = (
        "minute BETWEEN $__timeFrom()::timestamptz - ($__timeTo()::timestamptz - $__timeFrom()::timestamptz) "
        "AND $__timeTo()"
    )
    change = f"{SHARE} FILTER (WHERE {now}) - {SHARE} FILTER (WHERE {before})"
    return (
        number(
            "Results", "short", f"SELECT count(*) FROM sentiment WHERE {IN_RANGE}", "In the range, as chosen above."
        ),
        number("Negative", "percentunit", f"SELECT {SHARE} FROM sentiment WHERE {IN_RANGE}", "Share of the results."),
        number(
            "Negative, beside the range before",
            "percentunit",
            f"SELECT {change} FROM sentiment WHERE {both} AND {CHOSEN}",
            "The share minus that of the time before, which is as long. Empty where nothing was before.",
        ),
        number(
            "Mean score",
            "short",
            f"SELECT avg(score) FROM sentiment WHERE {IN_RANGE}",
            "From −1, negative, to 1, positive.",
        ),
    )


def what_do_people_say() -> Sequence[Panel]:
    mix = chart(
        "Labels",
        "short",
        f"SELECT {SLICE} AS time, label AS metric, count(*) AS value FROM sentiment "
        f"WHERE {IN_RANGE} GROUP BY 1, 2 ORDER BY 1, 2",
        "Share of each label.",
        WIDTH,
    )
    return (
        stacked_by_label(mix),
        chart(
            "Mean score over time",
            "short",
            series_of_most("avg(score)"),
            f"Of the {MOST_SERIES} with the most results.",
        ),
        chart(
            "Negative over time",
            "percentunit",
            series_of_most(SHARE),
            f"Share, of the {MOST_SERIES} with the most results.",
        ),
        listing(
            "Topics or keys",
            f"SELECT {DIMENSION} AS dimension, count(*) AS results, {SHARE} AS negative, "
            f"avg((label = 'positive')::int) AS positive, avg(score) AS mean_score FROM sentiment "
            f"WHERE {IN_RANGE} GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {MOST_ROWS}",
            f"The {MOST_ROWS} with the most results.",
            ("negative", "positive"),
        ),
    )


def where_to_look() -> Sequence[Panel]:
    return (
        listing(
            "Jumps in the negative share",
            JUMPS,
            "The range is cut into 24 slices, of at least a minute. A slice is listed if its share of negative results "
            "differs from that of the slice before by more than chance explains: three standard errors, of 30 results.",
            ("share_before", "share", "change"),
        ),
        listing(
            "The most negative",
            "SELECT coalesce(event_time, processed_at) AS time, source_topic AS topic, record_key AS key, id, label, score, "
            f"source_partition AS partition, source_offset AS offset FROM sentiment WHERE {IN_RANGE} "
            f"ORDER BY score LIMIT {MOST_ROWS}",
            "By score. Topic, partition and offset say where the text stands; the table has none.",
        ),
    )


ROWS: Final[Mapping[str, Callable[[], Sequence[Panel]]]] = {
    "At a glance": at_a_glance,
    "What do people say?": what_do_people_say,
    "Where should I look?": where_to_look,
}


def built() -> str:
    """The dashboard as JSON."""
    topics = (
        dashboard.QueryVariable("topic")
        .label("Topic")
        .datasource(SOURCE)
        .query("SELECT topic FROM sentiment_topics ORDER BY 1")
        .refresh(VariableRefresh.ON_DASHBOARD_LOAD)
        .include_all(True)
        .multi(True)
    )
    made = (
        board("sentiment-analysts", KIND)
        .description("What do people say, by topic and key, and where does it change? From the results in PostgreSQL.")
        .tags(["sentiment-worker", "postgresql"])
        .refresh("1m")
        .time("now-24h", "now")
        .with_variable(topics)
        .with_variable(dashboard.TextBoxVariable("key").label("Key (empty: all)").default_value(""))
        .with_variable(dashboard.CustomVariable("by").label("By").values("key,topic"))
    )
    return in_json(made, ROWS)


if __name__ == "__main__":
    FILE.write_text(built(), encoding="utf-8")
