"""The worker's job as users of other frameworks would write it: `python -m benchmarks.peers faststream|quix …`.

Reads events from a topic, scores them, publishes a result per event under the event's key, and commits after that: at
least once, acks=all, idempotent producer, no compression, partition by key as the worker chooses it. Prints nothing of
its own; SIGTERM ends it. Decoding and encoding are orjson's everywhere.

FastStream: confluent flavour, batch subscriber, `publish_batch`, commit after the handler (NACK_ON_ERROR). Tuned: orjson
in a decoder of its own instead of the default one for each message, no pydantic (`apply_types=False`), no log line
per batch, uvloop, the model on a thread so that the loop lives. The aiokafka flavour's `publish_batch` puts a batch into
one partition whatever its keys are, so that it would break the order per key.

Quix Streams: with a model, a sink: it gathers what passes, and scores and publishes in `flush`, which the library calls
before it commits, every `--batch` messages or 0.2 s (`commit_every`, `commit_interval`).
The library's other batches are count windows, which are
kept per key and in a state store: with a key per event they never close. Its own BatchingSink has one batch per partition,
so the sink here is a BaseSink that fills the model's batch from all of them. Costless: the plain `apply` and `to_topic`,
a commit every 5 s (its default). Tuned: log level, and librdkafka's linger.
"""

import argparse
import asyncio
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import orjson

LABELS = ("negative", "neutral", "positive")
HF_BATCH = 32
PRODUCER = {"acks": "all", "enable.idempotence": True, "partitioner": "murmur2_random"}

Scores = Sequence[float]
Engine = Callable[[Sequence[str]], Sequence[Scores]]
"""N texts → the probabilities of LABELS for each."""


def main() -> None:
    options = parsed_options()
    engine = ENGINES[options.engine](options)
    PEERS[options.peer](options, engine)


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--model", help="folder with the checkpoint; not for costless")
    parser.add_argument("--batch", type=int, default=512, help="events taken at once (default: 512)")
    parser.add_argument("--cpu-threads", type=int, default=os.cpu_count(), help="of the model (default: the cores)")
    parser.add_argument("--backend", default="torch", help="of ours (default: torch)")
    parser.add_argument("--max-batch-tokens", type=int, default=1024, help="of ours (default: 1024)")
    return parser.parse_args()


# Engines.


def hf(options: argparse.Namespace) -> Engine:
    """Transformers by the book: padded batches of 32 in order of arrival, and the card's sigmoid."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(options.cpu_threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    network = AutoModelForSequenceClassification.from_pretrained(options.model, dtype=torch.float32).eval()

    def score(texts: Sequence[str]) -> list[list[float]]:
        answers = []
        for begin in range(0, len(texts), HF_BATCH):
            batch = list(texts[begin : begin + HF_BATCH])
            inputs = tokenizer(batch, return_tensors="pt", truncation=True, padding=True)
            with torch.inference_mode():
                answers += torch.sigmoid(network(**inputs).logits).tolist()
        return answers

    return score


def ours(options: argparse.Namespace) -> Engine:
    """This project's model on the whole batch: without the worker, but with all that it does for speed."""
    from worker.commands.load_model import prepare_process
    from worker.model.sentiment_model import SentimentModel

    prepare_process()
    model = SentimentModel.load(
        options.model,
        backend=options.backend,
        cpu_threads=options.cpu_threads,
        max_batch_tokens=options.max_batch_tokens,
    )

    def score(texts: Sequence[str]) -> list[Scores]:
        sentiments = [scored.sentiment for scored in model.score(texts)]
        return [sentiment.probabilities for sentiment in sentiments if sentiment is not None]

    return score


def costless(_: argparse.Namespace) -> Engine:
    """A constant, so that what is left is the plumbing."""

    def score(texts: Sequence[str]) -> list[Scores]:
        return [(0.5, 0.5, 0.5)] * len(texts)

    return score


def result(event: dict[str, Any], probabilities: Scores) -> dict[str, Any]:
    """An event's result, without what only the worker adds: source, model and times."""
    best = max(range(3), key=probabilities.__getitem__)
    return {
        "id": str(event["id"]),
        "label": LABELS[best],
        "score": round(probabilities[2] - probabilities[0], 6),
        "probabilities": {name: round(value, 6) for name, value in zip(LABELS, probabilities, strict=True)},
    }


# FastStream.


def run_faststream(options: argparse.Namespace, engine: Engine) -> None:
    """Consumes until SIGTERM."""
    import uvloop
    from faststream import AckPolicy, FastStream
    from faststream.confluent import KafkaBroker, KafkaMessage, KafkaPublishMessage

    broker = KafkaBroker(
        options.bootstrap, config=PRODUCER, linger_ms=5, logger=None, apply_types=False, allow_auto_create_topics=False
    )
    on_thread = asyncio.to_thread if options.engine != "costless" else at_once

    async def decode(message: KafkaMessage) -> list[tuple[bytes, dict[str, Any]]]:
        return [(record.key(), orjson.loads(record.value())) for record in message.raw_message]

    @broker.subscriber(
        options.input,
        group_id=options.group,
        batch=True,
        max_records=options.batch,
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.NACK_ON_ERROR,
        decoder=decode,
    )
    async def handle(events: list[tuple[bytes, dict[str, Any]]]) -> None:
        scores = await on_thread(engine, [event["text"] for _, event in events])
        results = [
            KafkaPublishMessage(orjson.dumps(result(event, probabilities)), key=key)
            for (key, event), probabilities in zip(events, scores, strict=True)
        ]
        await broker.publish_batch(*results, topic=options.output)

    uvloop.run(FastStream(broker, logger=None).run())


async def at_once(function: Engine, texts: Sequence[str]) -> Sequence[Scores]:
    return function(texts)


# Quix Streams.


def run_quix(options: argparse.Namespace, engine: Engine) -> None:
    """Consumes until SIGTERM."""
    from quixstreams import Application

    application = partial(
        Application,
        broker_address=options.bootstrap,
        consumer_group=options.group,
        auto_offset_reset="earliest",
        processing_guarantee="at-least-once",
        producer_extra_config={**PRODUCER, "linger.ms": 5 if options.engine != "costless" else 50},
        auto_create_topics=False,
        loglevel=logging.WARNING,
        state_dir=tempfile.mkdtemp(),
    )
    if options.engine == "costless":
        apply_each(application(), options, engine)
    else:
        sink_batches(application(commit_every=options.batch, commit_interval=0.2), options, engine)


def apply_each(app: Any, options: argparse.Namespace, engine: Engine) -> None:
    """Message by message, the library's natural way."""
    events = app.dataframe(app.topic(options.input, value_deserializer="json", key_deserializer="bytes"))
    results = events.apply(lambda event: result(event, engine([event["text"]])[0]))
    results.to_topic(app.topic(options.output, value_serializer="json", key_serializer="bytes"))
    app.run()


def sink_batches(app: Any, options: argparse.Namespace, engine: Engine) -> None:
    """A batch for the model per commit."""
    from quixstreams.sinks.base import BaseSink

    class Scoring(BaseSink):
        """Scores and publishes what was gathered since the last commit; raises where a result was not taken."""

        def __init__(self, producer: Any) -> None:
            super().__init__(None, None)
            self._producer = producer
            self._gathered: list[tuple[bytes, dict[str, Any]]] = []
            self._refused: list[Any] = []

        def add(self, value: Any, key: Any, *_: Any, **__: Any) -> None:
            self._gathered.append((key, value))

        def flush(self) -> None:
            gathered, self._gathered = self._gathered, []
            scores = engine([event["text"] for _, event in gathered])
            for (key, event), probabilities in zip(gathered, scores, strict=True):
                value = orjson.dumps(result(event, probabilities))
                self._producer.produce(options.output, value, key, on_delivery=self._delivered)
            if self._producer.flush() or self._refused:
                raise RuntimeError(f"results were not published: {self._refused[:1]}")

        def on_paused(self) -> None:
            self._gathered.clear()

        def _delivered(self, error: Any, _: Any) -> None:
            if error is not None:
                self._refused.append(error)

    with app.get_producer() as producer:
        events = app.dataframe(app.topic(options.input, value_deserializer="json", key_deserializer="bytes"))
        events.sink(Scoring(producer))
        app.run()


ENGINES: dict[str, Callable[[argparse.Namespace], Engine]] = {"hf": hf, "ours": ours, "costless": costless}
PEERS = {"faststream": run_faststream, "quix": run_quix}


if __name__ == "__main__":
    main()
