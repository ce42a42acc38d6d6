"""The documents keep up with the code: settings, metrics, reasons, commands, dependencies, alerts, modules, links."""

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.deploy.manifests import alerts
from worker.cli import COMMANDS
from worker.reasons import Reason
from worker.settings.base import SECRETS
from worker.settings.run import RunSettings
from worker.telemetry.metrics import PREFIX, Metrics

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md", "deploy/README.md")),
    *sorted(DOCS.glob("*.md")),
]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REFERENCE: dict[str, Any] = runpy.run_path(str(DOCS / "reference.py"))
FAMILIES = [family for family in Metrics("test")._registry.collect() if family.name.startswith(PREFIX)]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """What a link to a heading ends in, as GitHub and GitLab make it."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(page: str) -> dict[str, list[str]]:
    """The cells of each table row of a generated page, by the first one, without its backticks and labels."""
    lines = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in page.splitlines() if line.startswith("| `")]
    return {re.split(r"\{", line[0].replace("`", ""))[0]: line for line in reversed(lines)}


def first_cells(page: str) -> dict[str, str]:
    """The first cell of each table row of a page in docs/, without backticks → the row."""
    lines = [line for line in text_of(DOCS / page).splitlines() if line.startswith("| ")]
    return {line.split("|")[1].replace("`", "").strip(): line for line in lines}


def metric_rows() -> dict[str, str]:
    """The rows of docs/operating.md, by the first cell without labels."""
    return {re.split(r"\{", cell)[0]: row for cell, row in first_cells("operating.md").items()}


def metric_name(family: Any) -> str:
    return str(family.name).removeprefix(PREFIX) + ("_total" if family.type == "counter" else "")


SETTINGS_SHOWN = [name for name in RunSettings.model_fields if name in first_cells("commands.md")]
METRICS_SHOWN = [family for family in FAMILIES if metric_name(family) in metric_rows()]


def test_the_settings_and_metrics_that_most_need_stand_there() -> None:
    assert {"bootstrap_servers", "input_topics", "output_topic", "dead_letter_topic", "group_id", "model"} <= set(
        SETTINGS_SHOWN
    )
    assert {"ready", "consumer_lag_seconds", "dead_letters_total"} <= {metric_name(family) for family in METRICS_SHOWN}


@pytest.mark.parametrize("name", SETTINGS_SHOWN)
def test_a_setting_that_most_need_stands_there_with_its_default(name: str) -> None:
    field = RunSettings.model_fields[name]
    shown = "–" if field.default is None else f"`{field.default}`"
    _, _, default, meaning, _ = first_cells("commands.md")[name].split("|")
    assert (default.strip(), meaning.strip()) == (shown, field.description)


@pytest.mark.parametrize("family", METRICS_SHOWN, ids=lambda family: str(family.name))
def test_a_metric_that_most_need_stands_there_with_its_type_and_meaning(family: Any) -> None:
    _, _, kind, meaning, _ = metric_rows()[metric_name(family)].split("|")
    assert (kind.strip(), meaning.strip()) == (family.type, family.documentation)


@pytest.mark.parametrize("reason", get_args(Reason))
def test_each_reason_stands_there(reason: str) -> None:
    assert any(reason in cell.split(", ") for cell in first_cells("records.md"))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_stands_there(command: str) -> None:
    assert command in first_cells("commands.md")


def test_each_dependency_has_its_reason() -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    names = {re.split(r"[\[<>=; ]", word)[0] for group in groups for word in group}
    cells = {name.strip() for cell in first_cells("contributing.md") for name in re.split(r"[,(]", cell)}
    assert names <= cells, names - cells


def test_the_locks_name_no_index_and_have_hashes() -> None:
    for lock in (ROOT / "requirements").glob("*.txt"):
        text = lock.read_text()
        assert "://" not in text
        assert text.count("--hash=sha256:") >= len(re.findall(r"^[a-z].*==", text, re.MULTILINE)) > 0


def test_the_changelog_begins_with_the_version_and_the_image_has_it() -> None:
    version = PROJECT["version"]
    assert re.findall(r"^## \[(\d.*?)\]", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)[0] == version
    assert f"\n### {version}\n" in text_of(DOCS / "upgrading.md")
    assert set(re.findall(r"^ARG VERSION=(.*)$", text_of(ROOT / "Dockerfile"), re.MULTILINE)) == {version}


@pytest.mark.parametrize("path", REFERENCE["built"](), ids=lambda path: str(path.name))
def test_a_generated_page_is_what_the_generator_writes(path: Path) -> None:
    assert text_of(path) == REFERENCE["built"]()[path], "`make docs` writes it anew"


@pytest.mark.parametrize("name", RunSettings.model_fields)
def test_each_setting_is_in_a_group_with_its_flag_its_default_and_its_meaning(name: str) -> None:
    assert REFERENCE["OTHERS"] not in REFERENCE["groups"](), "put it into a group in docs/reference.py"
    assert len([names for names in REFERENCE["groups"]().values() if name in names]) == 1
    field = RunSettings.model_fields[name]
    _, set_by, default, _, allowed, meaning = rows(text_of(DOCS / "settings.md"))[name]
    assert f"`WORKER_{name.upper()}`" in set_by
    assert f"--{name.replace('_', '-')}" in set_by or name in SECRETS
    shown = "–" if field.default is None else f"`{field.default}`"
    assert default == (shown.lower() if isinstance(field.default, bool) else shown)
    assert allowed
    assert meaning == (field.description or meaning) != ""


@pytest.mark.parametrize(
    "name", [name for name, field in RunSettings.model_fields.items() if type(field.default) in (int, float)]
)
def test_each_number_has_its_unit(name: str) -> None:
    assert rows(text_of(DOCS / "settings.md"))[name][3] != "–" or name == "http_port"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
def test_each_metric_has_its_meaning_and_how_to_read_it(family: Any) -> None:
    name = family.name.removeprefix(PREFIX) + ("_total" if family.type == "counter" else "")
    _, kind, meaning, reading = rows(text_of(DOCS / "metrics.md"))[name]
    assert (kind, meaning) == (family.type, family.documentation)
    assert reading != "–", "say in docs/reference.py how to read it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: str(alert["alert"]))
def test_each_alert_has_its_section_and_leads_to_it(alert: dict[str, Any]) -> None:
    assert f"\n### {alert['alert']}\n" in text_of(DOCS / "operating.md")
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert (
        page
        == re.findall(r"^RUNBOOK \?= .*(https://\S+/docs/operating\.md)\)?$", text_of(ROOT / "Makefile"), re.MULTILINE)[
            0
        ]
    )
    assert anchor in anchors(DOCS / "operating.md")
    assert anchor == alert["alert"].lower()


def test_each_section_on_an_alert_is_of_one_that_there_is() -> None:
    section = text_of(DOCS / "operating.md").partition("\n## Alerts\n")[2]
    assert set(re.findall(r"^### (\w+)$", section, re.MULTILINE)) == {alert["alert"] for alert in alerts()}


def test_the_module_map_is_that_of_the_package() -> None:
    (shown,) = re.findall(r"^```text\nworker/\n(.*?)^```", text_of(DOCS / "architecture.md"), re.MULTILINE | re.DOTALL)
    mapped = {line.split()[0] for line in shown.splitlines()}
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "worker").iterdir()}
    assert mapped == there - {"__pycache__/"}
