"""``sentiment-worker train``: a checkpoint from labelled CSV files."""

import rich

from worker.commands.evaluate import faults_as_wrong_settings, labelled_sources
from worker.errors import WrongSetting
from worker.model.checkpoint import TORCH_COMMAND
from worker.model.device import has_torch
from worker.settings.commands import TrainSettings


def run(settings: TrainSettings) -> int:
    """Trains, and prints the figures. Blocks for minutes to hours; returns the exit code. Raises UserError."""
    if not has_torch():
        raise WrongSetting(f"train needs torch and transformers; {TORCH_COMMAND} installs them")
    sources = labelled_sources(settings)
    from worker.training.progress import ProgressView  # noqa: PLC0415 - torch takes seconds
    from worker.training.train import train  # noqa: PLC0415 - torch takes seconds

    with ProgressView() as view, faults_as_wrong_settings():
        result = train(settings, sources, view)
    rich.print(result.report.table())
    print(f"{result.folder}, after {result.seconds:.0f} s")  # noqa: T201
    return 130 if result.interrupted else 0
