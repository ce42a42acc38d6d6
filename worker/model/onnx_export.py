"""BertClassifier in ONNX Runtime, on a CPU: float32, or int8 weights with activations quantized as they come.

Exported once into a cache folder, by a name that changes with the weights and with whatever makes the file.
"""

import hashlib
import importlib.util
import logging
import os
import stat
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from worker.model.autotune import cpu_has
from worker.model.torch.bert import NEVER, TOKEN_BY_TOKEN, BertClassifier, PlainLinear

log = logging.getLogger(__name__)
os.environ.setdefault(
    "ORT_DISABLE_TELEMETRY", "1"
)  # it would tell its maker of each session, and keep an id in a cache
logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it has a handler of its own

PACKAGES: Final = ("onnx", "onnxruntime", "onnxscript")
VERSION: Final = "3"  # of what this module writes


class ExportedModel:
    """Token ids → logits by ONNX Runtime, called as a BertClassifier. Blocks; takes the calling thread alone.

    Raises PermissionError where another user than the process's own and root may have written ``file``.
    """

    def __init__(self, file: Path) -> None:
        import onnxruntime  # noqa: PLC0415 - an extra

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(_read_own(file), options, providers=["CPUExecutionProvider"])

    def __call__(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None:
            lengths = torch.full((ids.shape[0],), ids.shape[1])
        (logits,) = self._session.run(None, {"ids": ids.numpy(), "lengths": lengths.numpy()})
        return torch.from_numpy(logits)


def is_installed() -> bool:
    """Whether the packages of the extra ``onnx`` are there."""
    return all(importlib.util.find_spec(name) for name in PACKAGES)


def export(model: Any, *, is_int8: bool) -> Path:
    """The ONNX file of a model that BertClassifier covers: from the cache folder, or written there first, in seconds.

    If the folder cannot be written or is another user's, the file goes into a temporary one. Raises what torch's exporter
    raises.
    """
    name = f"{_digest(model)}{'.int8' if is_int8 else ''}.onnx"
    folder = _cache_folder()
    if not (_is_own(folder) and _is_own(folder / name)):
        folder = _writable(folder)
        log.info("exporting the model for ONNX Runtime", extra={"file": str(folder / name)})
        with tempfile.TemporaryDirectory(dir=folder) as workplace:
            _write(model, Path(workplace), name, is_int8)
            (Path(workplace) / name).chmod(0o600)
            (Path(workplace) / name).replace(folder / name)  # at once, for another process may want it too
    return folder / name


def _write(model: Any, folder: Path, name: str, is_int8: bool) -> None:
    plain = folder / "plain.onnx" if is_int8 else folder / name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Module(model).eval(),
            (torch.randint(0, 2, (3, 7)), torch.tensor([7, 5, 2])),
            plain,
            input_names=["ids", "lengths"],
            output_names=["logits"],
            dynamic_shapes=(dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC), {0: torch.export.Dim.DYNAMIC}),
            external_data=False,
            verbose=False,
        )
    if is_int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - an extra

        # Products alone: rows of embeddings are only looked up, and bytes would make them coarser for no speed.
        # Without VNNI the products of two full bytes overflow 16 bits: reduce_range keeps weights to seven.
        quantize_dynamic(
            plain,
            folder / name,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=not _has_vnni(),
        )


class ApartLinear(PlainLinear):
    """A product of its own for each layer of the same input. Parts of one product would be copied before they are used."""

    def __init__(self, weight: Tensor, bias: Tensor, is_gelu: bool = False, widths: Sequence[int] = ()) -> None:
        super().__init__(weight, bias, is_gelu, widths)
        parts = zip(torch.split(weight, self._widths), torch.split(bias, self._widths), strict=True)
        self._layers = [PlainLinear(*part, is_gelu) for part in parts]

    def each(self, rows: Tensor) -> Sequence[Tensor]:
        return [layer(rows) for layer in self._layers]


class _Module(nn.Module):
    """BertClassifier as a torch module, for torch's exporter takes nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._bert = BertClassifier(model, linear=ApartLinear, fused_from=NEVER, order=TOKEN_BY_TOKEN)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self._bert(ids, lengths)


def _digest(model: Any) -> str:
    digest = hashlib.sha256()
    digest.update(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    digest.update(repr([VERSION, _has_vnni(), torch.__version__, *map(version, PACKAGES)]).encode())
    return digest.hexdigest()[:24]


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sentiment-worker" / "onnx"


def _writable(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if not _is_own(folder):
            raise PermissionError(0, "others may write there")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        log.warning("the cache folder %s cannot be written (%s): exporting anew at every start", folder, error.strerror)
        return Path(tempfile.mkdtemp(prefix="sentiment-worker-"))
    return folder


def _is_own(path: Path) -> bool:
    """Whether a file or folder is there, and nobody but this user and root can have written to it."""
    try:
        return _is_trusted(path.stat())
    except OSError:
        return False


def _is_trusted(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _read_own(file: Path) -> bytes:
    with file.open("rb") as opened:
        if not _is_trusted(os.fstat(opened.fileno())):  # of what was opened: the name may have changed its meaning
            raise PermissionError(f"{file} may have been written by another user")
        return opened.read()


def _has_vnni() -> bool:
    return cpu_has("avx512_vnni", "avx_vnni", "dot")
