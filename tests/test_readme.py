"""The README keeps up with the code: settings, metrics, reasons, dependencies, commands."""

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from worker.cli import COMMANDS
from worker.events import Reason
from worker.metrics import PREFIX, Metrics
from worker.settings import RunSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAMILIES = [family for family in Metrics("test")._registry.collect() if family.name.startswith(PREFIX)]


def first_cells() -> dict[str, str]:
    """The first cell of each table row, without backticks → the row."""
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    return {row.split("|")[1].replace("`", "").strip(): row for row in rows}


@pytest.mark.parametrize("name", [name for name in RunSettings.model_fields if name != "config"])
def test_each_setting_stands_there_with_its_default(name: str) -> None:
    default = RunSettings.model_fields[name].default
    shown = "–" if default is None else f"`{default}`"
    assert first_cells()[name].split("|")[2].strip() == shown


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
def test_each_metric_stands_there_with_its_meaning(family: object) -> None:
    name = family.name.removeprefix(PREFIX) + ("_total" if family.type == "counter" else "")  # type: ignore[attr-defined]
    rows = {re.split(r"\{", cell)[0]: row for cell, row in first_cells().items()}
    assert family.documentation in rows[name]  # type: ignore[attr-defined]


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
