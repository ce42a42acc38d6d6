"""Feeds a topic with sample reviews, and now and then a record that no worker can score: `feed.py BROKERS TOPIC`.

Runs in the worker's image, until SIGTERM. FEED_EVENTS_PER_SECOND says how many (default 50).
"""

import asyncio
import os
import signal
import sys

from aiokafka import AIOKafkaProducer

from worker.commands.demo.messages import endless_passes, reviews

TICK_S = 0.1
EVENTS_PER_PASS = 700


async def feed(brokers: str, topic: str, rate: float) -> None:
    """Publishes ``rate`` events per second. Raises aiokafka's KafkaConnectionError where no broker answers."""
    producer = AIOKafkaProducer(bootstrap_servers=brokers)
    await producer.start()
    loop = asyncio.get_running_loop()
    began, sent = loop.time(), 0
    try:
        for message in endless_passes(reviews(), EVENTS_PER_PASS):
            await asyncio.sleep(max(0.0, began + sent / rate - loop.time()) if sent % max(1, rate * TICK_S) < 1 else 0)
            if message.key is not None or message.value is not None:  # aiokafka sends no null with a null key
                await producer.send(topic, message.value, message.key)
            sent += 1
    finally:
        await producer.stop()


async def main(brokers: str, topic: str) -> None:
    task = asyncio.create_task(feed(brokers, topic, float(os.environ.get("FEED_EVENTS_PER_SECOND", "50"))))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
