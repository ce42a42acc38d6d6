"""The options of the other commands."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from worker.settings.base import Settings
from worker.settings.shared import CheckpointSettings, EventSettings, ModelSettings
from worker.settings.types import Columns, Device, LabelMap, LogLevel, Moment, Reasons, Width, Words
from worker.settings.values import moment_ms, revision_fault


class ReplaySettings(EventSettings):
    """Send dead letters back to the topics that they came from, each once."""

    log_level: LogLevel = Field("warning", description="least severe level logged")
    reason: Reasons = Field([], description="only dead letters of this reason; may be repeated; default: all")
    since: Moment | None = Field(
        None, description="only those written from then on: 2026-11-23T10:00Z, or how long ago: 30m, 2h, 7d"
    )
    until: Moment | None = Field(None, description="only those written before then, likewise")
    dry_run: bool = Field(False, description="count them, and send nothing")
    replay_group_id: str | None = Field(
        None, description="consumer group that remembers what has been replayed; default: group_id.replay"
    )

    @model_validator(mode="after")
    def _has_a_span(self) -> Self:
        if self.since and self.until and moment_ms(self.since) >= moment_ms(self.until):
            raise ValueError("since should be before until: nothing can be both")
        return self

    @model_validator(mode="after")
    def _has_a_group(self) -> Self:
        if self.replay_group_id == self.group_id:
            raise ValueError(
                "replay_group_id is the workers' group_id: they would share out the dead letters; take another"
            )
        return self


class ClassifySettings(ModelSettings):
    """Score texts: arguments, or the lines of a file or of standard input (-). One JSON line each."""

    log_level: LogLevel = Field("warning", description="least severe level logged")
    texts: CliPositionalArg[Words] = Field(
        [],
        description="texts to score, those that begin with -- behind a -- of its own; - for the lines of standard input",
    )
    file: Path | None = Field(None, description="score the lines of this file: UTF-8, or UTF-16 with a byte order mark")


class BenchSettings(CheckpointSettings):
    """This machine's speed with this model, and the settings to use. No Kafka."""

    model_config = SettingsConfigDict(populate_by_name=True)

    log_level: LogLevel = Field("warning", description="least severe level logged")
    file: Path | None = Field(
        None, description="texts, one a line, read as classify reads them; default: product reviews"
    )
    seconds: float = Field(1, gt=0, le=600, description="how long each figure is measured, s")
    json_output: bool = Field(False, alias="json", description="print JSON")


class CorpusSettings(Settings):
    """Labelled CSV files, for the commands that read them."""

    source: Words = Field([], description="NAME=PATH of a labelled CSV file; may be repeated")
    label_map: LabelMap = Field(
        [],
        description="NAME:RAW=CLASS, what a label of a source means, or NAME:RAW= to drop its rows; may be repeated",
    )
    text_column: Columns = Field(
        [],
        description="column of the text: COLUMN, or NAME=COLUMN for one source; may be repeated; default: text",
    )
    label_column: Columns = Field([], description="column of the label, likewise; default: label")
    hold_out_by: Literal["normalized", "exact"] | None = Field(
        None,
        description="which rows train leaves out, by the hash of the text: normalized (near copies stay together: case, ё "
        "and е, stress marks and spaces make no difference) or exact (as it is in the file); default: exact for builtin, "
        "whose rows were held out so, else normalized",
    )

    def rows_held_out_by(self, checkpoint: str | None) -> Literal["normalized", "exact"]:
        """``hold_out_by``, or what goes with the checkpoint that is measured or fine-tuned."""
        return self.hold_out_by or ("exact" if checkpoint == "builtin" else "normalized")


class EvaluateSettings(ModelSettings, CorpusSettings):
    """Macro-F1 per source and overall, F1 per class and calibration error, on labelled CSV files."""

    log_level: LogLevel = Field("warning", description="least severe level logged")
    held_out_only: bool = Field(False, description="only the rows that train leaves out")
    format: Literal["table", "json"] = Field("table", description="what is printed")
    predictions: Path | None = Field(
        None,
        description="file to write the model's answer to each row into, with the most confident errors first: CSV if its "
        "name ends in .csv, JSON lines if in .jsonl",
    )
    against: str | None = Field(
        None,
        description="another checkpoint, named as in model: it is measured on the same rows, and the difference of macro-F1 "
        "is printed with its 95 % interval",
    )
    against_revision: str | None = Field(None, description="as revision, for the checkpoint in against")

    @model_validator(mode="after")
    def _has_a_revision_of_its_own(self) -> Self:
        if self.against_revision and not self.against:
            raise ValueError("against_revision goes with against, which names the checkpoint")
        if fault := revision_fault(self.against or "", self.against_revision):
            raise ValueError(f"against_{fault}")
        return self

    def held_out_rules(self) -> set[Literal["normalized", "exact"]]:
        """The rules of the measured models for held-out rows. A row is measured if each of them holds it out."""
        return {self.rows_held_out_by(name) for name in (self.model, self.against) if name}


class TrainSettings(CorpusSettings):
    """A checkpoint by the model card's recipe: a base fine-tuned, or a new small model."""

    output: Path = Field(description="folder for the checkpoint; files of the same names are replaced")
    base: str | None = Field(
        None,
        description="checkpoint to fine-tune: a folder (named with / or ./ in front), or a hub name; default: a new model",
    )
    seed: int = Field(1, description="with the same seed, machine and threads a CPU gives the same figures again")
    epochs: int = Field(2, ge=1, description="passes over the balanced rows in fine-tuning")
    batch_texts: int = Field(64, ge=1, description="texts a step")
    learning_rate: float | None = Field(None, gt=0, description="peak; default: 5e-4 for a new model, 3e-5 for a base")
    max_tokens: int = Field(256, ge=8, description="texts are cut to so many tokens")
    examples_per_class: int | None = Field(None, ge=1, description="after balancing; default: a third of the rows")
    max_repeats: int = Field(5, ge=1, description="times that a row may stand in one epoch, where balancing repeats it")
    token_masking: float = Field(0.1, ge=0, lt=1, description="share of tokens hidden in fine-tuning")
    consistency: float = Field(1.0, ge=0, description="weight of keeping two dropout passes close (R-Drop)")
    patience: int | None = Field(
        None,
        ge=1,
        description="development rows are not trained on, the weights of the epoch with the best macro-F1 on them are kept, "
        "and training stops after this number of epochs without a better one; default: train on these rows, too, and keep "
        "the last epoch",
    )
    averaging: float = Field(
        0.99, ge=0, lt=1, description="decay per step of the running mean of the weights within one fine-tuning"
    )
    fine_tunings: int = Field(
        1,
        ge=1,
        description="number of fine-tunings, each from the same start with other random numbers; the mean of their weights "
        "is kept",
    )
    pretrain_epochs: int = Field(12, ge=0, description="new model: passes with masked tokens first")
    pretrain_learning_rate: float = Field(1e-3, gt=0, description="new model: peak of those passes")
    pretrain_masking: float = Field(0.2, gt=0, lt=1, description="new model: share of tokens to guess")
    pretrain_summary: float = Field(0.5, ge=0, description="new model: weight of guessing all tokens from [CLS]")
    pretrain_max_tokens: int = Field(128, ge=8, description="new model: tokens a text is cut to in those passes")
    vocabulary: int = Field(8000, ge=100, description="new model: WordPieces")
    layers: int = Field(2, ge=1, description="new model: transformer layers")
    hidden: Width = Field(128, ge=1, description="new model: width, a multiple of 64 or below 128")
    storage: Literal["float16", "float32"] = Field("float16", description="how weights are stored")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="what training computes in")
    threads: int = Field(0, ge=0, description="CPU threads; 0: torch's default")
    device: Device = Field("auto", description="auto (cuda where torch finds a GPU, else cpu), cpu, cuda, cuda:N")
    development: bool = Field(False, description="measure on development rows, to choose a recipe by")


class SchemaSettings(Settings):
    """Print the schema of results, or that of the headers of dead letters."""

    record: CliPositionalArg[Literal["result", "dead-letter"]] = Field(
        "result",
        description="result: the value of a result; dead-letter: the headers that the worker adds to a dead letter",
    )
    format: Literal["json", "avro"] = Field("json", description="json: JSON Schema; avro: an Avro schema")


class DemoSettings(Settings):
    """Try the real worker on an embedded broker, with real texts and the small built-in model."""

    events: int = Field(700, ge=1, description="events to replay")
    rate: float = Field(50, gt=0, description="events per second")
    plain: bool = Field(False, description="lines instead of the live view")
    keep_running: bool = Field(False, description="go on until Ctrl-C")
