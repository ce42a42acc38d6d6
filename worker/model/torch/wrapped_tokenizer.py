"""A tokenizer that transformers has loaded, for the rest of the worker."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from worker.model.tokenizer import (
    ODD_TEXTS,
    BareTokenizer,
    CheckpointTokenizer,
    Encode,
    Ids,
    are_same,
    count_closing,
    panics_as_errors,
    stated_maximum,
)


def wrap_tokenizer(tokenizer: Any) -> CheckpointTokenizer:
    """A tokenizer of transformers as a CheckpointTokenizer, whose backend is used where it gives the same ids.

    Blocks. Raises TokenizerPanicked where the tokenizer panics at a usual text.
    """
    own = WrappedTokenizer(tokenizer)
    backend = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
    encode: Encode = own if backend is None else BareTokenizer(backend, tokenizer.truncation_side)
    if not are_same(encode(ODD_TEXTS), own(ODD_TEXTS)):  # a class of transformers may do more than its backend
        encode, backend = own, None
    unknown = tokenizer.unk_token_id
    (shortest,) = own([""])
    with panics_as_errors():
        mask = tokenizer("а", return_special_tokens_mask=True)["special_tokens_mask"]
    return CheckpointTokenizer(
        encode=encode,
        backend=backend,
        model_max_length=stated_maximum(tokenizer.model_max_length),
        padding=tokenizer.pad_token_id,
        unknown=unknown,
        special=frozenset(tokenizer.all_special_ids) - {None},
        highest=max(tokenizer.get_vocab().values(), default=0),
        truncation_side=tokenizer.truncation_side,
        shortest=len(shortest),
        closing=count_closing(mask),
    )


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
        return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]
