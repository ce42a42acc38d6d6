"""The demo's parts: what it sends, how it counts, what it shows, how its processes start and end."""

import dataclasses
import io
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.support.waiting import wait_for
from worker.commands import demo
from worker.commands.demo.counts import DemoCounts, Speed, WorkerCounts, discrepancies, summary
from worker.commands.demo.messages import BROKEN, Message, Review, endless_passes, one_pass, reviews
from worker.commands.demo.processes import DemoError
from worker.commands.demo.views import LinesView, LiveView, bar
from worker.core.decoder import Decoder
from worker.core.events import Event, Failure, Null
from worker.core.sentiment import LABELS
from worker.telemetry.metrics import Metrics
from worker.training.dataset import is_held_out

kafka = pytest.importorskip("confluent_kafka")

from worker.commands.demo import broker, processes, scenario  # noqa: E402  (they need confluent_kafka)

REVIEWS = [Review(f"Отзыв номер {n}", LABELS[n % 3]) for n in range(7)]


def options(**changes):
    return SimpleNamespace(**{"events": 20, "rate": 100.0, "plain": True, "keep_running": False, **changes})


# What is sent


def test_the_reviews_that_ship_are_real_and_held_out():
    shipped = reviews()
    assert len(shipped) >= 700
    assert {review.label for review in shipped} == set(LABELS)
    assert all(review.text.strip() and is_held_out(review.text) for review in shipped)


def test_a_pass_is_the_reviews_with_every_broken_record_among_them():
    messages = one_pass(REVIEWS, 100)
    assert [message.review for message in messages if message.review] == [REVIEWS[n % 7] for n in range(100)]
    broken = [place for place, message in enumerate(messages) if not message.review]
    assert len(broken) == len(BROKEN) == len(messages) - 100
    assert min(after - before for before, after in itertools.pairwise(broken)) > 5


@pytest.mark.parametrize("events", [1, 5, 700])
def test_no_two_messages_share_an_id(events):
    messages = one_pass(REVIEWS, events) + one_pass(REVIEWS, events, 1)
    assert len({message.id for message in messages}) == len(messages)


def test_endless_passes_follow_each_other():
    messages = endless_passes(REVIEWS, 10)
    passes = [next(messages) for _ in range(2 * (10 + len(BROKEN)))]
    assert passes == one_pass(REVIEWS, 10) + one_pass(REVIEWS, 10, 1)


def test_each_message_has_the_outcome_that_the_worker_gives_it():
    for message in one_pass(REVIEWS, 3):
        record = SimpleNamespace(
            topic="texts", partition=0, offset=0, timestamp=0, key=message.key, value=message.value, headers=[]
        )
        decoded = Decoder().decode(record)
        if isinstance(decoded, Event):
            assert (message.expected, message.id, message.review.text) == ("result", decoded.id, decoded.text)
        elif isinstance(decoded, Failure):
            assert message.expected == decoded.reason
        else:
            assert message.expected == {Null.TOMBSTONE: "tombstone", Null.SKIPPED: "skipped"}[decoded]


# How it is counted


def counts_of(messages):
    """The counts of messages that all had their expected outcome, after half a second each."""
    counts = DemoCounts()
    for message in messages:
        counts.sent(message, 1.0)
        counts.delivered += 1
        if message.expected == "result":
            counts.result(message.id, message.review.label, 0.25, 1.5)
        elif message.expected == "tombstone":
            counts.tombstone(message.id, 1.5)
        elif message.expected != "skipped":
            counts.dead_letter(message.id, message.expected, 1.5)
    return counts


@pytest.fixture
def counts():
    return counts_of(one_pass(REVIEWS, 30))


@pytest.fixture
def worker_counts():
    expected_outcomes = Counter(expected for expected, _ in BROKEN)
    dead = expected_outcomes.total() - expected_outcomes["tombstone"] - expected_outcomes["skipped"]
    return WorkerCounts(30 + len(BROKEN), 30, dead, expected_outcomes["tombstone"], expected_outcomes["skipped"])


def test_counts_where_all_went_well(counts, worker_counts):
    assert counts.delivered == worker_counts.consumed == worker_counts.sum == counts.came_out + counts.to_be_skipped
    assert counts.in_flight == 0
    assert counts.agreement == 1.0
    assert counts.latency(0.5) == counts.latency(0.95) == 0.5
    assert discrepancies(counts, worker_counts, worker_counts.consumed, 0) == []


@pytest.mark.parametrize("field", ["consumed", "results", "dead_letters", "tombstones", "skipped"])
@pytest.mark.parametrize("change", [-1, 1])
def test_each_number_that_is_off_is_found(counts, worker_counts, field, change):
    wrong = dataclasses.replace(worker_counts, **{field: getattr(worker_counts, field) + change})
    assert discrepancies(counts, wrong, worker_counts.consumed, 0)


def test_an_offset_that_is_not_committed_is_found(counts, worker_counts):
    assert discrepancies(counts, worker_counts, worker_counts.consumed - 1, 0) == [
        f"{worker_counts.consumed} events in, but the offsets committed sum to {worker_counts.consumed - 1}."
    ]


def test_a_worker_that_did_not_drain_is_found(counts, worker_counts):
    assert discrepancies(counts, worker_counts, worker_counts.consumed, 1) == [
        "The worker did not drain: it ended with exit code 1."
    ]


def test_a_second_result_is_found(counts, worker_counts):
    counts.result("review-1", "neutral", 0.0, 2.0)
    counted = dataclasses.replace(worker_counts, consumed=worker_counts.consumed + 1, results=worker_counts.results + 1)
    counts.delivered += 1
    assert discrepancies(counts, counted, counted.consumed, 0) == ["1 record came out twice or from nowhere."]


def test_an_event_that_never_came_out_is_found(counts, worker_counts):
    counts.sent(Message("late", b"k", b"{}", "missing_text"), 2.0)
    assert discrepancies(counts, worker_counts, worker_counts.consumed, 0) == ["1 of the events never came out."]


def test_a_review_that_became_a_dead_letter_is_found(counts, worker_counts):
    message = one_pass(REVIEWS, 1, 99)[-1]
    counts.sent(message, 2.0)
    counts.delivered += 1
    counts.dead_letter(message.id, "inference_failed", 2.1)
    counted = dataclasses.replace(
        worker_counts, consumed=worker_counts.consumed + 1, dead_letters=worker_counts.dead_letters + 1
    )
    assert discrepancies(counts, counted, counted.consumed, 0) == ["1 of the events: result → inference_failed."]


def test_the_worker_s_counts_are_read_from_its_metrics():
    metrics = Metrics("0")
    metrics.records_consumed.labels("texts").inc(10)
    metrics.records_consumed.labels("more").inc(2)
    metrics.results_published.labels("positive").inc(3)
    metrics.results_published.labels("negative").inc(4)
    metrics.dead_letters.labels("decode", "invalid_json").inc(2)
    metrics.tombstones.inc()
    metrics.records_skipped.labels("null").inc(2)
    worker_counts = WorkerCounts.parse(metrics.text().decode())
    assert worker_counts == WorkerCounts(consumed=12, results=7, dead_letters=2, tombstones=1, skipped=2)
    assert worker_counts.sum == 12


def test_counts_before_any_metric_are_empty():
    assert WorkerCounts.parse("") == WorkerCounts(0, 0, 0, 0, 0)


def test_the_speed_is_of_the_last_seconds():
    speed = Speed(window_s=5)
    assert speed.at(0, 0) == 0
    assert speed.at(1, 10) == 10
    assert speed.at(4, 100) == 25
    assert speed.at(6, 100) == 18


def test_the_latency_quantiles():
    counts = DemoCounts()
    assert counts.latency(0.5) == 0
    for n, message in enumerate(message for message in one_pass(REVIEWS, 100) if message.review):
        counts.sent(message, 0)
        counts.result(message.id, "neutral", 0.0, n + 1)
    assert (counts.latency(0.5), counts.latency(0.95), counts.latency(1.0)) == (51, 96, 100)


# What is seen


def test_the_summary_says_both_accounts_and_their_sum(counts, worker_counts):
    text = summary(counts, worker_counts, worker_counts.consumed)
    assert "42 events in = 30 results + 9 dead letters + 2 tombstones forwarded + 1 record skipped" in text
    assert ["offsets", "committed", "–", "42"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 24), (200, 50), (80, 17), (40, 17)])
def test_the_live_view_fits_its_terminal(counts, width, height):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    view = LiveView(console, counts, counts.delivered, ["metrics  http://127.0.0.1:1/metrics", "broker"])
    console.print(view.picture(1.0))
    lines = console.file.getvalue().splitlines()
    assert len(lines) <= height or width < 80
    assert max(map(len, lines)) <= width
    assert "http://127.0.0.1:1/metrics" in console.file.getvalue() or width < 80


def test_the_live_view_shows_labels_dead_letters_latency_and_texts(counts):
    console = Console(file=io.StringIO(), force_terminal=True, width=150, height=40, color_system=None)
    console.print(LiveView(console, counts, 42, ["metrics"]).picture(1.0))
    shown = console.file.getvalue()
    for part in ("42 of 42 events in", "negative", "9: 2 invalid_json", "p50 500 ms", "+0.250", "Отзыв номер 1", "█"):
        assert part in shown


def test_a_text_cannot_write_markup_or_break_lines(counts):
    message = one_pass([Review("[red]много\nстрок[/red]", "neutral")], 1, 50)[-1]
    counts.sent(message, 2.0)
    counts.result(message.id, "neutral", 0.0, 2.1)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=40, color_system=None)
    console.print(LiveView(console, counts, None, ["metrics"]).picture(3.0))
    assert "[red]много строк[/red]" in console.file.getvalue()


def test_without_a_terminal_a_line_comes_every_couple_of_seconds(counts):
    console = Console(file=io.StringIO(), width=80)
    with LinesView(console, counts, 50, ["metrics  http://127.0.0.1:1/metrics"]) as view:
        now = time.monotonic()
        for tenths in range(41):
            view.show(now + tenths / 10)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "metrics  http://127.0.0.1:1/metrics"
    assert len(lines) == 4
    assert "42 of 50 events in" in lines[1]
    assert "9 dead letters" in lines[1]


@pytest.mark.parametrize(("share", "width", "drawn"), [(0, 10, ""), (1, 4, "████"), (0.5, 1, "▌"), (0.38, 3, "█▏")])
def test_bars_are_drawn_in_eighths(share, width, drawn):
    assert bar(share, width) == drawn


# Its processes


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    assert demo.run(options()) == 2
    assert "sentiment-worker[demo]" in capsys.readouterr().err


def test_the_first_signal_asks_and_the_second_ends():
    before = signal.getsignal(signal.SIGTERM)
    with processes.Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_broker_has_its_topics_and_ends_with_whoever_started_it():
    with subprocess.Popen(
        [sys.executable, "-m", "worker.commands.demo.broker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        address = process.stdout.readline().strip()
        topics = kafka.Consumer({"bootstrap.servers": address, "group.id": "test"}).list_topics(timeout=60).topics
        assert set(broker.TOPICS) <= set(topics)
        process.stdin.close()
        assert process.wait(60) == 0


def test_a_broker_that_does_not_start_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DemoError, match="did not start"), processes.broker_process(tmp_path / "log"):
        pass


def test_a_worker_that_fails_is_told_with_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command = [sys.executable, "-c", "print('no such setting'); raise SystemExit(2)"]
    monkeypatch.setattr(scenario, "worker_command", lambda servers, port: command)
    assert demo.run(options()) == 1
    said = capsys.readouterr().err
    assert "ended by itself with exit code 2" in said
    assert "no such setting" in said
    (folder,) = tmp_path.iterdir()
    assert f"The logs of the broker and the worker are in {folder}.\n" in said
    assert {log.name for log in folder.iterdir()} == {"broker.log", "worker.log"}


def test_a_worker_that_is_never_ready_is_told_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "READY_S", 0.3)
    told = []
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with processes.worker_process(command, tmp_path / "log") as worker:
        with pytest.raises(DemoError, match="not ready within"):
            processes.wait_until_ready(worker, processes.free_port(), processes.Stop(), told.append)
    assert set(told) == {"it does not answer yet"}
    assert worker.returncode == -signal.SIGKILL


def test_a_worker_that_does_not_drain_is_told_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "DRAIN_S", 0.3)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(60)"
    with processes.worker_process([sys.executable, "-c", code], tmp_path / "log") as worker:
        wait_for((tmp_path / "log").read_text, "the process to have begun", every=0.02)
        with pytest.raises(DemoError, match="did not end within"):
            processes.drain(worker)
    assert worker.returncode == -signal.SIGKILL


def test_the_worker_gets_none_of_the_user_s_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKER_SECURITY_PROTOCOL", "SSL")
    code = "import os; print([name for name in os.environ if name.startswith('WORKER_')])"
    with processes.worker_process([sys.executable, "-c", code], tmp_path / "log") as worker:
        assert worker.wait(60) == 0
    assert (tmp_path / "log").read_text() == "[]\n"
