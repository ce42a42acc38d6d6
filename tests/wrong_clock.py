"""The worker of benchmarks.costless on a machine whose clock is wrong: `python -m tests.wrong_clock run …`, for tests.

`CLOCK_S` is by how many seconds it is ahead; negative: behind.
"""

import os
import runpy
import time

TRUE_TIME = time.time
AHEAD_S = float(os.environ["CLOCK_S"])

if __name__ == "__main__":
    time.time = lambda: TRUE_TIME() + AHEAD_S
    runpy.run_module("benchmarks.costless", run_name="__main__")
