"""A loaded checkpoint, for Python programs and for the worker: texts → token ids → logits → sentiments.

Every public function here blocks, and none may be called from an event loop. Several threads may call a model at once.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from worker.core.batching import ANY_PADDING, TokenIds, cut_by_length
from worker.core.sentiment import (
    Activation,
    Floats,
    LabelSet,
    Sentiment,
    sentiments_of,
    to_labels,
    to_probabilities,
    to_scores,
)
from worker.core.windows import Windowing
from worker.model.autotune import BATCH_TEXTS, BATCH_TUNING_S, CUDA_BATCH_TEXTS, TUNING_S, measure_batches
from worker.model.checkpoint import Checkpoint
from worker.model.device import device_of, unused_device_warning
from worker.model.labels import LabelOptions, checkpoint_labels
from worker.model.library_errors import as_model_error
from worker.model.loading import load_model, open_checkpoint
from worker.model.reviews import read_reviews
from worker.model.runner import CudaPass, PreparedRunner, RunnerOptions
from worker.model.tokenizer import CheckpointTokenizer, Ids, choose_encode, with_normalization
from worker.model.tokenizer_checks import unknown_words_warning
from worker.model.truncation import SURROGATES, TokenizedTexts, TruncatingTokenizer, max_tokens_of
from worker.runtime.threads import parallel_map
from worker.settings.shared import DEFAULT_MODEL, MAX_WINDOWS

log = logging.getLogger(__name__)

ReturnType = Literal["label", "score", "proba"]
Normalize = Literal["nfc", "none"]
LongText = Literal["truncate", "windows"]


class ScoredText(NamedTuple):
    """The sentiment of a text; whether a part of it was left out; the number of its windows, None where it was truncated.

    The sentiment is None where a logit is not finite, and for a text with a lone surrogate.
    """

    sentiment: Sentiment | None
    truncated: bool
    windows: int | None


class SentimentModel:
    """A loaded checkpoint.

    ``name``: as in results, ``name@revision``, and ``revision`` the second of these, with the settings that change results
    and are not at their default. ``labels``: their names, and how logits become results. ``max_tokens``: of a text in one
    pass. ``windowing``: splits longer texts; None where they are cut. ``max_batch_tokens``: of one pass, padding included.
    ``max_batch_texts``: of a worker's micro-batch; the worker sets it. ``passes``: how many threads should call ``logits``
    at once to be fastest. ``widths`` and ``pass_tokens``: as for PassRunner. ``cuda_pass``: how passes are computed as
    of now, ``padded`` or ``unpadded``. ``warning``: a warning about a checkpoint that can be used; None if there is none.
    """

    def __init__(
        self,
        *,
        checkpoint_name: str,
        revision: str,
        tokenizer: TruncatingTokenizer,
        windowing: Windowing | None,
        runner: PreparedRunner,
        device: str,
        columns: Sequence[int],
        labels: LabelSet,
        warning: str | None,
        load_arguments: Mapping[str, Any],
    ) -> None:
        self.name = f"{checkpoint_name}@{revision}"
        self.revision = revision
        self.warning = warning
        self.labels = labels
        self.device = device
        self.backend = runner.backend
        self.dtype = runner.dtype
        self.passes = runner.passes
        self.max_batch_tokens = runner.max_batch_tokens
        self.max_batch_texts = BATCH_TEXTS
        self.max_tokens = windowing.max_tokens if windowing else tokenizer.max_tokens
        self.windowing = windowing
        self._tokenizer = tokenizer
        self._run = runner.run
        self._memory_bytes = runner.memory_bytes
        self._columns = list(columns)
        self._load_arguments = load_arguments

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the arguments of ``load``, and the commit if the model is the hub's: unpickling loads it again."""
        return partial(SentimentModel.load, **self._load_arguments), ()

    @property
    def widths(self) -> Sequence[int]:
        return self._run.widths

    @property
    def pass_tokens(self) -> int:
        return self._run.pass_tokens

    @property
    def cuda_pass(self) -> CudaPass:
        return "unpadded" if self.pass_tokens == ANY_PADDING else "padded"

    @classmethod
    def load(
        cls,
        name_or_path: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        model_labels: Mapping[str, str] | None = None,
        label_scores: Mapping[str, float] | None = None,
        activation: Activation | Literal["auto"] = "auto",
        threshold: float | None = None,
        normalize: Normalize = "nfc",
        long_text: LongText = "truncate",
        max_windows: int = MAX_WINDOWS,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        cpu_threads: int | Literal["auto"] = "auto",
        max_batch_tokens: int | Literal["auto"] = "auto",
        tuning_s: float = TUNING_S,
        cuda_pass: CudaPass = "padded",
    ) -> "SentimentModel":
        """Loads a checkpoint from a folder, the hub (its cache first if offline), or the ``builtin`` one.

        Never runs a checkpoint's own code: not its Python, and of a ``.bin`` it reads only the tensors. On a CPU, torch is
        imported only for what ONNX Runtime cannot compute. Raises ModelError, and BackendError where this checkpoint or
        machine cannot do what ``backend`` or ``dtype`` ask for.

        name_or_path: a folder, with ``/``, ``./``, ``../`` or ``~`` in front; ``builtin``; any other name is of the hub
        revision: the hub's branch, tag or commit; None is its newest
        model_labels: other names for labels of the checkpoint, by their own
        label_scores: the weights by which probabilities add up to the score, by label (0 for one that is not there); None is
            -1, 0, 1 for negative, neutral, positive, and no score for other labels
        activation: logits → probabilities: ``sigmoid`` or ``softmax``; ``auto`` is sigmoid for the card's labels, as the
            card does, else by the checkpoint's ``problem_type``
        threshold: results also list the labels with this probability or more
        normalize: ``nfc`` drops stress marks and composes letters before a text is tokenized; ``none`` leaves it
        long_text: what becomes of a text longer than the model's maximum: ``truncate`` scores its beginning; ``windows``
            scores all of it, in windows that overlap, and averages their probabilities
        max_windows: of a text at most, with ``windows``; what is behind them is left out
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` is cuda where there is a GPU and torch, else cpu
        dtype: ``float32``, ``bfloat16``, ``float16``, on a CPU ``int8``; ``auto`` is float32 on a CPU, and on a GPU
            float16 where labels agree
        backend: what computes on a CPU: ``onnx`` or ``torch``; ``auto`` is torch only for what ONNX Runtime cannot compute
        cpu_threads: how many passes of the model run at once on a CPU, each on a thread; ``auto`` measures
        max_batch_tokens: tokens of a pass, padding included; ``auto`` measures
        tuning_s: seconds that measuring may take in all, where ``cpu_threads`` or ``max_batch_tokens`` is ``auto``
        cuda_pass: on a GPU ``padded``; ``unpadded`` where that is possible and the logits agree; ``auto``: unpadded where it
            is faster, too
        """
        load_arguments = {key: value for key, value in locals().items() if key not in ("cls", "__class__")}
        where = device_of(device)
        checkpoint = open_checkpoint(name_or_path, revision)
        options_of_labels = LabelOptions(model_labels or {}, label_scores, activation, threshold)
        labels, columns, non_default = checkpoint_labels(name_or_path, checkpoint.config, options_of_labels)
        with as_model_error(name_or_path, "loaded"):
            loaded = load_model(checkpoint, device=where, dtype=dtype, backend=backend)
        tokenizer, windowing, examples, warning = _prepare_tokenizer(
            checkpoint, loaded.tokenizer, normalize, max_windows if long_text == "windows" else None
        )
        max_tokens = windowing.max_tokens if windowing else tokenizer.max_tokens
        options = RunnerOptions(
            columns,
            examples,
            max_tokens,
            tokenizer.padding,
            cpu_threads,
            max_batch_tokens,
            tuning_s,
            cuda_pass,
        )
        warnings = [each for each in (unused_device_warning(device), warning) if each]
        for each in warnings:
            log.warning("%s", each)
        return cls(
            checkpoint_name=name_or_path,
            revision=checkpoint.identity() + non_default + _non_default(normalize, long_text, max_windows),
            tokenizer=tokenizer,
            windowing=windowing,
            runner=loaded.prepare_runner(options),
            device=where,
            columns=columns,
            labels=labels,
            warning="; ".join(warnings) or None,
            load_arguments=load_arguments | {"revision": checkpoint.commit},
        )

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Token ids of N texts, each at most ``max_tokens``, or as many as its windows hold.

        Only as much of a long text is tokenized as fills them.
        """
        return self._tokenizer(texts)

    def pieces(self, ids: Sequence[TokenIds]) -> Sequence[TokenIds]:
        """What ``batch_logits`` takes of N tokenized texts: all their windows, or where texts are truncated the texts."""
        return self.windowing.split(ids).ids if self.windowing else ids

    def count_tokens(self, ids: Sequence[TokenIds]) -> tuple[int, int]:
        """Of N tokenized texts: their tokens without the special ones around each, and the unknown ones among these."""
        return self._tokenizer.count(ids)

    def logits(self, ids: Sequence[TokenIds]) -> NDArray[np.float32]:
        """Logits (N, L), columns as ``labels``, of the token ids of N texts, in one pass of the model.

        Raises what ONNX Runtime or torch raises, torch.OutOfMemoryError among it.
        """
        return self._run(ids)[:, self._columns]

    def batch_logits(self, ids: Sequence[TokenIds]) -> NDArray[np.float32]:
        """Logits (N, L), columns as ``labels``, of the token ids of N texts, in as many passes as the token budget asks for.

        Each has at most ``max_tokens``. Raises what ``logits`` raises.
        """
        logits = np.empty((len(ids), len(self._columns)), dtype=np.float32)
        batches = cut_by_length([len(tokens) for tokens in ids], self.max_batch_tokens, self.pass_tokens, self.widths)
        answers = parallel_map(self.passes, lambda batch: self.logits([ids[index] for index in batch]), batches)
        for batch, answer in zip(batches, answers, strict=True):
            logits[batch] = answer
        return logits

    def batch_seconds(
        self, texts: Sequence[str] | None = None, measuring_s: float = BATCH_TUNING_S
    ) -> dict[int, float]:
        """Seconds that the model takes for a micro-batch, tokenizing left out, by its number of texts.

        Measures with these texts, repeated as needed, or with the shipped reviews. For ``best_batch_texts``.
        """
        ids = self.tokenize(texts or read_reviews()).ids
        ids = ids * -(-max(CUDA_BATCH_TEXTS) // len(ids))
        return measure_batches(lambda count: self.batch_logits(self.pieces(ids[:count])), measuring_s)

    def memory_bytes(self) -> int:
        """Device memory in use, bytes; 0 on a CPU, where it is the process's own."""
        return self._memory_bytes()

    @overload
    def get_sentiment(self, text: str, return_type: Literal["label"] = "label") -> str | None: ...  # type: ignore[overload-overlap]
    @overload
    def get_sentiment(self, text: str, return_type: Literal["score"]) -> float: ...  # type: ignore[overload-overlap]
    @overload
    def get_sentiment(self, text: Collection[str], return_type: Literal["label"] = "label") -> list[str | None]: ...
    @overload
    def get_sentiment(self, text: Collection[str], return_type: Literal["score"]) -> list[float]: ...
    @overload
    def get_sentiment(self, text: Collection[str], return_type: Literal["proba"]) -> Floats: ...

    def get_sentiment(
        self, text: str | Collection[str], return_type: ReturnType = "label"
    ) -> str | float | list[str | None] | list[float] | Floats | None:
        """The model card's function: the label, the score, or the probabilities in the order of ``labels``, of a text.

        For a sequence of N texts (a list, an array, a column) a list of N, or an N x L array for ``proba``. A text with a
        lone surrogate is no Unicode and has no answer: its label is None, its score and its probabilities are NaN.

        Raises ValueError for another ``return_type``, or for a score where the labels have no weights; TypeError for what
        is neither a string nor a sequence of strings; FloatingPointError where a logit of the model is not finite.
        """
        if return_type not in ("label", "score", "proba"):
            raise ValueError(f"return_type is {return_type!r}; it should be label, score or proba")
        weights = self.labels.weights
        if return_type == "score" and weights is None:
            raise ValueError("the model's labels have no weights, so that there is no score; load it with label_scores")
        probabilities = self._probabilities([text] if isinstance(text, str) else _texts(text))
        if return_type == "proba":
            return probabilities[0] if isinstance(text, str) else probabilities
        answers: list[str | None] | list[float] = to_labels(probabilities, self.labels.names)
        if return_type == "score":
            answers = to_scores(probabilities, weights or ()).tolist()
        return answers[0] if isinstance(text, str) else answers

    def score(self, texts: Sequence[str]) -> list[ScoredText]:
        """Each of N texts scored."""
        places, ids, cut = self._tokenized(texts)
        probabilities = self._probabilities_of(ids)
        finite = ~np.isnan(probabilities[:, 0])
        sentiments = iter(sentiments_of(probabilities[finite], self.labels))
        scored = [ScoredText(None, False, None)] * len(texts)
        for place, tokens, is_finite, is_cut in zip(places, ids, finite.tolist(), cut, strict=True):
            windows = self.windowing.count(tokens) if self.windowing else None
            scored[place] = ScoredText(next(sentiments) if is_finite else None, is_cut, windows)
        return scored

    def _probabilities(self, texts: Sequence[str]) -> Floats:
        """Probabilities (N, L) of N texts; NaN for a text that cannot be tokenized."""
        places, ids, _ = self._tokenized(texts)
        probabilities = np.full((len(texts), len(self._columns)), np.nan)
        probabilities[places] = self._probabilities_of(ids)
        if not np.isfinite(probabilities[places]).all():
            raise FloatingPointError("the model answered with a logit that is not finite")
        return probabilities

    def _tokenized(self, texts: Sequence[str]) -> tuple[list[int], list[Ids], list[bool]]:
        """Places of the texts that can be tokenized, with the token ids of each, and whether it was cut."""
        places = [place for place, text in enumerate(texts) if not SURROGATES.search(text)]
        return places, *self.tokenize([texts[place] for place in places])

    def _probabilities_of(self, ids: Sequence[TokenIds]) -> Floats:
        """Probabilities (N, L) of the token ids of N texts; all NaN for a text with a logit that is not finite."""
        windowed = self.windowing.split(ids) if self.windowing else None
        logits = self.batch_logits(windowed.ids if windowed else ids)
        logits[~np.isfinite(logits).all(axis=-1)] = np.nan  # an activation would make a number of infinity
        probabilities = to_probabilities(logits, self.labels.activation)
        return windowed.combined(probabilities) if windowed else probabilities


def _prepare_tokenizer(
    checkpoint: Checkpoint, tokenizer: CheckpointTokenizer, normalize: Normalize, max_windows: int | None
) -> tuple[TruncatingTokenizer, Windowing | None, list[Ids], str | None]:
    """The tokenizer, what splits its texts into windows, the token ids of the shipped reviews, and a warning or None.

    The warning is about a tokenizer that hardly knows the words of these reviews. Raises ModelError where the tokenizer
    cannot be used. ``max_windows``: None where long texts are truncated.
    """
    name = checkpoint.name
    with as_model_error(name, "used"):
        max_tokens = max_tokens_of(name, tokenizer, checkpoint.config)
        encode = choose_encode(tokenizer)
        examples = encode(read_reviews(), max_tokens)
        warning = unknown_words_warning(name, tokenizer, examples)
    if normalize == "nfc":
        encode = with_normalization(encode)
    windowing, closing = None, tokenizer.closing
    if max_windows is not None:
        opening = tokenizer.shortest - closing
        windowing = Windowing(max_tokens=max_tokens, opening=opening, closing=closing, max_windows=max_windows)
        max_tokens = windowing.max_text_tokens
    truncating = TruncatingTokenizer(
        encode,
        max_tokens=max_tokens,
        padding=tokenizer.padding or 0,
        closing=closing,
        special=tokenizer.shortest,
        unknown=tokenizer.unknown,
    )
    return truncating, windowing, examples, warning


def _non_default(normalize: Normalize, long_text: LongText, max_windows: int) -> str:
    """The settings of texts that change results and are not at their default, as they stand in the model's name."""
    given = {
        "normalize": (normalize, "nfc"),
        "long_text": (long_text, "truncate"),
        "max_windows": (max_windows if long_text == "windows" else MAX_WINDOWS, MAX_WINDOWS),
    }
    return "".join(f"+{name}={value}" for name, (value, default) in given.items() if value != default)


def _texts(given: Collection[str]) -> list[str]:
    """The strings of any kind of sequence. Raises TypeError, with the place of an item that is no string."""
    wanted = "get_sentiment takes a string or a sequence of strings"
    is_sequence = all(hasattr(given, name) for name in ("__len__", "__iter__", "__getitem__"))
    if not is_sequence or isinstance(given, bytes | bytearray | memoryview | Mapping):
        raise TypeError(f"{wanted}, and this is of type {type(given).__name__}")
    if getattr(given, "ndim", 1) != 1:  # a table's items are the names of its columns
        raise TypeError(f"{wanted}, and this is of type {type(given).__name__}, of {given.ndim} dimensions")  # type: ignore[attr-defined]
    texts = list(given)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{wanted}, and item {place}, counted from 0, is of type {type(text).__name__}")
    return texts
