"""Chooses what computes a model in torch: BertClassifier, or transformers' own code.

In this module a *forward* is a function from padded token ids and lengths to logits (``Forward`` in
``worker.model.torch.bert``).
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from worker.core.batching import cut_by_length
from worker.model.runner import AGREEMENT, padded_ids
from worker.model.tokenizer import Ids
from worker.model.torch.bert import BertClassifier, Forward, is_alike, is_covered
from worker.model.torch.cuda import expected_agreement

log = logging.getLogger(__name__)

COMPARED_TOKENS = 8_192  # a batch, in which number types are compared


class Choice(NamedTuple):
    """A forward with its number type (as in settings), and the transformers model, in that type, that it stands for.

    ``exact`` computes texts again for which ``forward`` gives no finite logits; None where there is no more exact one.
    """

    forward: Forward
    dtype: str
    model: Any
    exact: Forward | None = None


def use_single_torch_thread() -> None:
    """Has torch compute on one thread per pass, for the calling thread and those that begin later, until it is set anew.

    Several passes at once, on a thread each, waste less than several threads in one pass.
    """
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@contextmanager
def single_torch_thread() -> Iterator[None]:
    """Has torch compute on the calling thread alone inside, and on as many as before after it. Takes a microsecond."""
    before = torch.get_num_threads()
    use_single_torch_thread()
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)


@single_torch_thread()
def choose_forward(model: Any) -> Forward:
    """BertClassifier where it gives what ``model`` gives, else transformers' own code.

    ``model``: a transformers model, on a CPU or a GPU. On a CPU, a forward computes on the calling thread alone.
    Blocks: measuring takes up to a second.
    """
    if model.device.type == "cpu" and model.dtype == torch.bfloat16 and not has_bfloat16():
        log.warning("this CPU does not compute in bfloat16 itself: dtype bfloat16 is slower here than float32")
    bert = _bert_classifier(model)
    if bert is None:
        log.info("transformers computes this model: BertClassifier does not cover a %s", type(model).__name__)
    return bert or partial(_transformers_forward, model)


def choose_cuda_forward(model: Any, *, dtype: str, columns: Sequence[int], examples: Sequence[Ids]) -> Choice:
    """``choose_forward`` on a GPU, and the number type where ``dtype`` is auto: the model is then in float32.

    Auto takes float16 if labels are expected to agree on 99.9 % of texts like ``examples``, token ids of N texts, judged by
    ``columns`` of the logits; else float32 with products in TF32. It prefers float16 to bfloat16, which is an eighth as
    precise: what exceeds float16's range shows as a logit that is not finite, and is computed again in float32.
    """
    torch.set_float32_matmul_precision("highest")  # a model that was loaded before may have set another
    forward = choose_forward(model)
    if dtype != "auto":
        return Choice(forward, name_of(model.dtype), model)
    half_model = copy.deepcopy(model).half()
    half = _torch_forward(half_model)
    exact_logits, half_logits = (logits_of(each, examples, model.device)[:, columns] for each in (forward, half))
    agreement = expected_agreement(exact_logits, half_logits)
    log.info("compared half precision", extra={"expected_agreement": f"{agreement:.4%}", "texts": len(examples)})
    if agreement >= AGREEMENT:
        return Choice(half, "float16", half_model, forward)
    torch.set_float32_matmul_precision("high")
    return Choice(forward, "float32", model)


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without them it is slower than float32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def name_of(dtype: torch.dtype) -> str:
    """A number type by its name in settings, such as float32."""
    return str(dtype).removeprefix("torch.")


class NumpyForward:
    """A forward of torch, on any device, called with arrays and answering with one. The calling thread computes."""

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self._forward = forward
        self._device = device

    def __call__(self, ids: NDArray[np.int64], lengths: NDArray[np.int64] | None) -> NDArray[np.float32]:
        given = [None if each is None else torch.from_numpy(each).to(self._device) for each in (ids, lengths)]
        with single_torch_thread(), torch.inference_mode():
            answer: NDArray[np.float32] = self._forward(*given).float().cpu().numpy()  # type: ignore[arg-type]
        return answer


def logits_of(forward: Forward, examples: Sequence[Ids], device: torch.device) -> NDArray[np.float32]:
    """Logits (N, labels) of the token ids of N texts, computed in padded batches on a device."""
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


def _transformers_forward(model: Any, ids: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    mask = torch.ones_like(ids)
    if lengths is not None:
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits
