"""What runs on a CPU imports neither torch nor transformers, though both are installed: real processes say so."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.process import Workers, environment
from tests.support.topics import Kafka, Record, Topics
from tests.support.waiting import wait_for
from worker.model.checkpoint import BUILTIN

HEAVY = {"torch", "transformers", "sentencepiece", "sklearn", "scipy", "pandas"}
RECORD_MODULES = """
import os, sys
end_at_once = os._exit
def end(code):
    with open(os.environ["IMPORTED"] + str(os.getpid()), "w") as file:
        file.write("\\n".join(sys.modules))
    end_at_once(code)
os._exit = end  # by which every command ends
"""


class Imports:
    """Has each Python process with these variables write down, as it ends, which modules it has imported."""

    def __init__(self, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(RECORD_MODULES)
        self._folder = folder
        self.variables = {
            "PYTHONPATH": os.pathsep.join([str(folder), environment()["PYTHONPATH"]]),
            "IMPORTED": str(folder / "imported."),
        }

    def assert_light(self) -> None:
        files = list(self._folder.glob("imported.*"))
        assert files
        modules = {name for file in files for name in file.read_text().split()}
        assert "worker.cli" in modules
        assert not {name for name in modules if name.partition(".")[0] in HEAVY}


@pytest.fixture
def imports(tmp_path: Path) -> Imports:
    folder = tmp_path / "imports"
    folder.mkdir()
    return Imports(folder)


def run(imports: Imports, *arguments: object) -> str:
    command = [sys.executable, "-m", "worker", *map(str, arguments)]
    env = {**environment(), **imports.variables}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_classify(imports: Imports, checkpoint: Path) -> None:
    assert '"label"' in run(imports, "classify", "--model", checkpoint, "Хорошо")
    imports.assert_light()


def test_evaluate(imports: Imports, tmp_path: Path) -> None:
    with (BUILTIN / "demo.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:50]
    source = tmp_path / "rows.csv"
    with source.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    assert "macro" in run(imports, "evaluate", "--model", "builtin", "--source", source, "--format", "json")
    imports.assert_light()


def test_demo(imports: Imports) -> None:
    pytest.importorskip("confluent_kafka")
    assert "It adds up" in run(imports, "demo", "--events", 20, "--rate", 50)
    imports.assert_light()


@pytest.mark.kafka
def test_run_check_and_replay(imports: Imports, kafka: Kafka, topics: Topics, checkpoint: Path, tmp_path: Path) -> None:
    kafka.create_all(topics)
    places = ["--bootstrap-servers", kafka.bootstrap, "--dead-letter-topic", topics.dead_letters]
    run(
        imports, "check", "--model", checkpoint, *places, "--http-port", 0,
        "--input-topics", topics.input, "--output-topic", topics.output,
    )  # fmt: skip
    kafka.send(topics.input, [Record('{"id": 1, "text": "Хорошо"}'.encode()), Record(b"{}")])
    workers = Workers(kafka.bootstrap, checkpoint, tmp_path, "worker", is_forked=False)
    try:
        worker = workers.start(topics, imports.variables).wait_until_ready()
        wait_for(lambda: kafka.count(topics.output, topics.dead_letters) == 2, "a result and a dead letter")
        assert worker.terminate() == 0
    finally:
        workers.close()
    run(imports, "replay", *places)
    imports.assert_light()
