"""Passes on a GPU: the shapes, the wire and the graph table without one; the device itself where there is one."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from worker.model.runner import AGREEMENT
from worker.model.sentiment_model import SentimentModel
from worker.model.torch.backends import choose_cuda_forward
from worker.model.torch.cuda import (
    CapturedGraph,
    Graphs,
    Passes,
    Shape,
    Shapes,
    expected_agreement,
    pack,
    unpacked,
)
from worker.model.torch.pass_choice import UnpaddedRunner

TEXTS = st.lists(st.lists(st.integers(1, 999), min_size=1, max_size=40), min_size=1, max_size=20)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@given(st.integers(1, 600), st.integers(1, 40_000), st.integers(1, 3_000), st.integers(1, 600))
def test_a_shape_holds_what_it_is_for(longest: int, budget: int, count: int, length: int) -> None:
    rows, width = Shapes(longest, budget).of(count, min(length, longest))
    assert rows >= count
    assert min(length, longest) <= width <= longest


def test_padding_adds_at_most_half_and_every_full_pass_has_its_shape() -> None:
    shapes = Shapes(512, 16_384)
    assert shapes.widths == (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    for length in range(16, 513):
        assert shapes.of(1, length).width < 1.5 * length
    for width in shapes.widths:
        assert shapes.of(16_384 // width, width) in shapes.all()


def test_shapes_are_few_and_the_largest_is_first() -> None:
    shapes = Shapes(512, 65_536).all()
    sizes = [rows * width for rows, width in shapes]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(shapes)) == len(shapes) <= 250


def test_shapes_of_some_batches_alone() -> None:
    shapes = Shapes(512, 16_384)
    batches = [[[1] * 500], [[1] * 9] * 3, [[1] * 10, [1] * 16, [1]], [[1] * 500] * 32]
    assert shapes.all_of(batches) == [Shape(32, 512), Shape(1, 512), Shape(3, 16)]
    assert shapes.all_of([]) == []


def test_more_texts_than_the_budget_has_room_for_get_a_shape_of_their_own() -> None:
    assert Shapes(512, 1_024).of(100, 500) == Shape(100, 512)


@given(TEXTS, st.integers(0, 3), st.integers(0, 9), st.integers(0, 999))
def test_what_is_packed_comes_out_padded_whatever_lay_behind_it(
    texts: list[list[int]], more_rows: int, wider: int, stale: int
) -> None:
    shape = Shape(len(texts) + more_rows, max(map(len, texts)) + wider)
    wire = np.full(shape.rows * (shape.width + 1), stale, dtype=np.int32)
    end = pack(texts, shape, wire)
    assert end == shape.rows + sum(map(len, texts))
    ids, lengths = unpacked(torch.from_numpy(wire), shape, padding=7)
    for row, text in enumerate(texts):
        assert ids[row].tolist() == text + [7] * (shape.width - len(text))
    assert lengths.tolist() == [*map(len, texts), *[1] * more_rows]
    assert (ids[len(texts) :] == 7).all()


def test_arrays_are_packed_as_lists_are() -> None:
    wires = [np.zeros(12, dtype=np.int32) for _ in range(2)]
    pack([[1, 2], [3]], Shape(3, 3), wires[0])
    pack([np.array([1, 2], np.int32), np.array([3], np.int32)], Shape(3, 3), wires[1])
    assert wires[0].tolist() == wires[1].tolist() == [2, 1, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0]


# Graphs.


def replay() -> CapturedGraph:
    return CapturedGraph(lambda: None, torch.zeros(1))


def test_a_shape_that_takes_too_much_memory_has_no_graph_and_smaller_ones_have() -> None:
    graphs, large, small = Graphs(), Shape(8, 512), Shape(8, 16)
    graphs.fill(
        [large, small], needs=lambda shape: shape.rows * shape.width, capture=lambda _: replay(), most_bytes=1_000
    )
    assert graphs.get(large) is None
    assert graphs.get(small) is not None


def test_after_a_failed_capture_the_rest_takes_the_plain_forward() -> None:
    def capture(shape: Shape) -> CapturedGraph:
        if shape.rows == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return replay()

    graphs = Graphs()
    graphs.fill([Shape(rows, 16) for rows in (3, 2, 1)], needs=lambda _: 0, capture=capture, most_bytes=1)
    assert [graphs.get(Shape(rows, 16)) is not None for rows in (3, 2, 1)] == [True, False, False]


def test_capturing_ends_when_patience_does() -> None:
    graphs, times = Graphs(), iter([0.0, 1.0, 100.0])
    shapes = [Shape(rows, 16) for rows in (3, 2, 1)]
    graphs.fill(shapes, needs=lambda _: 0, capture=lambda _: replay(), most_bytes=1, clock=lambda: next(times))
    assert len(graphs) == 1


# Passes, over a device that is none.


class HostSlot:
    def __init__(self, shape: Shape) -> None:
        self.wire = np.zeros(shape.rows * (shape.width + 1), dtype=np.int32)
        self.answer: NDArray[np.float32] = np.empty(0, np.float32)


class HostDevice:
    """Answers with a text's length and its first id; fails or breaks where it is told to."""

    def __init__(self, fails_on: int = -1, breaks_on: int = -1) -> None:
        self.fails_on, self.breaks_on = fails_on, breaks_on
        self.settled = 0
        self.slots = 0

    def slot(self, shape: Shape) -> HostSlot:
        self.slots += 1
        return HostSlot(shape)

    def dispatch(self, slot: HostSlot, shape: Shape, _: int) -> None:
        ids, lengths = unpacked(torch.from_numpy(slot.wire), shape, 0)
        if (ids == self.fails_on).any():
            raise RuntimeError("out of memory")
        slot.answer = torch.stack([lengths.float(), ids[:, 0].float()], dim=1).numpy()
        slot.answer[(ids == self.breaks_on).any(1).numpy()] = np.inf

    def fetch(self, slot: HostSlot, count: int) -> NDArray[np.float32]:
        return slot.answer[:count].copy()

    def settle(self) -> None:
        self.settled += 1


def answers(passes: Passes, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    answer: list[list[float]] = passes(texts).tolist()
    return answer


def test_answers_come_in_order_and_buffers_are_used_again() -> None:
    pass_device = HostDevice()
    passes = Passes(pass_device, Shapes(64, 256))
    assert answers(passes, [[5, 6, 7], [8]]) == [[3, 5], [1, 8]]
    assert answers(passes, [[9]]) == [[1, 9]]
    assert pass_device.slots == 1
    assert answers(passes, [[1] * 64] * 4) == [[64, 1]] * 4
    assert pass_device.slots == 2


def test_a_failed_pass_settles_the_device_and_the_next_one_has_its_own_buffers() -> None:
    pass_device = HostDevice(fails_on=13)
    passes = Passes(pass_device, Shapes(64, 256))
    with pytest.raises(RuntimeError, match="out of memory"):
        passes([[1], [13]])
    assert pass_device.settled == 1
    assert answers(passes, [[2]]) == [[1, 2]]


def test_what_has_no_finite_logits_is_computed_exactly() -> None:
    passes = Passes(HostDevice(breaks_on=13), Shapes(64, 256), Passes(HostDevice(), Shapes(64, 256)))
    assert answers(passes, [[1], [2, 13], [3]]) == [[1, 1], [2, 2], [1, 3]]


def test_several_threads_may_be_in_a_pass() -> None:
    passes, wrong = Passes(HostDevice(), Shapes(64, 256)), []

    def work(first: int) -> None:
        for length in range(1, 60):
            if answers(passes, [[first] * length, [first]]) != [[length, first], [1, first]]:
                wrong.append(length)

    threads = [threading.Thread(target=work, args=(first,)) for first in (3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Half precision.


def test_agreement_follows_how_far_leads_change() -> None:
    random = np.random.default_rng(0)
    exact = random.normal(size=(2_000, 3)).astype(np.float32)
    others = [exact + random.normal(size=exact.shape).astype(np.float32) * noise for noise in (1e-5, 1e-3, 3e-2)]
    expected = [expected_agreement(exact, other) for other in others]
    assert expected[0] > 0.9999
    assert expected[1] > AGREEMENT
    assert expected[2] < AGREEMENT
    wide = random.normal(size=(1_000_000, 3)).astype(np.float32)
    noisy = wide + random.normal(size=wide.shape).astype(np.float32) * 3e-2
    actual = (wide.argmax(1) == noisy.argmax(1)).mean()
    assert 1 - expected[2] == pytest.approx(2 * (1 - actual), rel=0.5)  # careful by half


def test_no_agreement_where_half_precision_gives_no_number_or_all_labels_tie() -> None:
    exact = np.ones((100, 3), np.float32)
    assert expected_agreement(exact, np.full((100, 3), np.nan, np.float32)) == 0
    assert expected_agreement(exact, exact) < AGREEMENT
    assert expected_agreement(exact[:, :1], exact[:, :1] + 1) == 1, "of one label none can change"


def test_half_precision_is_taken_where_labels_agree_and_not_where_they_would_not(builtin: Any) -> None:
    network, examples = builtin
    choice = choose_cuda_forward(network, dtype="auto", columns=[0, 1, 2], examples=examples)
    assert choice.dtype == "float16"
    assert choice.exact is not None
    with torch.no_grad():
        network.classifier.bias.fill_(1_000)  # where half precision has steps of a half
    choice = choose_cuda_forward(network, dtype="auto", columns=[0, 1, 2], examples=examples)
    assert choice.dtype == "float32"
    assert choice.exact is None


@pytest.fixture
def builtin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The builtin model, and the ids of reviews; what it sets for products stays as it was."""
    from transformers import AutoModelForSequenceClassification

    from worker.model.checkpoint import BUILTIN
    from worker.model.reviews import read_reviews

    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    network = AutoModelForSequenceClassification.from_pretrained(
        BUILTIN, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = SentimentModel.load("builtin", device="cpu", backend="torch", max_batch_tokens=512, cpu_threads=1)
    return network, model.tokenize(read_reviews()[:64]).ids


# On a device.


@needs_gpu
def test_graphs_and_half_precision_answer_as_the_cpu_does() -> None:
    exact = SentimentModel.load("builtin", device="cpu", backend="torch")
    texts = ["Хорошо, спасибо.", "плохо " * 300, *("Отличный товар, беру второй раз. " * n for n in range(1, 70))]
    wanted = exact.get_sentiment(texts, "proba")
    for dtype, tolerance in (("float32", 1e-5), ("auto", 5e-3)):
        model = SentimentModel.load("builtin", device="cuda", dtype=dtype)
        for _ in range(3):
            assert np.abs(model.get_sentiment(texts, "proba") - wanted).max() < tolerance


@needs_gpu
def test_threads_that_share_the_device_get_their_own_answers() -> None:
    model = SentimentModel.load("builtin", device="cuda")
    ids = model.tokenize([f"Отзыв номер {number}, товар хороший." * (number % 9 + 1) for number in range(64)]).ids
    wanted = [model.logits([each]) for each in ids]
    found: dict[int, NDArray[np.float32]] = {}

    def work(begin: int) -> None:
        for number in range(begin, len(ids), 4):
            found[number] = model.logits([ids[number], ids[0]])[:1]

    threads = [threading.Thread(target=work, args=(begin,)) for begin in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, answer in found.items():
        np.testing.assert_allclose(answer, wanted[number], atol=1e-2)


def load_unpadded(**options: Any) -> tuple[SentimentModel, UnpaddedRunner]:
    model = SentimentModel.load("builtin", device="cuda", **{"cuda_pass": "unpadded", **options})
    run = model._run
    if not isinstance(run, UnpaddedRunner):
        pytest.skip("this device or this version of torch does not compute without padding; the log says why")
    return model, run


@needs_gpu
@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
def test_without_padding_the_gpu_answers_as_the_cpu_does(dtype: str) -> None:
    exact = SentimentModel.load("builtin", device="cpu", backend="torch")
    texts = ["Хорошо, спасибо.", "плохо " * 300, *("Отличный товар, беру второй раз. " * n for n in range(1, 70))]
    model, run = load_unpadded(dtype=dtype)
    for _ in range(3):
        difference = np.abs(model.get_sentiment(texts, "proba") - exact.get_sentiment(texts, "proba")).max()
        assert difference < (5e-2 if dtype == "bfloat16" else 5e-3)
    assert not run.has_fallen_back


@needs_gpu
def test_every_length_alone_and_in_one_row_without_padding() -> None:
    (model, run), padded = load_unpadded(), SentimentModel.load("builtin", device="cuda")
    draw = np.random.default_rng(0)
    ids = [draw.integers(5, 8_000, length, dtype=np.int32) for length in range(1, model.max_tokens + 1)]
    wanted = np.concatenate([padded.logits([each]) for each in ids])
    alone = np.concatenate([model.logits([each]) for each in ids])
    np.testing.assert_allclose(alone, wanted, atol=2e-2)
    np.testing.assert_allclose(model.logits(ids), wanted, atol=2e-2)
    assert not run.has_fallen_back


@needs_gpu
def test_threads_without_padding_get_their_own_answers() -> None:
    model, run = load_unpadded()
    draw = np.random.default_rng(0)
    ids = [draw.integers(5, 8_000, 1 + number * 37 % 200, dtype=np.int32) for number in range(200)]
    wanted = model.logits(ids)
    wrong: list[int] = []

    def work(begin: int) -> None:
        for number in range(begin, len(ids), 4):
            if np.abs(model.logits([ids[number], *ids[: number % 50]])[0] - wanted[number]).max() > 2e-2:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(begin,)) for begin in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not run.has_fallen_back


@needs_gpu
@pytest.mark.parametrize(("texts", "length"), [(1, 1), (8_192, 1), (70_000, 3), (2_048, 256)])
def test_many_and_long_texts_without_padding(texts: int, length: int) -> None:
    model, run = load_unpadded()
    kinds = [np.full(length, 7 + number, np.int32) for number in range(64)]
    wanted = np.concatenate([model.logits([kind]) for kind in kinds])
    logits = model.logits([kinds[number % 64] for number in range(texts)])
    np.testing.assert_allclose(logits, wanted[np.arange(texts) % 64], atol=2e-2)
    assert not run.has_fallen_back


@needs_gpu
def test_a_pass_without_padding_is_queued_without_waiting() -> None:
    """torch raises at a call that waits for the device; the wait at a pass's end is an event's, which it lets be."""
    model, run = load_unpadded()
    ids = [np.full(length, 7, np.int32) for length in (3, 50, 1, 17)]
    model.logits(ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = model.logits(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(logits).all()
    assert not run.has_fallen_back
    (buffers,) = run._unpadded._free  # type: ignore[attr-defined]
    assert buffers._numbers.is_pinned()
    assert buffers._logits.is_pinned()


@needs_gpu
def test_auto_says_which_way_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "worker.model.torch.pass_choice"):
        SentimentModel.load("builtin", device="cuda", cuda_pass="auto")
    assert sum("the GPU computes texts" in record.message for record in caplog.records) == 1


@needs_gpu
def test_a_failure_without_padding_is_computed_again_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = load_unpadded()
    ids = [np.full(length, 7, np.int32) for length in (3, 50, 1, 17)]
    wanted = model.logits(ids)

    def fail(_: object) -> None:
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(run._unpadded, "_forward", fail)
    np.testing.assert_allclose(model.logits(ids), wanted, atol=2e-2)
    assert run.has_fallen_back
    assert model.cuda_pass == "padded"
