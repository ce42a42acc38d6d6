"""The worker with a model that costs nothing and fails as told: `python -m tests.chaos.model run …`.

The file `FAULT_FILE` says how it fails, as long as it is there: `raise`, `shape`, `memory` or `hang SECONDS`. A text's
logits follow from the number in it, so that a result shows whose it is; on texts that begin with POISON it always fails.

In so many fetches as `FETCH_FAULTS` says an exception ends aiokafka's fetch task.

`MUTE_FILE`: while it is there, the process's first consumer is given no record. `RECORDS_PER_PRODUCER` lowers the limit of
that name.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.chaos.census import answer_with_census
from tests.chaos.events import POISON, logit_of
from tests.support.command_line import main_with
from tests.support.costless_model import CostlessModel
from worker.kafka import group_consumer, sink
from worker.kafka.consumer import Consumer
from worker.kafka.reader import FetchedRuns
from worker.settings.run import RunSettings

POISONED = -1


class FaultyModel(CostlessModel):
    """A text is one token: the number at its end, or POISONED."""

    name = "chaos@0"

    def __init__(self, fault: Path | None) -> None:
        self._fault = fault

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        return [[POISONED if text.startswith(POISON) else number_in(text)] for text in texts], [False] * len(texts)

    def logits(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        what, _, seconds = self._fault_now().partition(" ")
        if what == "hang":
            time.sleep(float(seconds))
        elif what == "memory":
            raise MemoryError
        elif what == "shape":
            return np.zeros((len(ids), 2), dtype=np.float32)
        if what == "raise" or any(tokens[0] == POISONED for tokens in ids):
            raise RuntimeError("the model fails")
        logits = np.zeros((len(ids), 3), dtype=np.float32)
        logits[:, 2] = [logit_of(tokens[0]) for tokens in ids]
        return logits

    def _fault_now(self) -> str:
        try:
            return self._fault.read_text() if self._fault else ""
        except FileNotFoundError:
            return ""


def number_in(text: str) -> int:
    number = text.rpartition(" ")[2]
    return int(number) if number.isdecimal() else 0


def load(_: RunSettings) -> Any:
    fault = os.environ.get("FAULT_FILE")
    return FaultyModel(Path(fault) if fault else None)


def lower_limits() -> None:
    if "RECORDS_PER_PRODUCER" in os.environ:
        sink.Sink.__init__.__kwdefaults__["records_per_producer"] = int(os.environ["RECORDS_PER_PRODUCER"])


def mute_first_consumer(file: Path) -> None:
    made: list[Consumer] = []

    def is_mute(consumer: Consumer) -> bool:
        return consumer is made[0] and file.exists()

    class Mute(Consumer):
        def __init__(self, *topics: str, **options: Any) -> None:
            super().__init__(*topics, **options)
            made.append(self)

        async def getmany(self, *places: Any, timeout_ms: int = 0, max_records: int | None = None) -> Any:
            fetched = await super().getmany(*places, timeout_ms=timeout_ms, max_records=max_records)
            if not is_mute(self):
                return fetched
            for place, runs in fetched.items():  # the worker's reader makes runs of the records
                self.seek(place, runs[0][0].offset)
            return {}

    assert group_consumer.Consumer is Consumer, "the worker makes its consumer elsewhere"
    group_consumer.Consumer = Mute  # type: ignore[misc]


def fail_fetches(times: int) -> None:
    keep = FetchedRuns.__setitem__
    left = iter(range(times))

    def fail(fetched: FetchedRuns, place: Any, result: Any) -> None:
        if next(left, None) is not None:
            raise RuntimeError("текст")
        keep(fetched, place, result)

    FetchedRuns.__setitem__ = fail  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    lower_limits()
    answer_with_census(Path.cwd())
    fail_fetches(int(os.environ.get("FETCH_FAULTS", "0")))
    if "MUTE_FILE" in os.environ:
        mute_first_consumer(Path(os.environ["MUTE_FILE"]))
    main_with(load)
