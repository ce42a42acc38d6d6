"""The demo's broker: librdkafka's mock cluster in a process of its own. It is for trying out, and proves no guarantee.

``python -m worker.commands.demo.broker`` creates the topics, prints the broker's address as one line, and ends when its
standard input does, so that it never outlives its parent. It needs the extra ``demo`` (confluent-kafka).
"""

import sys

from confluent_kafka import Producer

INPUT_TOPIC = "texts"
OUTPUT_TOPIC = "sentiment"
DEAD_LETTER_TOPIC = "sentiment.dead-letter"
TOPICS = (INPUT_TOPIC, OUTPUT_TOPIC, DEAD_LETTER_TOPIC)
GROUP = "sentiment-worker-demo"
"""The worker's consumer group."""

ANSWER_S = 10


def start() -> tuple[Producer, str]:
    """The client that owns the cluster, to be kept for as long as the broker is to run, and the broker's address.

    Blocks until the topics exist. Raises KafkaException where the broker does not answer.
    """
    owner = Producer(
        {"bootstrap.servers": "none", "test.mock.num.brokers": 1, "allow.auto.create.topics": True, "log_level": 3}
    )
    for topic in TOPICS:
        owner.list_topics(topic, timeout=ANSWER_S)  # asking for a topic creates it; the mock knows no CreateTopics
    brokers = owner.list_topics(timeout=ANSWER_S).brokers.values()
    return owner, ",".join(f"{broker.host}:{broker.port}" for broker in brokers)


def main() -> None:
    """Serves until standard input ends."""
    owner, address = start()
    sys.stdout.write(address + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    del owner


if __name__ == "__main__":
    main()
