"""What is in deploy/, as data."""

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yaml"
DASHBOARD = DEPLOY / "grafana" / "sentiment-worker.json"
ANALYSTS = DEPLOY / "grafana" / "sentiment-analysts.json"
OVERLAYS = ("cpu", "nvidia", "static")

Object = dict[str, Any]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@cache
def rendered(overlay: str) -> tuple[Object, ...]:
    """The objects of an overlay, as `kubectl apply -k` would send them."""
    command = next((tool for tool in (["kustomize", "build"], ["kubectl", "kustomize"]) if shutil.which(tool[0])), None)
    if command is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run(
        [*command, str(DEPLOY / "kubernetes" / "overlays" / overlay)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def the(kind: str, overlay: str) -> Object:
    """The one object of a kind."""
    (found,) = [item for item in rendered(overlay) if item["kind"] == kind]
    return found


def workload(overlay: str) -> Object:
    return the("StatefulSet" if overlay == "static" else "Deployment", overlay)


def pod(overlay: str) -> Object:
    spec: Object = workload(overlay)["spec"]["template"]["spec"]
    return spec


def container(overlay: str) -> Object:
    (found,) = pod(overlay)["containers"]
    return dict(found)


def settings_of_the_pod(overlay: str) -> dict[str, str]:
    """Its WORKER_ variables; those that a pod learns when it starts have a value of their kind."""
    settings: dict[str, str] = dict(the("ConfigMap", overlay)["data"])
    for variable in container(overlay)["env"]:
        settings[variable["name"]] = variable.get("value", "sentiment-worker-0")
    return settings


def alerts() -> list[Object]:
    return [rule for group in read(RULES)["groups"] for rule in group["rules"] if "alert" in rule]


def expressions_of_rules() -> list[str]:
    return [rule["expr"] for group in read(RULES)["groups"] for rule in group["rules"]]


def panels(path: Path = DASHBOARD) -> list[Object]:
    board = json.loads(path.read_text(encoding="utf-8"))
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions_of_panels() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]
