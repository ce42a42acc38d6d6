"""A Kubernetes of real parts on 127.0.0.1, without a container runtime: etcd, API server, controllers, scheduler, and kwok.

kwok takes the kubelet's place: it says of each pod that it runs, and starts nothing. All of these are processes of this
machine, which `make cluster-test` builds from the Go modules that go.mod names.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MODULE = Path(__file__).parent
TOKEN = "cluster-test"
NAMESPACE = "sentiment"  # where kubectl and helm work
# The modules that hold the definitions of custom resources, with the sums that go.sum would have: nothing of them is built.
DEFINITIONS = {
    "github.com/kedacore/keda/v2@v2.21.0": (
        "h1:R6z2HZvstK4RLUMxroNACzBj74xGxt3kG59b5Xc+Xps=",
        ["config/crd/bases/keda.sh_scaledobjects.yaml", "config/crd/bases/keda.sh_triggerauthentications.yaml"],
    ),
    "github.com/prometheus-operator/prometheus-operator@v0.85.0": (
        "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=",
        [
            f"example/prometheus-operator-crd/monitoring.coreos.com_{kind}.yaml"
            for kind in ("podmonitors", "servicemonitors", "prometheusrules")
        ],
    ),
}
STAGES = [
    "node/fast/node-initialize.yaml", "node/heartbeat/node-heartbeat.yaml",
    "pod/fast/pod-ready.yaml", "pod/fast/pod-delete.yaml",
]  # fmt: skip


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Blocks until `condition` is true; SystemExit with `what` when it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"after {seconds:g} s still waiting for {what}")
        time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def go(*arguments: str) -> str:
    """What a command of Go prints, run where go.mod is."""
    return subprocess.run(["go", *arguments], cwd=MODULE, check=True, capture_output=True, text=True).stdout


def definitions() -> list[Path]:
    """The files that define KEDA's and the Prometheus operator's resources, fetched if they are not there."""
    files = []
    for module, (expected, names) in DEFINITIONS.items():
        fetched: dict[str, Any] = json.loads(go("mod", "download", "-json", module))
        if fetched["Sum"] != expected:
            raise SystemExit(f"{module} has the sum {fetched['Sum']} in place of {expected}")
        files += [Path(fetched["Dir"]) / name for name in names]
    return files


class ControlPlane:
    """Starts the processes, and ends them with `close`. `bin` holds what was built, `home` the data and the logs."""

    def __init__(self, bin: Path, home: Path) -> None:
        self.bin = bin
        self.home = home
        self.kubeconfig = home / "kubeconfig"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Blocks until the API answers."""
        client, peer, secure = free_ports(3)
        etcd, api = f"http://127.0.0.1:{client}", f"https://127.0.0.1:{secure}"
        self._launch(
            "server", f"--data-dir={self.home / 'etcd'}", f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}", "--unsafe-no-fsync",
        )  # fmt: skip
        key = self.home / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        (self.home / "tokens.csv").write_text(f"{TOKEN},admin,admin,system:masters\n")
        self._launch(
            "kube-apiserver", f"--etcd-servers={etcd}", "--bind-address=127.0.0.1", f"--secure-port={secure}",
            f"--cert-dir={self.home}", f"--token-auth-file={self.home / 'tokens.csv'}", "--authorization-mode=RBAC",
            "--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
        )  # fmt: skip
        self._write_kubeconfig(api)
        wait_for(self._answers, "the API server")
        near = [f"--kubeconfig={self.kubeconfig}", "--bind-address=127.0.0.1", "--leader-elect=false"]
        self._launch(
            "kube-controller-manager", *near, f"--secure-port={free_ports(1)[0]}",
            f"--service-account-private-key-file={key}", f"--root-ca-file={self.home / 'apiserver.crt'}",
        )  # fmt: skip
        self._launch("kube-scheduler", *near, f"--secure-port={free_ports(1)[0]}")
        self._launch(
            "kwok", f"--kubeconfig={self.kubeconfig}", "--manage-all-nodes=true", "--node-port=0", *self._stages()
        )

    def kubectl(self, *arguments: object, given: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("kubectl", *arguments, given=given, check=check)

    def run(
        self, program: str, *arguments: object, given: str = "", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs kubectl or helm against this cluster; SystemExit with what it said when it fails, unless `check` is false."""
        done = subprocess.run(
            [self.bin / program, *map(str, arguments)], input=given, capture_output=True, text=True, check=False,
            env=os.environ | {"KUBECONFIG": str(self.kubeconfig), "HELM_CACHE_HOME": str(self.home / "helm")},
        )  # fmt: skip
        if check and done.returncode:
            raise SystemExit(f"{program} {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}")
        return done

    def get(self, *arguments: object) -> Any:
        """What `kubectl get … --output json` says."""
        return json.loads(self.kubectl("get", *arguments, "--output=json").stdout)

    @contextlib.contextmanager
    def frozen(self, program: str) -> Iterator[None]:
        """Holds a process still for as long as the block takes."""
        self._processes[program].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._processes[program].send_signal(signal.SIGCONT)

    def close(self) -> None:
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in reversed(self._processes.values()):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _launch(self, program: str, *arguments: str) -> None:
        with (self.home / f"{program}.log").open("wb") as log:
            command = [str(self.bin / program), *arguments]
            self._processes[program] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _answers(self) -> bool:
        ended = [program for program, process in self._processes.items() if process.poll() is not None]
        if ended:
            raise SystemExit(f"{ended[0]} ended: {(self.home / f'{ended[0]}.log').read_text()[-2000:]}")
        return self.kubectl("get", "--raw=/readyz", check=False).stdout == "ok"

    def _write_kubeconfig(self, api: str) -> None:
        cluster = {"server": api, "certificate-authority": str(self.home / "apiserver.crt")}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin", "namespace": NAMESPACE}}],
        }  # fmt: skip
        self.kubeconfig.write_text(json.dumps(config))

    def _stages(self) -> Sequence[str]:
        """kwok's own files, which say how a node and a pod come to run, and ours for the pod of `helm test`."""
        module = Path(go("list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kwok").strip())
        return [f"--config={module / 'kustomize' / 'stage' / name}" for name in STAGES] + [
            f"--config={MODULE / 'check-succeeds.yaml'}"
        ]


@contextlib.contextmanager
def control_plane(bin: Path) -> Iterator[ControlPlane]:
    with tempfile.TemporaryDirectory(prefix="cluster-test-") as folder:
        plane = ControlPlane(bin, Path(folder))
        try:
            plane.start()
            yield plane
        finally:
            plane.close()
