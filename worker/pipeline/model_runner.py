"""Calls one model such that a fault costs only the text that causes it. Everything here blocks, on threads of inference.

A fault is one of three: a text that cannot be scored (poison), memory that does not suffice, or a device that is lost. A
text counts as poison only if a known-good text is scored right after it failed.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from worker.core.batching import ANY_PADDING, TokenIds, cut_by_length
from worker.core.sentiment import LabelSet, Sentiment, to_sentiments
from worker.core.windows import Windowing
from worker.runtime.memory import free_device_memory, is_out_of_memory
from worker.runtime.threads import parallel_map
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

KNOWN_GOOD = "Хорошо, спасибо."
TOO_MANY = 8  # texts of one micro-batch that cannot all be poison
MEMORY_PATIENCE_S = (0.1, 0.5, 1, 2)  # waits for another process on the same device to free memory
WARM_UP_LENGTHS = (4, 32, 128, 512)  # tokens

Answer = TypeVar("Answer")


class Model(Protocol):
    """What inference needs of a loaded model; SentimentModel has it. The methods block.

    ``tokenize`` returns for N texts the token ids of each, and whether each was truncated. ``windowing`` splits the ids of
    long texts; None where these are truncated. ``count_tokens`` returns how many tokens N texts have, special ones left
    out, and how many of these are unknown.
    """

    name: str
    labels: LabelSet
    max_batch_tokens: int
    max_tokens: int
    passes: int
    windowing: Windowing | None

    @property
    def widths(self) -> Sequence[int]: ...
    @property
    def pass_tokens(self) -> int: ...
    def tokenize(self, texts: Sequence[str], /) -> tuple[Sequence[TokenIds], Sequence[bool]]: ...
    def count_tokens(self, ids: Sequence[TokenIds], /) -> tuple[int, int]: ...
    def logits(self, ids: Sequence[TokenIds], /) -> NDArray[np.float32]: ...
    def memory_bytes(self) -> int: ...


class FatalInferenceError(Exception):
    """Inference hangs, or its device is lost; only another process can go on. The message says why."""


class ModelRunner:
    """One model, and the token budget of its device batches, which shrinks where memory does not suffice.

    ``tokenize`` and ``score`` may call the tokenizer or the model several times. ``tokenizer_progressed`` and
    ``model_progressed`` are called before every further call, so that each call's time is measured alone.
    """

    def __init__(
        self,
        model: Model,
        metrics: Metrics,
        *,
        tokenizer_progressed: Callable[[], None],
        model_progressed: Callable[[], None],
    ) -> None:
        self.model = model
        self._metrics = metrics
        self._tokenizer_progressed = tokenizer_progressed
        self._model_progressed = model_progressed
        self._budget = model.max_batch_tokens
        self._is_warm = False

    def warm_up(self) -> None:
        """Runs passes of several lengths. Raises FatalInferenceError where a known-good text cannot be scored."""
        self._warm_up(self.score)
        if not self._scores_known_good():
            raise FatalInferenceError("the model does not answer a known-good text with finite numbers")
        self._is_warm = True

    def warm_up_beside_another(self) -> None:
        """As ``warm_up``, while another model is at work: it neither restarts that one's clock nor waits for its memory.

        Raises what the model raises, ValueError where a known-good text cannot be scored.
        """
        self._warm_up(self.model.logits)
        if not self._is_finite(self._known_good_logits()):
            raise ValueError("the model does not answer a known-good text with finite numbers")
        self._is_warm = True

    def tokenize(self, texts: Sequence[str]) -> tuple[list[TokenIds], list[bool], list[str | None]]:
        """For N texts their token ids, whether each was truncated, and why one could not be tokenized."""
        try:
            ids, are_truncated = self.model.tokenize(texts)
            self._metrics.tokenized(*self.model.count_tokens(ids))
            return list(ids), list(are_truncated), [None] * len(texts)
        except Exception as error:  # noqa: BLE001 - one text's fault must not be the others'
            self._tokenizer_progressed()
            if len(texts) > 1:
                half = len(texts) // 2
                first, second = self.tokenize(texts[:half]), self.tokenize(texts[half:])
                return first[0] + second[0], first[1] + second[1], first[2] + second[2]
            try:
                self.model.tokenize([KNOWN_GOOD])
            except Exception as worse:
                raise FatalInferenceError(f"the tokenizer fails on a known-good text: {_kind(worse)}") from worse
            return [[]], [False], [f"the tokenizer failed: {_kind(error)}"]

    def score(self, ids: Sequence[TokenIds]) -> list[Sentiment | str]:
        """For N token lists a sentiment, or why there is none. Raises FatalInferenceError."""
        windowing = self.model.windowing
        if windowing is None:
            answers = self._score_pieces(ids)
        else:
            windowed = windowing.split(ids)
            answers = windowed.answers(self._score_pieces(windowed.ids), self.model.labels)
        if len(ids) >= TOO_MANY and not any(isinstance(answer, Sentiment) for answer in answers):
            raise FatalInferenceError(f"all {len(ids)} texts of a micro-batch fail, together and one by one")
        return answers

    def _score_pieces(self, ids: Sequence[TokenIds]) -> list[Sentiment | str]:
        """As ``score``, of texts or windows that each fit into a pass."""
        answers: list[Sentiment | str] = [""] * len(ids)
        batches = cut_by_length(list(map(len, ids)), self._budget, self.model.pass_tokens, self.model.widths)
        scored = parallel_map(self.model.passes, lambda batch: self._score_batch([ids[i] for i in batch]), batches)
        for batch, of_batch in zip(batches, scored, strict=True):
            for index, answer in zip(batch, of_batch, strict=True):
                answers[index] = answer
        return answers

    def _warm_up(self, run: Callable[[list[TokenIds]], object]) -> None:
        (ids,), _ = self.model.tokenize([(KNOWN_GOOD + " ") * max(WARM_UP_LENGTHS)])
        for length in (min(most, self.model.max_tokens) for most in WARM_UP_LENGTHS):  # the text may have more windows
            run([ids[:length]] * max(1, min(16, self._budget // length)))

    def _score_batch(self, ids: list[TokenIds]) -> list[Sentiment | str]:
        self._model_progressed()
        try:
            logits = self.model.logits(ids)
            if logits.shape != (len(ids), len(self.model.labels.names)):
                raise ValueError(f"logits of shape {logits.shape}")
            sentiments = to_sentiments(logits, self.model.labels)
        except Exception as error:  # noqa: BLE001 - torch raises what it likes
            if is_out_of_memory(error):
                error.__traceback__ = None  # else its frames keep what the pass has allocated
                return self._score_with_less_memory(ids)
            return self._isolate_poison(ids, f"the model failed: {_kind(error)}")
        if self._is_warm:
            self._metrics.device_batch(list(map(len, ids)), is_padded=self.model.pass_tokens != ANY_PADDING)
        if None not in sentiments:
            return cast("list[Sentiment | str]", sentiments)
        answers: list[Sentiment | str] = []
        for tokens, sentiment in zip(ids, sentiments, strict=True):
            if sentiment:
                answers.append(sentiment)
            elif len(ids) > 1:  # it is scored once more, alone, before it counts as poison
                answers += self._score_batch([tokens])
            else:
                answers += self._isolate_poison(ids, "a logit is not finite")
        return answers

    def _isolate_poison(self, ids: list[TokenIds], why: str) -> list[Sentiment | str]:
        """Halves a failed device batch until the poison text is alone. A device that fails a good text too is lost."""
        if not self._scores_known_good():
            raise FatalInferenceError(f"{why}, and a known-good text fails too")
        return [why] if len(ids) == 1 else self._score_halves(ids)

    def _score_halves(self, ids: list[TokenIds]) -> list[Sentiment | str]:
        half = len(ids) // 2
        return self._score_batch(ids[:half]) + self._score_batch(ids[half:])

    def _score_with_less_memory(self, ids: list[TokenIds]) -> list[Sentiment | str]:
        free_device_memory()
        if len(ids) == 1:
            return self._wait_for_memory(ids)
        longest = max(map(len, ids))
        self._budget = min(self._budget, max(longest, len(ids) * longest // 2))
        log.warning("out of memory: the token budget is %d from now on", self._budget)
        return self._score_halves(ids)

    def _wait_for_memory(self, ids: list[TokenIds]) -> list[Sentiment | str]:
        """Out of memory for a single text, which is no poison: any other text of its length would lack memory, too."""
        for seconds in MEMORY_PATIENCE_S:
            time.sleep(seconds)
            self._model_progressed()
            free_device_memory()
            try:
                self.model.logits(ids)
            except Exception as error:  # noqa: BLE001 - torch raises what it likes
                if is_out_of_memory(error):
                    continue
            return self._score_batch(ids)
        raise FatalInferenceError(f"out of memory for a single text of {len(ids[0])} tokens")

    def _scores_known_good(self) -> bool:
        self._model_progressed()
        try:
            return self._is_finite(self._known_good_logits())
        except Exception:  # noqa: BLE001 - whatever it raises, the answer is no
            return False

    def _known_good_logits(self) -> NDArray[np.float32]:
        return self.model.logits(self.model.tokenize([KNOWN_GOOD])[0])

    def _is_finite(self, logits: NDArray[np.float32]) -> bool:
        """Whether these are the logits of one text, all of them finite."""
        return logits.shape == (1, len(self.model.labels.names)) and bool(np.isfinite(logits).all())


def _kind(error: BaseException) -> str:
    """The error's class alone: its message may hold the text that caused it."""
    return type(error).__name__
