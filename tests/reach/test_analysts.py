"""The analysts' dashboard: each query asked of a real PostgreSQL, and its answer computed from the rows by hand."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pytest

from tests.support.component import available
from tests.support.grafana_sql import View, queries
from tests.support.postgresql import PostgreSQL

pytestmark = pytest.mark.reach

SCHEMA = Path(__file__).parents[2] / "deploy" / "recipes" / "postgresql" / "schema.sql"
END = datetime(2026, 11, 20, 12, tzinfo=UTC)
START = END - timedelta(hours=24)
TOPICS = ("posts", "it's")
QUERIES = queries()


class Result(NamedTuple):
    topic: str
    offset: int
    key: str | None
    label: str
    score: float | None
    at: datetime

    @property
    def is_negative(self) -> bool:
        return self.label == "negative"


def made() -> list[Result]:
    """Two days, of which the second is looked at. From its last third on, what has the key `b` is far more negative."""
    rng = random.Random(0)
    found = []
    for number in range(12_000):
        at = END - timedelta(seconds=2 * 86_400 * (number + 0.5) / 12_000)
        key = rng.choice(("a", "b", "o'c", None))
        is_worse = key == "b" and at > END - timedelta(hours=8)
        label = rng.choices(("negative", "neutral", "positive"), (8 if is_worse else 2, 3, 3))[0]
        score = round(rng.uniform(-1, 1), 6) if number % 50 else None
        found.append(Result(TOPICS[number % 3 % 2], number, key, label, score, at))
    return found


RESULTS = made()


@pytest.fixture(scope="module")
def database() -> Iterator[PostgreSQL]:
    server = available(PostgreSQL, "PostgreSQL")
    try:
        server.start().run(SCHEMA.read_text())
        rows = "\n".join("\t".join(map(column, row)) for row in map(columns, RESULTS))
        names = "source_topic, source_partition, source_offset, record_key, id, label, score, truncated, model"
        server.run(f"COPY sentiment ({names}, event_time, processed_at) FROM stdin;\n{rows}\n\\.\n")
        yield server
    finally:
        server.close()


def columns(row: Result) -> tuple[object, ...]:
    return row.topic, 0, row.offset, row.key, f"e{row.offset}", row.label, row.score, "f", "m@0", row.at, row.at


def column(value: object) -> str:
    return r"\N" if value is None else str(value)


Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def ask(database: PostgreSQL) -> Ask:
    """The rows of a panel, for what is chosen on top of the dashboard."""

    def ask(title: str, **chosen: Any) -> list[dict[str, Any]]:
        view = View(START, END, "30m", {"topic": TOPICS, "key": "", "by": "key", **chosen})
        return database.rows(view.expand(QUERIES[title]))

    return ask


def in_range(topics: tuple[str, ...] = TOPICS, key: str = "", start: datetime = START) -> list[Result]:
    """Those in the range's minutes, as far as they were chosen."""
    end = start + (END - START)
    return [
        row for row in RESULTS
        if start <= minute(row) <= end and row.topic in topics and (not key or row.key == key)
    ]  # fmt: skip


def minute(row: Result) -> datetime:
    return row.at.replace(second=0, microsecond=0)


def slice_of(row: Result) -> datetime:
    return minute(row).replace(minute=row.at.minute // 30 * 30)


def share(rows: list[Result]) -> float:
    return fmean(row.is_negative for row in rows)


def mean_score(rows: list[Result]) -> float:
    return fmean(row.score for row in rows if row.score is not None)


def grouped(rows: list[Result], by: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    groups: dict[Any, list[Result]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    return groups


def shown_key(row: Result) -> str:
    return row.key or "(no key)"


def as_series(rows: list[dict[str, Any]]) -> dict[tuple[datetime, str], float]:
    return {(datetime.fromisoformat(row["time"]), row["metric"]): row["value"] for row in rows}


@pytest.mark.parametrize("chosen", [{}, {"topic": ["it's"]}, {"key": "o'c"}], ids=str)
def test_the_numbers_at_a_glance(ask: Ask, chosen: dict[str, Any]) -> None:
    limits = {"topics": tuple(chosen.get("topic", TOPICS)), "key": chosen.get("key", "")}
    rows = in_range(**limits)
    before = [row for row in in_range(**limits, start=START - (END - START)) if minute(row) < START]
    expected = {
        "Results": len(rows),
        "Negative": share(rows),
        "Negative, beside the range before": share(rows) - share(before),
        "Mean score": mean_score(rows),
    }
    for title, value in expected.items():
        (answer,) = ask(title, **chosen)
        assert list(answer.values()) == [pytest.approx(value)], title


def test_the_labels_over_time(ask: Ask) -> None:
    expected = Counter((slice_of(row), row.label) for row in in_range())
    assert as_series(ask("Labels")) == expected


def test_score_and_share_over_time_by_key_and_by_topic(ask: Ask) -> None:
    for by, name in (("key", shown_key), ("topic", lambda row: row.topic)):
        groups = grouped(in_range(), lambda row, name=name: (slice_of(row), name(row)))
        series = [
            as_series(answer) for answer in (ask("Mean score over time", by=by), ask("Negative over time", by=by))
        ]
        assert series[0] == pytest.approx({place: mean_score(rows) for place, rows in groups.items()})
        assert series[1] == pytest.approx({place: share(rows) for place, rows in groups.items()})


def test_the_table_of_keys(ask: Ask) -> None:
    groups = grouped(in_range(), shown_key)
    answer = ask("Topics or keys")
    assert [row["dimension"] for row in answer] == sorted(groups, key=lambda key: (-len(groups[key]), key))
    for row in answer:
        rows = groups[row["dimension"]]
        assert row["results"] == len(rows)
        assert row["negative"] == pytest.approx(share(rows))
        assert row["positive"] == pytest.approx(fmean(one.label == "positive" for one in rows))
        assert row["mean_score"] == pytest.approx(mean_score(rows))


def test_the_most_negative(ask: Ask) -> None:
    expected = sorted((row for row in in_range() if row.score is not None), key=lambda row: row.score or 0)[:50]
    answer = ask("The most negative")
    assert [(row["topic"], row["offset"], row["score"]) for row in answer] == [
        (row.topic, row.offset, row.score) for row in expected
    ]


def test_a_jump_is_seen_where_the_share_changes_beyond_chance(ask: Ask) -> None:
    expected = []
    for key, rows in grouped(in_range(), shown_key).items():
        slices = sorted(grouped(rows, lambda row: (minute(row) - START) // timedelta(hours=1)).items())
        for (_, earlier), (number, later) in pairwise(slices):
            both = share(earlier + later)
            error = math.sqrt(both * (1 - both) * (1 / len(earlier) + 1 / len(later)))
            if min(len(earlier), len(later)) >= 30 and abs(share(later) - share(earlier)) > 3 * error:
                expected.append((key, START + timedelta(hours=number)))
    answer = ask("Jumps in the negative share")
    assert sorted((row["dimension"], datetime.fromisoformat(row["time"])) for row in answer) == sorted(expected)
    assert ("b", END - timedelta(hours=8)) in expected
