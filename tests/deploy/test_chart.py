"""The chart: valid for helm and for the API, what the worker needs of it, and what it refuses."""

import json
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster.wrong_values import WRONG, WrongValue
from tests.deploy.manifests import (
    CHART,
    DEFAULT,
    DEPLOY,
    EXAMPLES,
    RULES,
    alerts,
    all_of,
    container,
    helm,
    pod,
    read,
    rendered,
    settings_of_the_pod,
    template,
    the,
    values,
    workload,
)
from worker.settings.run import RunSettings
from worker.settings.sources import load

VERSIONS = ("1.32", "1.36")
SCHEMAS = Path(__file__).parent / "schemas"  # of custom resources
LABELS = {"app.kubernetes.io/name": "sentiment-worker", "app.kubernetes.io/instance": "worker"}
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
SECRETS = "/run/secrets/sentiment-worker/"


def check(item: dict[str, Any], version: str) -> None:
    """Raises jsonschema's ValidationError, also for a field that the API does not know."""
    schema = SCHEMAS / f"{item['kind']}.json"
    if schema.exists():
        jsonschema.validate(item, json.loads(schema.read_text()))
    else:
        assert kubernetes_validate.validate(item, version, strict=True) == version


def settings(example: str) -> RunSettings:
    return load(RunSettings, (), "run", settings_of_the_pod(example))


def variables(example: str) -> dict[str, Any]:
    return {
        variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container(example)["env"]
    }


@pytest.mark.parametrize("example", EXAMPLES)
def test_helm_finds_nothing_to_say(example: str) -> None:
    done = helm("lint", "--strict", CHART, *values(example))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_api_takes_every_object(example: str, version: str) -> None:
    for item in rendered(example):
        check(item, version)


@pytest.mark.parametrize("kind", ["Deployment", "PodMonitor", "ScaledObject", "NetworkPolicy"])
def test_a_field_that_the_api_does_not_know_is_found(kind: str) -> None:
    item = the(kind, "cpu")
    with pytest.raises(jsonschema.ValidationError):
        check({**item, "spec": {**item["spec"], "replica": 3}}, VERSIONS[0])


def described(properties: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in properties.items():
        yield f"{path}{name}", value
        if name != "settings":  # docs/settings.md describes them
            yield from described(value.get("properties", {}), f"{path}{name}.")


@pytest.mark.parametrize(("name", "value"), list(described(SCHEMA["properties"])))
def test_each_value_has_a_sentence_and_no_unknown_value_beside_it(name: str, value: dict[str, Any]) -> None:
    assert re.match(r"[A-Z].*\.$", value["description"]), name
    if "properties" in value:
        assert value["additionalProperties"] is False, name


def test_the_values_are_what_the_schema_says() -> None:
    made = runpy.run_path(str(DEPLOY / "helm" / "values.py"))
    assert (CHART / "values.schema.json").read_text(encoding="utf-8") == made["schema"](), (
        "`make dashboard` writes it anew"
    )
    assert (CHART / "values.yaml").read_text(encoding="utf-8") == made["built"](), "`make dashboard` writes it anew"
    jsonschema.validate(read(CHART / "values.yaml"), SCHEMA)


def test_a_setting_may_be_written_as_a_number_a_boolean_or_text_as_in_a_variable() -> None:
    given = (
        'linger_ms="25"', "max_age_s=1.5", 'max_batch_tokens="auto"', 'max_windows="8"', 'console_texts="yes"',
        "schema_auto_register=false", "group_id=42", 'http_names=["a.example","b.example"]', "tracing=null",
    )  # fmt: skip
    done = template(*(f"--set-json=settings.{value}" for value in given))
    (data,) = [item["data"] for item in yaml.safe_load_all(done.stdout) if item and item["kind"] == "ConfigMap"]
    used = load(RunSettings, (), "run", data)
    assert (used.linger_ms, used.max_age_s, used.max_batch_tokens, used.max_windows) == (25, 1.5, "auto", 8)
    assert (used.console_texts, used.schema_auto_register, used.group_id) == (True, False, "42")
    assert used.http_names == "a.example,b.example"


def test_package_image_and_chart_have_one_version() -> None:
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = read(CHART / "Chart.yaml")
    image = re.findall(r"^ARG VERSION=(.*)$", (DEPLOY.parent / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {chart["version"], chart["appVersion"], *image} == {project["version"]}


def test_a_release_names_the_published_image_in_the_chart() -> None:
    """release.yml replaces this line before it packages the chart."""
    workflow = (DEPLOY.parent / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    (line,) = re.findall(r'sed -i "s\|\^(.*?)\$\|', workflow)
    assert (CHART / "values.yaml").read_text(encoding="utf-8").split("\n").count(line.replace('\\"', '"')) == 1


def test_the_image_has_the_packages_version_and_is_not_the_latest() -> None:
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert container(DEFAULT)["image"] == f"sentiment-worker:{project['version']}-cpu"
    assert container("volume")["image"].startswith("registry.example/sentiment-worker@sha256:")


@pytest.mark.parametrize(
    "wrong", [wrong for wrong in WRONG if wrong.by != "server"], ids=lambda wrong: wrong.values[-1]
)
def test_a_value_that_does_harm_is_refused_with_the_reason(wrong: WrongValue) -> None:
    done = template(*(f"--set-json={value}" for value in wrong.values))
    assert done.returncode != 0
    assert wrong.says in " ".join(done.stderr.split())


@pytest.mark.parametrize("example", EXAMPLES)
def test_everything_selects_the_workers_and_no_other_pod(example: str) -> None:
    labels = workload(example)["spec"]["template"]["metadata"]["labels"]
    assert labels == LABELS | {"app.kubernetes.io/part-of": "sentiment-worker"}
    assert workload(example)["spec"]["selector"] == {"matchLabels": LABELS}
    assert the("PodDisruptionBudget", example)["spec"]["selector"] == {"matchLabels": LABELS}
    for monitor in all_of("PodMonitor", example):
        assert monitor["spec"]["selector"] == {"matchLabels": LABELS}
    for service in all_of("Service", example):
        assert service["spec"]["selector"] == LABELS
    for spread in pod(example)["topologySpreadConstraints"]:
        assert spread["labelSelector"] == {"matchLabels": LABELS}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_check_reaches_what_the_workers_reach_but_is_none_of_them(example: str) -> None:
    check_pod = the("Pod", example)
    labels = check_pod["metadata"]["labels"]
    assert the("NetworkPolicy", example)["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert not LABELS.items() <= labels.items()
    (checked,) = check_pod["spec"]["containers"]
    assert checked["args"] == ["check"]
    for field in ("image", "envFrom", "volumeMounts", "securityContext"):
        assert checked[field] == container(example)[field]
    assert {mount["name"] for mount in checked["volumeMounts"]} <= {
        item["name"] for item in check_pod["spec"]["volumes"]
    }


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_pod_may_do_no_more_than_it_has_to(example: str) -> None:
    spec = pod(example)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in [*spec["containers"], *spec.get("initContainers", [])]:
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
    account = the("ServiceAccount", example)
    assert spec["serviceAccountName"] == account["metadata"]["name"]
    assert spec["automountServiceAccountToken"] is account["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert not all_of("Secret", example), "secrets are referred to, not held"


@pytest.mark.parametrize("example", EXAMPLES)
def test_probes_and_metrics_ask_where_the_worker_answers(example: str) -> None:
    (port,) = container(example)["ports"]
    assert str(port["containerPort"]) == settings_of_the_pod(example)["WORKER_HTTP_PORT"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container(example)[probe]["httpGet"]
        assert asked["port"] == port["name"]
        assert asked["path"] == ("/readyz" if probe == "readinessProbe" else "/livez")
    for monitor in all_of("PodMonitor", example):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")


def test_an_update_spreads_the_new_pods_as_if_the_old_ones_were_gone() -> None:
    for example, labels in (("cpu", ["pod-template-hash"]), ("static", None)):
        for spread in pod(example)["topologySpreadConstraints"]:
            assert spread.get("matchLabelKeys") == labels


def test_a_cluster_that_chooses_the_user_is_not_asked_for_one() -> None:
    done = template('--set-json=podSecurityContext={"runAsUser":null,"runAsGroup":null,"fsGroup":null}')
    (deployment,) = [item for item in yaml.safe_load_all(done.stdout) if item and item["kind"] == "Deployment"]
    assert set(deployment["spec"]["template"]["spec"]["securityContext"]) == {
        "runAsNonRoot", "fsGroupChangePolicy", "seccompProfile",
    }  # fmt: skip


def test_another_autoscaler_keeps_the_number_of_workers() -> None:
    assert "replicas:" in template().stdout
    assert "replicas:" not in template("--set=replicas=null").stdout


@pytest.mark.parametrize(
    "given",
    [
        ['settings.schema_registry_url="http://registry:8081"', 'networkPolicy.egress=[{"ports":[{"port":8081}]}]'],
        ['settings.schema_registry_url="https://registry"', 'networkPolicy.egress=[{"to":[{"podSelector":{}}]}]'],
        ['settings.schema_registry_url="http://r:8081"', 'networkPolicy.brokers.ports=[{"port":9092},{"port":8081}]'],
        ['settings.schema_registry_url="http://registry:8081"', "networkPolicy.enabled=false"],
        ['settings.oauth_token_url="https://login/token"', 'env.HTTPS_PROXY="http://proxy:3128"'],
        ['settings.sasl_mechanism="AWS_MSK_IAM"', 'networkPolicy.egress=[{"ports":[{"port":80}]}]'],
        ['settings.sasl_mechanism="AWS_MSK_IAM"', 'env.HTTPS_PROXY="http://proxy:3128"'],
    ],
    ids=str,
)  # fmt: skip
def test_an_address_whose_port_is_open_is_taken(given: list[str]) -> None:
    done = template(*(f"--set-json={value}" for value in given))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("example", [example for example in EXAMPLES if example != "static"])
def test_pods_are_named_to_the_brokers_and_roll_when_a_setting_changes(example: str) -> None:
    annotations = workload(example)["spec"]["template"]["metadata"]["annotations"]
    done = template(*values(example), "--set", "settings.linger_ms=25")
    assert annotations["checksum/settings"] not in done.stdout
    assert "WORKER_GROUP_INSTANCE_ID" not in variables(example)
    if example != "volume":
        assert variables(example)["WORKER_CLIENT_ID"] == {"fieldRef": {"fieldPath": "metadata.name"}}


def test_the_autoscaler_scales_this_workload_by_this_groups_lag() -> None:
    spec = the("ScaledObject", "cpu")["spec"]
    assert spec["scaleTargetRef"] == {"kind": "Deployment", "name": workload("cpu")["metadata"]["name"]}
    assert "replicas" not in workload("cpu")["spec"], "each upgrade would undo what the autoscaler did"
    (trigger,) = spec["triggers"]
    asked, used = trigger["metadata"], settings("cpu")
    assert (asked["bootstrapServers"], asked["consumerGroup"], asked["topic"], asked["offsetResetPolicy"]) == (
        used.bootstrap_servers, used.group_id, used.input_topics, used.auto_offset_reset,
    )  # fmt: skip
    behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behaviour["scaleDown"]["stabilizationWindowSeconds"] > behaviour["scaleUp"]["stabilizationWindowSeconds"]
    assert not all_of("TriggerAuthentication", "cpu")


def test_the_autoscaler_logs_in_as_the_workers_do() -> None:
    (trigger,) = the("ScaledObject", "scram")["spec"]["triggers"]
    assert "topic" not in trigger["metadata"], "with a pattern KEDA takes all topics of the group"
    assert (trigger["metadata"]["sasl"], trigger["metadata"]["tls"]) == ("scram_sha512", "enable")
    assert trigger["authenticationRef"] == {"name": the("TriggerAuthentication", "scram")["metadata"]["name"]}
    login = the("TriggerAuthentication", "scram")["spec"]
    assert {(item["parameter"], item["name"], item["key"]) for item in login["secretTargetRef"]} == {
        ("password", "kafka", "password"), ("cert", "kafka-client", "tls.crt"), ("key", "kafka-client", "tls.key"),
        ("keyPassword", "kafka-client", "password"),
    }  # fmt: skip
    assert parameters("scram") == {"username": "sentiment-worker", "ca": None}


def test_the_autoscaler_gets_a_token_as_the_workers_do() -> None:
    (trigger,) = the("ScaledObject", "oauth")["spec"]["triggers"]
    assert trigger["metadata"]["sasl"] == "oauthbearer"
    (secret,) = the("TriggerAuthentication", "oauth")["spec"]["secretTargetRef"]
    assert secret == {"parameter": "password", "name": "oauth", "key": "client-secret"}
    assert parameters("oauth") == {
        "username": "sentiment-worker", "scopes": "kafka,profile",
        "oauthTokenEndpointUri": "https://login.example/realms/kafka/protocol/openid-connect/token",
    }  # fmt: skip


def parameters(example: str) -> dict[str, str | None]:
    """What KEDA reads from ConfigMaps, by its own names; None for a ConfigMap that the chart does not make."""
    texts = {item["metadata"]["name"]: item["data"] for item in all_of("ConfigMap", example)}
    sources = the("TriggerAuthentication", example)["spec"]["configMapTargetRef"]
    return {source["parameter"]: texts.get(source["name"], {}).get(source["key"]) for source in sources}


def test_static_members_are_named_by_their_pods_and_back_within_the_session() -> None:
    assert variables("static")["WORKER_GROUP_INSTANCE_ID"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    services = {service["metadata"]["name"]: service["spec"] for service in all_of("Service", "static")}
    assert services[workload("static")["spec"]["serviceName"]]["clusterIP"] == "None"
    session = int(settings_of_the_pod("static")["WORKER_SESSION_TIMEOUT_MS"])
    assert session / 1000 > pod("static")["terminationGracePeriodSeconds"]
    (claim,) = workload("static")["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] in {mount["name"] for mount in container("static")["volumeMounts"]}


def test_the_worker_knows_the_names_under_which_it_is_asked() -> None:
    names = settings_of_the_pod("static")["WORKER_HTTP_NAMES"].split(",")
    (rule,) = the("Ingress", "static")["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert {rule["host"], backend["name"], f"{backend['name']}.sentiment.svc"} <= set(names)
    service = {item["metadata"]["name"]: item for item in all_of("Service", "static")}[backend["name"]]
    assert backend["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    monitor = the("ServiceMonitor", "static")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["endpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "sentiment-worker-http", "key": "token"}}


def test_a_gpu_is_asked_for_and_used() -> None:
    assert container("gpu")["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container("gpu")["image"].endswith("-cuda")
    assert settings("gpu").device == "cuda", "a container sees its device as cuda:0, whatever its number on the node"
    assert settings("gpu").max_batch_texts == "auto"
    assert settings("cpu").device == "cpu"
    assert settings("gpu").max_unpacked_bytes == 268435456, "a large number keeps all its digits"
    assert settings("gpu").input_topics == "texts,reviews"


def test_the_cache_is_where_the_image_writes() -> None:
    dockerfile = (DEPLOY.parent / "Dockerfile").read_text()
    for example in EXAMPLES:
        mounts = {mount["name"]: mount["mountPath"] for mount in container(example)["volumeMounts"]}
        assert f"VOLUME {mounts['cache']}\n" in dockerfile
        if "hub" in mounts:
            assert f"HF_HOME={mounts['hub']} " in dockerfile
    assert the("PersistentVolumeClaim", "scram")["spec"]["accessModes"] == ["ReadWriteMany"]
    (own,) = the("StatefulSet", "static")["spec"]["volumeClaimTemplates"]
    assert own["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_the_model_is_mounted_where_the_worker_loads_it() -> None:
    for example, model in (("oauth", "/model"), ("volume", "/model/rubert-tiny")):
        assert settings_of_the_pod(example)["WORKER_MODEL"] == model
        (mount,) = [mount for mount in container(example)["volumeMounts"] if mount["name"] == "model"]
        assert (mount["mountPath"], mount["readOnly"]) == ("/model", True)
    (init,) = pod("oauth")["initContainers"]
    assert {"name": "model", "mountPath": "/model"} in init["volumeMounts"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_secrets_are_files_that_are_mounted(example: str) -> None:
    assert not [
        source for source in variables(example).values() if isinstance(source, dict) and "secretKeyRef" in source
    ]
    read_files = {
        name: value.removeprefix(SECRETS)
        for name, value in variables(example).items()
        if str(value).startswith(SECRETS)
    }
    mounted = [volume["projected"]["sources"] for volume in pod(example)["volumes"] if volume["name"] == "files"]
    paths = [
        source[kind].get("path") or source[kind]["items"][0]["path"]
        for sources in mounted
        for source in sources
        for kind in source
    ]
    assert sorted(read_files.values()) == sorted(paths)
    for name, path in read_files.items():
        assert name in (f"WORKER_{path.upper()}", f"WORKER_{path.upper()}_FILE", "HF_TOKEN_PATH")


def test_every_file_that_the_worker_can_read_can_be_given() -> None:
    given = set(SCHEMA["properties"]["files"]["properties"])
    secrets = {name for name in RunSettings.model_fields if name.endswith(("password", "secret", "token"))}
    files = {name for name in RunSettings.model_fields if name.endswith(("file",))}
    assert secrets | files <= given
    assert variables("scram")["HF_TOKEN_PATH"] == f"{SECRETS}hub_token"
    assert all(re.search("(password|secret|token|file)$", name) for name in given), (
        "what _refuse.tpl refuses as settings"
    )


def test_the_rack_is_the_zone_that_kubernetes_copies_to_the_pod() -> None:
    source = {"fieldRef": {"fieldPath": "metadata.labels['topology.kubernetes.io/zone']"}}
    assert variables("oauth")["WORKER_CLIENT_RACK"] == source
    assert "WORKER_CLIENT_RACK" not in variables(DEFAULT)


def test_the_pod_may_reach_dns_and_the_brokers_and_nobody_else() -> None:
    reached = {}
    for rule in the("NetworkPolicy", DEFAULT)["spec"]["egress"]:
        for place in rule["to"]:
            namespace = place["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
            reached[namespace] = [(port["port"], port.get("endPort", port["port"])) for port in rule["ports"]]
    (broker,) = settings(DEFAULT).bootstrap_servers.split(",")
    host, port = broker.split(":")
    ((lowest, highest),) = reached.pop(host.split(".")[1])
    assert lowest <= int(port) <= highest
    assert reached == {"kube-system": [(53, 53), (53, 53)]}


def test_ports_and_places_of_the_network_are_values() -> None:
    _, brokers, proxy = the("NetworkPolicy", "scram")["spec"]["egress"]
    assert brokers == {"to": [{"ipBlock": {"cidr": "192.0.2.0/28"}}], "ports": [{"port": 9093}]}
    assert proxy["ports"] == [{"port": 3128, "protocol": "TCP"}]


def test_the_charts_rules_are_prometheus_rules() -> None:
    assert (CHART / "files" / "rules.yaml").read_text() == RULES.read_text(), "`make dashboard` writes it anew"
    assert the("PrometheusRule", "cpu")["spec"] == read(RULES)
    assert the("PrometheusRule", "cpu")["metadata"]["labels"]["release"] == "prometheus"


def test_alerts_lead_to_the_runbook_that_is_given() -> None:
    runbook = "https://wiki.example/operating"
    done = template("--set=monitoring.rules.enabled=true", f"--set=monitoring.rules.runbook={runbook}")
    (made,) = [item for item in yaml.safe_load_all(done.stdout) if item and item["kind"] == "PrometheusRule"]
    links = [
        rule["annotations"]["runbook_url"]
        for group in made["spec"]["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    assert links == [f"{runbook}#{alert['alert'].lower()}" for alert in alerts()]
