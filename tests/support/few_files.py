"""The worker with a model that costs nothing, where few files may be open: `python -m tests.support.few_files run …`.

`FILES` is how many at most; it begins with 64.
"""

import os
import resource
import runpy

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(os.environ["FILES"])))
    runpy.run_module("tests.support.costless_model", run_name="__main__")
