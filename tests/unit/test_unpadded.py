"""Texts in one row, without padding: the same logits as padded, few calls into torch, and nothing shared between passes."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForSequenceClassification

from tests.support.classifiers import bert, of_the_card, xlm_roberta
from worker.core.batching import cut_by_length
from worker.model.checkpoint import BUILTIN
from worker.model.torch.bert import BertClassifier
from worker.model.torch.unpadded import (
    RowOfTexts,
    UnpaddedBert,
    attend_by_text,
    find_varlen_attention,
    flash_attention,
)
from worker.model.torch.unpadded_passes import MOST_TEXTS, HostStream, UnpaddedPasses, pack_row, size_of_row

NETWORKS: dict[str, Callable[[], Any]] = {
    "three layers": bert,
    "one layer": lambda: bert(num_hidden_layers=1),
    "another activation": lambda: bert(hidden_act="gelu_new"),
    "the card's architecture": of_the_card,
    "xlm-roberta": xlm_roberta,
    "builtin": lambda: AutoModelForSequenceClassification.from_pretrained(BUILTIN, dtype=torch.float32).eval(),
}
MOST_CALLS = 60  # from Python into torch, for the passes of one micro-batch with a network of three layers
DEADLINE_S = 10.0


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    network = NETWORKS[request.param]()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # zero where a network is new, and a bias that is lost would not be missed
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def longest(network: Any) -> int:
    return min(512, network.config.max_position_embeddings)


def texts_of(network: Any, lengths: Sequence[int], seed: int = 0) -> list[NDArray[np.int32]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(5, network.config.vocab_size, length, dtype=np.int32) for length in lengths]


def passes_of(network: Any, new_stream: Callable[[], Any] = HostStream) -> UnpaddedPasses:
    return UnpaddedPasses(UnpaddedBert(network, attend_by_text), new_stream, labels=3, padding=0)


def padded_logits(network: Any, texts: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
    """By transformers' own code, in one padded batch."""
    lengths = torch.tensor([len(text) for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(mask.shape, network.config.pad_token_id)
    ids[mask] = torch.from_numpy(np.concatenate(texts)).long()
    with torch.inference_mode():
        logits: NDArray[np.float32] = network(input_ids=ids, attention_mask=mask.long()).logits.numpy()
    return logits


# Logits.


EVERY_LENGTH = ("three layers", "xlm-roberta")


@pytest.fixture(scope="module")
def every_length(network: Any) -> tuple[list[NDArray[np.int32]], NDArray[np.float32]]:
    """A text of each length, in random order, and their logits by transformers' own code."""
    lengths = np.random.default_rng(1).permutation(np.arange(1, longest(network) + 1)).tolist()
    texts = texts_of(network, lengths)
    wanted = np.zeros((len(texts), 3), np.float32)
    for batch in cut_by_length(lengths, 16_384, 2_048):
        wanted[batch] = padded_logits(network, [texts[index] for index in batch])
    return texts, wanted


@pytest.mark.parametrize("network", EVERY_LENGTH, indirect=True)
def test_every_length_alone(network: Any, every_length: tuple[list[NDArray[np.int32]], NDArray[np.float32]]) -> None:
    passes, (texts, wanted) = passes_of(network), every_length
    given = [passes([text])[0] for text in texts]
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("network", EVERY_LENGTH, indirect=True)
def test_every_length_in_one_row(
    network: Any, every_length: tuple[list[NDArray[np.int32]], NDArray[np.float32]]
) -> None:
    texts, wanted = every_length
    np.testing.assert_allclose(passes_of(network)(texts), wanted, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_mixed_lengths(network: Any, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40) | st.integers(1, longest(network)), min_size=1, max_size=12))
    del lengths[max(1, 2_000 // max(lengths)) :]  # the card's architecture takes its time with what is padded
    texts = texts_of(network, lengths, seed=data.draw(st.integers(0, 9)))
    np.testing.assert_allclose(passes_of(network)(texts), padded_logits(network, texts), rtol=0, atol=1e-5)


def test_half_precision_differs_no_more_than_padded(network: Any) -> None:
    texts = texts_of(network, [40, 3, 1, 17, 64])
    exact = padded_logits(network, texts)
    half = AutoModelForSequenceClassification.from_config(network.config).eval()
    half.load_state_dict(network.state_dict())
    half.half()
    ids = torch.full((len(texts), 64), network.config.pad_token_id)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.from_numpy(text)
    with torch.inference_mode():
        padded = BertClassifier(half)(ids, torch.tensor([len(text) for text in texts])).float().numpy()
    assert np.abs(passes_of(half)(texts) - exact).max() < 3 * np.abs(padded - exact).max() + 1e-3


def test_widened_heads_give_the_same_logits(network: Any) -> None:
    texts = texts_of(network, [33, 7, 1, 20])
    logits = [
        UnpaddedPasses(UnpaddedBert(network, attend_by_text, head_multiple=multiple), HostStream, labels=3, padding=0)(
            texts
        )
        for multiple in (1, 8, 64)
    ]
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], rtol=0, atol=1e-5)


def test_a_text_without_tokens_is_one_of_padding(network: Any) -> None:
    passes = passes_of(network)
    texts = texts_of(network, [5, 9])
    empty = np.zeros(0, np.int32)
    given = passes([texts[0], empty, texts[1], empty])
    wanted = passes([texts[0], np.zeros(1, np.int32), texts[1], np.zeros(1, np.int32)])
    np.testing.assert_array_equal(given, wanted)


def test_a_text_with_no_number_keeps_it_to_itself() -> None:
    network = bert()
    with torch.no_grad():
        network.bert.embeddings.word_embeddings.weight[7] = torch.nan
    finite = np.isfinite(passes_of(network)([[9, 7, 9], [9, 9], [9, 9, 9]])).all(axis=1)
    assert finite.tolist() == [False, True, True]


# What is sent.


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), min_size=1, max_size=9))
def test_numbers_of_a_row(texts: list[list[int]]) -> None:
    lengths = np.array([len(text) for text in texts], np.int32)
    numbers = np.full(size_of_row(len(texts), int(lengths.sum())), -1, np.int32)
    pack_row(texts, lengths, numbers)
    cuts = np.cumsum([len(texts) + 1, len(texts) + 1, len(texts), len(texts)])
    firsts, bounds, begins, own_lengths, ids = np.split(numbers, cuts)
    assert firsts.tolist() == list(range(len(texts) + 1))
    assert [ids[begin:end].tolist() for begin, end in pairwise(bounds)] == texts
    assert begins.tolist() == bounds[:-1].tolist()
    assert own_lengths.tolist() == lengths.tolist()


def test_lists_and_arrays_of_other_integers_are_packed_alike() -> None:
    passes = passes_of(bert())
    texts = [[7, 8, 9], [10]]
    wanted = passes(texts)
    for kind in (np.int32, np.int64, np.uint16):
        np.testing.assert_array_equal(passes([np.array(text, kind) for text in texts]), wanted)


# Calls.


class CountingStream(HostStream):
    """Counts the calls into CUDA's streams and events that CudaStream makes in place of these."""

    calls = 0

    @contextmanager
    def queue(self) -> Iterator[None]:
        type(self).calls += 2  # asks for the current stream, sets another
        yield
        type(self).calls += 1  # and sets it back

    def mark_end(self) -> None:
        type(self).calls += 1

    def wait(self) -> None:
        type(self).calls += 1


class TorchCalls(TorchFunctionMode):
    """Counts calls from Python into torch. Attention counts as one call, as ``flash_attention`` is."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))

    def attend(self, *call: Any) -> Tensor:
        self.names.append("attention")
        with torch._C.DisableTorchFunction():
            return attend_by_text(*call)


@pytest.mark.parametrize("texts", [1, 512, 2_000])
def test_calls_into_torch_are_few_however_many_texts_there_are(texts: int) -> None:
    network, calls = bert(), TorchCalls()
    assert network.config.num_hidden_layers == 3
    passes = UnpaddedPasses(UnpaddedBert(network, calls.attend), CountingStream, labels=3, padding=0)
    ids = texts_of(network, np.random.default_rng(2).integers(1, 9, texts).tolist())
    passes(ids)
    CountingStream.calls = 0
    with calls:
        calls.names.clear()
        passes(ids)
    entered_inference_mode = 2
    assert len(calls.names) + CountingStream.calls + entered_inference_mode <= MOST_CALLS, calls.names
    assert calls.names.count("attention") == 3
    copies = [name for name in calls.names if name in ("to", "copy_", "item", "tolist", "cpu", "cuda", "numpy")]
    assert copies == ["to", "copy_"]  # one in, one out, and nothing that waits


def test_attention_is_one_call_into_torch() -> None:
    part = torch.zeros(20, 12, 32, dtype=torch.float16, device="meta")
    bounds = torch.zeros(4, dtype=torch.int32, device="meta")
    with TorchCalls() as calls, torch.inference_mode():
        calls.names.clear()
        attended = flash_attention(part, part, part, bounds, bounds, 9, 9)
    assert [name for name in calls.names if not name.startswith("__")] == ["_flash_attention_forward"]
    assert (attended.shape, attended.dtype) == (part.shape, part.dtype)


# Passes at once.


class BlockedStream(HostStream):
    """A pass on it ends only when ``may_end`` is set."""

    def __init__(self, may_end: threading.Event) -> None:
        self.may_end = may_end
        self.is_waited_for = threading.Event()

    def wait(self) -> None:
        self.is_waited_for.set()
        assert self.may_end.wait(DEADLINE_S)


def test_buffers_of_a_pass_under_way_are_not_used_by_another() -> None:
    network = bert()
    streams: list[BlockedStream] = []
    may_end = [threading.Event(), threading.Event()]

    def new_stream() -> BlockedStream:
        streams.append(BlockedStream(may_end[len(streams)]))
        return streams[-1]

    passes, texts = passes_of(network, new_stream), texts_of(network, [5, 9])
    answers: list[NDArray[np.float32]] = []
    thread = threading.Thread(target=lambda: answers.append(passes([texts[0]])))
    may_end[1].set()
    thread.start()
    while not streams:
        assert thread.is_alive()
    assert streams[0].is_waited_for.wait(DEADLINE_S)
    second = passes([texts[1]])  # sent and ended while the first is under way
    assert not answers
    may_end[0].set()
    thread.join(DEADLINE_S)
    np.testing.assert_allclose(answers[0], padded_logits(network, [texts[0]]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(second, padded_logits(network, [texts[1]]), rtol=0, atol=1e-5)
    passes([texts[1]])
    assert len(streams) == 2


def test_buffers_grow_and_are_used_again() -> None:
    network, streams = bert(), []

    def new_stream() -> HostStream:
        streams.append(HostStream())
        return streams[-1]

    passes = passes_of(network, new_stream)
    for lengths in ([3], [500] * 9, [3], [1] * 3_000, [2]):
        texts = texts_of(network, lengths)
        np.testing.assert_allclose(passes(texts), padded_logits(network, texts), rtol=0, atol=1e-5)
    assert len(streams) == 1


def test_after_a_failed_pass_the_stream_is_settled_and_the_next_one_has_its_own_buffers() -> None:
    settled: list[int] = []

    class Stream(HostStream):
        def settle(self) -> None:
            settled.append(1)

    def forward(row: RowOfTexts) -> Tensor:
        if row.texts == 2:
            raise RuntimeError("an illegal memory access was encountered")
        return torch.zeros(row.texts, 3)

    passes = UnpaddedPasses(forward, Stream, labels=3, padding=0)
    with pytest.raises(RuntimeError, match="illegal"):
        passes([[1], [2]])
    assert settled == [1]
    assert passes([[1]]).shape == (1, 3)


def test_more_texts_than_the_kernel_takes_go_in_several_passes() -> None:
    seen: list[int] = []

    def forward(row: RowOfTexts) -> Tensor:
        seen.append(row.texts)
        *_, ids = torch.split_with_sizes(row.numbers, (row.texts + 1, row.texts + 1, row.texts, row.texts, row.tokens))
        return ids[:, None].float().expand(-1, 3)

    passes = UnpaddedPasses(forward, HostStream, labels=3, padding=0)
    texts = np.arange(MOST_TEXTS + 2, dtype=np.int32)[:, None]
    np.testing.assert_array_equal(passes(list(texts))[:, 0], texts[:, 0])
    assert seen == [MOST_TEXTS, 2]


def test_answers_do_not_share_memory() -> None:
    passes = passes_of(bert())
    first = passes([[7, 8]])
    kept = first.copy()
    passes([[9, 10, 11]])
    np.testing.assert_array_equal(first, kept)


def test_several_threads_get_their_own_answers() -> None:
    network = bert()
    passes, texts = passes_of(network), texts_of(network, range(1, 41))
    wanted = padded_logits(network, texts)
    wrong: list[int] = []

    def work(begin: int) -> None:
        for number in range(begin, len(texts), 4):
            if np.abs(passes([texts[number], texts[0]])[0] - wanted[number]).max() > 1e-5:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(begin,)) for begin in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# What varlen_attn is given.


def test_attention_is_given_what_the_flash_kernel_takes() -> None:
    given: list[tuple[Any, ...]] = []

    def attend(*call: Any) -> Tensor:
        given.append(call)
        return attend_by_text(*call)

    passes = UnpaddedPasses(UnpaddedBert(of_the_card().half(), attend), HostStream, labels=3, padding=0)
    passes([[7, 8, 9], [7], [8, 9]])
    assert len(given) == 3
    for layer, (query, key, value, query_bounds, key_bounds, most_queries, most_keys) in enumerate(given):
        for part in (query, key, value):
            assert part.dtype == torch.float16
            assert part.shape[1:] == (12, 32)
            assert part.stride(2) == 1
            assert [stride * 2 % 16 for stride in part.stride()[:2]] == [0, 0]  # rows of heads begin at 16 bytes
            assert part.storage_offset() * 2 % 16 == 0
        for bounds in (query_bounds, key_bounds):
            assert bounds.dtype == torch.int32
            assert bounds.is_contiguous()
        assert key_bounds.tolist() == [0, 3, 4, 6]
        assert query_bounds.tolist() == ([0, 1, 2, 3] if layer == 2 else [0, 3, 4, 6])
        assert (most_queries, most_keys) == ((1, 3) if layer == 2 else (3, 3))


@pytest.mark.parametrize("attend", [flash_attention, varlen_attn, partial(varlen_attn, num_splits=1)])
def test_the_installed_torch_takes_it(attend: Any) -> None:
    """On torch's device meta, where shapes are computed and nothing else."""
    forward = UnpaddedBert(of_the_card().half().to("meta"), attend)
    numbers = torch.zeros(size_of_row(3, 20), dtype=torch.int32, device="meta")
    with torch.inference_mode():
        assert forward(RowOfTexts(numbers, 3, 20, 9)).shape == (3, 3)


# Finding varlen_attn.


def find(monkeypatch: pytest.MonkeyPatch, varlen_attn: Callable[..., Tensor]) -> Any:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    return find_varlen_attention(torch.device("cpu"), torch.float32, 2, 16)


def test_the_flash_kernel_itself_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.model.torch.unpadded.flash_attention", attend_by_text)
    assert find(monkeypatch, lambda *_, **__: 1 / 0) is attend_by_text


def test_varlen_attn_is_called_without_splits_where_it_takes_that(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []

    def varlen_attn(*call: Any, num_splits: int | None = None) -> Tensor:
        seen.append(num_splits)
        return attend_by_text(*call)

    attend = find(monkeypatch, varlen_attn)
    seen.clear()
    part = torch.zeros(2, 2, 16)
    attend(part, part, part, torch.tensor([0, 2]), torch.tensor([0, 2]), 2, 2)
    assert seen == [1]


def test_varlen_attn_is_called_with_seven_arguments_where_it_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(monkeypatch, attend_by_text) is attend_by_text


@pytest.mark.parametrize("fault", ["scale", "shape", "raises", "no number"])
def test_varlen_attn_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def varlen_attn(query: Tensor, *others: Any) -> Tensor:
        match fault:
            case "scale":
                return attend_by_text(query * 1.2, *others)
            case "shape":
                return attend_by_text(query, *others)[:-1]
            case "raises":
                raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
            case _:
                return attend_by_text(query, *others) * torch.nan

    assert find(monkeypatch, varlen_attn) is None


def test_the_installed_varlen_attn_is_not_for_a_cpu() -> None:
    assert find_varlen_attention(torch.device("cpu"), torch.float16, 2, 16) is None
