"""Any payload at all: the decoder never raises, and no message has any of the payload's text."""

import json
from dataclasses import dataclass, field
from typing import Any

import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.events import MARK, FakeRecord, encode
from tests.support.payloads import PAYLOADS
from worker.core.dead_letters import dead_letter
from worker.core.decoder import Decoder
from worker.core.events import Decoded, Event, Failure, Null


def json_values() -> st.SearchStrategy[Any]:
    texts = st.text(max_size=8).map(lambda text: MARK + text)
    leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | texts
    names = st.sampled_from(["text", "id", "sentiment", "payload", "", "a"]) | texts
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=6
    )


def objects() -> st.SearchStrategy[dict[str, Any]]:
    """Objects that are nearly events: these reach furthest into the code."""
    texts = st.text(max_size=20).map(lambda text: MARK + text)
    return st.fixed_dictionaries(
        {}, optional={"text": texts | json_values(), "id": json_values(), "sentiment": texts, "a": json_values()}
    )


def written(value: Any) -> bytes:
    """JSON as others write it: with NaN, and with halves of surrogate pairs, escaped or not even UTF-8."""
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


VALUES = st.one_of(
    objects().map(written),
    objects().map(lambda value: json.dumps(value).encode()),
    json_values().map(written),
    st.builds(lambda value, cut: written(value)[:cut], objects(), st.integers(0, 60)),
    st.binary(max_size=60),
    st.binary(max_size=20).map(lambda noise: b'{"text": "' + MARK.encode() + noise + b'"}'),
    st.none(),
)
DECODERS = {
    "result": Decoder(max_text_chars=20),
    "enrich": Decoder(max_text_chars=20, output_mode="enrich"),
    "inside": Decoder(text_field="a.text", id_field="a.id"),
    "text": Decoder(max_text_chars=20, input_format="text"),
}


@dataclass
class Seen:
    kinds: dict[str, set[str]] = field(default_factory=dict)
    payloads: int = 0

    def add(self, name: str, decoded: Decoded) -> None:
        kind = decoded.reason if isinstance(decoded, Failure) else type(decoded).__name__
        self.kinds.setdefault(name, set()).add(kind)


def check_event(name: str, record: FakeRecord, event: Event) -> None:
    assert event.text.strip()
    outgoing = encode(record, event, "enrich" if name == "enrich" else "result")
    assert outgoing.value is not None
    result = json.loads(outgoing.value)
    assert (result["sentiment"] if name == "enrich" else result)["id"] == event.id


def check(name: str, record: FakeRecord) -> Decoded:
    decoded = DECODERS[name].decode(record)
    assert isinstance(decoded, Event | Failure | Null)
    if isinstance(decoded, Event):
        check_event(name, record, decoded)
    elif isinstance(decoded, Failure):
        assert not set(MARK) & set(decoded.message)
        assert decoded.message.isascii()
        assert dead_letter(record, decoded, "0.1.0").value == record.value
    else:
        assert record.value is None
    return decoded


def test_hostile_payloads_never_raise_and_no_message_has_any_of_their_text() -> None:
    seen = Seen()

    @settings(
        max_examples=PAYLOADS, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(VALUES, st.none() | st.binary(max_size=4))
    def run(value: bytes | None, key: bytes | None) -> None:
        seen.payloads += 1
        for name in DECODERS:
            seen.add(name, check(name, FakeRecord(value, key=key)))

    run()
    assert seen.payloads >= PAYLOADS
    assert {"Event", "Null", "invalid_json"} <= set(seen.kinds["enrich"])
    assert {"Event", "Null", "invalid_utf8"} <= set(seen.kinds["text"])


@settings(max_examples=300, deadline=None)
@given(objects(), st.sampled_from(["", " ", "\n", " \r\n\t"]), st.sampled_from([None, 0, 2]))
def test_any_object_that_is_enriched_reads_as_before_with_one_field_more(
    fields: dict[str, Any], space: str, indent: int | None
) -> None:
    value = (json.dumps(fields, indent=indent) + space).encode()
    record = FakeRecord(value)
    event = DECODERS["enrich"].decode(record)
    if isinstance(event, Event):
        published = encode(record, event, "enrich").value
        assert published is not None
        assert published.startswith(value[: value.rindex(b"}")])
        sentiment = json.loads(published).pop("sentiment")
        assert sentiment["label"] == "negative"
        without = published.replace(b',"sentiment":' + orjson.dumps(sentiment), b"")
        assert without == value
