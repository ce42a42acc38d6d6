"""Texts → token ids, by the fastest tokenizer that gives the same ids as the checkpoint's own. Every call here blocks.

There are three, of which the first is taken that is installed and can take the checkpoint's tokenizer:

- nanotoken (extra ``fast``), WordPiece alone, 20 to 30 times as fast as transformers;
- the ``tokenizers`` library that transformers wraps, without the wrapper: 1.2 times as fast with the card's tokenizer,
  1.5 times with builtin's;
- transformers' own call, for tokenizers that are plain Python.

The first two are used only if they give transformers' ids for the shipped reviews and for odd texts.
"""

import importlib.util
import logging
import os
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise, takewhile
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from worker.model.reviews import read_reviews

log = logging.getLogger(__name__)

Ids = NDArray[np.int32]

CACHED_WORDS: Final = 1 << 17  # in a cache of nanotoken, per thread and level: at most some 16 MB each
ODD_TEXTS: Final = (
    "", " ", "Ё", "и\u0306 е\u0308", "[CLS] внутри [SEP][MASK]", "слово" * 60, "a\u200bб\u00a0в\u2028г\x00д\ufeff",
    "日本語のテキスト", "😀👍🏽 :)", "ПРИВЕТ, МИР!!!", "ﬁ №5 ½ café", "«кавычки» — тире…", "\t\n\r\v\f",
    "שלום مرحبا हिन्दी", "##на",
)  # fmt: skip


MARKS: Final = 30  # the longest run of combining marks that is composed: Python's NFC is quadratic on them
STRESSED: Final = re.compile("(?<=[аеёиоуыэюяАЕЁИОУЫЭЮЯ])\u0301")


class TokenizerPanicked(Exception):
    """The tokenizer's Rust code panicked on a text."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raises TokenizerPanicked for a panic of Rust, which is a BaseException that no handler of errors would see.

    Its message is left out, for it may quote a text.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":  # each extension has a class of its own, and exports none
            raise
        raise TokenizerPanicked from None


class Encode(Protocol):
    """N texts → the token ids of each, special tokens among them, cut to ``max_length`` tokens if that is given.

    A call blocks; several threads may call at once.
    """

    def __call__(self, texts: Sequence[str], max_length: int | None = None, /) -> list[Ids]: ...


def normalize_text(text: str) -> str:
    """A text in NFC and without stress marks (U+0301 directly behind a Russian vowel).

    A run of more than 30 combining marks stays as it is; the text before and behind it is normalized.
    """
    if not _has_long_run(text):
        return _composed(text)
    marks = "".join(map(re.escape, filter(unicodedata.combining, set(text))))
    pieces = re.split(f"([{marks}]{{{MARKS + 1},}})", text)
    pieces[::2] = map(_composed, pieces[::2])
    return "".join(pieces)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", STRESSED.sub("", text) if "\u0301" in text else text)


def _has_long_run(text: str) -> bool:
    """Whether more than 30 combining marks follow each other. Samples each 31st character, which such a run covers."""
    sample = list(map(unicodedata.combining, text[MARKS :: MARKS + 1]))
    if not any(sample):
        return False
    for place in (place for place, is_mark in enumerate(sample) if is_mark):
        middle = MARKS + place * (MARKS + 1)
        before = takewhile(unicodedata.combining, reversed(text[middle - MARKS : middle]))
        behind = takewhile(unicodedata.combining, text[middle + 1 : middle + MARKS + 1])
        if sum(1 for _ in before) + 1 + sum(1 for _ in behind) > MARKS:
            return True
    return False


def with_normalization(encode: Encode) -> Encode:
    """An Encode that normalizes each text before ``encode``."""
    return lambda texts, max_length=None, /: encode(list(map(normalize_text, texts)), max_length)


def choose_encode(tokenizer: Any) -> Encode:
    """The fastest Encode for a tokenizer that transformers has loaded. Blocks for some hundred milliseconds.

    Raises TokenizerPanicked where the tokenizer panics, and so do calls of what it answers.
    """
    _outlive_forks()
    own: Encode = WrappedTokenizer(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        return own
    texts = [*ODD_TEXTS, *read_reviews()]
    limit = min(64, tokenizer.model_max_length)
    wanted = [own(texts), own(texts, limit)]
    ways: dict[str, Callable[[Any], Encode]] = {"nanotoken": WordPieceTokenizer, "tokenizers": BareTokenizer}
    if importlib.util.find_spec("nanotoken") is None:
        del ways["nanotoken"]
    for name, make in ways.items():
        try:
            with panics_as_errors():
                encode = make(tokenizer)
            is_same = all(
                _are_same(encode(texts, length), ids) for length, ids in zip((None, limit), wanted, strict=True)
            )
        except Exception as error:  # noqa: BLE001 - it takes some tokenizers only, and another way is left
            log.debug("%s does not take this tokenizer", name, extra={"error": type(error).__name__})
            continue
        if is_same:
            log.info("texts are tokenized by %s", name)
            return encode
        log.info("%s gives other ids than transformers for this tokenizer, and is not used", name)
    return own


@cache
def _outlive_forks() -> None:
    """Has a forked child tokenize without threads: it has the pool of ``tokenizers`` without its threads, and would hang."""
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


class WrappedTokenizer:
    """transformers' own call."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # each call sets the maximum length at the tokenizer

    def __call__(self, texts: Sequence[str], max_length: int | None = None, /) -> list[Ids]:
        with self._lock, panics_as_errors():
            encoded = self._tokenizer(
                list(texts),
                padding=False,
                truncation=max_length is not None,
                max_length=max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        return _rows(encoded["input_ids"])


class BareTokenizer:
    """The library ``tokenizers``, without what transformers adds for each text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._side = tokenizer.truncation_side
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str], max_length: int | None = None, /) -> list[Ids]:
        with self._lock, panics_as_errors():
            if max_length is None:
                self._tokenizer.no_truncation()
            else:
                self._tokenizer.enable_truncation(max_length, direction=self._side)
            self._tokenizer.no_padding()
            encoded = self._tokenizer.encode_batch_fast(list(texts))
        return _rows([each.ids for each in encoded])


class WordPieceTokenizer:
    """nanotoken, for WordPiece tokenizers; for others, its loader raises."""

    def __init__(self, tokenizer: Any) -> None:
        import nanotoken  # noqa: PLC0415 - an extra

        nanotoken.set_cache_entries(CACHED_WORDS)
        self._tokenizer = nanotoken.Tokenizer.from_json(tokenizer.backend_tokenizer.to_str()).backend
        self._side = tokenizer.truncation_side

    def __call__(self, texts: Sequence[str], max_length: int | None = None, /) -> list[Ids]:
        with panics_as_errors():
            flat, offsets = self._tokenizer.encode_batch(list(texts), max_length=max_length, truncation_side=self._side)
        ids, bounds = flat.view(np.int32), offsets.tolist()
        return [ids[begin:end] for begin, end in pairwise(bounds)]


def _rows(lists: Sequence[Sequence[int]]) -> list[Ids]:
    return [np.array(each, dtype=np.int32) for each in lists]


def _are_same(some: Sequence[Ids], others: Sequence[Ids]) -> bool:
    return len(some) == len(others) and all(map(np.array_equal, some, others))
