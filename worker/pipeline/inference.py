"""The threads that own tokenizer and network, and the only door to them.

One thread tokenizes, one runs the network, so that the next micro-batch is tokenized while this one is in the network. The
network's thread has others run passes side by side, one device batch each: ``cpu_threads`` on a CPU, two on a GPU.
What fails is told apart here: a poison text, memory that does not suffice, a device that is lost, a call that hangs.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from worker.core.batching import TokenIds, cut_by_length
from worker.core.sentiment import LABELS, Activation, Sentiment, to_sentiments
from worker.pipeline.result_cache import ResultCache, text_digest
from worker.runtime.loop_budget import TurnBudget
from worker.runtime.threads import Thread, side_by_side
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

KNOWN_GOOD = "Хорошо, спасибо."
TOO_MANY = 8  # texts of one micro-batch that cannot all be poison
MEMORY_PATIENCE_S = (0.1, 0.5, 1, 2)  # for a neighbour on the same device to give memory back
WARM_UP_LENGTHS = (4, 32, 128, 512)

Answer = TypeVar("Answer")


class Tokens(Protocol):
    ids: list[TokenIds]
    truncated: list[bool]


class Model(Protocol):
    """What is needed of a loaded model; SentimentModel fits. Its methods block."""

    name: str
    activation: Activation
    max_batch_tokens: int
    max_tokens: int
    passes: int
    widths: Sequence[int]
    pass_tokens: int

    def tokenize(self, texts: Sequence[str], /) -> Any: ...
    def logits(self, ids: Sequence[TokenIds], /) -> NDArray[np.float32]: ...
    def memory_bytes(self) -> int: ...


class InferenceLost(Exception):
    """Inference hangs, or its device is gone; this process cannot mend it."""


@dataclass(slots=True)
class Job:
    """N texts on their way through inference: tokenized once, scored once. Hits of the cache need neither.

    Once it is scored, ``answers`` has a sentiment for each text that could be scored, the reason for each that could not,
    in order; and ``truncated`` whether the text was cut.

    What is told of distinct texts is told of those that the cache does not have, in the order of ``texts``.
    """

    model: Model
    texts: list[str]  # the distinct ones
    places: list[int]  # for each text of the job its place among the distinct ones; from the end, among the hits
    digests: list[bytes] = field(default_factory=list)  # of the distinct texts, where there is a cache
    hits: list[tuple[Sentiment, bool]] = field(default_factory=list)
    ids: list[TokenIds] = field(default_factory=list)
    cuts: list[bool] = field(default_factory=list)
    failures: list[str | None] = field(default_factory=list)
    answers: list[Sentiment | str] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)

    def tell(self, answers: Sequence[Sentiment | str]) -> None:
        """Fills in what is known of the distinct texts and of the hits."""
        known = [*answers, *(sentiment for sentiment, _ in self.hits)]
        cuts = [*self.cuts, *(is_cut for _, is_cut in self.hits)]
        self.answers = [known[place] for place in self.places]
        self.truncated = [cuts[place] for place in self.places]


class Inference:
    """Scores texts with one model. Use it from one event loop; nothing here blocks that loop.

    ``timeout_s``: a call to tokenizer or network that takes longer hangs (for the network: one device batch).
    ``turn_budget`` is for the other stages to share.
    """

    def __init__(self, metrics: Metrics, *, timeout_s: float = 60, cache_size: int = 0) -> None:
        self.turn_budget = TurnBudget()
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._cache_size = cache_size
        self._tokenizer = Thread("tokenizer")
        self._network = Thread("network")
        self._loader = Thread("loader")
        self._model: Model | None = None
        self._cache = ResultCache(0)
        self._budget = 0
        self._lost: str | None = None  # why
        self._awaited: set[asyncio.Future[Any]] = set()

    @property
    def model(self) -> Model:
        """The loaded model. Raises RuntimeError before ``load`` has ended."""
        if self._model is None:
            raise RuntimeError("no model is loaded yet")
        return self._model

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    async def load(self, loader: Callable[[], Model]) -> Model:
        """Loads a model on the thread that will own it and warms it up. Raises what the loader raises.

        Loading may take as long as it takes: no time limit watches over it.
        """
        model = await self._network.call(loader)
        self._budget = model.max_batch_tokens
        await self._network.call(self._warm_up, model)
        self._model, self._cache = model, ResultCache(self._cache_size)
        self._metrics.inference_succeeded(time.time(), model.memory_bytes())
        return model

    async def reload(self, loader: Callable[[], Model]) -> Model:
        """Loads a model beside the one in use, warms it up, and puts it in its place between two jobs.

        Loading has a thread of its own, and scoring goes on. A job that has begun ends with the model that it began with.
        Raises what the loader or the new model raises, ValueError for one whose numbers are none; the old one then stays.
        """
        model = await self._loader.call(lambda: _warmed(loader()))
        self._budget = model.max_batch_tokens
        self._model, self._cache = model, ResultCache(self._cache_size)
        return model

    def why_not_alive(self) -> str | None:
        """Why inference is not alive, or None if it is. Answers at once."""
        if self._lost:
            return self._lost
        for thread, what in ((self._tokenizer, "the tokenizer"), (self._network, "the network")):
            since = thread.busy_since
            if self._model is not None and since is not None and time.monotonic() - since > self._timeout_s:
                return f"{what} has not answered for more than {self._timeout_s:g} s"
        return None

    async def watch(self) -> None:
        """Looks after the threads until cancelled; from then on, calls that wait raise InferenceLost once one hangs."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout_s / 4))
            why = self.why_not_alive()
            if why:
                self._lose(why)

    async def tokenize(self, texts: Sequence[str]) -> Job:
        """Begins a job: looks N texts up in the cache and tokenizes the others. Raises InferenceLost."""
        job = await self._looked_up(texts)
        started = time.monotonic()
        tokens = await self._unless_lost(self._tokenizer, self._tokenize, job.model, job.texts)
        self._metrics.stage_seconds["tokenize"].observe(time.monotonic() - started)
        job.ids, job.cuts, job.failures = tokens
        return job

    async def score(self, job: Job) -> Job:
        """Ends a job: fills its answers. Raises InferenceLost where the device does not answer as it should."""
        waiting: Sequence[int] = range(len(job.ids))
        if any(job.failures):
            waiting = [place for place in waiting if job.failures[place] is None]
        started = time.monotonic()
        answers = await self._unless_lost(self._network, self._score, job.model, [job.ids[place] for place in waiting])
        if waiting:
            self._metrics.stage_seconds["forward"].observe(time.monotonic() - started)
            self._metrics.inference_succeeded(time.time(), job.model.memory_bytes())
        if job.digests and job.model is self._model:
            for place, answer in zip(waiting, answers, strict=True):
                if isinstance(answer, Sentiment):
                    self._cache.put(job.digests[place], answer, job.cuts[place])
        if len(waiting) < len(job.failures):
            scored = iter(answers)
            answers = [next(scored) if failure is None else failure for failure in job.failures]
        job.tell(answers)
        return job

    async def _looked_up(self, texts: Sequence[str]) -> Job:
        if self._cache.is_off:
            distinct: dict[str, int] = {}
            places = [distinct.setdefault(text, len(distinct)) for text in texts]
            return Job(self.model, list(distinct), places)
        job, cache = Job(self.model, [], []), self._cache  # of one and the same model
        firsts: dict[bytes, int] = {}
        async for some in self.turn_budget.slices(texts):
            for text in some:
                digest = text_digest(text)
                entry = cache.get(digest)
                if entry:
                    job.hits.append(entry)
                    job.places.append(-len(job.hits))
                elif digest in firsts:
                    job.places.append(firsts[digest])
                else:
                    firsts[digest] = len(job.texts)
                    job.places.append(len(job.texts))
                    job.texts.append(text)
        job.hits.reverse()  # a place that counts from the end is the same one then, however many are before the hits
        job.digests = list(firsts)
        self._metrics.cache_hits.inc(len(texts) - len(job.texts))
        return job

    async def _unless_lost(self, thread: Thread, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """What a thread answers; InferenceLost as soon as inference is lost, whether or not it answers."""
        if self._lost:
            raise InferenceLost(self._lost)
        answer = thread.call(function, *arguments)
        self._awaited.add(answer)
        try:
            return await answer
        except InferenceLost as error:
            self._lose(str(error))
            raise
        finally:
            self._awaited.discard(answer)

    def _lose(self, why: str) -> None:
        if self._lost is None:
            self._lost = why
            for answer in self._awaited:
                if not answer.done():
                    answer.set_exception(InferenceLost(why))

    # Below: on the threads.

    def _warm_up(self, model: Model) -> None:
        text = (KNOWN_GOOD + " ") * max(WARM_UP_LENGTHS)
        ids = model.tokenize([text]).ids[0]
        for length in WARM_UP_LENGTHS:
            self._score(model, [ids[:length]] * max(1, min(16, self._budget // length)))
        if not self._is_well(model):
            raise InferenceLost("the model does not answer a known-good text with finite numbers")

    def _tokenize(self, model: Model, texts: list[str]) -> tuple[list[TokenIds], list[bool], list[str | None]]:
        try:
            tokens = model.tokenize(texts)
            return tokens.ids, tokens.truncated, [None] * len(texts)
        except Exception as error:  # noqa: BLE001 - one text's fault must not be the others'
            self._tokenizer.restart_clock()
            if len(texts) > 1:
                half = len(texts) // 2
                first, second = self._tokenize(model, texts[:half]), self._tokenize(model, texts[half:])
                return first[0] + second[0], first[1] + second[1], first[2] + second[2]
            try:
                model.tokenize([KNOWN_GOOD])
            except Exception as worse:
                raise InferenceLost(f"the tokenizer fails on a known-good text: {_name(worse)}") from worse
            return [[]], [False], [f"the tokenizer failed: {_name(error)}"]

    def _score(self, model: Model, ids: list[TokenIds]) -> list[Sentiment | str]:
        """Answers for N token lists, by device batches within the budget."""
        answers: list[Sentiment | str] = [""] * len(ids)
        batches = cut_by_length([len(tokens) for tokens in ids], self._budget, model.pass_tokens, model.widths)
        scored = side_by_side(model.passes, lambda batch: self._score_batch(model, [ids[i] for i in batch]), batches)
        for batch, of_batch in zip(batches, scored, strict=True):
            for index, answer in zip(batch, of_batch, strict=True):
                answers[index] = answer
        if len(ids) >= TOO_MANY and not any(isinstance(answer, Sentiment) for answer in answers):
            raise InferenceLost(f"all {len(ids)} texts of a micro-batch fail, together and one by one")
        return answers

    def _score_batch(self, model: Model, ids: list[TokenIds]) -> list[Sentiment | str]:
        self._network.restart_clock()
        try:
            logits = model.logits(ids)
            if logits.shape != (len(ids), len(LABELS)):
                raise ValueError(f"logits of shape {logits.shape}")
            sentiments = to_sentiments(logits, model.activation)
        except Exception as error:  # noqa: BLE001 - torch raises what it likes
            if is_out_of_memory(error):
                return self._score_with_less_memory(model, ids)
            return self._isolate(model, ids, f"the network failed: {_name(error)}")
        if self._model is not None:  # not while warming up
            self._metrics.device_batch([len(tokens) for tokens in ids])
        if None not in sentiments:
            return cast("list[Sentiment | str]", sentiments)
        answers: list[Sentiment | str] = []
        for tokens, sentiment in zip(ids, sentiments, strict=True):
            answers.extend([sentiment] if sentiment else self._doubt(model, tokens, alone=len(ids) == 1))
        return answers

    def _doubt(self, model: Model, tokens: TokenIds, *, alone: bool) -> list[Sentiment | str]:
        """A text with a logit that is not finite: once more alone, before it is called poison."""
        if not alone:
            return self._score_batch(model, [tokens])
        return self._isolate(model, [tokens], "a logit is not finite")

    def _isolate(self, model: Model, ids: list[TokenIds], why: str) -> list[Sentiment | str]:
        """Halves a failed device batch until the poison text is found; a device that fails a good text too is lost."""
        if not self._is_well(model):
            raise InferenceLost(f"{why}, and a known-good text fails too")
        if len(ids) == 1:
            return [why]
        half = len(ids) // 2
        return self._score_batch(model, ids[:half]) + self._score_batch(model, ids[half:])

    def _score_with_less_memory(self, model: Model, ids: list[TokenIds]) -> list[Sentiment | str]:
        free_memory()
        if len(ids) == 1:
            return self._wait_for_memory(model, ids)
        longest = max(len(tokens) for tokens in ids)
        self._budget = min(self._budget, max(longest, len(ids) * longest // 2))
        log.warning("out of memory: the token budget is %d from now on", self._budget)
        half = len(ids) // 2
        return self._score_batch(model, ids[:half]) + self._score_batch(model, ids[half:])

    def _wait_for_memory(self, model: Model, ids: list[TokenIds]) -> list[Sentiment | str]:
        """One text that is out of memory is no poison: any other of its length would be, too."""
        for seconds in MEMORY_PATIENCE_S:
            time.sleep(seconds)
            self._network.restart_clock()
            free_memory()
            try:
                model.logits(ids)
            except Exception as error:  # noqa: BLE001 - torch raises what it likes
                if is_out_of_memory(error):
                    continue
            return self._score_batch(model, ids)
        raise InferenceLost(f"out of memory for a single text of {len(ids[0])} tokens")

    def _is_well(self, model: Model) -> bool:
        self._network.restart_clock()
        try:
            logits = model.logits(model.tokenize([KNOWN_GOOD]).ids)
        except Exception:  # noqa: BLE001 - that is the answer
            return False
        return logits.shape == (1, len(LABELS)) and bool(np.isfinite(logits).all())


def _warmed(model: Model) -> Model:
    """On the loader's thread, beside a network that is at work: so without that one's clock and memory budget."""
    ids = model.tokenize([(KNOWN_GOOD + " ") * max(WARM_UP_LENGTHS)]).ids[0]
    for length in WARM_UP_LENGTHS:
        model.logits([ids[:length]] * max(1, min(16, model.max_batch_tokens // length)))
    logits = model.logits(model.tokenize([KNOWN_GOOD]).ids)
    if logits.shape != (1, len(LABELS)) or not np.isfinite(logits).all():
        raise ValueError("the model does not answer a known-good text with finite numbers")
    return model


def _name(error: BaseException) -> str:
    """The error's kind: its words may hold the text that caused it."""
    return type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    )


def free_memory() -> None:
    torch = sys.modules.get("torch")  # a model without torch has nothing to free, and no memory to load it either
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
