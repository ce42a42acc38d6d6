"""Whether the installed aiokafka has everything inside that this package uses or changes."""

import dis
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import FunctionType
from typing import Any, Final

import aiokafka

from worker.errors import UserError

SERIES: Final = "0.14"

# By module, or module and class: what is read, written or replaced there. A change to another module of this package that
# touches something new inside aiokafka adds it here.
USED: Final[Mapping[str, str]] = {
    "aiokafka.admin.client": "MetadataRequest",
    "aiokafka.admin.client:AIOKafkaAdminClient": "_client",
    "aiokafka.client": "MetadataRequest",
    "aiokafka.client:AIOKafkaClient": (
        "_conns _get_conn _get_conn_lock _metadata_update _retry_backoff _sync_task _wait_on_metadata cluster "
        "bootstrap force_metadata_update send set_topics"
    ),
    "aiokafka.conn:AIOKafkaConnection": (
        "_do_sasl_handshake _last_action _loop _protocol _sasl_oauth_token_provider _sasl_plain_password _send_sasl_token "
        "_ssl_context _writer close connect send"
    ),
    "aiokafka.conn:OAuthAuthenticator": "_token_sent step",
    "aiokafka.consumer.consumer": "Fetcher",
    "aiokafka.consumer.consumer:AIOKafkaConsumer": "_client _coordinator _fetcher",
    "aiokafka.consumer.fetcher": "MemoryRecords",
    "aiokafka.consumer.fetcher:FetchResult": "_partition_records",
    "aiokafka.consumer.fetcher:Fetcher": (
        "_client _client_rack _invalidate_preferred_read_replica_for_node _isolation_level _preferred_read_replica "
        "_proc_fetch_request _records _select_read_replica _set_error _subscriptions _update_preferred_read_replica "
        "error_future"
    ),
    "aiokafka.consumer.fetcher:PartitionRecords": (
        "_aborted_producers _check_crcs _consume_aborted_up_to _contains_abort_marker _isolation_level _records "
        "_records_iterator _tp next_fetch_offset"
    ),
    "aiokafka.consumer.group_coordinator:GroupCoordinator": (
        "_coordination_task _do_rejoin_group _group_instance_id _send_req coordinator_dead coordinator_id "
        "ensure_coordinator_known generation group_id member_id"
    ),
    "aiokafka.producer.message_accumulator:BatchBuilder": "_buffer _build _builder _relative_offset",
    "aiokafka.producer.message_accumulator:MessageAccumulator": (
        "_batches _cluster _pop_batch _txn_manager drain_by_nodes"
    ),
    "aiokafka.producer.message_accumulator:MessageBatch": "_builder _ctime",
    "aiokafka.producer.producer": "MessageAccumulator",
    "aiokafka.producer.producer:AIOKafkaProducer": "_COMPRESSORS _message_accumulator _txn_manager client",
    "aiokafka.producer.sender:SendProduceReqHandler": "_can_retry",
    "aiokafka.producer.transaction_manager:TransactionManager": "_transaction_waiter increment_sequence_number",
    "aiokafka.protocol.fetch:FetchRequest": "_rack_id",
    "aiokafka.record._crecords.default_records": "gzip_decode lz4_decode snappy_decode zstd_decode",
    "aiokafka.record._crecords.legacy_records": "gzip_decode lz4_decode snappy_decode",
    "aiokafka.record.default_records": "gzip_decode lz4_decode snappy_decode zstd_decode",
    "aiokafka.record.legacy_records": "gzip_decode lz4_decode snappy_decode",
    "aiokafka.record.memory_records:MemoryRecords": "has_next next_batch size_in_bytes",
}


class UnsupportedAiokafka(UserError):
    """The installed aiokafka is not one that this worker can use; the message says what is wrong with it."""


def check_installed(used: Mapping[str, str] = USED) -> None:
    """Raises UnsupportedAiokafka where the installed version is not of SERIES, or lacks any of what is ``used``."""
    version: str = aiokafka.__version__
    missing = list(_missing(used))
    if missing:
        raise UnsupportedAiokafka(
            f"aiokafka {version} is installed, and lacks what this worker uses of it: {', '.join(missing)}; "
            f"install a version {SERIES}"
        )
    if not f"{version}.".startswith(f"{SERIES}."):
        raise UnsupportedAiokafka(
            f"aiokafka {version} is installed, and this worker is made for {SERIES}; install that"
        )


def _missing(used: Mapping[str, str]) -> Iterator[str]:
    for where, names in used.items():
        module, _, kind = where.partition(":")
        try:
            owner: Any = import_module(module)
            owner = getattr(owner, kind) if kind else owner
        except (ImportError, AttributeError):
            yield where.replace(":", ".")
            continue
        yield from (f"{where.replace(':', '.')}.{name}" for name in names.split() if not _has(owner, name))


def _has(owner: Any, name: str) -> bool:
    """Whether a module or class has this attribute, or the class gives it to each instance in ``__init__``."""
    return hasattr(owner, name) or any(
        step.opname == "STORE_ATTR" and step.argval == name
        for kind in getattr(owner, "__mro__", ())
        if isinstance(init := vars(kind).get("__init__"), FunctionType)
        for step in dis.get_instructions(init)
    )
