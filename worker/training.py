"""Train a sentiment checkpoint by the card's recipe: fine-tune a base checkpoint, or make a new small network.

The steps: read the sources, put the held-out rows aside, (new network) learn WordPieces and train on masked tokens,
balance sources and classes, fine-tune, write the checkpoint, read it back and measure it on the held-out rows.
"""

import os
import random
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizer,
)
from transformers.utils.logging import disable_progress_bar

from worker.checkpoint import ModelError, folder_of
from worker.corpus import CLASSES, Example, Source, balance, part_of, read_source, require_classes
from worker.evaluation import Report, evaluate_examples
from worker.settings import CorpusSettings, TrainSettings

__all__ = ["Progress", "ProgressView", "Result", "train"]

Batch = list[int]
"""Places of rows in the list they come from."""

Show = Callable[["Progress"], None]
"""What progress is reported to."""

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True)
class Progress:
    """How far one stage has come: `done` of `total` steps, and a short note such as the loss."""

    stage: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class Result:
    """What `train` made: the folder, macro-F1 on the measured rows, and how long it took."""

    folder: Path
    report: Report
    seconds: float


@dataclass(frozen=True)
class _Run:
    """What every stage of one training needs."""

    options: TrainSettings
    device: torch.device
    rng: random.Random
    report: Show


class ProgressView:
    """Shows `Progress`: bars on a terminal, else a plain line at each tenth of a stage. A context manager to call."""

    def __init__(self, console: Console | None = None) -> None:
        """`console` defaults to standard error."""
        self._console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bars = ProgressBars(*columns, console=self._console) if self._console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def __enter__(self) -> "ProgressView":
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Show it; called by `train` after each step."""
        if self._bars:
            self._draw(self._bars, progress)
        else:
            self._print(progress)

    def _draw(self, bars: ProgressBars, progress: Progress) -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total, note="")
        bars.update(self._tasks[progress.stage], total=progress.total, completed=progress.done, note=progress.note)

    def _print(self, progress: Progress) -> None:
        tenth = 10 * progress.done // max(1, progress.total)
        if tenth > self._tenths.get(progress.stage, -1):
            self._tenths[progress.stage] = tenth
            self._console.print(f"{progress.stage}: {progress.done}/{progress.total} {progress.note}".rstrip())


def train(options: TrainSettings, sources: Sequence[Source], report: Show) -> Result:
    """Train, write the checkpoint into `options.output`, and measure what was written. Blocks, for minutes to hours.

    Called by the command line, which makes the sources from the settings; `report` is called on the same thread after
    each step. ValueError, one sentence: a source or an option is wrong, a class has no training row, nothing is left to
    measure on, the base cannot be loaded, the folder cannot be written.
    """
    began = time.monotonic()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    training, measured = _split(options, sources)
    _make_folder(options.output)
    run = _Run(options, _device(options.device), random.Random(options.seed), report)
    with _reproducible(options.seed, options.threads):
        if options.base is None:
            tokenizer, network = _new_network(run, [example.text for example in training])
        else:
            tokenizer, network = _base_network(options.base)
        _fine_tune(run, tokenizer, network, balance(training, run.rng, options.examples_per_class))
        _save(network, tokenizer, options)
        figures = evaluate_examples(_predictor(run), measured)
    result = Result(options.output, figures, time.monotonic() - began)
    (options.output / "README.md").write_text(model_card(options, sources, result, training, network), encoding="utf-8")
    return result


def _split(options: TrainSettings, sources: Sequence[Source]) -> tuple[list[Example], dict[str, list[Example]]]:
    """Training examples, and the examples to measure on by source."""
    measured_part = "development" if options.development else "held-out"
    training: list[Example] = []
    measured = {}
    for source in sources:
        examples = read_source(source)
        parts = [part_of(example.text) for example in examples]
        away = {"held-out", measured_part}
        training += [e for e, part in zip(examples, parts, strict=True) if part not in away]
        measured[source.name] = [e for e, part in zip(examples, parts, strict=True) if part == measured_part]
        if not measured[source.name]:
            raise ValueError(f"source {source.name!r}: no row is {measured_part}; it needs more rows (about 100)")
    require_classes(training)
    return training, measured


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
    """Torch's random numbers and threads as asked, inside; as they were, after.

    A sum over another number of threads differs in its last digits, and training makes more of that.
    """
    before = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


# --- networks and tokenizers ---


def _labels() -> dict[str, Any]:
    return {
        "num_labels": len(CLASSES),
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: index for index, name in enumerate(CLASSES)},
        "problem_type": "single_label_classification",
    }


def _base_network(base: str) -> tuple[Any, Any]:
    try:
        source = str(folder_of(base, None) or base)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **_labels())
        network = AutoModelForSequenceClassification.from_pretrained(
            source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    except (OSError, ValueError, ModelError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"--base {base} cannot be loaded as a sequence-classification checkpoint: {reason}") from None
    if tokenizer.pad_token_id is None:
        raise ValueError(f"--base {base} has no padding token; take a checkpoint of the BERT kind")
    return tokenizer, network


def _new_network(run: _Run, texts: list[str]) -> tuple[Any, Any]:
    options = run.options
    tokenizer = _learn_tokenizer(texts, options.vocabulary, options.max_tokens)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        intermediate_size=4 * options.hidden,
        max_position_embeddings=options.max_tokens,
        **_labels(),
    )
    network: Any = BertForSequenceClassification(config)
    if options.pretrain_epochs:
        _pretrain(run, tokenizer, network, texts)
    return tokenizer, network


def _learn_tokenizer(texts: list[str], size: int, max_tokens: int) -> Any:
    """A lower-casing WordPiece tokenizer with at most `size` entries."""
    backend = BertTokenizer(vocab=_ids(SPECIAL_TOKENS), do_lower_case=True, strip_accents=False).backend_tokenizer
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    counts = Counter(char for text in texts for char in backend.normalizer.normalize_str(text) if not char.isspace())
    alphabet = sorted(char for char, count in counts.items() if count >= 5)
    # As special tokens the single characters get fixed ids. Else the trainer numbers them in the order of a hash map,
    # which differs from run to run, and breaks ties between pairs by those numbers.
    fixed = SPECIAL_TOKENS + alphabet + [f"##{char}" for char in alphabet]
    learner.train_from_iterator(
        _without_others(texts, alphabet, backend.normalizer),
        trainers.WordPieceTrainer(vocab_size=size, special_tokens=fixed, show_progress=False),
    )
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    vocab = _ids([token for token, _ in learned])
    return BertTokenizer(vocab=vocab, do_lower_case=True, strip_accents=False, model_max_length=max_tokens)


def _without_others(texts: list[str], alphabet: list[str], normalizer: Any) -> Iterator[str]:
    """Normalised texts with a space for each character outside the alphabet: the trainer shall number none itself."""
    known = {*alphabet, " "}
    for text in texts:
        yield "".join(char if char in known else " " for char in normalizer.normalize_str(text))


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _token_ids(tokenizer: Any, texts: list[str], max_tokens: int) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    return ids


def _most_tokens(tokenizer: Any, network: Any) -> int:
    """The longest text the network can read, and never more than 512: some checkpoints state no maximum."""
    return int(min(tokenizer.model_max_length, getattr(network.config, "max_position_embeddings", 512), 512))


# --- batches ---


def _shuffled_batches(lengths: Sequence[int], size: int, rng: random.Random) -> list[Batch]:
    """One epoch's batches of `size` rows: random, but with rows of like length together, so that little is padding."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), 50 * size):
        window = sorted(order[start : start + 50 * size], key=lengths.__getitem__)
        batches += [window[at : at + size] for at in range(0, len(window), size)]
    rng.shuffle(batches)
    return batches


def _epochs(count: int, lengths: Sequence[int], size: int, rng: random.Random) -> list[Batch]:
    return [batch for _ in range(count) for batch in _shuffled_batches(lengths, size, rng)]


def _padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> Tensor:
    """B rows of token ids -> B × longest, padded at the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)


def _hidden_tokens(ids: Tensor, tokenizer: Any, share: float) -> Tensor:
    """A random mask like `ids`: true for about `share` of the tokens, never for a special one."""
    special = torch.tensor(sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}), device=ids.device)
    return (torch.rand(ids.shape, device=ids.device) < share) & ~torch.isin(ids, special)


# --- steps ---


def _optimise(
    run: _Run,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], Tensor],
    rate: float,
    stepped: Callable[[int, float], None],
) -> None:
    """AdamW over `batches` with a linear warm-up (a tenth) and decay; `stepped(number, loss)` after each step."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    warm = max(1, len(batches) // 10)
    for number, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = rate * min((number + 1) / warm, (len(batches) - number) / max(1, len(batches) - warm))
        optimiser.zero_grad()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.options.precision == "bfloat16"):
            loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        stepped(number + 1, loss.item())


def _pretrain(run: _Run, tokenizer: Any, network: Any, texts: list[str]) -> None:
    """Train the body of `network` on masked tokens of `texts`, in place (Devlin et al., 2019).

    The [CLS] vector is trained too, to say which tokens the text has: else nothing trains it before fine-tuning.
    """
    options, device = run.options, run.device
    rows = _token_ids(tokenizer, texts, min(options.pretrain_max_tokens, options.max_tokens))
    network.to(device)
    guesser: Any = BertForMaskedLM(network.config)
    guesser.to(device)
    guesser.bert.load_state_dict(network.bert.state_dict(), strict=False)
    head, body, pooler = guesser.cls, guesser.bert, network.bert.pooler
    special = torch.tensor(tokenizer.all_special_ids, device=device)

    def loss_of(batch: Batch) -> Tensor:
        ids = _padded([rows[place] for place in batch], tokenizer.pad_token_id, device)
        hidden = _hidden_tokens(ids, tokenizer, options.pretrain_masking)
        states = body(_corrupted(ids, hidden, tokenizer), (ids != tokenizer.pad_token_id).long()).last_hidden_state
        # The vocabulary is most of the arithmetic: guess where there is something to guess only.
        guesses = head(states[hidden]).float()
        loss = functional.cross_entropy(guesses, ids[hidden], reduction="sum") / max(1, len(guesses))
        if options.pretrain_summary:
            present = torch.zeros(len(batch), len(tokenizer), device=device).scatter_(1, ids, 1.0)
            present[:, special] = 0
            wanted = present / present.sum(1, keepdim=True).clamp(min=1)
            loss = loss + options.pretrain_summary * functional.cross_entropy(head(pooler(states)).float(), wanted)
        return loss

    guesser.train()
    lengths = [len(row) for row in rows]
    batches = _epochs(options.pretrain_epochs, lengths, options.batch_texts, run.rng)
    parameters = [*guesser.parameters(), *(pooler.parameters() if options.pretrain_summary else ())]

    def stepped(done: int, loss: float) -> None:
        run.report(Progress("masked tokens", done, len(batches), f"loss {loss:.3f}"))

    _optimise(run, parameters, batches, loss_of, options.pretrain_learning_rate, stepped)
    network.bert.load_state_dict(body.state_dict(), strict=False)


def _corrupted(ids: Tensor, hidden: Tensor, tokenizer: Any) -> Tensor:
    """`ids` where of the hidden tokens 80 % are [MASK], 10 % another token, 10 % themselves (Devlin et al., 2019)."""
    draw = torch.rand(ids.shape, device=ids.device)
    other = torch.randint(len(SPECIAL_TOKENS), len(tokenizer), ids.shape, device=ids.device)
    masked = torch.where(hidden & (draw < 0.8), tokenizer.mask_token_id, ids)
    return torch.where(hidden & (draw >= 0.9), other, masked)


def _fine_tune(run: _Run, tokenizer: Any, network: Any, examples: list[Example]) -> None:
    """Train `network` to classify, in place; what remains is the running mean of its weights."""
    options = run.options
    network.to(run.device)
    limit = min(options.max_tokens, _most_tokens(tokenizer, network))
    rows = _token_ids(tokenizer, [example.text for example in examples], limit)
    labels = torch.tensor([example.label for example in examples], device=run.device)
    masking = options.token_masking if tokenizer.mask_token_id is not None else 0.0

    def loss_of(batch: Batch) -> Tensor:
        ids = _padded([rows[place] for place in batch], tokenizer.pad_token_id, run.device)
        wanted = labels[batch]
        if options.consistency:
            ids, wanted = ids.repeat(2, 1), wanted.repeat(2)
        seen = (ids != tokenizer.pad_token_id).long()
        if masking:
            ids = ids.masked_fill(_hidden_tokens(ids, tokenizer, masking), tokenizer.mask_token_id)
        logits = network(input_ids=ids, attention_mask=seen).logits.float()
        loss = _label_loss(logits, wanted)
        return loss + options.consistency * _disagreement(logits) if options.consistency else loss

    network.train()
    rate = options.learning_rate or (5e-4 if options.base is None else 3e-5)
    lengths = [len(row) for row in rows]
    batches = _epochs(options.epochs, lengths, options.batch_texts, run.rng)
    parameters = list(network.parameters())
    mean = [parameter.detach().clone() for parameter in parameters]

    def stepped(done: int, loss: float) -> None:
        with torch.no_grad():
            # Early on the mean forgets fast, so that the untrained start leaves no trace.
            torch._foreach_lerp_(mean, parameters, 1 - min(options.averaging, done / (done + 10)))
        run.report(Progress("fine-tuning", done, len(batches), f"loss {loss:.3f}"))

    _optimise(run, parameters, batches, loss_of, rate, stepped)
    with torch.no_grad():
        for parameter, value in zip(parameters, mean, strict=True):
            parameter.copy_(value)


def _label_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy for the label, plus binary cross-entropy per label.

    The score is made of sigmoids, and cross-entropy alone says nothing about their level.
    """
    each = functional.one_hot(wanted, logits.shape[-1]).to(logits.dtype)
    return functional.cross_entropy(logits, wanted) + functional.binary_cross_entropy_with_logits(logits, each)


def _disagreement(logits: Tensor) -> Tensor:
    """Symmetric KL divergence between the halves of the rows, which are the same texts (R-Drop: Liang et al., 2021)."""
    one, two = functional.log_softmax(logits, -1).chunk(2)
    return 0.5 * (
        functional.kl_div(one, two, log_target=True, reduction="batchmean")
        + functional.kl_div(two, one, log_target=True, reduction="batchmean")
    )


# --- the checkpoint ---


def _save(network: Any, tokenizer: Any, options: TrainSettings) -> None:
    if getattr(tokenizer, "is_fast", False):
        # What training cut texts to would otherwise be written as the tokenizer's own rule.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    network.to(getattr(torch, options.storage)).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    # The writer of safetensors lets only the owner read them; a package is read by others.
    for file in options.output.glob("*.safetensors"):
        file.chmod(0o644)


def _predictor(run: _Run) -> Callable[[list[str]], list[str]]:
    """Texts -> labels by the checkpoint as it was written, so that the figures are those of the files."""
    folder, size = run.options.output, run.options.batch_texts
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).to(run.device).eval()
    limit = _most_tokens(tokenizer, network)

    def predict(texts: list[str]) -> list[str]:
        rows = _token_ids(tokenizer, texts, limit)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        labels = [""] * len(rows)
        with torch.inference_mode():
            for start in range(0, len(order), size):
                places = order[start : start + size]
                ids = _padded([rows[place] for place in places], tokenizer.pad_token_id, run.device)
                logits = network(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits
                for place, best in zip(places, logits.argmax(-1).tolist(), strict=True):
                    labels[place] = network.config.id2label[best]
                run.report(Progress("measuring", min(start + size, len(order)), len(order)))
        return labels

    return predict


def command(options: TrainSettings, sources: Sequence[Source]) -> str:
    """The command line that does the same again, with file names in place of paths."""
    words = ["sentiment-worker", "train"]
    for source in sources:
        words += ["--source", f"{source.name}={source.path.name}"]
        for raw, name in source.label_map.items():
            words += ["--label-map", f"{source.name}:{raw}={name}"]
    for flag in ("text_column", "label_column"):
        value = getattr(sources[0], flag)
        if value != Source.__dataclass_fields__[flag].default:
            words += [f"--{flag.replace('_', '-')}", value]
    for name, field in TrainSettings.model_fields.items():
        value = getattr(options, name)
        if name in CorpusSettings.model_fields or name == "output" or value == field.default:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(Path(value).name if name == "base" and Path(value).is_dir() else str(value))
    return shlex.join([*words, "--output", options.output.name])


def model_card(
    options: TrainSettings, sources: Sequence[Source], result: Result, training: Sequence[Example], network: Any
) -> str:
    """The README.md beside the weights: what it is, its table, its data, its recipe, its limits. Markdown."""
    counts = Counter((example.source, example.label) for example in training)
    data = ["| Source | Training rows | " + " | ".join(CLASSES) + " |", "| --- | --- | --- | --- | --- |"]
    for source in sources:
        of_class = [counts[source.name, label] for label in range(len(CLASSES))]
        data.append(f"| {source.name} | {sum(of_class)} | " + " | ".join(map(str, of_class)) + " |")
    measured = "development rows (byte 26 to 51, not trained on)" if options.development else "held-out rows"
    size = sum(parameter.numel() for parameter in network.parameters())
    return f"""---
language: ["ru"]
tags:
- russian
- classification
- sentiment
- multiclass
---
{_origin(options, network)}

The problem is formulated as multiclass classification: `negative` vs `neutral` vs `positive`. Probabilities are the
sigmoid of the logits, per label; the score is the positive one minus the negative one. {size:,} parameters, stored as
{options.storage}; load them with `dtype=torch.float32`.

## Training

Sources and classes were balanced by up- and downsampling. A row whose text's SHA-256 ends in a byte below 26 is held
out: no vocabulary, weight or choice comes from it. Macro F1 on the {result.report.overall.sum():,} {measured}:

{result.report.markdown()}

{chr(10).join(data)}

Seed {options.seed}, {result.seconds / 60:.0f} minutes on {options.threads or "all"} threads. {_recipe(options)}

    {command(options, sources)}

## Limits

Only texts like those it was trained on are judged as well as the table says. Texts longer than {options.max_tokens}
tokens were cut in training. Nothing was done about bias in the data.
"""


def _origin(options: TrainSettings, network: Any) -> str:
    if options.base is None:
        return (
            f"This is a new BERT of {options.layers} layers of width {options.hidden} with "
            f"{network.config.vocab_size:,} WordPieces, trained to classify the sentiment of short Russian texts."
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
    return "Recipe: " + ", ".join(steps) + "."
