"""Three nodes of one Kafka cluster, on this machine's Java."""

import contextlib
from collections.abc import Iterator

from tests.broker import Extras, JavaBroker, free_port

NODES = (1, 2, 3)


class Node(JavaBroker):
    """One of three, each broker and controller. Alone it does not answer: two make the cluster."""

    def __init__(self, number: int, ports: dict[int, tuple[int, int]], cluster_id: str) -> None:
        port, controller = ports[number]
        address = f"PLAINTEXT://127.0.0.1:{port}"
        voters = ",".join(f"{node}@localhost:{ports[node][1]}" for node in NODES)
        super().__init__(
            Extras(
                cluster_id=cluster_id,
                properties={
                    "node.id": str(number),
                    "controller.quorum.voters": voters,
                    "listeners": f"{address},CONTROLLER://localhost:{controller}",
                    "advertised.listeners": address,
                    "min.insync.replicas": "2",
                    "offsets.topic.replication.factor": "3",
                    "transaction.state.log.replication.factor": "3",
                    "transaction.state.log.min.isr": "2",
                },
            )
        )
        self.number = number
        self.bootstrap = f"127.0.0.1:{port}"

    def begin(self) -> None:
        """Starts the process, and does not wait for it."""
        self._launch()


@contextlib.contextmanager
def cluster() -> Iterator[dict[int, Node]]:
    """The nodes by their number, all of them answering. UnavailableError where there is no Java."""
    ports = {number: (free_port(), free_port()) for number in NODES}
    cluster_id = Extras().cluster_id
    nodes: dict[int, Node] = {}
    try:
        for number in NODES:
            nodes[number] = Node(number, ports, cluster_id)
            nodes[number].begin()
        for node in nodes.values():
            node.wait_until_up()
        yield nodes
    finally:
        for node in nodes.values():
            node.close()
