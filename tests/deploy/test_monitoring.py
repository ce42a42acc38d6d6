"""Rules and dashboard: up to date, on metrics that exist, and each alert when it should."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests import (
    ANALYSTS,
    DASHBOARD,
    DEPLOY,
    RULES,
    alerts,
    expressions_of_panels,
    expressions_of_rules,
    panels,
    read,
)
from worker.telemetry.metrics import PREFIX, Metrics

FAMILIES = {family.name: family.type for family in Metrics("test")._registry.collect()}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
SERIES = {name + suffix for name, kind in FAMILIES.items() for suffix in SUFFIXES.get(kind, ())} - {
    f"{PREFIX}score_sum"
}
RULE_TESTS = Path(__file__).with_name("rules_test.yaml")


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed; Debian's package prometheus has it")
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("generator", ["dashboard", "analysts"])
def test_a_dashboard_is_what_its_generator_writes(generator: str) -> None:
    made = runpy.run_module(f"deploy.grafana.{generator}")
    assert made["FILE"].read_text(encoding="utf-8") == made["built"](), "`make dashboard` writes it anew"


@pytest.mark.parametrize("expression", [*expressions_of_rules(), *expressions_of_panels()])
def test_an_expression_asks_for_metrics_that_exist(expression: str) -> None:
    recorded = {rule["record"] for group in read(RULES)["groups"] for rule in group["rules"] if "record" in rule}
    asked = set(re.findall(r"(?<![\w:])(?:[a-z]+:)?sentiment_worker_\w+(?::\w+)?", expression))
    assert asked or "process_" in expression
    assert asked <= SERIES | recorded, asked - SERIES - recorded


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(expressions_of_panels())
    assert [name for name in FAMILIES if name.startswith(PREFIX) and name not in shown] == []


@pytest.mark.parametrize("board", [DASHBOARD, ANALYSTS], ids=lambda board: str(board.name))
def test_each_panel_has_a_title_of_its_own_a_unit_and_says_what_it_is(board: Path) -> None:
    titles = [panel["title"] for panel in panels(board)]
    assert len(set(titles)) == len(titles)
    assert all(panel["description"] for panel in panels(board))
    assert all(panel["fieldConfig"]["defaults"].get("unit") for panel in panels(board) if panel["type"] != "heatmap")


def test_the_analysts_dashboard_asks_the_data_source_that_compose_provides() -> None:
    (source,) = read(DEPLOY / "grafana" / "provisioning" / "datasources" / "postgresql.yaml")["datasources"]
    assert {panel["datasource"]["type"] for panel in panels(ANALYSTS)} == {source["type"]}
    compose = read(DEPLOY / "compose.yaml")["services"]
    mounted = [volume.split(":")[0] for volume in compose["grafana"]["volumes"]]
    assert {f"./grafana/{board.name}" for board in (DASHBOARD, ANALYSTS)} <= set(mounted)
    assert source["jsonData"]["database"] == compose["postgresql"]["environment"]["POSTGRES_DB"]


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: str(alert["alert"]))
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, dict[str, str]]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"].keys() == {"summary", "description", "runbook", "runbook_url"}


@pytest.mark.parametrize("command", [("config", DEPLOY / "prometheus" / "prometheus.yaml"), ("rules", RULES)])
def test_prometheus_takes_the_files(command: tuple[str, Path]) -> None:
    done = promtool("check", *command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_when_it_should_and_not_before() -> None:
    done = promtool("test", "rules", RULE_TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_seen_firing() -> None:
    checks = [check for test in read(RULE_TESTS)["tests"] for check in test["promql_expr_test"]]
    seen = {
        label for check in checks for sample in check["exp_samples"] for label in re.findall(r"\w+", sample["labels"])
    }
    assert {alert["alert"] for alert in alerts()} <= seen
