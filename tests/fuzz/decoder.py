"""Coverage-guided fuzzing of the decoder, with the oracle of the hostile payloads beside it: `make fuzz`.

The arguments are libFuzzer's, a folder for the corpus first; it is begun with payloads of the generator.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["worker", "tests"]):
    from tests.support.payloads import RESULT, SKIPPED, TOMBSTONE, records, verdict
    from worker.core.decoder import Decoder
    from worker.core.encoder import Encoder
    from worker.core.events import Event, Failure, Null

import orjson

from tests.support.topics import Record
from worker.core.sentiment import Sentiment

COMBINATIONS = (("json", "result"), ("json", "enrich"), ("text", "result"))
LARGEST_SEED = 3_000  # bytes
PLACE = {"topic": "texts", "partition": 1, "offset": 2}
ANSWER = Sentiment("neutral", 0.1, (0.2, 0.5, 0.3))
DECODERS = {of: Decoder(input_format=of[0], output_mode=of[1]) for of in COMBINATIONS}
ENCODERS = {mode: Encoder(output_mode=mode) for mode in ("result", "enrich")}


def check(data: bytes) -> None:
    """The decoder and the oracle agree about these bytes in every combination, and what is made of them is JSON."""
    record = Record(data, b"key", (("event.id", data[:3]),), **PLACE)  # type: ignore[arg-type]
    for (input_format, output_mode), decoder in DECODERS.items():
        expected = verdict(record, input_format, output_mode)
        decoded = decoder.decode(record)
        assert outcome(decoded) == expected.outcome, (outcome(decoded), expected)
        if isinstance(decoded, Event):
            id = "texts-1-2" if expected.id is None else expected.id
            assert (decoded.text, decoded.id) == (expected.text, id), (decoded, expected)
            encoded = ENCODERS[output_mode].encode([record], [decoded], [ANSWER], [False], "model", "now")[0]
            assert not isinstance(encoded, Failure)
            fields = read_back(encoded.value or b"", output_mode)
            assert fields["id"] == decoded.id


def outcome(decoded: Event | Failure | Null) -> str:
    if isinstance(decoded, Failure):
        return decoded.reason
    return {Null.SKIPPED: SKIPPED, Null.TOMBSTONE: TOMBSTONE}[decoded] if isinstance(decoded, Null) else RESULT


def read_back(value: bytes, output_mode: str) -> dict[str, object]:
    """The result's fields; of an enriched event those that stand last in it, for its own may hold numbers of any size."""
    if output_mode == "result":
        return orjson.loads(value)  # type: ignore[no-any-return]
    begin = value.rindex(b',"sentiment":') + len(b',"sentiment":')
    return orjson.loads(value[begin : value.rindex(b"}")])  # type: ignore[no-any-return]


def begin(corpus: Path) -> None:
    """Fills the corpus, if it is empty, with small payloads."""
    corpus.mkdir(parents=True, exist_ok=True)
    if any(corpus.iterdir()):
        return
    for number, record in enumerate(records(seed=0, count=1_000)):
        if record.value is not None and len(record.value) < LARGEST_SEED:
            (corpus / str(number)).write_bytes(record.value)


if __name__ == "__main__":
    begin(Path(sys.argv[1]))
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
