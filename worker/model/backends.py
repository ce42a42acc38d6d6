"""Which forward a loaded network gets: the lean one in torch or in ONNX Runtime, or its own."""

import copy
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from worker.core.batching import TokenIds, cut_by_length
from worker.errors import UserError
from worker.model import onnx_export as exported
from worker.model.autotune import cpu_has, fastest, one_thread
from worker.model.bert import EXAMPLE_TOKENS, Forward, LeanNetwork, is_alike, is_covered, seconds
from worker.model.cuda import AGREEMENT, expected_agreement
from worker.model.tokenizer import Ids

log = logging.getLogger(__name__)

EXAMPLE_LENGTH = 64
TURNS = 3  # of the backends, so that a neighbour's noise meets both
COMPARED_TOKENS = 8_192  # of a batch of examples


class Run(Protocol):
    """N token lists → logits (N, labels), in one pass.

    ``widths``: those that texts are padded to; none if any. ``pass_tokens``: as cut_by_length takes them.
    """

    widths: Sequence[int]
    pass_tokens: int

    def __call__(self, ids: Sequence[TokenIds], /) -> NDArray[np.float32]: ...


class Choice(NamedTuple):
    """A forward, its number type, and another one for texts that it gives no finite logits for, if there is one."""

    forward: Forward
    dtype: str
    exact: Forward | None = None


class BackendError(UserError):
    """The backend that is asked for cannot run this network."""


@one_thread()
def choose(network: Any, *, backend: str, is_int8: bool) -> Forward:
    """The fastest forward of those that ``backend`` (auto, torch, onnx) allows; auto takes no other than exact ones.

    On a CPU a pass takes one thread, the calling one.

    Blocks: what is measured takes a second, a first export several. Raises BackendError.
    """
    wants_onnx = backend == "onnx" or is_int8
    if wants_onnx:
        _refuse_what_onnx_cannot(network, backend, is_int8)
    if network.device.type == "cpu" and network.dtype == torch.bfloat16 and not has_bfloat16():
        log.warning("this CPU does not compute in bfloat16 itself: dtype bfloat16 is slower here than float32")
    lean = _lean(network)
    if lean is None:
        if wants_onnx:
            raise BackendError(
                f"{_asked(backend, is_int8)} covers BERT and RoBERTa classifiers alone, and this checkpoint is a "
                f"{type(network).__name__}; leave backend and dtype at auto"
            )
        log.info("the checkpoint takes its own forward: the lean one does not cover a %s", type(network).__name__)
        return partial(_own_forward, network)
    if wants_onnx:
        return _exported(network, is_int8=is_int8)
    if (
        backend == "torch"
        or network.device.type != "cpu"
        or network.dtype != torch.float32
        or not exported.is_installed()
    ):
        return lean
    return _faster(network, lean)


def choose_on_cuda(
    network: Any, *, backend: str, dtype: str, columns: Sequence[int], examples: Sequence[Ids]
) -> Choice:
    """``choose`` for a network in float32 on a GPU where ``dtype`` is auto, for any other as it is.

    Auto is half precision if labels are expected to agree on 99.9 % of texts like the examples, of which only ``columns`` of
    the logits are looked at; else float32, with products in TF32. Half is float16: it has eight times bfloat16's precision,
    and what does not fit its range shows, as a logit that is not finite, and is computed again in float32.
    """
    torch.set_float32_matmul_precision("highest")  # whatever a model before this one has set
    forward = choose(network, backend=backend, is_int8=dtype == "int8")
    if dtype != "auto":
        return Choice(forward, name_of(network.dtype))
    half = _lean_or_own(copy.deepcopy(network).half())
    exact_logits, half_logits = (_logits_of(each, examples, network.device)[:, columns] for each in (forward, half))
    agreement = expected_agreement(exact_logits, half_logits)
    log.info("compared half precision", extra={"expected_agreement": f"{agreement:.4%}", "texts": len(examples)})
    if agreement >= AGREEMENT:
        return Choice(half, "float16", forward)
    torch.set_float32_matmul_precision("high")
    return Choice(forward, "float32")


def backend_of(forward: Forward) -> str:
    """What runs it, as in settings."""
    return "onnx" if isinstance(forward, exported.ExportedNetwork) else "torch"


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 itself: else it is slower than float32."""
    return cpu_has("avx512_bf16", "amx_bf16", "bf16")


def name_of(dtype: torch.dtype) -> str:
    """As in settings."""
    return str(dtype).removeprefix("torch.")


class PaddedPasses:
    """Passes on a CPU, padded to the longest text. The calling thread computes; for any number of threads."""

    widths: Sequence[int] = ()

    def __init__(self, forward: Forward, padding: int, pass_tokens: int) -> None:
        self.pass_tokens = pass_tokens
        self._forward = forward
        self._padding = padding

    def __call__(self, ids: Sequence[TokenIds]) -> NDArray[np.float32]:
        padded, lengths = padded_ids(ids, self._padding)
        with one_thread(), torch.inference_mode():
            output = self._forward(
                torch.from_numpy(padded), None if lengths.min() == padded.shape[1] else torch.from_numpy(lengths)
            )
        answer: NDArray[np.float32] = output.float().numpy()
        return answer


def padded_ids(ids: Sequence[TokenIds], padding: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token lists as ids (N, T), T the longest, and their lengths (N)."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    padded = np.full((len(ids), lengths.max()), padding, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(ids)
    return padded, lengths


def _logits_of(forward: Forward, examples: Sequence[Ids], device: torch.device) -> NDArray[np.float32]:
    batches = cut_by_length([len(ids) for ids in examples], COMPARED_TOKENS, COMPARED_TOKENS)
    logits: dict[int, NDArray[np.float32]] = {}
    with torch.inference_mode():
        for batch in batches:
            padded, lengths = padded_ids([examples[index] for index in batch], 0)
            output = forward(torch.from_numpy(padded).to(device), torch.from_numpy(lengths).to(device))
            logits.update(zip(batch, output.float().cpu().numpy(), strict=True))
    return np.array([logits[index] for index in range(len(examples))])


def _lean_or_own(network: Any) -> Forward:
    return _lean(network) or partial(_own_forward, network)


def _lean(network: Any) -> LeanNetwork | None:
    lean = LeanNetwork(network) if is_covered(network) else None
    return lean if lean and is_alike(lean, network) else None


def _faster(network: Any, lean: LeanNetwork) -> Forward:
    try:
        other = _exported(network, is_int8=False)
    except Exception as error:  # noqa: BLE001 - whatever an exporter raises, there is a forward without it
        log.warning("the network cannot be exported to ONNX Runtime", extra={"error": type(error).__name__})
        return lean
    took = _passes_seconds({"torch": lean, "onnx": other})
    log.info(
        "measured the backends, by a pass of one text and by a full one",
        extra={name: " and ".join(f"{1000 * each:.2f} ms" for each in passes) for name, passes in took.items()},
    )
    return other if fastest(took) == "onnx" and is_alike(other, network) else lean


def _passes_seconds(forwards: dict[str, Forward]) -> dict[str, list[float]]:
    """Of each, a pass of a single text and a full one: a light load has the former and a backlog the latter."""
    took: dict[str, list[float]] = {name: [] for name in forwards}
    with torch.inference_mode():
        for texts in (1, EXAMPLE_TOKENS // EXAMPLE_LENGTH):
            ids = torch.full((texts, EXAMPLE_LENGTH), 1)
            turns = [[seconds(each, ids, None) for each in forwards.values()] for _ in range(TURNS)]
            for name, of_one in zip(forwards, zip(*turns, strict=True), strict=True):
                took[name].append(min(of_one))
    return took


def _exported(network: Any, *, is_int8: bool) -> exported.ExportedNetwork:
    return exported.ExportedNetwork(exported.export(network, is_int8=is_int8))


def _refuse_what_onnx_cannot(network: Any, backend: str, is_int8: bool) -> None:
    asked = _asked(backend, is_int8)
    if backend == "torch":
        raise BackendError("dtype int8 is computed by ONNX Runtime, and backend is torch; set backend to auto or onnx")
    if network.device.type != "cpu":
        raise BackendError(f"{asked} runs on a CPU, and the device is {network.device}; set device to cpu")
    if network.dtype != torch.float32:
        raise BackendError("backend onnx computes in float32 or int8; set dtype to one of them, or to auto")
    if not exported.is_installed():
        raise BackendError(f"{asked} needs the extra onnx: pip install 'sentiment-worker[onnx]'")


def _asked(backend: str, is_int8: bool) -> str:
    return "dtype int8" if is_int8 else f"backend {backend}"


def _own_forward(network: Any, ids: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    mask = torch.ones_like(ids)
    if lengths is not None:
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    logits: torch.Tensor = network(input_ids=ids, attention_mask=mask).logits
    return logits
