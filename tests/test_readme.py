"""The README keeps up with the code: settings, metrics, reasons, dependencies, commands. See test_documents.py too."""

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

from worker.cli import COMMANDS
from worker.reasons import Reason
from worker.settings import RunSettings
from worker.telemetry.metrics import PREFIX, Metrics

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAMILIES = [family for family in Metrics("test")._registry.collect() if family.name.startswith(PREFIX)]


def first_cells() -> dict[str, str]:
    """The first cell of each table row, without backticks → the row."""
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    return {row.split("|")[1].replace("`", "").strip(): row for row in rows}


def metric_rows() -> dict[str, str]:
    """The rows, by the first cell without labels."""
    return {re.split(r"\{", cell)[0]: row for cell, row in first_cells().items()}


def _metric(family: Any) -> str:
    return str(family.name).removeprefix(PREFIX) + ("_total" if family.type == "counter" else "")


SETTINGS_SHOWN = [name for name in RunSettings.model_fields if name in first_cells()]
METRICS_SHOWN = [family for family in FAMILIES if _metric(family) in metric_rows()]


def test_the_settings_and_metrics_that_most_need_stand_there() -> None:
    assert {"bootstrap_servers", "input_topics", "output_topic", "dead_letter_topic", "group_id", "model"} <= set(
        SETTINGS_SHOWN
    )
    assert {"ready", "consumer_lag_seconds", "dead_letters_total"} <= {_metric(family) for family in METRICS_SHOWN}


@pytest.mark.parametrize("name", SETTINGS_SHOWN)
def test_a_setting_stands_there_with_its_default(name: str) -> None:
    """All of them stand in docs/settings.md, which tests/test_documents.py looks after."""
    field = RunSettings.model_fields[name]
    shown = "–" if field.default is None else f"`{field.default}`"
    _, _, default, meaning, _ = first_cells()[name].split("|")
    assert (default.strip(), meaning.strip()) == (shown, field.description)


@pytest.mark.parametrize("family", METRICS_SHOWN, ids=lambda family: str(family.name))
def test_a_metric_stands_there_with_its_type_and_meaning(family: Any) -> None:
    """All of them stand in docs/metrics.md."""
    _, _, kind, meaning, _ = metric_rows()[_metric(family)].split("|")
    assert (kind.strip(), meaning.strip()) == (family.type, family.documentation)


@pytest.mark.parametrize("reason", get_args(Reason))
def test_each_reason_stands_there(reason: str) -> None:
    assert any(reason in cell.split(", ") for cell in first_cells())


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_stands_there(command: str) -> None:
    assert command in first_cells()


def test_each_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[\[<>=; ]", word)[0] for group in groups for word in group}
    cells = {name.strip() for cell in first_cells() for name in re.split(r"[,(]", cell)}
    assert names <= cells, names - cells


def test_the_locks_name_no_index_and_have_hashes() -> None:
    for lock in (ROOT / "requirements").glob("*.txt"):
        text = lock.read_text()
        assert "://" not in text
        assert text.count("--hash=sha256:") >= len(re.findall(r"^[a-z].*==", text, re.MULTILINE)) > 0
