"""The README.md beside trained weights: what the model is, its figures, its data and its recipe."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worker.settings.commands import TrainSettings
from worker.training.dataset import CLASSES, Counts, Example, LabelledFile
from worker.training.training_run import TrainingResult, TrainingRun


def model_card(
    run: TrainingRun,
    sources: Sequence[LabelledFile],
    result: TrainingResult,
    training: Sequence[Example],
    counts: Counts,
    model: Any,
) -> str:
    """The model card in Markdown. `training`: the rows that were not held out; `counts`: how many of them an epoch has."""
    options = run.options
    measured = "development rows (byte 26 to 51, not trained on)" if options.development else "held-out rows"
    is_exact = options.rows_held_out_by(options.base) == "exact"
    text = "text" if is_exact else "text (lower case, е for ё, no stress marks, single spaces)"
    size = sum(parameter.numel() for parameter in model.parameters())
    chosen = _development(options)
    return f"""---
language: ["ru"]
tags:
- russian
- classification
- sentiment
- multiclass
---
{_origin(options, model)}

The problem is formulated as multiclass classification: `negative` vs `neutral` vs `positive`. Probabilities are the
sigmoid of the logits, per label; the score is the positive one minus the negative one. {size:,} parameters, stored as
{options.storage}; load them with `dtype=torch.float32`.

## Training

A row is held out where the SHA-256 of its {text} ends in a byte below
26: no vocabulary, weight or choice comes from it. Macro F1 on the {result.report.overall.sum():,} {measured}:

{result.report.markdown()}

The other rows were drawn anew for each epoch, up- and downsampled towards as many of each class, and of each source in a
class, as there are, and no row more than {options.max_repeats} times.{chosen} What there is → what an epoch has:

{_data_table(sources, training, counts)}

{chr(10).join(run.notes)}

Seed {options.seed}, {result.seconds / 60:.0f} minutes on {options.threads or "all"} threads. {_recipe(options)}

    {command(options, sources)}

## Limits

Only texts like those it was trained on are judged as well as the table says. Texts longer than {options.max_tokens}
tokens were cut in training. Nothing was done about bias in the data.
"""


def _development(options: TrainSettings) -> str:
    """How development rows were used, as a sentence with a space in front; empty if they were trained on."""
    if not options.patience:
        return ""
    said = " Development rows (byte 26 to 51) were put aside, and the epoch was chosen by them"
    return said + (", so that the figures above flatter it a little." if options.development else ".")


def _data_table(sources: Sequence[LabelledFile], training: Sequence[Example], counts: Counts) -> str:
    """A table of how many rows of each source and class there are → how many of them an epoch has."""
    there = Counter((example.source, example.label) for example in training)
    data = ["| Source | Training rows | " + " | ".join(CLASSES) + " |", "| --- | --- | --- | --- | --- |"]
    for source in sources:
        cells = [(source.name, label) for label in range(len(CLASSES))]
        pairs = [(there[cell], counts.get(cell, 0)) for cell in cells]
        pairs.insert(0, (sum(before for before, _ in pairs), sum(after for _, after in pairs)))
        data.append(f"| {source.name} | " + " | ".join(f"{before} → {after}" for before, after in pairs) + " |")
    return "\n".join(data)


def _origin(options: TrainSettings, model: Any) -> str:
    if options.base is None:
        return (
            f"This is a new BERT of {options.layers} layers of width {options.hidden} with "
            f"{model.config.vocab_size:,} WordPieces, trained to classify the sentiment of short Russian texts."
        )
    name = Path(options.base).name if Path(options.base).is_dir() else options.base
    return f"This is {name} fine-tuned for classification of sentiment for short Russian texts."


def _recipe(options: TrainSettings) -> str:
    steps = []
    if options.base is None and options.pretrain_epochs:
        steps.append(f"{options.pretrain_epochs} epochs of masked tokens on the same texts")
    steps.append(f"{options.epochs} epochs of fine-tuning")
    if options.token_masking:
        steps.append(f"{options.token_masking:.0%} of the tokens hidden")
    if options.consistency:
        steps.append("two dropout passes kept close (R-Drop)")
    if options.averaging:
        steps.append("the running mean of the weights kept")
    if options.fine_tunings > 1:
        steps.append(f"the mean of {options.fine_tunings} fine-tunings from the same start")
    return "Recipe: " + ", ".join(steps) + "."


def command(options: TrainSettings, sources: Sequence[LabelledFile]) -> str:
    """The command line that does the same again, with file names in place of paths."""
    words = ["sentiment-worker", "train"]
    for source in sources:
        words += ["--source", f"{source.name}={source.path.name}"]
        for raw, name in source.label_map.items():
            words += ["--label-map", f"{source.name}:{raw}={name}"]
        for flag in ("text_column", "label_column"):
            if getattr(source, flag) != LabelledFile.__dataclass_fields__[flag].default:
                words += [f"--{flag.replace('_', '-')}", f"{source.name}={getattr(source, flag)}"]
    for name, field in TrainSettings.model_fields.items():
        value = getattr(options, name)
        if name in ("config", "output") or isinstance(value, list) or value == field.default:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(Path(value).name if name == "base" and Path(value).is_dir() else str(value))
    return shlex.join([*words, "--output", options.output.name])
