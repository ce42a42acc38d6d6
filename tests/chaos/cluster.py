"""Several nodes of one Kafka cluster, on this machine's Java."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from tests.support.broker import Extras, JavaBroker, free_port

NODES = (1, 2, 3)


class Node(JavaBroker):
    """One broker of several; a controller too where `controllers`, ports by node, name it. Alone it may not answer.

    `ways` are listeners beside the plain one, by name: the port, and the address that clients are sent to.
    """

    def __init__(
        self,
        number: int,
        cluster_id: str,
        controllers: Mapping[int, int],
        *,
        replicas: int = 1,
        ways: Mapping[str, tuple[int, str]] | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> None:
        self.number = number
        self._ways = {name: port for name, (port, _) in (ways or {}).items()}
        plain = free_port()
        bound = {"PLAINTEXT": plain, **self._ways}
        listeners = [f"{name}://127.0.0.1:{port}" for name, port in bound.items()]
        if number in controllers:
            listeners.append(f"CONTROLLER://localhost:{controllers[number]}")
        self._plain = f"127.0.0.1:{plain}"
        addresses = {name: address for name, (_, address) in (ways or {}).items()}
        super().__init__(
            Extras(
                cluster_id=cluster_id,
                listeners={name: ("PLAINTEXT", port) for name, port in self._ways.items()},
                properties={
                    "node.id": str(number),
                    "process.roles": "broker,controller" if number in controllers else "broker",
                    "controller.quorum.voters": ",".join(
                        f"{node}@localhost:{controllers[node]}" for node in controllers
                    ),
                    "listeners": ",".join(listeners),
                    "advertised.listeners": self._advertised(addresses),
                    "min.insync.replicas": str(max(1, replicas - 1)),
                    "offsets.topic.replication.factor": str(replicas),
                    "transaction.state.log.replication.factor": str(replicas),
                    "transaction.state.log.min.isr": str(max(1, replicas - 1)),
                    **(properties or {}),
                },
            )
        )
        self.bootstrap = self._plain

    def begin(self) -> None:
        """Starts the process, and does not wait for it."""
        self._launch()

    def advertise(self, addresses: Mapping[str, str]) -> None:
        """Where clients of each way are sent to from the next start on."""
        lines = [line for line in self._config.read_text().splitlines() if not line.startswith("advertised.listeners")]
        self._config.write_text("\n".join([*lines, f"advertised.listeners={self._advertised(addresses)}"]) + "\n")

    def _advertised(self, addresses: Mapping[str, str]) -> str:
        return ",".join(f"{name}://{address}" for name, address in {"PLAINTEXT": self._plain, **addresses}.items())


@contextlib.contextmanager
def cluster() -> Iterator[dict[int, Node]]:
    """Three nodes by their number, all of them answering. UnavailableError where there is no Java."""
    controllers = {number: free_port() for number in NODES}
    cluster_id = Extras().cluster_id
    nodes: dict[int, Node] = {}
    try:
        for number in NODES:
            nodes[number] = Node(number, cluster_id, controllers, replicas=3)
        begin_all(nodes.values())
        yield nodes
    finally:
        for node in nodes.values():
            node.close()


def begin_all(nodes: Iterable[Node]) -> None:
    """Starts them side by side, for none answers before there are enough; blocks until all do."""
    nodes = list(nodes)
    for node in nodes:
        node.begin()
    for node in nodes:
        node.wait_until_up()
