"""Everything that touches the insides of aiokafka 0.14: private attributes, changes to its classes, requests of our own.

Importing this package checks the installed aiokafka, which may raise UnsupportedAiokafka, and applies the changes. No other
module uses a private name of aiokafka. Each item says why it is needed, and what upstream would have to change for its
removal.
"""

from worker.kafka.aiokafka_compat.installed import check_installed

check_installed()  # before the imports below, which would fail in ways that do not tell the reason

from worker.kafka.aiokafka_compat import (  # noqa: E402, F401
    authentication,
    connections,
    fetching,
    group,
    metadata,
    nearest_replica,
    offsets,
    producer,
    transactions,
)
