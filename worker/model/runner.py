"""How a loaded model is computed on this machine: backend, number type, token budget, and passes at once."""

import logging
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from worker.core.batching import TokenIds
from worker.model.autotune import tune_budget, tune_pass_tokens, tune_threads
from worker.model.tokenizer import Ids
from worker.model.torch.backends import Choice, PaddedPasses, backend_of, choose_cuda_forward, choose_forward, name_of
from worker.model.torch.cuda import PASSES, passes_on

log = logging.getLogger(__name__)
Auto = Literal["auto"]


class PassRunner(Protocol):
    """Token ids of N texts → logits (N, labels) in one pass. A call blocks; several threads may call at once.

    ``widths``: the lengths, ascending, that texts are padded to; empty if any. ``pass_tokens``: the tokens that are
    computed in the time that one more pass costs. ``cut_by_length`` takes both.
    """

    widths: Sequence[int]
    pass_tokens: int

    def __call__(self, ids: Sequence[TokenIds], /) -> NDArray[np.float32]: ...


class PreparedRunner(NamedTuple):
    """A runner and what was chosen for it: how many threads should call it at once, and the values of the settings."""

    run: PassRunner
    passes: int
    backend: str
    dtype: str
    max_batch_tokens: int


def prepare_runner(
    model: Any,
    *,
    columns: Sequence[int],
    examples: Sequence[Ids],
    max_tokens: int,
    padding: int,
    backend: str,
    dtype: str,
    cpu_threads: int | Auto,
    max_batch_tokens: int | Auto,
    tuning_s: float,
) -> PreparedRunner:
    """A runner for a transformers model on its device.

    ``columns``, ``examples``: as for choose_cuda_forward. ``max_tokens``: of a text. ``padding``: the id of padding.
    ``backend``, ``dtype``, ``cpu_threads``, ``max_batch_tokens``: as in settings.
    Blocks for about a second, on a GPU for some, and for ``tuning_s`` for each of ``cpu_threads`` and
    ``max_batch_tokens`` that is auto. Raises BackendError.
    """
    is_on_cuda = model.device.type == "cuda"
    if is_on_cuda:
        choice = choose_cuda_forward(model, backend=backend, dtype=dtype, columns=columns, examples=examples)
    else:
        forward = choose_forward(model, backend=backend, is_int8=dtype == "int8")
        choice = Choice(forward, "int8" if dtype == "int8" else name_of(model.dtype))
    if max_batch_tokens == "auto":
        max_batch_tokens = tune_budget(choice.forward, model.device, max_tokens, tuning_s)
    if is_on_cuda:
        passes, run = PASSES, _cuda_runner(model, choice, max_tokens, max_batch_tokens, padding)
    else:
        passes = tune_threads(choice.forward, tuning_s) if cpu_threads == "auto" else cpu_threads
        run = PaddedPasses(choice.forward, padding, tune_pass_tokens(choice.forward))
        log.info("chose how many passes run at once", extra={"cpu_threads": passes, "pass_tokens": run.pass_tokens})
    return PreparedRunner(run, passes, backend_of(choice.forward), choice.dtype, max_batch_tokens)


def _cuda_runner(model: Any, choice: Choice, max_tokens: int, budget: int, padding: int) -> PassRunner:
    labels = model.config.num_labels
    return passes_on(
        model.device, choice.forward, choice.exact, longest=max_tokens, budget=budget, labels=labels, padding=padding
    )
