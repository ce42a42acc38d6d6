"""Train a sentiment checkpoint by the card's recipe: fine-tune a base checkpoint, or make a new small network.

The steps: read the sources, put the held-out rows aside, (new network) learn WordPieces and train on masked tokens,
balance sources and classes, fine-tune, write the checkpoint, read it back and measure it on the held-out rows.
"""

import logging
import math
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
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from worker.errors import UserError
from worker.model.checkpoint import folder_of
from worker.settings import TrainSettings
from worker.training.dataset import (
    CLASSES,
    Counts,
    Example,
    LabelledFile,
    balanced_counts,
    draw,
    part_of,
    read_source,
    repetitions,
)
from worker.training.evaluate import EvaluationReport, evaluate_examples

__all__ = ["Diverged", "Interrupted", "Progress", "ProgressView", "Result", "train"]

log = logging.getLogger(__name__)

Batch = list[int]
"""Places of rows in the list they come from."""

Show = Callable[["Progress"], None]
"""What progress is reported to."""

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class Diverged(UserError):
    """The loss or a weight became no finite number. Exit code 1."""

    exit_code = 1


class Interrupted(UserError):
    """Ctrl-C, and what there is to keep is not measured; the message says what that is. Exit code 130."""

    exit_code = 130


@dataclass(frozen=True)
class Progress:
    """How far one stage has come: `done` of `total` steps, and a short note such as the loss."""

    stage: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class Result:
    """What `train` made: the folder, macro-F1 on the measured rows, how long it took, and whether Ctrl-C ended it early."""

    folder: Path
    report: EvaluationReport
    seconds: float
    interrupted: bool


@dataclass(frozen=True)
class _Run:
    """What every stage of one training needs."""

    options: TrainSettings
    device: torch.device
    rng: random.Random
    report: Show
    notes: list[str]
    """Sentences for the card; they are logged, too."""

    def tell(self, sentence: str) -> None:
        self.notes.append(sentence)
        log.warning("%s", sentence)


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


def train(options: TrainSettings, sources: Sequence[LabelledFile], report: Show) -> Result:
    """Train, write the checkpoint into `options.output`, and measure what was written. Blocks, for minutes to hours.

    Called by the command line, which makes the sources from the settings; `report` is called on the same thread after
    each step. KeyboardInterrupt during fine-tuning ends that early: the weights so far are written and measured.

    ValueError, one sentence: a source or an option is wrong, a class has no training row, nothing is left to measure on,
    the base cannot be loaded, the folder cannot be written. Diverged: nothing was written. Interrupted.
    """
    began = time.monotonic()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    set_verbosity_error()  # type: ignore[no-untyped-call]
    run = _Run(options, _device(options.device), random.Random(options.seed), report, [])
    training, measured = _split(run, sources)
    counts = _balanced(run, training)
    _make_folder(options.output)
    with _reproducible(options.seed, options.threads):
        tokenizer, network, interrupted = _trained(run, training, counts)
        try:
            _save(network, tokenizer, options)
            figures = evaluate_examples(_predictor(run), measured)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: what is in {options.output} may be incomplete, and has no card") from None
    result = Result(options.output, figures, time.monotonic() - began, interrupted)
    card = model_card(run, sources, result, training, counts, network)
    (options.output / "README.md").write_text(card, encoding="utf-8")
    return result


def _trained(run: _Run, training: list[Example], counts: Counts) -> tuple[Any, Any, bool]:
    """Tokenizer and network, and whether fine-tuning was interrupted."""
    try:
        if run.options.base is None:
            tokenizer, network = _new_network(run, [example.text for example in training])
        else:
            tokenizer, network = _base_network(run, run.options.base)
        return tokenizer, network, _fine_tune(run, tokenizer, network, training, counts)
    except KeyboardInterrupt:
        raise Interrupted("interrupted before the first step of fine-tuning: there is nothing to keep yet") from None


def _split(run: _Run, sources: Sequence[LabelledFile]) -> tuple[list[Example], dict[str, list[Example]]]:
    """Training examples, and the examples to measure on by source."""
    options = run.options
    measured_part, by = "development" if options.development else "held-out", options.rows_held_out_by(options.base)
    training: list[Example] = []
    measured = {}
    for source in sources:
        examples = read_source(source)
        parts = [part_of(example.text, by) for example in examples]
        away = {"held-out", measured_part}
        training += [e for e, part in zip(examples, parts, strict=True) if part not in away]
        measured[source.name] = [e for e, part in zip(examples, parts, strict=True) if part == measured_part]
        if not measured[source.name]:
            raise ValueError(f"source {source.name!r}: no row is {measured_part}; it needs more rows (about 100)")
    repeated, ambiguous = repetitions(training)
    if repeated:
        run.tell(
            f"Of {len(training):,} training rows {repeated:,} repeat the text of another (case, ё and е, and spaces aside), "
            f"and {ambiguous:,} texts have more than one label; all of them are trained on as they are."
        )
    return training, measured


def _balanced(run: _Run, training: list[Example]) -> Counts:
    """How many rows of each source and class make an epoch; tells of a class that has fewer than another."""
    counts = balanced_counts(training, run.options.max_repeats, run.options.examples_per_class)
    totals = [_of_class(counts, label) for label in range(len(CLASSES))]
    for name, total in zip(CLASSES, totals, strict=True):
        if total < max(totals):
            run.tell(
                f"The classes are not balanced: {name} has {total:,} rows an epoch and another class {max(totals):,}, as no "
                f"row stands there more than {run.options.max_repeats} times (max_repeats)."
            )
    return counts


def _of_class(counts: Counts, label: int) -> int:
    return sum(count for (_, of), count in counts.items() if of == label)


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


def _base_network(run: _Run, base: str) -> tuple[Any, Any]:
    """The tokenizer and the network of a base, its labels in the order of CLASSES; tells what of it is new."""
    try:
        source = str(folder_of(base, None) or base)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config._attn_implementation = None  # what config.json chooses may be code of the hub
        names = [str(config.id2label.get(number)).strip() for number in range(len(config.id2label))]
        for name, value in _labels().items():
            setattr(config, name, value)
        network, loading = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # noqa: BLE001 - transformers, safetensors and tokenizers raise what they like
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ValueError(f"--base {base} cannot be loaded as a sequence-classification checkpoint: {reason}") from None
    if tokenizer.pad_token_id is None:
        raise ValueError(f"--base {base} has no padding token; take a checkpoint of the BERT kind")
    new = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    _match_head(run, network, names, new)
    broken = _not_finite(network)
    if broken:
        raise ValueError(f"--base {base} has weights that are no finite numbers ({broken}); take another checkpoint")
    return tokenizer, network


def _match_head(run: _Run, network: Any, names: list[str], new: set[str]) -> None:
    """The head's rows in the order of CLASSES, by the names that they had; new where it was one of other labels."""
    heads = [(name, part) for name, part in network.named_modules() if _is_head(part)]
    if not heads:
        raise ValueError("the base's head is of a kind that is not known here; take another --base")
    name, head = heads[-1]  # the body is defined before it
    if f"{name}.weight" not in new:
        lowered = [label.lower() for label in names]
        if sorted(lowered) == sorted(CLASSES):
            order = [lowered.index(label) for label in CLASSES]
            for weights in head.parameters():
                weights.data = weights.data[order]
        else:
            head.reset_parameters()
            new |= {f"{name}.{part}" for part, _ in head.named_parameters()}
    if new:
        had = ", ".join(repr(label[:40]) for label in names[:5]) + (", …" if len(names) > 5 else "")
        weights = ", ".join(sorted(new)[:5]) + (", …" if len(new) > 5 else "")
        run.tell(f"The base has the labels {had}; made new, and not taken from it: {weights}.")


def _is_head(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and part.out_features == len(CLASSES)


def _not_finite(network: Any) -> str | None:
    """The name of a weight that is no finite number."""
    return next((name for name, weight in network.named_parameters() if not weight.isfinite().all()), None)


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
    parameters: Sequence[Tensor],
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], Tensor],
    rate: float,
    stage: str,
    stepped: Callable[[int], None] = lambda done: None,
) -> None:
    """AdamW over `batches` with a linear warm-up (a tenth) and decay; `stepped(number)` after each step. Diverged."""
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
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(
                f"the training diverged: at step {number + 1} of {len(batches)} ({stage}) the loss is no finite number; "
                f"take a lower learning rate (its peak was {rate:g}); nothing was written"
            )
        stepped(number + 1)
        run.report(Progress(stage, number + 1, len(batches), f"loss {value:.3f}"))


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

    _optimise(run, parameters, batches, loss_of, options.pretrain_learning_rate, "masked tokens")
    network.bert.load_state_dict(body.state_dict(), strict=False)


def _corrupted(ids: Tensor, hidden: Tensor, tokenizer: Any) -> Tensor:
    """`ids` where of the hidden tokens 80 % are [MASK], 10 % another token, 10 % themselves (Devlin et al., 2019)."""
    draw = torch.rand(ids.shape, device=ids.device)
    other = torch.randint(len(SPECIAL_TOKENS), len(tokenizer), ids.shape, device=ids.device)
    masked = torch.where(hidden & (draw < 0.8), tokenizer.mask_token_id, ids)
    return torch.where(hidden & (draw >= 0.9), other, masked)


def _fine_tune(run: _Run, tokenizer: Any, network: Any, examples: list[Example], counts: Counts) -> bool:
    """Train `network` to classify, in place; what remains is the running mean of its weights.

    Whether it was interrupted. KeyboardInterrupt where that was before the first step had ended.
    """
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
    batches = [batch for _ in range(options.epochs) for batch in _drawn_batches(run, rows, examples, counts)]
    mean = _Mean(list(network.parameters()), options.averaging)
    try:
        _optimise(run, mean.parameters, batches, loss_of, rate, "fine-tuning", mean.add)
    except KeyboardInterrupt:
        if not mean.steps:
            raise
        if mean.steps < len(batches):
            run.tell(
                f"Fine-tuning was interrupted after {mean.steps} of {len(batches)} steps; the weights so far are kept."
            )
    mean.take_over()
    return mean.steps < len(batches)


def _drawn_batches(run: _Run, rows: list[list[int]], examples: list[Example], counts: Counts) -> list[Batch]:
    """One epoch's batches of balanced rows, drawn anew."""
    drawn = draw(examples, counts, run.rng)
    batches = _shuffled_batches([len(rows[place]) for place in drawn], run.options.batch_texts, run.rng)
    return [[drawn[at] for at in batch] for batch in batches]


class _Mean:
    """The running mean of weights after each of so many `steps`."""

    def __init__(self, parameters: list[Tensor], decay: float) -> None:
        self.parameters = parameters
        self.steps = 0
        self._decay = decay
        self._values = [parameter.detach().clone() for parameter in parameters]

    def add(self, step: int) -> None:
        with torch.no_grad():
            # Early on the mean forgets fast, so that the untrained start leaves no trace.
            torch._foreach_lerp_(self._values, self.parameters, 1 - min(self._decay, step / (step + 10)))
        self.steps = step

    def take_over(self) -> None:
        """Puts the mean in the weights' place."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self._values, strict=True):
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
    network.to(getattr(torch, options.storage))
    broken = _not_finite(network)
    if broken:
        raise Diverged(
            f"the training diverged: {broken} holds what is no finite number in {options.storage}; take a lower "
            f"learning rate{', or --storage float32' if options.storage == 'float16' else ''}; nothing was written"
        )
    (options.output / "README.md").unlink(missing_ok=True)  # it may be the card of another
    network.save_pretrained(options.output)
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
                if not logits.isfinite().all():
                    raise FloatingPointError
                for place, best in zip(places, logits.argmax(-1).tolist(), strict=True):
                    labels[place] = network.config.id2label[best]
                run.report(Progress("measuring", min(start + size, len(order)), len(order)))
        return labels

    return predict


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


def model_card(
    run: _Run,
    sources: Sequence[LabelledFile],
    result: Result,
    training: Sequence[Example],
    counts: Counts,
    network: Any,
) -> str:
    """The README.md beside the weights: what it is, its table, its data, its recipe, its limits. Markdown."""
    options = run.options
    measured = "development rows (byte 26 to 51, not trained on)" if options.development else "held-out rows"
    is_exact = options.rows_held_out_by(options.base) == "exact"
    text = "text" if is_exact else "text (lower case, е for ё, no stress marks, single spaces)"
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

A row is held out where the SHA-256 of its {text} ends in a byte below
26: no vocabulary, weight or choice comes from it. Macro F1 on the {result.report.overall.sum():,} {measured}:

{result.report.markdown()}

The other rows were drawn anew for each epoch, up- and downsampled towards as many of each class, and of each source in a
class, as there are, and no row more than {options.max_repeats} times. What there is → what an epoch has:

{_data_table(sources, training, counts)}

{chr(10).join(run.notes)}

Seed {options.seed}, {result.seconds / 60:.0f} minutes on {options.threads or "all"} threads. {_recipe(options)}

    {command(options, sources)}

## Limits

Only texts like those it was trained on are judged as well as the table says. Texts longer than {options.max_tokens}
tokens were cut in training. Nothing was done about bias in the data.
"""


def _data_table(sources: Sequence[LabelledFile], training: Sequence[Example], counts: Counts) -> str:
    """How many rows of each source and class there are, and how many of them an epoch has."""
    there = Counter((example.source, example.label) for example in training)
    data = ["| Source | Training rows | " + " | ".join(CLASSES) + " |", "| --- | --- | --- | --- | --- |"]
    for source in sources:
        cells = [(source.name, label) for label in range(len(CLASSES))]
        pairs = [(there[cell], counts.get(cell, 0)) for cell in cells]
        pairs.insert(0, (sum(before for before, _ in pairs), sum(after for _, after in pairs)))
        data.append(f"| {source.name} | " + " | ".join(f"{before} → {after}" for before, after in pairs) + " |")
    return "\n".join(data)


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
