"""The worker with a model whose passes take a while: `python -m tests.support.slow_model run …`.

It is the model of the settings, and each token takes `TOKEN_SECONDS` more, whatever else the machine has to do; no more
once the file `FAST_FILE` is there.
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

TOKEN_SECONDS = float(os.environ["TOKEN_SECONDS"])
FAST_FILE = os.environ.get("FAST_FILE")


class SlowModel:
    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        if not (FAST_FILE and Path(FAST_FILE).exists()):
            time.sleep(TOKEN_SECONDS * sum(map(len, ids)))
        logits: NDArray[np.float32] = self._model.logits(ids)
        return logits


def load(settings: RunSettings) -> SlowModel:
    return SlowModel(load_model(settings))


if __name__ == "__main__":
    main_with(load)
