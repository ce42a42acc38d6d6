"""The worker's command line with a model of a test's own, for modules that are run as `python -m tests.support.… run …`."""

from collections.abc import Callable
from typing import Any

from worker.cli import main
from worker.commands import run as service
from worker.settings import RunSettings


def main_with(load_model: Callable[[RunSettings], Any]) -> None:
    """Ends the process as `python -m worker` does; the command `run` has its model from `load_model`."""
    service._loaded = load_model
    main()
