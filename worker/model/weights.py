"""Reads the weights of a checkpoint into numpy arrays, whichever files it has. Needs no torch."""

import logging
import math
from collections.abc import Container
from pathlib import Path

from safetensors import SafetensorError, safe_open

from worker.model.checkpoint import Checkpoint, ModelError, NeedsTorch
from worker.model.torch_archive import read_archive
from worker.model.weight_arrays import DTYPES, ITEM_BYTES, Array, Damaged, OnlyForTorch, UnusableFile, read_array

log = logging.getLogger(__name__)


def read_weights(checkpoint: Checkpoint, wanted: Container[str] | None = None) -> dict[str, Array]:
    """The weights of a checkpoint by name, all or those that are ``wanted``: float32, and integers as they are.

    Each array is contiguous and in the process's own memory; tied weights share it. At its peak that takes the memory of
    all weights, and of one of them once more. Runs no code of the files. Blocks. Raises ModelError for a file that cannot
    be used, NeedsTorch for one that only torch reads.
    """
    weights: dict[str, Array] = {}
    files = [name for name in checkpoint.weights if not name.endswith(".index.json")]
    for file in files:
        weights |= _read(checkpoint, file, wanted)
    if not any(file.endswith(".safetensors") for file in files):
        log.warning(
            "model %s comes as a .bin without safetensors: only its tensors were read, by a reader that runs no code of "
            "the file and refuses all else",
            checkpoint.name,
        )
    return weights


def _read(checkpoint: Checkpoint, file: str, wanted: Container[str] | None) -> dict[str, Array]:
    path = checkpoint.find(file)
    refusal = f"model {checkpoint.name} cannot be loaded: its {file[:100]}"
    if path is None:
        raise ModelError(f"{refusal} is not there; copy or download it again")
    try:
        return _read_safetensors(path, wanted) if file.endswith(".safetensors") else read_archive(path, wanted)
    except OnlyForTorch as error:
        raise NeedsTorch(checkpoint.name, f"its {file[:100]} {error}", "save its weights as .safetensors") from None
    except UnusableFile as error:
        raise ModelError(f"{refusal} {error}") from None
    except OSError as error:
        raise ModelError(f"{refusal} cannot be read ({error.strerror or error})") from None


def _read_safetensors(path: Path, wanted: Container[str] | None) -> dict[str, Array]:
    """The library checks the header; the numbers are read here, for the library has no bfloat16 without torch."""
    try:
        with safe_open(path, framework="np", backend="pread") as header:  # mapped pages would change with the file
            slices = {name: header.get_slice(name) for name in header.offset_keys()}
            tensors = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        raise Damaged(str(error).splitlines()[0]) from None
    arrays: dict[str, Array] = {}
    with path.open("rb") as file:
        # The file is the header's length in eight bytes, the header, and the numbers without gaps.
        offset = 8 + int.from_bytes(file.read(8), "little")
        for name, (dtype, shape) in tensors.items():
            if dtype not in DTYPES:
                raise OnlyForTorch(f"holds tensors of the type {dtype}, which only torch reads")
            if wanted is None or name in wanted:
                arrays[name] = read_array(file, offset, shape, dtype)
            offset += math.prod(shape) * ITEM_BYTES[dtype]
    return arrays
