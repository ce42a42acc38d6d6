"""What is in deploy/, as data."""

import json
import os
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
CHART = DEPLOY / "helm" / "sentiment-worker"
DEFAULT = "default"  # no values of one's own
EXAMPLES = (DEFAULT, *sorted(path.stem.removesuffix("-values") for path in (CHART / "ci").glob("*-values.yaml")))

Object = dict[str, Any]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def helm(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the helm that `HELM` names, that is on the path, or that `make helm` has built."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    built = cache / "sentiment-worker" / "cluster" / "bin" / "helm"
    program = os.environ.get("HELM") or shutil.which("helm") or (str(built) if built.exists() else None)
    if program is None:
        pytest.skip("helm is not installed; `make helm` builds it where Go is")
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


def template(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`helm template` of a release named `worker` in the namespace `sentiment`."""
    return helm("template", "worker", CHART, "--namespace", "sentiment", *arguments)


def values(example: str) -> list[object]:
    return [] if example == DEFAULT else ["--values", CHART / "ci" / f"{example}-values.yaml"]


@cache
def rendered(example: str) -> tuple[Object, ...]:
    """The objects that an example of values makes."""
    done = template(*values(example))
    assert done.returncode == 0, done.stderr
    return tuple(item for item in yaml.safe_load_all(done.stdout) if item)


def all_of(kind: str, example: str) -> list[Object]:
    return [item for item in rendered(example) if item["kind"] == kind]


def the(kind: str, example: str) -> Object:
    """The one object of a kind."""
    (found,) = all_of(kind, example)
    return found


def workload(example: str) -> Object:
    (found,) = all_of("Deployment", example) + all_of("StatefulSet", example)
    return found


def pod(example: str) -> Object:
    spec: Object = workload(example)["spec"]["template"]["spec"]
    return spec


def container(example: str) -> Object:
    (found,) = pod(example)["containers"]
    return dict(found)


def settings_of_the_pod(example: str) -> dict[str, str]:
    """Its WORKER_ variables; those that a pod learns when it starts have a value of their kind."""
    (source,) = container(example)["envFrom"]
    (found,) = [
        item for item in all_of("ConfigMap", example) if item["metadata"]["name"] == source["configMapRef"]["name"]
    ]
    settings: dict[str, str] = dict(found["data"])
    for variable in container(example)["env"]:
        if variable["name"].startswith("WORKER_"):
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
