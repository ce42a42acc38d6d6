"""Avro in records: which schemas their values were written with, and the values by the schemas that are known. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

from worker.core.avro import AvroSchema, InvalidAvro, TooLarge, UnreadableSchema, Wanted, wanted
from worker.core.events import Failure, Record
from worker.core.framing import FRAME_BYTES, MAX_ID, frame, is_framed, schema_id
from worker.core.json_input import decode_failure


class AvroSchemas:
    """The schemas by which values are read. ``paths`` lead to the fields that are read: all others are skipped.

    Whoever can ask the registry adds the schemas in ``missing_in`` before the records are decoded. They are kept without
    end: what an id stands for never changes.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._wanted: Wanted = wanted(paths)
        self._known: dict[bytes, AvroSchema | Failure] = {}  # by the frame; a failure where a schema cannot be used

    def missing_in(self, records: Sequence[Record]) -> set[int]:
        """The ids of the schemas that these records name and that are not known. Ids that none can have are left out."""
        frames = {record.value[:FRAME_BYTES] for record in records if record.value}
        return {id for each in frames - self._known.keys() if is_framed(each) and (id := schema_id(each)) <= MAX_ID}

    def add(self, id: int, type: str, text: str, references: Sequence[str]) -> None:
        """A schema as it is registered, with the texts of those that it refers to."""
        if type != "AVRO":
            self._known[frame(id)] = decode_failure(
                "unknown_schema", f"the schema with the id {id} is of the type {type}, and not Avro"
            )
            return
        try:
            self._known[frame(id)] = AvroSchema(text, references, self._wanted)
        except UnreadableSchema as error:
            self._known[frame(id)] = decode_failure(
                "unknown_schema", f"the schema with the id {id} cannot be read: {error}"
            )

    def read(self, value: bytes) -> Any:
        """The wanted fields of a record's value as a dict, or a failure."""
        if not is_framed(value):
            return decode_failure(
                "invalid_avro", "the value does not begin with a zero byte and the id of a schema, Confluent's framing"
            )
        schema = self._known.get(value[:FRAME_BYTES])
        if schema is None:
            return decode_failure("unknown_schema", f"the registry has no schema with the id {schema_id(value)}")
        if isinstance(schema, Failure):
            return schema
        try:
            found = schema.read(value, FRAME_BYTES)
        except InvalidAvro as error:
            return decode_failure(
                "invalid_avro", f"the value does not fit its schema, which has the id {schema_id(value)}: {error}"
            )
        except TooLarge as error:
            return decode_failure("too_large", f"the value is not read as Avro: {error}")
        return found if type(found) is dict else decode_failure("not_an_object", "the value is Avro, but not a record")

    def read_usual(self, values: Sequence[bytes]) -> list[Any] | None:
        """What ``read`` answers for values that can all be read, but None too where a value is no record; else None."""
        known = self._known
        try:
            return [known[value[:FRAME_BYTES]].read(value, FRAME_BYTES) for value in values]  # type: ignore[union-attr]
        except (KeyError, AttributeError, InvalidAvro, TooLarge):
            return None
