"""Inference that dies under the worker: health tells, the process ends, nothing is committed that was not published."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.driver import MODEL as CHAOTIC
from tests.support.checkpoint import PANICKING, PANICS, with_pattern
from tests.support.faulty_model import SECRET_TEXT
from tests.support.process import WorkerProcess, Workers
from tests.support.scenario import result_place, wait_until_committed
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka

Break = Callable[[str], tuple[WorkerProcess, Kafka, Topics]]


@pytest.fixture
def broken(kafka: Kafka, topics: Topics, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Break:
    """A worker that has done 100 events, and whose model breaks before the next 100."""

    def start(fault: str) -> tuple[WorkerProcess, Kafka, Topics]:
        fault_file = tmp_path / "fault"
        monkeypatch.setenv("FAULT", fault)
        monkeypatch.setenv("FAULT_FILE", str(fault_file))
        kafka.create_all(topics)
        look_s = 15 if fault == "hang" else 1  # in which its health can be asked for before it ends
        last_look = {"INTERVALS": f'{{"PROBE_S": {look_s}}}'}
        settings = {"module": "tests.support.faulty_model", "inference_timeout_s": 10, "max_batch_texts": 20}
        worker = workers.start(topics, last_look, **settings)
        worker.wait_until_ready()
        kafka.send(topics.input, map(numbered, range(100)))
        wait_for(lambda: sum(kafka.committed(topics.group, topics.input).values()) == 100, "100 commits")
        fault_file.touch()
        kafka.send(topics.input, map(numbered, range(100, 200)))
        return worker, kafka, topics

    return start


def committed_and_published(kafka: Kafka, topics: Topics) -> tuple[int, int, int]:
    published = {result_place(record) for record in kafka.read(topics.output)}
    committed = sum(kafka.committed(topics.group, topics.input).values())
    return committed, len(published), kafka.count(topics.dead_letters)


def test_a_model_that_hangs_is_not_alive_and_ends_the_process(broken: Break) -> None:
    worker, kafka, topics = broken("hang")
    wait_for(lambda: worker.status("/livez") == 503, "/livez to answer 503", every=0.02)
    assert worker.status("/readyz") in (503, 0)
    assert worker.wait() == 1
    assert worker.warnings("has not answered for more than 10 s")
    assert committed_and_published(kafka, topics) == (100, 100, 0)


@pytest.mark.parametrize("fault", ["lost", "nan"])
def test_a_device_that_is_lost_dead_letters_nothing(broken: Break, fault: str) -> None:
    worker, kafka, topics = broken(fault)
    assert worker.wait() == 1
    assert worker.warnings("a known-good text fails too")
    assert committed_and_published(kafka, topics) == (100, 100, 0)
    assert "Traceback" not in worker.output


def test_an_error_that_nobody_foresaw_ends_the_process_with_its_place_and_without_a_text(broken: Break) -> None:
    worker, kafka, topics = broken("bug")
    assert worker.wait() == 1
    (line,) = [json.loads(line) for line in worker.output.splitlines() if "nobody foresaw" in line]
    assert (line["level"], line["error"]) == ("CRITICAL", "LookupError")
    assert line["at"].startswith("faulty_model.py:")
    assert SECRET_TEXT not in worker.output
    assert "Traceback" not in worker.output
    assert committed_and_published(kafka, topics) == (100, 100, 0)


def test_what_a_hung_worker_left_is_done_by_the_next(broken: Break, workers: Workers) -> None:
    worker, kafka, topics = broken("hang")
    assert worker.wait() == 1
    workers.start(topics).wait_until_ready()
    wait_for(lambda: sum(kafka.committed(topics.group, topics.input).values()) == 200, "the rest to be committed")
    assert committed_and_published(kafka, topics) == (200, 200, 0)


def test_a_text_that_the_tokenizer_panics_on_is_a_dead_letter(
    kafka: Kafka, topics: Topics, workers: Workers, checkpoint: Path, tmp_path: Path
) -> None:
    """A panic of Rust is no Exception: it would end the process, and the next one at the same text."""
    folder = with_pattern(Path(shutil.copytree(checkpoint, tmp_path / "pattern")), PANICKING)
    kafka.create_all(topics)
    worker = workers.start(topics, model=folder).wait_until_ready()
    panics = Record(json.dumps({"id": "panics", "text": f"плохо {PANICS}"}).encode(), b"key")
    kafka.send(topics.input, [*map(numbered, range(20)), panics, *map(numbered, range(20, 40))])
    wait_for(lambda: sum(kafka.committed(topics.group, topics.input).values()) == 41, "41 commits")
    (letter,) = kafka.read(topics.dead_letters)
    assert dict(letter.headers)["error.reason"] == b"inference_failed"
    assert dict(letter.headers)["error.message"] == b"the tokenizer failed: TokenizerPanicked"
    assert kafka.count(topics.output) == 40
    assert worker.terminate() == 0
    assert "Traceback" not in worker.output
    assert PANICS not in worker.output


# The consumer.


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_a_fetch_task_that_ends_by_an_error_is_begun_anew(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    kafka.create_all(topics, 1)
    kafka.send(topics.input, map(numbered, range(100)))
    worker = workers.start(topics, {"FETCH_FAULTS": "2"}, module=CHAOTIC, delivery=delivery)
    wait_until_committed(kafka, topics)
    assert worker.warnings("joining the group again: the consumer's fetch task has ended: RuntimeError at model.py:")
    assert "текст" not in worker.output
    worker.wait_until_ready()
    assert worker.terminate() == 0
    assert len(kafka.read(topics.output)) == 100


def test_a_fetch_task_that_ends_by_an_error_each_time_ends_the_process(
    kafka: Kafka, topics: Topics, workers: Workers
) -> None:
    kafka.create_all(topics, 1)
    kafka.send(topics.input, map(numbered, range(100)))
    worker = workers.start(topics, {"FETCH_FAULTS": "1000"}, module=CHAOTIC)
    assert worker.wait() == 1
    (sentence,) = worker.warnings(f"nothing of {topics.input}-0 is read any more")
    assert "joined again 3 times: the consumer's fetch task has ended: RuntimeError at model.py:" in sentence
    assert worker.lines("Traceback") == worker.lines("nobody foresaw") == []
