"""Inference as the stages see it: the threads that own tokenizer and model, and whether they are alive.

One thread tokenizes and one runs the model, so that the next micro-batch is tokenized while this one is scored. The model's
thread has others run passes in parallel, one device batch each: ``cpu_threads`` on a CPU, two on a GPU.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from worker.core.batching import TokenIds, TokenLimit
from worker.kafka.reader import FetchedRecord
from worker.pipeline.inference_job import Job, begin_job
from worker.pipeline.model_runner import FatalInferenceError, Model, ModelRunner
from worker.pipeline.result_cache import ResultCache
from worker.runtime.loop_budget import TurnBudget
from worker.runtime.threads import SerialExecutor
from worker.telemetry.metrics import Metrics

Answer = TypeVar("Answer")


class Inference:
    """Scores texts with one model. Use it from one event loop; nothing here blocks that loop.

    A call to the tokenizer, or a pass of the model over one device batch, that takes longer than ``timeout_s`` hangs.
    ``micro_batch_s``: how long a micro-batch may take, where texts are scored in windows. ``turn_budget`` is for the other
    stages to share.
    """

    def __init__(
        self, metrics: Metrics, *, timeout_s: float = 60, cache_size: int = 0, micro_batch_s: float = 2
    ) -> None:
        self.turn_budget = TurnBudget()
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._cache_size = cache_size
        self._tokenizer_thread = SerialExecutor("tokenizer")
        self._model_thread = SerialExecutor("model")
        self._loader_thread = SerialExecutor("loader")
        self._runner: ModelRunner | None = None  # of the model in use
        self._cache = ResultCache(0)
        self._micro_batch_s = micro_batch_s
        self._token_s: dict[str, float] = {}  # by stage, the seconds of one token; empty where texts are truncated
        self._why_dead: str | None = None  # once a fault is known that only another process can repair
        self._awaited: set[asyncio.Future[Any]] = set()

    @property
    def model(self) -> Model:
        """The model in use. Raises RuntimeError before ``load`` has ended."""
        return self._loaded().model

    @property
    def is_loaded(self) -> bool:
        return self._runner is not None

    def token_limit(self) -> TokenLimit[FetchedRecord] | None:
        """Bounds micro-batches to what is scored within ``micro_batch_s``; None where long texts are truncated.

        A record may have as many tokens as its value has bytes. The speed is that of the newest micro-batches.
        """
        if self.model.windowing is None:
            return None
        return TokenLimit(self._most_tokens, lambda: self._micro_batch_s / sum(self._token_s.values()))

    async def load(self, loader: Callable[[], Model]) -> Model:
        """Loads a model on the thread that will own it and warms it up. Raises what the loader raises.

        Loading may take as long as it takes: no time limit watches over it.
        """
        runner = self._runner_of(await self._model_thread.call(loader))
        await self._model_thread.call(runner.warm_up)
        self._use(runner)
        self._metrics.inference_succeeded(time.time(), runner.model.memory_bytes())
        return runner.model

    async def reload(self, loader: Callable[[], Model]) -> Model:
        """Loads a model beside the one in use, warms it up, and uses it for every job that begins from then on.

        Loading has a thread of its own, and scoring goes on. Raises what the loader or the new model raises, ValueError for
        a model whose logits are not finite; the model in use then stays.
        """

        def load() -> ModelRunner:
            runner = self._runner_of(loader())
            runner.warm_up_beside_another()
            return runner

        runner = await self._loader_thread.call(load)
        self._use(runner)
        return runner.model

    def why_not_alive(self) -> str | None:
        """Why inference is dead, or None if it is alive. Returns at once."""
        if self._why_dead:
            return self._why_dead
        for thread, what in ((self._tokenizer_thread, "the tokenizer"), (self._model_thread, "the model")):
            since = thread.busy_since
            if self.is_loaded and since is not None and time.monotonic() - since > self._timeout_s:
                return f"{what} has not answered for more than {self._timeout_s:g} s"
        return None

    async def watch(self) -> None:
        """Watches the threads until cancelled: once one hangs, whoever waits for inference gets FatalInferenceError."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout_s / 4))
            why = self.why_not_alive()
            if why:
                self._die(why)

    async def tokenize(self, texts: Sequence[str]) -> Job:
        """Begins a job: looks N texts up in the cache and tokenizes the others. Raises FatalInferenceError."""
        job = await begin_job(texts, self._loaded(), self._cache, self.turn_budget)
        if not job.cache.is_off:
            self._metrics.cache_hits.inc(len(texts) - len(job.texts))
        started = time.monotonic()
        tokens = await self._call(self._tokenizer_thread, job.runner.tokenize, job.texts)
        took_s = time.monotonic() - started
        self._metrics.stage_seconds["tokenize"].observe(took_s)
        job.token_ids, job.are_truncated, job.failures = tokens
        self._measured("tokenize", took_s, job.token_ids)
        return job

    async def forward(self, job: Job) -> Job:
        """Ends a job: sets its answers. Raises FatalInferenceError."""
        to_score = job.to_score()
        started = time.monotonic()
        answers = await self._call(self._model_thread, job.runner.score, to_score)
        if to_score:
            took_s = time.monotonic() - started
            self._metrics.stage_seconds["forward"].observe(took_s)
            self._metrics.inference_succeeded(time.time(), job.model.memory_bytes())
            self._measured("forward", took_s, to_score)
        job.finish(answers)
        self._metrics.texts_truncated.inc(sum(job.truncated))
        return job

    def _measured(self, stage: str, seconds: float, ids: Sequence[TokenIds]) -> None:
        """Notes how long a stage took for N texts. The newest measurement counts as much as all before it."""
        tokens = sum(map(len, ids)) if self._token_s else 0
        if tokens:
            self._token_s[stage] = (self._token_s[stage] + seconds / tokens) / 2

    def _most_tokens(self, record: FetchedRecord) -> int:
        windowing = self.model.windowing
        return windowing.most_tokens(len(record.value or b"")) if windowing else 0

    def _loaded(self) -> ModelRunner:
        if self._runner is None:
            raise RuntimeError("no model is loaded yet")
        return self._runner

    def _runner_of(self, model: Model) -> ModelRunner:
        return ModelRunner(
            model,
            self._metrics,
            tokenizer_progressed=self._tokenizer_thread.restart_clock,
            model_progressed=self._model_thread.restart_clock,
        )

    def _use(self, runner: ModelRunner) -> None:
        self._runner, self._cache = runner, ResultCache(self._cache_size, runner.model.labels)
        model = runner.model
        if model.windowing:  # until it is measured, a micro-batch has one pass for each thread
            token_s = self._micro_batch_s / (model.passes * model.max_batch_tokens)
            self._token_s = dict.fromkeys(("tokenize", "forward"), token_s / 2)

    async def _call(self, thread: SerialExecutor, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """What a function returns on a thread. Raises FatalInferenceError as soon as inference is dead, even if it hangs."""
        if self._why_dead:
            raise FatalInferenceError(self._why_dead)
        answer = thread.call(function, *arguments)
        self._awaited.add(answer)
        try:
            return await answer
        except FatalInferenceError as error:
            self._die(str(error))
            raise
        finally:
            self._awaited.discard(answer)

    def _die(self, why: str) -> None:
        if self._why_dead is None:
            self._why_dead = why
            for answer in self._awaited:
                if not answer.done():
                    answer.set_exception(FatalInferenceError(why))
