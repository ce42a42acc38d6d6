"""A new checkpoint without a restart, by signal and by request."""

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.broker import Broker
from tests.support.checkpoint import make_checkpoint
from tests.support.process import LONG_SESSION, WorkerProcess, Workers, workers_in
from tests.support.topics import Kafka, Load, Topics, numbered
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka

TOKEN = "a-token-of-these-tests"


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path) -> Path:
    """The checkpoint that is replaced; ``workers`` start with it."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def workers(broker: Broker, folder: Path, tmp_path: Path) -> Iterator[Workers]:
    with workers_in(broker.bootstrap, folder, tmp_path, is_forked=True) as workers:
        yield workers


@pytest.fixture
def load(kafka: Kafka, topics: Topics) -> Iterator[Load]:
    kafka.create_all(topics, 2)
    load = Load(kafka, topics.input, 200)
    yield load
    load.end()


def replace_weights(folder: Path, seed: int = 8) -> None:
    """Overwrites the files in place, as `cp` does: the worst way there is to do it."""
    other = folder.with_name("other")
    other.mkdir()
    make_checkpoint(other, seed)
    for file in other.iterdir():
        shutil.copyfile(file, folder / file.name)


def results_by_model(kafka: Kafka, topics: Topics) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for record in kafka.read(topics.output):
        result = json.loads(record.value or b"")
        found.setdefault(result["model"], set()).add(result["id"])
    return found


def model_in_use(worker: WorkerProcess) -> list[str]:
    return list(worker.metrics.by("revision", "model_info"))


def ask(worker: WorkerProcess, token: str | None) -> tuple[int, str]:
    request = urllib.request.Request(worker.url + "/reload", method="POST")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_signal_takes_the_new_checkpoint_and_loses_nothing(
    kafka: Kafka, topics: Topics, workers: Workers, folder: Path, load: Load
) -> None:
    worker = workers.start(topics, **LONG_SESSION).wait_until_assigned(2)
    (before,) = model_in_use(worker)
    load.start()
    wait_for(lambda: kafka.count(topics.output) > 200, "results of the old model")
    replace_weights(folder)
    worker.hang_up()
    wait_for(lambda: worker.metrics.get("model_reloads_total", outcome="done") == 1, "the reload")
    (after,) = model_in_use(worker)
    assert after != before
    published = kafka.count(topics.output)
    wait_for(lambda: kafka.count(topics.output) > published + 200, "results of the new model")
    sent = load.stop()
    wait_for(lambda: kafka.count(topics.output) >= len(sent), "all results")
    assert worker.terminate() == 0

    by_model = results_by_model(kafka, topics)
    assert {name.rpartition("@")[2] for name in by_model} == {before, after}
    assert set.union(*by_model.values()) == {json.loads(record.value or b"")["id"] for record in sent}
    assert kafka.count(topics.output) == len(sent), "nothing twice"
    assert kafka.count(topics.dead_letters) == 0


def test_a_broken_checkpoint_changes_nothing(
    kafka: Kafka, topics: Topics, workers: Workers, folder: Path, load: Load
) -> None:
    worker = workers.start(topics).wait_until_assigned(2)
    before = model_in_use(worker)
    load.start()
    (folder / "model.safetensors").write_bytes(b"half of a file")
    worker.hang_up()
    wait_for(lambda: worker.metrics.get("model_reloads_total", outcome="failed") == 1, "the failed reload")
    assert worker.warnings("the model is not reloaded", "cannot be loaded")
    published = kafka.count(topics.output)
    wait_for(lambda: kafka.count(topics.output) > published + 100, "results after it")
    load.end()
    assert model_in_use(worker) == before
    assert worker.status("/readyz") == 200
    assert worker.terminate() == 0
    assert len(results_by_model(kafka, topics)) == 1


def test_a_request_with_the_token_says_what_became_of_it(
    kafka: Kafka, topics: Topics, workers: Workers, folder: Path
) -> None:
    kafka.create_all(topics, 1)
    worker = workers.start(topics, variables={"WORKER_HTTP_TOKEN": TOKEN}).wait_until_assigned(1)
    (before,) = model_in_use(worker)
    assert ask(worker, None)[0] == 401
    assert ask(worker, "another-token-of-the-tests")[0] == 401
    assert worker.metrics.get("model_reloads_total") == 0

    replace_weights(folder)
    status, text = ask(worker, TOKEN)
    (after,) = model_in_use(worker)
    assert (status, after != before) == (200, True)
    assert f"@{after} is in use" in text

    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "good", "3": "ugly"}
    (folder / "config.json").write_text(json.dumps(config))
    status, text = ask(worker, TOKEN)
    assert status == 500
    assert f"@{after} stays in use: model {folder} cannot be loaded: its labels (id2label" in text
    assert worker.terminate() == 0


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()


def no_maximum(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 0}))


def a_shard_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"classifier.bias": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_checkpoint_that_would_score_nothing_well_does_not_replace_a_good_one(
    kafka: Kafka, topics: Topics, workers: Workers, folder: Path, checkpoint: Path
) -> None:
    kafka.create_all(topics, 1)
    worker = workers.start(topics, variables={"WORKER_HTTP_TOKEN": TOKEN}).wait_until_assigned(1)
    (before,) = model_in_use(worker)
    for spoil, words in {
        no_tokenizer: "its tokenizer's files are missing",
        no_maximum: "model_max_length in tokenizer_config.json is 0",
        a_shard_elsewhere: "only files of its own folder are read",
    }.items():
        shutil.rmtree(folder)
        shutil.copytree(checkpoint, folder)
        spoil(folder)
        status, text = ask(worker, TOKEN)
        assert (status, words in text) == (500, True), text
    assert model_in_use(worker) == [before]
    kafka.send(topics.input, [numbered(1)])
    wait_for(lambda: kafka.count(topics.output) == 1, "a result of the model that stayed")
    assert set(results_by_model(kafka, topics)) == {f"{folder}@{before}"}
    assert worker.terminate() == 0


def test_without_a_token_it_cannot_be_asked_for(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    kafka.create_all(topics, 1)
    worker = workers.start(topics).wait_for_status("/livez", 200)
    status, text = ask(worker, TOKEN)
    assert status == 403
    assert "http_token" in text


def test_a_record_is_scored_by_the_new_model_even_if_its_text_is_known(
    kafka: Kafka, topics: Topics, workers: Workers, folder: Path
) -> None:
    """The cache of the old model goes with it."""
    kafka.create_all(topics, 1)
    worker = workers.start(topics, cache_size=100).wait_until_assigned(1)
    kafka.send(topics.input, [numbered(1)])
    wait_for(lambda: kafka.count(topics.output) == 1, "the first result")
    replace_weights(folder)
    worker.hang_up()
    wait_for(lambda: worker.metrics.get("model_reloads_total", outcome="done") == 1, "the reload")
    kafka.send(topics.input, [numbered(1)])
    wait_for(lambda: kafka.count(topics.output) == 2, "the second result")
    first, second = (json.loads(record.value or b"") for record in kafka.read(topics.output))
    assert first["score"] != second["score"]
    assert first["model"] != second["model"]
