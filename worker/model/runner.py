"""How a loaded model is computed: what is common to its backends, and the passes on a CPU."""

import logging
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from worker.core.batching import TokenIds
from worker.errors import UserError
from worker.model.autotune import Forward, tune_cpu
from worker.model.tokenizer import Ids

log = logging.getLogger(__name__)
Auto = Literal["auto"]
CudaPass = Literal["padded", "unpadded", "auto"]

AGREEMENT: Final = 0.999  # the share of labels that a number type must keep, for ``auto`` to take it


class BackendError(UserError):
    """The backend or number type that the settings name cannot compute this model here."""


class PassRunner(Protocol):
    """Token ids of N texts → logits (N, labels) in one pass. A call blocks; several threads may call at once.

    ``widths``: the lengths, ascending, that texts are padded to; empty if any. ``pass_tokens``: the tokens that are
    computed in the time that one more pass costs, ANY_PADDING if texts are not padded. ``cut_by_length`` takes both; both
    change if a GPU goes back to padded passes.
    """

    widths: Sequence[int]
    pass_tokens: int

    def __call__(self, ids: Sequence[TokenIds], /) -> NDArray[np.float32]: ...


class PreparedRunner(NamedTuple):
    """A runner and what was chosen for it: how many threads should call it at once, and the values of the settings.

    ``memory_bytes``: the device memory in use; 0 on a CPU, where it is the process's own.
    """

    run: PassRunner
    passes: int
    backend: str
    dtype: str
    max_batch_tokens: int
    memory_bytes: Callable[[], int] = lambda: 0


class RunnerOptions(NamedTuple):
    """What a runner is prepared by.

    ``columns``: the place of each label among the logits. ``examples``: token ids of texts to compare
    number types by. ``max_tokens``: of a text. ``padding``: the id of padding. ``cpu_threads`` and ``max_batch_tokens``: as
    in settings. ``tuning_s``: seconds that measuring may take in all. ``cuda_pass``: as in settings.
    """

    columns: Sequence[int]
    examples: Sequence[Ids]
    max_tokens: int
    padding: int
    cpu_threads: int | Auto
    max_batch_tokens: int | Auto
    tuning_s: float
    cuda_pass: CudaPass = "padded"


def prepare_cpu_runner(forward: Forward, options: RunnerOptions, *, backend: str, dtype: str) -> PreparedRunner:
    """A runner for a model on a CPU. ``backend`` and ``dtype``: what computes it, as in settings. Blocks: it measures."""
    tuned = tune_cpu(
        forward, options.max_tokens, options.cpu_threads, options.max_batch_tokens, tuning_s=options.tuning_s
    )
    log.info("chose how the model runs on this CPU", extra=tuned._asdict())
    run = PaddedPasses(forward, options.padding, tuned.pass_tokens)
    return PreparedRunner(run, tuned.cpu_threads, backend, dtype, tuned.max_batch_tokens)


class PaddedPasses:
    """Token ids of N texts → logits (N, labels) on a CPU, in one pass padded to the longest text.

    The calling thread computes; several threads may call at once. ``widths`` and ``pass_tokens``: as for PassRunner.
    """

    widths: Sequence[int] = ()

    def __init__(self, forward: Forward, padding: int, pass_tokens: int) -> None:
        self.pass_tokens = pass_tokens
        self._forward = forward
        self._padding = padding

    def __call__(self, ids: Sequence[TokenIds]) -> NDArray[np.float32]:
        padded, lengths = padded_ids(ids, self._padding)
        return self._forward(padded, None if lengths.min() == padded.shape[1] else lengths)


def padded_ids(ids: Sequence[TokenIds], padding: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids of N texts → padded ids (N, T), T tokens in the longest text, and the lengths (N)."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    padded = np.full((len(ids), lengths.max()), padding, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(ids)
    return padded, lengths
