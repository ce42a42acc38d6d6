"""The worker's command line with a model of a test's own, for modules that are run as `python -m tests.support.… run …`.

`INTERVALS` sets constants of the worker by their names, so that a test need not wait for what is rare: a JSON object such
as `{"TOPICS_INTERVAL_S": 2}`.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from worker.cli import main
from worker.commands import run as service
from worker.settings.run import RunSettings


def main_with(load_model: Callable[[RunSettings], Any]) -> None:
    """Ends the process as `python -m worker` does; the command `run` has its model from `load_model`."""
    set_intervals(json.loads(os.environ.get("INTERVALS", "{}")))
    service.run = partial(service.run, load_model=load_model)
    main()


def set_intervals(values: dict[str, float]) -> None:
    """Sets each constant in whatever module of the worker has it; AssertionError where none has."""
    for name, value in values.items():
        modules = [
            module for path, module in sys.modules.items() if path.startswith("worker.") and hasattr(module, name)
        ]
        assert modules, f"the worker has no {name}"
        for module in modules:
            setattr(module, name, value)
