"""Whatever tokenizes, it gives the ids of transformers' own call."""

import importlib.util
import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.checkpoint import TOKENIZER
from worker import tokenizing
from worker.checkpoint import BUILTIN
from worker.tokenizing import BareTokenizer, TokenizerPanicked, WordPieceTokenizer, WrappedTokenizer, choose_encode

needs_nanotoken = pytest.mark.skipif(importlib.util.find_spec("nanotoken") is None, reason="nanotoken is not installed")
CHECKPOINTS = {"card": TOKENIZER, "builtin": BUILTIN}
WAYS = [BareTokenizer, pytest.param(WordPieceTokenizer, marks=needs_nanotoken)]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINTS[request.param])


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return request.param(tokenizer)


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
    assert isinstance(choose_encode(tokenizer), WordPieceTokenizer)
    monkeypatch.setattr(tokenizing.importlib.util, "find_spec", lambda _: None)
    assert isinstance(choose_encode(tokenizer), BareTokenizer)


@needs_nanotoken
def test_one_that_gives_other_ids_is_not_taken(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode = WordPieceTokenizer.__call__
    monkeypatch.setattr(WordPieceTokenizer, "__call__", lambda *given: [ids[::-1] for ids in encode(*given)])
    with caplog.at_level(logging.INFO):
        assert isinstance(choose_encode(tokenizer), BareTokenizer)
    assert "nanotoken gives other ids" in caplog.text


def test_a_tokenizer_in_python_keeps_its_own_call(tokenizer: Any) -> None:
    class Slow:
        is_fast = False

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return tokenizer(texts, **options)

    encode = choose_encode(Slow())
    assert isinstance(encode, WrappedTokenizer)
    assert encode(["привет"])[0].tolist() == tokenizer(["привет"])["input_ids"][0]


@needs_nanotoken
def test_a_panic_is_an_error_that_can_be_handled(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Panicking:
        def encode_batch(self, *_: Any, **__: Any) -> Any:
            raise PanicException

    encode = WordPieceTokenizer(tokenizer)
    monkeypatch.setattr(encode, "_tokenizer", Panicking())
    with pytest.raises(TokenizerPanicked):
        encode(["привет"])
