"""What aiokafka 0.14 lacks: requests of our own, and what is done to its private attributes.

Each item says why it is here, and what upstream would have to do for it to go.
"""

from typing import Final

from aiokafka.consumer import fetcher
from aiokafka.record.memory_records import MemoryRecords

BATCH_HEAD: Final = 61  # bytes before the records of a batch
AFTER_LENGTH: Final = 12  # its offset and its length


class FetchedBytes(MemoryRecords):  # type: ignore[misc]
    """A partition's part of a fetch, which keeps its bytes at hand: aiokafka's compiled batches do not show theirs.

    It could go if a batch had its size, and a bound on the headers of a record.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.data = data

    def first_records(self) -> bytearray:
        """The bytes of the first batch's records, as they are, packed or not."""
        end = AFTER_LENGTH + int.from_bytes(self.data[8:AFTER_LENGTH], "big")
        return bytearray(self.data[BATCH_HEAD:end])


fetcher.MemoryRecords = FetchedBytes
