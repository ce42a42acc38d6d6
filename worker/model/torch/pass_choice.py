"""Chooses whether a GPU computes texts without padding, and returns to padded passes if one without padding fails.

At the start it checks three conditions. The device, the number type and the model allow passes without padding. Their logits
agree with those of the plain forward on the shipped reviews. And if the setting ``cuda_pass`` is ``auto``, they are faster.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from worker.core.batching import ANY_PADDING, TokenIds, cut_by_length
from worker.model.autotune import shortest_run_s
from worker.model.runner import AGREEMENT, PassRunner, RunnerOptions
from worker.model.torch.backends import Choice, logits_of
from worker.model.torch.bert import GPU_HEAD_MULTIPLE, BertClassifier
from worker.model.torch.cuda import PASSES, expected_agreement
from worker.model.torch.unpadded import Attend, UnpaddedBert, find_varlen_attention, widened
from worker.model.torch.unpadded_passes import CudaStream, PassStream, UnpaddedPasses
from worker.runtime.memory import free_device_memory, is_out_of_memory
from worker.runtime.threads import parallel_map

log = logging.getLogger(__name__)

Logits = NDArray[np.float32]
PaddedPasses = Callable[[int, Sequence[Sequence[TokenIds]]], PassRunner]
"""Makes padded passes of at most that many tokens, with CUDA graphs for the shapes of these device batches only."""

HALF_TYPES: Final = ("float16", "bfloat16")
OLDEST_CAPABILITY: Final = (8, 0)  # compute capability, of the Flash kernel
# Padded tokens. On an H100 passes of 100,000 tokens were as fast as larger ones, and passes of 25,000 half as fast.
BUDGET: Final = 262_144
MEMORY_SHARE: Final = 0.5  # of the free memory, for the passes under way
CHECKED_TOKENS: Final = 16_384  # of a pass that is checked; few, for it is not known yet how much memory one takes
TOLERANCE: Final = 5e-2  # of a logit


class Gpu(NamedTuple):
    """What the choice needs of a device. ``peak_bytes`` makes the call, and returns the most memory that it took."""

    capability: tuple[int, int]
    find_attention: Callable[[torch.device, torch.dtype, int, int], Attend | None]
    new_stream: Callable[[], PassStream]
    free_bytes: Callable[[], int]
    peak_bytes: Callable[[Callable[[], object]], int]


def gpu_of(device: torch.device) -> Gpu:
    """The Gpu of a CUDA device."""

    def peak_bytes(call: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return int(torch.cuda.max_memory_allocated(device)) - before

    def new_stream() -> CudaStream:
        # For what the default stream does to the weights. All streams would include one on which a model that is being
        # loaded captures graphs, and that may not be waited for.
        torch.cuda.default_stream(device).synchronize()
        return CudaStream(device)

    return Gpu(
        torch.cuda.get_device_capability(device),
        find_varlen_attention,
        new_stream,
        lambda: int(torch.cuda.mem_get_info(device)[0]),
        peak_bytes,
    )


class UnpaddedRunner:
    """A PassRunner that computes texts without padding. If a pass fails, it and all later ones are computed with padding.

    It does so only if padded passes give finite logits for the same texts; else the texts or the device are at fault. If
    memory runs out, it raises the error and goes on without padding, because the caller then makes passes smaller. Texts
    whose logits are not finite are computed again with padding. ``max_batch_tokens`` is the most tokens of a padded pass.
    """

    widths: Sequence[int] = ()
    pass_tokens: int = ANY_PADDING

    def __init__(self, unpadded: PassRunner, padded: PassRunner, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.has_fallen_back = False
        self._unpadded = unpadded
        self._padded = padded
        self._failing = threading.Lock()  # held after a failure only

    def __call__(self, ids: Sequence[TokenIds]) -> Logits:
        if self.has_fallen_back:
            return self._padded_logits(ids)
        try:
            logits = self._unpadded(ids)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logits = self._padded_logits(ids)
            if np.isfinite(logits).all():
                self._fall_back(error)
            return logits
        broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(broken):
            logits[broken] = self._padded_logits([ids[row] for row in broken.tolist()])
        return logits

    def _padded_logits(self, ids: Sequence[TokenIds]) -> Logits:
        return all_logits(self._padded, ids, self.max_batch_tokens)

    def _fall_back(self, error: Exception) -> None:
        with self._failing:
            if self.has_fallen_back:
                return
            self.has_fallen_back = True
            self.widths, self.pass_tokens = self._padded.widths, self._padded.pass_tokens
        log.warning(
            "a pass without padding failed: it is computed again padded, and so is all that follows",
            extra={"error": f"{type(error).__name__}: {error}"[:200]},
        )


def choose_unpadded(
    choice: Choice, options: RunnerOptions, padded: PaddedPasses, gpu: Gpu, *, labels: int
) -> UnpaddedRunner | None:
    """A runner that computes without padding, or None if the GPU should pad. Logs which, and why. Blocks for a second or so.

    ``options.cuda_pass`` is ``unpadded`` or ``auto``; with ``auto``, the runner also has to be faster than padded passes.
    """
    unpadded = _unpadded_passes(choice, gpu, options.padding, labels)
    why = unpadded if isinstance(unpadded, str) else _disagreement(choice, options, unpadded)
    if isinstance(unpadded, str) or why:
        log.info("the GPU computes texts padded: %s", why)
        return None
    budget = options.max_batch_tokens
    if budget == "auto":
        budget = _budget(unpadded, options, gpu)
    fallback = padded(budget, ())
    speeds = {}
    if options.cuda_pass == "auto":
        graphed = padded(budget, _cut(fallback, options.examples, budget))
        rivals: dict[str, PassRunner] = {"unpadded": unpadded, "padded": graphed}
        speeds = {name: _texts_per_s(run, options.examples, budget) for name, run in rivals.items()}
        del graphed, rivals
        free_device_memory()  # of the graphs, which torch would keep
        if speeds["unpadded"] <= speeds["padded"]:
            log.info("the GPU computes texts padded: that is faster here", extra={"texts_per_s": speeds})
            return None
    log.info("the GPU computes texts without padding", extra={"max_batch_tokens": budget, "texts_per_s": speeds})
    return UnpaddedRunner(unpadded, fallback, budget)


def _unpadded_passes(choice: Choice, gpu: Gpu, padding: int, labels: int) -> UnpaddedPasses | str:
    """Passes without padding, or a sentence that says why they cannot be used."""
    model = choice.model
    if choice.dtype not in HALF_TYPES:
        return f"computing without padding needs half precision, and dtype is {choice.dtype}"
    if not isinstance(choice.forward, BertClassifier):
        return f"computing without padding does not cover a {type(model).__name__}"
    if gpu.capability < OLDEST_CAPABILITY:
        found = ".".join(map(str, gpu.capability))
        return f"computing without padding needs compute capability 8.0, and this device has {found}"
    heads = model.config.num_attention_heads
    size = widened(model.config.hidden_size // heads, GPU_HEAD_MULTIPLE)
    attend = gpu.find_attention(model.device, model.dtype, heads, size)
    if attend is None:
        return f"torch {torch.__version__} has no varlen_attn that works here"
    return UnpaddedPasses(UnpaddedBert(model, attend), gpu.new_stream, labels=labels, padding=padding)


def _disagreement(choice: Choice, options: RunnerOptions, unpadded: PassRunner) -> str | None:
    """A sentence on how logits without padding differ from the plain forward's on the examples, or None if they agree.

    If the number type was chosen by the share of labels that it keeps, passes without padding have to keep that share, too.
    """
    plain = logits_of(choice.exact or choice.forward, options.examples, choice.model.device)
    try:
        given = all_logits(unpadded, options.examples, max(CHECKED_TOKENS, options.max_tokens))
    except Exception as error:  # noqa: BLE001 - torch raises what it likes
        return f"computing without padding failed: {type(error).__name__}: {str(error)[:200]}"
    if not np.allclose(given, plain, rtol=TOLERANCE, atol=TOLERANCE):
        return f"logits without padding differ by up to {np.abs(given - plain).max():.3g}"
    columns = options.columns
    agreement = expected_agreement(plain[:, columns], given[:, columns]) if choice.exact else 1.0
    return None if agreement >= AGREEMENT else f"of the labels without padding only {agreement:.3%} would agree"


def _budget(unpadded: PassRunner, options: RunnerOptions, gpu: Gpu) -> int:
    """The token budget for which all passes at work together need half of the free memory, but BUDGET at most."""
    examples = options.examples[: max(1, CHECKED_TOKENS // options.max_tokens)]
    tokens = sum(map(len, examples))
    return affordable_budget(gpu.peak_bytes(lambda: unpadded(examples)) / tokens, gpu.free_bytes(), options.max_tokens)


def affordable_budget(bytes_per_token: float, free_bytes: int, max_tokens: int) -> int:
    """The tokens of each of PASSES passes that share MEMORY_SHARE of the free memory; from ``max_tokens`` to BUDGET."""
    affordable = int(free_bytes * MEMORY_SHARE / PASSES / max(1.0, bytes_per_token))
    return max(max_tokens, min(BUDGET, affordable))


def _texts_per_s(run: PassRunner, ids: Sequence[TokenIds], max_batch_tokens: int) -> int:
    """Texts per second of one micro-batch, cut into passes and computed by as many threads as in a worker."""
    batches = _cut(run, ids, max_batch_tokens)
    return round(len(ids) / shortest_run_s(lambda: list(parallel_map(PASSES, run, batches))))


def all_logits(run: PassRunner, ids: Sequence[TokenIds], max_batch_tokens: int) -> Logits:
    """The logits (N, labels) of N texts, in their order; computes one pass after another."""
    batches = _indices(run, ids, max_batch_tokens)
    logits = np.concatenate([run([ids[index] for index in batch]) for batch in batches])
    return logits[np.argsort(np.concatenate(batches))]


def _cut(run: PassRunner, ids: Sequence[TokenIds], max_batch_tokens: int) -> list[list[TokenIds]]:
    return [[ids[index] for index in batch] for batch in _indices(run, ids, max_batch_tokens)]


def _indices(run: PassRunner, ids: Sequence[TokenIds], max_batch_tokens: int) -> list[list[int]]:
    return cut_by_length(list(map(len, ids)), max_batch_tokens, run.pass_tokens, run.widths)
