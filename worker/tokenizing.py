"""Texts → token ids, by the fastest tokenizer that gives the same ids as the checkpoint's own. Every call here blocks.

Three ways, the first that holds for this checkpoint and installation:

- nanotoken (extra ``fast``), WordPiece alone, 20 to 30 times as fast as transformers;
- the ``tokenizers`` library that transformers wraps, without the wrapper: measured 1.2 times as fast with the card's
  tokenizer, 1.5 times with builtin's;
- transformers' own call, for tokenizers that are plain Python.

The first two are compared with transformers' on the shipped reviews and on odd texts before they are used.
"""

import importlib.util
import logging
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from worker.reviews import read_reviews

log = logging.getLogger(__name__)

Ids = NDArray[np.int32]

CACHED_WORDS: Final = 1 << 17  # of nanotoken's, per thread and level: at most some 16 MB each
ODD_TEXTS: Final = (
    "", " ", "Ё", "и\u0306 е\u0308", "[CLS] внутри [SEP][MASK]", "слово" * 60, "a\u200bб\u00a0в\u2028г\x00д\ufeff",
    "日本語のテキスト", "😀👍🏽 :)", "ПРИВЕТ, МИР!!!", "ﬁ №5 ½ café", "«кавычки» — тире…", "\t\n\r\v\f",
    "שלום مرحبا हिन्दी", "##на",
)  # fmt: skip


class Encode(Protocol):
    """N texts → their ids, special tokens among them; cut to ``max_length`` tokens if it is given. For any thread."""

    def __call__(self, texts: Sequence[str], max_length: int | None = None, /) -> list[Ids]: ...


def choose_encode(tokenizer: Any) -> Encode:
    """The fastest way for a tokenizer that transformers has loaded. Takes some hundred milliseconds."""
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
            encode = make(tokenizer)
            is_same = all(
                _are_same(encode(texts, length), ids) for length, ids in zip((None, limit), wanted, strict=True)
            )
        except Exception as error:  # noqa: BLE001 - it covers some tokenizers only, and there is another way
            log.debug("%s does not take this tokenizer", name, extra={"error": type(error).__name__})
            continue
        if is_same:
            log.info("texts are tokenized by %s", name)
            return encode
        log.info("%s gives other ids than transformers for this tokenizer, and is not used", name)
    return own


class WrappedTokenizer:
    """transformers' own call."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # it sets the length at the tokenizer, for each call

    def __call__(self, texts: Sequence[str], max_length: int | None = None, /) -> list[Ids]:
        with self._lock:
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
    """The library under transformers' call, without what that adds for each text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._side = tokenizer.truncation_side
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str], max_length: int | None = None, /) -> list[Ids]:
        with self._lock:
            if max_length is None:
                self._tokenizer.no_truncation()
            else:
                self._tokenizer.enable_truncation(max_length, direction=self._side)
            self._tokenizer.no_padding()
            encoded = self._tokenizer.encode_batch_fast(list(texts))
        return _rows([each.ids for each in encoded])


class WordPieceTokenizer:
    """nanotoken. Raises what its loader raises for a tokenizer that is no WordPiece."""

    def __init__(self, tokenizer: Any) -> None:
        import nanotoken  # noqa: PLC0415 - an extra

        nanotoken.set_cache_entries(CACHED_WORDS)
        self._tokenizer = nanotoken.Tokenizer.from_json(tokenizer.backend_tokenizer.to_str()).backend
        self._side = tokenizer.truncation_side

    def __call__(self, texts: Sequence[str], max_length: int | None = None, /) -> list[Ids]:
        try:
            flat, offsets = self._tokenizer.encode_batch(list(texts), max_length=max_length, truncation_side=self._side)
        except Exception:
            raise
        except BaseException as panic:  # as Rust's are: nothing that handles errors would see it
            if type(panic).__name__ != "PanicException":
                raise
            raise RuntimeError("nanotoken panicked") from panic
        ids, bounds = flat.view(np.int32), offsets.tolist()
        return [ids[begin:end] for begin, end in pairwise(bounds)]


def _rows(lists: Sequence[Sequence[int]]) -> list[Ids]:
    return [np.array(each, dtype=np.int32) for each in lists]


def _are_same(some: Sequence[Ids], others: Sequence[Ids]) -> bool:
    return len(some) == len(others) and all(map(np.array_equal, some, others))
