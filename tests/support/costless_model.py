"""The worker with a model that costs nothing: `python -m tests.support.costless_model run …`. What is left is the plumbing.

With `PASS_SECONDS` a pass of the model takes so long, whatever is in it: a device whose cost two cores do not share.
Once the file `FAST_FILE` is there, a pass takes no time.
With `PROFILE` the event loop is profiled into the file of that name.
"""

import cProfile
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.command_line import main_with
from worker.commands import run as service
from worker.core.sentiment import CARD
from worker.settings.run import RunSettings

PASS_SECONDS = float(os.environ.get("PASS_SECONDS", "0"))
FAST_FILE = os.environ.get("FAST_FILE")


class CostlessModel:
    name = "costless@0"
    revision = "0"
    labels = CARD
    device = "cpu"
    backend = "torch"
    dtype = "float32"
    max_batch_tokens = 1_000_000
    max_tokens = 512
    passes = 1
    widths = ()
    pass_tokens = 1
    windowing = None
    cuda_pass = "padded"

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        return [[1]] * len(texts), [False] * len(texts)

    def count_tokens(self, ids: Sequence[Sequence[int]]) -> tuple[int, int]:
        return len(ids), 0

    def logits(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        if PASS_SECONDS and not (FAST_FILE and Path(FAST_FILE).exists()):
            time.sleep(PASS_SECONDS)
        return np.zeros((len(ids), 3), dtype=np.float32)

    def memory_bytes(self) -> int:
        return 0


if __name__ == "__main__":
    if "PROFILE" in os.environ:
        run = service.run

        def profiled(settings: RunSettings, **options: Any) -> int:
            with cProfile.Profile() as profile:
                code = run(settings, **options)
            profile.dump_stats(os.environ["PROFILE"])
            return code

        service.run = profiled
    main_with(lambda _: CostlessModel())
