"""From events and their sentiments to the records to publish. Pure.

Results of one partition are encoded together: what they have in common is written once, into a template, and their numbers
and strings column by column. That takes a third of the time of one ``orjson.dumps`` for each.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, compress, repeat
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import orjson

from worker.core import cloudevents
from worker.core.events import (
    CONTENT_TYPE,
    ENRICHED_FIELD,
    Event,
    Failure,
    Headers,
    Outgoing,
    Record,
    named_tuples,
    place,
)
from worker.core.framing import without_frame
from worker.core.sentiment import CARD, Floats, LabelSet, Sentiment
from worker.core.timestamps import NO_TIME, TOO_LATE, json_time, timestamp_in, timestamp_ms

_MILLION: Final = 1_000_000
INVALID_TIMESTAMP: Final = Failure("publish", "invalid_timestamp", "the record's timestamp is beyond the year 9999")


class Encoder:
    """Writes results as JSON. ``group_id`` names the source of results that are CloudEvents.

    With ``result_timestamp`` event, results and tombstones have the timestamp of their input; with now, that of the moment
    when they are published. With ``reads_frames``, what is enriched may stand in Confluent's framing.
    """

    _own_headers: ClassVar[list[tuple[str, bytes | None]]] = [(CONTENT_TYPE, b"application/json")]

    def __init__(
        self, *, output_mode: str = "result", output_format: str = "json", group_id: str = "",
        result_timestamp: str = "event", reads_frames: bool = False,
    ) -> None:  # fmt: skip
        self._is_enriched = output_mode == "enrich"
        self._is_cloud_event = output_format == "cloudevents"
        self._source = cloudevents.source_of(group_id)
        self._is_dated_now = result_timestamp == "now"
        self._reads_frames = reads_frames

    def encode(
        self,
        records: Sequence[Record],
        events: Sequence[Event],
        sentiments: Sequence[Sentiment],
        truncated: Sequence[bool],
        model: str,
        processed_at: str,
        *,
        labels: LabelSet = CARD,
        windows: Sequence[int] | None = None,
    ) -> list[Outgoing | Failure]:
        """The N results of N events, whose records are of one partition; a failure where a timestamp cannot be written.

        ``model`` is the name and revision of what scored them, and ``labels`` its labels; ``processed_at`` is a time as
        ``iso_time`` writes it, and ``windows`` the number of windows of each text, None where long texts are truncated. A
        result has the bytes that ``orjson.dumps`` makes of its ``result_fields``.
        """
        if not records:
            return []
        formats = _formats(labels)
        names, scores, probabilities = zip(*sentiments, strict=True)
        headers = [record.headers for record in records]
        event_times, timestamps = self._times(records, headers)
        columns = (
            _json_strings([event.id for event in events]),
            map(formats.names.__getitem__, names),
            *_json_columns(scores, probabilities, labels, formats.names.values()),
            _json_truncated(truncated, windows),
            [record.offset for record in records],
            event_times,
        )
        values: Iterable[bytes] = map(
            _template(records[0], model, processed_at, formats).__mod__, zip(*columns, strict=True)
        )
        if self._is_enriched:
            own = [record.value or b"" for record in records]
            # A frame is left out: the schema that it names does not have the new field.
            values = map(_spliced, records, map(without_frame, own) if self._reads_frames else own, values)
        keys = [record.key for record in records]
        own_headers = self._headers(records, headers, events, processed_at)
        results: list[Outgoing | Failure] = [*named_tuples(Outgoing, keys, values, own_headers, timestamps)]
        if TOO_LATE in event_times:
            pairs = zip(results, event_times, strict=True)
            return [INVALID_TIMESTAMP if time is TOO_LATE else result for result, time in pairs]
        return results

    def tombstone(self, record: Record) -> Outgoing:
        """A null with the key and the headers of its input, and with the timestamp that a result would have."""
        return Outgoing(record.key, None, list(record.headers), None if self._is_dated_now else timestamp_ms(record))

    def _times(self, records: Sequence[Record], headers: Sequence[Headers]) -> tuple[list[bytes], Iterable[int | None]]:
        """The times of N events as their results write them, and the results' own timestamps."""
        timestamps: Iterable[int | None] = [record.timestamp for record in records]
        event_times = list(map(json_time, timestamps))
        if self._is_dated_now:
            timestamps = repeat(None)
        elif NO_TIME in event_times:
            timestamps = map(timestamp_ms, records)
        if any(headers):
            replayed = map(timestamp_in, headers)
            event_times = [
                at if first is None else json_time(first) for first, at in zip(replayed, event_times, strict=True)
            ]
        return event_times, timestamps

    def _headers(
        self, records: Sequence[Record], headers: Sequence[Headers], events: Sequence[Event], processed_at: str
    ) -> Iterable[list[tuple[str, bytes | None]]]:
        if self._is_cloud_event:
            return [
                cloudevents.without_attributes(own)
                + cloudevents.result_headers(place(record), self._source, event.id, processed_at)
                for record, own, event in zip(records, headers, events, strict=True)
            ]
        if not any(headers):
            return repeat(self._own_headers)
        return map(_enriched_headers if self._is_enriched else _result_headers, headers, repeat(self._own_headers))


def result_fields(
    id: str, sentiment: Sentiment, truncated: bool, model: str, source: dict[str, Any] | None, event_time: str | None,
    processed_at: str, *, labels: LabelSet = CARD, windows: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a result in their order, numbers rounded to six decimals. ``windows``: None leaves the field out."""
    probabilities = dict(zip(labels.names, map(_rounded, sentiment.probabilities), strict=True))
    threshold = labels.threshold
    listed = {} if threshold is None else {"labels": [each for each, p in probabilities.items() if p >= threshold]}
    return {
        "id": id,
        "label": sentiment.label,
        "score": None if sentiment.score is None else _rounded(sentiment.score),
        "probabilities": probabilities,
        **listed,
        "truncated": truncated,
        **({} if windows is None else {"windows": windows}),
        "model": model,
        "source": source,
        "event_time": event_time,
        "processed_at": processed_at,
    }


class _Formats(NamedTuple):
    """What the results of one model have in common: its labels' names in JSON, and the part with the probabilities."""

    names: dict[str, bytes]
    probabilities: bytes


@lru_cache(maxsize=8)
def _formats(labels: LabelSet) -> _Formats:
    names = {name: orjson.dumps(name) for name in labels.names}
    probabilities = b",".join(name.replace(b"%", b"%%") + b":%b" for name in names.values())
    listed = b"" if labels.threshold is None else b',"labels":[%b]'
    return _Formats(names, b'"probabilities":{' + probabilities + b"}" + listed)


def _template(record: Record, model: str, processed_at: str, formats: _Formats) -> bytes:
    """A format for the results of a partition. It takes, as JSON and in order, what differs between them."""
    by, topic, now = (orjson.dumps(word).replace(b"%", b"%%") for word in (model, record.topic, processed_at))
    return (
        b'{"id":%%b,"label":%%b,"score":%%b,%b,"truncated":%%b,"model":%b,'
        b'"source":{"topic":%b,"partition":%d,"offset":%%d},"event_time":%%b,"processed_at":%b}'
    ) % (formats.probabilities, by, topic, record.partition, now)


def _spliced(record: Record, own: bytes, result: bytes) -> bytes:
    """The input's own bytes with the result as one field more: of the object, or of a structured CloudEvent's data."""
    is_structured = record.headers and cloudevents.mode(record.headers) == "structured"
    end = cloudevents.end_of_data(own) if is_structured else own.rindex(b"}")
    return b'%s,"%s":%s%s' % (own[:end], ENRICHED_FIELD.encode(), result, own[end:])


def _result_headers(headers: Headers, own: list[tuple[str, bytes | None]]) -> list[tuple[str, bytes | None]]:
    """The input's headers with the result's content type; a CloudEvent's attributes are left out, for they are its own."""
    kept = [header for header in headers if header[0].lower() != CONTENT_TYPE]
    if cloudevents.mode(headers):
        kept = [header for header in kept if not header[0].startswith(cloudevents.PREFIX)]
    return kept + own


def _enriched_headers(headers: Headers, own: list[tuple[str, bytes | None]]) -> list[tuple[str, bytes | None]]:
    """A CloudEvent keeps all of its headers, for it stays the same event with a field more in its data."""
    return list(headers) if cloudevents.mode(headers) else _result_headers(headers, own)


def _rounded(number: float) -> float:
    return round(number * _MILLION) / _MILLION  # round() gives an integer, so that there is no negative zero


def _json_truncated(truncated: Sequence[bool], windows: Sequence[int] | None) -> list[bytes]:
    """What stands at ``truncated`` in each result, and the field behind it where there are windows."""
    written = [b"true" if is_cut else b"false" for is_cut in truncated]
    return written if windows is None else [b'%b,"windows":%d' % pair for pair in zip(written, windows, strict=True)]


def _json_columns(
    scores: Sequence[float | None],
    probabilities: Sequence[tuple[float, ...]],
    labels: LabelSet,
    names: Collection[bytes],
) -> list[list[bytes]]:
    """Columns of what ``orjson.dumps`` writes after ``_rounded``: scores (N), probabilities (N × L), and, with a threshold,
    the names of the labels that reach it, with commas between them.
    """
    count = len(scores)
    rounded = rounded_columns(scores, probabilities, labels)
    written = orjson.dumps(rounded.ravel(), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
    each = [written[begin : begin + count] for begin in range(0, len(written), count)]
    if labels.weights is None:
        each.insert(0, [b"null"] * count)
    if labels.threshold is not None:
        each.append([b",".join(reached) for reached in reached_labels(rounded, labels.threshold, names)])
    return each


def rounded_columns(
    scores: Sequence[float | None], probabilities: Sequence[tuple[float, ...]], labels: LabelSet
) -> Floats:
    """The numbers of N results with six decimals: a row (N) of scores, where labels have weights, and then a row (N) of
    probabilities for each label.
    """
    has_scores = labels.weights is not None
    columns = zip(*probabilities, strict=True)
    given = chain(scores, *columns) if has_scores else chain(*columns)
    numbers = np.fromiter(given, float, (len(labels.names) + has_scores) * len(scores))
    rounded: Floats = np.rint(numbers * _MILLION) / _MILLION + 0.0  # the sum has no negative zero
    return rounded.reshape(-1, len(scores))


def reached_labels(rounded: Floats, threshold: float, names: Collection[bytes]) -> Iterator[Iterator[bytes]]:
    """For each of N results, given as ``rounded_columns`` returns them, the names of the labels that reach the threshold."""
    reached = np.greater_equal(rounded[-len(names) :], threshold)
    return (compress(names, of_text) for of_text in reached.T.tolist())


def _json_strings(words: list[str]) -> list[bytes]:
    """Each word as ``orjson.dumps`` writes it."""
    written = orjson.dumps(words)[1:-1].split(b",")
    return written if len(written) == len(words) else [orjson.dumps(word) for word in words]  # a word has a comma
