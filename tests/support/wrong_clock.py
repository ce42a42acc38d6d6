"""The worker with a model that costs nothing, where the clock is wrong: `python -m tests.support.wrong_clock run …`.

`CLOCK_S` is by how many seconds it is ahead; negative: behind.
"""

import os
import runpy
import time

TRUE_TIME = time.time
AHEAD_S = float(os.environ["CLOCK_S"])

if __name__ == "__main__":
    time.time = lambda: TRUE_TIME() + AHEAD_S
    runpy.run_module("tests.support.costless_model", run_name="__main__")
