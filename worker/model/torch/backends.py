"""Chooses what computes a loaded model: BertClassifier in torch, the same in ONNX Runtime, or transformers' own code.

In this module a *forward* is a function from padded token ids and lengths to logits (``Forward`` in
``worker.model.torch.bert``).
"""

import copy
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from worker.core.batching import TokenIds, cut_by_length
from worker.errors import UserError
from worker.model import onnx_export
from worker.model.autotune import cpu_has, fastest, single_torch_thread
from worker.model.tokenizer import Ids
from worker.model.torch.bert import EXAMPLE_TOKENS, BertClassifier, Forward, is_alike, is_covered, shortest_run_s
from worker.model.torch.cuda import AGREEMENT, expected_agreement

log = logging.getLogger(__name__)

EXAMPLE_LENGTH = 64  # tokens
TURNS = 3  # the backends are measured in turns, so that another process's load meets both
COMPARED_TOKENS = 8_192  # a batch, in which number types are compared


class Choice(NamedTuple):
    """A forward with its number type (as in settings).

    ``exact`` computes texts again for which ``forward`` gives no finite logits; None where there is no more exact one.
    """

    forward: Forward
    dtype: str
    exact: Forward | None = None


class BackendError(UserError):
    """The backend or number type that the settings name cannot compute this model here."""


@single_torch_thread()
def choose_forward(model: Any, *, backend: str, is_int8: bool) -> Forward:
    """The fastest forward that ``backend`` (auto, torch, onnx) allows; auto takes none that computes less exactly.

    ``model``: a transformers model, on a CPU or a GPU. On a CPU, a forward computes on the calling thread alone.
    Blocks: measuring takes a second, a first export several. Raises BackendError.
    """
    wants_onnx = backend == "onnx" or is_int8
    if wants_onnx:
        _refuse_what_onnx_cannot(model, backend, is_int8)
    if model.device.type == "cpu" and model.dtype == torch.bfloat16 and not has_bfloat16():
        log.warning("this CPU does not compute in bfloat16 itself: dtype bfloat16 is slower here than float32")
    bert = _bert_classifier(model)
    if bert is None:
        if wants_onnx:
            raise BackendError(
                f"{_asked(backend, is_int8)} covers BERT and RoBERTa classifiers alone, and this checkpoint is a "
                f"{type(model).__name__}; leave backend and dtype at auto"
            )
        log.info("transformers computes this model: BertClassifier does not cover a %s", type(model).__name__)
        return partial(_transformers_forward, model)
    if wants_onnx:
        return _onnx_forward(model, is_int8=is_int8)
    if (
        backend == "torch"
        or model.device.type != "cpu"
        or model.dtype != torch.float32
        or not onnx_export.is_installed()
    ):
        return bert
    return _faster(model, bert)


def choose_cuda_forward(
    model: Any, *, backend: str, dtype: str, columns: Sequence[int], examples: Sequence[Ids]
) -> Choice:
    """``choose_forward`` on a GPU, and the number type where ``dtype`` is auto: the model is then in float32.

    Auto takes float16 if labels are expected to agree on 99.9 % of texts like ``examples``, token ids of N texts, judged by
    ``columns`` of the logits; else float32 with products in TF32. It prefers float16 to bfloat16, which is an eighth as
    precise: what exceeds float16's range shows as a logit that is not finite, and is computed again in float32.
    """
    torch.set_float32_matmul_precision("highest")  # a model that was loaded before may have set another
    forward = choose_forward(model, backend=backend, is_int8=dtype == "int8")
    if dtype != "auto":
        return Choice(forward, name_of(model.dtype))
    half = _torch_forward(copy.deepcopy(model).half())
    exact_logits, half_logits = (_logits_of(each, examples, model.device)[:, columns] for each in (forward, half))
    agreement = expected_agreement(exact_logits, half_logits)
    log.info("compared half precision", extra={"expected_agreement": f"{agreement:.4%}", "texts": len(examples)})
    if agreement >= AGREEMENT:
        return Choice(half, "float16", forward)
    torch.set_float32_matmul_precision("high")
    return Choice(forward, "float32")


def backend_of(forward: Forward) -> str:
    """The forward's backend, as in settings: onnx or torch."""
    return "onnx" if isinstance(forward, onnx_export.ExportedModel) else "torch"


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without them it is slower than float32."""
    return cpu_has("avx512_bf16", "amx_bf16", "bf16")


def name_of(dtype: torch.dtype) -> str:
    """A number type by its name in settings, such as float32."""
    return str(dtype).removeprefix("torch.")


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
        with single_torch_thread(), torch.inference_mode():
            output = self._forward(
                torch.from_numpy(padded), None if lengths.min() == padded.shape[1] else torch.from_numpy(lengths)
            )
        answer: NDArray[np.float32] = output.float().numpy()
        return answer


def padded_ids(ids: Sequence[TokenIds], padding: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids of N texts → padded ids (N, T), T tokens in the longest text, and the lengths (N)."""
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


def _torch_forward(model: Any) -> Forward:
    return _bert_classifier(model) or partial(_transformers_forward, model)


def _bert_classifier(model: Any) -> BertClassifier | None:
    bert = BertClassifier(model) if is_covered(model) else None
    return bert if bert and is_alike(bert, model) else None


def _faster(model: Any, bert: BertClassifier) -> Forward:
    """The faster one of torch and ONNX Runtime, for a model in float32 on a CPU."""
    try:
        other = _onnx_forward(model, is_int8=False)
    except Exception as error:  # noqa: BLE001 - whatever the exporter raises, torch computes without it
        log.warning("the model cannot be exported to ONNX Runtime", extra={"error": type(error).__name__})
        return bert
    took = _passes_seconds({"torch": bert, "onnx": other})
    log.info(
        "measured the backends by a pass of one text and a full pass",
        extra={name: " and ".join(f"{1000 * each:.2f} ms" for each in passes) for name, passes in took.items()},
    )
    return other if fastest(took) == "onnx" and is_alike(other, model) else bert


def _passes_seconds(forwards: dict[str, Forward]) -> dict[str, list[float]]:
    """Seconds for each forward, of a pass of a single text and of a full one."""
    took: dict[str, list[float]] = {name: [] for name in forwards}
    with torch.inference_mode():
        for texts in (1, EXAMPLE_TOKENS // EXAMPLE_LENGTH):
            ids = torch.full((texts, EXAMPLE_LENGTH), 1)
            turns = [[shortest_run_s(each, ids, None) for each in forwards.values()] for _ in range(TURNS)]
            for name, of_one in zip(forwards, zip(*turns, strict=True), strict=True):
                took[name].append(min(of_one))
    return took


def _onnx_forward(model: Any, *, is_int8: bool) -> onnx_export.ExportedModel:
    return onnx_export.ExportedModel(onnx_export.export(model, is_int8=is_int8))


def _refuse_what_onnx_cannot(model: Any, backend: str, is_int8: bool) -> None:
    asked = _asked(backend, is_int8)
    if backend == "torch":
        raise BackendError("dtype int8 is computed by ONNX Runtime, and backend is torch; set backend to auto or onnx")
    if model.device.type != "cpu":
        raise BackendError(f"{asked} runs on a CPU, and the device is {model.device}; set device to cpu")
    if model.dtype != torch.float32:
        raise BackendError("backend onnx computes in float32 or int8; set dtype to one of them, or to auto")
    if not onnx_export.is_installed():
        raise BackendError(f"{asked} needs the extra onnx: pip install 'sentiment-worker[onnx]'")


def _asked(backend: str, is_int8: bool) -> str:
    return "dtype int8" if is_int8 else f"backend {backend}"


def _transformers_forward(model: Any, ids: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    mask = torch.ones_like(ids)
    if lengths is not None:
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits
