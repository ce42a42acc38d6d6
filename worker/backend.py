"""Which forward a loaded network gets: the lean one in torch or in ONNX Runtime, or its own."""

import logging
from functools import partial
from typing import Any

import torch

from worker import exported
from worker.network import EXAMPLE_TOKENS, Forward, LeanNetwork, is_alike, is_covered, seconds
from worker.settings import UsersMistake
from worker.tuning import keep_memory, use_one_thread

log = logging.getLogger(__name__)

EXAMPLE_LENGTH = 64


class BackendError(UsersMistake):
    """The backend that is asked for cannot run this network."""


def choose(network: Any, *, backend: str, is_int8: bool) -> Forward:
    """The fastest forward of those that ``backend`` (auto, torch, onnx) allows; auto takes no other than exact ones.

    On a CPU a pass takes one thread, the calling one.

    Blocks: what is measured takes a second, a first export several. Raises BackendError.
    """
    wants_onnx = backend == "onnx" or is_int8
    if wants_onnx:
        _refuse_what_onnx_cannot(network, backend, is_int8)
    if network.device.type == "cpu":
        keep_memory()
        use_one_thread()
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


def _lean(network: Any) -> LeanNetwork | None:
    lean = LeanNetwork(network) if is_covered(network) else None
    return lean if lean and is_alike(lean, network) else None


def _faster(network: Any, lean: LeanNetwork) -> Forward:
    try:
        other = _exported(network, is_int8=False)
    except Exception as error:  # noqa: BLE001 - whatever an exporter raises, there is a forward without it
        log.warning("the network cannot be exported to ONNX Runtime", extra={"error": type(error).__name__})
        return lean
    ids = torch.full((EXAMPLE_TOKENS // EXAMPLE_LENGTH, EXAMPLE_LENGTH), 1)
    with torch.inference_mode():
        took = {"torch": seconds(lean, ids, None), "onnx": seconds(other, ids, None)}
    log.info("measured the backends", extra={name: f"{1000 * each:.2f} ms" for name, each in took.items()})
    return lean if took["torch"] <= took["onnx"] or not is_alike(other, network) else other


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
