"""The worker of benchmarks.costless where few files may be open: `python -m tests.few_files run …`, for tests.

`FILES` is how many at most; it begins with 64.
"""

import os
import resource
import runpy

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(os.environ["FILES"])))
    runpy.run_module("benchmarks.costless", run_name="__main__")
