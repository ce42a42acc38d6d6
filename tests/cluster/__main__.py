"""Applies the chart to a real Kubernetes API: python -m tests.cluster FOLDER, with the programs of `make cluster-test`.

What is shown: the API server takes and keeps every object, PodSecurity `restricted` lets the pods in, controllers and
scheduler do with them what the chart means, and wrong values are refused. What is not: no container runs, no packet is
filtered, no metric is scraped, KEDA scales nothing. The last line is `passed`; a failure ends the run with exit code 1.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster.control_plane import NAMESPACE, ControlPlane, control_plane, definitions, wait_for
from tests.cluster.wrong_values import WRONG, WrongValue

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "sentiment-worker"
ZONES = ("west", "east", "north")
NAME = "app.kubernetes.io/name=sentiment-worker"
PAUSED = "autoscaling.keda.sh/paused-replicas"
SMALL = ["--set=resources.requests.cpu=100m"]


def node(name: str, zone: str, **more: Any) -> dict[str, Any]:
    room = {"cpu": "64", "memory": "256Gi", "pods": "110"}
    gpu = more.pop("gpu", 0)
    if gpu:
        room["nvidia.com/gpu"] = str(gpu)
        more["taints"] = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]
    labels = {"topology.kubernetes.io/zone": zone, "kubernetes.io/hostname": name}
    return {
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels},
        "spec": more, "status": {"allocatable": room, "capacity": room},
    }  # fmt: skip


def volume(number: int) -> dict[str, Any]:
    """Something that a claim of class `standard` can be bound to; nobody mounts it."""
    spec = {
        "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "standard",
        "hostPath": {"path": f"/nowhere/{number}"},
    }  # fmt: skip
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"volume-{number}"}, "spec": spec}


class Trial:
    """One run: each method shows one thing, and ends the program with a sentence where it does not hold."""

    def __init__(self, cluster: ControlPlane) -> None:
        self.cluster = cluster

    def prepare(self) -> str:
        for file in definitions():
            self.cluster.kubectl("apply", "--server-side", f"--filename={file}")
        self.cluster.kubectl("wait", "crd", "--all", "--for=condition=Established", "--timeout=60s")
        labels = {
            "pod-security.kubernetes.io/enforce": "restricted",
            "pod-security.kubernetes.io/enforce-version": "latest",
        }
        self._apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
        for number, zone in enumerate(ZONES):
            self._apply(node(f"node-{number}", zone))
            self._apply(volume(number))
        self.cluster.kubectl("wait", "node", "--all", "--for=condition=Ready", "--timeout=60s")
        version = json.loads(self.cluster.kubectl("get", "--raw=/version").stdout)
        return f"Kubernetes {version['gitVersion']}, {len(ZONES)} nodes of kwok, namespace with PodSecurity restricted"

    def every_example_is_taken(self) -> str:
        taken = []
        for example in sorted((CHART / "ci").glob("*-values.yaml")):
            done = self._server_dry_run(f"--values={example}")
            if done.returncode or "Warning" in done.stderr:
                raise SystemExit(f"{example.name}: {done.stderr}")
            taken.append(f"{example.stem.removesuffix('-values')} ({len(done.stdout.splitlines())})")
        return f"server-side dry run takes every object, without a warning: {', '.join(taken)}"

    def install(self) -> str:
        self._helm("install", "cpu", "--set=keda.enabled=false,replicas=3", *SMALL)
        self._one_in_each_zone()
        manifest = self.cluster.run("helm", "get", "manifest", "worker").stdout
        difference = self.cluster.kubectl(
            "diff", "--server-side", "--force-conflicts", "--filename=-", given=manifest, check=False
        )
        if difference.returncode:
            raise SystemExit(f"kubectl diff: {difference.stdout}{difference.stderr}")
        return (
            f"install --wait: 3 pods run and are ready, one in each zone, as labelled ({', '.join(ZONES)}); empty diff"
        )

    def upgrade(self) -> str:
        before = self._hash()
        self._helm("upgrade", "cpu", "--set=keda.enabled=false,replicas=3,settings.linger_ms=25", *SMALL)
        self._one_in_each_zone()
        if self._hash() == before:
            raise SystemExit("a changed setting rolled no pod")
        data = self.cluster.get("configmap", "worker-sentiment-worker")["data"]
        if data["WORKER_LINGER_MS"] != "25":
            raise SystemExit(f"linger_ms is {data['WORKER_LINGER_MS']}")
        return "upgrade --wait with linger_ms=25: the rollout completes with new pods, one in each zone again"

    def another_delivery(self) -> str:
        """As docs/operating.md says under "Stop every worker first"."""
        again = ["helm", "upgrade", "worker", CHART, "--reuse-values", "--wait", "--timeout=2m"]
        self.cluster.run(*again, "--set=replicas=0")
        self.cluster.kubectl(
            "wait", "pod", "--for=delete", "--timeout=2m",
            f"--selector={NAME},app.kubernetes.io/instance=worker",
        )  # fmt: skip
        left = self._pods()
        self.cluster.run(*again, "--set=settings.delivery=exactly-once", "--set=replicas=3")
        self._running(3)
        data = self.cluster.get("configmap", "worker-sentiment-worker")["data"]
        if left or data["WORKER_DELIVERY"] != "exactly-once":
            raise SystemExit(f"pods {left}, data {data}")
        return "replicas=0 and kubectl wait leave no pod; the upgrade after that starts 3 with delivery=exactly-once"

    def roll_back(self) -> str:
        self.cluster.run("helm", "rollback", "worker", "1", "--wait", "--timeout=2m")
        data = self.cluster.get("configmap", "worker-sentiment-worker")["data"]
        if "WORKER_LINGER_MS" in data:
            raise SystemExit("rollback left linger_ms where it was")
        self._running(3)
        return "rollback --wait to revision 1: linger_ms is gone, the rollout completes"

    def one_eviction_at_a_time(self) -> str:
        budget = ["poddisruptionbudget", "worker-sentiment-worker"]
        wait_for(lambda: self.cluster.get(*budget)["status"].get("disruptionsAllowed") == 1, "the budget")
        first, second, _ = self._running(3)
        with self.cluster.frozen("kwok"):  # so that no pod takes the first one's place before the second is asked for
            done = [self._evict(pod["metadata"]["name"]) for pod in (first, second)]
        if done[0].returncode or not done[1].returncode or "disruption budget" not in done[1].stderr:
            raise SystemExit(f"evictions: {done}")
        self._running(3)
        return f"eviction: the first is granted; the second at once after it is refused: {done[1].stderr.strip()}"

    def the_check_runs(self) -> str:
        self.cluster.run("helm", "test", "worker", "--timeout=1m")
        return "helm test: its pod is let in and ends (kwok says so; nothing runs in it)"

    def uninstall(self) -> str:
        self.cluster.run("helm", "uninstall", "worker", "--wait", "--timeout=1m")
        self.cluster.kubectl("delete", "pod", "worker-sentiment-worker-check", check=False)
        kinds = "all,configmap,serviceaccount,networkpolicy,ingress,podmonitor,prometheusrule,scaledobject"

        def left() -> list[str]:
            items = self.cluster.get(kinds, "--selector=app.kubernetes.io/instance=worker")["items"]
            return [f"{item['kind']}/{item['metadata']['name']}" for item in items]

        wait_for(lambda: not left(), "uninstall to leave nothing")
        return "uninstall: nothing of the release is left"

    def with_keda(self) -> str:
        self._helm("install", "cpu", *SMALL)
        self.cluster.kubectl("annotate", "scaledobject/worker-sentiment-worker", f"{PAUSED}=0")
        self.cluster.kubectl("scale", "deployment/worker-sentiment-worker", "--replicas=2")
        self._running(2)
        self._helm("upgrade", "cpu", "--set=settings.linger_ms=25", *SMALL)
        self._running(2)
        scaled = self.cluster.get("scaledobject", "worker-sentiment-worker")
        if scaled["metadata"]["annotations"].get(PAUSED) != "0":
            raise SystemExit(f"an upgrade took the annotation away: {scaled['metadata']}")
        self.uninstall()
        most = scaled["spec"]["maxReplicaCount"]
        return f"with KEDA (up to {most}): an upgrade leaves the number of workers as it was set, and KEDA paused"

    def static_members(self) -> str:
        self._helm("install", "static", *SMALL)
        names = sorted(pod["metadata"]["name"] for pod in self._running(3))
        claims = self.cluster.get("persistentvolumeclaim")["items"]
        bound = [claim["metadata"]["name"] for claim in claims if claim["status"]["phase"] == "Bound"]
        self._helm("upgrade", "static", "--set=settings.linger_ms=25", *SMALL)
        self._running(3)
        self.uninstall()
        if len(bound) != 3:
            raise SystemExit(f"claims: {claims}")
        return f"static members: {', '.join(names)}, a bound claim each; the rollout of a StatefulSet completes"

    def a_gpu(self) -> str:
        self._helm("install", "gpu", "--set=replicas=1", "--wait=false")
        wait_for(lambda: "Insufficient nvidia.com/gpu" in self._why_pending(), "the scheduler to miss a GPU")
        self._apply(node("node-gpu", "west", gpu=1))
        (pod,) = self._running(1)
        self.uninstall()
        return f"GPU: the pod pends while no node has one, and then runs on {pod['spec']['nodeName']}, which is tainted"

    def a_pod_that_may_too_much_is_kept_out(self) -> str:
        self._helm(
            "install",
            "volume",
            "--set=model.volume.persistentVolumeClaim=null,model.volume.hostPath.path=/",
            "--wait=false",
        )

        def said() -> str:
            events = self.cluster.get("events")["items"]
            return " ".join(event["message"] for event in events if event["reason"] == "FailedCreate")

        wait_for(lambda: "violates PodSecurity" in said(), "PodSecurity to refuse a hostPath")
        self.uninstall()
        return "PodSecurity restricted keeps out a pod with model.volume.hostPath"

    def wrong_values_are_refused(self) -> str:
        counts: dict[str, int] = {}
        for wrong in WRONG:
            by = self._refused_by(wrong)
            print(f"    {' '.join(wrong.values):<100} {by}")
            counts[by.partition(":")[0]] = counts.get(by.partition(":")[0], 0) + 1
        return f"{len(WRONG)} of {len(WRONG)} wrong values are refused: {counts}"

    def _refused_by(self, wrong: WrongValue) -> str:
        arguments = [f"--set-json={value}" for value in wrong.values]
        rendered = self._template(*arguments, check=False)
        if rendered.returncode:
            by = "schema" if "values don't meet" in rendered.stderr else "chart"
            said = rendered.stderr
        else:
            done = self._server_dry_run(*arguments)
            if not done.returncode:
                raise SystemExit(f"{wrong.values} is taken")
            by, said = "server", done.stderr
        said = " ".join(said.split())
        if wrong.by != by or wrong.says not in said:
            raise SystemExit(f"{wrong.values}: {by}, not {wrong.by} with {wrong.says!r}, says {said}")
        return f"{by}: … {wrong.says} …"

    def _template(self, *arguments: str, check: bool = True) -> Any:
        return self.cluster.run("helm", "template", "worker", CHART, *arguments, check=check)

    def _server_dry_run(self, *arguments: str) -> Any:
        """What the server says of the chart. The pod of `helm test` is let in only where its ServiceAccount is there."""
        account = self._template(*arguments, "--show-only=templates/serviceaccount.yaml").stdout
        self.cluster.kubectl("apply", "--server-side", "--filename=-", given=account)
        done = self.cluster.kubectl(
            "apply", "--server-side", "--dry-run=server", "--validate=strict", "--filename=-",
            given=self._template(*arguments).stdout, check=False,
        )  # fmt: skip
        self.cluster.kubectl("delete", "--filename=-", given=account)
        return done

    def _helm(self, command: str, example: str, *arguments: str) -> None:
        """Installs or upgrades the release `worker`, and waits for its pods unless told otherwise."""
        waits = [] if "--wait=false" in arguments else ["--wait", "--timeout=2m"]
        self.cluster.run(
            "helm", command, "worker", CHART, f"--values={CHART / 'ci' / f'{example}-values.yaml'}",
            *[argument for argument in arguments if argument != "--wait=false"], *waits,
        )  # fmt: skip

    def _pods(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.cluster.get("pods", "--selector=app.kubernetes.io/instance=worker")["items"]
        return [pod for pod in items if not pod["metadata"]["name"].endswith("-check")]

    def _running(self, number: int) -> list[dict[str, Any]]:
        """The pods, once this number of them runs, is ready, and no other one is there."""

        def settled() -> bool:
            pods = self._pods()
            ready = [
                pod for pod in pods
                if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
                and any(item["type"] == "Ready" and item["status"] == "True" for item in pod["status"]["conditions"])
            ]  # fmt: skip
            return len(pods) == len(ready) == number

        wait_for(settled, f"{number} pods to run")
        return self._pods()

    def _one_in_each_zone(self) -> None:
        zones = [pod["metadata"]["labels"].get("topology.kubernetes.io/zone", "none") for pod in self._running(3)]
        if sorted(zones) != sorted(ZONES):
            raise SystemExit(f"the pods' zone labels are {zones}")

    def _hash(self) -> str:
        return str(self._pods()[0]["metadata"]["labels"].get("pod-template-hash"))

    def _why_pending(self) -> str:
        conditions = [item for pod in self._pods() for item in pod["status"].get("conditions", [])]
        return " ".join(item.get("message", "") for item in conditions)

    def _evict(self, name: str) -> Any:
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": NAMESPACE}}
        return self.cluster.kubectl(
            "create", f"--raw=/api/v1/namespaces/{NAMESPACE}/pods/{name}/eviction", "--filename=-",
            given=json.dumps(eviction), check=False,
        )  # fmt: skip

    def _apply(self, item: dict[str, Any]) -> None:
        self.cluster.kubectl("create", "--filename=-", given=json.dumps(item))


def main(folder: Path) -> None:
    begun = time.monotonic()
    with control_plane(folder) as cluster:
        trial = Trial(cluster)
        steps: list[Callable[[], str]] = [
            trial.prepare, trial.every_example_is_taken, trial.install, trial.upgrade, trial.another_delivery,
            trial.roll_back, trial.one_eviction_at_a_time, trial.the_check_runs, trial.uninstall, trial.with_keda,
            trial.static_members, trial.a_gpu, trial.a_pod_that_may_too_much_is_kept_out, trial.wrong_values_are_refused,
        ]  # fmt: skip
        for step in steps:
            print(f"{time.monotonic() - begun:6.1f} s  {step()}", flush=True)
    print("passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
