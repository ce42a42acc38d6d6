"""The threads of inference with models that misbehave in every way that a device or a text can."""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.waiting import wait_for
from worker.core.batching import ANY_PADDING
from worker.core.sentiment import CARD, LabelSet, Sentiment
from worker.core.windows import Windowing
from worker.kafka.reader import FetchedRecord
from worker.model.truncation import TokenizedTexts
from worker.pipeline import model_runner
from worker.pipeline.inference import Inference
from worker.pipeline.inference_job import Job
from worker.pipeline.model_runner import KNOWN_GOOD, FatalInferenceError
from worker.runtime.loop_budget import SLICE, TurnBudget
from worker.telemetry.metrics import Metrics

Fault = Callable[[Sequence[Sequence[int]]], None]


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class Model:
    """One token a character; the logits are a function of a text's tokens alone. ``fault`` may raise at each pass."""

    name = "fake@1"
    labels: LabelSet = CARD
    max_tokens = 512
    passes = 1
    widths = ()
    pass_tokens = 1_000
    windowing: Windowing | None = None

    def __init__(self, max_batch_tokens: int = 64) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.fault: Fault = lambda ids: None
        self.not_a_number: Callable[[Sequence[int]], bool] = lambda tokens: False
        self.seen: list[list[int]] = []
        self.tokenized: list[str] = []

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        self.tokenized.extend(texts)
        if any("☠" in text for text in texts):
            raise ValueError("a text that no tokenizer takes")
        return TokenizedTexts([[ord(letter) for letter in text] for text in texts], [len(text) > 40 for text in texts])

    def count_tokens(self, ids: Sequence[Sequence[int]]) -> tuple[int, int]:
        return sum(map(len, ids)), sum(tokens.count(ord("?")) for tokens in ids)

    def logits(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        self.fault(ids)
        self.seen.append([len(tokens) for tokens in ids])
        rows = [[np.nan] * 3 if self.not_a_number(tokens) else [sum(tokens) % 7, 1, -1] for tokens in ids]
        return np.array(rows, dtype=np.float32)

    def memory_bytes(self) -> int:
        return 0


@pytest.fixture
def model() -> Model:
    return Model()


async def loaded(model: Model, **options: float) -> Inference:
    inference = Inference(Metrics("test"), **options)  # type: ignore[arg-type]
    await inference.load(lambda: model)
    model.seen.clear()
    model.tokenized.clear()
    return inference


async def answers(inference: Inference, texts: list[str]) -> Job:
    return await inference.forward(await inference.tokenize(texts))


def only(fails: Callable[[Sequence[int]], bool], error: Exception) -> Fault:
    def fault(ids: Sequence[Sequence[int]]) -> None:
        if any(fails(tokens) for tokens in ids):
            raise error

    return fault


async def test_answers_come_back_in_order_whatever_the_lengths(model: Model) -> None:
    inference = await loaded(model)
    texts = ["x" * length for length in (30, 1, 17, 2, 64, 5, 9)]
    together = (await answers(inference, texts)).answers
    alone = [(await answers(inference, [text])).answers[0] for text in texts]
    assert together == alone
    assert all(len(lengths) * max(lengths) <= 64 for lengths in model.seen)


@pytest.fixture
def windows(model: Model) -> Model:
    """A model that takes 32 tokens, in windows that overlap by 16."""
    model.windowing = Windowing(max_tokens=32, opening=0, closing=0, max_windows=4)
    return model


async def test_windows_are_scored_apart_and_answer_for_their_text(windows: Model) -> None:
    inference = await loaded(windows, cache_size=10)
    texts = ["x" * 5, "y" * 64, "z" * 32, "y" * 64]
    for _ in range(2):  # the second time, the cache has them
        job = await answers(inference, texts)
        assert job.windows == [1, 3, 1, 3]
        assert job.truncated == [False, True, False, True]  # as the model says
    assert sorted(length for lengths in windows.seen for length in lengths) == [5, 32, 32, 32, 32]
    halves = await answers(await loaded(windows), ["y" * 32, "y" * 32 + "z" * 16])
    first, both = halves.answers
    assert isinstance(first, Sentiment)
    assert isinstance(both, Sentiment)
    later = (await answers(await loaded(windows), ["y" * 16 + "z" * 16])).answers[0]
    assert isinstance(later, Sentiment)
    mean = np.average([first.probabilities, later.probabilities], axis=0, weights=[32, 16])
    assert both.probabilities == pytest.approx(mean)


async def test_with_truncation_a_job_counts_no_windows(model: Model) -> None:
    assert (await answers(await loaded(model), ["x" * 100])).windows is None


async def test_a_window_that_fails_costs_its_text_alone(windows: Model) -> None:
    inference = await loaded(windows)
    windows.fault = only(lambda tokens: ord("☢") in tokens, RuntimeError("bad kernel"))
    job = await answers(inference, ["x" * 40, "y" * 60 + "☢", "z" * 20])
    assert [isinstance(answer, Sentiment) for answer in job.answers] == [True, False, True]
    assert job.answers[1] == "the model failed: RuntimeError"


async def test_many_failed_windows_of_one_text_are_no_lost_device(windows: Model) -> None:
    windows.windowing = Windowing(max_tokens=32, opening=0, closing=0, max_windows=20)
    inference = await loaded(windows)
    windows.fault = only(lambda tokens: ord("☢") in tokens, RuntimeError("bad kernel"))
    assert (await answers(inference, ["☢" * 200])).answers == ["the model failed: RuntimeError"]


async def test_a_micro_batch_is_bounded_by_what_is_scored_in_its_time(
    windows: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first by one pass for each thread, and then by the time that tokens took."""
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
    monkeypatch.setattr("worker.pipeline.inference.time", clock)

    def take(seconds: float) -> None:
        now[0] += seconds

    inference = await loaded(windows, micro_batch_s=1.0)
    limit = inference.token_limit()
    assert limit is not None
    assert limit.at_most() == pytest.approx(windows.max_batch_tokens)
    record = FetchedRecord("t", 0, 0, 0, None, b"x" * 64, ())
    assert limit.tokens_of(record) == 3 * 32
    assert limit.tokens_of(record._replace(value=None)) == 0
    assert limit.tokens_of(record._replace(value=b"x" * 10_000)) == 4 * 32
    windows.fault = lambda ids: take(0.01)  # of 64 tokens
    for _ in range(12):
        await answers(inference, ["x" * 32, "y" * 32])
    before = limit.at_most()
    assert windows.max_batch_tokens < before <= 64 / 0.01
    windows.fault = lambda ids: take(0.05)
    await answers(inference, ["x" * 32, "y" * 32])
    assert limit.at_most() < before / 2


async def test_with_truncation_micro_batches_have_no_bound_in_tokens(model: Model) -> None:
    assert (await loaded(model)).token_limit() is None


async def test_what_does_not_suit_the_model_is_counted(model: Model) -> None:
    metrics = Metrics("test")
    inference = Inference(metrics, cache_size=10)
    await inference.load(lambda: model)
    for _ in range(2):  # the cache knows that they were cut, and they are tokenized once
        await answers(inference, ["что?", "long" * 20, "long" * 20, "☠"])
    assert metrics.texts_truncated._value.get() == 4
    assert metrics.tokens._value.get() == len("что?") + 80
    assert metrics.unknown_tokens._value.get() == 1


async def test_a_text_that_was_cut_says_so(model: Model) -> None:
    job = await answers(await loaded(model), ["short", "long" * 20])
    assert job.truncated == [False, True]


async def test_one_poison_text_costs_that_text_alone(model: Model) -> None:
    inference = await loaded(model)
    model.fault = only(lambda tokens: ord("☢") in tokens, RuntimeError("bad kernel"))
    job = await answers(inference, ["один", "два ☢", "три", "четыре"])
    assert [isinstance(answer, Sentiment) for answer in job.answers] == [True, False, True, True]
    assert job.answers[1] == "the model failed: RuntimeError"


async def test_logits_that_are_no_numbers_cost_their_text_alone(model: Model) -> None:
    inference = await loaded(model)
    model.not_a_number = lambda tokens: ord("☢") in tokens
    job = await answers(inference, ["один", "☢", "☢ и ☢"])
    assert isinstance(job.answers[0], Sentiment)
    assert job.answers[1:] == ["a logit is not finite"] * 2


async def test_a_text_that_the_tokenizer_fails_on_costs_that_text_alone(model: Model) -> None:
    inference = await loaded(model)
    job = await answers(inference, ["один", "☠", "три"])
    assert isinstance(job.answers[0], Sentiment)
    assert job.answers[1] == "the tokenizer failed: ValueError"
    assert isinstance(job.answers[2], Sentiment)


@pytest.mark.parametrize("kind", ["raises", "not a number", "wrong shape"])
async def test_a_device_that_fails_a_known_good_text_is_lost(model: Model, kind: str) -> None:
    inference = await loaded(model)
    if kind == "raises":
        model.fault = only(lambda tokens: True, RuntimeError("CUDA error: unspecified launch failure"))
    elif kind == "not a number":
        model.not_a_number = lambda tokens: True
    else:
        model.logits = lambda ids: np.zeros((1, 2), np.float32)  # type: ignore[method-assign]
    with pytest.raises(FatalInferenceError, match="known-good"):
        await answers(inference, ["один", "два"])
    assert inference.why_not_alive()


async def test_a_model_that_fails_while_it_warms_up_is_not_loaded(model: Model) -> None:
    model.not_a_number = lambda tokens: True
    with pytest.raises(FatalInferenceError):
        await Inference(Metrics("test")).load(lambda: model)


async def test_out_of_memory_halves_the_budget_and_goes_on() -> None:
    model = Model(max_batch_tokens=1_000)
    inference = await loaded(model)
    model.fault = lambda ids: only(lambda _: len(ids) * len(ids[0]) > 100, OutOfMemoryError())(ids)
    job = await answers(inference, [chr(65 + n) * 20 for n in range(40)])
    assert all(isinstance(answer, Sentiment) for answer in job.answers)
    model.seen.clear()
    again = await answers(inference, [chr(97 + n) * 20 for n in range(20)])
    assert all(isinstance(answer, Sentiment) for answer in again.answers)
    assert len(model.seen) == 4, "the smaller budget is kept"


async def test_passes_run_side_by_side_and_answers_keep_their_places(model: Model) -> None:
    model.passes = 2
    both = threading.Barrier(2)
    inference = await loaded(model)
    model.fault = lambda ids: both.wait(60) and None
    texts = ["a" * 40, "b" * 39, "c" * 38, "d" * 37]  # a device batch each
    job = await answers(inference, texts)
    model.fault = lambda ids: None
    assert job.answers == (await answers(inference, texts)).answers


async def test_a_text_that_never_fits_into_memory_is_no_poison(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "MEMORY_PATIENCE_S", (0, 0))
    inference = await loaded(model)
    model.fault = only(lambda tokens: len(tokens) > 50, OutOfMemoryError())
    with pytest.raises(FatalInferenceError, match="out of memory for a single text of 60 tokens"):
        await answers(inference, ["x" * 60, "good"])


async def test_memory_that_a_neighbour_gives_back_is_waited_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "MEMORY_PATIENCE_S", (0, 0, 0))
    inference = await loaded(model)
    failures = [OutOfMemoryError(), OutOfMemoryError()]

    def short_of_memory(ids: Sequence[Sequence[int]]) -> None:
        if failures:
            raise failures.pop()

    model.fault = short_of_memory
    job = await answers(inference, ["x" * 60])
    assert isinstance(job.answers[0], Sentiment)


async def test_what_a_pass_without_enough_memory_had_is_freed_before_the_next(model: Model) -> None:
    class Allocated:
        pass

    held: list[weakref.ref[Allocated]] = []
    kept: list[bool] = []

    def short_of_memory(ids: Sequence[Sequence[int]]) -> None:
        kept.extend(each() is not None for each in held)
        allocated = Allocated()
        held.append(weakref.ref(allocated))
        if len(ids) > 1:
            raise OutOfMemoryError

    inference = await loaded(model)
    model.fault = short_of_memory
    await answers(inference, ["x" * 8, "y" * 8, "z" * 8, "w" * 8])
    assert len(held) > 4
    assert not any(kept)


@pytest.mark.parametrize("pass_tokens", [0, 1_000])
async def test_a_micro_batch_that_fails_as_a_whole_is_the_device_s_fault(model: Model, pass_tokens: int) -> None:
    model.pass_tokens = pass_tokens
    inference = await loaded(model)
    good = [ord(letter) for letter in KNOWN_GOOD]
    model.not_a_number = lambda tokens: tokens != good
    with pytest.raises(FatalInferenceError, match="all 8 texts of a micro-batch fail"):
        await answers(inference, ["t" * length for length in range(1, 9)])


async def test_a_device_batch_ends_where_padding_costs_more_than_a_pass(model: Model) -> None:
    model.pass_tokens = 3
    inference = await loaded(model)
    model.seen.clear()
    await answers(inference, ["a" * 10, "b" * 7, "c" * 6, "d" * 2])
    assert model.seen == [[10, 7], [6], [2]]


@pytest.mark.parametrize(("pass_tokens", "tokens"), [(ANY_PADDING, 12), (100, 20)])
async def test_padding_counts_where_texts_are_padded(model: Model, pass_tokens: int, tokens: int) -> None:
    model.pass_tokens = pass_tokens
    metrics = Metrics("test")
    runner = model_runner.ModelRunner(model, metrics, tokenizer_progressed=lambda: None, model_progressed=lambda: None)
    runner.warm_up()
    runner.score([[7] * 10, [7] * 2])
    assert f"sentiment_worker_batch_tokens_sum {tokens}.0" in metrics.text().decode()


async def test_a_model_that_hangs_is_noticed_and_nobody_waits_for_it(model: Model) -> None:
    release = threading.Event()
    inference = await loaded(model, timeout_s=0.2)
    job = await inference.tokenize(["zzz"])  # before anybody watches: a busy machine may take that long for it
    model.fault = lambda ids: release.wait(60) and None
    watching = asyncio.create_task(inference.watch())
    try:
        with pytest.raises(FatalInferenceError, match=r"the model has not answered for more than 0\.2 s"):
            await asyncio.wait_for(inference.forward(job), 30)
        assert inference.why_not_alive()
        with pytest.raises(FatalInferenceError):
            await asyncio.wait_for(answers(inference, ["b"]), 30)
    finally:
        release.set()
        watching.cancel()


async def test_time_runs_anew_for_each_device_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("worker.runtime.threads.time", SimpleNamespace(monotonic=lambda: now[0]))
    model = Model(max_batch_tokens=4)
    inference = await loaded(model)
    took: list[float] = []

    def slow(_: object) -> None:
        now[0] += 1.5
        took.append(now[0] - (inference._model_thread.busy_since or 0))

    model.fault = slow
    await answers(inference, [letter * 4 for letter in "abcdef"])
    assert took == [1.5] * 6


async def test_loading_may_take_as_long_as_it_takes(model: Model) -> None:
    inference = Inference(Metrics("test"), timeout_s=0.05)
    proceed = threading.Event()

    def slow() -> Model:
        proceed.wait(60)
        return model

    loading = asyncio.create_task(inference.load(slow))
    await asyncio.sleep(0.2)
    assert inference.why_not_alive() is None
    proceed.set()
    await loading


async def test_repeated_texts_are_scored_once(model: Model) -> None:
    metrics = Metrics("test")
    inference = Inference(metrics, cache_size=10)
    await inference.load(lambda: model)
    model.tokenized.clear()
    first = await answers(inference, ["раз", "два" * 20, "раз"])
    second = await answers(inference, ["два" * 20, "раз", "три"])
    assert model.tokenized == ["раз", "два" * 20, "три"]
    assert first.answers[0] == first.answers[2] == second.answers[1]
    assert second.truncated == [True, False, False]
    assert metrics.cache_hits._value.get() == 3


async def test_the_cache_is_bounded_and_keeps_what_was_used_last(model: Model) -> None:
    inference = await loaded(model, cache_size=2)
    for text in ("a", "b", "a", "c"):
        await answers(inference, [text])
    model.tokenized.clear()
    await answers(inference, ["a"])
    await answers(inference, ["b"])
    assert model.tokenized == ["b"]


async def test_a_failure_is_not_remembered(model: Model) -> None:
    inference = await loaded(model, cache_size=10)
    model.not_a_number = lambda tokens: tokens != [ord(letter) for letter in KNOWN_GOOD]
    assert (await answers(inference, ["текст"])).answers == ["a logit is not finite"]
    model.not_a_number = lambda tokens: False
    assert isinstance((await answers(inference, ["текст"])).answers[0], Sentiment)


async def test_the_model_is_owned_by_threads_of_its_own(model: Model) -> None:
    inference = await loaded(model)
    seen: set[str] = set()
    model.fault = lambda ids: seen.add(threading.current_thread().name)
    await answers(inference, ["a"])
    assert seen == {"model"}


async def test_nothing_to_score_is_no_error(model: Model) -> None:
    assert (await answers(await loaded(model), [])).answers == []


class Recorded(Model):
    """Of another name, with other answers."""

    def __init__(self, name: str) -> None:
        super().__init__(max_batch_tokens=32)
        self.name = name

    def logits(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        return -super().logits(ids)


async def test_a_reload_scores_new_jobs_with_the_new_model_and_lets_old_ones_end_with_theirs(model: Model) -> None:
    inference = await loaded(model, cache_size=10)
    begun = await inference.tokenize(["текст"])
    await inference.reload(lambda: Recorded("fake@2"))
    assert inference.model.name == "fake@2"
    assert (await inference.forward(begun)).model.name == "fake@1"
    after = await answers(inference, ["текст"])
    assert after.model.name == "fake@2"
    assert after.answers != begun.answers, "the cache holds an answer of the old model"


async def test_a_job_that_is_looked_up_during_a_reload_has_one_model(model: Model) -> None:
    inference = await loaded(model, cache_size=10_000)
    texts = [str(number) for number in range(2 * SLICE)]
    old = await answers(inference, texts)

    class Reloading(TurnBudget):
        async def before(self, _: int) -> None:
            inference.turn_budget = TurnBudget()
            await inference.reload(lambda: Recorded("fake@2"))
            await answers(inference, texts)  # the new model's are in its cache

    inference.turn_budget = Reloading()
    job = await answers(inference, texts)
    assert (job.model.name, job.answers) == ("fake@1", old.answers)
    assert (await answers(inference, texts)).answers != old.answers


async def test_scoring_goes_on_while_another_model_loads(model: Model) -> None:
    inference = await loaded(model)
    proceed = threading.Event()

    def slow() -> Model:
        assert proceed.wait(60)
        return Recorded("fake@2")

    reloading = asyncio.create_task(inference.reload(slow))
    job = await answers(inference, ["текст"])
    assert job.model is model
    assert not reloading.done()
    proceed.set()
    await reloading


@pytest.mark.parametrize("fault", ["load", "warm up", "not a number"])
async def test_a_model_that_fails_is_not_taken(model: Model, fault: str) -> None:
    inference = await loaded(model, cache_size=10)
    before = await answers(inference, ["текст"])
    worse = Recorded("fake@2")
    if fault == "warm up":
        worse.fault = only(lambda tokens: True, OutOfMemoryError())
    if fault == "not a number":
        worse.not_a_number = lambda tokens: True

    def load() -> Model:
        if fault == "load":
            raise OSError("no such file")
        return worse

    with pytest.raises((OSError, OutOfMemoryError, ValueError)):
        await inference.reload(load)
    model.seen.clear()
    after = await answers(inference, ["текст"])
    assert after.model is model
    assert after.answers == before.answers
    assert model.seen == [], "the cache is gone"


async def test_the_old_model_is_freed(model: Model) -> None:
    inference = Inference(Metrics("test"), cache_size=10)
    await inference.load(lambda: Recorded("fake@1"))
    await answers(inference, ["текст"])
    old = weakref.ref(inference.model)
    await inference.reload(lambda: Recorded("fake@2"))
    wait_for(lambda: old() is None, "the old model to go")
