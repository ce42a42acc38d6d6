"""Trains a sentiment checkpoint by the model card's recipe: fine-tunes a base checkpoint, or makes a new small model.

The steps: read the sources, put the held-out rows aside, (new model) learn WordPieces and train on masked tokens,
balance sources and classes, fine-tune, write the checkpoint, read it back and measure it on the held-out rows.
"""

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from worker.settings.commands import TrainSettings
from worker.training.base_checkpoint import load_base, not_finite
from worker.training.dataset import (
    CLASSES,
    Counts,
    Example,
    LabelledFile,
    balanced_counts,
    part_of,
    read_source,
    repetitions,
)
from worker.training.evaluate import evaluate
from worker.training.fine_tuning import FineTuning
from worker.training.model_card import model_card
from worker.training.new_model import new_model
from worker.training.prediction import probabilities
from worker.training.progress import ReportProgress
from worker.training.training_run import Diverged, Interrupted, TrainingResult, TrainingRun


def train(options: TrainSettings, sources: Sequence[LabelledFile], report: ReportProgress) -> TrainingResult:
    """Trains by the recipe in `options`, writes the checkpoint into `options.output`, and measures what was written.

    Blocks for minutes to hours. `report` is called on the same thread after each step. KeyboardInterrupt during
    fine-tuning ends that early: the weights so far are written and measured.

    Raises ValueError with one sentence where a source, an option, the base or the folder cannot be used; Diverged, with
    nothing written; Interrupted.
    """
    began = time.monotonic()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    set_verbosity_error()  # type: ignore[no-untyped-call]
    run = TrainingRun(options, _device(options.device), random.Random(options.seed), report, [])
    rows = _split(run, sources)
    counts = _balanced(run, rows.training)
    _make_folder(options.output)
    with _reproducible(options.seed, options.threads):
        tokenizer, model, interrupted = _trained(run, rows, counts)
        try:
            _save(model, tokenizer, options)
            figures = evaluate(partial(probabilities, run, *_read_back(run), "measuring"), rows.measured)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: what is in {options.output} may be incomplete, and has no card") from None
    result = TrainingResult(options.output, figures, time.monotonic() - began, interrupted)
    card = model_card(run, sources, result, rows.training, counts, model)
    (options.output / "README.md").write_text(card, encoding="utf-8")
    return result


@dataclass(frozen=True)
class Rows:
    """The rows of all sources, divided. `development`: to measure on after each epoch; none if they are trained on."""

    training: list[Example]
    development: list[Example]
    measured: dict[str, list[Example]]
    """To measure the checkpoint on, by source."""


def _trained(run: TrainingRun, rows: Rows, counts: Counts) -> tuple[Any, Any, bool]:
    """The trained tokenizer and model, and whether fine-tuning was interrupted. Raises Interrupted if that was before it."""
    try:
        if run.options.base is None:
            tokenizer, model = new_model(run, [example.text for example in rows.training])
        else:
            tokenizer, model = load_base(run, run.options.base)
        return tokenizer, model, FineTuning(run, tokenizer, model, rows.training, counts, rows.development).train()
    except KeyboardInterrupt:
        raise Interrupted("interrupted before the first step of fine-tuning: there is nothing to keep yet") from None


def _split(run: TrainingRun, sources: Sequence[LabelledFile]) -> Rows:
    """Reads the sources, and divides their rows. Raises ValueError."""
    options = run.options
    measured_part, by = "development" if options.development else "held-out", options.rows_held_out_by(options.base)
    away = {"held-out", "development"} if options.development or options.patience else {"held-out"}
    rows = Rows([], [], {})
    for source in sources:
        parts: dict[str, list[Example]] = {"held-out": [], "development": [], "training": []}
        for example in read_source(source):
            part = part_of(example.text, by)
            parts[part if part in away else "training"].append(example)
        rows.training.extend(parts["training"])
        rows.development.extend(parts["development"])
        rows.measured[source.name] = parts[measured_part]
        if not parts[measured_part]:
            raise ValueError(f"source {source.name!r}: no row is {measured_part}; it needs more rows (about 100)")
    if options.patience and not rows.development:
        raise ValueError("no row is a development row, which --patience measures on; it needs more rows (about 100)")
    repeated, ambiguous = repetitions(rows.training)
    if repeated:
        run.note(
            f"Of {len(rows.training):,} training rows {repeated:,} repeat the text of another (case, ё and е, and spaces "
            f"aside), and {ambiguous:,} texts have more than one label; all of them are trained on as they are."
        )
    return rows


def _balanced(run: TrainingRun, training: list[Example]) -> Counts:
    """How many rows of each source and class make an epoch; notes a class that has fewer than another."""
    counts = balanced_counts(training, run.options.max_repeats, run.options.examples_per_class)
    totals = [sum(count for (_, of), count in counts.items() if of == label) for label in range(len(CLASSES))]
    for name, total in zip(CLASSES, totals, strict=True):
        if total < max(totals):
            run.note(
                f"The classes are not balanced: {name} has {total:,} rows an epoch and another class {max(totals):,}, as no "
                f"row stands there more than {run.options.max_repeats} times (max_repeats)."
            )
    return counts


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the output folder {folder} cannot be made: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the output folder {folder} cannot be written to")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name} is not here; use auto, cpu, or cuda where there is one") from None


@contextmanager
def _reproducible(seed: int, threads: int) -> Iterator[None]:
    """Sets torch's random seed and threads (0: as they are) inside, and sets both back after.

    The threads matter: a sum over another number of them differs in its last digits, and training amplifies that.
    """
    before = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _save(model: Any, tokenizer: Any, options: TrainSettings) -> None:
    """Writes the checkpoint. Raises Diverged, before anything is written, if a weight is not finite as it is stored."""
    if getattr(tokenizer, "is_fast", False):
        # Else the length that training cut texts to would be written as the tokenizer's own.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    model.to(getattr(torch, options.storage))
    broken = not_finite(model)
    if broken:
        raise Diverged(
            f"the training diverged: {broken} holds what is no finite number in {options.storage}; take a lower "
            f"learning rate{', or --storage float32' if options.storage == 'float16' else ''}; nothing was written"
        )
    (options.output / "README.md").unlink(missing_ok=True)  # it may be the card of another checkpoint
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    # safetensors writes files that only their owner may read, and a package is read by others.
    for file in options.output.glob("*.safetensors"):
        file.chmod(0o644)


def _read_back(run: TrainingRun) -> tuple[Any, Any]:
    """Tokenizer and model of the checkpoint as it was written, so that the figures are those of the files."""
    folder = run.options.output
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model.to(run.device)
