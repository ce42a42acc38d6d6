"""Two nodes of one Kafka cluster, on this machine's Java. While the second is paused its partitions have no leader."""

import contextlib
from collections.abc import Iterator

from tests.support.broker import Extras, JavaBroker, free_port


class Node(JavaBroker):
    """A broker; the first one is the controller, too."""

    def __init__(self, number: int, controller: int, cluster_id: str) -> None:
        port = free_port()
        address = f"PLAINTEXT://127.0.0.1:{port}"
        own = {"node.id": str(number), "controller.quorum.voters": f"1@localhost:{controller}"}
        if number == 1:
            listeners = {"listeners": f"{address},CONTROLLER://localhost:{controller}"}
        else:
            listeners = {"listeners": address, "process.roles": "broker"}
        super().__init__(
            Extras(cluster_id=cluster_id, properties={**own, **listeners, "advertised.listeners": address})
        )
        self.bootstrap = f"127.0.0.1:{port}"


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Both answer. UnavailableError where there is no Java."""
    controller, cluster_id = free_port(), Extras().cluster_id
    nodes: list[Node] = []
    try:
        for number in (1, 2):
            nodes.append(Node(number, controller, cluster_id))
            nodes[-1]._launch()
        for node in nodes:
            node.wait_until_up()
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            node.close()
