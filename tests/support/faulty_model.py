"""The worker, with a model that breaks once a file appears: `python -m tests.support.faulty_model run …`, for tests.

`FAULT` is what happens then: `hang` (the model never answers), `lost` (every pass fails, as on a device that is gone),
`nan` (every logit is no number), `bug` (an error that nobody foresaw, with a text in its words). `FAULT_FILE` is the file.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.command_line import main_with
from worker.commands.run_parts import load_model
from worker.settings.run import RunSettings

SECRET_TEXT = "никому не показывать"


class FaultyModel:
    """A real model until the file is there."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._file = Path(os.environ["FAULT_FILE"])
        self._fault = os.environ["FAULT"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        if not self._file.exists():
            logits: NDArray[np.float32] = self._model.logits(ids)
            return logits
        if self._fault == "bug":
            return np.zeros((len(ids), 3), dtype=np.float32)
        if self._fault == "hang":
            time.sleep(3600)
        if self._fault == "nan":
            return np.full((len(ids), 3), np.nan, dtype=np.float32)
        raise RuntimeError("CUDA error: device-side assert triggered")

    def memory_bytes(self) -> int:
        if self._fault == "bug" and self._file.exists():
            raise LookupError(SECRET_TEXT)
        return 0


def load(settings: RunSettings) -> FaultyModel:
    return FaultyModel(load_model(settings))


if __name__ == "__main__":
    main_with(load)
