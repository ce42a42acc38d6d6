"""Loads a checkpoint for ONNX Runtime where that can compute it, else for torch, which is imported only then.

Every function here blocks.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from worker.model.checkpoint import Checkpoint, NeedsTorch, find_in, folder_of
from worker.model.device import has_torch
from worker.model.onnx.loader import covered_architecture, load_onnx_model
from worker.model.runner import BackendError, PreparedRunner, RunnerOptions, prepare_cpu_runner
from worker.model.tokenizer import CheckpointTokenizer
from worker.model.tokenizer_files import load_tokenizer

log = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A checkpoint's tokenizer, and what prepares its model for this machine once the tokenizer's bounds are known."""

    tokenizer: CheckpointTokenizer
    prepare_runner: Callable[[RunnerOptions], PreparedRunner]


def open_checkpoint(name: str, revision: str | None) -> Checkpoint:
    """The files of a checkpoint by the name of a folder or of the hub, or ``builtin``. Raises ModelError, HubUnreachable."""
    folder = folder_of(name, revision)
    if folder:
        return Checkpoint(name, find_in(folder))
    from worker.model.hub import open_repository  # noqa: PLC0415 - a folder needs no client of the hub

    commit, find = open_repository(name, revision)
    return Checkpoint(name, find, commit)


def load_model(checkpoint: Checkpoint, *, device: str, dtype: str, backend: str) -> LoadedModel:
    """The model of a checkpoint, by the settings ``dtype`` and ``backend``; ``device`` is cpu or one of CUDA.

    Raises ModelError for a checkpoint that cannot be used, BackendError where the settings contradict each other, this
    machine or this checkpoint.
    """
    wants_onnx = backend == "onnx" or dtype == "int8"
    if wants_onnx:
        _refuse_what_onnx_cannot(device, dtype, backend)
    if device == "cpu" and backend != "torch" and dtype in ("auto", "float32", "int8"):
        try:
            return _for_onnx(checkpoint, is_int8=dtype == "int8")
        except NeedsTorch as error:
            if wants_onnx:
                raise BackendError(f"{_asked(dtype)} cannot compute this checkpoint: {error.why}") from None
            if not has_torch():
                raise
            log.info("torch computes this model", extra={"reason": error.why})
    if not has_torch():
        raise NeedsTorch(checkpoint.name, f"device is {device}, dtype {dtype} and backend {backend}")
    from worker.model.torch.loader import load_for_torch  # noqa: PLC0415 - the extra torch
    from worker.model.torch.runner import prepare_torch_runner  # noqa: PLC0415

    tokenizer, model = load_for_torch(checkpoint, device, dtype)
    return LoadedModel(tokenizer, partial(prepare_torch_runner, model, dtype=dtype))


def _for_onnx(checkpoint: Checkpoint, *, is_int8: bool) -> LoadedModel:
    architecture = covered_architecture(checkpoint)
    tokenizer = _tokenizer(checkpoint)
    forward = load_onnx_model(checkpoint, architecture, tokenizer, is_int8=is_int8)
    dtype = "int8" if is_int8 else "float32"
    return LoadedModel(tokenizer, partial(prepare_cpu_runner, forward, backend="onnx", dtype=dtype))


def _tokenizer(checkpoint: Checkpoint) -> CheckpointTokenizer:
    """The tokenizer of a checkpoint, by transformers if it is installed and nothing else reads the files."""
    try:
        return load_tokenizer(checkpoint.name, checkpoint.find, checkpoint.config)
    except NeedsTorch as error:
        if not has_torch():
            raise
        log.info("transformers reads this tokenizer", extra={"reason": error.why})
    from worker.model.torch.loader import load_transformers_tokenizer  # noqa: PLC0415 - the extra torch

    return load_transformers_tokenizer(checkpoint)


def _refuse_what_onnx_cannot(device: str, dtype: str, backend: str) -> None:
    if backend == "torch":
        raise BackendError("dtype int8 is computed by ONNX Runtime, and backend is torch; set backend to auto or onnx")
    if device != "cpu":
        raise BackendError(f"{_asked(dtype)} runs on a CPU, and the device is {device}; set device to cpu")
    if dtype not in ("auto", "float32", "int8"):
        raise BackendError("backend onnx computes in float32 or int8; set dtype to one of them, or to auto")


def _asked(dtype: str) -> str:
    return "dtype int8" if dtype == "int8" else "backend onnx"
