"""How long each query of the analysts' dashboard takes: `python -m benchmarks.analyst_queries`, with PostgreSQL installed.

Writes benchmarks/results/analyst_queries.{json,md}. A server of its own with the settings that it is installed with gets the
recipe's table with a day of results. The recipe's reader asks it every query as Grafana would, for ranges of 15 minutes to 7
days.
"""

import argparse
import json
import os
import statistics
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write
from tests.support.grafana_sql import View, queries
from tests.support.postgresql import PostgreSQL

RECIPE = Path(__file__).parents[1] / "deploy" / "recipes" / "postgresql"
END = datetime(2026, 11, 20, tzinfo=UTC)
TOPICS = ("posts", "reviews", "support")
# The range, and the width of a point that Grafana chooses for it on a chart of some 1,000 pixels.
RANGES = {
    "15 minutes": (timedelta(minutes=15), "1m"),
    "6 hours": (timedelta(hours=6), "1m"),
    "24 hours": (timedelta(hours=24), "2m"),
    "7 days": (timedelta(days=7), "10m"),
}
BESIDE = {
    "The topics to choose from": "SELECT topic FROM sentiment_topics ORDER BY 1",
    "The view sentiment_by_minute, by topic and hour": (
        "SELECT date_trunc('hour', minute), topic, sum(results), sum(negative) FROM sentiment_by_minute "
        "WHERE $__timeFilter(minute) GROUP BY 1, 2"
    ),
}
ALL = {"topic": TOPICS, "key": "", "by": "key"}
ONE_KEY = {**ALL, "key": "key-1"}
CASES = {name: (*times, ALL) for name, times in RANGES.items()} | {
    "24 hours of one key": (*RANGES["24 hours"], ONE_KEY),
}


def main() -> None:
    options = parsed_options()
    with closing(PostgreSQL()) as server:
        server.start()
        for name in ("schema.sql", "reader.sql"):
            server.run((RECIPE / name).read_text())
        began = time.perf_counter()
        fill(server, options)
        figures = {
            "machine": machine(None),
            "postgresql": server.run("SHOW server_version"),
            "rows": options.rows,
            "days": options.days,
            "keys": options.keys,
            "rounds": options.rounds,
            "fill_s": round(time.perf_counter() - began, 1),
            "megabytes": sizes(server),
            "load": os.getloadavg()[0],
            "milliseconds": measured(server, options.rounds),
        }
    write(options.name, figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="results in the table (default: 1000000)")
    parser.add_argument("--days", type=int, default=1, help="over which they are spread (default: 1)")
    parser.add_argument(
        "--keys", type=int, default=1_000, help="different keys; some are far more frequent (default: 1000)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times that each query is asked (default: 5)")
    parser.add_argument("--name", default="analyst_queries", help="of the files in results (default: analyst_queries)")
    return parser.parse_args()


def fill(server: PostgreSQL, options: argparse.Namespace) -> None:
    """Results in the order of their time, from 12 partitions; a tenth has no key. Ends with what autovacuum does later."""
    span = timedelta(days=options.days).total_seconds()
    server.run(f"""
        SELECT setseed(0);
        INSERT INTO sentiment SELECT
            (ARRAY{list(TOPICS)})[1 + n % {len(TOPICS)}], n % 12, n / 12,
            CASE WHEN random() < 0.9 THEN 'key-' || floor({options.keys} * random() ^ 3) END,
            'event-' || n, label, score, (1 - score) / 2, 0.4, (1 + score) / 2, false,
            'cointegrated/rubert-tiny-sentiment-balanced@0123456789ab', at, at + interval '40 ms'
        FROM (
            SELECT n, (ARRAY['negative', 'neutral', 'positive'])[1 + floor(3 * random())] AS label,
                round((2 * random() - 1)::numeric, 6)::float AS score,
                timestamptz '{END.isoformat()}' - ({options.rows} - n) * interval '1 second' * {span / options.rows} AS at
            FROM generate_series(1, {options.rows}) AS n
        ) AS made;
        VACUUM ANALYZE sentiment;
    """)


def sizes(server: PostgreSQL) -> dict[str, float]:
    names = {"table": "sentiment", "primary key": "sentiment_pkey"}
    names |= {f"index by {what}": f"sentiment_by_{what}_index" for what in ("minute", "key", "score")}
    return {what: int(server.run(f"SELECT pg_relation_size('{name}')")) / 1e6 for what, name in names.items()}


def measured(server: PostgreSQL, rounds: int) -> dict[str, dict[str, float]]:
    """The median of each query's planning and execution in milliseconds, by case; the first time is not counted."""
    found: dict[str, dict[str, float]] = {}
    for title, query in {**queries(), **BESIDE}.items():
        found[title] = {}
        for name, (length, interval, chosen) in CASES.items():
            explained = "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) " + View(
                END - length, END, interval, chosen
            ).expand(query)
            times = [milliseconds(server.run(explained, user="reader")) for _ in range(rounds + 1)]
            found[title][name] = round(statistics.median(times[1:]), 1)
    return found


def milliseconds(explained: str) -> float:
    (plan,) = json.loads(explained)
    return float(plan["Planning Time"] + plan["Execution Time"])


def table(figures: dict[str, Any]) -> str:
    lines = [
        f"Machine: {figures['machine']['cpu']}, {figures['machine']['cores']} cores. PostgreSQL {figures['postgresql']} "
        f"with its default settings and those of the recipe's reader; "
        f"{figures['rows']:,} results over {figures['days']} day(s), in {figures['keys']:,} keys "
        f"and {len(TOPICS)} topics, written in {figures['fill_s']} s. "
        + ", ".join(f"{what} {size:,.0f} MB" for what, size in figures["megabytes"].items())
        + f". Milliseconds, medians of {figures['rounds']}; a longer range than there are results has all of them. Other "
        f"programs shared the cores: the load was {figures['load']:.1f}.",
        "",
        f"| query | {' | '.join(CASES)} |",
        f"| --- {'| --- ' * len(CASES)}|",
    ]
    for title, times in figures["milliseconds"].items():
        lines.append(f"| {title} | {' | '.join(f'{times[name]:,.1f}' for name in CASES)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
