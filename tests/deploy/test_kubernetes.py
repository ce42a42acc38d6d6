"""The overlays: valid for the API, and what the worker needs of it."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    RULES,
    container,
    pod,
    read,
    rendered,
    settings_of_the_pod,
    the,
    workload,
)
from worker.settings.run import RunSettings
from worker.settings.sources import load

VERSIONS = ("1.32", "1.36")
SCHEMAS = Path(__file__).parent / "schemas"  # of custom resources
LABELS = {"app.kubernetes.io/name": "sentiment-worker"}


def check(item: dict[str, Any], version: str) -> None:
    """Raises jsonschema's ValidationError, also for a field that the API does not know."""
    schema = SCHEMAS / f"{item['kind']}.json"
    if schema.exists():
        jsonschema.validate(item, json.loads(schema.read_text()))
    else:
        assert kubernetes_validate.validate(item, version, strict=True) == version


def settings(overlay: str) -> RunSettings:
    return load(RunSettings, (), "run", settings_of_the_pod(overlay))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_api_takes_every_object(overlay: str, version: str) -> None:
    for item in rendered(overlay):
        check(item, version)


@pytest.mark.parametrize("kind", ["Deployment", "PodMonitor", "ScaledObject", "NetworkPolicy"])
def test_a_field_that_the_api_does_not_know_is_found(kind: str) -> None:
    item = the(kind, "cpu")
    with pytest.raises(jsonschema.ValidationError):
        check({**item, "spec": {**item["spec"], "replica": 3}}, VERSIONS[0])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_selects_the_workers_and_no_other_pod(overlay: str) -> None:
    labels = workload(overlay)["spec"]["template"]["metadata"]["labels"]
    assert labels == LABELS
    assert workload(overlay)["spec"]["selector"] == {"matchLabels": LABELS}
    assert the("PodDisruptionBudget", overlay)["spec"]["selector"] == {"matchLabels": LABELS}
    assert the("NetworkPolicy", overlay)["spec"]["podSelector"] == {"matchLabels": LABELS}
    assert the("PodMonitor", overlay)["spec"]["selector"] == {"matchLabels": LABELS}
    for spread in pod(overlay)["topologySpreadConstraints"]:
        assert spread["labelSelector"] == {"matchLabels": LABELS}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pod_may_do_no_more_than_it_has_to(overlay: str) -> None:
    spec = pod(overlay)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(overlay)["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert (
        spec["automountServiceAccountToken"] is the("ServiceAccount", overlay)["automountServiceAccountToken"] is False
    )
    assert spec["enableServiceLinks"] is False
    assert not [item for item in rendered(overlay) if item["kind"] == "Secret"], "secrets are referred to, not held"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_drain_has_the_time_that_it_may_take(overlay: str) -> None:
    assert pod(overlay)["terminationGracePeriodSeconds"] > settings(overlay).drain_timeout_s + 5


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_and_metrics_ask_where_the_worker_answers(overlay: str) -> None:
    (port,) = container(overlay)["ports"]
    assert port["containerPort"] == settings(overlay).http_port
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container(overlay)[probe]["httpGet"]
        assert asked["port"] == port["name"]
        assert asked["path"] == ("/readyz" if probe == "readinessProbe" else "/livez")
    (endpoint,) = the("PodMonitor", overlay)["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_autoscaler_scales_this_workload_by_this_groups_lag(overlay: str) -> None:
    spec = the("ScaledObject", overlay)["spec"]
    target = spec["scaleTargetRef"]
    assert (target.get("kind", "Deployment"), target["name"]) == (workload(overlay)["kind"], "sentiment-worker")
    assert "replicas" not in workload(overlay)["spec"], "each deployment would undo what the autoscaler did"
    (trigger,) = spec["triggers"]
    asked, used = trigger["metadata"], settings(overlay)
    assert (asked["bootstrapServers"], asked["consumerGroup"], asked["topic"], asked["offsetResetPolicy"]) == (
        used.bootstrap_servers, used.group_id, used.input_topics, used.auto_offset_reset,
    )  # fmt: skip
    behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behaviour["scaleDown"]["stabilizationWindowSeconds"] > behaviour["scaleUp"]["stabilizationWindowSeconds"]


def test_static_members_are_named_by_their_pods_and_back_within_the_session() -> None:
    named = {variable["name"]: variable["valueFrom"] for variable in container("static")["env"]}
    assert named["WORKER_GROUP_INSTANCE_ID"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    assert "WORKER_GROUP_INSTANCE_ID" not in settings_of_the_pod("cpu")
    assert workload("static")["spec"]["serviceName"] == the("Service", "static")["metadata"]["name"]
    assert settings("static").session_timeout_ms / 1000 > pod("static")["terminationGracePeriodSeconds"]


def test_a_gpu_is_asked_for_and_used() -> None:
    assert container("nvidia")["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container("nvidia")["image"].endswith(":cuda")
    assert settings("nvidia").device == "cuda", "a container sees its device as cuda:0, whatever its number on the node"
    assert settings("nvidia").max_batch_texts == "auto"
    assert settings("cpu").device == "cpu"


def test_the_cache_is_where_the_image_writes() -> None:
    dockerfile = (DEPLOY.parent / "Dockerfile").read_text()
    for overlay in OVERLAYS:
        (mount,) = [mount for mount in container(overlay)["volumeMounts"] if mount["name"] == "cache"]
        assert f"VOLUME {mount['mountPath']}\n" in dockerfile


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_files_that_the_settings_to_uncomment_name(overlay: str, tmp_path: Path) -> None:
    assert not [variable for variable in container(overlay)["env"] if "secretKeyRef" in variable.get("valueFrom", {})]
    (mount,) = [mount for mount in container(overlay)["volumeMounts"] if mount["name"] == "secrets"]
    (volume,) = [volume for volume in pod(overlay)["volumes"] if volume["name"] == "secrets"]
    assert mount["readOnly"]
    for source in volume["projected"]["sources"]:
        assert source["secret"]["optional"], "a cluster whose brokers want no login has none"
        for item in source["secret"]["items"]:
            (tmp_path / item["path"]).write_text("a-secret-of-nobody-here\n")
    text = (DEPLOY / "kubernetes" / "base" / "settings.env").read_text()
    shown = dict(re.findall(r"^# (WORKER_\w+)=(\S+)$", text, re.MULTILINE))
    assert {"WORKER_SASL_PASSWORD_FILE", "WORKER_HTTP_TOKEN_FILE", "WORKER_HTTP_NAMES"} <= shown.keys()
    here = {name: value.replace(mount["mountPath"], str(tmp_path)) for name, value in shown.items()}
    used = load(RunSettings, (), "run", settings_of_the_pod(overlay) | here)
    assert list(used.exposures()) == []
    assert used.sasl_password
    assert used.sasl_password.get_secret_value() == "a-secret-of-nobody-here"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pod_may_reach_dns_and_the_brokers_and_nobody_else(overlay: str) -> None:
    reached = {}
    for rule in the("NetworkPolicy", overlay)["spec"]["egress"]:
        for place in rule["to"]:
            namespace = place["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
            reached[namespace] = [(port["port"], port.get("endPort", port["port"])) for port in rule["ports"]]
    (broker,) = settings(overlay).bootstrap_servers.split(",")
    host, port = broker.split(":")
    ((lowest, highest),) = reached.pop(host.split(".")[1])
    assert lowest <= int(port) <= highest
    assert reached == {"kube-system": [(53, 53), (53, 53)]}


def test_the_operators_rules_are_prometheus_rules() -> None:
    rule = DEPLOY / "kubernetes" / "components" / "monitoring" / "prometheusrule.yaml"
    assert read(rule)["spec"] == read(RULES), "`make dashboard` writes it anew"
