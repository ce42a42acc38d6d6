"""Whatever tokenizes, it gives the ids of transformers' own call."""

import asyncio
import importlib.util
import logging
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from tests.support.checkpoint import PANICKING, PANICS, TOKENIZER, as_composed
from worker.model import tokenizer as tokenizing
from worker.model.checkpoint import BUILTIN
from worker.model.reviews import read_reviews
from worker.model.tokenizer import (
    BareTokenizer,
    TokenizerPanicked,
    WordPieceTokenizer,
    choose_encode,
    normalize_text,
    panics_as_errors,
)
from worker.model.torch.wrapped_tokenizer import WrappedTokenizer, wrap_tokenizer

needs_nanotoken = pytest.mark.skipif(importlib.util.find_spec("nanotoken") is None, reason="nanotoken is not installed")
CHECKPOINTS = {"card": TOKENIZER, "builtin": BUILTIN}
WAYS = [BareTokenizer, pytest.param(WordPieceTokenizer, marks=needs_nanotoken)]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINTS[request.param])


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return request.param(tokenizer.backend_tokenizer, "right")


WITH_MARKS = st.text(
    st.sampled_from("аеиАИщyж \u0301\u0306\u0308\u0327\u05b0\ufe0f\U0001e8d0\u1100\u1161\u11a8가é"), max_size=90
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), WITH_MARKS, st.lists(st.sampled_from(["и", "\u0301" * 30, "\u0306" * 31]))))
def test_a_text_is_composed_as_documented(text: str | list[str]) -> None:
    text = "".join(text)
    assert normalize_text(text) == as_composed(text)
    if as_composed(text) == text:
        assert normalize_text(text) is text or normalize_text(text) == text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("и\u0306 И\u0306 е\u0308", "й Й ё"),
        ("за\u0301мок замо\u0301к Э\u0301", "замок замок Э"),
        ("cafe\u0301 г\u0301", "café ѓ"),
        ("а\u0300 ё\u0301 а\u0301\u0301", "а\u0300 ё а\u0301"),
        ("и" + "\u0306" * 31, "и" + "\u0306" * 31),
        ("и" + "\u0306" * 30, "й" + "\u0306" * 29),
        ("и\u0306" + "x" + "\u0301" * 31 + "и\u0306", "й" + "x" + "\u0301" * 31 + "й"),
        ("а" + "\u0301" * 31, "а" + "\u0301" * 31),
        ("Обычный текст — «да»!", "Обычный текст — «да»!"),
    ],
)
def test_stress_marks_go_and_letters_are_composed(text: str, wanted: str) -> None:
    assert normalize_text(text) == wanted


@pytest.mark.parametrize("marks", ["\u0301", "\u0306", "\u0301\u0327", "\u0327\u0301", "\U0001e8d0", "\u05b0\u0301"])
def test_many_combining_marks_cost_little(marks: str) -> None:
    """NFC is quadratic on them: 100,000 would take many seconds."""
    text = "и" + marks * (100_000 // len(marks))
    started = time.process_time()
    assert normalize_text(text) == text
    assert time.process_time() - started < 1


def test_a_usual_text_stays_the_very_same_object() -> None:
    assert all(normalize_text(review) is review for review in read_reviews())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4), st.none() | st.integers(3, 20))
def test_ids_are_those_of_transformers(tokenizer: Any, way: Any, texts: list[str], max_length: int | None) -> None:
    wanted = tokenizer(texts, truncation=max_length is not None, max_length=max_length)["input_ids"]
    assert [ids.tolist() for ids in way(texts, max_length)] == wanted


def test_a_call_that_cuts_leaves_the_next_one_whole(way: Any) -> None:
    text = "Отличный товар, беру второй раз. " * 30
    (cut,) = way([text], 10)
    (whole,) = way([text])
    assert len(cut) == 10 < len(whole)


@needs_nanotoken
def test_the_fastest_that_agrees_is_taken(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = wrap_tokenizer(tokenizer)
    assert isinstance(choose_encode(wrapped), WordPieceTokenizer)
    monkeypatch.setattr(tokenizing.importlib.util, "find_spec", lambda _: None)
    assert isinstance(choose_encode(wrapped), BareTokenizer)


@needs_nanotoken
def test_one_that_gives_other_ids_is_not_taken(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode = WordPieceTokenizer.__call__
    monkeypatch.setattr(WordPieceTokenizer, "__call__", lambda *given: [ids[::-1] for ids in encode(*given)])
    with caplog.at_level(logging.INFO):
        assert isinstance(choose_encode(wrap_tokenizer(tokenizer)), BareTokenizer)
    assert "nanotoken gives other ids" in caplog.text


@pytest.mark.parametrize("way", [WrappedTokenizer, lambda tokenizer: wrap_tokenizer(tokenizer).encode])
def test_a_real_panic_costs_its_text_alone(way: Any) -> None:
    """A pattern of the checkpoint's own that gives up on a text, which Rust calls a panic."""
    panicking = AutoTokenizer.from_pretrained(TOKENIZER)
    panicking.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PANICKING), "isolated")
    encode = way(panicking)
    wanted = encode(["привет"])[0].tolist()
    with pytest.raises(TokenizerPanicked) as panic:
        encode(["привет", PANICS])
    assert not str(panic.value)
    assert panic.value.__cause__ is None
    assert encode(["привет"])[0].tolist() == wanted


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, ValueError])
def test_nothing_else_is_taken_for_a_panic(error: type[BaseException]) -> None:
    with pytest.raises(error), panics_as_errors():
        raise error


class PlainPython:
    """A tokenizer of transformers that is plain Python, as far as the worker asks it."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Any, **options: Any) -> Any:
        return self._tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_a_tokenizer_in_python_keeps_its_own_call(tokenizer: Any) -> None:
    wrapped = wrap_tokenizer(PlainPython(tokenizer))
    encode = choose_encode(wrapped)
    assert isinstance(encode, WrappedTokenizer)
    assert encode(["привет"])[0].tolist() == tokenizer(["привет"])["input_ids"][0]
    assert (wrapped.shortest, wrapped.closing, wrapped.padding) == (2, 1, tokenizer.pad_token_id)


def test_a_class_that_does_more_than_its_backend_keeps_its_own_call(tokenizer: Any) -> None:
    class Reversing(PlainPython):
        is_fast = True

        def __call__(self, texts: Any, **options: Any) -> Any:
            reversed_texts = [text[::-1] for text in texts] if isinstance(texts, list) else texts
            return super().__call__(reversed_texts, **options)

    encode = choose_encode(wrap_tokenizer(Reversing(tokenizer)))
    assert encode(["тевирп"])[0].tolist() == tokenizer(["привет"])["input_ids"][0]


@needs_nanotoken
def test_a_panic_is_an_error_that_can_be_handled(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Panicking:
        def encode_batch(self, *_: Any, **__: Any) -> Any:
            raise PanicException

    encode = WordPieceTokenizer(tokenizer.backend_tokenizer, "right")
    monkeypatch.setattr(encode, "_tokenizer", Panicking())
    with pytest.raises(TokenizerPanicked):
        encode(["привет"])
