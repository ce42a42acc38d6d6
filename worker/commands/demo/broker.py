"""The demo's broker: librdkafka's mock cluster, a process of its own. For trying out, never as proof of delivery.

``python -m worker.demo.broker`` prints the broker's address as one line, its topics being made, and ends when its
standard input does: it never outlives whoever holds the other end. It needs the extra ``demo`` (confluent-kafka).
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
    """The cluster's owner, which must be kept for as long as the broker is to run, and the broker's address.

    Blocks until the topics are there. Raises KafkaException where the broker does not answer.
    """
    owner = Producer(
        {"bootstrap.servers": "none", "test.mock.num.brokers": 1, "allow.auto.create.topics": True, "log_level": 3}
    )
    for topic in TOPICS:
        owner.list_topics(topic, timeout=ANSWER_S)  # asking for a topic makes it: the mock knows no CreateTopics
    brokers = owner.list_topics(timeout=ANSWER_S).brokers.values()
    return owner, ",".join(f"{broker.host}:{broker.port}" for broker in brokers)


def main() -> None:
    """Serve until standard input ends."""
    owner, address = start()
    sys.stdout.write(address + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    del owner


if __name__ == "__main__":
    main()
