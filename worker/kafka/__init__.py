"""Everything that speaks Kafka."""

import worker.kafka.aiokafka_compat  # noqa: F401 - checks and changes aiokafka before any client is made
