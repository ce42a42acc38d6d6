"""Checkpoints with other labels, from the worker to the console, and by the other commands."""

import csv
import json
import shutil
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.browser import Browser, chromium
from tests.support.checkpoint import Oracle, make_checkpoint
from tests.support.process import WorkerProcess, Workers, forked
from tests.support.topics import Kafka, Record, Topics
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka

MULTI: Mapping[str, object] = {"problem_type": "multi_label_classification"}
TEXTS = ["Какая гадость эта ваша заливная рыба!", "Отлично, спасибо", "никак", "Ну и ну", "да", "нет", "А вот и рыба"]


@dataclass(frozen=True)
class Shape:
    """A kind of checkpoint, the settings that it is used with, and what its results should then be."""

    labels: list[str]
    names: list[str]
    settings: dict[str, str] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    weights: list[float] | None = None

    def result(self, oracle: Oracle, text: str) -> dict[str, Any]:
        """The fields of a result that depend on the labels, with all digits."""
        logits = oracle.logits(text)
        powers = np.exp(logits)
        chances = powers / (1 + powers) if self.config else powers / powers.sum()
        fields = {
            "label": self.names[int(chances.argmax())],
            "score": None if self.weights is None else float(chances @ self.weights),
            "probabilities": dict(zip(self.names, chances.tolist(), strict=True)),
        }
        if "threshold" in self.settings:
            fields["labels"] = [name for name, chance in fields["probabilities"].items() if chance >= 0.5]
        return fields


STARS = [f"{number} star{'s' * (number > 1)}" for number in range(1, 6)]
TOXIC = ["non-toxic", "insult", "obscenity", "threat", "dangerous"]
SHAPES = {
    "toxicity": Shape(TOXIC, TOXIC, {"threshold": "0.5"}, MULTI),
    "stars": Shape(
        STARS, STARS, {"label_scores": "1 star=-1,2 stars=-0.5,4 stars=0.5,5 stars=1"}, weights=[-1, -0.5, 0, 0.5, 1]
    ),
    "renamed": Shape(
        ["LABEL_0", "LABEL_1", "LABEL_2"],
        ["negative", "neutral", "positive"],
        {"model_labels": "LABEL_0=negative,LABEL_1=neutral,LABEL_2=positive"},
        weights=[-1, 0, 1],
    ),
}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture
def folder(shape: Shape, tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return make_checkpoint(tmp_path / "model", labels=shape.labels, **shape.config)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with chromium(tmp_path / "profile") as browser:
        yield browser


def flags(shape: Shape) -> list[str]:
    return [word for name, value in shape.settings.items() for word in (f"--{name.replace('_', '-')}", value)]


def event(number: int, text: str) -> Record:
    return Record(json.dumps({"id": f"e{number}", "text": text}).encode(), key=b"k")


def results(kafka: Kafka, topics: Topics, count: int) -> list[dict[str, Any]]:
    records = wait_for(
        lambda: len(found := kafka.read(topics.output)) >= count and found,  # ends of transactions have offsets too
        f"{count} results",
    )
    return [json.loads(record.value or b"") for record in records]


def first_message(worker: WorkerProcess) -> dict[str, Any]:
    """What the console's stream begins with."""
    with urllib.request.urlopen(worker.url + "/events", timeout=30) as answer:
        assert answer.readline().strip() == b"event: hello"
        found: dict[str, Any] = json.loads(answer.readline().removeprefix(b"data: "))
        return found


def test_results_metrics_and_console_have_the_models_labels(
    kafka: Kafka, topics: Topics, workers: Workers, shape: Shape, folder: Path
) -> None:
    kafka.create_all(topics, 2)
    worker = workers.start(topics, model=folder, **shape.settings).wait_until_assigned(2)
    assert worker.metrics.by("label", "results_published_total") == dict.fromkeys(shape.names, 0)
    kafka.send(topics.input, [event(number, text) for number, text in enumerate(TEXTS)])
    found = results(kafka, topics, len(TEXTS))
    oracle = Oracle(folder)
    by_id = {result["id"]: result for result in found}
    for number, text in enumerate(TEXTS):
        wanted, result = shape.result(oracle, text), by_id[f"e{number}"]
        assert list(result)[: len(wanted) + 1] == ["id", *wanted], "the fields in their order"
        assert list(result["probabilities"]) == shape.names, "in the checkpoint's order"
        assert result["probabilities"] == pytest.approx(wanted.pop("probabilities"), abs=2e-5)
        assert result["score"] == (None if wanted["score"] is None else pytest.approx(wanted["score"], abs=5e-5))
        del wanted["score"]
        assert {name: result[name] for name in wanted} == wanted
        named = ("model_labels", "label_scores", "activation", "threshold")
        given = {name: value for name, value in shape.settings.items() if name in named}
        assert [f"+{name}=" in result["model"] for name in given] == [True] * len(given)

    counts = Counter(result["label"] for result in found)
    wait_for(lambda: worker.metrics.get("results_published_total") == len(TEXTS), "the results to be counted")
    assert worker.metrics.counts_by("label", "results_published_total") == counts
    assert worker.metrics.get("score_count") == (0 if shape.weights is None else len(TEXTS))
    (revision,) = worker.metrics.by("revision", "model_info")
    assert f"@{revision}" == found[0]["model"].removeprefix(str(folder))

    wait_for(lambda: len(first_message(worker)["results"]) == len(TEXTS), "the console to have the results")
    hello = first_message(worker)
    assert hello["labels"] == shape.names
    for _, id, label, score, chances, *_ in hello["results"]:
        assert label == by_id[id]["label"]
        assert score == (None if shape.weights is None else pytest.approx(by_id[id]["score"], abs=6e-4))
        assert chances == pytest.approx(by_id[id]["probabilities"], abs=6e-4)
    assert any(sample[6] is not None for sample in hello["history"]) == (shape.weights is not None), "a mean score"
    assert worker.terminate() == 0


@pytest.mark.parametrize(
    "options", [{"output_mode": "enrich"}, {"output_format": "cloudevents"}, {"delivery": "exactly-once"}]
)
def test_a_score_that_is_null_breaks_nothing(
    kafka: Kafka, topics: Topics, workers: Workers, tmp_path: Path, options: dict[str, str]
) -> None:
    kafka.create_all(topics, 1)
    (tmp_path / "model").mkdir()
    model = make_checkpoint(tmp_path / "model", labels=TOXIC, **MULTI)
    worker = workers.start(topics, model=model, **options).wait_until_assigned(1)
    kafka.send(topics.input, [*(event(number, "да") for number in range(5)), Record(b"{broken")])
    found = results(kafka, topics, 5)
    assert [(result.get("sentiment") or result)["score"] for result in found] == [None] * 5
    wait_for(lambda: worker.metrics.outcomes == 6, "all to be counted")
    wait_for(lambda: len(first_message(worker)["results"]) == 5, "the console to have the results")
    (row, *_) = first_message(worker)["results"]
    assert row[3] is None
    assert list(row[4]) == TOXIC
    assert not worker.warnings("the console could not be updated")
    assert worker.terminate() == 0


def test_other_commands_take_the_labels_from_the_model(shape: Shape, folder: Path, tmp_path: Path) -> None:
    oracle, options = Oracle(folder), ["--cpu-threads", "1"]
    done = forked("classify", "--model", folder, *flags(shape), *options, *TEXTS)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    truth = [shape.result(oracle, text) for text in TEXTS]
    assert [line["label"] for line in lines] == [each["label"] for each in truth]
    assert [line.get("labels") for line in lines] == [each.get("labels") for each in truth]

    with (tmp_path / "rows.csv").open("w", newline="") as file:
        rows = [(text, each["label"]) for text, each in zip(TEXTS, truth, strict=True)]
        rows[0] = (TEXTS[0], next(name for name in shape.names if name != rows[0][1]))
        csv.writer(file).writerows([("text", "label"), *rows])
    evaluated = ["evaluate", "--model", folder, *flags(shape), *options, "--source", f"s={tmp_path / 'rows.csv'}"]
    done = forked(*evaluated, "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["classes"] == shape.names
    assert np.trace(report["overall"]["confusion"]) == len(TEXTS) - 1
    assert report["model"] == lines[0]["model"]
    assert "Macro F1" in forked(*evaluated).stdout
    wrong = forked(*evaluated, "--label-map", "s:x=joy")
    assert (wrong.returncode, f"the classes are {', '.join(shape.names)}" in wrong.stderr) == (2, True)

    done = forked("bench", "--model", folder, *flags(shape), "--seconds", "0.01", "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["model"] == lines[0]["model"]
    assert measured["engines"][0]["agreement"] == 1.0


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"model_labels": "LABEL_0=x"}, ["model_labels", "LABEL_0", "it has: non-toxic, insult"]),
        ({"label_scores": "toxic=1"}, ["label_scores", "toxic", "it has: non-toxic"]),
        ({"activation": "softmax", "threshold": "0.5"}, ["threshold", "activation sigmoid"]),
        ({"label_scores": "insult=much"}, ["label_scores", "a finite number", "--label-scores"]),
    ],
)
def test_a_wrong_setting_ends_with_one_sentence(tmp_path: Path, settings: dict[str, str], parts: list[str]) -> None:
    make_checkpoint(tmp_path, labels=TOXIC, **MULTI)
    done = forked("classify", "--model", tmp_path, *flags(Shape([], [], settings)), "да")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert [part for part in parts if part not in done.stderr] == [], done.stderr
    done = forked("check", "--model", tmp_path, *flags(Shape([], [], settings)), "--bootstrap-servers", "127.0.0.1:1")
    assert done.returncode == 2, done.stdout
    assert [part for part in parts if part not in done.stdout] == [], done.stdout


def test_after_a_reload_to_other_labels_the_metrics_and_the_console_follow(
    kafka: Kafka, topics: Topics, workers: Workers, tmp_path: Path, checkpoint: Path
) -> None:
    kafka.create_all(topics, 1)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    worker = workers.start(topics, model=folder, cache_size=0).wait_until_assigned(1)
    kafka.send(topics.input, [event(number, text) for number, text in enumerate(TEXTS)])
    before = Counter(result["label"] for result in results(kafka, topics, len(TEXTS)))
    wait_for(lambda: worker.metrics.get("results_published_total") == len(TEXTS), "the results to be counted")

    shutil.rmtree(folder)
    folder.mkdir()
    make_checkpoint(folder, labels=TOXIC, **MULTI)
    worker.hang_up()
    wait_for(lambda: worker.metrics.get("model_reloads_total", outcome="done") == 1, "the reload")
    assert worker.metrics.by("label", "results_published_total") == {**dict.fromkeys(TOXIC, 0), **before}
    kafka.send(topics.input, [event(number + 100, text) for number, text in enumerate(TEXTS)])
    found = results(kafka, topics, 2 * len(TEXTS))
    after = Counter(result["label"] for result in found if len(result["probabilities"]) == len(TOXIC))
    assert after.total() == len(TEXTS)
    wait_for(lambda: worker.metrics.get("results_published_total") == 2 * len(TEXTS), "the results to be counted")
    assert worker.metrics.counts_by("label", "results_published_total") == before + after
    assert worker.metrics.get("score_count") == len(TEXTS), "the new model's results have no score"
    wait_for(lambda: len(first_message(worker)["results"]) == 2 * len(TEXTS), "the console to have the results")
    hello = first_message(worker)
    assert hello["labels"] == TOXIC
    assert [len(row[4]) for row in hello["results"]] == [3] * len(TEXTS) + [5] * len(TEXTS)
    assert worker.terminate() == 0


def test_the_page_shows_any_labels_and_a_score_that_is_not_there(
    kafka: Kafka, topics: Topics, workers: Workers, tmp_path: Path, browser: Browser
) -> None:
    many = [f"label {number}" for number in range(70)]
    many[3:6] = "<b>hidden</b>", "constructor", "__proto__"  # the last two are properties of every object in JavaScript
    (tmp_path / "model").mkdir()
    model = make_checkpoint(tmp_path / "model", labels=many, **MULTI)
    kafka.create_all(topics, 1)
    worker = workers.start(topics, model=model).wait_until_assigned(1)
    browser.open(worker.url)
    kafka.send(topics.input, [event(number, f"{number} {text}") for number, text in enumerate(TEXTS * 5)])
    wait_for(lambda: len(browser.texts("#results tbody tr")) == 35, "the results to be shown")

    def mix() -> list[str]:
        return browser.texts("[data-chart=mix] .key b")

    wait_for(lambda: "other labels" in browser.text("[data-chart=mix] .key") and len(mix()) == 9, "the mix of all")
    shares = [each.removesuffix(" %") for each in mix()]
    assert sum(map(float, shares)) == pytest.approx(100, abs=9 * 0.5)
    assert "label_scores" in browser.text("[data-chart=score]")
    assert browser.texts("#results tbody td:nth-child(3)")[0].startswith("–")
    titles = browser.run("return [...document.querySelectorAll('#results tbody td:nth-child(3)')].map(n => n.title)")
    chances = [[float(each.rpartition(" ")[2]) for each in title.split(", ")] for title in titles]
    assert all(len(row) == 8 and all(one >= other for one, other in pairwise(row)) for row in chances)
    assert browser.run("return document.querySelectorAll('#results b, .key b b').length") == 0
    open_table = "const table = document.querySelector('#numbers'); table.open = true; drawNumbers();"
    assert browser.run(f"{open_table} return table.querySelectorAll('th').length") == 15
    assert not browser.complaints()
    assert worker.metrics.get("results_published_total") == 35
    assert len(worker.metrics.by("label", "results_published_total")) == 65
    assert worker.terminate() == 0
