"""Everything that touches the insides of aiokafka 0.14: private attributes, changes to its classes, requests of our own.

Importing this package checks the installed aiokafka, which may raise UnsupportedAiokafka, and applies the changes. No other
module uses a private name of aiokafka. Each item says why it is needed, and what upstream would have to change for its
removal.
"""

from worker.kafka.aiokafka_compat.installed import UnsupportedAiokafka, check_installed

check_installed()  # before the imports below, which would fail in ways that do not tell the reason

from worker.kafka.aiokafka_compat.connections import SILENT_BROKERS_S, end_remains, update_metadata  # noqa: E402
from worker.kafka.aiokafka_compat.fetching import Batches, FetchedPartitions  # noqa: E402
from worker.kafka.aiokafka_compat.group import (  # noqa: E402
    NOT_THE_COORDINATOR,
    CoordinatorAnswers,
    InstanceIdTaken,
    StaticMember,
    background_tasks,
    leave_group,
)
from worker.kafka.aiokafka_compat.offsets import committed_offsets, end_offsets  # noqa: E402
from worker.kafka.aiokafka_compat.producer import (  # noqa: E402
    PatientAccumulator,
    append_records,
    can_retry,
    forget_transaction_error,
    give_up,
    is_gone,
    may_be_written,
    while_sending,
)
from worker.kafka.aiokafka_compat.topics import (  # noqa: E402
    MetadataRequest_v10,
    Topic,
    TopicsRequest,
    agreed_topic_id,
    creating_no_topic,
    known_brokers,
    knows_topic,
    parsed_topics,
    partitions_of,
    topic_ids,
    topic_names,
    use_topics,
)

__all__ = [
    "NOT_THE_COORDINATOR",
    "SILENT_BROKERS_S",
    "Batches",
    "CoordinatorAnswers",
    "FetchedPartitions",
    "InstanceIdTaken",
    "MetadataRequest_v10",
    "PatientAccumulator",
    "StaticMember",
    "Topic",
    "TopicsRequest",
    "UnsupportedAiokafka",
    "agreed_topic_id",
    "append_records",
    "background_tasks",
    "can_retry",
    "check_installed",
    "committed_offsets",
    "creating_no_topic",
    "end_offsets",
    "end_remains",
    "forget_transaction_error",
    "give_up",
    "is_gone",
    "known_brokers",
    "knows_topic",
    "leave_group",
    "may_be_written",
    "parsed_topics",
    "partitions_of",
    "topic_ids",
    "topic_names",
    "update_metadata",
    "use_topics",
    "while_sending",
]
