"""What comes from a file, a broker or a record, and is shown: no escape sequence, no line of its own, no markup."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from worker.commands.bench import FLOAT32, BenchReport, EngineSpeed, _print
from worker.commands.finding import Finding
from worker.commands.replay import table
from worker.core.replay_progress import ReplayCounts
from worker.errors import UserError
from worker.printable import counted, printable
from worker.training.dataset import Example
from worker.training.evaluation_report import EvaluationReport, Predictions

HOSTILE = '\x1b]0;gone\x07\n{"level": "INFO"}\r\x9b31m\u202e\u2028\udcff'


@pytest.mark.parametrize("text", ["", "Хорошо, но дорого", 'back\\slash "quoted" [bold]', "😀"])
def test_what_can_be_seen_stays_as_it_is(text: str) -> None:
    assert printable(text) is text


def test_what_cannot_be_seen_is_escaped_as_in_json() -> None:
    assert printable(HOSTILE).isprintable()
    text = "a\x1b\n\x9b\u202e\U000e0001 b"
    assert json.loads(f'"{printable(text)}"') == text


def test_a_line_of_json_means_the_same_afterwards() -> None:
    line = json.dumps({HOSTILE[:-1]: HOSTILE[:-1]}, ensure_ascii=False)
    assert json.loads(printable(line)) == json.loads(line)
    assert printable(line).isprintable()


def test_a_mistake_and_a_finding_are_one_line() -> None:
    assert str(UserError(f"labels: {HOSTILE}")) == f"labels: {printable(HOSTILE)}"
    assert str(Finding("model", "fail", HOSTILE)) == f"fail  model        {printable(HOSTILE)}"


def shown(renderable: object) -> str:
    stream = io.StringIO()
    Console(file=stream, force_terminal=False, width=200).print(renderable)
    return stream.getvalue()


def test_names_in_tables_are_no_markup() -> None:
    name = "[/] [red]\x1b[31m"
    counts = ReplayCounts()
    counts.kept_back[name] += 1
    report = EvaluationReport({name: Predictions([Example(name, "", 0)], np.eye(3)[:1])}, [name, "b", "c"])
    for text in (shown(report.table()), shown(table(counts, "replayed"))):
        assert r"[/] [red]\u001b[31m" in text


def test_the_name_of_a_model_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    report = BenchReport("./[/]\x1b@1", "cpu", 1, [EngineSpeed(FLOAT32, {512: 1.0}, 1.0, 1)], {1: 1.0})
    _print(report)
    assert capsys.readouterr().out.startswith(r"./[/]\u001b@1 on cpu, 1 texts")


@pytest.mark.parametrize(("number", "words"), [(0, "0 partitions"), (1, "1 partition"), (1_200, "1,200 partitions")])
def test_a_number_and_its_noun(number: int, words: str) -> None:
    assert counted(number, "partition") == words
