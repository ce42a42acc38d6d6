"""What all stages of one training share."""

import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from worker.errors import UserError
from worker.settings.commands import TrainSettings
from worker.training.evaluation_report import EvaluationReport
from worker.training.progress import ReportProgress

log = logging.getLogger(__name__)


class Diverged(UserError):
    """The loss or a weight is no longer a finite number. Exit code 1."""

    exit_code = 1


class Interrupted(UserError):
    """Ctrl-C ended the training where nothing could be measured; the message says what is kept. Exit code 130."""

    exit_code = 130


@dataclass(frozen=True)
class TrainingRun:
    """One training: its recipe, device, random numbers, and where progress goes.

    `notes`: sentences for the model card.
    """

    options: TrainSettings
    device: torch.device
    rng: random.Random
    report: ReportProgress
    notes: list[str]

    def note(self, sentence: str) -> None:
        """Puts a sentence into the model card, and into the log as a warning."""
        self.notes.append(sentence)
        log.warning("%s", sentence)


@dataclass(frozen=True)
class TrainingResult:
    """What `train` made: the folder, figures on the measured rows, the seconds, and whether Ctrl-C ended it early."""

    folder: Path
    report: EvaluationReport
    seconds: float
    interrupted: bool
