"""Whether a GPU computes without padding: what has to hold for it, and what follows a failure. Needs no GPU."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AlbertConfig, AlbertForSequenceClassification, AutoModelForSequenceClassification

from tests.support.classifiers import SIZES
from worker.core.batching import ANY_PADDING, TokenIds
from worker.model.checkpoint import BUILTIN
from worker.model.reviews import read_reviews
from worker.model.runner import PaddedPasses, RunnerOptions
from worker.model.sentiment_model import SentimentModel
from worker.model.torch import pass_choice, runner
from worker.model.torch.backends import Choice, NumpyForward, choose_cuda_forward, logits_of
from worker.model.torch.pass_choice import (
    BUDGET,
    Gpu,
    UnpaddedRunner,
    affordable_budget,
    all_logits,
    choose_unpadded,
)
from worker.model.torch.runner import prepare_cuda_runner
from worker.model.torch.unpadded import attend_by_text
from worker.model.torch.unpadded_passes import HostStream, UnpaddedPasses

CPU = torch.device("cpu")
FREE_BYTES = 10**10


def gpu(**changes: Any) -> Gpu:
    """A GPU by its own account, which computes on the CPU."""

    def peak_bytes(call: Callable[[], object]) -> int:
        call()
        return 10**6

    facts = Gpu((9, 0), lambda *_: attend_by_text, HostStream, lambda: FREE_BYTES, peak_bytes)
    return facts._replace(**changes)


@pytest.fixture(scope="module")
def network() -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        BUILTIN, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def examples() -> Sequence[NDArray[np.int32]]:
    model = SentimentModel.load("builtin", device="cpu", backend="torch", max_batch_tokens=512, cpu_threads=1)
    return model.tokenize(read_reviews()[:48]).ids


@pytest.fixture(autouse=True)
def products_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)


@pytest.fixture(scope="module")
def choice(network: Any, examples: Any) -> Choice:
    """Nothing changes it, and making it takes a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
        return choose_cuda_forward(network, dtype="auto", columns=[0, 1, 2], examples=examples)


def options(examples: Any, cuda_pass: Any = "unpadded", max_batch_tokens: Any = 2_048) -> RunnerOptions:
    return RunnerOptions([0, 1, 2], examples, 512, 0, 1, max_batch_tokens, 0.0, cuda_pass)


def padded_of(choice: Choice) -> Callable[..., PaddedPasses]:
    return lambda _, __=(): PaddedPasses(NumpyForward(choice.exact or choice.forward, CPU), 0, 8)


def chosen(choice: Choice, given: RunnerOptions, device: Gpu | None = None) -> UnpaddedRunner | None:
    return choose_unpadded(choice, given, padded_of(choice), device or gpu(), labels=3)


# The choice.


def test_what_can_and_agrees_is_used(choice: Choice, examples: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, pass_choice.__name__):
        run = chosen(choice, options(examples))
    assert run is not None
    assert [record.message for record in caplog.records] == ["the GPU computes texts without padding"]
    wanted = logits_of(choice.exact or choice.forward, examples, CPU)
    np.testing.assert_allclose(all_logits(run, examples, 2_048), wanted, atol=2e-2)
    assert (run.widths, run.max_batch_tokens, run.has_fallen_back) == ((), 2_048, False)


def why_not(caplog: pytest.LogCaptureFixture, *arguments: Any) -> str:
    with caplog.at_level(logging.INFO, pass_choice.__name__):
        assert chosen(*arguments) is None
    (record,) = caplog.records
    return record.message


def test_float32_is_padded(network: Any, examples: Any, caplog: pytest.LogCaptureFixture) -> None:
    choice = choose_cuda_forward(network, dtype="float32", columns=[0, 1, 2], examples=examples)
    why = why_not(caplog, choice, options(examples))
    assert why == "the GPU computes texts padded: computing without padding needs half precision, and dtype is float32"


def test_an_older_device_pads(choice: Choice, examples: Any, caplog: pytest.LogCaptureFixture) -> None:
    why = why_not(caplog, choice, options(examples), gpu(capability=(7, 5)))
    assert "needs compute capability 8.0, and this device has 7.5" in why


def test_a_model_of_another_family_is_padded(examples: Any, caplog: pytest.LogCaptureFixture) -> None:
    other = AlbertForSequenceClassification(AlbertConfig(**SIZES, embedding_size=8)).eval()
    why = why_not(caplog, Choice(lambda *_: torch.zeros(1, 3), "float16", other), options(examples))
    assert "does not cover a AlbertForSequenceClassification" in why


def test_without_a_varlen_attn_that_works_texts_are_padded(
    choice: Choice, examples: Any, caplog: pytest.LogCaptureFixture
) -> None:
    why = why_not(caplog, choice, options(examples), gpu(find_attention=lambda *_: None))
    assert f"torch {torch.__version__} has no varlen_attn that works here" in why


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (lambda query, *others: attend_by_text(query * 1.5, *others), "logits without padding differ by up to"),
        (
            lambda query, *others: attend_by_text(query, *others) * torch.nan,
            "logits without padding differ by up to nan",
        ),
        (lambda *_: 1 / 0, "failed: ZeroDivisionError"),
    ],
)
def test_what_does_not_agree_is_padded(
    choice: Choice, examples: Any, attend: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert why in why_not(caplog, choice, options(examples), gpu(find_attention=lambda *_: attend))


def test_labels_have_to_agree_where_auto_chose_the_number_type(
    choice: Choice, examples: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_choice, "expected_agreement", lambda *_: 0.99)
    assert chosen(choice._replace(exact=None), options(examples)) is not None
    caplog.clear()
    assert "only 99.000% would agree" in why_not(caplog, choice, options(examples))


@pytest.mark.parametrize(("speeds", "is_used"), [((2_000, 1_000), True), ((1_000, 2_000), False), ((1, 1), False)])
def test_auto_takes_what_is_faster(
    choice: Choice,
    examples: Any,
    speeds: tuple[int, int],
    is_used: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def speed(run: Any, *_: Any) -> int:
        return speeds[0 if isinstance(run, UnpaddedPasses) else 1]

    monkeypatch.setattr(pass_choice, "_texts_per_s", speed)
    with caplog.at_level(logging.INFO, pass_choice.__name__):
        assert (chosen(choice, options(examples, "auto")) is not None) == is_used
    assert len(caplog.records) == 1
    assert is_used or "texts padded: that is faster here" in caplog.text


def test_auto_measures_both(choice: Choice, examples: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, pass_choice.__name__):
        chosen(choice, options(examples, "auto"))
    assert len(caplog.records) == 1


def test_the_budget_is_half_of_the_free_memory(choice: Choice, examples: Any) -> None:
    assert affordable_budget(10_000, 10**12, 512) == BUDGET
    assert affordable_budget(10_000, 4 * 10**9, 512) == 100_000  # two passes under way
    assert affordable_budget(10_000, 10**6, 512) == 512
    run = chosen(choice, options(examples, max_batch_tokens="auto"))
    assert run is not None
    tokens = sum(map(len, examples[: 16_384 // 512]))
    assert run.max_batch_tokens == affordable_budget(10**6 / tokens, FREE_BYTES, 512)


# What is prepared.


@pytest.mark.parametrize("cuda_pass", ["padded", "unpadded"])
def test_only_padded_passes_that_stay_have_all_their_graphs(
    cuda_pass: Any, network: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, Any]] = []

    def passes_on(*_: Any, budget: int, batches: Any, **__: Any) -> PaddedPasses:
        made.append((budget, batches))
        return PaddedPasses(NumpyForward(lambda *_: torch.zeros(1, 3), CPU), 0, 8)

    monkeypatch.setattr(runner, "passes_on", passes_on)
    prepared = prepare_cuda_runner(network, options(examples, cuda_pass), gpu(), dtype="auto")
    assert isinstance(prepared.run, UnpaddedRunner) == (cuda_pass == "unpadded")
    assert made == [(2_048, None if cuda_pass == "padded" else ())]
    assert prepared[1:5] == (2, "torch", "float16", 2_048)
    assert (prepared.run.pass_tokens == ANY_PADDING) == (cuda_pass == "unpadded")


# A failure later.


class Failing:
    """Passes that answer with a text's length, and fail from the call on that they are told."""

    widths: Sequence[int] = ()
    pass_tokens = 8

    def __init__(self, fails_from: int = 10**9, error: str = "an illegal memory access was encountered") -> None:
        self.calls: list[list[int]] = []
        self.fails_from = fails_from
        self.error = error
        self.nan_for: Sequence[int] = ()

    def __call__(self, ids: Sequence[TokenIds]) -> NDArray[np.float32]:
        lengths = [len(text) for text in ids]
        self.calls.append(lengths)
        if len(self.calls) >= self.fails_from:
            raise RuntimeError(self.error)
        return np.array([[np.nan if length in self.nan_for else length] * 3 for length in lengths], np.float32)


def lengths(logits: NDArray[np.float32]) -> list[float]:
    answer: list[float] = logits[:, 0].tolist()
    return answer


def test_a_failure_is_computed_again_padded_and_once_said(caplog: pytest.LogCaptureFixture) -> None:
    unpadded, padded = Failing(fails_from=2), Failing()
    run = UnpaddedRunner(unpadded, padded, 30)
    with caplog.at_level(logging.INFO, pass_choice.__name__):
        assert lengths(run([[1] * 3])) == [3]
        assert lengths(run([[1] * 3, [1] * 20, [1] * 21])) == [3, 20, 21]
        assert lengths(run([[1] * 5, [1] * 4])) == [5, 4]
    assert run.has_fallen_back
    assert unpadded.calls == [[3], [3, 20, 21]]
    assert padded.calls == [[21], [20], [3], [5, 4]]  # cut anew, as padded passes are
    assert (run.widths, run.pass_tokens) == (padded.widths, padded.pass_tokens)  # by which later batches are cut
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a pass without padding failed: it is computed again padded, and so is all that follows" in caplog.text


def test_threads_that_fail_at_once_lose_nothing_and_say_it_once(caplog: pytest.LogCaptureFixture) -> None:
    together = threading.Barrier(2, timeout=60)

    class Both(Failing):
        def __call__(self, ids: Sequence[TokenIds]) -> NDArray[np.float32]:
            together.wait()
            raise RuntimeError("unspecified launch failure")

    run, answers = UnpaddedRunner(Both(), Failing(), 30), {}

    def work(length: int) -> None:
        answers[length] = lengths(run([[1] * length]))

    with caplog.at_level(logging.INFO, pass_choice.__name__):
        threads = [threading.Thread(target=work, args=(length,)) for length in (3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {3: [3], 4: [4]}
    assert len(caplog.records) == 1


def test_want_of_memory_is_raised_and_the_way_stays() -> None:
    run = UnpaddedRunner(Failing(fails_from=1, error="DefaultCPUAllocator: can't allocate memory"), Failing(), 30)
    with pytest.raises(RuntimeError, match="allocate memory"):
        run([[1]])
    assert not run.has_fallen_back


def test_what_padded_passes_raise_is_raised_and_the_way_stays(caplog: pytest.LogCaptureFixture) -> None:
    run = UnpaddedRunner(Failing(fails_from=1), Failing(fails_from=1, error="an index is out of range"), 30)
    with pytest.raises(RuntimeError, match="an index is out of range"):
        run([[1]])
    assert not run.has_fallen_back
    assert run.pass_tokens == ANY_PADDING
    assert not caplog.records


def test_a_text_without_finite_logits_either_way_does_not_change_the_way() -> None:
    unpadded, padded = Failing(fails_from=1), Failing()
    padded.nan_for = (4,)
    run = UnpaddedRunner(unpadded, padded, 30)
    np.testing.assert_array_equal(lengths(run([[1] * 3, [1] * 4])), [3, np.nan])
    assert not run.has_fallen_back
    assert lengths(run([[1] * 3])) == [3]
    assert run.has_fallen_back


def test_what_has_no_finite_logits_is_computed_padded() -> None:
    unpadded, padded = Failing(), Failing()
    unpadded.nan_for = (4,)
    run = UnpaddedRunner(unpadded, padded, 30)
    assert lengths(run([[1] * 3, [1] * 4, [1] * 5])) == [3, 4, 5]
    assert padded.calls == [[4]]
    assert not run.has_fallen_back


def test_no_lock_is_taken_while_passes_succeed() -> None:
    run = UnpaddedRunner(Failing(), Failing(), 30)
    with run._failing:
        assert lengths(run([[1] * 3])) == [3]
